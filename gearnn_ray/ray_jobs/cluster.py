"""What every job needs of Ray: a cluster, a place for what workers have to say, plain reasons for what failed."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Under `uv run` Ray would upload the folder and build a second environment for its workers; the one at hand will do.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import ray
from ray._private.state import state as cluster_state
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gearnn_ray.config.command_line import read_yaml
from gearnn_ray.core.errors import TrainingFailedError, UserError
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.ray_jobs.resources import autoscaler_ceiling

POLL_SECONDS = 0.5
_BOOTSTRAP = Path.home() / "ray_bootstrap_config.yaml"


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster this process is in, or one of its own for as long as the job takes."""
    if ray.is_initialized():
        yield
        return
    # bare: inside a submitted job the address and the runtime environment are injected
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def cluster_resources() -> tuple[list[Mapping[str, float]], Mapping[str, float] | None]:
    """Resources of each node there is, and the most an autoscaler may bring in all (None: there is none)."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    ceiling: Mapping[str, float] | None = cluster_state.get_max_resources_from_cluster_config()
    if ceiling is None and _BOOTSTRAP.is_file():
        # the cluster launcher's autoscaler does not tell the cluster its node types; its file on the head does
        ceiling = autoscaler_ceiling(read_yaml(_BOOTSTRAP))
    return nodes, ceiling


def beside_driver() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


@ray.remote(num_cpus=0)
class EventBoard:
    """Where workers pin what they have to say, and the driver collects it."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._failures: dict[str, str] = {}

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def give_up(self, level: str, reason: str) -> None:
        self._failures.setdefault(level, reason)

    def given_up(self, level: str) -> str | None:
        return self._failures.get(level)


class EventRelay:
    """Hands the board's events on to the driver's reporter."""

    def __init__(self, board: Any, emit: Emit) -> None:
        self._board, self.emit = board, emit

    def flush(self) -> None:
        try:
            events = ray.get(self._board.take.remote(), timeout=10)
        except RayError:
            return  # the board died with its node: the work goes on unseen
        for event in events:
            self.emit(event)

    def wait(self, ref: Any) -> Any:
        """The result of one task, relaying events until it is there."""
        while not ray.wait([ref], timeout=POLL_SECONDS)[0]:
            self.flush()
        self.flush()
        return result_of(ref)


def result_of(ref: Any) -> Any:
    """`ray.get`, with a task's own exception instead of Ray's wrapper around it."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise


@contextmanager
def event_sender(board: Any) -> Iterator[Emit]:
    """A worker's line to the board; left only when everything said has arrived, for the driver stops listening then."""
    last: list[Any] = [None]

    def emit(event: Event) -> None:
        last[0] = board.put.remote(event)

    try:
        yield emit
    finally:
        if last[0] is not None:
            with suppress(RayError):
                ray.get(last[0], timeout=10)


def discard(event: Event) -> None:
    del event


def reason_of(error: Exception) -> str:
    """Why a level failed, in one line; Ray Train wraps a worker's exception in several of its own."""
    inner: BaseException = error
    while True:
        failures = getattr(inner, "worker_failures", None)
        following = next(iter(failures.values())) if failures else inner.__cause__ or getattr(inner, "cause", None)
        if isinstance(inner, UserError | TrainingFailedError) or not isinstance(following, BaseException):
            break
        inner = following
    text = " ".join(str(inner).split()) or type(inner).__name__
    return text if isinstance(inner, UserError | TrainingFailedError) else f"{type(inner).__name__}: {text[:500]}"
