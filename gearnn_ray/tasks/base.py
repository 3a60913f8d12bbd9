"""What differs between segmentation and other tasks: one protocol, which every other room goes through.

A task knows targets, losses and metrics, but no levels, layers, store or Ray. It sees the network through a `Forward`. Shapes:
x_BCHW pixel values from 0 to 255 (uint8 or float32), weights_RN how often resample R holds image N.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gearnn_ray.models.lesson import Lesson

Image = NDArray[np.uint8]  # RGB [H, W, 3]
# images to the network's raw output, for example a `training.predict.Predictor`; what follows them is handed on to the network
Forward = Callable[..., Any]


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss on this process: the loss is the quotient of both sums over all processes."""

    sum: Tensor  # differentiable scalar
    count: Tensor  # number of items (pixels, boxes) in the sum: a scalar without gradient


@dataclass(frozen=True)
class Batch:
    """Images and their targets, in the form that the task's losses take. undistorted: the same windows of the undistorted images,
    of their own size. lesson: what the base answers to these, where a loss compares with it.
    """

    images: Any  # uint8 [B, 3, H, W]; of a task whose networks take images of different sizes also a list of [3, H, W]
    targets: Any
    undistorted: Any = None  # as the images
    lesson: Lesson | None = None

    def to(self, device: torch.device) -> "Batch":
        def moved(tensors: Any) -> Any:
            return tensors.to(device, non_blocking=True)

        images, undistorted = (
            [moved(each) for each in side] if isinstance(side, list) else None if side is None else moved(side)
            for side in (self.images, self.undistorted)
        )
        targets = None if self.targets is None else moved(self.targets)
        return replace(self, images=images, targets=targets, undistorted=undistorted)


@dataclass(frozen=True)
class Window:
    """The part of an image that a training crop shows, in pixels, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool

    @classmethod
    def drawn(cls, size: tuple[int, ...], crop: tuple[int, int], draws: NDArray[np.float64]) -> "Window":
        """A random window of `crop`, or the whole of a smaller side. size: of the image. draws: as `Task.augment` gets them."""
        height, width = (min(side, whole) for side, whole in zip(crop, size, strict=False))
        top, left = int(draws[0] * (size[0] - height + 1)), int(draws[1] * (size[1] - width + 1))
        return cls(top, left, height, width, bool(draws[2] < 0.5))

    def scaled(self, size: tuple[int, ...], other: tuple[int, ...]) -> "Window":
        """The same part of the image at another size, to the pixel. Windows of one size stay windows of one size."""
        height, width = (-(-side * b // a) for side, a, b in zip((self.height, self.width), size, other, strict=False))
        top, left = min(self.top * other[0] // size[0], other[0] - height), min(self.left * other[1] // size[1], other[1] - width)
        return replace(self, top=top, left=left, height=height, width=width)

    def of(self, pixels: Image) -> Image:
        """What it shows of an image [H, W, 3] or a label map [H, W]."""
        part = pixels[self.top : self.top + self.height, self.left : self.left + self.width]
        return part[:, ::-1] if self.mirrored else part


def tensors_of(images: Sequence[Image]) -> Tensor | list[Tensor]:
    """uint8 x_BCHW where the images have one size, else a list of [3, H, W]."""
    tensors = [torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1) for image in images]  # cached ones are read-only
    return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors


@dataclass(frozen=True)
class Served:
    """What a service knows of one answer beside the prediction.

    frame: its pixels. class_names: by class id, possibly empty. facts: level, found, distance, release and milliseconds, as JSON
    values. least_score: from 0 to 1, below which the client wants no detection; None leaves that to the task.
    """

    frame: Image
    class_names: tuple[str, ...]
    facts: Mapping[str, object]
    least_score: float | None = None


class Task(Protocol):
    """A vision task. `name` and `version` stand in manifests and stage keys; `version` is raised when the same data would give
    other losses or scores. Metrics are percentages from 0 to 100; the first one is optimised, and a job prints those of `shown`
    that it has. has_stability: whether `stability_losses` is there. stored_as: names the stored targets in keys of the cache.
    media_types: of the answers of a service, the default first. exported: names of what `tensors` gives.
    """

    name: str
    version: int
    metrics: tuple[str, ...]
    shown: tuple[str, ...]
    has_stability: bool
    stored_as: str
    media_types: tuple[str, ...]
    exported: tuple[str, ...]

    def check(self, image: Image, target: Any, num_classes: int, where: str) -> None:
        """Raise UserError, naming the sample (`where`), unless the target fits the image and the classes."""
        ...

    def store(self, target: Any) -> NDArray[np.uint8]:
        """A target as bytes [h, w], which the cache holds."""
        ...

    def restore(self, stored: NDArray[np.uint8]) -> Any:
        """The target that `store` was given."""
        ...

    def crop_size(self, shapes: Sequence[tuple[int, ...]], crop: int) -> tuple[int, int]:
        """Height and width of the training crop of images with these shapes; crop: the side that the recipe asks for."""
        ...

    def augment(self, image: Image, target: Any, crop: tuple[int, int], draws: NDArray[np.float64]) -> tuple[Image, Any]:
        """The training crop (height, width) of one sample. draws: three numbers in [0, 1) for top, left and flip (below 0.5)."""
        ...

    def collate(self, samples: Sequence[tuple[Image, Any]]) -> Batch:
        """Samples as one batch on the CPU."""
        ...

    def losses(self, forward: Forward, batch: Batch) -> dict[str, LossTerm]:
        """The terms of the training loss by name; each is 0 where its count is 0. With a lesson, the distance to its answers, and
        the loss on labels only if it says so.
        """
        ...

    def teacher(self, network: nn.Module) -> Callable[..., Any]:
        """What maps normalised images to the raw answers that another copy of the network can learn. Raises UserError for a
        network that has none.
        """
        ...

    def answers(self, teacher: Forward, batch: Batch) -> Any:
        """A teacher's answers to the undistorted images of a batch, as `losses` compares them."""
        ...

    def stability_losses(self, forward: Forward, batch: Batch, perturbed_BCHW: Tensor, alpha: float) -> dict[str, LossTerm]:
        """The loss of stability training (Zheng et al. 2016): the task's own, and `alpha` times the distance of the answers."""
        ...

    def outputs(self, raw: Any) -> Any:
        """What a network returned, in the task's one form; iterating over it gives the predictions of the single images."""
        ...

    def tensors(self, raw: Any) -> tuple[Tensor, ...]:
        """What a network returned as tensors with the images first, by `exported`: the outputs of a file for other runtimes.

        Raises UserError if the network returns anything else.
        """
        ...

    def at_frame_size(self, outputs: Any, height: int, width: int, seen: tuple[int, int] | None = None) -> Any:
        """Outputs in pixels of frames of this size. seen: height and width of the images that the network saw, if others."""
        ...

    def evidence(self, prediction: Any, target: Any, size: tuple[int, int], num_classes: int) -> dict[str, Tensor]:
        """What metrics are computed from, of one image: small tensors on the CPU, the same shapes for every image. size: height
        and width of the image that the network saw, which may be another than the target's.
        """
        ...

    def aggregate(self, evidence: Mapping[str, Tensor], weights_RN: NDArray[np.float64]) -> NDArray[np.float64]:
        """[R, metrics] in percent, from the evidence of N images ([N, ...] each) under R weightings of the images. The last
        metrics are left out where the evidence does not have them.
        """
        ...

    def first_metric(self, evidence: Mapping[str, Tensor], weights_RN: NDArray[np.float64]) -> NDArray[np.float64]:
        """The first column of `aggregate` [R], without the work for the others."""
        ...

    def target_summary(self, evidence: Mapping[str, Tensor]) -> NDArray[np.int64]:
        """[N, ...] that depends on the targets alone: equal for two methods judged on the same images."""
        ...

    def utility(self, forward: Forward, images_BCHW: Tensor, classes: Collection[int] = ()) -> Tensor:
        """How sure the network is of its answers to these images, summed over them: a scalar, differentiable by the pixels, that
        stands for accuracy where there are no labels (OneAdapt, Du et al. 2023). classes: those that count; empty for all.
        """
        ...

    def target_of(self, prediction: Any, size: tuple[int, int]) -> Any:
        """A network's own answer to an image of this size (height, width) as the target of other answers: what it is sure of."""
        ...

    def of_classes(self, evidence: Mapping[str, Tensor], classes: Collection[int]) -> dict[str, Tensor]:
        """The evidence of one image as if only these classes counted. Raises UserError for a task that judges all together."""
        ...

    def uncertainty(self, prediction: Any) -> float:
        """How unsure a network is of one image's prediction: an entropy in nats, 0 where it is certain. Comparable only between
        networks of one release that saw the same image.
        """
        ...

    def answer(self, prediction: Any) -> Any:
        """What a person is shown of one image's prediction."""
        ...

    def content(self, prediction: Any, media_type: str) -> Any:
        """What an answer of this type is made of: arrays in the memory of the host."""
        ...

    def answer_bytes(self, media_type: str, num_classes: int, height: int, width: int) -> int:
        """Size of an answer of this type to a frame of this size, as far as it does not depend on what is found."""
        ...

    def described(self, answer: Any, served: Served) -> dict[str, object]:
        """What `answer` gave, as JSON values."""
        ...

    def drawn(self, answer: Any, served: Served, scale: int = 1) -> Image:
        """The frame, `scale` times as large, with what `answer` gave drawn on it: RGB [scale·H, scale·W, 3]."""
        ...

    def encode(self, content: Any, media_type: str, served: Served) -> bytes:
        """The body of a service's answer, from what `content` gave for the same type."""
        ...

    def close(self, a: Any, b: Any) -> bool:
        """Whether two outputs of the same images are the same but for rounding. Outputs that cannot show it are not."""
        ...


def loss_of(terms: Mapping[str, LossTerm]) -> Tensor:
    """Σ_k sum_k / count_k, a differentiable scalar; a term without items is 0 (not NaN)."""
    quotients = [term.sum / term.count.clamp(min=1) for term in terms.values()]
    return torch.stack(quotients).sum() if len(quotients) > 1 else quotients[0]


def score(task: Task, evidence: Mapping[str, Tensor]) -> float:
    """The task's first metric over all images, in percent."""
    return next(iter(scores(task, evidence).values()))


def scores(task: Task, evidence: Mapping[str, Tensor]) -> dict[str, float]:
    """Every metric of the task over all images, in percent."""
    images = len(next(iter(evidence.values())))
    return dict(zip(task.metrics, map(float, task.aggregate(evidence, np.ones((1, images)))[0]), strict=False))


def scores_of_images(task: Task, evidence: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """The first metric of each image alone [N], in percent."""
    images = len(next(iter(evidence.values())))
    return task.first_metric(evidence, np.eye(images))
