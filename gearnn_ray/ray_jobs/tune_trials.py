"""Trials under Ray Tune, which report a score after each step, so that ASHA can stop them early. Results go to the store."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

# before Tune is imported: no result files or tables of its own, and Ctrl-C is left to the job
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
from ray import tune
from ray.tune import ResultGrid
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from gearnn_ray.adaptors.adaptor import ComplementChangedError
from gearnn_ray.core.errors import TrainingFailedError, UserError
from gearnn_ray.core.events import Emit
from gearnn_ray.ray_jobs.board import EventRelay, event_sender, reason_of
from gearnn_ray.ray_jobs.run_tasks import TaskRunner
from gearnn_ray.training.precision import prepare_process

__all__ = ["ResultGrid", "run_trials"]


class _Relaying(tune.Callback):
    """Relays the workers' events while Tune has control of the driver."""

    def __init__(self, relay: EventRelay) -> None:
        self._relay = relay

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        del iteration, trials, info
        self._relay.flush()

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune pickles callbacks to restore a run later, which nothing here does, and a terminal cannot be pickled
        return tune.Callback, ()


def run_trials(
    tasks: TaskRunner,
    trials: Mapping[str, Mapping[str, Any]],
    steps: Sequence[str],
    score: Callable[[str, str, Emit], float],
    stop_early: bool,
) -> ResultGrid:
    """Run `score(trial, step, emit)` for every step of every trial, in a worker each with the job's resources. A trial ends at
    its first step that fails; `tasks.failed` has the reason. trials: by label, with what the result's `config["trial"]` says of
    each. stop_early: ASHA ends a trial with a mean score in the worse half. The grid's metrics are `mean`, `steps` and, by step,
    `scores`; `failed` is the reason of a trial that ended.
    """
    board, threads, resources = tasks.relay.board, tasks.threads, tasks.resources

    def run(setting: Mapping[str, Mapping[str, Any]]) -> None:
        prepare_process(threads)
        trial, scores = setting["trial"]["label"], dict[str, float]()
        for number, step in enumerate(steps, 1):
            # events arrive before the report, at which Tune may end this process
            with event_sender(board) as emit:
                try:
                    scores[step] = score(trial, step, emit)
                except (TrainingFailedError, UserError, ComplementChangedError) as error:
                    # for Tune the trial succeeds: it would repeat a failed one, and this failure would come again
                    ray.get(board.give_up.remote(trial, f"{step}: {error}"))
                    tune.report({"mean": 0.0, "steps": number, "scores": scores, "failed": f"{step}: {error}"})
                    return
            tune.report({"mean": fmean(scores.values()), "steps": number, "scores": dict(scores)})

    scheduler = (
        ASHAScheduler(time_attr="steps", max_t=len(steps), grace_period=1, reduction_factor=2) if stop_early else FIFOScheduler()  # type: ignore[no-untyped-call]
    )
    with tempfile.TemporaryDirectory(prefix="gearnn_ray-") as scratch:
        results = tune.Tuner(
            tune.with_resources(run, {"cpu": resources.cpus, "gpu": resources.gpus}),
            param_space={"trial": tune.grid_search([{"label": label, **about} for label, about in trials.items()])},
            tune_config=tune.TuneConfig(metric="mean", mode="max", scheduler=scheduler),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=resources.retries),
                # the grid's data frame is read from the first one's files, before they go
                callbacks=[JsonLoggerCallback(), _Relaying(tasks.relay)],  # type: ignore[no-untyped-call]
            ),
        ).fit()
    tasks.relay.flush()
    for result in (results[index] for index in range(len(results))):
        trial = (result.config or {})["trial"]["label"]
        # `fit` does not raise when trials fail
        reason = reason_of(result.error) if result.error else ray.get(board.given_up.remote(trial))
        if reason is not None:
            tasks.failed[trial] = reason
    return results
