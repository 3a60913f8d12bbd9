"""The base network: the user's weights, or trained here; into the store before any level. Knows nothing of Ray."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from gearnn_ray.errors import UserError
from gearnn_ray.layers import layers_of, network_state
from gearnn_ray.models import build_model, load_weights, read_weights
from gearnn_ray.offline.events import Event, Say
from gearnn_ray.offline.finetune import fine_tune
from gearnn_ray.offline.recipe import PAPERS, Criterion, Recipe
from gearnn_ray.offline.work import Network, StoredCheckpoint, Work, device, progress_to, stage_key, training_data
from gearnn_ray.store import Blob, Store


@dataclass(frozen=True)
class NetworkFacts:
    """What the driver must know of the network without holding it."""

    floats: int
    smallest_layer: int

    def least(self, criterion: Criterion) -> int:
        """A budget of fewer floats fits no layer; under codes that shows only when layers are chosen."""
        return self.smallest_layer if criterion.codes == PAPERS.codes else 1


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


def publish_given_base(work: Work, weights: str) -> Blob:
    """Put the base from the user's weights file into the store."""
    return Store(work.store).put_state(network_state(network_from_weights(work.network, weights)))


def base_key(work: Work, recipe: Recipe) -> str:
    """Key of the stage that trains the base."""
    return stage_key(
        "base",
        network=asdict(work.network),
        train=work.data.train.digest,
        recipe=recipe.inputs(),
        seed=work.seed,
    )


def train_base(work: Work, recipe: Recipe, say: Say) -> Blob:
    """Train the base on the undistorted images from a seeded initialisation and put it into the store."""
    store, key = Store(work.store), base_key(work, recipe)
    record = store.get_record(key)
    if record is not None and store.has_blob(record["digest"]):
        say(Event("reused", "base", "clean"))
        return Blob(record["digest"], record["bytes"])
    say(Event("started", "base", "clean"))
    torch.manual_seed(work.seed)
    model = build_model(work.network.name, work.network.num_classes).to(device())
    images, labels = training_data(work, "clean")
    checkpoint = StoredCheckpoint(store, key)
    outcome = fine_tune(
        model, images, labels, recipe, work.network.normalisation,
        chosen=None, seed=work.seed, checkpoint=checkpoint, progress=progress_to(say, "base", "clean"),
    )  # fmt: skip
    blob = store.put_state(network_state(model))
    store.put_record(key, {**asdict(blob), "seconds": outcome.seconds, "precision": outcome.precision})
    checkpoint.drop()
    say(Event("finished", "base", "clean", seconds=outcome.seconds))
    return blob
