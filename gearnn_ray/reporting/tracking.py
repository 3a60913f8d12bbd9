"""Experiment trackers beside a job's progress: TensorBoard, MLflow and Weights & Biases, each imported only when it is asked for.

    --track tensorboard                 a folder runs/<job>-<release>-<time>
    --track tensorboard:/data/runs      the same in another folder
    --track mlflow                      where MLFLOW_TRACKING_URI says, in the experiment gearnn_ray
    --track mlflow:http://host:5000
    --track wandb:my-project            WANDB_API_KEY, WANDB_MODE and the other variables of wandb apply

A tracker gets the loss of every level and stage by its step, each stage's score and seconds when it ends, and at the end the
scores and the release. One that stops answering costs a notice, never the job.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Event
from gearnn_ray.reporting.progress import Plan, Reporter

_PROJECT = "gearnn_ray"


class Tracker(Protocol):
    """One run of one tracker. Its methods may raise whatever the tracker's library raises."""

    def scalar(self, name: str, value: float, step: int, seconds: float) -> None:
        """A point of the curve `name`, at `step`. seconds: when, since 1970."""

    def describe(self, facts: Mapping[str, str]) -> None:
        """Texts about the run, by name."""

    def close(self, succeeded: bool) -> None:
        """The last call."""


class Tracked:
    """A reporter whose events also go to trackers."""

    def __init__(self, reporter: Reporter, trackers: Mapping[str, Tracker]) -> None:
        """trackers: by the name that their notices have."""
        self._reporter, self._trackers = reporter, dict(trackers)
        self._succeeded = False

    def __enter__(self) -> Self:
        self._reporter.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        succeeded = self._succeeded and error is None
        try:
            self._each(lambda tracker: tracker.close(succeeded))
        finally:
            self._reporter.__exit__(kind, error, trace)

    def expect(self, plan: Plan) -> None:
        self._reporter.expect(plan)

    def __call__(self, event: Event) -> None:
        self._reporter(event)
        for name, (value, step) in points(event).items():
            self._each(lambda tracker, name=name, value=value, step=step: tracker.scalar(name, value, step, event.time))  # type: ignore[misc]

    def conclude(self, scores: Mapping[str, float | None], facts: Mapping[str, str | None], succeeded: bool) -> None:
        """Hand over the job's results. scores: in percent, by curve; facts: such as the release. What is None is left out."""
        self._succeeded, now = succeeded, time.time()
        for name, score in scores.items():
            if score is not None:
                self._each(lambda tracker, name=name, score=score: tracker.scalar(f"scores/{_safe(name)}", score, 0, now))  # type: ignore[misc]
        self._each(lambda tracker: tracker.describe({_safe(name): text for name, text in facts.items() if text is not None}))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        """`call` with every tracker; one that fails is given up."""
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # whatever a library or its server raises: the job is worth more than its curves
                del self._trackers[name]
                _given_up(tracker)
                note = f"{name} failed and gets nothing more from this job, which continues ({_one_line(error)})"
                self._reporter(Event("notice", "tracking", "all", note=note))


def points(event: Event) -> dict[str, tuple[float, int]]:
    """What a tracker gets of an event: value and step by the curve's name, such as jpeg-10/full/loss."""
    found: dict[str, tuple[float, int]] = {}
    if event.kind == "progress" and event.loss is not None:
        found["loss"] = (event.loss, event.step)
    if event.kind in ("finished", "reused") and event.score is not None:
        found[event.metric or "score"] = (event.score, 0)
    if event.kind == "finished" and event.seconds:
        found["seconds"] = (event.seconds, 0)
    return {_safe(f"{event.level}/{event.stage}/{name}"): point for name, point in found.items()}


def tracked(reporter: Reporter, wanted: Sequence[str], run: str, options: Mapping[str, Any]) -> Tracked:
    """The reporter with the trackers of `--track`. run: the run's name there; options: the job's, as plain nested values. Raises
    UserError for a tracker that is unknown, not installed, or does not answer.
    """
    opened: dict[str, Tracker] = {}
    with ExitStack() as unless_all_open:
        for text in wanted:
            opened[text] = _opened(text, run, options)
            unless_all_open.callback(_given_up, opened[text])
        unless_all_open.pop_all()
    return Tracked(reporter, opened)


def _given_up(tracker: Tracker) -> None:
    with suppress(Exception):  # its own or another one's error is what is told
        tracker.close(False)


def _opened(text: str, run: str, options: Mapping[str, Any]) -> Tracker:
    """One tracker of `--track`. Raises UserError as `tracked` does."""
    kind, _, where = text.partition(":")
    if kind not in _KINDS:
        raise UserError(f"--track is {text!r}: expected {', '.join(_KINDS)}, or one of them with a place, such as mlflow:URI")
    try:
        return _KINDS[kind](where, f"{run}-{time.strftime('%Y%m%d-%H%M%S')}", dict(flat(options)))
    except ModuleNotFoundError as error:
        raise UserError(
            f"--track {kind} needs the package {error.name}, which is not installed: install the extra {kind}"
        ) from error
    except Exception as error:
        raise UserError(f"--track {text}: the tracker cannot be opened ({_one_line(error)})") from error


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested options by their names on the command line, such as recipe.epochs."""
    found: dict[str, str] = {}
    for name, value in options.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return found


class _TensorBoard:
    """Event files, which `tensorboard --logdir` shows."""

    def __init__(self, where: str, run: str, options: Mapping[str, str]) -> None:
        from tensorboardX import SummaryWriter

        folder = Path(where or "runs").expanduser() / run
        folder.mkdir(parents=True, exist_ok=True)  # here, because the writer's own thread would fail unseen
        self._writer = SummaryWriter(str(folder))
        self.describe({"options": "\n".join(f"    {name}: {value}" for name, value in options.items())})

    def scalar(self, name: str, value: float, step: int, seconds: float) -> None:
        self._writer.add_scalar(name, value, step, walltime=seconds)

    def describe(self, facts: Mapping[str, str]) -> None:
        for name, text in facts.items():
            self._writer.add_text(name, text)

    def close(self, succeeded: bool) -> None:
        self.describe({"state": "succeeded" if succeeded else "failed"})
        self._writer.close()


class _MLflow:
    """A run of the experiment gearnn_ray."""

    def __init__(self, where: str, run: str, options: Mapping[str, str]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        # by default a server that has gone is asked for minutes, in which the job would take no events
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

        self._client = MlflowClient(tracking_uri=where or None)
        experiment = self._client.get_experiment_by_name(_PROJECT)
        number = self._client.create_experiment(_PROJECT) if experiment is None else experiment.experiment_id
        self._run: str = self._client.create_run(number, run_name=run).info.run_id
        self._client.log_batch(self._run, params=[Param(name, value[:6000]) for name, value in options.items()])

    def scalar(self, name: str, value: float, step: int, seconds: float) -> None:
        self._client.log_metric(self._run, name, value, timestamp=round(1000 * seconds), step=step)

    def describe(self, facts: Mapping[str, str]) -> None:
        for name, text in facts.items():
            self._client.set_tag(self._run, name, text)

    def close(self, succeeded: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if succeeded else "FAILED")


class _WeightsAndBiases:
    """A run of the project gearnn_ray, or of the one given."""

    def __init__(self, where: str, run: str, options: Mapping[str, str]) -> None:
        import wandb

        # it would put itself between the job and its terminal
        settings = wandb.Settings(console="off")
        self._run = wandb.init(project=where or _PROJECT, name=run, config=dict(options), settings=settings)
        self._curves: set[str] = set()

    def scalar(self, name: str, value: float, step: int, seconds: float) -> None:
        # its own steps are those of the whole run and may not go back, as those of levels side by side do
        axis = f"{name}.step"
        if name not in self._curves:
            self._run.define_metric(name, step_metric=axis)
            self._curves.add(name)
        self._run.log({name: value, axis: step})

    def describe(self, facts: Mapping[str, str]) -> None:
        self._run.summary.update(dict(facts))

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


_KINDS: dict[str, Callable[[str, str, Mapping[str, str]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _WeightsAndBiases,
}


def _safe(name: str) -> str:
    """A curve's name in the characters that every tracker takes."""
    return re.sub(r"[^\w./ -]+", "_", name).strip(" ")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__
