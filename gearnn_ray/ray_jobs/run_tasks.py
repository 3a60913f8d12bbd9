"""How jobs run functions on Ray, in workers as `function(*arguments, emit)`. The runner notes a failure under the task's label,
and everything that does not need its result continues.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import ray

from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.core.events import Emit
from gearnn_ray.ray_jobs.attempts import Attempts, Task
from gearnn_ray.ray_jobs.board import EventRelay, event_sender, reason_of
from gearnn_ray.ray_jobs.cluster import cluster, cluster_resources
from gearnn_ray.ray_jobs.resources import check_resources, groups_that_fit
from gearnn_ray.ray_jobs.worker_group import run_on_workers, spreads_over_workers
from gearnn_ray.training.precision import prepare_process

T = TypeVar("T")


@ray.remote(max_retries=0)  # type: ignore[arg-type]  # Ray's types know no keyword arguments
def _run(function: Callable[..., Any], *arguments: Any, threads: int, board: Any, attempt: str) -> Any:
    prepare_process(threads)
    with event_sender(board, attempt) as emit:
        return function(*arguments, emit)


@ray.remote(max_retries=0)  # type: ignore[arg-type]
def _check(function: Callable[..., Any], *arguments: Any, board: Any, attempt: str) -> Any:
    prepare_process(1)
    with event_sender(board, attempt) if board is not None else nullcontext():
        return function(*arguments)


def shown_name(label: str, function: Callable[..., Any]) -> str:
    """What Ray's dashboard and `ray list tasks` call a task, such as "jpeg-10: run level"."""
    while isinstance(function, partial):
        function = function.func
    return f"{label}: {function.__name__.strip('_').replace('_', ' ')}"


class TaskRunner:
    """The tasks of one job. `failed`: label of a task that failed, and the reason in one line."""

    def __init__(self, resources: ResourcesConfig, emit: Emit, check_lease: Callable[[], None] = lambda: None) -> None:
        """check_lease: raises while the tasks run if another driver has taken the job over."""
        self.resources, self.relay, self._check_lease = resources, EventRelay(emit), check_lease
        self.threads = max(1, int(resources.cpus))
        self.failed: dict[str, str] = {}
        self._attempts = Attempts(self.relay, resources.retries)
        self._waiting: list[Task] = []

    def share(self, value: Any) -> Any:
        """A value in Ray's object store, to be given to many tasks as an argument."""
        return ray.put(value)

    def check(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)` in a worker, on one CPU; raises what it raises."""
        (result,) = self.check_all(function, [arguments])
        return result

    def check_all(self, function: Callable[..., T], calls: Sequence[Sequence[Any]]) -> Iterator[T]:
        """The same for many arguments; results in their order. The first that fails is raised."""
        attempts, results, task = Attempts(self.relay, self.resources.retries), dict[int, Any](), cast(Any, _check)
        # a job that is refused by its first checks starts no process for events
        board = self.relay.board if len(calls) > 1 else None
        for index, arguments in enumerate(calls):
            label = f"task {index + 1} of {len(calls)}"
            named = task.options(name=shown_name(label if len(calls) > 1 else "job", function))
            submit, then = partial(named.remote, function, *arguments, board=board), partial(results.__setitem__, index)
            attempts.start(Task(label, submit, then))
        try:
            for index in range(len(calls)):
                while index not in results:
                    self._check_lease()
                    for ended, outcome in attempts.poll():
                        ended.then(outcome)
                if isinstance(results[index], Exception):
                    raise results[index]
                yield results[index]
        except Exception:
            attempts.cancel()
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
        """Submit one task with the job's resources, and again where its worker is lost or hangs; `then` gets its result in the
        driver, None if it failed. look_up: called like the function; returns the stored result or None. With it, a job of several
        workers per level spreads the task over them.
        """
        resources, board = self.resources, self.relay.board
        if look_up is not None and spreads_over_workers(resources):
            group = partial(run_on_workers, function, look_up, arguments, label, self.threads, resources, board)
            self._waiting.append(Task(label, group, then))
            return
        cpus = max(resources.cpus, threads or 0)
        if threads is not None:
            # where the job goes on may be smaller than where it began: more threads than CPUs are slow, not wrong
            cpus = min(cpus, max(float(node.get("CPU", 0)) for node in cluster_resources()[0]))
        # all of them wait in Ray's own queue, where an autoscaler sees them
        task: Any = _run.options(num_cpus=cpus, num_gpus=resources.gpus, name=shown_name(label, function))
        submit = partial(task.remote, function, *arguments, threads=threads or self.threads, board=board)
        self._attempts.start(Task(label, submit, then))

    def settle(self) -> None:
        """Until nothing is running; `then` may start more."""
        while self._attempts or self._waiting:
            self._check_lease()
            while self._waiting and len(self._attempts) < groups_that_fit(self.resources, *cluster_resources()):
                self._attempts.start(self._waiting.pop(0))
            for task, outcome in self._attempts.poll():
                if isinstance(outcome, Exception):
                    self.failed[task.label] = reason_of(outcome)
                    outcome = None
                task.then(outcome)

    def cancel(self) -> None:
        """Give up all tasks, without waiting for them."""
        self._waiting.clear()
        self._attempts.cancel()

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
def job_tasks(resources: ResourcesConfig, emit: Emit, check_lease: Callable[[], None] = lambda: None) -> Iterator[TaskRunner]:
    """The tasks of a job, on a `cluster()`; given up where the job ends early. check_lease: as for `TaskRunner`. Raises UserError
    when the cluster can never give a task the requested resources.
    """
    with cluster():
        check_resources(resources, *cluster_resources())
        runner = TaskRunner(resources, emit, check_lease)
        try:
            yield runner
        except BaseException:
            runner.cancel()
            raise
        runner.relay.flush()
