"""How jobs run functions on Ray, in workers as `function(*arguments, emit)`. The runner notes a failure under the task's label,
and everything that does not need its result continues.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.core.events import Emit
from gearnn_ray.ray_jobs.board import EventRelay, event_sender, reason_of
from gearnn_ray.ray_jobs.cluster import cluster, cluster_resources
from gearnn_ray.ray_jobs.resources import check_resources, groups_that_fit
from gearnn_ray.ray_jobs.worker_group import run_on_workers, spreads_over_workers
from gearnn_ray.training.precision import prepare_process

POLL_SECONDS = 0.5
T = TypeVar("T")


@ray.remote
def _run(function: Callable[..., Any], threads: int, board: Any, *arguments: Any) -> Any:
    prepare_process(threads)
    with event_sender(board) as emit:
        return function(*arguments, emit)


@ray.remote
def _check(function: Callable[..., Any], *arguments: Any) -> Any:
    prepare_process(1)
    return function(*arguments)


def result_of(ref: Any) -> Any:
    """`ray.get`, with a task's own exception instead of Ray's wrapper around it."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise


class TaskRunner:
    """The tasks of one job. `failed`: label of a task that failed, and the reason in one line."""

    def __init__(self, resources: ResourcesConfig, emit: Emit) -> None:
        self.resources, self.relay = resources, EventRelay(emit)
        self.threads = max(1, int(resources.cpus))
        self.failed: dict[str, str] = {}
        self._running: dict[Any, tuple[str, Callable[[Any], None]]] = {}
        self._waiting: list[tuple[str, Callable[[], Any], Callable[[Any], None]]] = []

    def share(self, value: Any) -> Any:
        """A value in Ray's object store, to be given to many tasks as an argument."""
        return ray.put(value)

    def check(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)` in a worker, on one CPU; raises what it raises."""
        (result,) = self.check_all(function, [arguments])
        return result

    def check_all(self, function: Callable[..., T], calls: Sequence[Sequence[Any]]) -> Iterator[T]:
        """The same for many arguments; results in their order. The first that fails is raised."""
        refs = [_check.remote(function, *arguments) for arguments in calls]
        try:
            for ref in refs:
                while not ray.wait([ref], timeout=POLL_SECONDS)[0]:
                    self.relay.flush()
                self.relay.flush()
                yield result_of(ref)
        except Exception:
            for ref in refs:
                ray.cancel(ref, force=False)
            raise

    def start(
        self,
        label: str,
        function: Callable[..., Any],
        *arguments: Any,
        then: Callable[[Any], None] = lambda _: None,
        look_up: Callable[..., Any] | None = None,
        threads: int | None = None,
    ) -> None:
        """Submit one task with the job's resources; `then` gets its result in the driver, None if it failed. look_up: called like
        the function; returns the stored result or None. With it, a job of several workers per level spreads the task over them.
        """
        resources = self.resources
        if look_up is not None and spreads_over_workers(resources):

            def submit() -> Any:
                return run_on_workers(function, look_up, arguments, label, self.threads, resources, self.relay.board)

            self._waiting.append((label, submit, then))
            return
        cpus = max(resources.cpus, threads or 0)
        if threads is not None:
            # where the job goes on may be smaller than where it began: more threads than CPUs are slow, not wrong
            cpus = min(cpus, max(float(node.get("CPU", 0)) for node in cluster_resources()[0]))
        # all of them wait in Ray's own queue, where an autoscaler sees them
        task = _run.options(num_cpus=cpus, num_gpus=resources.gpus, max_retries=resources.retries)
        ref = task.remote(function, threads or self.threads, self.relay.board, *arguments)
        self._running[ref] = (label, then)

    def settle(self) -> None:
        """Until nothing is running; `then` may start more."""
        while self._running or self._waiting:
            while self._waiting and len(self._running) < groups_that_fit(self.resources, *cluster_resources()):
                label, submit, then = self._waiting.pop(0)
                self._running[submit()] = (label, then)
            done, _ = ray.wait(list(self._running), timeout=POLL_SECONDS)
            self.relay.flush()
            for ref in done:
                label, then = self._running.pop(ref)
                try:
                    result = result_of(ref)
                except Exception as error:
                    self.failed[label] = reason_of(error)
                    result = None
                then(result)

    def all(
        self, function: Callable[..., T], calls: Mapping[str, Sequence[Any]], look_up: Callable[..., T | None] | None = None
    ) -> dict[str, T]:
        """One task per label; the results of those that did not fail, in the order of `calls`."""
        results: dict[str, T] = {}
        for label, arguments in calls.items():
            self.start(label, function, *arguments, then=partial(results.__setitem__, label), look_up=look_up)
        self.settle()
        return {label: results[label] for label in calls if label not in self.failed}


@contextmanager
def job_tasks(resources: ResourcesConfig, emit: Emit) -> Iterator[TaskRunner]:
    """The tasks of a job, on a `cluster()`. Raises UserError when the cluster can never give a task the requested resources."""
    with cluster():
        check_resources(resources, *cluster_resources())
        runner = TaskRunner(resources, emit)
        yield runner
        runner.relay.flush()
