"""How a network is fine-tuned and its layers chosen, as a job is told it and a release remembers it. Imports no torch."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Recipe(BaseModel):
    """How a network is fine-tuned: SGD on random crops, as in DRN's recipe (§4 of the paper leaves it open)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(4, ge=1)
    """passes over the training images"""
    learning_rate: float = Field(0.01, gt=0)
    """SGD's step at the start"""
    schedule: Literal["linear", "constant"] = "linear"
    """linear: the learning rate falls to zero over all steps; constant: the paper's"""
    batch_size: int = Field(8, ge=1)
    """images per step"""
    crop: int = Field(208, ge=16)
    """side of the random training crop in pixels of the level's images; smaller images are taken whole"""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum"""
    weight_decay: float = Field(1e-4, ge=0)
    """SGD's weight decay, on the trained tensors only"""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 autocast where the processor gains from it (AMX, CUDA from compute capability 8), else float32"""
    averaged: float = Field(0, ge=0, le=1)
    """share of the steps, the last ones, whose weights are averaged; 0: the last step's weights"""

    def inputs(self) -> dict[str, Any]:
        """What of it a stage's key has: all, but what came later and is as it was before it came."""
        return self.model_dump(exclude=None if self.averaged else {"averaged"})


Importance = Literal["mean-abs", "sum-abs", "l2", "relative", "first-order", "fisher"]
"""v_i^q by name: `gearnn_ray.offline.importance`."""


class Criterion(BaseModel):
    """What a layer is worth to a level, and in which forms it may be chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    importance: Importance = "mean-abs"
    """of its change Δ: mean |Δ| (Eq. 1), Σ |Δ|, |Δ|₂, |Δ|₂ / |w|₂, the first-order change of the loss |g·Δ|, or Σ F Δ²"""
    granularity: Literal["tensor", "module"] = "tensor"
    """what is chosen: tensors, or whole normalisations and convolutions with theirs"""
    storage_formats: tuple[str, ...] = ("float32",)
    """how a chosen layer may be stored: float32, bfloat16 or int8; the solver picks one for each"""
    against: Literal["base", "clean"] = "base"
    """what the fully fine-tuned weights are compared with: the base (Eq. 1), or the same fine-tune on undistorted images"""

    @field_validator("storage_formats")
    @classmethod
    def _known_codes(cls, storage_formats: tuple[str, ...]) -> tuple[str, ...]:
        unknown = next(
            (
                storage_format
                for storage_format in storage_formats
                if storage_format not in ("float32", "bfloat16", "int8")
            ),
            None,
        )
        if unknown is not None:
            raise ValueError(f"the code {unknown!r} is unknown: expected float32, bfloat16 or int8")
        if not storage_formats or len(set(storage_formats)) < len(storage_formats):
            raise ValueError(
                f"the codes {', '.join(storage_formats) or '(none)'} are no choice: expected at least one, each once"
            )
        return storage_formats

    @property
    def needs_gradients(self) -> bool:
        """Whether values take gradients at the base."""
        return self.importance in ("first-order", "fisher")

    @property
    def needs_weights(self) -> bool:
        """Whether the fully fine-tuned weights are looked at again, beyond the statistics of Eq. (1)."""
        plain = (self.storage_formats, self.granularity, self.against) == (("float32",), "tensor", "base")
        return self.needs_gradients or not plain

    def inputs(self) -> dict[str, Any]:
        """What of it a stage's key has: all, but what came later and is as it was before it came."""
        return self.model_dump(exclude={"against"} if self.against == "base" else None)


PAPERS = Criterion()
"""Eq. (1) and (2), layer by layer."""

Problem = Literal["per-level", "one-memory", "shared-layers", "few-layers", "few-adaptors"]
"""What the levels' values enter, by name: `gearnn_ray.offline.joint_selection`."""


class Coupling(BaseModel):
    """Which problem the levels' values enter: each level's own, or one of all levels together."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    problem: Problem = "per-level"
    """per-level (Eq. 2); or of all levels together: one-memory (the budget is that of all adaptors), shared-layers, few-layers,
    few-adaptors"""
    frequencies: dict[str, float] = {}
    """level and how often it occurs, as counts or shares, where levels are chosen together; default: 1 each"""
    distinct: int | None = Field(None, ge=1)
    """of few-layers: how many different layers all adaptors together may have"""
    adaptors: int | None = Field(None, ge=1)
    """of few-adaptors: how many adaptors serve all levels"""

    @model_validator(mode="after")
    def _what_its_problem_needs(self) -> Self:
        for option, problem in (("distinct", "few-layers"), ("adaptors", "few-adaptors")):
            given = getattr(self, option) is not None
            if given != (self.problem == problem):
                found = "is given" if given else "is not"
                do = f"leave it out or choose {problem}" if given else "give it"
                raise ValueError(f"selection.problem is {self.problem} and selection.{option} {found}: {do}")
        if self.frequencies and not self.is_joint:
            raise ValueError(
                "selection.frequencies is given and selection.problem per-level, which does not look at it: leave it out or "
                "choose another"
            )
        return self

    @field_validator("frequencies")
    @classmethod
    def _counts_or_shares(cls, frequencies: dict[str, float]) -> dict[str, float]:
        negative = next((level for level, often in frequencies.items() if often < 0), None)
        if negative is not None:
            raise ValueError(f"the frequency of {negative} is {frequencies[negative]:g}: expected 0 or more")
        return frequencies

    @property
    def is_joint(self) -> bool:
        """Whether levels are chosen together."""
        return self.problem != "per-level"


PER_LEVEL = Coupling()
"""Algorithm 1: every level by itself."""
