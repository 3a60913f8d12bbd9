"""Which spatial frequencies of an image a network's loss depends on (§3.1.2, Figs. 3, 4, 6, 7).

An inverse DCT over 8×8 blocks, as JPEG has it, stands in front of the network; the gradient of the loss by every DCT
coefficient says how much the network looks at that frequency. Knows nothing of levels or methods.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gearnn_ray.core.errors import UserError
from gearnn_ray.tasks.segmentation import Image, logits_of, loss_of, resize_label

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
    """x_BCHW from its coefficients [B, C, H/8, W/8, 8, 8], as `block_dct` gives them. Differentiable."""
    B, C, h, w = coefficients.shape[:4]
    dct = dct_matrix().to(coefficients)
    return (dct.T @ coefficients @ dct).transpose(3, 4).reshape(B, C, h * BLOCK, w * BLOCK)


def frequency_response(
    model: nn.Module,
    images: Sequence[Image],
    labels: Sequence[Image],
    normalisation: Callable[[Tensor], Tensor],
    batch_size: int = 1,
) -> NDArray[np.float64]:
    """Mean |d loss / d coefficient| [8, 8] = [vertical, horizontal frequency], over blocks, channels, then images.

    images: uint8 [H, W, 3], labels: uint8 [H', W'], cropped at right and bottom to whole blocks. Coefficients are of pixels
    in 0 to 255, the loss is each image's own mean cross-entropy in evaluation mode and float32 (0 for an image without a
    label). Consecutive images of equal size share a batch, which changes nothing but speed; the network is left as it was.
    Raises UserError where there is no image, or one is smaller than a block.
    """
    if not images:
        raise UserError("there is no image to measure a frequency response on: give at least one.")
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    total = torch.zeros(BLOCK, BLOCK, dtype=torch.float64)
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            for x, y in _batches(images, labels, batch_size):
                coefficients = block_dct(x.to(device).float()).requires_grad_()
                logits = logits_of(model, normalisation(inverse_block_dct(coefficients)))
                # each image's own mean: dividing by the batch's labelled pixels would tie the images together
                pairs = zip(logits, y.to(device), strict=True)
                loss = torch.stack([loss_of(own[None], label[None]) for own, label in pairs]).sum()
                # by the coefficients alone: parameters neither get a gradient nor need to be frozen
                (gradient,) = torch.autograd.grad(loss, coefficients)
                total += gradient.abs().mean((1, 2, 3), dtype=torch.float64).sum(0).cpu()
    finally:
        for module, training in modes.items():
            module.training = training
    response: NDArray[np.float64] = (total / len(images)).numpy()
    return response


def _batches(images: Sequence[Image], labels: Sequence[Image], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x_BCHW uint8 and y_BHW int64 of whole blocks, in order."""
    pairs = (_whole_blocks(image, label) for image, label in zip(images, labels, strict=True))
    for _, group in itertools.groupby(pairs, key=lambda pair: pair[0].shape):
        while batch := list(itertools.islice(group, size)):
            x, y = (torch.from_numpy(np.stack(part)) for part in zip(*batch, strict=True))
            yield x.permute(0, 3, 1, 2), y.long()


def _whole_blocks(image: Image, label: Image) -> tuple[Image, Image]:
    height, width = image.shape[:2]
    if min(height, width) < BLOCK:
        raise UserError(
            f"an image is {width} × {height} pixels: a frequency response needs at least {BLOCK} × {BLOCK}, so leave it out."
        )
    window = (slice(height // BLOCK * BLOCK), slice(width // BLOCK * BLOCK))
    return image[window], resize_label(label, height, width)[window]


def high_frequency_share(response: NDArray[np.float64]) -> float:
    """Share of the total magnitude at vertical + horizontal frequency >= 8, 0 to 1; 0 where there is no magnitude."""
    total = float(response.sum())
    high = np.add.outer(np.arange(BLOCK), np.arange(BLOCK)) >= BLOCK
    return float(response[high].sum()) / total if total else 0.0


def similarity(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Cosine similarity of two maps [8, 8], or of two differences of maps, -1 to 1; 0 where one of them is all zero."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norms if norms else 0.0
