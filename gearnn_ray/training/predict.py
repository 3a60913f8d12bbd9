"""The forward pass of the whole package (`Predictor`), and one pass over images for many networks.

`at_size` is the one way in which frames are scaled to the size that a network was trained at (`model.input training-size`). It
comes before the `Predictor`, because training cuts crops, and only whole frames can be scaled: jobs read all images through
`training.sampling.AtSize`, and serving scales the frames of a batch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gearnn_ray.tasks.base import Image, Task
from gearnn_ray.training.precision import autocast

_SECONDS_BETWEEN_REPORTS = 1.0


@dataclass(frozen=True)
class Normalisation:
    """Per-channel (RGB) mean and standard deviation of pixel values in units of [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Pixel values from 0 to 255 [B, 3, H, W] to normalised float32."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=x_BCHW.device).mul_(255).view(1, 3, 1, 1)
        scale = torch.tensor(self.std, dtype=torch.float32, device=x_BCHW.device).mul_(255).reciprocal_().view(1, 3, 1, 1)
        return (x_BCHW.float() - mean) * scale

    def inverse(self, x_BCHW: Tensor) -> Tensor:
        """Normalised float to pixel values, uint8 [B, 3, H, W]."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=x_BCHW.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=x_BCHW.device).view(1, 3, 1, 1)
        return ((x_BCHW * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)


def at_size(x_BCHW: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Images at this size (height, width); None: as they are, and so are images of that size. Bilinear, and antialiased where
    images shrink, as torchvision's `Resize` is. Values of uint8 are rounded; others are not, and gradients flow through them.
    """
    if size is None or tuple(x_BCHW.shape[-2:]) == tuple(size):
        return x_BCHW
    scaled = F.interpolate(x_BCHW.float(), size=tuple(size), mode="bilinear", antialias=True)
    return scaled.round_().to(torch.uint8) if x_BCHW.dtype == torch.uint8 else scaled


def image_at_size(image: Image, size: tuple[int, int] | None) -> Image:
    """`at_size` of one image, uint8 [H, W, 3]."""
    if size is None or image.shape[:2] == tuple(size):
        return image
    x_1CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # a copy, because cached images are read-only
    scaled: Image = at_size(x_1CHW, size)[0].permute(1, 2, 0).contiguous().numpy()
    return scaled


@dataclass(frozen=True)
class Predictor:
    """A network and its input's needs: pixel values from 0 to 255, x_BCHW or a list of [3, H, W], to the network's raw output.
    What follows the images is handed on. precision: float32, or bfloat16 for torch's autocast. memory_format: None leaves the
    input's. Gradients and modes are the caller's.
    """

    network: Callable[..., Any]
    normalisation: Normalisation
    precision: str = "float32"
    memory_format: torch.memory_format | None = torch.channels_last

    def __call__(self, images: Tensor | list[Tensor], *more: Any) -> Any:
        if isinstance(images, list):
            each = [self.normalisation(image[None])[0] for image in images]
            with autocast(self.precision, each[0].device):
                return self.network(each, *more)
        return self.normalised(self.normalisation(images), *more)

    def normalised(self, x_BCHW: Tensor, *more: Any) -> Any:
        """The raw output for an input that is normalised already."""
        if self.memory_format is not None:
            x_BCHW = x_BCHW.contiguous(memory_format=self.memory_format)
        with autocast(self.precision, x_BCHW.device):
            return self.network(x_BCHW, *more)


def with_weights(model: nn.Module, change: Mapping[str, Tensor]) -> Callable[..., Any]:
    """`model` with some tensors in place of its own; nothing else is held twice."""
    state = {name: _channels_last(tensor) for name, tensor in change.items()}
    return lambda *inputs: functional_call(model, state, inputs, tie_weights=False)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def for_inference(model: nn.Module) -> nn.Module:
    """`model` itself, in evaluation mode and in the memory format that `Predictor` feeds it."""
    model.to(memory_format=torch.channels_last)
    return model.eval()


def predict_image(task: Task, predictor: Predictor, image: Image, device: torch.device) -> Any:
    """The task's prediction of one image, uint8 [H, W, 3]."""
    x_1CHW = torch.from_numpy(image[None].copy()).to(device).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return task.outputs(predictor(x_1CHW))[0]


def collect_evidence(
    task: Task,
    model: nn.Module,
    predictors: Sequence[Predictor],
    images: Sequence[Image],
    targets: Sequence[Any],
    num_classes: int,
    report: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Tensor]]:
    """The task's evidence [N, ...] of each predictor over whole images, in one pass, on the device of `model`, which is put into
    evaluation mode. report: gets the number of images done, about once a second.
    """
    for_inference(model)
    device = next(model.parameters()).device
    found: list[list[dict[str, Tensor]]] = [[] for _ in predictors]
    reported = time.perf_counter()
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        for predictor, own in zip(predictors, found, strict=True):
            own.append(task.evidence(predict_image(task, predictor, image, device), target, image.shape[:2], num_classes))
        if time.perf_counter() - reported > _SECONDS_BETWEEN_REPORTS:
            report(index + 1)
            reported = time.perf_counter()
    return [{name: torch.stack([each[name] for each in own]) for name in own[0]} for own in found]
