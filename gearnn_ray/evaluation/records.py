"""What the stages of an evaluation leave in the store, what they hand on, and the rows of its tables. Plain values."""

from dataclasses import dataclass, field
from typing import Any, TypedDict

from gearnn_ray.offline.records import StageResult
from gearnn_ray.offline.sensitivity import Sensitivity
from gearnn_ray.tasks.base import Image


@dataclass(frozen=True)
class Weights(StageResult):
    """What a method stores for a level on top of the base. digest: of the blob, None where the method uses the base itself.

    floats: of four bytes each; an adaptor in other storage formats restores more numbers than this.
    """

    stage = "weights"
    digest: str | None = None
    floats: int = 0


Source = str | None | tuple[str | None, str | None]
"""What answers images: weights by their digest, None for the base itself, or two levels' that each image mixes by entropy."""


@dataclass(frozen=True)
class LayersResult(StageResult):
    """The layers that Auto-RGN trains, and multiples of the learning rate by parameter name."""

    stage = "layers"
    layers: tuple[str, ...]
    rates: dict[str, float]


@dataclass(frozen=True)
class TuningResult(StageResult):
    """The score of one learning rate in percent, on images that were not trained on; None where training diverged."""

    stage = "tuning"
    score: float | None


@dataclass(frozen=True)
class Evaluated(StageResult):
    """One set of weights on one level's validation images. score: percent. evidence: digest of the task's evidence [N, ...].
    others: the task's other metrics by name, percent.
    """

    stage = "evaluation"
    score: float
    evidence: str
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FrequencyResult(StageResult):
    """A frequency response: [8][8] = [vertical][horizontal frequency]."""

    stage = "frequency"
    response: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class MainWeights:
    """The main methods at one level and seed: the full fine-tune, and GearNN's adaptor by budget in floats.

    layers: those selected under the release's budget. sensitivity: Eq. (1) of the full fine-tune. Where levels are selected
    jointly, only the released adaptor exists, and only for the release's seed.
    """

    switching: Weights
    gearnn: dict[int, Weights]
    layers: tuple[str, ...]
    sensitivity: tuple[Sensitivity, ...]


@dataclass(frozen=True)
class Picture:
    """One image at one level, as both networks answer it.

    image: uint8 [H, W, 3]. target: the task's. original, adaptor: the task's answers (`Task.answer`). scores: percent, of this
    image alone (original, adaptor).
    """

    level: str
    sample: str
    image: Image
    target: Any
    original: Any
    adaptor: Any
    class_names: tuple[str, ...]
    scores: tuple[float, float]


class AccuracyRow(TypedDict):
    method: str
    level: str
    metric: str
    value: float
    seed: int
    floats: int
    release: str


class DifferenceRow(TypedDict):
    method: str
    level: str
    value: float
    low: float
    high: float
    seeds: int


class AverageRow(TypedDict):
    axis: str
    method: str
    levels: int
    average: float
    gearnn: float
    difference: float
    low: float
    high: float
    published: float | None


class MemoryRow(TypedDict):
    network: str
    method: str
    levels: int
    floats: int
    of_network: float
    kind: str


class TuningRow(TypedDict):
    method: str
    level: str
    learning_rate: float
    alpha: float | None
    sigma: float | None
    value: float | None
    chosen: bool


class BytesRow(TypedDict):
    method: str
    level: str
    budget: int | None
    floats: int
    value: float


class ChangeRow(TypedDict):
    level: str
    layer: str
    kind: str
    index: int
    numel: int
    mean_abs_change: float
    max_abs_change: float
    l2_change: float
    l2_weight: float
    share_above_2e_4: float
    selected: bool


class ShareRow(TypedDict):
    level: str
    by_layer: float
    by_weight: float


class FrequencyRow(TypedDict):
    network: str
    level: str
    vertical: int
    horizontal: int
    magnitude: float
