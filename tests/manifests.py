"""Manifests of hand-made releases, with no more than a manifest must say."""

from collections.abc import Iterable, Mapping
from typing import Any

from gearnn_ray.store.blobs import Blob
from gearnn_ray.store.manifest import Manifest

CLEAN: dict[str, Any] = {"digest": None, "bytes": 0, "floats": 0, "layers": [], "scores": {}}
RGB = {"mean": [0.41, 0.42, 0.43], "std": [0.3, 0.31, 0.31]}


def level_entry(blob: Blob, floats: int, layers: Iterable[str]) -> dict[str, Any]:
    return {"digest": blob.digest, "bytes": blob.bytes, "floats": floats, "layers": [*layers], "scores": {}}


def manifest_of(
    name: str, network: str, classes: int, base: Blob, levels: Mapping[str, Any], reference: Any = None, **model: Any
) -> Manifest:
    """`levels`: the entries as JSON. `reference`: the undistorted images. `model`: further entries of the network."""
    content = {
        "name": name,
        "model": {
            "name": network, "num_classes": classes, "floats": 1, "task": "segmentation", "normalisation": RGB, **model,
        },
        "base": base, "levels": levels, "budget": {}, "recipe": {}, "versions": {},
    }  # fmt: skip
    return Manifest.model_validate(content | ({"data": {"reference": reference}} if reference else {}))


def in_no_store(network: str, classes: int, levels: Iterable[str], **more: Any) -> Manifest:
    """Of a release whose blobs were never written: every level but clean has a digest of its own."""
    blobs = {level: Blob(digest=f"sha256:{number:064x}", bytes=1) for number, level in enumerate(levels, 1)}
    entries = {level: CLEAN if level == "clean" else level_entry(blob, 1, ()) for level, blob in blobs.items()}
    return manifest_of("made", network, classes, Blob(digest="sha256:" + "0" * 64, bytes=1), entries, **more)
