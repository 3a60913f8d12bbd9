"""Shared by all tests: a small network, small images, and one local Ray cluster for those that need it."""

import os

# Ray starts workers at niceness 15: beside anything else that runs, a start of seconds becomes minutes
os.environ.setdefault("RAY_worker_niceness", "0")
# threads of OpenMP that wait would take the CPU from the tests beside them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# it looks for nodes that a cloud takes back
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# for the S3 server on loopback; Ray's workers inherit them
os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "testing"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_DEFAULT_REGION"] = "us-east-1"

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import Image
from gearnn_ray.training.predict import Normalisation

ROOT = Path(__file__).resolve().parent.parent
NORMALISATION = Normalisation((0.4, 0.4, 0.4), (0.3, 0.3, 0.3))
SEGMENTATION = task_by_name("segmentation")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


def eventually(true: Callable[[], object], seconds: float = 20, pause: float = 0.02) -> None:
    """Wait until this is so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(pause)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def no_recompile() -> Iterator[None]:
    """One graph must do: a second one is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def pictures() -> tuple[list[Image], list[Image]]:
    """Twelve images [32, 40, 3] whose three classes differ in colour, with their labels."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for _ in range(12):
        label = np.repeat(np.repeat(rng.integers(0, 3, (4, 5)), 8, 0), 8, 1).astype(np.uint8)
        colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
        noise = rng.integers(-40, 40, (32, 40, 3))
        images.append(np.clip(colours[label] + noise, 0, 255).astype(np.uint8))
        label = label.copy()
        label[:2] = 255
        labels.append(label)
    return images, labels


@pytest.fixture
def no_figures() -> Iterator[None]:
    """Jobs of this process draw no figures, which takes longer than all else they do in tests."""
    from tests.tiny import without_figures

    with without_figures():
        yield


class _OneBoard:
    """Gives every job the same board, emptied: a process less for each."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def options(self, **_: Any) -> Self:
        return self

    def remote(self) -> Any:
        self._board.__ray_call__.remote(lambda board: board.__init__())  # calls of one process keep their order
        return self._board


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Mapping[str, str]]:
    """One Ray with two CPUs for the whole session; a job with these environment variables joins it."""
    from gearnn_ray.ray_jobs import board
    from gearnn_ray.ray_jobs.local_ray import local_ray

    # Ray ends idle workers beyond one per CPU after a second, and the next job would import torch in new ones
    kept = {"num_workers_soft_limit": 4}
    with (
        local_ray(num_cpus=2, log_to_driver=False, logging_level="error", namespace="tests", _system_config=kept) as own,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(board, "EventBoard", _OneBoard(board.EventBoard.remote()))
        yield own.joining
