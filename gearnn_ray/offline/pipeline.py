"""Algorithm 1 on a Ray cluster.

    check everything ─► base ─► one task per level: original, full fine-tune, selection, partial fine-tune ─► release

A level is one task, so its selection and partial fine-tune start the moment its full fine-tune is done, in a process that has
network and images at hand; other levels neither wait nor are waited for. Levels that are chosen together come in two waves:

    one task per level: original, full fine-tune ─► one for all: selection ─► one per adaptor: partial fine-tune

Weights go from worker to store and back, never through the driver, which sees digests and small tables. What survives a killed
task is what the stages put into the store.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import ray
from ray.exceptions import RayError

from gearnn_ray.adaptors.adaptor import ComplementChangedError
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.schema import (
    ModelConfig,
    ResourcesConfig,
    SplitConfig,
    budget_floats,
    normalisation_values,
)
from gearnn_ray.core.errors import TrainingFailedError, UserError
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.data.dataset import Dataset
from gearnn_ray.models.registry import read_weights
from gearnn_ray.offline import level_run
from gearnn_ray.offline.base import NetworkFacts, check_network, publish_given_base, train_base
from gearnn_ray.offline.job_spec import ImageStatistics, JobSpec, Network, measure_images, prepare_images
from gearnn_ray.offline.level_run import LevelResult
from gearnn_ray.offline.release import manifest_of, summary_row, tables_of
from gearnn_ray.offline.release_context import open_data
from gearnn_ray.ray_jobs.cluster import (
    POLL_SECONDS,
    EventBoard,
    EventRelay,
    beside_driver,
    cluster,
    cluster_resources,
    discard,
    event_sender,
    reason_of,
    result_of,
)
from gearnn_ray.ray_jobs.resources import check_resources, groups_that_fit
from gearnn_ray.store.releases import Blob, Store
from gearnn_ray.tasks.segmentation import Normalisation
from gearnn_ray.training.trainer import prepare_process

Step = Callable[..., Any]
"""`level_run.run_level`, or one of what takes its place where levels are chosen together: of (work, what, say)."""


@dataclass(frozen=True)
class Outcome:
    """What a job made. `release`: digest of the manifest, None when no level was published. `failed`: level to reason."""

    release: str | None
    results: tuple[LevelResult, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    summary: tuple[dict[str, Any], ...] = ()


def split(config: SplitConfig, emit: Emit) -> Outcome:
    """Run the job. Raises UserError before anything is trained or written when what it was told is wrong."""
    store = Store(config.store)
    store.check_writable()
    asked, config = config, _with_absolute_paths(config)
    with cluster():
        check_resources(config.resources, *cluster_resources())
        board = cast(Any, EventBoard).options(scheduling_strategy=beside_driver()).remote()
        relay = EventRelay(board, emit)
        spec, facts, images = _checked_work(config, relay)
        try:
            base = _base(config, spec, board, relay)
        except (TrainingFailedError, RayError) as error:
            reason = f"the base could not be trained: {reason_of(error)}"
            return Outcome(None, (), dict.fromkeys(config.levels, reason))
        spec = replace(spec, base=base.digest)
        results, failed = _levels(config, spec, board, relay)
        relay.flush()
    ordered = tuple(results[name] for name in config.levels if name in results)
    if not ordered:
        return Outcome(None, (), failed)
    summary = tuple(summary_row(result, spec.budget, facts.floats) for result in ordered)
    release = store.publish(
        manifest_of(asked, spec, base, facts, images, ordered),
        tables_of(config.name, spec, ordered, summary),
        config.tags,
    )
    return Outcome(release, ordered, failed, summary)


def _with_absolute_paths(config: SplitConfig) -> SplitConfig:
    """Relative paths are the driver's: a worker may stand elsewhere."""
    data, model = config.data, config.model
    return config.model_copy(
        update={
            "data": data.model_copy(update={"path": data.path and os.path.abspath(data.path)}),
            "model": model.model_copy(update={"weights": model.weights and os.path.abspath(model.weights)}),
        }
    )


# ── what is checked before anything is trained ───────────────────────────────────────────────────────────────────


@ray.remote
def _check_network(model: ModelConfig, num_classes: int) -> tuple[Network, NetworkFacts]:
    about = dict(read_weights(model.weights).about) if model.weights else {}
    network = Network(model.name, num_classes, Normalisation(*normalisation_values(model, about)))
    return network, check_network(network, model.weights)


@ray.remote
def _prepare_images(spec: JobSpec, level: str, split_name: Any) -> ImageStatistics | None:
    """Make a level's images; those to train on are measured in passing, where they lie."""
    prepare_images(spec, level, split_name)
    return measure_images(spec, level) if split_name == "train" else None


@ray.remote
def _measure_undistorted(spec: JobSpec) -> ImageStatistics:
    return measure_images(spec, "clean")


def _checked_work(config: SplitConfig, relay: EventRelay) -> tuple[JobSpec, NetworkFacts, dict[str, ImageStatistics]]:
    """Data, labels, weights, budget: all of it looked at, every level's images made and measured. Raises UserError."""
    relay.emit(Event("started", "images", "all"))
    data: Dataset = relay.wait(open_data.remote(config))
    network_ref = _check_network.remote(config.model, data.num_classes)
    pending = Network(config.model.name, data.num_classes, Normalisation((0, 0, 0), (1, 1, 1)))
    spec = JobSpec(
        store=Store(config.store).uri,
        cache=config.data.cache,
        network=pending,
        data=data,
        recipe=config.recipe,
        budget=0,
        seed=config.seed,
        keep_full=config.keep_full,
        criterion=config.selection.criterion,
        coupling=config.selection.coupling,
        sensitivity_epochs=config.sensitivity.epochs,
        world_size=config.resources.workers_per_level,
    )
    names = list(config.levels)
    if (config.model.weights is None or config.selection.against == "clean") and "clean" not in names:
        names.append("clean")
    shared = ray.put(spec)
    wanted = [(name, part) for name in names for part in ("train", "val")]
    images = [_prepare_images.remote(shared, name, part) for name, part in wanted]
    undistorted = _measure_undistorted.remote(shared)
    network, facts = relay.wait(network_ref)
    budget = budget_floats(config.budget, facts.floats)
    if budget < facts.least(config.selection):
        for ref in [*images, undistorted]:
            ray.cancel(ref, force=False)
        raise UserError(
            f"the budget {config.budget} is {budget} floats and fits no layer: the smallest of {config.model.name} "
            f"has {facts.smallest_layer}, so give at least that"
        )
    measured = dict[str, ImageStatistics]()
    for done, ((name, part), ref) in enumerate(zip(wanted, images, strict=True), 1):
        found = relay.wait(ref)
        if part == "train":
            measured[name] = found
        relay.emit(Event("progress", "images", "all", done, len(images)))
    measured["clean"] = relay.wait(undistorted)
    relay.emit(Event("finished", "images", "all", len(images), len(images)))
    return replace(spec, network=network, budget=budget), facts, measured


# ── the base ─────────────────────────────────────────────────────────────────────────────────────────────────────


@ray.remote
def _publish_base(spec: JobSpec, weights: str) -> Blob:
    return publish_given_base(spec, weights)


@ray.remote
def _train_base(spec: JobSpec, recipe: Recipe, threads: int, board: Any) -> Blob:
    prepare_process(threads)
    with event_sender(board) as emit:
        return train_base(spec, recipe, emit)


def _base(config: SplitConfig, spec: JobSpec, board: Any, relay: EventRelay) -> Blob:
    """The base: the user's weights, or a network trained on the undistorted images."""
    if config.model.weights is not None:
        return cast(Blob, relay.wait(_publish_base.remote(spec, config.model.weights)))
    # nothing else runs meanwhile: it may have all CPUs of the largest node
    cpus = max(int(config.resources.cpus), *(int(node.get("CPU", 0)) for node in cluster_resources()[0]))
    task = _train_base.options(num_cpus=cpus, num_gpus=config.resources.gpus, max_retries=config.resources.retries)
    return cast(Blob, relay.wait(task.remote(spec, config.base_recipe, cpus, board)))


# ── the levels ───────────────────────────────────────────────────────────────────────────────────────────────────


@ray.remote
def _run_level(step: Step, spec: JobSpec, what: Any, threads: int, board: Any) -> Any:
    prepare_process(threads)
    with event_sender(board) as emit:
        return step(spec, what, emit)


@ray.remote(num_cpus=0)
def _run_level_on_workers(
    step: Step, spec: JobSpec, name: str, what: Any, resources: ResourcesConfig, board: Any
) -> Any:
    """A step whose fine-tunes are spread over several workers by Ray Train; this process only looks on."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer, get_device

    with event_sender(board) as emit:
        if (known := level_run.known(step, spec, what, emit)) is not None:
            return known
    threads = max(1, int(resources.cpus))

    def loop() -> None:
        import torch
        import torch.distributed as dist

        if (device := get_device()).type == "cuda":
            torch.cuda.set_device(device)
        prepare_process(threads)
        if ray.get(board.given_up.remote(name)) is not None:
            return  # Ray Train tries again after any failure; what is wrong with a level does not get better
        with event_sender(board) as emit:
            try:
                step(spec, what, emit if dist.get_rank() == 0 else discard)
            except (TrainingFailedError, UserError, ComplementChangedError) as error:
                ray.get(board.give_up.remote(name, str(error)))
                raise  # the other workers wait for this one: Ray Train ends them

    bundle = {"CPU": resources.cpus, "GPU": resources.gpus}
    with tempfile.TemporaryDirectory(prefix="gearnn_ray-") as scratch:
        trainer = TorchTrainer(
            loop,
            scaling_config=ScalingConfig(
                num_workers=resources.workers_per_level,
                use_gpu=resources.gpus > 0,
                resources_per_worker={name: amount for name, amount in bundle.items() if amount},
            ),
            # Train wants a folder; what it would restore from is in our store
            run_config=RunConfig(
                name=name, storage_path=scratch, failure_config=FailureConfig(max_failures=resources.retries)
            ),
        )
        try:
            trainer.fit()
        finally:
            reason = ray.get(board.given_up.remote(name))
            if reason is not None:
                raise TrainingFailedError(reason) from None
    result = level_run.known(step, spec, what, discard)
    assert result is not None, "Ray Train ended without an error but left a stage undone"
    return result


def _levels(
    config: SplitConfig, spec: JobSpec, board: Any, relay: EventRelay
) -> tuple[dict[str, LevelResult], dict[str, str]]:
    """Every level's result, or the reason why it has none."""
    run = partial(_run_all, config.resources, spec, board, relay)
    left, failed = list(config.levels), dict[str, str]()
    if spec.criterion.against == "clean":
        # every level's change is measured against the undistorted one's: all full fine-tunes come first
        _, failed = run(level_run.fine_tune_fully, {level: level for level in dict.fromkeys(("clean", *left))})
        if "clean" in failed:
            reason = f"the fine-tune on undistorted images, which changes are measured against: {failed['clean']}"
            return {}, dict.fromkeys(left, reason)
        left = [level for level in left if level not in failed]
    if not spec.coupling.is_joint:
        results, late = run(level_run.run_level, {level: level for level in left})
        return results, failed | late
    sensed, late = run(level_run.sense_own, {level: level for level in left})
    failed |= late
    chosen = dict[tuple[str, ...], dict[str, Any]]()
    if measured := {level: each[0] for level, each in sensed.items() if each}:
        try:
            selections = relay.wait(_choose_together.remote(spec, measured, board))
            # an adaptor that several levels share is one task
            chosen = {tuple(s.get("shared_by", (level,))): s for level, s in selections.items()}
        except Exception as error:
            failed |= dict.fromkeys(measured, reason_of(error))
    chosen |= {(level,): {} for level, each in sensed.items() if not each}
    adapted, late = run(level_run.adapt_together, {levels[0]: (levels, each) for levels, each in chosen.items()})
    for levels in chosen:
        failed |= dict.fromkeys(levels, late[levels[0]]) if levels[0] in late else {}
    return {result.level: result for results in adapted.values() for result in results}, failed


@ray.remote
def _choose_together(spec: JobSpec, measured: Mapping[str, dict[str, Any]], board: Any) -> dict[str, dict[str, Any]]:
    with event_sender(board) as emit:
        return level_run.select_jointly(spec, measured, emit)


def _run_all(
    resources: ResourcesConfig, spec: JobSpec, board: Any, relay: EventRelay, step: Step, whats: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `step(work, what, say)` returns of each, by name, or the reason why it does not."""
    shared, threads = ray.put(spec), max(1, int(resources.cpus))
    start: Callable[[str], Any]
    if spreads_over_workers(resources):
        at_once = groups_that_fit(resources, *cluster_resources())
        start = lambda name: _run_level_on_workers.options(  # noqa: E731
            max_retries=resources.retries, scheduling_strategy=beside_driver()
        ).remote(step, shared, name, whats[name], resources, board)
    else:
        # all of them wait in Ray's own queue, where an autoscaler sees them
        at_once = len(whats)
        task = _run_level.options(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=resources.retries)
        start = lambda name: task.remote(step, shared, whats[name], threads, board)  # noqa: E731

    waiting, running = list(whats), dict[Any, str]()
    results, failed = dict[str, Any](), dict[str, str]()
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            running[start(name)] = name
        done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
        relay.flush()
        for ref in done:
            name = running.pop(ref)
            try:
                results[name] = result_of(ref)
            except Exception as error:
                failed[name] = reason_of(error)
    return results, failed


def spreads_over_workers(resources: ResourcesConfig) -> bool:
    """Whether Ray Train is worth its 11 to 28 s per run: only where one fine-tune has several workers."""
    return resources.workers_per_level > 1
