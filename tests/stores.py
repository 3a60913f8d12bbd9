"""Stores for tests, seen from outside, and what is put into them."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from gearnn_ray.adaptors import storage_formats
from gearnn_ray.store.blobs import Blob, canonical_json, digest_of, encode_table
from gearnn_ray.store.manifest import SCHEMA, Manifest
from gearnn_ray.store.releases import Store

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


class OnAStore:
    """Fixtures of tests that run on any kind of store; a subclass has the fixture `place`."""

    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gearnn_ray.store.releases.datetime", Clock)

    @pytest.fixture
    def store(self, place: Place) -> Store:
        return Store(place.uri)
