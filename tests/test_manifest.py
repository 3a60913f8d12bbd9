"""What a manifest and its adaptors say is checked after they are read, on every kind of store alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.manifest import Manifest
from gearnn_ray.store.releases import Store
from tests.stores import ABSENT, Folder, Place, compressed_content_of, content_of, forge, manifest_of


@pytest.fixture
def place(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def store(place: Folder) -> Store:
    return Store(place.uri)


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
        ("model.pad_to", 2000, "model.pad_to"),
        ("model.pad_to", 0, "model.pad_to"),
        ("model.input_size", [32, 100_000], "model.input_size"),
        ("model.num_classes", 1_000_000, "model.num_classes"),
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
def test_a_manifest_with_a_wrong_entry_is_refused(store: Store, place: Place, path: str, value: Any, reason: str) -> None:
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
def test_a_file_that_is_no_manifest_is_refused(store: Store, place: Place, data: bytes) -> None:
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
def test_an_adaptor_that_does_not_fit_the_base_is_refused(store: Store, adaptor: dict[str, Tensor], reason: str) -> None:
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
    store: Store, place: Folder, changes: dict[str, Tensor], formats: dict[str, str] | None, reason: str
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


def test_a_compressed_adaptor_without_storage_formats_in_its_manifest_is_refused(store: Store) -> None:
    content, _ = compressed_content_of(store)
    del content["levels"]["jpeg-10"]["storage_formats"]
    store.publish(Manifest.model_validate(content), {})
    with pytest.raises(CorruptStoreError, match=r"'conv\.weight' is stored as int8, but the manifest says float32"):
        store.pull("street")


def test_the_manifest_is_canonical_json(tmp_path: Path) -> None:
    digest = Store(tmp_path).publish(manifest_of(Store(tmp_path)), {})
    data = (tmp_path / "manifests" / f"{digest[7:]}.json").read_bytes()
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
