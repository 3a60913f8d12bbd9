"""The job spec, which is complete before the first level starts and holds no weights, and the keys of stages. Knows no Ray."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gearnn_ray.config.recipe import PAPERS, PER_LEVEL, Coupling, Criterion, Recipe
from gearnn_ray.data.cache import level_images, split_targets
from gearnn_ray.data.dataset import Dataset
from gearnn_ray.levels.level import parse_level
from gearnn_ray.models.registry import Argument, build_model
from gearnn_ray.offline.records import Execution
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import Image, Task
from gearnn_ray.training.predict import Normalisation

KEY_VERSION = 2
"""Part of every stage key: raised whenever a stage would compute something else from the same inputs."""


@dataclass(frozen=True)
class Network:
    """Which network, for which task, how its input is normalised, and with which arguments it is built."""

    name: str
    num_classes: int
    normalisation: Normalisation
    task: str = "segmentation"
    arguments: Mapping[str, Argument] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network, freshly initialised."""
        return build_model(self.name, self.num_classes, self.arguments)

    def inputs(self) -> dict[str, Any]:
        """What stage keys hash of it."""
        return {name: value for name, value in asdict(self).items() if name != "arguments" or value}


@dataclass(frozen=True)
class JobSpec:
    """What all levels of a job share. base: digest of the base's blob. budget: M in floats, of each adaptor; with the problem
    one-memory, of all together. sensitivity_epochs: epochs of full fine-tuning before layers are selected; 0: one step along the
    gradient at the base; None: all. keep_full: also store full fine-tunes. world_size: workers per fine-tune.
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

    @property
    def task(self) -> Task:
        return task_by_name(self.network.task)

    @property
    def keeps_full(self) -> bool:
        """Whether fully fine-tuned weights go into the store."""
        return self.keep_full or self.criterion.needs_weights

    @property
    def device(self) -> torch.device:
        return torch.device(self.execution.device)

    def training_data(self, level: str) -> tuple[Sequence[Image], Sequence[Any]]:
        """Images of a level and their targets to train on; made here where this node does not have them yet."""
        return level_data(self.data, self.task, "train", level, self.cache)

    def validation_data(self, level: str) -> tuple[Sequence[Image], Sequence[Any]]:
        return level_data(self.data, self.task, "val", level, self.cache)

    def key(self, stage: str, **inputs: Any) -> str:
        """The key of a stage that depends on base, network and execution, and on these inputs."""
        shared = {"base": self.base, "network": self.network.inputs(), "execution": asdict(self.execution)}
        return stage_key(stage, task_version=self.task.version, **shared, **inputs)


def level_data(
    data: Dataset, task: Task, part: Literal["train", "val"], level: str, cache: str
) -> tuple[Sequence[Image], Sequence[Any]]:
    """One level's images of one split and their targets, from this node's cache or made now. Raises UserError."""
    split, folder = getattr(data, part), Path(cache).expanduser()
    return level_images(split, parse_level(level), folder), split_targets(split, data.num_classes, folder, task)


def stage_key(stage: str, **inputs: Any) -> str:
    """64 hex digits: SHA-256 of the canonical JSON of everything that the stage's result depends on."""
    text = json.dumps({"stage": stage, "version": KEY_VERSION, **inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
