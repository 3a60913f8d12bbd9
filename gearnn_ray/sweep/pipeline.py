"""A sweep over the budget M, one trial per budget and importance function.

    release ─► originals and full fine-tunes, once ─► trials: selection, partial fine-tunes, level by level ─► recommended release

A trial goes through the stages of Algorithm 1 level by level and reports each score, so that ASHA can stop it. If the release
selects its levels jointly, a trial first does so under its own budget. All results are kept under the stages' own keys: a sweep
that is started again after a crash continues, and its trials find the full fine-tunes.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gearnn_ray.config.budget import budget_floats
from gearnn_ray.config.command_line import from_mapping
from gearnn_ray.config.recipe import Criterion
from gearnn_ray.config.release_jobs import SweepConfig
from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.core.errors import TrainingFailedError, UserError
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.data.cache import ImageStatistics
from gearnn_ray.levels.level import parse_level
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.level_run import LevelResult, cached, fine_tune_fully, measure_level, run_level, select_jointly
from gearnn_ray.offline.pipeline import prepare_images
from gearnn_ray.offline.release import manifest_of
from gearnn_ray.offline.release_context import ReleaseContext, open_release_context
from gearnn_ray.offline.selection import LayerSelection
from gearnn_ray.ray_jobs.run_tasks import TaskRunner, job_tasks
from gearnn_ray.ray_jobs.tune_trials import run_trials
from gearnn_ray.reporting.progress import Reporter, reporter
from gearnn_ray.store import tables
from gearnn_ray.store.leases import HeldLease, lease_key, run_leased
from gearnn_ray.store.patience import patient
from gearnn_ray.store.releases import Store
from gearnn_ray.sweep.figure import sweep_figure
from gearnn_ray.sweep.findings import Point, recommended, rows_of, sentence

if TYPE_CHECKING:
    from gearnn_ray.ray_jobs.tune_trials import ResultGrid

BUDGETS = ("0.05%", "0.1%", "0.2%", "0.4%", "0.6%", "0.8%", "1%")
QUICK_BUDGETS = ("0.05%", "0.2%", "1%")
"""The default budgets on the generated scenes."""
_QUICK_LEVELS = 2
TAG = "recommended"


@dataclass(frozen=True)
class Outcome:
    """What a sweep found. Paths are in the store. release: digest of the recommended manifest. failed: label to reason."""

    points: tuple[Point, ...]
    sentence: str
    release: str | None
    table: str | None
    figure: str | None
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Trial:
    """One budget under one importance function, and its label."""

    budget: str
    spec: JobSpec
    label: str


def sweep(config: SweepConfig, emit: Reporter) -> Outcome:
    """Run the job. Raises UserError before anything is trained or written when the configuration is invalid."""
    return _leased(config, emit, every_trial=False)[0]


def _leased(config: SweepConfig, emit: Reporter, every_trial: bool) -> tuple[Outcome, "ResultGrid | None"]:
    """`_sweep` while this driver holds the job's lease."""
    store = Store(patient(config.store))
    store.check_writable()
    key = lease_key("sweep", config.model_dump(mode="json", exclude={"store"}))
    return run_leased(store.uri, key, emit, lambda lease: _sweep(config, store, lease, emit, every_trial))


def sweep_budgets(release: str, store: str = "artifacts", *, json_lines: bool = False, **options: Any) -> "ResultGrid":
    """The sweep job from Python: its trials as Ray Tune's own `ResultGrid`, those whose results the store had already among them.

        grid = gearnn_ray.sweep_budgets("drn22-camvid", budgets=["0.1%", "0.2%"])
        grid.get_best_result().config["trial"]["budget"]

    release: as name, name:tag or name@sha256:…; options: those of jobs/sweep.py, sections as mappings (`data={"path": …}`). Of a
    trial `config["trial"]` has label, budget, floats and importance, and `metrics` has mean (in percent, over levels), scores by
    level, and failed where it did. Everything else is in the store, so the results' folders do not exist. Prints the progress,
    and raises UserError where the job exits 2.
    """
    config = from_mapping(SweepConfig, {"release": release, "store": store, **options}, "the call")
    with reporter({}, json_lines) as emit:
        _, grid = _leased(config, emit, every_trial=True)
    assert grid is not None
    return grid


def _sweep(
    config: SweepConfig, store: Store, lease: HeldLease, emit: Reporter, every_trial: bool = False
) -> tuple[Outcome, "ResultGrid | None"]:
    """every_trial: run those too whose results are in the store."""
    grid = None
    with job_tasks(ResourcesConfig(**config.resources.model_dump()), emit, lease.check) as tasks:
        release = open_release_context(store, config, tasks)
        spec, (levels, trials) = release.spec, _checked(config, release)
        shown = tuple(dict.fromkeys((*levels, *release.levels, "clean")))
        images = prepare_images(spec.data, spec.network.task, shown, spec.cache, tasks, emit)
        left = [trial for trial in trials if not _point(trial, levels).complete]
        if left:
            _measure_levels(left, levels, tasks, emit)
        if left or every_trial:
            # ASHA compares with those that are complete already
            grid = _run_trials(config, trials if config.asha or every_trial else left, levels, tasks, emit)
        points = [_point(trial, levels) for trial in trials]
        chosen, digest = recommended(points, config.within), None
        if chosen is not None:
            spec = trials[points.index(chosen)].spec
            lease.confirm()
            digest = _publish(store, release, chosen, spec, images, tasks, emit)
    table, figure = _show(store, config, release, points)
    metric = release.spec.task.metrics[0]
    return Outcome(tuple(points), sentence(points, config.within, metric), digest, table, figure, dict(tasks.failed)), grid


def _checked(config: SweepConfig, release: ReleaseContext) -> tuple[tuple[str, ...], list[_Trial]]:
    """Levels and trials. Raises UserError."""
    generated = release.config.data.kind == "scenes"
    distorted = tuple(name for name in release.levels if not parse_level(name).is_clean)
    levels, is_joint = config.levels or distorted, release.spec.coupling.is_joint
    if not levels:
        raise UserError(f"{config.release} has no distorted level to sweep: name some with --levels")
    missing = next((name for name in distorted if name not in levels), None)
    if is_joint and missing is not None:
        raise UserError(
            f"levels lacks {missing}, which {config.release} selects jointly with the others "
            f"({release.spec.coupling.problem}): name all of its levels, or none"
        )
    _config(release, levels)
    if not config.levels:
        # the worst first: there budgets differ most, and ASHA evaluates these levels first
        scores = {name: entry.scores.original for name, entry in release.manifest.levels.items()}
        quick = _QUICK_LEVELS if generated and not is_joint else None
        levels = tuple(sorted(levels, key=lambda name: 100.0 if (s := scores[name]) is None else s))[:quick]
    budgets = config.budgets or (QUICK_BUDGETS if generated else BUDGETS)
    criterion, facts = release.spec.criterion, release.facts
    functions = config.importance or (criterion.importance,)
    trials = list[_Trial]()
    for importance, budget in itertools.product(functions, budgets):
        floats = budget_floats(budget, facts.floats)
        if floats < facts.least_budget(criterion):
            raise UserError(
                f"the budget {budget} is {floats} floats and fits no layer: the smallest of {release.spec.network.name} "
                f"has {facts.smallest_layer}, so give at least that"
            )
        own = criterion.model_copy(update={"importance": importance})
        label = f"M = {budget}" + (f" {importance}" if len(functions) > 1 else "")
        trials.append(_Trial(budget, replace(release.spec, budget=floats, criterion=own), label))
    same = next(((a, b) for a, b in itertools.combinations(trials, 2) if a.spec == b.spec), None)
    if same:
        raise UserError(f"{same[0].label} and {same[1].label} are the same number of floats: give each budget once")
    return levels, trials


def _config(release: ReleaseContext, levels: Sequence[str], **changes: Any) -> SplitConfig:
    """The release's configuration with other levels. Raises UserError if they do not fit together."""
    given = release.config.model_dump() | {"levels": tuple(levels)} | changes
    frequencies = given["selection"]["frequencies"]
    given["selection"] |= {"frequencies": {level: f for level, f in frequencies.items() if level in levels}}
    return from_mapping(SplitConfig, given, f"the configuration in {release.ref}")


def _point(trial: _Trial, levels: Sequence[str]) -> Point:
    """The results of a trial that are in the store."""
    spec, selections = trial.spec, _selections(trial.spec, levels, only_cached=True)
    known = [cached(partial(run_level, selection=each), spec, level) for level, each in selections.items()]
    results = tuple(result for result in known if result is not None)
    return Point(trial.budget, spec.budget, spec.criterion.importance, results, len(results) == len(levels))


def _selections(spec: JobSpec, levels: Sequence[str], only_cached: bool = False) -> dict[str, LayerSelection | None]:
    """Each level's part of the joint selection, without levels that are not measured; None where a level selects alone."""
    if not spec.coupling.is_joint:
        return dict.fromkeys(levels)
    measured = {level: each[0] for level in levels if (each := cached(measure_level, spec, level))}
    step = partial(cached, select_jointly) if only_cached else partial(select_jointly, emit=lambda _: None)
    found = step(spec, measured) if measured else None
    return {level: found[level] for level in levels if level in found} if found else {}


def _measure(spec: JobSpec, level: str, criteria: Sequence[Criterion], emit: Emit) -> None:
    measure_level(spec, level, emit, criteria)


def _measure_levels(trials: Sequence[_Trial], levels: Sequence[str], tasks: TaskRunner, emit: Reporter) -> None:
    """What all trials share: originals, full fine-tunes and measured changes. Each trial fails at a level that fails here."""
    emit.expect({(level, stage): part for level in levels for stage, part in (("original", 0.1), ("full", 1.0))})
    criteria = tuple(dict.fromkeys(trial.spec.criterion for trial in trials))
    spec = trials[0].spec
    if spec.criterion.against == "clean":
        # what every level is measured against, and at the same time all full fine-tunes, which do not wait for it
        emit.expect({("clean", "full"): 1.0})
        tasks.all(fine_tune_fully, {level: (spec, level) for level in dict.fromkeys(("clean", *levels))})
        if "clean" in tasks.failed:
            reason = f"the fine-tune on undistorted images, which changes are measured against: {tasks.failed['clean']}"
            tasks.failed |= dict.fromkeys(levels, reason)
    tasks.all(_measure, {level: (spec, level, criteria) for level in levels if level not in tasks.failed})


def _run_trials(
    config: SweepConfig, trials: Sequence[_Trial], levels: Sequence[str], tasks: TaskRunner, emit: Reporter
) -> "ResultGrid":
    """Every trial under Tune; its results are in the store."""
    emit.expect({(trial.label, level): 0.65 for trial in trials for level in levels})
    step = partial(_score, {trial.label: trial.spec for trial in trials}, tuple(levels), dict(tasks.failed))
    about = {
        trial.label: {"budget": trial.budget, "floats": trial.spec.budget, "importance": trial.spec.criterion.importance}
        for trial in trials
    }
    return run_trials(tasks, about, levels, step, config.asha)


def _score(
    specs: Mapping[str, JobSpec], levels: Sequence[str], failed: Mapping[str, str], trial: str, level: str, emit: Emit
) -> float:
    """One level of a trial. failed: why levels cannot be adapted."""
    if level in failed:
        raise TrainingFailedError(failed[level])
    selection = _selections(specs[trial], levels)[level]
    result = run_level(specs[trial], level, _only_partial(emit, trial, level), selection)
    assert result.adaptor is not None
    return result.adaptor


def _run_level(spec: JobSpec, level: str, label: str, emit: Emit) -> LevelResult:
    return run_level(spec, level, _only_partial(emit, label, level))


def _only_partial(emit: Emit, label: str, level: str) -> Emit:
    """Reports only the partial fine-tune, which alone belongs to a trial, as the stage `level` of `label`."""

    def emit_partial(event: Event) -> None:
        if event.stage == "partial":
            emit(replace(event, level=label, stage=level))

    return emit_partial


def _publish(
    store: Store,
    release: ReleaseContext,
    point: Point,
    spec: JobSpec,
    images: Mapping[str, ImageStatistics],
    tasks: TaskRunner,
    emit: Reporter,
) -> str:
    """Publish the release under the recommended budget with all its levels, tagged; `latest` stays where it is."""
    label = f"M = {point.budget}, the rest"
    results = {result.level: result for result in point.results}
    for level in release.levels:
        if level not in results and (known := cached(run_level, spec, level)) is not None:
            results[level] = known
    others = [level for level in release.levels if level not in results]
    emit.expect({(label, level): 0.65 for level in others if not parse_level(level).is_clean})
    made = tasks.all(_run_level, {f"{level} at {point.budget}": (spec, level, label) for level in others})
    results |= {result.level: result for result in made.values()}
    ordered = tuple(results[level] for level in dict.fromkeys((*release.levels, *results)) if level in results)
    selection = release.config.selection.model_copy(update={"importance": spec.criterion.importance}).model_dump()
    config = _config(release, [result.level for result in ordered], budget=point.budget, selection=selection)
    manifest = manifest_of(config, spec, release.manifest.base, release.facts, images, ordered)
    return store.publish(manifest, {}, (TAG,), latest=False, stages=[key for result in ordered for key in result.stages])


def _show(store: Store, config: SweepConfig, release: ReleaseContext, points: Sequence[Point]) -> tuple[str | None, str | None]:
    """Put table and figure into the store; their paths there."""
    metric, floats = release.spec.task.metrics[0], release.facts.floats
    rows = rows_of(points, metric, floats, config.within)
    if not rows:
        return None, None
    table, figure = f"tables/{release.name}/sweep.parquet", f"figures/{release.name}/sweep.png"
    store.put_table(table, tables.table(tables.SWEEP, rows))
    title = f"{release.name}: accuracy over memory"
    store.put_figure(figure, sweep_figure(points, config.within, metric, 4 * floats, title))
    return table, figure
