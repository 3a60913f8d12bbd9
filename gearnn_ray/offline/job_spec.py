"""What all levels of a job share: what is asked for, the keys of its stages, and its images.

Runs in any process; makes and trains no network. Knows nothing of Ray.
"""

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from gearnn_ray.config.recipe import PAPERS, PER_LEVEL, Coupling, Criterion, Recipe
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.data.cache import PackedImages, level_images, split_labels
from gearnn_ray.data.dataset import Dataset
from gearnn_ray.levels.level import parse_level
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks.segmentation import Normalisation
from gearnn_ray.training.trainer import Progress

STAGES_VERSION = 1
"""Part of every key: bumped whenever a stage would compute something else from the same inputs."""


@dataclass(frozen=True)
class Network:
    """Which network, and how its input is normalised."""

    name: str
    num_classes: int
    normalisation: Normalisation


@dataclass(frozen=True)
class JobSpec:
    """What all levels of a job share: small, picklable, without a single weight."""

    store: str
    cache: str
    network: Network
    data: Dataset
    recipe: Recipe
    budget: int
    seed: int
    keep_full: bool = False
    world_size: int = 1
    base: str = ""
    """digest of the base's blob"""
    criterion: Criterion = PAPERS
    coupling: Coupling = PER_LEVEL
    """the problem that the criterion's values enter; where levels are chosen together, `budget` is that problem's"""
    sensitivity_epochs: float | None = None
    """of the full fine-tune, after which layers are chosen; 0: a step along the gradient at the base; None: all of it"""

    @property
    def keeps_full(self) -> bool:
        """Whether fully fine-tuned weights go into the store."""
        return self.keep_full or self.criterion.needs_weights


def stage_key(stage: str, **inputs: Any) -> str:
    """64 hex digits: SHA-256 of the canonical JSON of everything the stage's result depends on."""
    text = json.dumps({"stage": stage, "version": STAGES_VERSION, **inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def device() -> torch.device:
    """The GPU this process was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class StoredCheckpoint:
    """An unfinished fine-tune's state, in the store: a node that is lost takes no finished epoch with it."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key

    def load(self) -> bytes | None:
        return self._store.get_checkpoint(self._key)

    def save(self, data: bytes) -> None:
        self._store.put_checkpoint(self._key, data)

    def drop(self) -> None:
        self._store.drop_checkpoint(self._key)


def progress_to(emit: Emit, stage: str, level: str) -> Callable[[Progress], None]:
    """What a fine-tune reports, as events of its stage."""

    def report(p: Progress) -> None:
        emit(Event("progress", stage, level, p.step, p.steps, p.epoch + 1, p.epochs, p.loss))

    return report


# ── the images ───────────────────────────────────────────────────────────────────────────────────────────────────


def training_data(spec: JobSpec, level: str) -> tuple[PackedImages, PackedImages]:
    """Images of a level and labels to train on; made here where this node has not got them yet."""
    return _data(spec, level, "train")


def validation_data(spec: JobSpec, level: str) -> tuple[PackedImages, PackedImages]:
    """Images of a level and labels to judge on."""
    return _data(spec, level, "val")


def _data(spec: JobSpec, level: str, split_name: Literal["train", "val"]) -> tuple[PackedImages, PackedImages]:
    split, cache = getattr(spec.data, split_name), Path(spec.cache).expanduser()
    return level_images(split, parse_level(level), cache), split_labels(split, spec.data.num_classes, cache)


def prepare_images(spec: JobSpec, level: str, split_name: Literal["train", "val"]) -> None:
    """Make one level's images of one split, and check every label, where this node has not done so before."""
    _data(spec, level, split_name)


@dataclass(frozen=True)
class ImageStatistics:
    """What a server compares its frames with, to see which level they have."""

    height: int
    width: int
    """of the most frequent size, in pixels"""
    luma: float
    """mean over the images of their mean Rec. 601 luma, 0 to 255"""
    luma_spread: float
    """standard deviation of the natural logarithm of an image's mean luma"""


_MEASURED_IMAGES = 200


def measure_images(spec: JobSpec, level: str) -> ImageStatistics:
    """Statistics of at most 200 training images of a level, evenly spaced. Equal images give equal numbers."""
    split, parsed = spec.data.train, parse_level(level)
    # undistorted images are read where they lie: no cache entry is made for a few of them
    read = split.image if parsed.is_clean else level_images(split, parsed, Path(spec.cache).expanduser()).__getitem__
    count = min(len(split), _MEASURED_IMAGES)
    sizes, lumas = Counter[tuple[int, int]](), list[float]()
    for index in range(count):
        image = Image.fromarray(read(index * len(split) // count))
        sizes[image.height, image.width] += 1
        lumas.append(float(np.asarray(image.convert("L")).mean()))
    (height, width), _ = sizes.most_common(1)[0]
    # a black image has no logarithm; below one step of 255 it is black. Rounded, because logarithms differ in the last
    # bit from machine to machine, and the same work makes the same manifest.
    spread = statistics.pstdev(math.log(max(luma, 1.0)) for luma in lumas)
    return ImageStatistics(height, width, round(statistics.fmean(lumas), 3), round(spread, 4))
