"""The service for long: an hour of changes and faults, half an hour of cameras, and the loss of the node that reads a camera.

CHAOS_SECONDS=300 uv run benchmarks/chaos.py serving-hour     five minutes of it, to try it
"""

import contextlib
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.campaign import Line, Outcome
from benchmarks.faults.clients import SMALL, Clients, Seen, Service, memory, name_of, started
from benchmarks.serving import ROOT
from gearnn_ray.store.releases import Store
from tests.running_jobs import named
from tests.streams import Camera, access_units, moving

SECONDS = float(os.environ.get("CHAOS_SECONDS", 0)) or None  # of a line, where it is tried
NAMES = 100_000  # of streams
EVERY = 20.0  # seconds between two looks at memory, descriptors and disk
WARM = 120.0  # seconds of a new process whose memory still grows; the whole service takes five times as long
MIB_PER_HOUR = 100.0
"""Beyond which a slope is a leak: a tenth of what a replica holds."""

# ── an hour ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Size:
    """What the service holds at some moment, in MiB, and its open files. replica: its process."""

    at: float
    replica: int
    replica_memory: float
    other_memory: float
    descriptors: float
    disk: float


def size_of(service: Service, since: float) -> Size | None:
    """What it holds now; None while a replica is being started."""
    processes, replicas = service.processes(), service.replicas()
    if len(replicas) != 1:
        return None
    others = [each for each in processes if each.pid != replicas[0].pid]
    counts = []
    for each in processes:
        with contextlib.suppress(psutil.Error):
            counts.append(each.num_fds())
    folders = {service.store.with_name("copies"), *map(Path, filter(None, map(_session, processes)))}
    disk = sum(map(disk_of, folders))
    return Size(time.monotonic() - since, replicas[0].pid, memory(replicas), memory(others), sum(counts), disk)


def _session(process: psutil.Process) -> str | None:
    """The folder of the Ray that a process belongs to: its log files and sockets."""
    found = re.search(r"--session-dir=(\S+)", name_of(process))
    return found and found[1]


def disk_of(folder: Path) -> float:
    """MiB that the files of a folder take."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total / 2**20


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Growth per hour of (seconds, amount): the median over all pairs that are a minute apart, which single steps do not move."""
    pairs = itertools.combinations(points, 2)
    return statistics.median([3600 * (b - a) / (late - early) for (early, a), (late, b) in pairs if late - early >= 60] or [0.0])


def slopes(sizes: Sequence[Size], warm: float) -> dict[str, float]:
    """Growth per hour once everything is warm. Of the replica's memory the median over its lives, because a new one begins with
    less; of all else, what is left when that is taken away.
    """
    late = [size for size in sizes if size.at >= 5 * warm]
    lives: dict[int, list[Size]] = {}
    for size in sizes:
        lives.setdefault(size.replica, []).append(size)
    grown = []
    for life in lives.values():
        settled = [(each.at, each.replica_memory) for each in life if each.at >= life[0].at + warm and each.at >= 5 * warm]
        if len(settled) > 3 and settled[-1][0] - settled[0][0] >= 60:
            grown.append(slope(settled))
    return {
        "memory of the replica, MiB an hour": statistics.median(grown or [0.0]),
        "memory of the other processes, MiB an hour": slope([(each.at, each.other_memory) for each in late]),
        "descriptors, an hour": slope([(each.at, each.descriptors) for each in late]),
        "disk, MiB an hour": slope([(each.at, each.disk) for each in late]),
    }


def naming(service: Service, names: Iterator[int]) -> Callable[[Seen], int]:
    """A client of which every request is of another stream."""

    def ask(seen: Seen) -> int:
        number = next(names)
        asked = SMALL[number % len(SMALL)]
        answer = service.ask(asked, 10, x_gearnn_stream=f"stream-{number % NAMES}")
        if answer.status == 200 and (problem := service.wrong(asked, answer)):
            seen.wrong.append(problem)
        return answer.status

    return ask


@dataclass
class Changes:
    """What happens to a service again and again, and how often it did."""

    service: Service
    draw: random.Random
    seeds: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0  # seconds until it served well again

    def publish(self) -> None:
        """A new release, which is served soon."""
        self._serves(self.service.publish(next(self.seeds)))

    def roll_back(self) -> None:
        """To any earlier release."""
        self._serves(self.draw.choice(sorted(self.service.served)))

    def corrupt(self) -> None:
        """A new release with a bit that is another; the one before is served on, and /health says why. Then the tag goes back."""
        before = Store(self.service.store).tags("tiny")["latest"]
        blobs = self.service.store / "blobs/sha256"
        there = set(blobs.iterdir())
        broken = self.service.publish(next(self.seeds), whole=False)
        blob = self.draw.choice(sorted(set(blobs.iterdir()) - there))
        data = bytearray(blob.read_bytes())
        data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        blob.write_bytes(data)
        self.service.release(broken)
        self._until(lambda health: health["status"] == "degraded" and blob.name in health["bundles"]["tiny:latest"]["problem"])
        self._serves(before)

    def kill(self) -> None:
        """The replica."""
        for replica in self.service.replicas():
            with contextlib.suppress(psutil.Error):
                replica.kill()
        self.service.wait_until_good()

    def change(self, what: str) -> None:
        start = time.monotonic()
        getattr(self, what)()
        self.counts[what] += 1
        self.slowest = max(self.slowest, time.monotonic() - start)

    def _serves(self, digest: str) -> None:
        self.service.release(digest)
        self._until(lambda health: health["bundles"]["tiny:latest"]["digest"] == digest and health["status"] == "ok")

    def _until(self, true: Callable[[Any], bool]) -> None:
        deadline = time.monotonic() + 60
        while True:
            status, health = self.service.health(10)
            if status and true(health):
                return
            assert time.monotonic() < deadline, f"not so within a minute: {status} {health}"
            time.sleep(0.2)


def serving_hour(service: Service, draw: random.Random, seconds: float = SECONDS or 3600.0, warm: float = WARM) -> Outcome:
    """Releases that come, go back, are corrupt, and replicas that die, while clients name 100,000 streams."""
    warm = min(warm, seconds / 12)
    changes, sizes, names = Changes(service, draw), list[Size](), itertools.count()
    # four clients that pause so that all names come once in an hour
    begun = time.monotonic()
    kills = 5 * warm
    with Clients(*(naming(service, names) for _ in range(4)), pause=4 * 3600 / (1.3 * NAMES)) as clients:
        turns = itertools.count()
        while (now := time.monotonic() - begun) < seconds:
            if now > kills:
                kills = now + draw.uniform(4, 6) * warm  # each replica has time to show whether it grows
                changes.change("kill")
            elif next(turns) % 3:
                time.sleep(min(draw.uniform(0, EVERY), seconds / 10))
                if (size := size_of(service, begun)) is not None:
                    sizes.append(size)
            else:
                changes.change(draw.choice(["publish", "publish", "roll_back", "corrupt"]))
        lasted = time.monotonic() - begun
    service.wait_until_good()
    wrong = [problem for seen in clients.seen for problem in seen.wrong]
    statuses = Counter(status for seen in clients.seen for status in seen.statuses())
    grown = slopes(sizes, warm)
    figures = {
        "minutes": lasted / 60,
        "stream names": float(min(NAMES, next(names))),
        "requests": float(statuses.total()),
        "requests that failed": float(statuses.total() - statuses[200]),
        **{f"times {what.replace('_', ' ')}": float(count) for what, count in sorted(changes.counts.items())},
        **grown,
    }
    leaks = [name for name, growth in grown.items() if growth > MIB_PER_HOUR] if lasted >= 1800 else []
    assert not leaks, f"{leaks[0]}: {grown[leaks[0]]:.0f}"
    return Outcome(recovery=changes.slowest, silent=len(wrong), note="".join(wrong[:1]), figures=figures)


def an_hour(draw: random.Random, folder: Path) -> Outcome:
    with started(folder) as service:
        return serving_hour(service, draw)


# ── half an hour of cameras ────────────────────────────────────────────────────────────────────────────────────────────

BACK_SECONDS = 10.0
GROWTH = 1.1  # of the memory of all processes, from the first quarter of the time to the last
_SOAK = re.compile(r"(camera|actor|replica) +killed, all back after +([\d.]+) s; (\d+) MB")


def cameras_soak(draw: random.Random, folder: Path) -> Outcome:
    """`benchmarks/streams.py soak`: eight cameras; cameras, their actors and the replica are killed at random."""
    del folder
    minutes = (SECONDS or 1800.0) / 60
    command = [sys.executable, str(ROOT / "benchmarks/streams.py"), "soak", "--minutes", str(minutes)]
    done = subprocess.run([*command, "--seed", str(draw.randrange(1000))], capture_output=True, text=True, cwd=ROOT)
    last = "".join(done.stderr.strip().splitlines()[-1:])
    assert done.returncode == 0, f"the soak ended with {done.returncode}: {last[:300]}"
    return judged_soak(done.stdout)


def judged_soak(said: str) -> Outcome:
    """What came of it. Raises AssertionError where streams came back late, or memory was not flat."""
    kills = [(victim, float(seconds), float(size)) for victim, seconds, size in _SOAK.findall(said)]
    assert kills, f"nothing was killed: {said[-300:]}"
    figures = {f"kills of {victim}": float(count) for victim, count in Counter(each[0] for each in kills).items()}
    took, sizes = [each[1] for each in kills], [each[2] for each in kills]
    quarter = max(1, len(sizes) // 4)
    first, last = statistics.median(sizes[:quarter]), statistics.median(sizes[-quarter:])
    figures |= {"memory in the first quarter, MB": first, "memory in the last quarter, MB": last}
    late = [f"{victim} {seconds:.1f} s" for victim, seconds, _ in kills if seconds > BACK_SECONDS]
    assert not late, f"{len(late)} of {len(kills)} times not all streams were back within {BACK_SECONDS:.0f} s: {', '.join(late)}"
    assert last <= GROWTH * first, f"memory grew from {first:.0f} MB to {last:.0f} MB"
    return Outcome(recovery=max(took), figures=figures)


# ── the node of a camera is lost ───────────────────────────────────────────────────────────────────────────────────────

TAKEN_UP_SECONDS = 60.0


def below(parent: psutil.Process, name: str) -> set[psutil.Process]:
    """Those descendants whose command line contains the name."""
    return set(named(parent.children(recursive=True), name))


def lost_camera_node(draw: random.Random, folder: Path) -> Outcome:
    """Two nodes read two cameras; the one that is not the head is killed with all its processes, and the other takes over."""
    from benchmarks.faults.clusters import GUARDED, LOOPBACK, cluster

    nodes = cluster("processes")
    program = psutil.Process(nodes.job.process.pid)
    (head,) = below(program, "raylet/raylet")
    nodes.tell("added", add=True)
    (doomed,) = below(program, "raylet/raylet") - {head}
    address = re.search(r"--gcs-address=(\S+)", name_of(doomed))
    assert address, "a raylet does not say where its cluster is"
    environment = {**GUARDED, **LOOPBACK, "RAY_ADDRESS": address[1]}
    units = [access_units(moving(400, 64, 80, seed), crf=40) for seed in (0, 1)]
    with Camera(units[0], 0.1) as gate, Camera(units[1], 0.1) as door, contextlib.ExitStack() as stack:
        watch = {"gate": gate.url, "door": door.url}
        told = ("--watch", *(f"{name}={url}" for name, url in watch.items()), "--num-cpus", "0.5")
        lost_node = threading.Event()
        stack.callback(lambda: lost_node.is_set() or nodes.tell("lost", lose=True))  # also where something fails before
        service = stack.enter_context(started(folder, *told, environment=environment))
        wait_for_frames(service.port, tuple(watch), {}, TAKEN_UP_SECONDS)
        for _ in range(5):  # Ray places them as it likes
            if below(doomed, "ray::CameraProcess"):
                break
            for reader in below(head, "ray::CameraProcess"):
                reader.kill()
            wait_for_frames(service.port, tuple(watch), frames(service.port, tuple(watch)), TAKEN_UP_SECONDS)
        readers, replicas = (len(below(doomed, name)) for name in ("ray::CameraProcess", "ServeReplica"))
        time.sleep(draw.uniform(0, 3))
        before = frames(service.port, tuple(watch))
        at = time.monotonic()
        lost_node.set()
        nodes.tell("lost", lose=True)
        # an actor that was started again counts anew
        wait_for_frames(service.port, tuple(watch), before, TAKEN_UP_SECONDS)
        recovery = time.monotonic() - at
        figures = {"cameras on the node": float(readers), "replicas on the node": float(replicas)}
    return Outcome(hit=readers > 0, recovery=recovery, figures=figures)


def frames(port: int, cameras: Sequence[str]) -> dict[str, int]:
    """Frames that each camera has had, -1 while it is offline."""
    found = {}
    for name in cameras:
        with (
            contextlib.suppress(OSError, ValueError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/streams/{name}/state", timeout=10) as answer,
        ):
            state = json.load(answer)
            found[name] = state["frames"] if state["online"] else -1
    return found


def wait_for_frames(port: int, cameras: Sequence[str], before: dict[str, int], seconds: float) -> None:
    """Return when every camera is online and has other frames than before, twice: also those that were on their way are in."""
    deadline = time.monotonic() + seconds
    last = dict(before)
    for _ in range(2):
        while True:
            now = frames(port, cameras)
            if all(now.get(name, -1) >= 3 and now[name] != last.get(name) for name in cameras):
                break
            assert time.monotonic() < deadline, f"not all cameras had frames after {seconds:.0f} s: {now}, before {last}"
            time.sleep(0.1)
        last = now


LINES: tuple[Line, ...] = (
    Line("serving-hour", "an hour of swaps, rollbacks, corrupt releases, killed replicas and 100,000 streams", 1, an_hour),
    Line("cameras-soak", "half an hour of eight cameras; cameras, actors and the replica killed", 1, cameras_soak),
    Line("lost-camera-node", "the node that reads a camera is lost", 5, lost_camera_node),
)
