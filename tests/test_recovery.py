"""`kill -9` of a worker, of the driver, of a node: the next run ends with the digests of an undisturbed one.

Real processes, whose fine-tunes wait at a gate in the middle of an epoch until they are killed. A job that needs no process of
its own runs on the Ray of all tests.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from gearnn_ray.store.releases import Store
from tests import tiny
from tests.conftest import ROOT
from tests.nets import Small
from tests.running_jobs import GATES, Job, closed, descendants, run_here, wait_until_gone

LEVELS = ["jpeg-10", "brightness-0.4"]
EPOCHS, STEPS = 4, 4  # of one fine-tune, and of one epoch
# of one stage, full or partial, in an undisturbed run
STAGE_EPOCHS = len(LEVELS) * EPOCHS

# training steps of a process that begins with a full fine-tune: in the third epoch of the full, of the partial one
FULL, PARTIAL = 2 * STEPS + 1, (EPOCHS + 2) * STEPS + 1


class _Gated(Small):
    """Waits before each training step while its number is a file among the gates."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            while (GATES / str(self.steps)).exists():
                time.sleep(0.02)
            self.steps += 1
        return super().forward(x)


def gated(num_classes: int) -> nn.Module:
    return _Gated(num_classes)


def levels_past(stage: str, epoch: int, lines: list[dict[str, Any]]) -> set[str]:
    """The levels whose fine-tune has finished this epoch."""
    return {e["level"] for e in lines if e["event"] == "progress" and e["stage"] == stage and e["epoch"] == epoch}


def epochs_of(stage: str, lines: list[dict[str, Any]]) -> int:
    return tiny.epochs_run([e for e in lines if e.get("stage") == stage])


def times_started(stage: str, lines: list[dict[str, Any]]) -> int:
    return sum(e["event"] == "started" and e["stage"] == stage for e in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    tiny.write_folder(folder / "data", train=16)
    tiny.write_weights(folder / "weights.safetensors")
    return folder


def options(folder: Path, store: str, **changes: Any) -> list[str]:
    gated = {"recipe.epochs": EPOCHS, "model.name": "tests.test_recovery:gated", "levels": LEVELS}
    return tiny.options(folder, store=folder / store, **gated | changes)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, ray_cluster: object) -> Path:
    lines = run_here(options(folder, "undisturbed"))
    assert [epochs_of(stage, lines) for stage in ("full", "partial")] == [STAGE_EPOCHS] * 2
    assert [times_started(stage, lines) for stage in ("full", "partial")] == [len(LEVELS)] * 2
    return folder / "undisturbed"


def assert_same(folder: Path, store: str, undisturbed: Path, earlier: frozenset[str] = frozenset()) -> None:
    assert tiny.blobs(folder / store) == tiny.blobs(undisturbed) | earlier
    ours, theirs = (Store(folder).pull("tiny").manifest for folder in (folder / store, undisturbed))
    of_its_time = {"created": "", "tables": {}, "figures": {}}
    assert {**ours, **of_its_time} == {**theirs, **of_its_time}
    # who is killed while it writes leaves its unfinished file, which nobody reads
    assert not [path for path in (folder / store / "checkpoints").iterdir() if not path.name.startswith(".tmp-")]


def test_a_killed_worker_costs_an_epoch(folder: Path, undisturbed: Path) -> None:
    killed: list[psutil.Process] = []
    seen: list[dict[str, Any]] = []

    def kill(line: dict[str, Any]) -> None:
        """One worker in its full fine-tune; and the other, who is ahead from then on, in its partial one."""
        seen.append(line)
        stages = (("full", FULL, len(LEVELS)), ("partial", PARTIAL, 1))
        for stage, gate, waiting in stages[len(killed) : len(killed) + 1]:
            if len(levels_past(stage, 2, seen)) == waiting:
                killed.append(next(p for p in descendants(os.getpid())[0] if p not in killed))
                killed[-1].send_signal(signal.SIGKILL)
                (GATES / str(gate)).unlink()

    with closed(FULL, PARTIAL):
        lines = run_here(options(folder, "worker"), kill)
    for stage in ("full", "partial"):
        assert times_started(stage, lines) == len(LEVELS) + 1  # one fine-tune was interrupted
        assert epochs_of(stage, lines) <= STAGE_EPOCHS + 1  # and did at most one epoch again
    assert_same(folder, "worker", undisturbed)


def test_a_job_whose_driver_was_killed_continues(folder: Path, undisturbed: Path) -> None:
    # with one level's full fine-tune done already, for another budget, the two levels wait in different stages
    before = run_here(options(folder, "driver", levels=LEVELS[:1], budget="40"))
    earlier = frozenset(tiny.blobs(folder / "driver"))
    with closed(FULL):
        job = Job(tiny.start_job(options(folder, "driver")))
        job.wait_for(lambda lines: bool(levels_past("full", 2, lines) and levels_past("partial", 2, lines)))
        workers, others = descendants(job.process.pid)
        os.kill(job.process.pid, signal.SIGKILL)
        job.end()
        wait_until_gone(workers, others)
    last = run_here(options(folder, "driver"))
    assert (times_started("full", last), times_started("partial", last)) == (1, 2)  # both had been interrupted
    for stage, once in (("full", STAGE_EPOCHS - EPOCHS), ("partial", STAGE_EPOCHS)):
        assert epochs_of(stage, last) < once
        # only the epoch in flight can have been computed and not reported when the driver died
        assert epochs_of(stage, job.lines + last) <= once + 1
    assert epochs_of("full", before) == EPOCHS
    assert_same(folder, "driver", undisturbed, earlier)


def test_two_drivers_of_one_job_compute_it_once(folder: Path, undisturbed: Path) -> None:
    ran: list[list[dict[str, Any]]] = []
    first = threading.Thread(target=lambda: ran.append(run_here(options(folder, "twice"))))
    first.start()
    while not list((folder / "twice").glob("leases/*.json")):
        time.sleep(0.02)
    second = run_here(options(folder, "twice"))
    first.join(120)
    assert [epochs_of(stage, ran[0]) for stage in ("full", "partial")] == [STAGE_EPOCHS] * 2
    assert [epochs_of(stage, second) for stage in ("full", "partial")] == [0, 0]
    (notice,) = [event["note"] for event in second if event["event"] == "notice"]
    assert f"process {os.getpid()}): this one follows it" in notice
    assert_same(folder, "twice", undisturbed)


NODES = """
import contextlib, sys, threading
import psutil, ray
from ray.cluster_utils import Cluster
from gearnn_ray.cli.main import run_split

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
codes = []
job = threading.Thread(target=lambda: codes.append(run_split(sys.argv[1:] + ["--json"])), daemon=True)
job.start()
sys.stdin.readline()
doomed = cluster.add_node(num_cpus=1)
sys.stdin.readline()
(raylet,) = doomed.all_processes["raylet"]
lost = psutil.Process(raylet.process.pid).children(recursive=True)
cluster.remove_node(doomed, allow_graceful=False)  # SIGKILL to its raylet, and what it had started goes with the machine
for process in lost:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
psutil.wait_procs(lost)
print('{"event": "node killed"}', flush=True)
job.join()
ray.shutdown()
cluster.shutdown()
sys.exit(codes[0])
"""


# a token, and loopback only
GUARDED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """Where a cluster of its own may write its address: whoever starts a Ray meanwhile would join one in the usual place."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path has room for 107 characters
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_lost_node_takes_no_level_with_it(folder: Path, undisturbed: Path, ray_folder: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", NODES, *options(folder, "node")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray_folder, **GUARDED},
    )  # fmt: skip
    job = Job(process)

    def enter() -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    with closed(FULL):
        # the node joins a job that has begun: what must not be lost with it, such as the board of events, is on the head
        job.wait_for(lambda lines: bool(lines))
        enter()
        job.wait_for(lambda lines: levels_past("full", 2, lines) == set(LEVELS))
        enter()
        job.wait_for(lambda lines: {"event": "node killed"} in lines)
    assert job.end() == 0, job.errors
    lines = [e for e in job.lines if "stage" in e]
    assert times_started("full", lines) == len(LEVELS) + 1  # the node had one CPU, hence one fine-tune
    assert epochs_of("full", lines) <= STAGE_EPOCHS + 1
    assert epochs_of("partial", lines) == STAGE_EPOCHS
    assert_same(folder, "node", undisturbed)


@pytest.fixture(autouse=True)
def _no_orphans() -> Iterator[None]:
    yield
    for process in psutil.Process().children():
        if "run_split" in (command := " ".join(process.cmdline())) or "split.py" in command:
            for each in (*process.children(recursive=True), process):
                with contextlib.suppress(psutil.Error):
                    each.kill()
