"""The base as a teacher: a network at a distorted image learns what the base answers to the same image without distortion.

The base answers the window that a training step crops, at each step anew: one more forward pass without gradient. Answers to
whole images could be kept, but they differ from those to a crop, which has other surroundings at its edges. So the distance is 0,
to the bit, where nothing is distorted and the network is the base in evaluation mode.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.core.errors import UserError
from gearnn_ray.models.layers import network_state
from gearnn_ray.models.lesson import Lesson
from gearnn_ray.tasks.base import Batch, Image, Task, tensors_of
from gearnn_ray.training.predict import Normalisation, Predictor, for_inference

_SAME = 1e-3  # share of the largest answer by which two passes may differ


class Teacher:
    """Gives each batch its lesson.

    base: a copy that nothing else trains; it is put into evaluation mode. images: the undistorted training images, in the order
    of the distorted ones. recipe: its objective, temperature and weight. Raises UserError for a network that cannot teach.
    """

    def __init__(
        self, task: Task, base: nn.Module, images: Sequence[Image], recipe: Recipe, normalisation: Normalisation, precision: str
    ) -> None:
        for_inference(base)
        self.images = images
        self.is_alone = recipe.objective == "teacher"
        """whether labels are not used"""
        self._task, self._recipe = task, recipe
        self._forward = Predictor(task.teacher(base), normalisation, precision)

    def teach(self, batch: Batch) -> Batch:
        """The batch with its lesson in place of the undistorted images."""
        with torch.no_grad():
            answers = self._task.answers(self._forward, batch)
        lesson = Lesson(answers, self._recipe.temperature, self._recipe.teacher_weight, with_labels=not self.is_alone)
        return replace(batch, undistorted=None, lesson=lesson)


def teaching(teacher: Teacher | None) -> Callable[[Batch], Batch]:
    """`Teacher.teach`, or without a teacher the batch as it is."""
    return (lambda batch: batch) if teacher is None else teacher.teach


def check_teacher(
    task: Task, base: nn.Module, normalisation: Normalisation, recipe: Recipe, image: Image, target: Any, name: str
) -> None:
    """Raise UserError unless the network can teach, answers an image twice alike, and can be taught. name: of the network."""
    teacher = Teacher(task, base, [image], recipe, normalisation, "float32")
    forward, before = Predictor(base, normalisation), network_state(base)
    batch = replace(task.collate([(image, target)]), undistorted=tensors_of([image]))
    first, second = (teacher.teach(batch) for _ in range(2))
    moved = any(not torch.equal(tensor, before[key]) for key, tensor in network_state(base).items())
    if moved or not _same(first, second):
        reason = "its running statistics move" if moved else "two passes over one image give different answers"
        raise UserError(
            f"the network {name} is a teacher that disagrees with itself, because {reason} in evaluation mode: make dropout and "
            "normalisations follow `training`, or choose recipe.objective labels"
        )
    with torch.no_grad():
        task.losses(forward, first)


def _same(first: Batch, second: Batch) -> bool:
    assert first.lesson is not None
    assert second.lesson is not None
    pairs = zip(tree_leaves(first.lesson.answers), tree_leaves(second.lesson.answers), strict=True)
    return all(_close(a, b) for a, b in pairs if isinstance(a, Tensor))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=_SAME * float(a.abs().max()))
