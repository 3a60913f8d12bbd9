"""What an evaluation and a sweep start from: a release, and the job spec that it was made with, on its own data, checked."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from gearnn_ray.adaptors.adaptor import put_adaptor
from gearnn_ray.config.command_line import from_mapping
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.release_jobs import EvaluateConfig, SweepConfig
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import Dataset
from gearnn_ray.models.registry import build_released_model
from gearnn_ray.offline.base import NetworkFacts, check_network
from gearnn_ray.offline.execution import decide, look_at_processor
from gearnn_ray.offline.job_spec import JobSpec, Network
from gearnn_ray.offline.pipeline import open_data
from gearnn_ray.offline.records import Execution
from gearnn_ray.ray_jobs.cluster import ask_every_node
from gearnn_ray.ray_jobs.run_tasks import TaskRunner
from gearnn_ray.store.manifest import Manifest
from gearnn_ray.store.releases import Store
from gearnn_ray.training.predict import Normalisation


@dataclass(frozen=True)
class ReleaseContext:
    """A release, and the job spec that it was made with. ref: as the user named it. digest: of the manifest."""

    ref: str
    digest: str
    manifest: Manifest
    config: SplitConfig
    spec: JobSpec
    facts: NetworkFacts

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def levels(self) -> tuple[str, ...]:
        return tuple(self.manifest.levels)


def open_release_context(store: Store, config: EvaluateConfig | SweepConfig, tasks: TaskRunner) -> ReleaseContext:
    """The release's job spec, on the data that it was made from. Raises UserError where that is not what is found."""
    digest, manifest = store.manifest(config.release)
    data_entry, budget, seed = manifest.data, manifest.budget.floats, manifest.seed
    if data_entry is None or budget is None or seed is None or manifest.config is None or manifest.execution is None:
        raise UserError(f"{config.release} does not say how it was made: name a release of jobs/split.py")
    given = from_mapping(SplitConfig, manifest.config, f"the configuration in {config.release}")
    path = config.data.path or given.data.path
    # an absolute one for workers, who may stand elsewhere; what is published again keeps the release's own words
    here = given.data.model_copy(update={"path": path and os.path.abspath(path)})
    data: Dataset = tasks.check(open_data, given.model_copy(update={"data": here}))
    for part, expected in (("train", data_entry.train), ("val", data_entry.val)):
        if getattr(data, part).digest != expected:
            raise UserError(
                f"the {part} images in {here.path or 'the generated scenes'} are not those that {config.release} was made from: "
                "give their folder with --data.path"
            )
    model = manifest.model
    normalisation = Normalisation(model.normalisation.mean, model.normalisation.std)
    network = Network(model.name, model.num_classes, normalisation, model.task, model.arguments, model.pad_to, model.input_size)
    facts: NetworkFacts = tasks.check(_check_base, network, store.uri, manifest.base.digest, config.trust)
    spec = JobSpec(
        store=store.uri,
        cache=config.data.cache,
        network=network,
        data=data,
        base=manifest.base.digest,
        recipe=Recipe(**manifest.recipe),
        budget=budget,
        seed=seed,
        execution=_execution(manifest, given, tasks),
        keep_full=given.keep_full,
        criterion=given.selection.criterion,
        coupling=given.selection.coupling,
        sensitivity_epochs=given.sensitivity.epochs,
        held_back=given.selection.held_back,
    )
    tasks.threads = spec.execution.threads
    return ReleaseContext(config.release, digest, manifest, given, spec, facts)


def _execution(manifest: Manifest, given: SplitConfig, tasks: TaskRunner) -> Execution:
    """That of the release, so that its stages are found; decided again where only one of the two jobs uses GPUs."""
    assert manifest.execution is not None
    made = Execution(**manifest.execution.model_dump())
    if (made.device == "cuda") == (tasks.resources.gpus > 0):
        return made
    processors = ask_every_node(look_at_processor, tasks.resources.gpus)
    return decide(given.recipe, given.base_recipe, tasks.resources, processors).levels


def _check_base(network: Network, store: str, base: str, trust: tuple[str, ...]) -> NetworkFacts:
    """Whether the released base fits the network. Builds a network by import path only where the operator trusts its module."""
    model = build_released_model(network.name, network.num_classes, trust, network.arguments, network.pad_to)
    facts = check_network(network, None)
    state: Mapping[str, object] = Store(store).get_state(base)
    try:
        put_adaptor(model, state, {})  # type: ignore[arg-type]
    except (KeyError, RuntimeError) as error:
        raise UserError(f"the base {base[:19]}… does not fit the network {network.name}: {error}".splitlines()[0]) from error
    return facts
