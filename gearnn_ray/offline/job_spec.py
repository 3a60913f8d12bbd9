"""The job spec, which is complete before the first level starts and holds no weights, and the keys of stages. Knows no Ray."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gearnn_ray.config.recipe import PAPERS, PER_LEVEL, Coupling, Criterion, Recipe
from gearnn_ray.data.cache import answered_targets, level_images, split_targets
from gearnn_ray.data.dataset import Dataset
from gearnn_ray.levels.level import CLEAN, parse_level
from gearnn_ray.models.registry import Argument, build_model
from gearnn_ray.offline.records import Execution
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks import agreement, task_by_name
from gearnn_ray.tasks.base import Image, Task
from gearnn_ray.training.predict import Normalisation, Predictor, for_inference, image_at_size, predict_image
from gearnn_ray.training.sampling import AtSize
from gearnn_ray.training.teacher import Teacher

Part = Literal["train", "val"]

KEY_VERSION = 2
"""Part of every stage key: raised whenever a stage would compute something else from the same inputs."""


@dataclass(frozen=True)
class Network:
    """Which network, for which task, how its input is normalised, with which arguments it is built, to multiples of which number
    of pixels its images are padded, and to which height and width its images are scaled before (None: they are fed at their own).
    """

    name: str
    num_classes: int
    normalisation: Normalisation
    task: str = "segmentation"
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    pad_to: int | None = None
    input_size: tuple[int, int] | None = None

    def build(self) -> nn.Module:
        """The network, freshly initialised."""
        return build_model(self.name, self.num_classes, self.arguments, self.pad_to)

    def inputs(self) -> dict[str, Any]:
        """What stage keys hash of it."""
        later = ("arguments", "pad_to", "input_size")
        return {name: value for name, value in asdict(self).items() if name not in later or value}

    def fitted(self, images: Sequence[Image]) -> Sequence[Image]:
        """Images as the network sees them."""
        return images if self.input_size is None else AtSize(images, self.input_size)


@dataclass(frozen=True)
class JobSpec:
    """What all levels of a job share. base: digest of the base's blob. budget: M in floats, of each adaptor; with the problem
    one-memory, of all together. sensitivity_epochs: epochs of full fine-tuning before layers are selected; 0: one step along the
    gradient at the base; None: all. held_back: share of the training images by which budgets up to M are tried; 0: none is.
    keep_full: also store full fine-tunes. world_size: workers per fine-tune.
    """

    store: str
    cache: str
    network: Network
    data: Dataset
    base: str
    recipe: Recipe
    budget: int
    seed: int
    execution: Execution
    keep_full: bool = False
    world_size: int = 1
    criterion: Criterion = PAPERS
    coupling: Coupling = PER_LEVEL
    sensitivity_epochs: float | None = None
    held_back: float = 0.0

    @property
    def task(self) -> Task:
        task = task_by_name(self.network.task)
        return task if self.data.labelled else agreement(task)

    @property
    def keeps_full(self) -> bool:
        """Whether fully fine-tuned weights go into the store."""
        return self.keep_full or self.criterion.needs_weights

    @property
    def device(self) -> torch.device:
        return torch.device(self.execution.device)

    def training_data(self, level: str) -> tuple[Sequence[Image], Sequence[Any]]:
        """Images of a level and their targets to train on; made here where this node does not have them yet. Without labels, the
        targets are the base's own answers to the undistorted images.
        """
        return self._level_data("train", level)

    def validation_data(self, level: str) -> tuple[Sequence[Image], Sequence[Any]]:
        return self._level_data("val", level)

    def teacher(self, base: Callable[[], nn.Module]) -> Teacher | None:
        """The teacher of the job's fine-tunes; None where they learn from labels alone. base: makes a copy of the base, on the
        job's device, that nothing else trains.
        """
        if self.recipe.objective == "labels":
            return None
        images = self.network.fitted(level_images(self.data.train, CLEAN, Path(self.cache).expanduser()))
        return Teacher(self.task, base(), images, self.recipe, self.network.normalisation, self.execution.precision)

    def _level_data(self, part: Part, level: str) -> tuple[Sequence[Image], Sequence[Any]]:
        if self.data.labelled:
            images, targets = level_data(self.data, self.task, part, level, self.cache)
            return self.network.fitted(images), targets
        split, folder = getattr(self.data, part), Path(self.cache).expanduser()
        by_base = self.key("answers", split=split.digest)
        images = self.network.fitted(level_images(split, parse_level(level), folder))
        return images, answered_targets(split, by_base, self._answers, folder, self.task)

    def _answers(self, images: Iterable[Image]) -> Iterator[Any]:
        """The base's own answers to undistorted images, as targets."""
        model = for_inference(self.network.build().to(self.device))
        model.load_state_dict(Store(self.store).get_state(self.base))
        predictor = Predictor(model, self.network.normalisation, self.execution.precision)
        for image in (image_at_size(each, self.network.input_size) for each in images):
            yield self.task.target_of(predict_image(self.task, predictor, image, self.device), image.shape[:2])

    def key(self, stage: str, **inputs: Any) -> str:
        """The key of a stage that depends on base, network and execution, and on these inputs."""
        shared = {"base": self.base, "network": self.network.inputs(), "execution": asdict(self.execution)}
        return stage_key(stage, task_version=self.task.version, **shared, **inputs)


def level_data(data: Dataset, task: Task, part: Part, level: str, cache: str) -> tuple[Sequence[Image], Sequence[Any]]:
    """One level's images of one split and their targets, from this node's cache or made now. Raises UserError."""
    split, folder = getattr(data, part), Path(cache).expanduser()
    return level_images(split, parse_level(level), folder), split_targets(split, data.num_classes, folder, task)


def stage_key(stage: str, **inputs: Any) -> str:
    """64 hex digits: SHA-256 of the canonical JSON of everything that the stage's result depends on."""
    text = json.dumps({"stage": stage, "version": KEY_VERSION, **inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
