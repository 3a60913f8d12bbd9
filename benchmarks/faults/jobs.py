"""Faults of a running job: its workers and drivers killed and stopped, its clock changed.

Each run is a tiny job with a store and a cache of its own, and one fault at a moment drawn over its whole length. Where its
driver died, the same job is started again. Then its store is compared with that of a job that nothing disturbed.
"""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from benchmarks.faults import running
from benchmarks.faults.campaign import Line, Outcome
from benchmarks.faults.running import LEVELS, Fault, Run, a_job, drive, fault_now, here, judged, place, undisturbed, until_end
from gearnn_ray.ray_jobs import watch
from gearnn_ray.store import leases
from gearnn_ray.store.releases import Store
from tests import tiny
from tests.running_jobs import at_work, kill_all, named

# ── processes of the job killed and stopped ────────────────────────────────────────────────────────────────────────────


def disturbed(draw: random.Random, run: Run, do: Callable[[], str | None]) -> Fault:
    """The job in this process, and what is done to it at some moment. do: returns None while there is nothing to do it to, else
    the level that it was done to, or "".
    """
    moment = undisturbed(run.kind).moment(draw)

    def wait() -> Fault:
        if not moment.of(run):
            return Fault()
        while True:
            fault = fault_now(run)
            if (level := do()) is not None:
                return replace(fault, level=level)
            if run.ended.wait(0.02):
                return Fault()

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(wait)
        here(run)
        return coming.result()


def processes(*names: str) -> list[psutil.Process]:
    """Those of the Ray of this process."""
    return named(psutil.Process().children(recursive=True), *names)


def workers() -> list[psutil.Process]:
    """Those of them that compute something for a job."""
    return at_work(psutil.Process().children(recursive=True))


def level_of(title: str) -> str:
    """The level that a worker is at, or another label of its task."""
    return title.removeprefix("ray::").partition(": ")[0]


def kill_worker(draw: random.Random, folder: Path) -> Outcome:
    """SIGKILL to one that computes, or that collects the events."""
    run, killed, of_board = a_job(draw, folder), "", draw.random() < 0.1

    def kill() -> str | None:
        nonlocal killed
        # between the steps of a job nobody computes
        if not (there := processes("ray::EventBoard") if of_board else workers()):
            return None
        with contextlib.suppress(psutil.Error):
            (victim,) = draw.sample(there, 1)
            killed = victim.cmdline()[0]
            victim.send_signal(signal.SIGKILL)
            return level_of(killed)
        return None

    fault = disturbed(draw, run, kill)
    outcome = judged(run, fault, 1)
    # once its events are lost, nobody sees when a job gets further
    return (
        outcome if "Board" not in killed else Outcome(outcome.hit, outcome.equal, outcome.torn, outcome.lost, note=outcome.note)
    )


def kill_driver(draw: random.Random, folder: Path) -> Outcome:
    run = a_job(draw, folder)
    moment = undisturbed(run.kind).moment(draw)
    job, fault = drive(run, running.joining()), Fault()
    with until_end(job, run):
        if moment.of(run):
            fault = fault_now(run)
            job.process.kill()
        job.end()
    here(run)
    return judged(run, fault, len(LEVELS))


def lose_worker_again(draw: random.Random, folder: Path) -> Outcome:
    """One level loses its worker 1 to 8 times, with progress between any two losses; `resources.retries` is 1."""
    run, losses = Run(folder, "one level"), draw.randint(1, 8)
    faults: list[Fault] = []

    def reached() -> int:
        return len({place(line)[1:4] for line in list(run.lines) if tiny.epochs_run([line])})

    def noticed() -> int:
        return sum("is started again" in line["note"] for line in list(run.lines))

    def lose() -> None:
        while len(faults) < losses:
            before = reached()
            while reached() == before or not (there := workers()):
                if run.ended.wait(0.02):
                    return
            run.ended.wait(draw.uniform(0, 0.3))
            faults.append(fault_now(run))
            kill_all(there)
            # what the lost worker had reported may arrive until then
            while noticed() < len(faults):
                if run.ended.wait(0.02):
                    return

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(lose)
        here(run)
        coming.result()
    return judged(run, faults[0] if faults else Fault(), losses, losses=len(faults))


def stop_worker(draw: random.Random, folder: Path) -> Outcome:
    """SIGSTOP, and SIGCONT 1 to 15 seconds later; a worker counts as hung after 8."""
    run, pause = a_job(draw, folder), draw.uniform(1, 15)
    stopped: list[psutil.Process] = []

    def stop() -> str | None:
        for worker in draw.sample(there := workers(), min(1, len(there))):
            with contextlib.suppress(psutil.Error):
                title = worker.cmdline()[0]
                worker.suspend()
                stopped.append(worker)
                threading.Timer(pause, resume, [worker]).start()
                return level_of(title)
        return None

    with mock.patch.object(watch, "SILENT_SECONDS", 8.0):
        fault = disturbed(draw, run, stop)
    for worker in stopped:
        resume(worker)
    again = sum("is started again" in line["note"] for line in run.lines)
    return judged(run, fault, 1, paused=pause, started_again=again)


def resume(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.resume()


def stop_lease_holder(draw: random.Random, folder: Path) -> Outcome:
    """SIGSTOP to the driver, whose lease lasts 4 seconds; another one follows it; SIGCONT 1 to 12 seconds later."""
    run, pause = a_job(draw, folder), draw.uniform(1, 12)
    moment = undisturbed(run.kind).moment(draw)
    job, fault = drive(run, running.joining(), lease=4), Fault()
    with until_end(job, run):
        if moment.of(run):
            fault = fault_now(run)
            first = psutil.Process(job.process.pid)
            first.suspend()
            timer = threading.Timer(pause, resume, [first])
            timer.start()
        with mock.patch.object(leases, "LEASE_SECONDS", 4.0):
            here(run)
        if fault.at is not None:
            timer.join()
        code = job.end()
    assert code == 0, f"the driver that was stopped ended with {code}: {' '.join(job.errors.split())[-300:]}"
    return judged(run, fault, paused=pause)


# ── a clock that jumps ─────────────────────────────────────────────────────────────────────────────────────────────────


def clock(draw: random.Random, folder: Path) -> Outcome:
    """The clock of this process, which drives the job, jumps by a day. From then on another driver follows it, and a collector
    with an hour of grace runs beside both, and once more over an old blob when they are done.
    """
    run, days = a_job(draw, folder), draw.choice([-1, 1])
    second = Run(folder, run.kind)
    true_time, offset = time.time, [0.0]

    def now() -> float:
        return true_time() + offset[0]

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=offset[0])

    def jump() -> str:
        offset[0] = days * 86_400.0
        followers.append(follower.submit(here, second))
        while not run.ended.wait(0.3):
            Store(run.store).gc(3600, dry_run=False)
        return ""

    followers: list[Future[None]] = []
    with (
        ThreadPoolExecutor(1) as follower,
        tiny.without_figures(tiny.SPLIT_FIGURES),  # around both drivers, which end in any order
        mock.patch("time.time", now),
        mock.patch("gearnn_ray.store.releases.datetime", Shifted),
    ):
        fault = disturbed(draw, run, jump)
        for each in followers:
            each.result()
        store = Store(run.store)
        old = Path(run.store / "blobs/sha256" / ("0" * 64))
        old.write_bytes(b"old")
        os.utime(old, times=(true_time() - 7200,) * 2)
        store.tag("tiny", "other", store.tags("tiny")["latest"])
        store.gc(3600, dry_run=False)
        store.untag("tiny", "other")
        assert not old.exists(), "a blob of two hours was kept, with a grace period of one"
    outcome = replace(judged(run, fault, 0), recovery=None)  # by this clock nothing can be timed
    computed = tiny.epochs_run(second.lines)
    wrong = f"the second driver computed {computed} epochs while the first one lived" if computed else outcome.note
    return replace(outcome, silent=int(computed > 0), note=wrong)


LINES: tuple[Line, ...] = (
    Line("kill-worker", "SIGKILL of a worker", 200, kill_worker),
    Line("kill-driver", "SIGKILL of the driver", 200, kill_driver),
    Line("lose-worker-again", "one level loses its worker 1 to 8 times", 30, lose_worker_again),
    Line("stop-worker", "SIGSTOP of a worker", 30, stop_worker),
    Line("stop-lease-holder", "SIGSTOP of the driver that holds the lease", 30, stop_lease_holder),
    Line("clock", "the driver's clock jumps by a day", 20, clock),
)
