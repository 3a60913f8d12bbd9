"""A few passes of a segmentation network before anything is trained: each fault is one sentence that says what to do.

Letters of shapes: B images, K classes, H and W the image's size.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gearnn_ray.config.recipe import BaseRecipe
from gearnn_ray.core.errors import UserError
from gearnn_ray.models.layers import network_state, set_training_mode
from gearnn_ray.models.segmenter import logits_of
from gearnn_ray.tasks.base import Image, Task, Window
from gearnn_ray.training.predict import Normalisation, Predictor, for_inference

_MULTIPLES = (8, 16, 32, 64, 128)  # what networks need sides to be multiples of, in practice


def try_segmenter(
    name: str, model: nn.Module, num_classes: int, normalisation: Normalisation, task: Task, image: Image, recipe: BaseRecipe
) -> None:
    """Let the network answer a validation image [H, W, 3] and two training crops of it, and check the form, classes and size of
    the answer, that it does not depend on the other image of a batch, and that a batch can be trained on. Leaves the weights as
    they are. Raises UserError.
    """
    forward = Predictor(for_inference(model), normalisation)
    crop = Window(0, 0, *task.crop_size([image.shape], recipe.crop), mirrored=False)
    x_2CHW = _pixels(crop.of(image), crop.of(image)[:, ::-1])
    with torch.no_grad():
        for x_BCHW, what in ((_pixels(image), "a validation image"), (x_2CHW[:1], "a training crop")):
            _check_logits(name, _answer(name, forward, x_BCHW, f"{what} of {_size(x_BCHW)}"), num_classes, x_BCHW)
        _check_batch(name, forward, x_2CHW, task)
        _check_training(name, model, forward, x_2CHW, recipe)


def _pixels(*images: Image) -> Tensor:
    """uint8 [B, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _size(x_BCHW: Tensor) -> str:
    return f"{x_BCHW.shape[-1]}x{x_BCHW.shape[-2]}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _answer(name: str, forward: Predictor, x_BCHW: Tensor, what: str) -> Tensor:
    try:
        raw = forward(x_BCHW)
    except Exception as error:  # of a network of the user's own, anything
        multiple = _needed_multiple(forward, x_BCHW)
        expected = "expected a network for segmentation that takes images of this size"
        advice = f", or give --model.pad-to {multiple}, with which it does" if multiple else ""
        raise UserError(f"the network {name} fails on {what} ({_reason(error)}): {expected}{advice}") from error
    try:
        return logits_of(raw)
    except UserError as error:
        raise UserError(f"{name} is no network for segmentation: {error}") from error


def _needed_multiple(forward: Predictor, x_BCHW: Tensor) -> int | None:
    """The least multiple such that the network takes sides of odd multiples of it, at least as long as these."""
    for multiple in _MULTIPLES:
        height, width = (multiple * (-(-side // multiple) | 1) for side in x_BCHW.shape[-2:])
        try:
            logits_of(forward(x_BCHW.new_zeros(1, 3, height, width)))
        except Exception:
            continue
        return multiple
    return None


def _check_logits(name: str, logits: Tensor, num_classes: int, x_BCHW: Tensor) -> None:
    shape, images = list(logits.shape), len(x_BCHW)
    if logits.dim() == 2:
        raise UserError(f"the network {name} classifies whole images (its answer is {shape}): give one for segmentation")
    if logits.dim() != 4 or shape[0] != images or not logits.is_floating_point():
        raise UserError(
            f"the network {name} answers {images} images with {str(logits.dtype).removeprefix('torch.')} {shape}: expected "
            f"logits [{images}, {num_classes}, h, w], the scores of the classes at each position"
        )
    if shape[1] != num_classes:
        raise UserError(
            f"the network {name} has {shape[1]} classes and the data {num_classes}: build it with as many (a function gets them "
            "as num_classes), or correct data.num_classes"
        )
    tall, wide = (side / shown for side, shown in zip(x_BCHW.shape[-2:], shape[-2:], strict=True))
    if max(tall, wide) > 1.5 * min(tall, wide):
        raise UserError(
            f"the network {name} answers an image of {_size(x_BCHW)} with logits of {shape[3]}x{shape[2]}: expected about the "
            "same shape, so look whether height and width are exchanged"
        )


def _check_batch(name: str, forward: Predictor, x_2CHW: Tensor, task: Task) -> None:
    try:
        both = logits_of(forward(x_2CHW))
    except Exception as error:
        raise UserError(
            f"the network {name} takes one image, but not two ({_reason(error)}): expected images [B, 3, H, W] for any B"
        ) from error
    alone = logits_of(forward(x_2CHW[:1]))
    if both.shape[1:] != alone.shape[1:] or len(both) != 2:
        raise UserError(f"the network {name} answers a batch of two with {list(both.shape)} and one with {list(alone.shape)}")
    finite = bool(torch.isfinite(both).all())
    if finite and not task.close(both[:1].float(), alone.float()):
        raise UserError(
            f"the answer of the network {name} to an image depends on what else is in its batch, or changes from call to call: "
            "expected neither in evaluation mode, so look for a batch normalisation without running statistics, for dropout that "
            "is never off, or for operations over the first dimension"
        )


def _check_training(name: str, model: nn.Module, forward: Predictor, x_2CHW: Tensor, recipe: BaseRecipe) -> None:
    """One pass in training mode, whose running statistics are taken back."""
    before: Mapping[str, Any] = network_state(model)
    x_BCHW = x_2CHW[: recipe.batch_size]
    try:
        set_training_mode(model, None)
        logits_of(forward(x_BCHW))
    except Exception as error:
        advice = "give --recipe.batch-size 2 or more" if len(x_BCHW) == 1 else "expected a network that can be trained"
        raise UserError(
            f"the network {name} fails in training mode on a batch of {len(x_BCHW)} crops of {_size(x_BCHW)} ({_reason(error)}): "
            f"{advice}"
        ) from error
    finally:
        model.load_state_dict(before, strict=False)
        for_inference(model)
