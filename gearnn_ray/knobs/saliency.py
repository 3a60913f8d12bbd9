"""Where a network's answer depends on the pixels: OneAdapt's DNNGrad (Du et al., SoCC 2023, Section 4.2), one backward pass.

The gradient is that of the task's utility by the pixel values, 0 to 255, of the frame that the server received.
"""

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from gearnn_ray.knobs.tiles import TILE, tile_means
from gearnn_ray.tasks.base import Forward, Image, Task


def gradient(
    task: Task, forward: Forward, image: Image, device: str | torch.device = "cpu", classes: Collection[int] = ()
) -> NDArray[np.float32]:
    """The change of `Task.utility` per unit of each pixel value [H, W, 3]; not finite where the network's is not.

    forward: a `training.predict.Predictor`, or `AdaptiveModel.forward_at` with the level of the frame. image: uint8 [H, W, 3].
    classes: those whose objects count; empty for all.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x_1CHW = torch.from_numpy(image.copy()).to(device).permute(2, 0, 1)[None].float().requires_grad_()
        (found,) = torch.autograd.grad(task.utility(forward, x_1CHW, classes), x_1CHW)
    pixels: NDArray[np.float32] = found[0].permute(1, 2, 0).float().cpu().numpy()
    return pixels


def saliency(
    task: Task, forward: Forward, image: Image, device: str | torch.device = "cpu", classes: Collection[int] = ()
) -> NDArray[np.float32]:
    """The magnitude of `gradient` in each tile, float32 [ceil(H / 16), ceil(W / 16)]: summed over the channels of a pixel, a mean
    over the pixels.
    """
    return tile_means(np.abs(gradient(task, forward, image, device, classes)).sum(-1))


def for_size(saliency: NDArray[np.float32], received: tuple[int, int], size: tuple[int, int]) -> NDArray[np.float32]:
    """The saliency of a frame that was received at another size (height, width), for the tiles of frames of this size.

    A pixel of the received frame is several of the frame's, which share its effect.
    """
    if received == size:
        return saliency
    rows, columns = (
        ((np.arange(-(-side // TILE)) + 0.5) * TILE / side * other / TILE).astype(np.int64).clip(max=tiles - 1)
        for side, other, tiles in zip(size, received, saliency.shape, strict=True)
    )
    share = np.float32(received[0] * received[1] / (size[0] * size[1]))
    weights: NDArray[np.float32] = saliency[rows[:, None], columns] * share
    return weights
