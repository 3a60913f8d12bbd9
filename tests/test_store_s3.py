"""The store on S3: the battery of `test_store.py` against a server of the real protocol on loopback."""

import _thread
import importlib.util
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gearnn_ray.cli.machine import gather
from gearnn_ray.config.doctor import DoctorConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.store.releases import Store, digest_of
from tests.stores import manifest_of
from tests.test_store import StoreBattery
from tests.test_store_tags import TagBattery

if importlib.util.find_spec("moto") is None:
    pytest.skip("needs moto's S3 server", allow_module_level=True)

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "models"


class Bucket:
    """A prefix of the bucket through another client. The bucket keeps versions: every write shows."""

    def __init__(self, endpoint: str, prefix: str) -> None:
        self.uri = f"s3://{BUCKET}/{prefix}?endpoint_override={endpoint}&scheme=http"
        self._prefix = prefix + "/"
        self._client = boto3.client("s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1")

    def snapshot(self) -> dict[str, Any]:
        pages = self._client.get_paginator("list_object_versions").paginate(Bucket=BUCKET, Prefix=self._prefix)
        objects = [each for page in pages for each in page.get("Versions", [])]
        return {each["Key"][len(self._prefix) :]: each["VersionId"] for each in objects if each["IsLatest"]}

    def read(self, path: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=BUCKET, Key=self._prefix + path)["Body"].read()
        return data

    def write(self, path: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=self._prefix + path, Body=data)

    def remove(self, path: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=self._prefix + path)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_PROFILE", raising=False)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)
        client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
        yield f"{host}:{port}"
        server.stop()


class InterruptedFileSystem:
    """Ctrl-C arrives just as an upload has begun."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def open_output_stream(self, path: str) -> Any:
        stream = self._real.open_output_stream(path)
        _thread.interrupt_main()
        return stream


class TestS3Store(StoreBattery, TagBattery):
    prefixes = iter(range(10_000))

    @pytest.fixture
    def place(self, endpoint: str) -> Bucket:
        return Bucket(endpoint, f"team/store-{next(self.prefixes)}")

    def test_check_writable_leaves_no_object(self, store: Store, place: Bucket) -> None:
        store.check_writable()
        assert [path for path in place.snapshot() if path] == []  # "" is pyarrow's marker of the prefix itself

    def test_the_bucket_itself_can_be_a_store(self, endpoint: str) -> None:
        store = Store(f"s3://{BUCKET}?endpoint_override={endpoint}&scheme=http")
        digest = store.publish(manifest_of(store), {})
        assert store.pull("street").digest == digest

    def test_a_bucket_that_is_not_there_cannot_be_written_and_is_not_made(self, endpoint: str, place: Bucket) -> None:
        store = Store(f"s3://nowhere/x?endpoint_override={endpoint}&scheme=http")
        for _ in range(2):
            with pytest.raises(UserError, match="cannot be written") as caught:
                store.check_writable()
            assert "\n" not in str(caught.value)

    def test_the_doctor_finds_it_usable_with_its_clock_and_leaves_it_as_it_is(self, place: Bucket, tmp_path: Path) -> None:
        store = gather(DoctorConfig(store=place.uri, cache=str(tmp_path)), {}).store
        ahead, error = store.ahead or (1e9, 0.0)
        assert (store.uri, store.problem) == (place.uri, None)
        assert abs(ahead) <= error + 1
        assert [path for path in place.snapshot() if path] == []

    def test_ctrl_c_waits_for_the_upload(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        # Otherwise the stream, open and still empty, is completed by its destructor: an empty object.
        monkeypatch.setattr(store._files, "_fs", InterruptedFileSystem(store._files._fs))
        data = b"x" * 11_000_000  # more than one part
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores Ctrl-C
        try:
            with pytest.raises(KeyboardInterrupt):
                store.put_blob(data)
        finally:
            signal.signal(signal.SIGINT, before)
        assert store.get_blob(digest_of(data)) == data
