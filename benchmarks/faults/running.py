"""A tiny job that is watched while something is done to it, and compared with one that nothing disturbed."""

import atexit
import bisect
import contextlib
import functools
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.campaign import Outcome, lasting_folder
from gearnn_ray.ray_jobs.local_ray import local_ray
from gearnn_ray.store.releases import Store
from tests import running_jobs, tiny
from tests.conftest import ROOT
from tests.running_jobs import Job, kill_all, same_release, start_program

LEVELS, EPOCHS = ["jpeg-10", "brightness-0.4"], 4
KINDS: Mapping[str, Mapping[str, Any]] = {
    "given": {},
    "trained": {
        "model.weights": None,
        "base-recipe.epochs": EPOCHS,
        "base-recipe.batch-size": 4,
        "base-recipe.crop": 24,
        "base-recipe.precision": "float32",
    },
    "one level": {"levels": LEVELS[:1], "recipe.epochs": 6, "resources.retries": 1},
}
"""Jobs: over given weights, over a base of its own, and with one level that may lose its worker once in one place."""

# ── a job, seen while it runs ──────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def _materials() -> Path:
    """Images and weights, for all runs of this process."""
    folder = lasting_folder("jobs")
    tiny.write_folder(folder / "data", train=16)
    tiny.write_weights(folder / "weights.safetensors")
    return folder


def arguments(folder: Path, kind: str) -> list[str]:
    told = {"store": folder / "store", "data.cache": folder / "cache", "model.name": "tests.nets:slow", "levels": LEVELS}
    return tiny.options(_materials(), **told | {"recipe.epochs": EPOCHS} | KINDS[kind])


@functools.cache
def joining() -> Mapping[str, str]:
    """The environment with which a driver joins the Ray of this process, which has two CPUs and lasts as long."""
    os.environ["PYTHONPATH"] = str(ROOT)  # for its workers
    ray = contextlib.ExitStack()
    # as many workers as two jobs have are kept between them
    own = local_ray(num_cpus=2, log_to_driver=False, logging_level="critical", _system_config={"num_workers_soft_limit": 4})
    found = ray.enter_context(own).joining
    atexit.register(ray.close)
    return found


@dataclass
class Run:
    """A job that runs. lines: its events, and when each arrived here. begun: when it took its lease."""

    folder: Path
    kind: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    begun: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def see(self, line: dict[str, Any]) -> None:
        self.lines.append({**line, "at": time.monotonic()})

    def begin(self) -> bool:
        """Wait until the driver has its lease. False: the job has ended."""
        while not any(self.store.glob("leases/*.json")):
            if self.ended.wait(0.005):
                return False
        self.begun = self.begun or time.monotonic()
        return True

    def steps(self) -> list[float]:
        """When each event arrived."""
        return [line["at"] for line in list(self.lines) if line["event"] != "notice" and "stage" in line]

    def files(self) -> set[str]:
        """What the store holds for good."""
        paths = (path for part in ("blobs", "stages", "manifests", "refs") for path in (self.store / part).rglob("*"))
        return {str(path) for path in paths if path.is_file() and not path.name.startswith(".")}


def a_job(draw: random.Random, folder: Path) -> Run:
    return Run(folder, draw.choice(["given", "trained"]))


@dataclass(frozen=True)
class Moment:
    """A time after so many events. It is the same place in the job whether the machine is busy or not."""

    events: int
    later: float

    def of(self, run: Run) -> bool:
        """Wait for it. False: the job ended before."""
        if not run.begin():
            return False
        while len(run.steps()) < self.events:
            if run.ended.wait(0.01):
                return False
        return not run.ended.wait(self.later)


@dataclass(frozen=True)
class Undisturbed:
    store: Path
    times: list[float]  # of its lease, each event, and its end

    def moment(self, draw: random.Random) -> Moment:
        """Any moment of the job, one as likely as the other."""
        at = draw.uniform(self.times[0], self.times[-1])
        events = bisect.bisect_right(self.times, at) - 1
        return Moment(events, at - self.times[events])


@functools.cache
def undisturbed(kind: str, cpus: int = 2) -> Undisturbed:
    """A job that nothing disturbs, where the largest node has so many CPUs: the base is trained with as many threads."""
    folder = _materials() / f"{kind} {cpus}"
    # the first one of all waits longer for processes to start; its results are the same
    for _ in range(1 if undisturbed.cache_info().currsize else 2):
        shutil.rmtree(folder, ignore_errors=True)
        run = Run(folder, kind)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run.begin)
            if cpus == 2:
                here(run)
            else:
                done(drive(run, cpus=cpus))
        end = time.monotonic()
    assert not Store(run.store).verify()
    return Undisturbed(run.store, [run.begun, *run.steps(), end])


def here(run: Run) -> None:
    """The job, driven by this process."""
    joining()
    try:
        with tiny.without_figures(tiny.SPLIT_FIGURES):
            running_jobs.run_here(arguments(run.folder, run.kind), run.see)
    finally:
        run.ended.set()


def drive(run: Run, environment: Mapping[str, str] | None = None, **settings: Any) -> Job:
    """The job, driven by a process of its own."""
    told = arguments(run.folder, run.kind)
    return start_program("tests.running_jobs", json.dumps(settings), *told, see=run.see, environment=environment)


def done(job: Job, run: Run | None = None) -> None:
    """Wait until a driver has ended well."""
    code = job.end()
    if run is not None:
        run.ended.set()
    assert code == 0, f"the driver ended with {code}: {' '.join(job.errors.split())[-300:]}"


@contextlib.contextmanager
def until_end(job: Job, run: Run) -> Iterator[None]:
    """Notes that the driver has ended; ends it, and all its Ray, with the context."""
    threading.Thread(target=lambda: (job.process.wait(), run.ended.set()), daemon=True).start()
    ray: list[psutil.Process] = []
    try:
        yield
    finally:
        with contextlib.suppress(psutil.Error):
            ray = psutil.Process(job.process.pid).children(recursive=True)
        job.process.kill()
        job.process.wait()
        kill_all(ray)


# ── what came of it ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Fault:
    """at, wall: when it came, by the monotonic clock and by that of events; at None: never, because the job had ended.
    files: what the store held by then. level: the one that it hit, if one alone.
    """

    at: float | None = None
    files: frozenset[str] = frozenset()
    wall: float = 0.0
    level: str = ""


def fault_now(run: Run, level: str = "") -> Fault:
    return Fault(time.monotonic(), frozenset(run.files()), time.time(), level)


def judged(run: Run, fault: Fault, most_repeated: int | None = None, cpus: int = 2, **figures: float) -> Outcome:
    """Compare the store that a run left with an undisturbed one. Raises AssertionError where more epochs were repeated than the
    fault may cost.
    """
    end, store = time.monotonic(), Store(run.store)
    problems = store.verify()
    problems += [f"a tag {tag!r}" for tag in store.tags("tiny") if tag != "latest"]
    lost = sorted(fault.files - run.files())
    equal = same_release(run.store, undisturbed(run.kind, cpus).store)
    repeated = epochs_repeated(run.lines)
    assert most_repeated is None or repeated <= most_repeated, f"{repeated} epochs were computed again, at most {most_repeated}"
    note = (problems + [f"{path} is gone" for path in lost] + ["the digests differ"] * (not equal) + [""])[0]
    recovery = None if fault.at is None else (progress_after(run.lines, fault) or end) - fault.at
    hit = fault.at is not None
    return Outcome(hit, equal, len(problems), len(lost), repeated if hit else None, recovery, note=note, figures=figures)


def epochs_repeated(lines: list[dict[str, Any]]) -> int:
    """Epochs that were finished once more."""
    ended = [line for line in lines if tiny.epochs_run([line])]
    return len(ended) - len({(line["stage"], line["level"], line["epoch"]) for line in ended})


def progress_after(lines: list[dict[str, Any]], fault: Fault) -> float | None:
    """When a report arrived that the job was further than before the fault: at the level that it hit, or that a notice says was
    lost, if one does. What a worker reported before the fault may arrive after it, and counts as before.
    """
    assert fault.at is not None
    work = [line for line in lines if line["event"] in ("progress", "finished")]
    places = {place(line) for line in work if line["time"] <= fault.wall}
    notices = (line for line in lines if line["event"] == "notice" and line["at"] > fault.at)
    hit = {fault.level, *(line["note"].partition(" is started again")[0] for line in notices)} & set(LEVELS)
    new = (line for line in work if line["time"] > fault.wall and place(line) not in places and (not hit or line["level"] in hit))
    return next((line["at"] for line in new), None)


def place(line: dict[str, Any]) -> tuple[object, ...]:
    return tuple(line[name] for name in ("event", "stage", "level", "epoch", "step"))
