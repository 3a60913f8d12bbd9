"""A sweep over the budget M with Ray Tune, one trial per budget and value function.

    release ─► originals and full fine-tunes, once ─► trials: selection, partial fine-tunes, level by level ─► recommended release

A trial goes through the stages of Algorithm 1, level after level, and reports each, so that ASHA can stop it; where the release
chooses its levels together, a trial first does so under its own budget. Everything is kept under the stages' own keys: that is
how a sweep goes on after a crash, and why its trials find the full fine-tunes there. Tune only decides what runs when; what it
writes is thrown away.
"""

import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, cast

# before Tune is imported: no files of results beside ours, no table of its own on our output, and Ctrl-C is the job's
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from gearnn_ray.adaptors.adaptor import ComplementChangedError
from gearnn_ray.config.command_line import from_mapping
from gearnn_ray.config.recipe import Criterion
from gearnn_ray.config.schema import ResourcesConfig, SplitConfig, SweepConfig, budget_floats
from gearnn_ray.core.errors import TrainingFailedError, UserError
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.levels.level import parse_level
from gearnn_ray.offline import level_run
from gearnn_ray.offline.job_spec import ImageStatistics, JobSpec
from gearnn_ray.offline.level_run import LevelResult
from gearnn_ray.offline.release import manifest_of
from gearnn_ray.offline.release_context import ReleaseContext, make_images, open_release_context
from gearnn_ray.ray_jobs.cluster import (
    EventBoard,
    EventRelay,
    beside_driver,
    cluster,
    cluster_resources,
    discard,
    event_sender,
    reason_of,
)
from gearnn_ray.ray_jobs.resources import check_resources
from gearnn_ray.reporting.progress import Reporter
from gearnn_ray.store import tables
from gearnn_ray.store.releases import Blob, Store
from gearnn_ray.sweep.figure import sweep_figure
from gearnn_ray.sweep.findings import Point, recommended, rows_of, sentence
from gearnn_ray.tasks.segmentation import METRIC
from gearnn_ray.training.trainer import prepare_process

BUDGETS = ("0.05%", "0.1%", "0.2%", "0.4%", "0.6%", "0.8%", "1%")
QUICK_BUDGETS = ("0.05%", "0.2%", "1%")
"""on the generated scenes"""
_QUICK_LEVELS = 2
TAG = "recommended"


@dataclass(frozen=True)
class Outcome:
    """What a sweep found. Paths are in the store; `failed`: what to reason; `release`: digest of the recommended manifest."""

    points: tuple[Point, ...]
    sentence: str
    release: str | None
    table: str | None
    figure: str | None
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Trial:
    """What one trial does, and how it is called."""

    budget: str
    spec: JobSpec
    label: str


def sweep(config: SweepConfig, emit: Reporter) -> Outcome:
    """Run the job. Raises UserError before anything is trained or written when what it was told is wrong."""
    store = Store(config.store)
    store.manifest(config.release)  # there is one, or nothing is started
    store.check_writable()
    with cluster():
        check_resources(ResourcesConfig(**config.resources.model_dump()), *cluster_resources())
        board = cast(Any, EventBoard).options(scheduling_strategy=beside_driver()).remote()
        relay = EventRelay(board, emit)
        release = open_release_context(store, config.release, config.data, relay)
        levels, trials = _checked(config, release)
        images = make_images(release.spec, (*levels, *release.levels), relay)
        run = _Run(config, board, relay, emit)
        left = [trial for trial in trials if not _point(trial, levels).complete]
        if left:
            run.sense(left, levels)
            # ASHA compares with those that are there already
            run.try_all(trials if config.asha else left, levels)
        points = [_point(trial, levels) for trial in trials]
        chosen = recommended(points, config.within)
        digest = None
        if chosen is not None:
            spec = next(
                t.spec for t in trials if (t.budget, t.spec.criterion.importance) == (chosen.budget, chosen.value)
            )
            digest = run.publish(store, release, chosen, spec, images)
        relay.flush()
    table, figure = _show(store, config, release, points)
    return Outcome(tuple(points), sentence(points, config.within), digest, table, figure, run.failed)


def _checked(config: SweepConfig, release: ReleaseContext) -> tuple[tuple[str, ...], list[_Trial]]:
    """Levels and trials. Raises UserError."""
    generated = release.config.data.kind == "scenes"
    distorted = tuple(name for name in release.levels if not parse_level(name).is_clean)
    levels, is_joint = config.levels or distorted, release.spec.coupling.is_joint
    if not levels:
        raise UserError(f"{config.release} has no distorted level to sweep: name some with --levels")
    apart = next((name for name in distorted if name not in levels), None)
    if is_joint and apart is not None:
        raise UserError(
            f"levels lacks {apart}, which {config.release} chooses together with the others "
            f"({release.spec.coupling.problem}): name all of its levels, or none"
        )
    _config(release, levels)
    scores = {name: entry["scores"].get("original", 100.0) for name, entry in release.manifest["levels"].items()}
    if not config.levels:
        # the worst first: that is where budgets differ, and where ASHA looks first
        quick = _QUICK_LEVELS if generated and not is_joint else None
        levels = tuple(sorted(levels, key=lambda name: scores[name]))[:quick]
    budgets = config.budgets or (QUICK_BUDGETS if generated else BUDGETS)
    criterion = release.spec.criterion
    values = config.values or (criterion.importance,)
    trials = list[_Trial]()
    for value in values:
        for budget in budgets:
            floats = budget_floats(budget, release.facts.floats)
            if floats < release.facts.least(criterion):
                raise UserError(
                    f"the budget {budget} is {floats} floats and fits no layer: the smallest of {release.spec.network.name} "
                    f"has {release.facts.smallest_layer}, so give at least that"
                )
            own = criterion.model_copy(update={"importance": value})
            spec = replace(release.spec, budget=floats, criterion=own)
            trials.append(_Trial(budget, spec, f"M = {budget}" + (f" {value}" if len(values) > 1 else "")))
    same = next(((a, b) for a, b in itertools.combinations(trials, 2) if a.spec == b.spec), None)
    if same:
        raise UserError(f"{same[0].label} and {same[1].label} are the same number of floats: give each budget once")
    return levels, trials


def _config(release: ReleaseContext, levels: Sequence[str], **changes: Any) -> SplitConfig:
    """What the release was told, with other levels. Raises UserError where they do not go together."""
    told = release.config.model_dump() | {"levels": tuple(levels)} | changes
    often = told["selection"]["frequencies"]
    told["selection"] |= {"frequencies": {level: f for level, f in often.items() if level in levels}}
    return from_mapping(SplitConfig, told, f"the configuration in {release.ref}")


def _point(trial: _Trial, levels: Sequence[str]) -> Point:
    """What the store knows of a trial."""
    spec, selections = trial.spec, _selections(trial.spec, levels, only_look=True)
    known = [level_run.known(level_run.run_level, spec, level, discard, each) for level, each in selections.items()]
    results = tuple(result for result in known if result is not None)
    return Point(trial.budget, spec.budget, spec.criterion.importance, results, len(results) == len(levels))


def _selections(spec: JobSpec, levels: Sequence[str], only_look: bool = False) -> dict[str, dict[str, Any] | None]:
    """What each level is adapted by: None where it chooses for itself; together, those that are not sensed are left out."""
    if not spec.coupling.is_joint:
        return dict.fromkeys(levels)
    sensed = {level: level_run.known(level_run.sense_own, spec, level, discard) for level in levels}
    measured = {level: each[0] for level, each in sensed.items() if each}
    try:
        found = level_run.select_jointly(spec, measured, discard, only_look)
    except level_run.NotYetError:
        return {}
    return {level: found[level] for level in levels if level in found}


@ray.remote
def _fine_tune_fully(spec: JobSpec, level: str, threads: int, board: Any) -> None:
    prepare_process(threads)
    with event_sender(board) as emit:
        level_run.fine_tune_fully(spec, level, emit)


@ray.remote
def _sense(spec: JobSpec, level: str, criteria: Sequence[Criterion], threads: int, board: Any) -> None:
    """What all budgets of a level share: the original judged, the full fine-tune, what it says of the layers."""
    prepare_process(threads)
    with event_sender(board) as emit:
        level_run.sense_level(spec, level, criteria, emit)


@ray.remote
def _run_level(spec: JobSpec, level: str, label: str, threads: int, board: Any) -> LevelResult:
    prepare_process(threads)
    with event_sender(board) as emit:
        return level_run.run_level(spec, level, _only_partial(emit, label, level))


def _only_partial(emit: Emit, label: str, level: str) -> Emit:
    """What is a trial's own: its partial fine-tunes. The rest was said before."""

    def tell(event: Event) -> None:
        if event.stage == "partial":
            emit(replace(event, level=label, stage=level))

    return tell


class _Relaying(tune.Callback):
    """Hands on what trials say, while Tune has the driver."""

    def __init__(self, relay: EventRelay) -> None:
        self._relay = relay

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        del iteration, trials, info
        self._relay.flush()

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune writes down what it was told, to restore it one day: not from there, and a terminal cannot be pickled
        return tune.Callback, ()


class _Run:
    """The tasks and trials of one sweep."""

    def __init__(self, config: SweepConfig, board: Any, relay: EventRelay, emit: Reporter) -> None:
        self.config, self.relay, self.emit = config, relay, emit
        self.failed: dict[str, str] = {}
        self._board = board
        self._threads = max(1, int(config.resources.cpus))

    def sense(self, trials: Sequence[_Trial], levels: Sequence[str]) -> None:
        """Full fine-tunes of all levels, once for all trials, each of which fails at a level that fails here."""
        self.emit.expect(
            {(level, stage): part for level in levels for stage, part in (("original", 0.1), ("full", 1.0))}
        )
        criteria = tuple(dict.fromkeys(trial.spec.criterion for trial in trials))
        spec = trials[0].spec
        if spec.criterion.against == "clean":
            # what every level is measured against, and all else that does not wait for it
            self.emit.expect({("clean", "full"): 1.0})
            self._all(_fine_tune_fully, {level: (spec, level) for level in dict.fromkeys(("clean", *levels))})
            if "clean" in self.failed:
                reason = (
                    f"the fine-tune on undistorted images, which changes are measured against: {self.failed['clean']}"
                )
                self.failed |= dict.fromkeys(levels, reason)
        self._all(_sense, {level: (spec, level, criteria) for level in levels if level not in self.failed})

    def _all(self, task: Any, calls: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """Results of one task per call, by its label; those that fail are noted."""
        resources = self.config.resources
        task = task.options(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=resources.retries)
        running = {label: task.remote(*call, self._threads, self._board) for label, call in calls.items()}
        results = dict[str, Any]()
        for label, ref in running.items():
            try:
                results[label] = self.relay.wait(ref)
            except Exception as error:
                self.failed[label] = reason_of(error)
        return results

    def try_all(self, trials: Sequence[_Trial], levels: Sequence[str]) -> None:
        """Every trial under Tune; what each finds is in the store."""
        self.emit.expect({(trial.label, level): 0.65 for trial in trials for level in levels})
        by_label = {trial.label: trial for trial in trials}
        board, threads, resources = self._board, self._threads, self.config.resources
        broken = dict(self.failed)

        def try_one(setting: Mapping[str, Any]) -> None:
            prepare_process(threads)
            label, spec = setting["trial"], by_label[setting["trial"]].spec
            scores = list[float]()
            selections: Mapping[str, dict[str, Any] | None] | None = None
            for level in levels:
                with event_sender(board) as emit:
                    try:
                        if level in broken:
                            raise TrainingFailedError(broken[level])
                        selections = _selections(spec, levels) if selections is None else selections
                        result = level_run.run_level(spec, level, _only_partial(emit, label, level), selections[level])
                    except (TrainingFailedError, UserError, ComplementChangedError) as error:
                        # to Tune the trial ends well: it would try again, and what is wrong with a level does not get better
                        ray.get(board.give_up.remote(label, f"{level}: {error}"))
                        tune.report({"level": level, "score": 0.0, "mean": 0.0, "levels": len(scores) + 1})
                        return
                assert result.adaptor is not None
                scores.append(result.adaptor)
                tune.report({"level": level, "score": result.adaptor, "mean": fmean(scores), "levels": len(scores)})

        scheduler = (
            ASHAScheduler(time_attr="levels", max_t=len(levels), grace_period=1, reduction_factor=2)
            if self.config.asha
            else FIFOScheduler()  # type: ignore[no-untyped-call]
        )
        with tempfile.TemporaryDirectory(prefix="gearnn_ray-") as scratch:
            found = tune.Tuner(
                tune.with_resources(try_one, {"cpu": resources.cpus, "gpu": resources.gpus}),
                param_space={"trial": tune.grid_search(list(by_label))},
                tune_config=tune.TuneConfig(metric="mean", mode="max", scheduler=scheduler),
                run_config=tune.RunConfig(
                    name="sweep",
                    storage_path=scratch,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=resources.retries),
                    callbacks=[_Relaying(self.relay)],
                ),
            ).fit()
        self.relay.flush()
        for result in (found[index] for index in range(len(found))):
            label = cast(Any, result.config)["trial"]
            reason = reason_of(result.error) if result.error else ray.get(board.given_up.remote(label))
            if reason is not None:
                self.failed[label] = reason

    def publish(
        self, store: Store, release: ReleaseContext, point: Point, spec: JobSpec, images: Mapping[str, ImageStatistics]
    ) -> str:
        """The release again under the recommended budget, all its levels, tagged; `latest` stays where it is."""
        label = f"M = {point.budget}, the rest"
        results = {result.level: result for result in point.results}
        for level in release.levels:
            if level not in results and (known := level_run.known_level(spec, level, discard)) is not None:
                results[level] = known
        others = [level for level in release.levels if level not in results]
        self.emit.expect({(label, level): 0.65 for level in others if not parse_level(level).is_clean})
        made = self._all(_run_level, {f"{level} at {point.budget}": (spec, level, label) for level in others})
        results |= {result.level: result for result in made.values()}
        ordered = tuple(results[level] for level in dict.fromkeys((*release.levels, *results)) if level in results)
        selection = release.config.selection.model_copy(update={"importance": spec.criterion.importance}).model_dump()
        config = _config(release, [result.level for result in ordered], budget=point.budget, selection=selection)
        entry = release.manifest["base"]
        base = Blob(entry["digest"], entry["bytes"])
        return store.publish(manifest_of(config, spec, base, release.facts, images, ordered), {}, (TAG,), latest=False)


def _show(
    store: Store, config: SweepConfig, release: ReleaseContext, points: Sequence[Point]
) -> tuple[str | None, str | None]:
    """Table and figure, put into the store; their paths there."""
    rows = rows_of(points, METRIC, release.facts.floats, config.within)
    if not rows:
        return None, None
    table, figure = f"tables/{release.name}/sweep.parquet", f"figures/{release.name}/sweep.png"
    store.put_table(table, tables.table(tables.SWEEP, rows))
    store.put_figure(
        figure, sweep_figure(points, config.within, 4 * release.facts.floats, f"{release.name}: accuracy over memory")
    )
    return table, figure
