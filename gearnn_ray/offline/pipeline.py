"""Algorithm 1 on a Ray cluster: check everything ─► base ─► one task per level ─► release.

A level is one task: its selection and partial fine-tune start as soon as its full fine-tune is done, in a process that has
network and images in memory. Levels that are selected jointly take two waves of tasks, with the one selection between them.
Weights go from worker to store and back, never through the driver. After a killed task, the stages in the store remain.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from gearnn_ray.config.budget import budget_floats
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.split import ModelConfig, SplitConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.data.cache import ImageStatistics, level_images, level_statistics
from gearnn_ray.data.dataset import Dataset, open_dataset
from gearnn_ray.levels.level import parse_level
from gearnn_ray.offline.base import NetworkFacts, check_network, network_of, publish_given_base, train_base, training_size
from gearnn_ray.offline.execution import decide, look_at_processor
from gearnn_ray.offline.held_back import kept_of
from gearnn_ray.offline.job_spec import JobSpec, Network, level_data, stage_key
from gearnn_ray.offline.joint_selection import LevelMeasurement
from gearnn_ray.offline.level_run import LevelResult, cached, fine_tune_fully, measure_level, run_level, select_jointly
from gearnn_ray.offline.records import ExecutionResult
from gearnn_ray.offline.release import figures_of, manifest_of, summary_row, tables_of
from gearnn_ray.offline.selection import LayerSelection
from gearnn_ray.offline.stage_cache import StageCache
from gearnn_ray.ray_jobs.board import discard
from gearnn_ray.ray_jobs.cluster import ask_every_node
from gearnn_ray.ray_jobs.run_tasks import TaskRunner, job_tasks
from gearnn_ray.reporting.summary import SummaryRow
from gearnn_ray.store.blobs import Blob
from gearnn_ray.store.leases import HeldLease, lease_key, run_leased
from gearnn_ray.store.patience import patient
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks import task_by_name

T = TypeVar("T")

PARTIAL_TAG = "partial"
"""The tag of a release that lacks levels; `latest` does not move then."""


@dataclass(frozen=True)
class Outcome:
    """What a job made. release: digest of the manifest, None when no level was published. failed: level to reason. tag: `latest`,
    or `partial` where a level failed. figures: the paths of the release's figures, empty where they are another release's.
    """

    release: str | None
    results: tuple[LevelResult, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    summary: tuple[SummaryRow, ...] = ()
    tag: str = "latest"
    figures: tuple[str, ...] = ()


def split(config: SplitConfig, emit: Emit) -> Outcome:
    """Run the job. Raises UserError before anything is trained or written when the configuration is invalid."""
    store = Store(patient(config.store))
    store.check_writable()
    key = lease_key("split", with_absolute_paths(config).model_dump(mode="json", exclude={"store", "tags"}))
    return run_leased(store.uri, key, emit, lambda lease: _split(config, store, lease, emit))


def _split(given: SplitConfig, store: Store, lease: HeldLease, emit: Emit) -> Outcome:
    config = with_absolute_paths(given)
    with job_tasks(config.resources, emit, lease.check) as tasks:
        checked = _check(config, tasks, emit)
        stages = StageCache(store, "all", discard)
        execution = _execution(config, stages, checked)
        base = _base(config, store, checked, execution, tasks)
        if base is None:
            reason = f"the base could not be trained: {tasks.failed['base']}"
            return Outcome(None, (), dict.fromkeys(config.levels, reason))
        spec = JobSpec(
            store=store.uri,
            cache=config.data.cache,
            network=checked.network,
            data=checked.data,
            base=base.digest,
            recipe=config.recipe,
            budget=checked.budget,
            seed=config.seed,
            execution=execution.levels,
            keep_full=config.keep_full,
            world_size=config.resources.workers_per_level,
            criterion=config.selection.criterion,
            coupling=config.selection.coupling,
            sensitivity_epochs=config.sensitivity.epochs,
            held_back=config.selection.held_back,
        )
        tasks.threads = spec.execution.threads
        results = run_levels(spec, config.levels, tasks)
    failed = {level: tasks.failed[level] for level in config.levels if level in tasks.failed}
    ordered = tuple(results[name] for name in config.levels if name in results)
    if not ordered:
        return Outcome(None, (), failed)
    summary = tuple(summary_row(result, spec, checked.facts.floats) for result in ordered)
    figures = figures_of(config.name, ordered, summary)
    lease.confirm()  # a driver that was stopped for long must not move tags that others have moved since
    release = store.publish(
        manifest_of(given, spec, base, checked.facts, checked.images, ordered),
        tables_of(config.name, spec, ordered, summary),
        (PARTIAL_TAG,) if failed else config.tags,
        latest=not failed,
        figures=figures,
        stages=[*stages.used, *(key for result in ordered for key in result.stages)],
    )
    shown = tuple(figures) if store.tag_digest(config.name, "latest") in (release, None) else ()
    return Outcome(release, ordered, failed, summary, PARTIAL_TAG if failed else "latest", shown)


def with_absolute_paths(config: SplitConfig) -> SplitConfig:
    """Relative paths are the driver's: a worker may stand elsewhere."""
    data, model = config.data, config.model
    return config.model_copy(
        update={
            "data": data.model_copy(update={"path": data.path and os.path.abspath(data.path)}),
            "model": model.model_copy(
                update={
                    "name": _with_absolute_folder(model.name),
                    **{n: path and os.path.abspath(path) for n, path in (("weights", model.weights), ("start", model.start))},
                }
            ),
        }
    )


def _with_absolute_folder(network: str) -> str:
    """Of `hf:FOLDER`; an identifier is no folder."""
    prefix, _, folder = network.partition(":")
    return f"hf:{os.path.abspath(folder)}" if prefix == "hf" and os.path.isdir(folder) else network


@dataclass(frozen=True)
class _Checked:
    """The facts of a job whose configuration is valid. images: statistics of every level's training images, and of `clean`'s."""

    data: Dataset
    network: Network
    facts: NetworkFacts
    budget: int
    images: Mapping[str, ImageStatistics]


def open_data(config: SplitConfig) -> Dataset:
    """The dataset of a configuration, as a worker sees it."""
    data = open_dataset(config.data.kind, config.data.path, config.task, **config.resolved_data_options())
    _ = data.train.digest, data.val.digest  # kept in the object: no other process reads the files for it
    return data


def _look_at_network(model: ModelConfig, data: Dataset, task: str, recipe: Recipe, cache: str) -> tuple[Network, NetworkFacts]:
    network = network_of(model, data.num_classes, task)
    if model.input == "training-size":
        network = replace(network, input_size=training_size(data, cache))
    return network, check_network(network, model.weights, model.start, data, recipe)


def _prepare_images(data: Dataset, task: str, level: str, part: Any, cache: str) -> ImageStatistics | None:
    """Make one level's images of one split and check every target; statistics of those to train on."""
    if data.labelled:
        level_data(data, task_by_name(task), part, level, cache)
    else:
        level_images(getattr(data, part), parse_level(level), Path(cache).expanduser())
    return _statistics(data, level, cache) if part == "train" else None


def _statistics(data: Dataset, level: str, cache: str) -> ImageStatistics:
    return level_statistics(data.train, parse_level(level), Path(cache).expanduser())


def prepare_images(
    data: Dataset, task: str, levels: Sequence[str], cache: str, tasks: TaskRunner, emit: Emit
) -> dict[str, ImageStatistics]:
    """Every level's images of both splits made; statistics of the training images. Raises UserError."""
    emit(Event("started", "images", "all"))
    wanted = [(level, part) for level in levels for part in ("train", "val")]
    shared, found = tasks.share(data), dict[str, ImageStatistics]()
    calls = [(shared, task, level, part, cache) for level, part in wanted]
    for done, ((level, _), statistics) in enumerate(zip(wanted, tasks.check_all(_prepare_images, calls), strict=True), 1):
        if statistics is not None:
            found[level] = statistics
        emit(Event("progress", "images", "all", done, len(wanted)))
    emit(Event("finished", "images", "all", len(wanted), len(wanted)))
    return found


def _check(config: SplitConfig, tasks: TaskRunner, emit: Emit) -> _Checked:
    """Data, targets, weights, budget: all of it looked at, every level's images made and measured. Raises UserError."""
    data: Dataset = tasks.check(open_data, config)
    if data.remark:
        emit(Event("finished", "footage", "all", note=data.remark))
    workers, trained_on = config.resources.workers_per_level, kept_of(len(data.train), config.selection.held_back)
    if workers > trained_on:
        apart = " beside those that are held back" if config.selection.held_back else ""
        raise UserError(
            f"resources.workers_per_level is {workers} and there are {trained_on} training images{apart}: every worker needs an "
            "image of each batch, so give fewer workers"
        )
    network, facts = tasks.check(_look_at_network, config.model, data, config.task, config.recipe, config.data.cache)
    budget = budget_floats(config.budget, facts.floats)
    if budget < facts.least_budget(config.selection.criterion):
        raise UserError(
            f"the budget {config.budget} is {budget} floats and fits no layer: the smallest of {config.model.name} "
            f"has {facts.smallest_layer}, so give at least that"
        )
    levels = list(config.levels)
    undistorted_too = config.model.weights is None or config.selection.against == "clean" or config.recipe.objective != "labels"
    if undistorted_too and "clean" not in levels:
        levels.append("clean")
    images = prepare_images(data, config.task, levels, config.data.cache, tasks, emit)
    if "clean" not in images:
        images["clean"] = tasks.check(_statistics, data, "clean", config.data.cache)
    return _Checked(data, network, facts, budget, images)


def _execution(config: SplitConfig, stages: StageCache, checked: _Checked) -> ExecutionResult:
    """Device, precision and threads: those that this job began with, whatever machine it continues on."""
    data, resources = checked.data, config.resources
    key = stage_key(
        "execution",
        network=replace(checked.network, input_size=None).inputs(),  # the base is the same for either input
        train=data.train.digest,
        val=data.val.digest,
        recipes=[{**each.inputs(), "precision": each.precision} for each in (config.recipe, config.base_recipe)],
        seed=config.seed,
        resources=[resources.cpus, resources.gpus, resources.workers_per_level],
    )

    def resolve() -> ExecutionResult:
        processors = ask_every_node(look_at_processor, resources.gpus)
        return decide(config.recipe, config.base_recipe, resources, processors)

    return stages.result(ExecutionResult, key, resolve)


def _base(config: SplitConfig, store: Store, checked: _Checked, execution: ExecutionResult, tasks: TaskRunner) -> Blob | None:
    """The base: the user's weights, or a network trained on the undistorted images. None where that failed."""
    network, data = checked.network, checked.data
    if config.model.weights is not None:
        blob: Blob = tasks.check(publish_given_base, store.uri, network, config.model.weights)
        return blob
    arguments = (store.uri, config.data.cache, network, config.model.start, data, config.base_recipe, config.seed, execution.base)
    made: list[Blob | None] = []
    # nothing else runs meanwhile: it may have as many threads as the largest node had CPUs
    tasks.start("base", train_base, *arguments, then=made.append, threads=execution.base.threads)
    tasks.settle()
    return made[0]


def run_levels(spec: JobSpec, levels: Sequence[str], tasks: TaskRunner) -> dict[str, LevelResult]:
    """Every level's result; the runner knows why the others have none."""
    shared, left = tasks.share(spec), list(levels)

    def run(step: Callable[..., T], calls: Mapping[str, Sequence[Any]]) -> dict[str, T]:
        return tasks.all(step, calls, functools.partial(cached, step))

    if spec.criterion.against == "clean":
        # every level's change is measured against the undistorted one's: all full fine-tunes come first
        run(fine_tune_fully, {level: (shared, level) for level in dict.fromkeys(("clean", *left))})
        if "clean" in tasks.failed:
            reason = f"the fine-tune on undistorted images, which changes are measured against: {tasks.failed['clean']}"
            tasks.failed |= dict.fromkeys(left, reason)
        left = [level for level in left if level not in tasks.failed]
    if not spec.coupling.is_joint:
        return run(run_level, {level: (shared, level) for level in left})
    measured = run(measure_level, {level: (shared, level) for level in left})
    selections = _joint_selections(spec, {level: each[0] for level, each in measured.items() if each}, tasks)
    ready = [level for level, each in measured.items() if not each or level in selections]
    return run(_adapt, {level: (shared, level, selections.get(level)) for level in ready})


def _joint_selections(spec: JobSpec, measured: Mapping[str, LevelMeasurement], tasks: TaskRunner) -> dict[str, LayerSelection]:
    """Each level's selection; empty where the levels have none, which the runner then knows why."""
    if not measured:
        return {}
    found: list[dict[str, LayerSelection] | None] = []
    tasks.start("joint selection", select_jointly, spec, measured, then=found.append)
    tasks.settle()
    if found[0] is None:
        tasks.failed |= dict.fromkeys(measured, tasks.failed.pop("joint selection"))
    return found[0] or {}


def _adapt(spec: JobSpec, level: str, selection: LayerSelection | None, emit: Emit, only_cached: bool = False) -> LevelResult:
    """Step 4 at a level that is selected jointly with others; reports only that stage."""

    def emit_partial(event: Event) -> None:
        if event.stage == "partial":
            emit(event)

    return run_level(spec, level, emit_partial, selection, only_cached)
