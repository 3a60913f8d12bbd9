"""Events, signs of life and failures on their way from workers to the driver."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gearnn_ray.core.errors import TrainingFailedError, UserError, storage_problem
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.ray_jobs import watch
from gearnn_ray.ray_jobs.watch import Worker


class WorkerLostError(Exception):
    """Workers of a task died or hung, so that it can be started again."""


@dataclass(frozen=True)
class Report:
    """What a worker tells the driver about an attempt at a task: an event, that it lives, or that it is done."""

    attempt: str
    event: Event | None = None
    alive: Worker | None = None
    done: Worker | None = None


@ray.remote(num_cpus=0)
class EventBoard:
    """Collects the reports of all workers until the driver takes them, and why a unit of work was given up."""

    def __init__(self) -> None:
        self._reports: list[Report] = []
        self._failures: dict[str, str] = {}

    def put(self, report: Report) -> None:
        self._reports.append(report)

    def take(self) -> list[Report]:
        reports, self._reports = self._reports, []
        return reports

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
        self.emit = emit
        self._taken: Any = None  # reports on their way here

    @cached_property
    def board(self) -> Any:
        """The actor that workers send events to."""
        actor: Any = EventBoard
        return actor.options(scheduling_strategy=beside_driver()).remote()

    def flush(self) -> list[Report] | None:
        """Emit the events that have arrived, and return all reports; None where the board does not answer. A board that died with
        its node is passed over: the work continues unseen.
        """
        if "board" not in vars(self):
            return None
        if self._taken is None:
            self._taken = self.board.take.remote()
        try:
            reports: list[Report] | None = ray.get(self._taken, timeout=10)
        except GetTimeoutError:
            # a board that starts slowly answers the next time: who asked again would lose what it gave the first time
            return None
        except RayError:
            reports = None
        self._taken = None
        for report in reports or ():
            if report.event is not None:
                self.emit(report.event)
        return reports


@contextmanager
def event_sender(board: Any, attempt: str = "") -> Iterator[Emit]:
    """A worker's way to the board; left only when every event has arrived, because the driver stops listening then. Warnings that
    the package logs meanwhile become notices. attempt: the attempt at a task that the driver watches; this process sends signs of
    life for it.
    """
    last: list[Any] = [None]

    def emit(event: Event) -> None:
        last[0] = board.put.remote(Report(attempt, event))

    try:
        with _Notices(emit), _signs_of_life(board, attempt) if attempt else nullcontext():
            yield emit
    finally:
        if last[0] is not None:
            with suppress(RayError):
                ray.get(last[0], timeout=60)


class _Notices(logging.Handler):
    """Emits what the package's modules warn of while the context lasts: a worker's log is read by nobody."""

    def __init__(self, emit: Emit) -> None:
        super().__init__(logging.WARNING)
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit(Event("notice", "job", "all", note=record.getMessage()))

    def __enter__(self) -> None:
        logging.getLogger("gearnn_ray").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("gearnn_ray").removeHandler(self)


@contextmanager
def _signs_of_life(board: Any, attempt: str) -> Iterator[None]:
    """While the context lasts, a thread shows that this process lives."""
    worker = Worker(ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time())
    done = threading.Event()

    def show() -> None:
        while not done.wait(watch.SIGN_SECONDS):
            board.put.remote(Report(attempt, alive=worker))

    with suppress(RayError):  # the first one has arrived before any work begins: without it the driver would wait for ever
        ray.get(board.put.remote(Report(attempt, alive=worker)), timeout=60)
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        board.put.remote(Report(attempt, done=worker))


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
    if problem := storage_problem(inner):
        return problem
    text = " ".join(str(inner).split()) or type(inner).__name__
    return text if isinstance(inner, UserError | TrainingFailedError) else f"{type(inner).__name__}: {text[:500]}"
