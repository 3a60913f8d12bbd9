"""The share of two levels' networks in a mixture, from how certain each of them is of the frame itself (DaWin).

Oh, Li, Song, Yun and Han, "DaWin: Training-free Dynamic Weight Interpolation for Robust Adaptation", ICLR 2025, section 3: an
input x is answered by the weights (1 - λ) θ0 + λ θ1 with

    λ(x) = exp(-H1) / (exp(-H0) + exp(-H1)),

where H0 and H1 are the entropies of both networks' answers to x (`Task.uncertainty`). The paper's offset and its clusters of λ
are left out, because they are fitted to a whole test set. Instead λ is smoothed over a stream and rounded to `STEPS`, so that a
calm stream uses the same merged weights in frame after frame.

Both networks see a smaller copy of the frame (`smaller`), because their answers only need to be compared; docs/log.md has how
much λ differs there. Knows nothing about tables, releases or estimation; a level is a name.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gearnn_ray.tasks.base import Task

STEPS = 32
"""Shares are multiples of 1 / STEPS. Coarser ones would hide most of what entropies say: neighbouring levels' differ little."""

_MEMORY = 8  # frames: time constant of a stream's mean share
_STREAMS = 4096  # means that are remembered; the least recently used one is dropped
_STRIDE = 32  # pixels; the largest one of most networks


def entropy_share(own: float, neighbours: float) -> float:
    """λ, the neighbour's share, from the entropies in nats of the level's own answer and the neighbour's.

    From 0 to 1; 1/2 if an entropy is not a number, or both are infinite.
    """
    difference = own - neighbours
    return 0.5 if math.isnan(difference) else 0.5 + 0.5 * math.tanh(difference / 2)  # exp(-H) alone could overflow


def in_steps(share: float) -> float:
    """The nearest multiple of 1 / STEPS below 1: a level always has a part in its own mixture."""
    return min(round(share * STEPS), STEPS - 1) / STEPS


def smaller(x_BCHW: Tensor) -> Tensor:
    """Images at half of each side, a quarter of the cost: each pixel the mean of those that it covers.

    A side that is a multiple of a power of two remains one, up to 32, because networks with strides may need it. Still smaller
    copies would lose what small objects look like, and a window would show only a part of the scene.
    """
    height, width = (_half(side) for side in x_BCHW.shape[-2:])
    return F.interpolate(x_BCHW, size=(height, width), mode="area")


def _half(side: int) -> int:
    stride = math.gcd(side, _STRIDE)
    return stride * math.ceil(side / (2 * stride))


def uncertainties(task: Task, network: Callable[[Tensor], Any], x_BCHW: Tensor, whole: bool) -> list[float]:
    """How unsure a network is of each of its answers to normalised images, in nats, measured on smaller copies.

    whole: measured on the images themselves. Networks that scale all images to a size of their own need this: they would only
    enlarge the copies again, at the same cost. A network that fails on the copies, because it takes images of one size only, sees
    the images themselves, too.
    """

    def of(x_BCHW: Tensor) -> list[float]:
        return [task.uncertainty(prediction) for prediction in task.outputs(network(x_BCHW))]

    if not whole:
        with suppress(Exception):
            return of(smaller(x_BCHW))
    return of(x_BCHW)


class StreamShares:
    """The mean share of each stream and pair of levels over the last frames. Not safe for several threads at once."""

    def __init__(self) -> None:
        self._means: OrderedDict[tuple[str, str, str], float] = OrderedDict()

    def add(self, share: float, level: str, neighbour: str, stream: str | None) -> float:
        """The neighbour's share for the next frame of a stream, in steps; without a stream, the frame's own.

        It does not matter which of the two is the level: a frame that crosses the middle between both changes nothing.
        """
        if stream is None:
            return in_steps(share)
        first, second = sorted((level, neighbour))
        own = share if second == neighbour else 1 - share  # of the second
        key = (stream, first, second)
        mean = self._means.pop(key, own)
        mean += (own - mean) / _MEMORY
        self._means[key] = mean
        if len(self._means) > _STREAMS:
            self._means.popitem(last=False)
        return in_steps(mean if second == neighbour else 1 - mean)
