"""Events and failures on their way from workers to the driver."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gearnn_ray.core.errors import TrainingFailedError, UserError
from gearnn_ray.core.events import Emit, Event


@ray.remote(num_cpus=0)
class EventBoard:
    """Collects the events of all workers until the driver takes them, and why a unit of work was given up."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._failures: dict[str, str] = {}

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def give_up(self, label: str, reason: str) -> None:
        self._failures.setdefault(label, reason)

    def given_up(self, label: str) -> str | None:
        return self._failures.get(label)


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """On the driver's node, if it has room."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


class EventRelay:
    """Hands the board's events to the driver's reporter. The board is a process: it is started when a task is first given it."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._taken: Any = None  # events on their way here

    @cached_property
    def board(self) -> Any:
        """The actor that workers send events to."""
        actor: Any = EventBoard
        return actor.options(scheduling_strategy=beside_driver()).remote()

    def flush(self) -> None:
        """Emit what has arrived. A board that died with its node is passed over: the work continues unseen."""
        if "board" not in vars(self):
            return
        if self._taken is None:
            self._taken = self.board.take.remote()
        try:
            events = ray.get(self._taken, timeout=10)
        except GetTimeoutError:
            return  # a board that starts slowly answers the next time: who asked again would lose what it gave the first time
        except RayError:
            events = []
        self._taken = None
        for event in events:
            self._emit(event)


@contextmanager
def event_sender(board: Any) -> Iterator[Emit]:
    """A worker's way to the board; left only when every event has arrived, because the driver stops listening then."""
    last: list[Any] = [None]

    def emit(event: Event) -> None:
        last[0] = board.put.remote(event)

    try:
        yield emit
    finally:
        if last[0] is not None:
            with suppress(RayError):
                ray.get(last[0], timeout=60)


def discard(event: Event) -> None:
    del event


def reason_of(error: Exception) -> str:
    """Why a unit of work failed, in one line; Ray Train wraps a worker's exception in several of its own."""
    inner: BaseException = error
    while True:
        failures = getattr(inner, "worker_failures", None)
        following = next(iter(failures.values())) if failures else inner.__cause__ or getattr(inner, "cause", None)
        if isinstance(inner, UserError | TrainingFailedError) or not isinstance(following, BaseException):
            break
        inner = following
    text = " ".join(str(inner).split()) or type(inner).__name__
    return text if isinstance(inner, UserError | TrainingFailedError) else f"{type(inner).__name__}: {text[:500]}"
