"""The base network: the user's weights, or trained here; into the store before any level. Knows nothing of Ray."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from gearnn_ray.config.recipe import PAPERS, Criterion, Recipe
from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.models.layers import layers_of, network_state
from gearnn_ray.models.registry import build_model, load_weights, read_weights
from gearnn_ray.offline.job_spec import (
    JobSpec,
    Network,
    StoredCheckpoint,
    device,
    progress_to,
    stage_key,
    training_data,
)
from gearnn_ray.store.releases import Blob, Store
from gearnn_ray.training.trainer import fine_tune


@dataclass(frozen=True)
class NetworkFacts:
    """What the driver must know of the network without holding it."""

    floats: int
    smallest_layer: int

    def least(self, criterion: Criterion) -> int:
        """A budget of fewer floats fits no layer; under codes that shows only when layers are chosen."""
        return self.smallest_layer if criterion.storage_formats == PAPERS.storage_formats else 1


def check_network(network: Network, weights: str | None) -> NetworkFacts:
    """Build the network and load its weights to see that both work. Raises UserError."""
    layers = layers_of(network_from_weights(network, weights))
    if not layers:
        raise UserError(f"the network {network.name} has no floating-point tensors: give one with weights to adapt")
    return NetworkFacts(sum(layer.numel for layer in layers), min(layer.numel for layer in layers))


def network_from_weights(network: Network, weights: str | None) -> nn.Module:
    """The network with its weights file in it, or (None) freshly initialised. Raises UserError."""
    model = build_model(network.name, network.num_classes)
    if weights is not None:
        load_weights(model, read_weights(weights), weights)
    return model


def publish_given_base(spec: JobSpec, weights: str) -> Blob:
    """Put the base from the user's weights file into the store."""
    return Store(spec.store).put_state(network_state(network_from_weights(spec.network, weights)))


def base_key(spec: JobSpec, recipe: Recipe) -> str:
    """Key of the stage that trains the base."""
    return stage_key(
        "base",
        network=asdict(spec.network),
        train=spec.data.train.digest,
        recipe=recipe.inputs(),
        seed=spec.seed,
    )


def train_base(spec: JobSpec, recipe: Recipe, emit: Emit) -> Blob:
    """Train the base on the undistorted images from a seeded initialisation and put it into the store."""
    store, key = Store(spec.store), base_key(spec, recipe)
    record = store.get_record(key)
    if record is not None and store.has_blob(record["digest"]):
        emit(Event("reused", "base", "clean"))
        return Blob(record["digest"], record["bytes"])
    emit(Event("started", "base", "clean"))
    torch.manual_seed(spec.seed)
    model = build_model(spec.network.name, spec.network.num_classes).to(device())
    images, labels = training_data(spec, "clean")
    checkpoint = StoredCheckpoint(store, key)
    outcome = fine_tune(
        model, images, labels, recipe, spec.network.normalisation,
        chosen=None, seed=spec.seed, checkpoint=checkpoint, progress=progress_to(emit, "base", "clean"),
    )  # fmt: skip
    blob = store.put_state(network_state(model))
    store.put_record(key, {**asdict(blob), "seconds": outcome.seconds, "precision": outcome.precision})
    checkpoint.drop()
    emit(Event("finished", "base", "clean", seconds=outcome.seconds))
    return blob
