#!/usr/bin/env python3
"""Mixed load on the service for half an hour: its memory must not grow, and every answer must be the expected one.

    uv run benchmarks/soak.py [--store STORE --release NAME:TAG] [--minutes 30] [--size 180 240]

Eight clients send JPEG files of ten qualities, PNG files and raw frames of several sizes, and some requests for logits. One
request in ten must be refused. Every answer is compared with the first one to the same request.
"""

import argparse
import contextlib
import http.client
import io
import random
import tempfile
import threading
import time
from collections import Counter

import numpy as np
import psutil
from http_latency import frames, publish
from PIL import Image
from releases import JPEG, add_options, made_up
from serving import service

from gearnn_ray import Store

CLIENTS = 8
EVERY = 30.0  # seconds between measurements of the memory


def requests(height: int, width: int) -> list[tuple[str, bytes, dict[str, str], int]]:
    """The requests: a name, the body, headers, and the expected status."""
    made = [(f"jpeg of quality {10 * i + 10}", file, {}, 200) for i, file in enumerate(frames(height, width))]
    image = Image.open(io.BytesIO(made[-1][1])).convert("RGB")
    for scale in (1.0, 0.75, 0.5):
        small = image.resize((int(width * scale), int(height * scale)))
        png, raw = io.BytesIO(), io.BytesIO()
        small.save(png, "PNG")
        np.save(raw, np.asarray(small))
        made.append((f"png at {scale}", png.getvalue(), {}, 200))
        made.append((f"raw at {scale}", raw.getvalue(), {"content-type": "application/x-npy"}, 200))
    made.append(("logits", made[0][1], {"accept": "application/x-npy"}, 200))
    good = made[3][1]
    long = io.BytesIO()
    Image.new("RGB", (10_000, 1)).save(long, "PNG")
    made += [
        ("truncated", good[: len(good) // 2], {}, 400),
        ("empty", b"", {}, 400),
        ("text", b"hello", {}, 415),
        ("10,000 x 1", long.getvalue(), {}, 422),
        ("unknown level", good, {"x-gearnn-level": "sunshine"}, 422),
        ("unknown bundle", good, {"serve_multiplexed_model_id": "nothing:here"}, 404),
        ("too large", bytes(17 * 2**20), {}, 413),
    ]
    return made


def same(a: bytes, b: bytes) -> bool:
    """Equal, or logits that differ by no more than the order of sums in another batch."""
    if not a.startswith(b"\x93NUMPY"):
        return a == b
    x, y = (np.load(io.BytesIO(data)) for data in (a, b))
    return x.shape == y.shape and bool(np.abs(x - y).max() < 1e-4 * np.abs(x).max())


def memory() -> float:
    """Memory in MiB that only the replicas of the service hold."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # some come and go
            if "ServeReplica" in " ".join(process.cmdline()):
                total += process.memory_full_info().uss / 2**20
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--size", type=int, nargs=2, default=(180, 240), metavar=("HEIGHT", "WIDTH"))
    arguments = parser.parse_args()
    release = Store(arguments.store).pull(arguments.release) if arguments.store else made_up(JPEG)
    sent, first = requests(*arguments.size), dict[str, bytes]()
    wrong, statuses = Counter[str](), Counter[int]()
    refused = [request for request in sent if request[3] != 200]
    answered = [request for request in sent if request[3] == 200]
    end = time.monotonic() + 60 * arguments.minutes

    def client(number: int, port: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            name, body, headers, expected = draw.choice(refused if draw.random() < 0.1 else answered)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            stream = {"x-gearnn-stream": f"camera-{draw.randrange(20)}"}
            try:
                connection.request("POST", "/predict", body, stream | headers)
                response = connection.getresponse()
                status, answer = response.status, response.read()
            except OSError as error:  # a body that is refused unread
                status, answer = (413, b"") if expected == 413 else (0, str(error).encode())
            connection.close()
            statuses[status] += 1
            if status != expected:
                wrong[f"{name}: status {status}"] += 1
            elif expected == 200 and not same(first.setdefault(name, answer), answer):
                wrong[f"{name}: another answer"] += 1

    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        publish(store, "soak", release, tuple(level for level in release.levels if level.startswith("jpeg")))
        with service("--store", folder, "--bundles", "soak:latest", "--poll-seconds", "5") as port:
            threads = [threading.Thread(target=client, args=(number, port)) for number in range(CLIENTS)]
            start = time.monotonic()
            for thread in threads:
                thread.start()
            print(f"{'minutes':>8}{'MiB':>8}{'answers':>9}  wrong", flush=True)
            while time.monotonic() < end:
                time.sleep(min(EVERY, max(0.1, end - time.monotonic())))
                minutes = (time.monotonic() - start) / 60
                print(f"{minutes:8.1f}{memory():8.0f}{statuses.total():9}  {dict(wrong)}", flush=True)
            for thread in threads:
                thread.join()
    print(f"statuses {dict(statuses)}, wrong {dict(wrong)}")


if __name__ == "__main__":
    main()
