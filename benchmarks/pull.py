#!/usr/bin/env python3
"""The cost of verifying a release: `Store.pull`, beside reading and hashing the same files. Both take turns.

    uv run benchmarks/pull.py [--store STORE --release NAME:TAG]

Without a store, the command makes one: DRN-D-22 and ten adaptors of 0.2% of it. The files are in the page cache, so that the
work is compared and not the disk. Both keep what they read, because memory that an earlier round gives back would speed up the
next one. The aim is at most 1.2 times.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gearnn_ray import Store
from gearnn_ray.models.layers import model_size, network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.store.manifest import Manifest

CLASSES, LEVELS = 11, 10


def make_release(store: Store) -> str:
    """Publish DRN-D-22 with adaptors of arbitrary values."""
    torch.manual_seed(0)
    model = build_model("drn_d_22", CLASSES)
    state = network_state(model)
    batch_norm = {name: tensor for name, tensor in state.items() if "bn" in name or name.endswith("running_mean")}
    levels: dict[str, Any] = {}
    for level in range(10, 10 * LEVELS + 1, 10):
        blob = store.put_state({name: tensor + level / 1000 for name, tensor in batch_norm.items()})
        floats = sum(tensor.numel() for tensor in batch_norm.values())
        levels[f"jpeg-{level}"] = {
            "digest": blob.digest, "bytes": blob.bytes, "floats": floats, "layers": sorted(batch_norm), "scores": {},
        }  # fmt: skip
    base = store.put_state(state)
    manifest = {
        "name": "benchmark",
        "model": {
            "name": "drn_d_22", "num_classes": CLASSES, "floats": model_size(model), "task": "segmentation",
            "normalisation": {"mean": [0.5] * 3, "std": [0.25] * 3},
        },
        "base": base,
        "levels": levels,
        "budget": {},
        "recipe": {},
        "versions": {},
    }  # fmt: skip
    store.publish(Manifest.model_validate(manifest), {})
    return "benchmark"


def files_of(store: Path, manifest: dict[str, Any], digest: str) -> list[Path]:
    """The files that a pull reads, except the tag."""
    blobs = [manifest["base"]["digest"], *(entry["digest"] for entry in manifest["levels"].values())]
    named = [store / "blobs/sha256" / each.removeprefix("sha256:") for each in dict.fromkeys(blobs) if each]
    return [store / "manifests" / f"{digest.removeprefix('sha256:')}.json", *named]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store")
    parser.add_argument("--release")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(arguments.store or folder)
        reference = arguments.release if arguments.store else make_release(store)
        release = store.pull(reference)
        files = files_of(Path(store.uri), release.manifest, release.digest)
        kept: list[object] = []

        def read_and_hash() -> None:
            for file in files:
                data = file.read_bytes()
                hashlib.sha256(data).digest()
                kept.append(data)

        seconds: dict[str, list[float]] = {"read and hash": [], "pull": []}
        for _ in range(arguments.repeats):
            for what, work in (("read and hash", read_and_hash), ("pull", lambda: kept.append(store.pull(reference)))):
                started = time.perf_counter()
                work()
                seconds[what].append(time.perf_counter() - started)
        size = sum(file.stat().st_size for file in files)
        print(f"{len(files)} files, {size:,} bytes, median of {arguments.repeats}")
        for what, each in seconds.items():
            low, middle, high = (value * 1000 for value in (min(each), statistics.median(each), max(each)))
            print(f"{what:<14}{middle:>8.1f} ms (from {low:.1f} to {high:.1f})")
        ratio = statistics.median(p / r for p, r in zip(seconds["pull"], seconds["read and hash"], strict=True))
        print(f"pull / read and hash {ratio:.2f} (median of the pairs)")


if __name__ == "__main__":
    main()
