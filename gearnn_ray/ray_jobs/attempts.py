"""Tasks that run on Ray, watched, and started again where a worker is lost or hangs. What is decided stands in `watch`.

Ray's own retries are off: they count all losses of a task, and would end a level that gets further between any two of them.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gearnn_ray.core.events import Event
from gearnn_ray.ray_jobs.board import EventRelay, Report, WorkerLostError, reason_of
from gearnn_ray.ray_jobs.watch import Watched, Worker

POLL_SECONDS = 0.5
_numbers = itertools.count()  # of the attempts of this process: no late report is taken for another attempt's
_LONGEST_POLL = 5.0  # the driver itself may have been stopped: what it did not watch, it does not count


@dataclass(eq=False)
class Task:
    """A task and its present attempt. submit: called with the name of an `attempt`; returns Ray's reference to it."""

    label: str
    submit: Callable[..., Any]
    then: Callable[[Any], None]
    watched: Watched = field(default_factory=Watched)
    attempt: str = ""
    ref: Any = None
    start_at: float | None = None  # by the clock of `Attempts`, while it waits to be started again


class Attempts:
    """The tasks that run. `poll` waits for a moment and returns those that ended."""

    def __init__(self, relay: EventRelay, retries: int) -> None:
        self._relay, self._retries = relay, retries
        self._tasks: list[Task] = []
        self._clock, self._looked = 0.0, time.monotonic()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, task: Task) -> None:
        self._tasks.append(task)
        self._submit(task)

    def cancel(self) -> None:
        """Give up everything that runs, without waiting for it."""
        for task in self._tasks:
            if task.ref is not None:
                with suppress(RayError, RuntimeError):  # Ray itself may be gone
                    ray.cancel(task.ref, force=False)
        self._tasks.clear()

    def poll(self) -> list[tuple[Task, Any]]:
        """The tasks that ended, each with its result or its exception; their events have been emitted."""
        self._start_waiting()
        running = {task.ref: task for task in self._tasks if task.ref is not None}
        done: list[Any] = []
        if running:
            done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)
        reports = self._relay.flush()
        self._tick()
        self._see(reports or ())
        ended = [(running[ref], _outcome(ref)) for ref in done]
        ended = [(task, outcome) for task, outcome in ended if not self._starts_again(task, outcome)]
        if reports is not None:  # nothing is known of the workers while the board does not answer
            ended += self._end_hung(running[ref] for ref in running if ref not in done)
        for task, _ in ended:
            self._tasks.remove(task)
        return ended

    def _tick(self) -> None:
        now = time.monotonic()
        self._clock += min(now - self._looked, _LONGEST_POLL)
        self._looked = now

    def _submit(self, task: Task) -> None:
        task.attempt, task.start_at = f"{task.label} #{next(_numbers)}", None
        task.ref = task.submit(attempt=task.attempt)

    def _start_waiting(self) -> None:
        for task in self._tasks:
            if task.start_at is not None and task.start_at <= self._clock:
                self._submit(task)

    def _see(self, reports: Iterable[Report]) -> None:
        by_attempt = {task.attempt: task for task in self._tasks}
        for report in reports:
            if (task := by_attempt.get(report.attempt)) is None:
                continue  # of an attempt that was given up
            if report.alive is not None:
                task.watched = task.watched.sign(report.alive, self._clock)
            if report.done is not None:
                task.watched = task.watched.leave(report.done)
            if report.event is not None:
                task.watched = task.watched.report(report.event, self._clock)

    def _starts_again(self, task: Task, outcome: Any) -> bool:
        """Whether the task lost its worker and is started again."""
        return _is_loss(outcome) and self._again(task, reason_of(outcome))

    def _end_hung(self, tasks: Iterable[Task]) -> list[tuple[Task, Any]]:
        """End attempts that hang; the tasks that are not started again, with the reason."""
        ended = []
        for task in tasks:
            if (reason := task.watched.hung(self._clock)) is None:
                continue
            _end(task.ref, task.watched.signs)
            if not self._again(task, reason):
                ended.append((task, WorkerLostError(f"{reason}, in {self._retries + 1} attempts without getting further")))
        return ended

    def _again(self, task: Task, reason: str) -> bool:
        task.watched = task.watched.lost()
        if (pause := task.watched.again(self._retries)) is None:
            return False
        note = f"{task.label} is started again, from its last checkpoint: {reason}"
        self._relay.emit(Event("notice", "job", "all", note=note))
        task.ref, task.start_at = None, self._clock + pause
        return True


def _outcome(ref: Any) -> Any:
    """The result of a task, or its own exception instead of Ray's wrapper around it."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except Exception as error:
        return error


def _is_loss(outcome: Any) -> bool:
    """Whether a task ended because its process, its node or its group did, and not by what it computed."""
    ended = isinstance(outcome, RayError) and not isinstance(outcome, RayTaskError | TaskCancelledError)
    return ended or isinstance(outcome, WorkerLostError)


def _end(ref: Any, workers: Iterable[Worker]) -> None:
    """End an attempt by force. A stopped process does not read Ray's request to end, so its node ends it as well."""
    with suppress(RayError):
        ray.cancel(ref, force=True)
    for worker in workers:
        here = NodeAffinitySchedulingStrategy(worker.node, soft=False)
        _kill.options(scheduling_strategy=here).remote(worker)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(worker: Worker) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(worker.pid)
        if abs(process.create_time() - worker.started) < 1:
            process.kill()
