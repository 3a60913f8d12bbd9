"""The base network: the user's weights, or trained here; in the store before any level starts. Knows nothing of Ray."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gearnn_ray.config.recipe import PAPERS, BaseRecipe, Criterion, Recipe
from gearnn_ray.config.split import ModelConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Emit
from gearnn_ray.data.cache import level_images
from gearnn_ray.data.dataset import Dataset
from gearnn_ray.levels.level import CLEAN
from gearnn_ray.models.detector import has_its_own_size
from gearnn_ray.models.layers import frozen_norms, layers_of, network_state
from gearnn_ray.models.libraries import resolved
from gearnn_ray.models.weights import digest_of_weights, load_weights, read_weights, start_from
from gearnn_ray.offline.job_spec import Network, level_data, stage_key
from gearnn_ray.offline.network_check import try_segmenter
from gearnn_ray.offline.records import BaseResult, Execution
from gearnn_ray.offline.stage_cache import StageCache
from gearnn_ray.store.blobs import Blob
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks import task_by_name
from gearnn_ray.training.predict import Normalisation, Predictor, for_inference, image_at_size, predict_image
from gearnn_ray.training.teacher import check_teacher
from gearnn_ray.training.trainer import fine_tune

_IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # used to train torchvision's and DRN's networks


@dataclass(frozen=True)
class NetworkFacts:
    """What the driver must know of the network without holding it."""

    floats: int
    smallest_layer: int

    def least_budget(self, criterion: Criterion) -> int:
        """A smaller budget, in floats, fits no layer; with storage formats that shows only when layers are selected."""
        return self.smallest_layer if criterion.storage_formats == PAPERS.storage_formats else 1


def network_of(model: ModelConfig, num_classes: int, task: str) -> Network:
    """The network of a configuration, normalised as the options, else its weights file, else the folder of transformers that it
    is from, else ImageNet's statistics say.
    """
    found = resolved(model.name, model.arguments)
    if model.mean is not None and model.std is not None:
        normalisation = Normalisation(model.mean, model.std)
    else:
        about = {**found.about, **(read_weights(model.weights).about if model.weights else {})}
        normalisation = _stated_normalisation(about) or _IMAGENET
    return Network(found.name, num_classes, normalisation, task, found.arguments, pad_to=model.pad_to)


class SeveralSizesError(UserError):
    """The training images have no one size."""


def training_size(data: Dataset, cache: str) -> tuple[int, int]:
    """Height and width of the undistorted training images. Raises SeveralSizesError."""
    sizes = Counter((shape[0], shape[1]) for shape in level_images(data.train, CLEAN, Path(cache).expanduser()).shapes)
    if len(sizes) > 1:
        (height, width), count = sizes.most_common(1)[0]
        raise SeveralSizesError(
            f"the training images have {len(sizes)} sizes, {width}x{height} in {count} of {len(data.train)}, and model.input "
            "training-size needs one to which all frames are scaled: give images of one size, or own-size"
        )
    return next(iter(sizes))


def _stated_normalisation(about: Mapping[str, Any]) -> Normalisation | None:
    mean, std = _triple(about.get("mean")), _triple(about.get("std"))
    return Normalisation(mean, std) if mean and std and min(std) > 0 else None


def _triple(value: object) -> tuple[float, float, float] | None:
    if isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value):
        return float(value[0]), float(value[1]), float(value[2])
    return None


def check_network(
    network: Network, weights: str | None, start: str | None = None, data: Dataset | None = None, recipe: Recipe | None = None
) -> NetworkFacts:
    """Build the network and load its weights, or those that its training starts from, and let it predict one validation image of
    `data`, and teach a copy of itself if the recipe asks for it, to see that all of it works. Raises UserError.
    """
    model = _network_from_weights(network, weights)
    if start is not None:
        start_from(model, read_weights(start), start)
    if frozen := frozen_norms(model):
        raise UserError(
            f"the network {network.name} has {len(frozen)} frozen batch normalisations, the first at {frozen[0]}, which no "
            "fine-tune can move: build it with norm_layer=torch.nn.BatchNorm2d"
        )
    if network.input_size is not None and has_its_own_size(model):
        raise UserError(
            f"model.input is training-size and the network {network.name} itself scales images of any size to one of its own: "
            "leave model.input out"
        )
    layers = layers_of(model)
    if not layers:
        raise UserError(f"the network {network.name} has no floating-point tensors: give one with weights to adapt")
    if data is not None:
        _try_on_an_image(network, model, data, recipe or Recipe())
    return NetworkFacts(sum(layer.numel for layer in layers), min(layer.numel for layer in layers))


def _try_on_an_image(network: Network, model: nn.Module, data: Dataset, recipe: Recipe) -> None:
    """Predict and judge the first validation image, and compute the loss on it."""
    task, image, target = task_by_name(network.task), data.val.image(0), data.val.target(0)
    task.check(image, target, network.num_classes, f"val sample {data.val.ids[0]!r}")
    if network.input_size is not None:
        image = image_at_size(image, network.input_size)
        image, target = task.augment(image, target, network.input_size, np.array([0.0, 0.0, 0.5]))  # all of it, not mirrored
    if network.task == "segmentation":
        try_segmenter(network.name, model, network.num_classes, network.normalisation, task, image, recipe)
    predictor = Predictor(for_inference(model), network.normalisation)
    try:
        prediction = predict_image(task, predictor, image, torch.device("cpu"))
        task.evidence(prediction, target, image.shape[:2], network.num_classes)
        with torch.no_grad():
            task.losses(predictor, task.collate([(image, target)]))
        if recipe.objective != "labels":
            check_teacher(task, model, network.normalisation, recipe, image, target, network.name)
    except UserError:
        raise
    except Exception as error:  # of a network of the user's own, anything
        size, reason = f"{image.shape[1]}x{image.shape[0]}", " ".join(str(error).split())
        raise UserError(
            f"the network {network.name} fails on a validation image of {size} ({type(error).__name__}: {reason[:300]}): "
            f"expected a network for {network.task} that takes images of this size"
        ) from error


def _network_from_weights(network: Network, weights: str | None) -> nn.Module:
    model = network.build()
    if weights is not None:
        load_weights(model, read_weights(weights), weights)
    return model


def publish_given_base(store: str, network: Network, weights: str) -> Blob:
    """Put the base from the user's weights file into the store."""
    return Store(store).put_state(network_state(_network_from_weights(network, weights)))


def train_base(
    store: str,
    cache: str,
    network: Network,
    start: str | None,
    data: Dataset,
    recipe: BaseRecipe,
    seed: int,
    execution: Execution,
    emit: Emit,
) -> Blob:
    """Train the base on the undistorted images from a seeded initialisation, or from the weights in the file `start`, and put it
    into the store.
    """
    key = stage_key(
        "base",
        network=replace(network, input_size=None).inputs(),  # undistorted training images have one size, or none is given
        train=data.train.digest,
        recipe=recipe.inputs(),
        seed=seed,
        execution=asdict(execution),
        task_version=task_by_name(network.task).version,
        **({} if start is None else {"start": digest_of_weights(start)}),
    )
    stages = StageCache(Store(store), "clean", emit)

    def train() -> BaseResult:
        torch.manual_seed(seed)
        model = network.build()
        if start is not None:
            start_from(model, read_weights(start), start)
        model.to(execution.device)
        task = task_by_name(network.task)
        images, targets = level_data(data, task, "train", "clean", cache)
        outcome = fine_tune(
            task, model, images, targets, recipe, network.normalisation, execution.precision,
            chosen=None, seed=seed, checkpoint=stages.checkpoint(key, "base"), progress=stages.progress("base"),
        )  # fmt: skip
        blob = stages.store.put_state(network_state(model))
        return BaseResult(blob.digest, blob.bytes, outcome.seconds)

    result = stages.result(BaseResult, key, train, lambda base: stages.store.is_intact(base.digest))
    return Blob(digest=result.digest, bytes=result.bytes)
