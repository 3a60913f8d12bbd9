"""Which spatial frequencies of an image a network's loss depends on (§3.1.2, Figs. 3, 4, 6, 7).

An inverse DCT over 8×8 blocks, as in JPEG, is put in front of the network. The gradient of the loss with respect to a DCT
coefficient is then how strongly the network responds to that frequency. Knows nothing of levels or methods.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gearnn_ray.core.errors import UserError
from gearnn_ray.tasks.base import Image, Task, loss_of
from gearnn_ray.training.predict import Normalisation, Predictor

BLOCK = 8


def dct_matrix() -> Tensor:
    """Orthonormal DCT-II, float64 [8, 8] = [frequency, position]."""
    frequency, position = torch.arange(BLOCK, dtype=torch.float64)[:, None], torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos(math.pi / BLOCK * (position + 0.5) * frequency) * math.sqrt(2 / BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix


def block_dct(x_BCHW: Tensor) -> Tensor:
    """DCT coefficients [B, C, H/8, W/8, 8, 8] = [..., vertical, horizontal frequency], in units of x.

    Sides are multiples of 8. Differentiable.
    """
    B, C, H, W = x_BCHW.shape
    blocks = x_BCHW.reshape(B, C, H // BLOCK, BLOCK, W // BLOCK, BLOCK).transpose(3, 4)
    dct = dct_matrix().to(x_BCHW)
    return dct @ blocks @ dct.T


def inverse_block_dct(coefficients: Tensor) -> Tensor:
    """x_BCHW from its coefficients [B, C, H/8, W/8, 8, 8], the inverse of `block_dct`. Differentiable."""
    B, C, h, w = coefficients.shape[:4]
    dct = dct_matrix().to(coefficients)
    return (dct.T @ coefficients @ dct).transpose(3, 4).reshape(B, C, h * BLOCK, w * BLOCK)


def frequency_response(
    task: Task, model: nn.Module, images: Sequence[Image], targets: Sequence[Any], normalisation: Normalisation
) -> NDArray[np.float64]:
    """Mean |d loss / d coefficient| [8, 8] = [vertical, horizontal frequency], over blocks, channels, then images.

    images: uint8 [H, W, 3], cropped with their targets at the right and the bottom to whole blocks. Coefficients are those of
    pixel values from 0 to 255. The loss is the task's, of each image alone, in evaluation mode and float32. The network is left
    as it was. Raises UserError if there is no image, or if one is smaller than a block.
    """
    if not images:
        raise UserError("there is no image to measure a frequency response on: give at least one.")
    device = next(model.parameters()).device
    forward = Predictor(model, normalisation, memory_format=None)
    modes = {module: module.training for module in model.modules()}
    total = torch.zeros(BLOCK, BLOCK, dtype=torch.float64)
    model.eval()
    try:
        for image, target in zip(images, targets, strict=True):
            batch = task.collate([_whole_blocks(task, image, target)]).to(device)
            coefficients = block_dct(batch.images.float()).requires_grad_()
            loss = loss_of(task.losses(forward, replace(batch, images=inverse_block_dct(coefficients))))
            # with respect to the coefficients alone: parameters neither get a gradient nor need to be frozen
            (gradient,) = torch.autograd.grad(loss, coefficients)
            total += gradient.abs().mean((0, 1, 2, 3), dtype=torch.float64).cpu()
    finally:
        for module, training in modes.items():
            module.training = training
    response: NDArray[np.float64] = (total / len(images)).numpy()
    return response


def _whole_blocks(task: Task, image: Image, target: Any) -> tuple[Image, Any]:
    """The largest upper left part with sides of whole blocks."""
    height, width = image.shape[:2]
    if min(height, width) < BLOCK:
        raise UserError(
            f"an image is {width} × {height} pixels: a frequency response needs at least {BLOCK} × {BLOCK}, so leave it out."
        )
    sides = (height // BLOCK * BLOCK, width // BLOCK * BLOCK)
    return task.augment(image, target, sides, np.array([0.0, 0.0, 0.5]))


def high_frequency_share(response: NDArray[np.float64]) -> float:
    """Share of the total magnitude at vertical + horizontal frequency >= 8, 0 to 1; 0 if all magnitudes are 0."""
    total = float(response.sum())
    high = np.add.outer(np.arange(BLOCK), np.arange(BLOCK)) >= BLOCK
    return float(response[high].sum()) / total if total else 0.0


def similarity(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Cosine similarity of two maps [8, 8], or of two differences of maps, -1 to 1; 0 if one of them is all zero."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norms if norms else 0.0
