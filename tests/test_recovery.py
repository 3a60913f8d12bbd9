"""`kill -9` of a worker, of the driver, of a node: the next run ends with the digests of an undisturbed one.

Real processes over real time: the fine-tunes here take some seconds, so that there is something to kill.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gearnn_ray import Store
from tests import tiny
from tests.conftest import ROOT

LEVELS = ["jpeg-10", "brightness-0.4"]
EPOCHS = 6
# all full and partial fine-tunes of an undisturbed run
ALL_EPOCHS = len(LEVELS) * 2 * EPOCHS


class Job:
    """A running job whose events can be watched while it works."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.errors = ""
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._stderr, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines += tiny.events(line)

    def _stderr(self) -> None:
        assert self.process.stderr is not None
        self.errors = self.process.stderr.read()

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not any(wanted(e) for e in list(self.lines)):
            assert self.process.poll() is None, f"the job ended first:\n{self.errors}"
            assert time.monotonic() < deadline, f"not seen within {seconds} s in {self.lines[-3:]}"
            time.sleep(0.05)

    def end(self, seconds: float = 180) -> int:
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(10)
        return code

    def descendants(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        """The workers that run a level, and Ray's other processes."""
        workers, others = [], []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # some come and go
                (workers if "ray::_run_level" in " ".join(process.cmdline()) else others).append(process)
        return workers, others


def in_epoch(stage: str, epoch: int) -> Callable[[dict[str, Any]], bool]:
    return lambda e: e["event"] == "progress" and e["stage"] == stage and e["epoch"] == epoch


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    tiny.write_folder(folder / "data", train=16)
    tiny.write_weights(folder / "weights.safetensors")
    return folder


def told(work: Path, store: str) -> list[str]:
    slow = {"recipe.epochs": EPOCHS, "model.name": "tests.nets:slow"}
    return tiny.options(work, store=work / store, levels=LEVELS, **slow)


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Path:
    job = Job(tiny.start_job(told(work, "undisturbed")))
    assert job.end() == 0, job.errors
    assert tiny.epochs_run(job.lines) == ALL_EPOCHS
    return work / "undisturbed"


def assert_same(work: Path, store: str, undisturbed: Path) -> None:
    assert tiny.blobs(work / store) == tiny.blobs(undisturbed)
    ours, theirs = (Store(folder).pull("tiny").manifest for folder in (work / store, undisturbed))
    assert {**ours, "created": ""} == {**theirs, "created": ""}
    assert not list((work / store / "checkpoints").iterdir())


def wait_until_gone(workers: list[psutil.Process], others: list[psutil.Process]) -> None:
    """Workers follow their driver within seconds; Ray's agents linger, and are ended here, by id."""
    still_working = psutil.wait_procs(workers, timeout=30)[1]
    for process in psutil.wait_procs(others, timeout=3)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert not still_working


@pytest.mark.parametrize("stage", ["full", "partial"])
def test_a_killed_worker_costs_an_epoch(work: Path, undisturbed: Path, stage: str) -> None:
    job = Job(tiny.start_job(told(work, f"worker-{stage}")))
    job.wait_for(in_epoch(stage, 2))
    workers, _ = job.descendants()
    workers[0].send_signal(signal.SIGKILL)
    assert job.end() == 0, job.errors
    assert tiny.epochs_run(job.lines) <= ALL_EPOCHS + 1  # one fine-tune was interrupted: at most one epoch again
    assert_same(work, f"worker-{stage}", undisturbed)


@pytest.mark.parametrize(("stage", "epoch"), [("full", 3), ("partial", 2)])
def test_a_killed_driver_goes_on_where_it_was(work: Path, undisturbed: Path, stage: str, epoch: int) -> None:
    store = f"driver-{stage}-{epoch}"
    first = Job(tiny.start_job(told(work, store)))
    first.wait_for(in_epoch(stage, epoch))
    workers, others = first.descendants()
    os.kill(first.process.pid, signal.SIGKILL)
    first.end()
    wait_until_gone(workers, others)
    second = Job(tiny.start_job(told(work, store)))
    assert second.end() == 0, second.errors
    # what was done and not yet said when the driver died is at most the epochs in flight, one per fine-tune
    assert tiny.epochs_run(first.lines) + tiny.epochs_run(second.lines) <= ALL_EPOCHS + len(LEVELS)
    assert tiny.epochs_run(second.lines) < ALL_EPOCHS
    assert_same(work, store, undisturbed)


NODES = """
import sys, threading, time
import ray
from ray.cluster_utils import Cluster
from gearnn_ray.cli import run_split

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
doomed = cluster.add_node(num_cpus=1)
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")

def kill():
    sys.stdin.readline()
    cluster.remove_node(doomed, allow_graceful=False)  # SIGKILL to its raylet, and its workers with it
    print('{"event": "node killed"}', flush=True)
threading.Thread(target=kill, daemon=True).start()
code = run_split(sys.argv[1:] + ["--json"])
ray.shutdown()
cluster.shutdown()
sys.exit(code)
"""


def test_a_lost_node_takes_no_level_with_it(work: Path, undisturbed: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", NODES, *told(work, "node")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    job = Job(process)
    job.wait_for(in_epoch("full", 2))
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert job.end() == 0, job.errors
    assert {"event": "node killed"} in job.lines
    lines = [e for e in job.lines if "stage" in e]
    assert tiny.epochs_run(lines) <= ALL_EPOCHS + 1  # the node had one CPU, hence one fine-tune
    assert_same(work, "node", undisturbed)


@pytest.fixture(autouse=True)
def _no_orphans() -> Iterator[None]:
    yield
    for process in psutil.Process().children():
        if "split.py" in " ".join(process.cmdline()):
            process.kill()
