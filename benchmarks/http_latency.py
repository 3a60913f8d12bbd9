#!/usr/bin/env python3
"""Latency of the service over HTTP with mixed levels, beside the same service with constant weights. Both take turns.

    uv run benchmarks/http_latency.py [--store STORE --release NAME:TAG] [--size 180 240]

Starts jobs/serve.py on loopback with two bundles: the release, and its base alone. Eight clients send JPEG files of ten
qualities, each the next one as soon as the last one is answered; the bundles take turns.
"""

import argparse
import http.client
import io
import statistics
import tempfile
import threading
import time

import numpy as np
from PIL import Image
from releases import JPEG, add_options, made_up
from serving import service

from gearnn_ray import Release, Store
from gearnn_ray.data.scenes import ScenesSplit
from gearnn_ray.store.manifest import Manifest

CLIENTS = 8


def publish(store: Store, name: str, release: Release, levels: tuple[str, ...]) -> None:
    """The release again under another name, with these levels."""
    base = store.put_state(release.base_state())
    entries = {"clean": {"digest": None, "bytes": 0, "floats": 0, "layers": [], "scores": {}}}
    for level in levels:
        state = release.adaptor_state(level)
        blob = store.put_state(state)
        floats = sum(tensor.numel() for tensor in state.values())
        entries[level] = {"digest": blob.digest, "bytes": blob.bytes, "floats": floats, "layers": [*state], "scores": {}}
    manifest = {
        "name": name,
        "model": release.content.model,
        "data": release.content.data,
        "base": base,
        "levels": entries,
        "budget": {},
        "recipe": {},
        "versions": {},
    }
    store.publish(Manifest.model_validate(manifest), {})


def frames(height: int, width: int) -> list[bytes]:
    """JPEG files of generated scenes, ten qualities in turn."""
    scenes = ScenesSplit("val", 10, 192, 256, 0)
    files = []
    for i, level in enumerate(JPEG):
        file = io.BytesIO()
        image = Image.fromarray(np.asarray(scenes.image(i))).resize((width, height), Image.Resampling.BICUBIC)
        image.save(file, "JPEG", quality=int(level.removeprefix("jpeg-")))
        files.append(file.getvalue())
    return files


def load(port: int, bundle: str, files: list[bytes], each: int) -> list[float]:
    """Seconds of every request of `CLIENTS` clients that send `each` files."""
    seconds: list[float] = []

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for i in range(each):
            start = time.perf_counter()
            headers = {"serve_multiplexed_model_id": bundle, "content-type": "image/jpeg"}
            connection.request("POST", "/predict", files[(number * 3 + i) % len(files)], headers)
            response = connection.getresponse()
            response.read()
            assert response.status == 200, response.status
            seconds.append(time.perf_counter() - start)
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--size", type=int, nargs=2, default=(180, 240), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--each", type=int, default=10, help="requests of a client in a turn")
    arguments = parser.parse_args()
    release = Store(arguments.store).pull(arguments.release) if arguments.store else made_up(JPEG)
    levels = tuple(level for level in release.levels if level.startswith("jpeg"))
    files = frames(*arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        publish(store, "mixed", release, levels)
        publish(store, "constant", release, ())
        took: dict[str, list[float]] = {"constant:latest": [], "mixed:latest": []}
        with service("--store", folder, "--bundles", *took) as port:
            for turn in range(arguments.turns + 1):
                for bundle in took:
                    seconds = load(port, bundle, files, arguments.each if turn else 2)
                    took[bundle] += seconds if turn else []
    print(f"{CLIENTS} clients, JPEG files {arguments.size[0]}x{arguments.size[1]} of {len(JPEG)} qualities, {len(levels)} levels")
    print(f"{'bundle':18}{'requests':>9}{'p50 ms':>9}{'p90 ms':>9}{'p99 ms':>9}")
    p99 = {}
    for bundle, seconds in took.items():
        cuts = statistics.quantiles(seconds, n=100)
        p99[bundle] = cuts[98]
        print(f"{bundle:18}{len(seconds):9}{1e3 * cuts[49]:9.0f}{1e3 * cuts[89]:9.0f}{1e3 * cuts[98]:9.0f}")
    print(f"p99 mixed / constant {p99['mixed:latest'] / p99['constant:latest']:.3f}")


if __name__ == "__main__":
    main()
