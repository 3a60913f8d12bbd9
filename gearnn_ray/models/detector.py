"""What a detector looks like to this package: torchvision's own convention, and a base class for single-stage detectors.

    detector(images)                   -> the objects found in each image
    detector(images, targets)          -> the terms of the training loss, in whatever mode the detector's modules are
    detector(images, targets, lesson)  -> also the terms of the distance to a teacher's answers; without targets, these alone

The last form, and the teacher's answers (`teacher_of`), are there if a detector can learn from its base without labels.

`images` are normalised: one tensor [B, 3, H, W], or tensors [3, H, W] of different sizes. All boxes are left, top, right and
bottom in pixels of the image. Letters of shapes: B images, D detections and G objects of one image, K classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearnn_ray.core.errors import UserError
from gearnn_ray.models.lesson import Lesson

Target = Mapping[str, Tensor]
"""The objects of one image: `boxes` float32 [G, 4], `labels` int64 [G] from 0, `masks` bool [G, H, W] if the data set has masks,
and `crowd` float32 [C, 4], the boxes of regions where a detection is neither right nor wrong."""

Found = dict[str, Tensor]
"""What was found in one image, or in B images side by side with one more dimension: `boxes` float32 [D, 4], `scores` float32 [D]
from 0 to 1, where 0 is an empty place, `labels` int64 [D] from 0, and `masks` float32 [D, 1, H, W] of a network that has them."""

Terms = dict[str, tuple[Tensor, Tensor]]
"""The terms of a loss: a sum over items, differentiable, and the number of items."""

_collected: ContextVar[list[Tensor] | None] = ContextVar("candidates", default=None)


@contextmanager
def collected_candidates() -> Iterator[list[Tensor]]:
    """Meanwhile, detectors that this thread calls add their candidates [..., N, K] to the list: the scores of all places and
    classes before the threshold and the suppression of overlaps, through which gradients flow to the pixels.
    """
    candidates: list[Tensor] = []
    token = _collected.set(candidates)
    try:
        yield candidates
    finally:
        _collected.reset(token)


def offer_candidates(scores: Callable[[], Tensor | None]) -> None:
    """Add candidates if they are collected; otherwise they are not computed. In a compiled graph they never are."""
    if torch.compiler.is_compiling() or (candidates := _collected.get()) is None:
        return
    if (found := scores()) is not None:
        candidates.append(found)


class SingleStageDetector(nn.Module):
    """A detector whose network computes all its answers in one pass. A subclass writes three methods, of which only `raw` may use
    weights: `raw` (the network), `decode` (raw tensors in, boxes out) and `losses`; if it drops detections, also `candidates`;
    and `imitation`, to learn from its base's answers without labels. They see one size of image, `input_size` (height, width) if
    it is set, to which images are then stretched bilinearly; boxes are converted.
    """

    input_size: tuple[int, int] | None = None

    def raw(self, x_BCHW: Tensor) -> Any:
        """The network's raw tensors, each with the images as its first dimension."""
        raise NotImplementedError

    def decode(self, raw: Any, height: int, width: int) -> Found:
        """The detections of B images of this size: `boxes` [B, D, 4], `scores` [B, D], `labels` [B, D]."""
        raise NotImplementedError

    def candidates(self, raw: Any) -> Tensor | None:
        """The scores [B, N, K] of all places and classes, before `decode` chooses. None: the scores of what it chose will do."""
        return None

    def losses(self, raw: Any, targets: Sequence[Target], height: int, width: int) -> Terms:
        """The terms of the training loss over these images."""
        raise NotImplementedError

    def imitation(self, raw: Any, taught: Any, temperature: float, height: int, width: int) -> Terms:
        """The terms of the distance from raw tensors of images of this size to the teacher's raw tensors `taught` of the same
        images without distortion. Without an `input_size` these may be larger images, whose raw tensors have more positions.
        """
        raise NotImplementedError

    def answers(self, images: Tensor | Sequence[Tensor]) -> Any:
        """The raw tensors of the images, as a teacher gives them."""
        return self.raw(self._fitted(images)[0])

    def forward(
        self, images: Tensor | Sequence[Tensor], targets: Sequence[Target] | None = None, lesson: Lesson | None = None
    ) -> Any:
        """What was found in the images, as one `Found` of B images; with targets or a lesson, the terms of the loss."""
        x_BCHW, scales_B4 = self._fitted(images)
        raw, (height, width) = self.raw(x_BCHW), x_BCHW.shape[-2:]
        terms: Terms = {}
        if targets is not None:
            fitted = [
                {**target, "boxes": target["boxes"] / scale, "crowd": target["crowd"] / scale}
                for target, scale in zip(targets, scales_B4, strict=True)
            ]
            terms |= self.losses(raw, fitted, height, width)
        if lesson is not None:
            taught = self.imitation(raw, lesson.answers, lesson.temperature, height, width)
            terms |= {f"teacher {name}": (lesson.weight * total, count) for name, (total, count) in taught.items()}
        if targets is not None or lesson is not None:
            return terms
        found = self.decode(raw, height, width)
        offer_candidates(lambda: self.candidates(raw))
        return {**found, "boxes": found["boxes"] * scales_B4[:, None]}

    def _fitted(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The images at the input's size, and by how much [B, 4] a box there is smaller than in the image."""
        batches = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        size = self.input_size or batches[0].shape[-2:]
        if self.input_size is None and any(batch.shape[-2:] != size for batch in batches):
            raise UserError(
                "a batch has images of different sizes, and the detector takes only equal ones: set its `input_size`, or give "
                "images of one size"
            )
        scales = [
            batch.new_tensor((batch.shape[-1] / size[1], batch.shape[-2] / size[0]) * 2).expand(batch.shape[0], 4)
            for batch in batches
        ]
        fitted = [batch if batch.shape[-2:] == size else stretched(batch, *size) for batch in batches]
        return (torch.cat(fitted), torch.cat(scales)) if len(batches) > 1 else (fitted[0], scales[0])


def teacher_of(network: nn.Module) -> Callable[..., Any]:
    """What maps normalised images to the detector's raw answers, which another copy of it learns. Raises UserError for a detector
    that cannot learn them.
    """
    answers: Callable[..., Any] | None = getattr(network, "answers", None)
    if answers is None or getattr(type(network), "imitation", None) is SingleStageDetector.imitation:
        raise UserError(
            f"the detector {type(network).__name__} has no dense answers that a copy of it could learn: choose recipe.objective "
            "labels, or write the method `imitation` of gearnn_ray.models.detector.SingleStageDetector"
        )
    return answers


def has_its_own_size(network: nn.Module) -> bool:
    """Whether the network scales images of any size to one of its own: by `input_size`, or by torchvision's transform."""
    return any(
        module.input_size is not None
        if isinstance(module, SingleStageDetector)
        else type(module).__name__ == "GeneralizedRCNNTransform"  # by name, because importing torchvision takes a while
        for module in network.modules()
    )


def stretched(x_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Images at another size, bilinearly and without antialiasing."""
    return F.interpolate(x_BCHW, size=(height, width), mode="bilinear", align_corners=False)
