"""How a network is fine-tuned, as a job is told it and a release remembers it. Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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
