"""The store: what is published comes back bit for bit or is refused, and nobody ever sees half a file.

`StoreBattery` runs against any kind of store; `test_store_s3.py` runs it against an S3 server.
"""

import json
import os
import pickle
import re
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gearnn_ray.adaptors import storage_formats
from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.blobs import Blob, canonical_json, digest_of, encode_table
from gearnn_ray.store.files import FileTree
from gearnn_ray.store.manifest import SCHEMA, Manifest, content_key
from gearnn_ray.store.releases import Store
from gearnn_ray.store.tags import LostRaceError

KEY, OTHER_KEY = "a" * 64, "b" * 64
ABSENT = "sha256:" + "0" * 64
TABLE = "tables/street/sensitivity/jpeg-10.parquet"


class Place(Protocol):
    """A store seen from outside, without the code under test."""

    uri: str

    def snapshot(self) -> dict[str, Any]: ...  # path -> something that changes with every write of it

    def read(self, path: str) -> bytes: ...

    def write(self, path: str, data: bytes) -> None: ...

    def remove(self, path: str) -> None: ...


class Folder:
    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root)

    def snapshot(self) -> dict[str, Any]:
        paths = sorted(self.root.rglob("*"))
        # a file that is replaced is another file; one that is only made young stays the same
        return {str(path.relative_to(self.root)): path.stat().st_ino for path in paths}

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)

    def remove(self, path: str) -> None:
        (self.root / path).unlink()


class Clock(datetime):
    """Every look at it is a minute later: `created` differs wherever it is taken anew."""

    looks = 0

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        cls.looks += 1
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=cls.looks)


def base_state() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=random),
        "bn.running_mean": torch.randn(4, generator=random),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def adaptor_state(shift: float) -> dict[str, Tensor]:
    return {"bn.running_mean": base_state()["bn.running_mean"] + shift}


def table(share: float = 0.5) -> pa.Table:
    fields = [
        pa.field("level", pa.string(), metadata={"meaning": "distortion level"}),
        pa.field("share", pa.float64(), metadata={"unit": "1"}),
    ]
    rows = {"level": ["jpeg-10", "jpeg-20"], "share": [share, 0.25]}
    return pa.table(rows, schema=pa.schema(fields, metadata={"schema_version": "1"}))


def listed_table(store: Store, share: float = 0.5) -> Blob:
    """The entry of `table(share)` in a manifest."""
    data = encode_table(table(share))
    return Blob(digest=digest_of(data), bytes=len(data))


def manifest_of(store: Store, shift: float = 1.0, name: str = "street") -> Manifest:
    """Put the blobs of a small release and return its manifest."""
    return Manifest.model_validate(content_of(store, shift, name))


def content_of(store: Store, shift: float = 1.0, name: str = "street") -> dict[str, Any]:
    """`manifest_of` as the JSON that a publisher could write by hand."""
    base, adaptor = store.put_state(base_state()), store.put_state(adaptor_state(shift))
    tuned = {"floats": 4, "layers": ["bn.running"], "scores": {"miou": 0.5}}
    return {
        "schema": SCHEMA,
        "name": name,
        "model": {
            "name": "tiny",
            "num_classes": 4,
            "floats": 112,
            "task": "segmentation",
            "normalisation": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "own": "kept"},
        },
        "base": {"digest": base.digest, "bytes": base.bytes, "own": "kept"},
        "levels": {
            "clean": {"digest": None, "bytes": 0, "floats": 0, "layers": [], "scores": {}},
            "brightness-0.4+jpeg-30": {"digest": adaptor.digest, "bytes": adaptor.bytes, **tuned},
        },
        "budget": {"fraction": 0.002, "floats": 4},
        "recipe": {"epochs": 4},
        "versions": {"torch": "2"},
        "config": {"own": [1, None]},
        "own": {"kept": None},
    }


def compressed_content_of(store: Store) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`content_of` with a second level that stores conv.weight as int8, and the restored adaptor of that level."""
    manifest, base = content_of(store), base_state()
    changed = {"conv.weight": base["conv.weight"] * 1.01, **adaptor_state(2.0)}
    blob = store.put_state(storage_formats.encode(base, changed, {"conv.weight": "int8"}))
    manifest["levels"]["jpeg-10"] = {
        "digest": blob.digest,
        "bytes": blob.bytes,
        "floats": 112,
        "layers": ["conv.weight", "bn.running"],
        "scores": {},
        "storage_formats": {"conv.weight": "int8"},
    }
    return manifest, storage_formats.restored(base, changed, {"conv.weight": "int8"})


def forge(place: Place, manifest: Any) -> str:
    """Put a manifest where `latest` finds it, under its true digest, whatever it says."""
    data = manifest if isinstance(manifest, bytes) else canonical_json(manifest)
    digest = digest_of(data)
    place.write(f"manifests/{digest[7:]}.json", data)
    place.write("refs/street/latest", digest.encode())
    return digest


def files_of(place: Place) -> set[str]:
    """The paths of the blobs, manifests and other files; S3 also has markers of folders."""
    return {path for path in place.snapshot() if re.search(r"\.[a-z]+$|/[0-9a-f]{64}$|^refs/.*/", path)}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


# Any store


class StoreBattery:
    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gearnn_ray.store.releases.datetime", Clock)

    @pytest.fixture
    def store(self, place: Place) -> Store:
        return Store(place.uri)

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

    def test_a_tag_moves_back_and_forth(self, store: Store) -> None:
        a = store.publish(manifest_of(store, 1.0), {})
        b = store.publish(manifest_of(store, 2.0), {})
        store.tag("street", "latest", a)
        store.tag("street", "next", b)
        assert store.pull("street").digest == a
        assert store.pull("street:next").digest == b
        for digest, reason in ((ABSENT, ABSENT), ("../x", "not a digest")):
            with pytest.raises(UserError, match=reason):
                store.tag("street", "latest", digest)
        with pytest.raises(UserError, match="of 'street', not of 'road'"):
            store.tag("road", "latest", a)
        assert store.tags("street") == {"latest": a, "next": b}

    def test_a_rollback_brings_back_the_tables_and_figures_of_the_release(self, store: Store, place: Place) -> None:
        figure, own = "figures/street/accuracy.png", "tables/street/selection/jpeg-20.parquet"
        a = store.publish(manifest_of(store, 1.0), {TABLE: table(0.1)}, figures={figure: b"picture of a"})
        b = store.publish(manifest_of(store, 2.0), {TABLE: table(0.2), own: table(0.3)}, figures={figure: b"picture of b"})
        assert store.get_table(TABLE).equals(table(0.2))
        assert store.manifest("street")[1].tables[TABLE] == listed_table(store, 0.2)

        store.tag("street", "latest", a)
        assert store.get_table(TABLE).equals(table(0.1))
        assert place.read(figure) == b"picture of a"
        with pytest.raises(UserError, match=own):
            store.get_table(own)  # only b has it
        store.tag("street", "latest", b)
        assert store.get_table(TABLE).equals(table(0.2))
        assert store.get_table(own).equals(table(0.3))
        assert place.read(figure) == b"picture of b"

    def test_tables_are_those_of_latest_whatever_else_is_published(self, store: Store) -> None:
        store.publish(manifest_of(store, 1.0), {TABLE: table(0.1)}, ("partial",), latest=False)
        assert store.get_table(TABLE).equals(table(0.1))  # while there is no latest
        store.publish(manifest_of(store, 2.0), {TABLE: table(0.2)})
        partial = store.publish(manifest_of(store, 3.0), {TABLE: table(0.3)}, ("partial",), latest=False)
        store.tag("street", "v1", partial)
        assert store.get_table(TABLE).equals(table(0.2))

    def test_a_release_without_a_list_of_tables_is_as_good_as_before(self, store: Store, place: Place) -> None:
        old = forge(place, {**content_of(store), "created": "2026-01-01T00:00:00Z"})
        place.write(TABLE, b"written beside it")
        assert store.pull("street").digest == old
        assert store.verify() == []
        store.publish(manifest_of(store, 2.0), {TABLE: table()})
        store.tag("street", "latest", old)
        assert store.pull("street").digest == old

    def test_a_release_lists_no_files_of_others(self, store: Store) -> None:
        for path in ("tables/road/summary.parquet", "tables/streets/summary.parquet"):
            with pytest.raises(CorruptStoreError, match=f"{path}.*expected a path tables/street/….parquet"):
                store.publish(manifest_of(store), {path: table()})
        assert store.names() == []

    def test_a_tag_moves_only_from_where_it_is_expected(self, store: Store) -> None:
        a = store.publish(manifest_of(store, 1.0), {TABLE: table(0.1)})
        b = store.publish(manifest_of(store, 2.0), {TABLE: table(0.2)})
        for expected in (a, None):
            with pytest.raises(LostRaceError, match=f"street:latest in .* is {b}, expected {expected or 'no tag'}") as caught:
                store.tag("street", "latest", a, expected=expected)
            assert "\n" not in str(caught.value)
        assert store.tag_digest("street", "latest") == b
        assert store.get_table(TABLE).equals(table(0.2))
        store.tag("street", "latest", a, expected=b)
        store.tag("street", "v1", a, expected=None)
        with pytest.raises(LostRaceError, match="is no tag, expected"):
            store.tag("street", "v2", a, expected=a)
        assert store.tags("street") == {"latest": a, "v1": a}

    def test_of_many_who_move_a_tag_one_wins(self, store: Store, place: Place) -> None:
        base = store.publish(manifest_of(store, 0.0), {})
        digests = [store.publish(manifest_of(store, float(i)), {}, (f"v{i}",), latest=False) for i in range(1, 5)]
        start = threading.Barrier(4)

        def move(digest: str) -> bool:
            mine = Store(place.uri)
            start.wait()
            try:
                mine.tag("street", "latest", digest, expected=base)
            except LostRaceError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(move, digests))
        assert sum(won) == 1
        assert store.tag_digest("street", "latest") == digests[won.index(True)]

    def test_equal_content_has_one_digest_whoever_is_first(self, store: Store, place: Place) -> None:
        manifest = manifest_of(store)
        start = threading.Barrier(6)

        def publish(i: int) -> str:
            mine = Store(place.uri)
            start.wait()
            return mine.publish(manifest, {}, (f"v{i}",), stages=[f"{i}" * 64])

        with ThreadPoolExecutor(6) as pool:
            digests = set(pool.map(publish, range(6)))
        assert len(digests) == 1
        assert set(store.tags("street").values()) == digests
        record = store.get_record(content_key(manifest.as_json()))
        assert record is not None
        assert record["stages"] == [f"{i}" * 64 for i in range(6)]

    def test_what_is_computed_again_is_the_release_that_it_was_with_its_first_tables(self, store: Store, place: Place) -> None:
        digest = store.publish(manifest_of(store), {TABLE: table(0.1)}, figures={"figures/street/a.png": b"first"})
        for tables in ({TABLE: table(0.2)}, {}):  # other seconds, or none
            assert store.publish(manifest_of(store), tables) == digest
        assert store.get_table(TABLE).equals(table(0.1))
        more = "tables/street/scores.parquet"
        assert store.publish(manifest_of(store), {more: table(0.3)}) != digest
        with pytest.raises(UserError, match=TABLE):
            store.get_table(TABLE)

    def test_first_tables_that_are_damaged_are_replaced(self, store: Store, place: Place) -> None:
        digest = store.publish(manifest_of(store), {TABLE: table(0.1)})
        place.write(f"blobs/sha256/{listed_table(store, 0.1).digest[7:]}", b"damaged")
        assert store.verify()
        again = store.publish(manifest_of(store), {TABLE: table(0.2)})
        assert again != digest
        assert store.get_table(TABLE).equals(table(0.2))
        assert store.verify() == []

    def test_a_tag_can_be_removed(self, store: Store) -> None:
        digest = store.publish(manifest_of(store), {}, ["v1"])
        store.untag("street", "v1")
        assert store.tags("street") == {"latest": digest}
        for name, tag, reason in (
            ("street", "v1", "Its tags: latest"),
            ("road", "v1", "none"),
            ("street", "../x", "cannot be used"),
        ):
            with pytest.raises(UserError, match=reason):
                store.untag(name, tag)

    def test_what_no_tag_leads_to_can_be_deleted(self, store: Store, place: Place) -> None:
        a = store.publish(manifest_of(store, 1.0), {TABLE: table(0.1)})
        b = store.publish(manifest_of(store, 2.0), {TABLE: table(0.2)})
        store.put_checkpoint(KEY, b"epoch 1")
        assert store.gc(3600, dry_run=False) == []
        time.sleep(1.1)  # S3's times are whole seconds
        before = files_of(place)
        lines = store.gc(0)
        assert files_of(place) == before
        assert len(lines) == 5  # manifest, its record, adaptor, table, checkpoint
        assert any(line.startswith(f"manifests/{a[7:]}.json: ") for line in lines)
        assert store.gc(0, dry_run=False) == lines
        gone = {line.partition(":")[0] for line in lines}
        assert files_of(place) == before - gone
        assert store.pull("street").digest == b
        assert store.verify() == []
        with pytest.raises(CorruptStoreError, match=a):
            store.tag("street", "latest", a)

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
        nested = opening * 200_000
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

    # what a manifest and an adaptor hold is checked after they are read, on every store alike

    @pytest.mark.parametrize(
        ("path", "value", "reason"),
        [
            ("base.digest", "../../etc/passwd", r"\.\./\.\./etc/passwd"),
            ("base.digest", "sha256:../../../x", r"sha256:\.\./\.\./\.\./x"),
            ("base.digest", None, "base.digest"),
            ("base.digest", ABSENT, ABSENT),
            ("base.bytes", 7, "manifest says 7"),
            ("base.bytes", "7", "base.bytes"),
            ("base", [], "base"),
            ("name", "../street", r"\.\./street"),
            ("name", "road", "of 'road', not of 'street'"),
            ("created", None, "created"),
            ("levels", None, "levels"),
            ("levels.jpeg-10", None, "jpeg-10"),
            ("levels.jpeg-10.digest", "/etc/passwd", "/etc/passwd"),
            ("levels.jpeg-10.digest", None, "jpeg-10: clean has no digest and holds nothing, every other level has"),
            ("levels.jpeg-10.digest", ABSENT, ABSENT),
            ("levels.jpeg-10.bytes", 7, "manifest says 7"),
            ("levels.jpeg-10.bytes", -1, "jpeg-10.bytes"),
            ("levels.jpeg-10.floats", 5, "manifest says 5"),
            ("levels.jpeg-10.floats", True, "jpeg-10.floats"),
            ("levels.jpeg-10.layers", "bn", "jpeg-10.layers"),
            ("levels.jpeg-10.luma", "dark", "jpeg-10.luma"),
            ("levels.jpeg-10.full", {"digest": "/etc/passwd", "bytes": 1}, "jpeg-10.full.digest"),
            ("model.normalisation", {"mean": [0.5, 0.5, 0.5]}, "model.normalisation.std"),
            ("budget", 4, "budget"),
            ("levels.clean.digest", ABSENT, "levels: clean"),
            ("levels.clean.floats", 1, "levels: clean"),
            ("levels.clean.layers", ["bn"], "levels: clean"),
            ("levels.clean.storage_formats", {"bn": "int8"}, "levels: clean"),
            ("levels.jpeg-10.storage_formats", {"conv.weight": "int8"}, "'conv.weight' is stored as float32 or not at all"),
            ("levels.jpeg-10.storage_formats", None, "jpeg-10.storage_formats"),
            ("levels.jpeg-10.storage_formats", [], "jpeg-10.storage_formats"),
            ("levels.\\.\\./x", {}, "levels"),
            ("schema", 1, "schema 1, and this version of gearnn_ray reads schema 2. Publish the release again"),
            ("schema", 3, "schema 3, and this version of gearnn_ray reads schema 2"),
            ("schema", "2", "schema '2'"),
            ("schema", None, "schema None"),
        ],
    )
    def test_a_manifest_with_a_wrong_entry_is_refused(
        self, store: Store, place: Place, path: str, value: Any, reason: str
    ) -> None:
        manifest = {**content_of(store), "created": "2026-01-01T00:00:00Z"}
        manifest["levels"]["jpeg-10"] = manifest["levels"].pop("brightness-0.4+jpeg-30")
        forge(place, manifest)
        assert store.pull("street").levels == ("clean", "jpeg-10")

        entry = manifest
        *parents, last = (part.replace("\\", "") for part in path.replace("\\.", "\0").split("."))
        for parent in parents:
            entry = entry[parent]
        entry[last.replace("\0", ".")] = value
        digest = forge(place, manifest)
        with pytest.raises(UserError, match=reason) as caught:
            store.pull("street")
        assert "sha256:" in str(caught.value)
        assert "\n" not in str(caught.value)
        if path == "name" or path.startswith("schema") or "etc" in str(value):
            assert digest in str(caught.value)

    @pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff"])
    def test_a_file_that_is_no_manifest_is_refused(self, store: Store, place: Place, data: bytes) -> None:
        digest = forge(place, data)
        with pytest.raises(UserError, match=digest):
            store.pull("street")

    @pytest.mark.parametrize(
        ("adaptor", "reason"),
        [
            ({"bn.weight": torch.zeros(4)}, "bn.weight"),
            ({"bn.running_mean": torch.zeros(2, 2)}, r"\[2, 2\]"),
            ({"bn.running_mean": torch.zeros(4, dtype=torch.float16)}, "float16"),
        ],
    )
    def test_an_adaptor_that_does_not_fit_the_base_is_refused(
        self, store: Store, adaptor: dict[str, Tensor], reason: str
    ) -> None:
        content, blob = content_of(store), store.put_state(adaptor)
        content["levels"]["brightness-0.4+jpeg-30"] |= {"digest": blob.digest, "bytes": blob.bytes}
        store.publish(Manifest.model_validate(content), {})
        with pytest.raises(CorruptStoreError, match=reason) as caught:
            store.pull("street")
        assert blob.digest in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "formats", "reason"),
        [
            ({}, {"conv.weight": "bfloat16"}, "'conv.weight' is stored as int8, but the manifest says bfloat16"),
            ({}, {"bn.running_mean": "int8"}, "'bn.running_mean' is stored as float32 or not at all"),
            ({}, {"conv.weight": "float32"}, "'conv.weight' is stored as int8, but the manifest says float32"),
            ({}, {"conv.weight": "int8", "gone": "int8"}, "'gone' is stored as float32 or not at all"),
            ({}, {"conv.weight": "int4"}, "should be 'float32', 'bfloat16' or 'int8'. Found 'int4'"),
            ({"conv.weight..int4": torch.zeros(1)}, None, "'conv.weight' is stored as 'int4', 'int8', 'scale'"),
            ({"conv.weight..scale": torch.zeros(3)}, None, r"\[3\] of torch.float32: expected \[4\]"),
            ({"conv.weight..scale": torch.full((4,), float("inf"))}, None, "holds NaN or infinity"),
            ({"conv.weight..int8": torch.zeros(4, 3, 3, 3)}, None, "float32: expected .* torch.int8"),
            ({"bn.running_mean": torch.zeros(5)}, None, r"\[5\] of torch.float32: expected \[4\]"),
            ({"bn.weight": torch.zeros(4)}, None, "'bn.weight' is changed but not in the base"),
            ({"bn.num_batches_tracked": torch.tensor(8)}, None, "113 numbers, but the manifest says 112"),
        ],
    )
    def test_a_compressed_adaptor_that_conflicts_with_its_manifest_is_refused(
        self, store: Store, place: Folder, changes: dict[str, Tensor], formats: dict[str, str] | None, reason: str
    ) -> None:
        manifest, _ = compressed_content_of(store)
        entry = manifest["levels"]["jpeg-10"]
        blob = store.put_state(store.get_state(entry["digest"]) | changes)
        entry |= {"digest": blob.digest, "bytes": blob.bytes, "storage_formats": formats or entry["storage_formats"]}
        digest = forge(place, {**manifest, "created": "2026-01-01T00:00:00Z"})
        with pytest.raises(CorruptStoreError, match=reason) as caught:
            store.pull("street")
        assert (digest if formats == {"conv.weight": "int4"} else blob.digest) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_compressed_adaptor_without_storage_formats_in_its_manifest_is_refused(self, store: Store) -> None:
        content, _ = compressed_content_of(store)
        del content["levels"]["jpeg-10"]["storage_formats"]
        store.publish(Manifest.model_validate(content), {})
        with pytest.raises(CorruptStoreError, match=r"'conv\.weight' is stored as int8, but the manifest says float32"):
            store.pull("street")

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
    "uri", ["", "\0", "ftp://host/x", "gs://bucket/x", "file://relative", "s3://", "s3://bucket?colour=red", "s3://a b"]
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


def test_the_manifest_is_canonical_json(tmp_path: Path) -> None:
    digest = Store(tmp_path).publish(manifest_of(Store(tmp_path)), {})
    data = (tmp_path / "manifests" / f"{digest[7:]}.json").read_bytes()
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()


def test_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null]}'.encode()
    assert canonical_json({10: 1, 9: 2}) == canonical_json({"9": 2, "10": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})
