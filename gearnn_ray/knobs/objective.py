"""What an encoding costs in accuracy, estimated on the camera from pixels alone: OneAdapt's Σ |S · e|, and its rivals.

Each function takes the weights of tiles or pixels, the pristine frames and the frames as they are shown after encoding (uint8
[T, H, W, 3] both), and returns a loss that is 0 (or least) for equal frames and grows with the harm. Only differences between
losses of one function mean anything.
"""

import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.knobs.controller import Outcome
from gearnn_ray.knobs.tiles import tile_sums

Frames = NDArray[np.uint8]  # RGB [T, H, W, 3]
Weights = NDArray[np.float32]
ProbeLoss = Callable[[Weights, Frames, Frames], float]

_MOST_DB = 100.0  # PSNR of equal frames
_WINDOW = 8  # pixels: the side of the windows of SSIM
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # Wang et al. 2004
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def outcome(
    loss: ProbeLoss, weights: Weights, pristine: Frames, shown: Frames, size: int, deployed: Frames | None = None
) -> Outcome | None:
    """What an encoding of `size` bytes costs; of a probe None if it shows the pixels of the `deployed` encoding."""
    if deployed is not None and np.array_equal(shown, deployed):
        return None
    return Outcome(loss(weights, pristine, shown), 8 * size)


def probe_loss(saliency: Weights, pristine: Frames, shown: Frames) -> float:
    """Σ |S · e|, a mean over the frames, in units of the utility. saliency: `saliency.saliency`, [ceil(H / 16), ceil(W / 16)]."""
    return float((saliency * tile_errors(pristine, shown)).sum())


def tile_errors(pristine: Frames, shown: Frames) -> NDArray[np.float32]:
    """The sum of |e| in each tile [ceil(H / 16), ceil(W / 16)], a mean over channels and frames."""
    return tile_sums(_error(pristine, shown).mean(-1))


def signed_loss(gradient: Weights, pristine: Frames, shown: Frames) -> float:
    """-⟨g, e⟩, the chain rule: how far the utility falls to first order, a mean over the frames. gradient: [H, W, 3]."""
    return -float(np.mean([np.vdot(gradient, each.astype(np.float32) - own) for own, each in zip(pristine, shown, strict=True)]))


def pixel_loss(_: Weights, pristine: Frames, shown: Frames) -> float:
    """The mean of |e|, in units of pixel values. Needs no network."""
    return float(_error(pristine, shown).mean())


def psnr_loss(_: Weights, pristine: Frames, shown: Frames) -> float:
    """100 dB less the peak signal-to-noise ratio of all frames together."""
    squared = np.mean([np.square(each.astype(np.float32) - own).mean() for own, each in zip(pristine, shown, strict=True)])
    return float(_MOST_DB - min(10 * np.log10(255**2 / max(squared, 1e-12)), _MOST_DB))


def ssim_loss(_: Weights, pristine: Frames, shown: Frames) -> float:
    """1 less the structural similarity (Wang et al. 2004) of the brightness, in windows of 8 x 8 pixels side by side."""
    return 1 - float(np.mean([_ssim(own @ _LUMA, each @ _LUMA) for own, each in zip(pristine, shown, strict=True)]))


def random_loss(_: Weights, pristine: Frames, shown: Frames) -> float:
    """A number from 0 to 1 that depends on nothing but chance; the same for the same frames."""
    return float(np.random.default_rng(zlib.crc32(shown.tobytes())).random())


LOSSES: dict[str, ProbeLoss] = {
    "saliency": probe_loss,
    "signed": signed_loss,
    "pixels": pixel_loss,
    "psnr": psnr_loss,
    "ssim": ssim_loss,
    "random": random_loss,
}
"""By name. `saliency` takes the weights of tiles, `signed` those of pixels, and the others none."""


def _error(pristine: Frames, shown: Frames) -> NDArray[np.float32]:
    """|e| [H, W, 3], a mean over the frames."""
    total = np.zeros(pristine.shape[1:], np.int64)
    for own, each in zip(pristine, shown, strict=True):
        total += np.abs(each.astype(np.int16) - own)
    return (total / len(pristine)).astype(np.float32)


def _ssim(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    height, width = (side - side % _WINDOW or side for side in a.shape)

    def means(values: NDArray[np.float32]) -> NDArray[np.float64]:
        rows, columns = (np.arange(0, side, _WINDOW) for side in (height, width))
        sums = np.add.reduceat(np.add.reduceat(values[:height, :width].astype(np.float64), rows, 0), columns, 1)
        return np.asarray(sums / (min(height, _WINDOW) * min(width, _WINDOW)))

    mean_a, mean_b = means(a), means(b)
    var_a, var_b, both = means(a * a) - mean_a**2, means(b * b) - mean_b**2, means(a * b) - mean_a * mean_b
    numerator, denominator = (2 * mean_a * mean_b + _C1) * (2 * both + _C2), (mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2)
    return float((numerator / denominator).mean())
