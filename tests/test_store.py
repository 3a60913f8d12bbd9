"""The store: what is published comes back bit for bit or is refused, and nobody ever sees half a file.

`StoreBattery` runs against any kind of store; `test_store_s3.py` runs it against an S3 server.
"""

import os
import pickle
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.blobs import Blob, canonical_json
from gearnn_ray.store.files import FileTree
from gearnn_ray.store.manifest import Manifest
from gearnn_ray.store.releases import Store
from tests.stores import (
    ABSENT,
    KEY,
    OTHER_KEY,
    TABLE,
    Folder,
    OnAStore,
    Place,
    adaptor_state,
    base_state,
    compressed_content_of,
    content_of,
    equal,
    forge,
    listed_table,
    manifest_of,
    table,
)


class StoreBattery(OnAStore):
    # blobs

    def test_opening_and_looking_create_nothing(self, store: Store, place: Place) -> None:
        before = place.snapshot()
        assert not store.is_intact(ABSENT)
        assert store.names() == []
        assert store.tags("street") == {}
        assert store.tag_digest("street", "latest") is None
        assert store.get_record(KEY) is None
        assert store.get_checkpoint(KEY) is None
        store.drop_checkpoint(KEY)
        assert place.snapshot() == before

    def test_a_blob_comes_back(self, store: Store, place: Place) -> None:
        data = bytes(range(256)) * 50_000  # 12.8 MB: more than one part of an S3 upload
        digest = store.put_blob(data)
        assert place.read(f"blobs/sha256/{digest[7:]}") == data
        assert store.is_intact(digest)
        assert store.get_blob(digest) == data

        before = place.snapshot()
        assert store.put_blob(data) == digest
        assert place.snapshot() == before

    @pytest.mark.parametrize("damaged", [b"sho", b"Content"])
    def test_putting_a_blob_again_repairs_it(self, store: Store, place: Place, damaged: bytes) -> None:
        digest = store.put_blob(b"content")
        place.write(f"blobs/sha256/{digest[7:]}", damaged)
        with pytest.raises(CorruptStoreError, match=digest):
            store.get_blob(digest)
        assert not store.is_intact(digest)
        store.put_blob(b"content")
        assert store.is_intact(digest)
        assert store.get_blob(digest) == b"content"

    def test_a_missing_blob_is_named(self, store: Store) -> None:
        with pytest.raises(CorruptStoreError, match=ABSENT):
            store.get_blob(ABSENT)

    @pytest.mark.parametrize("digest", ["../../etc/passwd", "sha256:../../x", ABSENT + "\n", ABSENT[:-1], "é" * 64])
    def test_a_digest_is_never_a_path(self, store: Store, digest: str) -> None:
        for call in (store.get_blob, store.is_intact, store.get_state):
            with pytest.raises(CorruptStoreError, match="not a digest"):
                call(digest)

    def test_a_state_comes_back(self, store: Store) -> None:
        blob = store.put_state(base_state())
        assert blob.bytes == len(store.get_blob(blob.digest))
        assert equal(store.get_state(blob.digest), base_state())

    def test_a_blob_that_is_no_state_is_named(self, store: Store) -> None:
        digest = store.put_blob(b"intact, but no safetensors")
        with pytest.raises(CorruptStoreError, match=digest):
            store.get_state(digest)

    # stages

    def test_a_record_comes_back_and_can_be_replaced(self, store: Store) -> None:
        for record in ({"digest": ABSENT, "values": [0.1, -0.0, 1e300], "ü": None}, {}):
            store.put_record(KEY, record)
            assert store.get_record(KEY) == record
        assert store.get_record(OTHER_KEY) is None

    def test_a_damaged_record_counts_as_absent(self, store: Store, place: Place) -> None:
        store.put_record(KEY, {"miou": 0.5})
        path = f"stages/{KEY}.json"
        whole = place.read(path)
        nan = whole.replace(b"0.5", b"NaN")
        for damaged in (b"", whole[:-1], whole.replace(b"0.5", b"0.6"), b"\xff", b"[]", b'{"body":{}}', nan):
            place.write(path, damaged)
            assert store.get_record(KEY) is None, damaged
        place.write(path, whole)
        assert store.get_record(KEY) == {"miou": 0.5}

    def test_a_checkpoint_comes_back_and_can_be_dropped(self, store: Store) -> None:
        for data in (b"epoch 1", b"epoch 2", b""):
            store.put_checkpoint(KEY, data)
            assert store.get_checkpoint(KEY) == data
        store.drop_checkpoint(KEY)
        assert store.get_checkpoint(KEY) is None
        store.drop_checkpoint(KEY)

    def test_a_damaged_checkpoint_counts_as_absent(self, store: Store, place: Place) -> None:
        store.put_checkpoint(KEY, b"epoch 1")
        path = f"checkpoints/{KEY}.safetensors"
        whole = place.read(path)
        for damaged in (whole[:-1], whole[:20], b" ", whole[:-1] + b"2", b"?" + whole[1:]):
            place.write(path, damaged)
            assert store.get_checkpoint(KEY) is None, damaged

    @pytest.mark.parametrize("key", ["", "../" + KEY, KEY[:-1], KEY + "\n", KEY.upper()])
    def test_a_stage_key_is_never_a_path(self, store: Store, key: str) -> None:
        for call in (store.get_record, store.get_checkpoint, store.drop_checkpoint):
            with pytest.raises(ValueError, match="64 hexadecimal"):
                call(key)

    # tables

    def test_a_table_comes_back_with_its_metadata_and_equal_bytes(self, store: Store, place: Place) -> None:
        store.put_table(TABLE, table())
        assert store.get_table(TABLE).equals(table(), check_metadata=True)

        before = place.snapshot()
        store.put_table(TABLE, pa.concat_tables([table().slice(0, 1), table().slice(1)]))
        assert place.snapshot() == before
        store.put_table(TABLE, table(0.75))
        assert store.get_table(TABLE).equals(table(0.75))

    def test_a_table_that_is_absent_or_damaged_is_named(self, store: Store, place: Place) -> None:
        with pytest.raises(UserError, match=TABLE):
            store.get_table(TABLE)
        place.write(TABLE, b"PAR1 no more")
        with pytest.raises(CorruptStoreError, match=TABLE):
            store.get_table(TABLE)

    @pytest.mark.parametrize("path", ["tables/../x.parquet", "/tables/x.parquet", "refs/x.parquet", "tables/x.csv"])
    def test_a_table_stays_among_the_tables(self, store: Store, path: str) -> None:
        with pytest.raises(ValueError, match="path"):
            store.put_table(path, table())

    # releases

    def test_a_release_comes_back(self, store: Store) -> None:
        manifest = manifest_of(store)
        digest = store.publish(manifest, {TABLE: table()}, tags=["v1"])
        assert store.names() == ["street"]
        assert store.tags("street") == {"latest": digest, "v1": digest}
        for ref in ("street", "street:latest", "street:v1", f"street@{digest}"):
            release = store.pull(ref)
            assert release.digest == digest
            assert release.name == "street"
            created = datetime.fromisoformat(release.manifest["created"])
            assert created.utcoffset() == timedelta(0)
            listed = {TABLE: listed_table(store)}
            own = {"created": release.manifest["created"], "tables": {path: blob.model_dump() for path, blob in listed.items()}}
            assert release.manifest == {**content_of(store), **own}
            assert release.content == manifest.model_copy(update={"created": release.content.created, "tables": listed})
            assert set(release.levels) == {"clean", "brightness-0.4+jpeg-30"}
            assert equal(release.base_state(), base_state())
            assert equal(release.adaptor_state("brightness-0.4+jpeg-30"), adaptor_state(1.0))
            assert release.adaptor_state("clean") == {}
        with pytest.raises(UserError, match=r"jpeg-99.*brightness-0\.4\+jpeg-30"):
            release.adaptor_state("jpeg-99")
        assert store.get_table(TABLE).equals(table())

    def test_a_compressed_release_comes_back_restored(self, store: Store) -> None:
        content, back = compressed_content_of(store)
        digest = store.publish(Manifest.model_validate(content), {})
        release = store.pull("street")
        assert equal(release.adaptor_state("jpeg-10"), back)
        assert equal(release.adaptor_state("brightness-0.4+jpeg-30"), adaptor_state(1.0))
        assert equal(release.base_state(), base_state())
        for again in (release.content, Manifest.model_validate(release.manifest)):
            assert store.publish(again, {}) == digest

    def test_equal_manifests_have_equal_bytes(self, store: Store, place: Place) -> None:
        content = content_of(store)
        spelled_out = {"data": None, "seed": None, "execution": None, "model": content["model"] | {"class_names": []}}
        digest = store.publish(Manifest.model_validate(content), {})
        assert store.publish(Manifest.model_validate(content | spelled_out), {}) == digest
        written = place.read(f"manifests/{digest[7:]}.json")
        assert written == canonical_json({**content, "created": store.manifest("street")[1].created})

    def test_the_dicts_of_a_release_are_the_callers_own(self, store: Store) -> None:
        store.publish(manifest_of(store), {})
        release = store.pull("street")
        release.base_state().clear()
        release.adaptor_state("brightness-0.4+jpeg-30").clear()
        assert equal(release.base_state(), base_state())
        assert release.adaptor_state("brightness-0.4+jpeg-30")
        with pytest.raises(AttributeError):
            release.digest = ABSENT  # type: ignore[misc]

    def test_publishing_the_same_again_adds_nothing(self, store: Store, place: Place) -> None:
        digest = store.publish(manifest_of(store), {TABLE: table()}, tags=["v1"])
        before = place.snapshot()
        again = dict(reversed(content_of(store).items()))
        assert Store(place.uri).publish(Manifest.model_validate(again), {TABLE: table()}, tags=["v1"]) == digest
        assert place.snapshot() == before

    def test_publishing_a_then_b_then_a(self, store: Store, place: Place) -> None:
        a = store.publish(manifest_of(store, 1.0), {})
        b = store.publish(manifest_of(store, 2.0), {}, tags=["second"])
        files = place.snapshot().keys()
        assert a != b
        assert store.pull("street").digest == b
        assert store.publish(manifest_of(store, 1.0), {}) == a
        assert store.tags("street") == {"latest": a, "second": b}
        assert place.snapshot().keys() == files

    @pytest.mark.parametrize("damage", ["missing", "altered"])
    def test_publishing_again_repairs_the_manifest(self, store: Store, place: Place, damage: str) -> None:
        digest = store.publish(manifest_of(store), {})
        path = f"manifests/{digest[7:]}.json"
        if damage == "missing":
            place.remove(path)
        else:
            place.write(path, b"{}")
        with pytest.raises(CorruptStoreError, match=digest):
            store.pull("street")
        assert store.publish(manifest_of(store), {}) == digest
        assert store.pull("street").digest == digest

    def test_publishing_without_its_record_makes_a_new_manifest(self, store: Store, place: Place) -> None:
        a = store.publish(manifest_of(store), {})
        for path in place.snapshot():
            if path.startswith("stages/") and path.endswith(".json"):
                place.write(path, b"torn")
        b = store.publish(manifest_of(store), {})
        assert a != b
        assert store.pull("street").digest == b
        assert store.pull(f"street@{a}").digest == a

    def test_publishing_and_tagging_repair_a_ref_whatever_it_holds(self, store: Store, place: Place) -> None:
        digest = store.publish(manifest_of(store), {TABLE: table()}, ["v1"])
        for damaged in (b"", b"torn", bytes(1_000_000)):
            for tag in ("latest", "v1"):
                place.write(f"refs/street/{tag}", damaged)
            store.tag("street", "v1", digest)
            assert store.publish(manifest_of(store), {TABLE: table()}) == digest
            assert store.tags("street") == {"latest": digest, "v1": digest}

    # what is checked before it is read

    def test_sizes_are_compared_before_anything_is_read(
        self, store: Store, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest = store.publish(manifest_of(store), {})
        level = store.manifest("street")[1].levels["brightness-0.4+jpeg-30"]
        adaptor = f"blobs/sha256/{str(level.digest)[7:]}"
        whole, read = place.read(adaptor), list[int]()
        allocate = pa.allocate_buffer
        monkeypatch.setattr(pa, "allocate_buffer", lambda size, *more: read.append(size) or allocate(size, *more))
        place.write(adaptor, bytes(1_000_000))
        with pytest.raises(CorruptStoreError, match=f"{level.digest} has 1000000 bytes, but the manifest says {level.bytes}"):
            store.pull("street")
        place.write(adaptor, whole)
        for path, sentence in (
            ("refs/street/latest", "refs/street/latest has 5,000,000 bytes, expected at most 256"),
            (f"manifests/{digest[7:]}.json", r"json has 5,000,000 bytes, expected at most 4,194,304"),
        ):
            whole = place.read(path)
            place.write(path, bytes(5_000_000))
            with pytest.raises(CorruptStoreError, match=sentence) as caught:
                store.pull("street")
            assert "\n" not in str(caught.value)
            place.write(path, whole)
        assert max(read) < 100_000
        assert store.pull("street").digest == digest

    def test_a_manifest_that_nobody_would_read_is_not_published(self, store: Store, place: Place) -> None:
        before = place.snapshot()
        large = manifest_of(store).model_copy(update={"config": {"text": "x" * 5_000_000}})
        with pytest.raises(UserError, match=r"has 5,00\d,\d+ bytes, expected at most 4,194,304"):
            store.publish(large, {})
        assert store.names() == []
        assert {path for path in place.snapshot().keys() - before.keys() if path.startswith("refs")} == set()

    @pytest.mark.parametrize("opening", [b"[", b'{"a":'])
    def test_json_that_is_nested_without_end_is_a_sentence(self, store: Store, place: Place, opening: bytes) -> None:
        nested = opening * 50_000
        digest = forge(place, nested)
        with pytest.raises(CorruptStoreError, match=f"{digest} is not valid: its JSON is nested too deeply"):
            store.pull("street")
        within = b'{"schema":2,"config":' + b'{"a":' * 900 + b"1" + b"}" * 901
        forge(place, within)
        with pytest.raises(UserError, match="manifest sha256"):
            store.pull("street")
        place.write(f"stages/{KEY}.json", nested)
        assert store.get_record(KEY) is None
        blob = store.put_blob(len(nested).to_bytes(8, "little") + nested)
        with pytest.raises(CorruptStoreError, match=f"{blob} does not hold safetensors"):
            store.get_state(blob)

    def test_an_unknown_release_names_those_there_are(self, store: Store) -> None:
        with pytest.raises(UserError, match=r"^No release street:latest: the store .* is empty\. Run the split job first"):
            store.pull("street")
        digest = store.publish(manifest_of(store), {}, tags=["v1"])
        with pytest.raises(UserError, match="street:latest, street:v1"):
            store.pull("street:v2")
        with pytest.raises(UserError, match="has releases of street"):
            store.pull("road")
        with pytest.raises(UserError, match="of 'street', not of 'road'"):
            store.pull(f"road@{digest}")
        with pytest.raises(CorruptStoreError, match=ABSENT):
            store.pull(f"street@{ABSENT}")

    @pytest.mark.parametrize("ref", ["", "../street", "street:", "street:../v1", "street:v1:v2", "street@", "@" + ABSENT])
    def test_a_ref_is_never_a_path(self, store: Store, ref: str) -> None:
        with pytest.raises(UserError, match=r"cannot be used|not a digest"):
            store.pull(ref)

    def test_publishing_without_latest_moves_only_the_tags(self, store: Store) -> None:
        whole = store.publish(manifest_of(store, 1.0), {})
        partial = store.publish(manifest_of(store, 2.0), {}, ("partial",), latest=False)
        assert store.tags("street") == {"latest": whole, "partial": partial}

    def test_files_beside_the_refs_harm_neither_reading_nor_listing(self, store: Store, place: Place) -> None:
        digest = store.publish(manifest_of(store), {})
        place.write("refs/street/latest.bak", b"no digest")
        place.write("refs/street/old/latest", digest.encode())
        place.write("refs/street/latest~", digest.encode())
        place.write("refs/README", b"about")
        assert store.tag_digest("street", "latest") == digest
        assert store.tag_digest("street", "v1") is None
        assert store.tags("street") == {"latest": digest}
        assert store.names() == ["street"]
        assert store.pull("street").digest == digest
        with pytest.raises(UserError, match="No release street:v1"):
            store.pull("street:v1")
        store.tag("street", "latest", digest)
        with pytest.raises(CorruptStoreError, match=r"refs/street/latest\.bak.*'no digest'"):
            store.tag_digest("street", "latest.bak")

    def test_a_torn_ref_is_refused(self, store: Store, place: Place) -> None:
        store.publish(manifest_of(store), {})
        for torn in (b" ", b"sha256:12", b"../../etc/passwd", b"\xff"):
            place.write("refs/street/latest", torn)
            with pytest.raises(CorruptStoreError, match="refs/street/latest"):
                store.pull("street")
            with pytest.raises(CorruptStoreError, match="refs/street/latest"):
                store.tag_digest("street", "latest")
            assert store.tags("street") == {}

    def test_a_corrupt_blob_is_refused_on_publishing_and_repaired_by_its_writer(self, store: Store, place: Place) -> None:
        a = store.publish(manifest_of(store, 1.0), {})
        full, content = store.put_blob(b"full fine-tune"), content_of(store, 2.0)
        level = content["levels"]["brightness-0.4+jpeg-30"]
        level["full"] = {"digest": full, "bytes": 14}
        for digest in (content["base"]["digest"], level["digest"], full):
            whole = store.get_blob(digest)
            place.write(f"blobs/sha256/{digest[7:]}", whole[:-1] + bytes([whole[-1] ^ 1]))
            assert not store.is_intact(digest)
            before = place.snapshot()
            with pytest.raises(CorruptStoreError, match=f"{digest} is altered") as caught:
                store.publish(Manifest.model_validate(content), {TABLE: table()}, tags=["v1"])
            assert "\n" not in str(caught.value)
            assert place.snapshot() == before
            store.put_blob(whole)
        assert store.tags("street") == {"latest": a}
        b = store.publish(Manifest.model_validate(content), {TABLE: table()}, tags=["v1"])
        assert store.pull("street:v1").digest == b

    def test_a_flipped_byte_or_a_missing_file_is_refused_by_its_digest(self, store: Store, place: Place) -> None:
        store.publish(manifest_of(store), {})
        content = [path for path in place.snapshot() if path.startswith(("blobs/sha256/", "manifests/"))]
        content = [path for path in content if len(path) > 60]  # not the folders
        assert len(content) == 3  # base, adaptor, manifest
        for path in content:
            whole = place.read(path)
            digest = "sha256:" + path.rpartition("/")[2].removesuffix(".json")
            for at in (0, len(whole) // 2, len(whole) - 1):
                place.write(path, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
                with pytest.raises(CorruptStoreError, match=digest):
                    store.pull("street")
            place.remove(path)
            with pytest.raises(CorruptStoreError, match=digest):
                store.pull("street")
            place.write(path, whole)
        assert store.pull("street").levels

    def test_publishing_an_invalid_or_incomplete_release_changes_nothing(self, store: Store, place: Place) -> None:
        store.publish(manifest_of(store, 1.0), {TABLE: table()}, tags=["v1"])
        good = manifest_of(store, 2.0)
        level = good.levels["brightness-0.4+jpeg-30"]

        def with_level(**changes: Any) -> Manifest:
            return good.model_copy(update={"levels": {"jpeg-10": level.model_copy(update=changes)}})

        before = place.snapshot()
        for bad in (
            with_level(digest=ABSENT),
            with_level(digest=None),
            with_level(bytes=level.bytes + 1),
            with_level(storage_formats={"bn.running_mean": "int4"}),
            with_level(full=Blob(digest=ABSENT, bytes=1)),
            good.model_copy(update={"base": Blob(digest=ABSENT, bytes=1)}),
            good.model_copy(update={"name": "../street"}),
            good.model_copy(update={"name": None}),
            good.model_copy(update={"levels": {"clean": level}}),
            good.model_copy(update={"levels": {"../x": level}}),
        ):
            with pytest.raises(UserError):
                store.publish(bad, {TABLE: table(0.9)}, tags=["v1"])
        with pytest.raises(UserError, match="tag"):
            store.publish(good, {TABLE: table(0.9)}, tags=["v1", "../v2"])
        with pytest.raises(ValueError, match="path"):
            store.publish(good, {"../x.parquet": table(0.9)})
        with pytest.raises(ValueError, match="JSON"):
            store.publish(good.model_copy(update={"recipe": {"epochs": float("nan")}}), {TABLE: table(0.9)})
        assert place.snapshot() == before

    def test_interrupted_at_any_write_the_latest_release_stays_whole(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        a = store.publish(manifest_of(store, 1.0), {TABLE: table()})
        b_manifest = manifest_of(store, 2.0)
        outcomes: list[str] = []

        def limited(call: Any, left: Iterator[int]) -> Any:
            def limited_call(*arguments: Any) -> Any:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return call(*arguments)

            return limited_call

        for allowed in range(20):
            left = iter(range(allowed))
            with monkeypatch.context() as patch:
                for name in ("write", "update"):
                    patch.setattr(FileTree, name, limited(getattr(FileTree, name), left))
                with suppress(KeyboardInterrupt):
                    outcomes.append(store.publish(b_manifest, {TABLE: table(0.75)}, tags=["v2"]))
            latest = store.pull("street").digest
            if outcomes:
                break
            assert (latest == a) == (allowed < 5)  # until its ref is written
            for tag in store.tags("street"):
                store.pull(f"street:{tag}")  # a ref that is there always leads to a whole release
        assert allowed == 6  # the table's blob, record, manifest, tag, latest, the table's path
        assert outcomes == [latest]

    def test_many_publish_at_once(self, store: Store, place: Place) -> None:
        start = threading.Barrier(6)

        def publish(i: int) -> str:
            mine = Store(place.uri)
            manifest = manifest_of(mine, float(i % 2))
            start.wait()
            return mine.publish(manifest, {TABLE: table(i % 2)}, tags=[f"v{i}"])

        with ThreadPoolExecutor(6) as pool:
            digests = list(pool.map(publish, range(6)))
        for i, digest in enumerate(digests):
            release = store.pull(f"street:v{i}")
            assert release.digest == digest
            assert equal(release.adaptor_state("brightness-0.4+jpeg-30"), adaptor_state(float(i % 2)))
        assert store.pull("street").digest in digests
        assert store.get_table(TABLE).equals(table(0)) or store.get_table(TABLE).equals(table(1))

    # being killed

    def test_a_reader_never_sees_half_a_file_even_when_the_writer_is_killed(self, store: Store, place: Place) -> None:
        script = (
            "import os, sys; from gearnn_ray.store.blobs import BlobStore; store = BlobStore(sys.argv[1]); i = 0\n"
            "while True:\n"
            "    store.put_blob(os.urandom(2_000_000)); i += 1\n"
            "    store.put_record('a' * 64, {'i': i, 'pad': 'x' * 100_000 * (i % 2)})\n"
        )
        writer = subprocess.Popen([sys.executable, "-c", script, place.uri], cwd=Path(__file__).parent.parent)
        seen: set[str] = set()
        deadline = time.monotonic() + 150  # importing torch takes long on a busy machine
        try:
            while len(seen) < 8 and time.monotonic() < deadline:
                assert writer.poll() is None
                for name in set(FileTree(place.uri).files("blobs/sha256")) - seen:
                    store.get_blob(f"sha256:{name}")  # while the next one is being written
                    seen.add(name)
                if len(seen) > 1:
                    assert store.get_record(KEY) is not None
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        assert len(seen) >= 8
        for name in FileTree(place.uri).files("blobs/sha256"):
            store.get_blob(f"sha256:{name}")
        assert store.get_record(KEY) is not None

    # the address

    def test_check_writable_leaves_the_store_as_it_was(self, store: Store, place: Place) -> None:
        store.publish(manifest_of(store), {TABLE: table()})
        before = place.snapshot().keys()
        store.check_writable()
        assert place.snapshot().keys() - {""} == before  # "" is the marker pyarrow keeps for the prefix on S3

    def test_a_store_travels_to_a_worker(self, store: Store) -> None:
        digest = store.put_blob(b"content")
        there = pickle.loads(pickle.dumps(store))
        assert there.uri == store.uri
        assert there.get_blob(digest) == b"content"


class TestLocalStore(StoreBattery):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Folder:
        return Folder(tmp_path / "a" / "store")

    def test_check_writable_creates_no_folder(self, store: Store, tmp_path: Path) -> None:
        store.check_writable()
        assert list(tmp_path.iterdir()) == []

    def test_a_path_below_a_file_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        (tmp_path / "link").symlink_to("nowhere")
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "refs").write_bytes(b"")  # a part of it is enough
        for uri in ("file", "file/deeper/store", "link", "store", "x" * 300):
            with pytest.raises(UserError, match="cannot be written") as caught:
                Store(tmp_path / uri).check_writable()
            assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "link", "refs", "store"]

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that even root cannot write")
    def test_a_file_system_that_takes_nothing_cannot_be_written(self) -> None:
        with pytest.raises(UserError, match="cannot be written"):
            Store("/proc/no/store").check_writable()

    def test_what_cannot_be_read_is_one_sentence(self, store: Store, place: Folder, tmp_path: Path) -> None:
        (place.root / "refs/street/latest").mkdir(parents=True)
        with pytest.raises(UserError, match="cannot be read") as caught:
            store.pull("street")
        assert "\n" not in str(caught.value)
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(UserError):
            Store(tmp_path / "file").pull("street")

    @pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
    def test_what_is_no_regular_file_is_refused_at_once(self, store: Store, place: Folder, kind: str) -> None:
        digest = store.publish(manifest_of(store), {TABLE: table()})
        make = {"FIFO": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}[kind]
        manifest = store.manifest("street")[1]
        for path in ("refs/street/latest", f"manifests/{digest[7:]}.json", f"blobs/sha256/{manifest.base.digest[7:]}"):
            whole = place.read(path)
            place.remove(path)
            make(place.root / path)
            with pytest.raises(UserError, match=f"is a {kind}, expected a regular file") as caught:
                store.pull("street")
            assert "\n" not in str(caught.value)
            if kind == "folder":
                (place.root / path).rmdir()
            else:
                place.remove(path)
            place.write(path, whole)
        make(place.root / "stages" / f"{KEY}.json")
        assert store.get_record(KEY) is None
        make(place.root / "checkpoints")
        assert store.pull("street").digest == digest

    def test_a_relative_path_stays_where_it_was_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        store = Store("here/store")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        digest = store.put_blob(b"content")
        assert (tmp_path / "here" / "store" / "blobs" / "sha256" / digest[7:]).read_bytes() == b"content"
        assert Store((tmp_path / "here/store").as_uri()).get_blob(digest) == b"content"

    def test_others_may_read_what_was_written(self, store: Store, place: Folder) -> None:
        digest = store.put_blob(b"content")
        mask = os.umask(0)
        os.umask(mask)
        assert (place.root / "blobs/sha256" / digest[7:]).stat().st_mode & 0o777 == 0o666 & ~mask

    def test_temporary_files_of_a_killed_writer_are_not_content(self, store: Store, place: Folder) -> None:
        digest = store.publish(manifest_of(store), {})
        place.write("refs/street/.tmp-1-ab", b"half")
        place.write("refs/.tmp-1-ab", b"half")
        assert store.tags("street") == {"latest": digest}
        assert store.names() == ["street"]

    def test_a_failed_write_leaves_nothing(self, store: Store, place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.put_blob(b"content")
        assert not [path for path in place.root.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "\0",
        "ftp://host/x",
        "gs://bucket/x",
        "file://relative",
        "s3://",
        "s3://bucket?colour=red",
        "s3://a b",
        "s3:/bucket",
        "file:/x",
    ],
)
def test_an_address_nobody_can_open_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="Cannot open the store") as caught:
        Store(uri)
    assert "\n" not in str(caught.value)


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="environment") as caught:
        Store("s3://user:hunter2@bucket/x?region=us-east-1")
    assert "hunter2" not in str(caught.value)


SAFE = set(string.ascii_letters + string.digits + "._-")


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.sampled_from("aZ09._-/\\:@ \n\0ü"), max_size=6) | st.text(max_size=140))
@example("line\n")
@example("x" * 129)
@example("x" * 128)
def test_names_are_path_safe_or_refused(name: str) -> None:
    store = Store("never-written")
    if name and set(name) <= SAFE and name[0] not in "._-" and len(name) <= 128:
        assert store.tags(name) == {}
    else:
        with pytest.raises(UserError, match="cannot be used"):
            store.tags(name)


def test_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null]}'.encode()
    assert canonical_json({10: 1, 9: 2}) == canonical_json({"9": 2, "10": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})
