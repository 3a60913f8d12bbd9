"""The store on S3: the battery of `test_store.py` against a server of the real protocol on loopback."""

import _thread
import importlib.util
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gearnn_ray.errors import UserError
from gearnn_ray.store import Store, digest_of
from tests.test_store import StoreBattery, manifest_of

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
        pages = self._client.get_paginator("list_object_versions").paginate(
            Bucket=BUCKET, Prefix=self._prefix
        )
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


class TestS3Store(StoreBattery):
    prefixes = iter(range(10_000))

    @pytest.fixture
    def place(self, endpoint: str) -> Bucket:
        return Bucket(endpoint, f"team/store-{next(self.prefixes)}")

    def test_check_writable_leaves_no_object(self, store: Store, place: Bucket) -> None:
        store.check_writable()
        assert [
            path for path in place.snapshot() if path
        ] == []  # "" is pyarrow's marker of the prefix itself

    def test_the_bucket_itself_can_be_a_store(self, endpoint: str) -> None:
        store = Store(f"s3://{BUCKET}?endpoint_override={endpoint}&scheme=http")
        digest = store.publish(manifest_of(store), {})
        assert store.pull("street").digest == digest

    def test_a_bucket_that_is_not_there_cannot_be_written_and_is_not_made(
        self, endpoint: str, place: Bucket
    ) -> None:
        store = Store(f"s3://nowhere/x?endpoint_override={endpoint}&scheme=http")
        for _ in range(2):
            with pytest.raises(UserError, match="cannot be written") as caught:
                store.check_writable()
            assert "\n" not in str(caught.value)

    def test_an_interrupted_upload_is_whole_or_absent(self, store: Store) -> None:
        for milliseconds in (0, 2, 5, 10, 20, 40):
            data = bytes([milliseconds]) * 11_000_000
            interrupt = threading.Timer(milliseconds / 1000, _thread.interrupt_main)
            try:
                interrupt.start()
                store.put_blob(data)
                interrupt.join()
            except KeyboardInterrupt:
                pass
            if store.has_blob(digest_of(data)):
                assert store.get_blob(digest_of(data)) == data
