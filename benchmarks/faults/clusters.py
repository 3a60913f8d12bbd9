"""Faults of the Ray below a running job: nodes and its store of facts killed, memory short, messages lost, hosts cut off."""

import atexit
import functools
import json
import random
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.campaign import Line, Outcome
from benchmarks.faults.running import LEVELS, Fault, Run, a_job, arguments, drive, fault_now, here, judged, undisturbed, until_end
from tests.running_jobs import Job, kill_all, named, start_program

GUARDED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# ── a node is lost ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Cluster:
    """The program of `nodes`, for all runs of a line."""

    def __init__(self, kind: str) -> None:
        # where its processes are: whoever starts a Ray meanwhile would join one in the usual place
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path has room for 107 characters
        before, guards = (("unshare", "-rn"), GUARDED) if kind == "hosts" else ((), {**GUARDED, **LOOPBACK})
        environment = {"RAY_TMPDIR": folder, **guards}
        self._see: Callable[[dict[str, Any]], object] = lambda _: None
        self.job: Job = start_program(
            "benchmarks.faults.nodes", kind, see=lambda line: self._see(line), environment=environment, before=before
        )
        atexit.register(self._end, folder)
        self._wait("ready")

    def _end(self, folder: str) -> None:
        assert self.job.process.stdin is not None
        started = psutil.Process(self.job.process.pid).children(recursive=True)
        self.job.process.stdin.close()
        self.job.end(60)
        kill_all(started)
        shutil.rmtree(folder, ignore_errors=True)

    def _wait(self, event: str, seconds: float = 300) -> dict[str, Any]:
        self.job.wait_for(lambda lines: any(line["event"] == event for line in lines), seconds)
        found = next(line for line in self.job.lines if line["event"] == event)
        self.job.lines.remove(found)
        return found

    def tell(self, event: str, **command: object) -> None:
        self.job.tell(json.dumps(command))
        self._wait(event)

    def start(self, run: Run) -> None:
        self._see = run.see
        self.job.tell(json.dumps({"job": arguments(run.folder, run.kind)}))

    def end(self, run: Run, seconds: float = 300) -> int:
        code: int = self._wait("job ended", seconds)["code"]
        run.ended.set()
        self._see = lambda _: None
        return code


cluster = functools.cache(Cluster)


def lose_node(kind: str, draw: random.Random, folder: Path) -> Outcome:
    """A node joins a job that has begun, so that the board of events is on the head, and is lost at some moment after that."""
    run, nodes = a_job(draw, folder), cluster(kind)
    moment = undisturbed(run.kind, 1).moment(draw)
    faults = [Fault()]
    nodes.tell("added", add=True)
    nodes.start(run)

    def wait() -> None:
        if moment.of(run):
            faults[0] = fault_now(run)
        nodes.tell("lost", lose=True)

    losing = threading.Thread(target=wait)
    losing.start()
    code = nodes.end(run)
    losing.join()
    assert code == 0, f"the job ended with {code}"
    return judged(run, faults[0], len(LEVELS), cpus=1)


# ── faults of a Ray of the job's own ───────────────────────────────────────────────────────────────────────────────────


def kill_gcs(draw: random.Random, folder: Path) -> Outcome:
    """SIGKILL to the process that holds the facts of the whole cluster: its jobs end, and the same command starts again."""
    run, fault, took = a_job(draw, folder), Fault(), 0.0
    moment = undisturbed(run.kind).moment(draw)
    job = drive(run, cpus=2)
    with until_end(job, run):
        if moment.of(run):
            fault = fault_now(run)
            (gcs,) = named(psutil.Process(job.process.pid).children(), "gcs_server")
            kill_all([gcs])
        job.end(240)
        took = time.monotonic() - (fault.at or time.monotonic())
    here(run)
    return judged(run, fault, len(LEVELS), ended_after=took)


def out_of_memory(draw: random.Random, folder: Path) -> Outcome:
    """Ray ends workers where the machine's memory is used up to a threshold, which something else passes for some seconds."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + (2 << 30)) / memory.total
    environment = {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "50"}
    run, fault, seconds = a_job(draw, folder), Fault(), draw.uniform(0.5, 4)
    moment = undisturbed(run.kind).moment(draw)
    job = drive(run, environment, cpus=2)
    with until_end(job, run):
        if moment.of(run):
            fault = fault_now(run)
            taken = b"\x01" * (3 << 30)
            run.ended.wait(seconds)
            del taken
        code = job.end(300)
    assert code == 0, f"the job ended with {code}: {' '.join(job.errors.split())[-300:]}"
    ended = sum(line["event"] == "notice" and "memory" in line["note"] for line in run.lines)
    outcome = judged(run, fault, seconds=seconds, workers_ended=ended)
    return replace(outcome, hit=ended > 0)


METHODS = (
    "CoreWorkerService.grpc_client.PushTask",
    "CoreWorkerService.grpc_client.GetObjectStatus",
    "NodeManagerService.grpc_client.RequestWorkerLease",
    "NodeManagerService.grpc_client.ReturnWorkerLease",
)


def ray_messages(draw: random.Random, folder: Path) -> Outcome:
    """Requests and replies between Ray's processes are lost, up to three of each kind and process, and all are late."""
    lost = {
        name: {"num_failures": draw.randint(1, 3), "req_failure_prob": 15, "resp_failure_prob": 15, "in_flight_failure_prob": 0}
        for name in draw.sample(METHODS, draw.randint(1, len(METHODS)))
    }
    late = {"RAY_testing_asio_delay_us": f"*=0:{draw.randint(1, 10)}000"}
    environment = {"RAY_testing_rpc_failure": json.dumps(lost), **late}
    run = a_job(draw, folder)
    begun, tries, code = fault_now(run), 0, 1
    while code and tries < 3:  # where the driver gave up, its user starts the same command again
        tries += 1
        run.ended.clear()
        job = drive(run, environment, cpus=2)
        with until_end(job, run):
            code = job.end(300)
        assert code in (0, 1, 2), f"the driver ended with {code}: {' '.join(job.errors.split())[-300:]}"
    assert code == 0, f"the job ended with {code} three times: {' '.join(job.errors.split())[-300:]}"
    # messages are late in every run; which ones were lost nobody says
    return replace(judged(run, begun, starts=tries), recovery=None)


LINES: tuple[Line, ...] = (
    Line("kill-raylet", "SIGKILL of a node's raylet and all of its workers", 50, functools.partial(lose_node, "processes")),
    Line("kill-gcs", "SIGKILL of Ray's GCS", 20, kill_gcs),
    Line("out-of-memory", "memory short, Ray ends workers", 20, out_of_memory),
    Line("ray-messages", "Ray's messages lost and late", 50, ray_messages),
    Line("hosts-apart", "one of three hosts with addresses of their own is cut off", 10, functools.partial(lose_node, "hosts")),
)
