#!/usr/bin/env python3
"""What streams cost, as ratios of ways that take turns in one run.

    uv run benchmarks/streams.py levels                                  reading a frame's level, beside decoding it
    uv run benchmarks/streams.py throughput [--store S --release R]      8 streams through the service, beside a bare loop
    uv run benchmarks/streams.py latency [--store S --release R]         one stream at half load, beside the constant network
    uv run benchmarks/streams.py memory [--store S --release R]          64 slow streams, beside one; 64 slow cameras
    uv run benchmarks/streams.py soak [--minutes 30]                     8 cameras; cameras and the replica are killed at random

Streams are generated scenes as H.264 in MPEG transport streams, a segment of a second at a time, whose size and rate factor
change every second. The bare loop decodes the same segments and runs the constant network on batches of equal size, on as many
threads as the service's replica has.
"""

import argparse
import contextlib
import ctypes
import http.client
import io
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch
from av.video.reformatter import VideoReformatter
from http_latency import publish
from PIL import Image
from releases import add_options, made_up
from serving import ROOT, service

sys.path.insert(0, str(ROOT))

from gearnn_ray import AdaptiveModel, Store
from gearnn_ray.data.scenes import ScenesSplit
from gearnn_ray.serving.level_estimation import LevelEstimate, LevelEstimator, Reference
from gearnn_ray.video.decoding import VideoFrame, decoded
from gearnn_ray.video.stream_levels import StreamLevels
from tests.streams import Camera, access_units, encoded

LEVELS = ("h264-crf30", "h264-crf40", "h264-120x90", "brightness-0.5")
RATE = 10
STREAMS = 8
SETTLED_SECONDS = 45.0  # after which memory is measured
Pixels = np.ndarray


def shots(height: int, width: int, frames: int, seed: int = 0) -> list[Pixels]:
    """A pan over a generated street."""
    wide = ScenesSplit("val", 64, min(height, 192), min(width, 256) + 2 * frames, 7).image(seed % 64)
    windows = [wide[:, 2 * n : 2 * n + min(width, 256)] for n in range(frames)]
    return [np.asarray(Image.fromarray(np.ascontiguousarray(each)).resize((width, height))) for each in windows]


def segments(height: int, width: int, seed: int, seconds: int) -> list[bytes]:
    """Segments of a second whose size and rate factor change."""
    ladder = [(1.0, 18), (1.0, 30), (0.5, 24), (1.0, 40)]
    made = []
    for second in range(seconds):
        scale, crf = ladder[(second + seed) % len(ladder)]
        side = [2 * round(each * scale / 2) for each in (height, width)]
        made.append(encoded(shots(*side, RATE, seed + second), container="mpegts", rate=RATE, preset="veryfast", crf=crf, g=RATE))
    return made


# ---- level detection


ESTIMATOR = LevelEstimator(LEVELS, Reference(432, 768, 100.0, 0.2))
NOTE = bytes.fromhex("dc45e9bde6d948b7962cd820d923eeef") + b"x264 - core 164 - options: rc=crf crf=26.0 "


def levels(options: argparse.Namespace) -> None:
    """CPU time of decoding with levels, beside that of decoding to RGB alone, for a stream with x264's note and without it."""
    # else the allocator returns a frame's memory and takes it again, or does not, by what was allocated before: 10% of the time
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30), libc.mallopt(-3, 1 << 25)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    clip = options.video or io.BytesIO(encoded(shots(432, 768, 60), container="mp4", preset="medium", crf=26, g=30))
    silent = with_note(clip, None)
    told = with_note(io.BytesIO(silent), NOTE)
    ways = {"decoding to RGB": plainly, "and reading QPs and brightness": read, "and finding the level": found}
    for stream, data in (("with x264's note", told), ("without it", silent)):
        rounds: dict[str, list[list[float]]] = {way: [] for way in ways}
        for turn in range(options.rounds + 1):
            for way, frames in ways.items():
                rounds[way] += [cpu_seconds(frames(data))] if turn else []
        # of each frame the median over the rounds, because other work on the machine disturbs a few frames of every round
        mean = {way: statistics.fmean(map(statistics.median, zip(*took, strict=True))) for way, took in rounds.items()}
        for way, seconds in mean.items():
            print(f"{stream:17} {way:31} {1e6 * seconds:7.0f} µs a frame  {seconds / mean['decoding to RGB']:.3f}")


def cpu_seconds(frames: Iterator[Any]) -> list[float]:
    """CPU time of each frame."""
    times = [time.thread_time()]
    for _ in frames:
        times.append(time.thread_time())
    return [after - before for before, after in itertools.pairwise(times)]


def with_note(file: Any, note: bytes | None) -> bytes:
    """An MP4 file of H.264 with all of its SEI messages replaced by this one. The pictures stay the same."""
    made = io.BytesIO()
    message = [b"\x06\x05" + bytes([len(note)]) + note + b"\x80"] if note else []
    with av.open(file) as source, av.open(made, "w", format="mp4") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            kept = message + [unit for unit in units(bytes(packet)) if unit[0] & 31 != 6]
            if packet.size:
                made_of = av.Packet(b"".join(len(unit).to_bytes(4) + unit for unit in kept))
                made_of.pts, made_of.dts, made_of.time_base = packet.pts, packet.dts, packet.time_base
                made_of.is_keyframe, made_of.stream, message = packet.is_keyframe, copy, []
                target.mux(made_of)
    return made.getvalue()


def units(packet: bytes) -> Iterator[bytes]:
    """The NAL units of a packet in which each has its length in front."""
    while packet:
        end = 4 + int.from_bytes(packet[:4])
        yield packet[4:end]
        packet = packet[end:]


def plainly(data: bytes) -> Iterator[Pixels]:
    """What a loop without levels does, on one thread and in the same colours."""
    convert = VideoReformatter()
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for frame in container.decode(video=0):
            yield convert.reformat(frame, format="rgb24", dst_color_range="JPEG", threads=1).to_ndarray()


def read(data: bytes) -> Iterator[VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        yield from decoded(container)


def found(data: bytes) -> Iterator[LevelEstimate]:
    stream = StreamLevels(ESTIMATOR, "stream")
    for frame in read(data):
        yield stream.estimate(frame.evidence)


# ---- through the service


def post(port: int, stream: str, body: bytes, bundle: str) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"serve_multiplexed_model_id": bundle, "content-type": "video/mp2t"}
    connection.request("POST", f"/streams/{stream}/segments", body, headers)
    answer = connection.getresponse()
    lines = [json.loads(line) for line in answer.read().splitlines()]
    connection.close()
    assert answer.status == 200, lines
    assert "error" not in lines[-1], lines[-1]
    return lines


def bare(model: AdaptiveModel, streams: Sequence[Sequence[bytes]], batch: int) -> float:
    """Frames a second of a loop that decodes and runs the constant network on batches of equal size."""
    model.set_level("clean")
    frames, start = 0, time.perf_counter()
    waiting: dict[tuple[int, ...], list[Pixels]] = {}
    with torch.inference_mode():
        for second in range(len(streams[0])):
            for stream in streams:
                with av.open(io.BytesIO(stream[second])) as container:
                    for frame in container.decode(video=0):
                        pixels = frame.to_ndarray(format="rgb24")
                        group = waiting.setdefault(pixels.shape, [])
                        group.append(pixels)
                        if len(group) == batch:
                            frames += run(model, group)
        for group in waiting.values():
            frames += run(model, group) if group else 0
    return frames / (time.perf_counter() - start)


def run(model: AdaptiveModel, group: list[Pixels]) -> int:
    count = len(group)
    outputs = model(torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2).contiguous())
    for output in outputs:
        model.task.answer(output)
    group.clear()
    return count


@contextlib.contextmanager
def releases(options: argparse.Namespace) -> Iterator[tuple[str, list[str], list[str]]]:
    """A store with the release as it is and with its base alone, their names, and options of the service."""
    with tempfile.TemporaryDirectory() as folder:
        release = Store(options.store).pull(options.release) if options.store else made_up(LEVELS)
        store = Store(folder)
        publish(store, "mixed", release, tuple(level for level in release.levels if level != "clean"))
        publish(store, "constant", release, ())
        trust = ["--trust", *options.trust] if options.trust else []
        yield folder, ["mixed:latest", "constant:latest"], ["--store", folder, *trust]


def throughput(options: argparse.Namespace) -> None:
    """Frames a second of 8 streams of mixed levels, the ways in turns."""
    made = [segments(*options.size, seed, options.seconds) for seed in range(STREAMS)]
    with releases(options) as (folder, bundles, serving):
        model = AdaptiveModel.pull(folder, "constant", trust=options.trust)
        torch.set_num_threads(options.threads)
        rates: dict[str, list[float]] = {"bare loop": [], **{bundle: [] for bundle in bundles}}
        with service(*serving, "--bundles", *bundles, "--num-cpus", str(options.threads)) as port:
            for turn in range(options.rounds + 1):
                for way, found in rates.items():
                    rate = bare(model, made, options.batch) if way == "bare loop" else posted(port, made, way)
                    found += [rate] if turn else []
    for way, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates["bare loop"], strict=True))
        print(f"{way:18} {statistics.median(found):8.1f} frames/s  {ratio:.3f} of the bare loop")


def posted(port: int, streams: Sequence[Sequence[bytes]], bundle: str) -> float:
    """Frames a second of all streams at the same time, each sending its next segment when the last one is answered."""
    counts = [0] * len(streams)

    def client(number: int) -> None:
        for segment in streams[number]:
            counts[number] += len(post(port, f"camera-{number}", segment, bundle))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(streams))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def latency(options: argparse.Namespace) -> None:
    """Milliseconds from a segment of one frame to its line, at half the rate that saturates, the bundles in turns."""
    pictures = [
        encoded([frame], container="mpegts", crf=crf, g=1) for crf in (18, 30, 40) for frame in shots(*options.size, 4, crf)
    ]
    with releases(options) as (_, bundles, serving), service(*serving, "--bundles", *bundles) as port:
        took: dict[str, list[float]] = {bundle: [] for bundle in bundles}
        for bundle in bundles:
            for picture in pictures[:4]:
                post(port, "camera", picture, bundle)
        start = time.perf_counter()
        for picture in pictures:
            post(port, "camera", picture, bundles[1])
        pause = (time.perf_counter() - start) / len(pictures)  # as long as an answer takes: half the load
        for turn in range(options.rounds * 4):
            for bundle in bundles:
                for picture in pictures:
                    since = time.perf_counter()
                    post(port, "camera", picture, bundle)
                    took[bundle].append(time.perf_counter() - since)
                    time.sleep(pause)
            del turn
    cuts = {bundle: statistics.quantiles(seconds, n=100) for bundle, seconds in took.items()}
    for bundle, cut in cuts.items():
        print(f"{bundle:18} p50 {1e3 * cut[49]:6.1f} ms  p99 {1e3 * cut[98]:6.1f} ms  ({len(took[bundle])} frames)")
    mixed, constant = (cuts[bundle] for bundle in bundles)
    print(f"mixed / constant: p50 {mixed[49] / constant[49]:.3f}, p99 {mixed[98] / constant[98]:.3f}")


# ---- cameras


def tree_memory(process: psutil.Process) -> float:
    """MB of a process and its children, shared pages counted in shares."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += each.memory_full_info().pss / 1e6
    return total


def memory(options: argparse.Namespace) -> None:
    """MB per stream: 64 slow streams beside one, as uploads and as cameras that the service keeps open."""
    with releases(options) as (_, bundles, serving):
        serving += ["--bundles", *bundles]
        with service(*serving) as port:
            used = {count: memory_of_uploads(port, bundles[0], count, options) for count in (1, 64)}
        print(f"uploads: 1 stream {used[1]:.0f} MB, 64 streams {used[64]:.0f} MB: {(used[64] - used[1]) / 63:.1f} MB a stream")
        used = {count: memory_of_cameras(serving, count, options) for count in (1, 64)}
        print(f"cameras: 1 camera {used[1]:.0f} MB, 64 cameras {used[64]:.0f} MB: {(used[64] - used[1]) / 63:.1f} MB a camera")


def memory_of_uploads(port: int, bundle: str, count: int, options: argparse.Namespace) -> float:
    """MB of all processes while `count` streams send a segment of ten frames every ten seconds."""
    made = [segments(*options.size, seed, 4) for seed in range(4)]
    ended = threading.Event()

    def client(number: int) -> None:
        for round_ in itertools.count():
            if ended.is_set():
                return
            post(port, f"camera-{number}", made[number % 4][round_ % 4], bundle)
            ended.wait(RATE)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(SETTLED_SECONDS)
    used = statistics.median(tree_memory(psutil.Process()) for _ in range(5))
    ended.set()
    for thread in threads:
        thread.join()
    return used


def memory_of_cameras(serving: Sequence[str], count: int, options: argparse.Namespace) -> float:
    """MB (USS) of the processes that keep `count` cameras of one frame a second open."""
    made = [access_units(shots(*options.size, 20, seed), crf=28) * 30 for seed in range(4)]
    with contextlib.ExitStack() as stack:
        cameras = [stack.enter_context(Camera(made[number % 4], 1.0)) for number in range(count)]
        watch = [f"camera-{number}={camera.url}" for number, camera in enumerate(cameras)]
        port = stack.enter_context(service(*serving, "--watch", *watch))
        wait_for_all(port, 120, count)
        time.sleep(SETTLED_SECONDS)
        readers = named(psutil.Process(), "ray::Camera")
        assert readers, "no process keeps cameras open"
        return statistics.median(sum(each.memory_full_info().uss for each in readers) / 1e6 for _ in range(5))


def soak(options: argparse.Namespace) -> None:
    """RTSP cameras that end and come back, actors and the replica killed at random: memory, and time until all are back."""
    made = [access_units(shots(*options.size, 200, seed), crf=28) * 100 for seed in range(STREAMS)]  # they end only when told
    cameras = [Camera(units, 1 / RATE).start() for units in made]
    rng = random.Random(options.seed)
    with releases(options) as (_, bundles, serving):
        watch = [f"camera-{number}={camera.url}" for number, camera in enumerate(cameras)]
        with service(*serving, "--bundles", *bundles, "--watch", *watch) as port:
            me, until = psutil.Process(), time.monotonic() + 60 * options.minutes
            wait_for_all(port, 120)
            sizes, back = [tree_memory(me)], []
            while time.monotonic() < until:
                victim = rng.choice(["camera", "actor", "replica"])
                if victim == "camera":
                    camera = rng.choice(cameras)
                    camera.stop()
                    time.sleep(3)
                    camera.start()
                else:
                    kill(me, rng, "ray::Camera" if victim == "actor" else "ray::ServeReplica")
                took = wait_for_all(port, 120)
                back.append((victim, took))
                time.sleep(20)
                sizes.append(tree_memory(me))
                print(f"{victim:8} killed, all back after {took:5.1f} s; {sizes[-1]:.0f} MB", flush=True)
    for camera in cameras:
        camera.stop()
    for victim in sorted({name for name, _ in back}):
        took = [seconds for name, seconds in back if name == victim]
        print(f"{victim}: {len(took)} kills, back after {statistics.median(took):.1f} s, at most {max(took):.1f} s")
    print(f"memory {sizes[0]:.0f} MB at first, {sizes[-1]:.0f} MB at the end")


def wait_for_all(port: int, seconds: float, count: int = STREAMS) -> float:
    """Seconds until every camera has a new frame."""
    start = time.monotonic()
    before = {name: state["frames"] for name, state in states(port, count).items()}
    while time.monotonic() < start + seconds:
        now = states(port, count)
        if all(state["online"] and state["frames"] != before.get(name) for name, state in now.items()) and len(now) == count:
            return time.monotonic() - start
        time.sleep(0.2)
    raise SystemExit(f"not all cameras were back after {seconds:.0f} s: {states(port, count)}")


def states(port: int, count: int) -> dict[str, dict[str, Any]]:
    found = {}
    for number in range(count):
        name = f"camera-{number}"
        with (
            contextlib.suppress(OSError, ValueError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/streams/{name}/state", timeout=20) as answer,
        ):
            found[name] = json.load(answer)
    return found


def named(parent: psutil.Process, name: str) -> list[psutil.Process]:
    """Those descendants whose name, as Ray gives it, begins with `name`."""
    found = []
    for each in parent.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if each.cmdline() and each.cmdline()[0].startswith(name):
                found.append(each)
    return found


def kill(parent: psutil.Process, rng: random.Random, name: str) -> None:
    """End one of this process's descendants, by the name that Ray gives it."""
    if found := named(parent, name):
        os.kill(rng.choice(found).pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["levels", "throughput", "latency", "memory", "soak"])
    add_options(parser)
    parser.add_argument("--trust", nargs="*", default=[])
    parser.add_argument("--video", type=Path, help="for levels: an H.264 file instead of generated streets")
    parser.add_argument("--size", type=int, nargs=2, default=(180, 240), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=6, help="for throughput: of each stream")
    parser.add_argument("--threads", type=int, default=1, help="of the network")
    parser.add_argument("--batch", type=int, default=8, help="frames of a pass of the bare loop")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0, help="for soak: of what is killed")
    options = parser.parse_args()
    {"levels": levels, "throughput": throughput, "latency": latency, "memory": memory, "soak": soak}[options.what](options)


if __name__ == "__main__":
    main()
