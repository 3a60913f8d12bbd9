"""What Ray reserves for one task, such as a fine-tune, or one server."""

from typing import Annotated

from pydantic import AfterValidator, Field

from gearnn_ray.config.checks import Section


def _fraction_or_whole(gpus: float) -> float:
    """Ray reserves a part of one GPU or several whole ones."""
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g} GPUs cannot be reserved: expected a fraction below 1 or a whole number")
    return gpus


Gpus = Annotated[float, AfterValidator(_fraction_or_whole)]


class TaskResources(Section):
    """What one task of a job gets."""

    cpus: float = Field(1, gt=0)
    """CPUs that a task reserves; torch uses as many threads"""
    gpus: Gpus = Field(0, ge=0)
    """GPUs that a task reserves; with 0.25 four tasks share one GPU"""
    retries: int = Field(3, ge=0)
    """how often a task is started again after its worker died or hung in one place; a fine-tune continues from its last
    checkpoint, and each new epoch begins the count anew"""


class ResourcesConfig(TaskResources):
    """What one fine-tune gets, and over how many workers it is spread."""

    workers_per_level: int = Field(1, ge=1)
    """workers that share one fine-tune, at most one per image of a step; above 1 run by Ray Train, each with these resources"""
