"""How a network is fine-tuned and how its layers are selected: the configuration, which a release also records."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from gearnn_ray.config.checks import Section

Objective = Literal["labels", "teacher", "both"]
"""What a fine-tune minimises."""


class BaseRecipe(Section):
    """How a network is trained: SGD on random crops, as in DRN's recipe (§4 of the paper leaves it open)."""

    epochs: int = Field(4, ge=1)
    """passes over the training images"""
    learning_rate: float = Field(0.01, gt=0)
    """SGD's learning rate in the first step"""
    schedule: Literal["linear", "constant"] = "linear"
    """linear: the learning rate falls to zero over all steps; constant: it stays, as in the paper"""
    warm_up: int = Field(0, ge=0)
    """steps over which the learning rate first rises to that"""
    clip: float | None = Field(None, gt=0)
    """longest gradient, as the norm over all trained tensors; a longer one is scaled down to it; default: never"""
    batch_size: int = Field(8, ge=1)
    """images per step"""
    crop: int = Field(208, ge=16)
    """side of the random training crop, in pixels of the level's images; smaller images are used whole"""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum"""
    weight_decay: float = Field(1e-4, ge=0)
    """SGD's weight decay, applied to the trained tensors only"""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """bfloat16 (autocast) or float32; auto: bfloat16 if every node's processor multiplies in it (AMX, AVX512_BF16, or CUDA from
    compute capability 8), else float32; resolved once per job"""
    averaged: float = Field(0, ge=0, le=1)
    """share of the steps, counted from the last, whose weights are averaged; 0: the last step's weights are used"""

    def inputs(self) -> dict[str, object]:
        """Fields hashed into a stage's key. The precision is hashed apart, as the job resolved it."""
        return self.model_dump(exclude={"precision"})


class Recipe(BaseRecipe):
    """How the network of a level is fine-tuned, and what it learns from."""

    objective: Objective = "labels"
    """what fine-tunes minimise: labels, the task's loss; teacher, the distance to the base's own answers to the undistorted
    images, which needs no labels; both, their sum"""
    teacher_weight: float = Field(1, gt=0)
    """factor of the distance to the base's answers where recipe.objective is both"""
    temperature: float = Field(1, gt=0)
    """divides the logits of both networks before they are compared; a higher one gives unlikely classes more weight"""

    @model_validator(mode="after")
    def _options_of_the_objective(self) -> Self:
        if self.teacher_weight != 1 and self.objective != "both":
            raise ValueError(f"teacher_weight is given and objective is {self.objective}: leave it out, or choose both")
        if self.temperature != 1 and self.objective == "labels":
            raise ValueError("temperature is given and objective is labels: leave it out, or choose teacher or both")
        return self

    def inputs(self) -> dict[str, object]:
        """As of `BaseRecipe`. Fields added later are omitted while they have their default."""
        later = {"objective", "teacher_weight", "temperature"}
        return {name: value for name, value in super().inputs().items() if name not in later or self.objective != "labels"}


Importance = Literal["mean-abs", "sum-abs", "l2", "relative", "first-order", "fisher"]
"""Measures of v_i^q by name: see `gearnn_ray.offline.importance`."""

StorageFormat = Literal["float32", "bfloat16", "int8"]
"""How a selected layer is stored: see `gearnn_ray.adaptors.storage_formats`."""


class Criterion(Section):
    """How important a layer is to a level, and in which formats it may be stored."""

    importance: Importance = "mean-abs"
    """measure of a layer's importance, from its change Δ: mean |Δ| (Eq. 1), Σ |Δ|, |Δ|₂, |Δ|₂ / |w|₂, the first-order change of
    the loss |g·Δ|, or Σ F Δ² with the Fisher information F"""
    granularity: Literal["tensor", "module"] = "tensor"
    """what is selected as one: a tensor, or all tensors of a convolution or normalisation"""
    storage_formats: tuple[StorageFormat, ...] = ("float32",)
    """formats that a selected layer may be stored in; the solver picks one per layer"""
    against: Literal["base", "clean"] = "base"
    """what the fully fine-tuned weights are compared with: the base (Eq. 1), or the same fine-tune on undistorted images"""

    @field_validator("storage_formats")
    @classmethod
    def _each_format_once(cls, formats: tuple[StorageFormat, ...]) -> tuple[StorageFormat, ...]:
        if not formats or len(set(formats)) < len(formats):
            raise ValueError(f"the storage formats {', '.join(formats) or '(none)'} are given: expected at least one, each once")
        return formats

    @property
    def needs_gradients(self) -> bool:
        """Whether the importance is computed from gradients at the base."""
        return self.importance in ("first-order", "fisher")

    @property
    def needs_weights(self) -> bool:
        """Whether the fully fine-tuned weights are needed, beyond the statistics of Eq. (1)."""
        plain = (self.storage_formats, self.granularity, self.against) == (("float32",), "tensor", "base")
        return self.needs_gradients or not plain


PAPERS = Criterion()
"""Eq. (1) and (2), layer by layer."""

Problem = Literal["per-level", "one-memory", "shared-layers"]
"""Which selection problem is solved, by name: see `gearnn_ray.offline.joint_selection`."""


class Coupling(Section):
    """Whether layers are selected for each level alone or for all levels in one problem."""

    problem: Problem = "per-level"
    """per-level: each level alone (Eq. 2); one-memory: all adaptors share one budget; shared-layers: all adaptors have the same
    layers"""
    frequencies: dict[str, float] = Field(default_factory=dict)
    """how often each level occurs, as counts or shares, for joint problems; default: all levels occur equally often"""

    @field_validator("frequencies")
    @classmethod
    def _counts_or_shares(cls, frequencies: dict[str, float]) -> dict[str, float]:
        negative = next((level for level, often in frequencies.items() if often < 0), None)
        if negative is not None:
            raise ValueError(f"the frequency of {negative} is {frequencies[negative]:g}: expected 0 or more")
        return frequencies

    @model_validator(mode="after")
    def _frequencies_of_a_joint_problem(self) -> Self:
        if self.frequencies and not self.is_joint:
            raise ValueError(
                "selection.frequencies is given and selection.problem per-level, which does not use it: leave it out or choose "
                "one-memory or shared-layers"
            )
        return self

    @property
    def is_joint(self) -> bool:
        """Whether one problem selects the layers of all levels."""
        return self.problem != "per-level"


PER_LEVEL = Coupling()
"""Algorithm 1: every level alone."""
