"""The work that a release was made by, opened again on a Ray cluster: its own data, network, recipe, base and seed, checked.

What an evaluation and a sweep start from. Knows nothing of what is done with it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from gearnn_ray.adaptors.adaptor import put_adaptor
from gearnn_ray.config.command_line import from_mapping
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.schema import ReleaseDataConfig, SplitConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Event
from gearnn_ray.data.dataset import Dataset, open_dataset
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.base import NetworkFacts, check_network
from gearnn_ray.offline.job_spec import ImageStatistics, JobSpec, Network, measure_images, prepare_images
from gearnn_ray.ray_jobs.cluster import EventRelay
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks.segmentation import Normalisation


@dataclass(frozen=True)
class ReleaseContext:
    """A release, and the work it was made by."""

    ref: str
    digest: str
    manifest: Mapping[str, Any]
    config: SplitConfig
    spec: JobSpec
    facts: NetworkFacts

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def levels(self) -> tuple[str, ...]:
        return tuple(self.manifest["levels"])


def open_release_context(store: Store, ref: str, data: ReleaseDataConfig, relay: EventRelay) -> ReleaseContext:
    """The release's work, on the data that it was made from. Raises UserError where that is not what is found."""
    digest, manifest = store.manifest(ref)
    told = manifest.get("config")
    if not isinstance(told, dict):
        raise UserError(f"{ref} does not say how it was made: name a release of jobs/split.py")
    config = from_mapping(SplitConfig, told, f"the configuration in {ref}")
    path = data.path or config.data.path
    # an absolute one for workers, who may stand elsewhere; what is published again keeps the release's own words
    here = config.data.model_copy(update={"path": path and os.path.abspath(path)})
    found: Dataset = relay.wait(open_data.remote(config.model_copy(update={"data": here})))
    for part in ("train", "val"):
        if getattr(found, part).digest != manifest["data"][part]:
            raise UserError(
                f"the {part} images in {here.path or 'the generated scenes'} are not those that {ref} was made from: "
                "give their folder with --data.path"
            )
    about = manifest["model"]
    normalisation = Normalisation(tuple(about["normalisation"]["mean"]), tuple(about["normalisation"]["std"]))
    network = Network(about["name"], about["num_classes"], normalisation)
    facts: NetworkFacts = relay.wait(_check_network.remote(network, store.uri, manifest["base"]["digest"]))
    spec = JobSpec(
        store=store.uri,
        cache=data.cache,
        network=network,
        data=found,
        recipe=Recipe(**manifest["recipe"]),
        budget=manifest["budget"]["floats"],
        seed=manifest["seed"],
        base=manifest["base"]["digest"],
        keep_full=config.keep_full,
        criterion=config.selection.criterion,
        coupling=config.selection.coupling,
        sensitivity_epochs=config.sensitivity.epochs,
    )
    return ReleaseContext(ref, digest, manifest, config, spec, facts)


def make_images(spec: JobSpec, levels: Sequence[str], relay: EventRelay) -> dict[str, ImageStatistics]:
    """Every level's images of both splits, and the undistorted ones; statistics of those to train on."""
    relay.emit(Event("started", "images", "all"))
    wanted = [(name, part) for name in dict.fromkeys((*levels, "clean")) for part in ("train", "val")]
    shared = ray.put(spec)
    refs = [_prepare_images.remote(shared, *each) for each in wanted]
    measured = dict[str, ImageStatistics]()
    for done, ((name, part), ref) in enumerate(zip(wanted, refs, strict=True), 1):
        statistics = relay.wait(ref)
        if part == "train":
            measured[name] = statistics
        relay.emit(Event("progress", "images", "all", done, len(refs)))
    relay.emit(Event("finished", "images", "all", len(refs), len(refs)))
    return measured


@ray.remote
def open_data(config: SplitConfig) -> Dataset:
    """What a split's configuration says of data, as a worker sees it."""
    data = open_dataset(config.data.kind, config.data.path, **config.resolved_data_options())
    _ = data.train.digest, data.val.digest  # kept in the object: no other process reads the files for it
    return data


@ray.remote
def _check_network(network: Network, store: str, base: str) -> NetworkFacts:
    facts = check_network(network, None)
    state = Store(store).get_state(base)
    try:
        put_adaptor(build_model(network.name, network.num_classes), state, {})
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"the base {base[:19]}… does not fit the network {network.name}: {error}".splitlines()[0]
        ) from error
    return facts


@ray.remote
def _prepare_images(spec: JobSpec, level: str, split_name: Any) -> ImageStatistics | None:
    prepare_images(spec, level, split_name)
    return measure_images(spec, level) if split_name == "train" else None
