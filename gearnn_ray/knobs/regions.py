"""Quality per region: each tile of 16 × 16 pixels gets the quantisation that its score is worth, chosen in closed form.

The objective Σ_tiles |S · e_q| + μ · bytes_q is a sum over tiles, so that its least value has each tile at its own best q
(OneAdapt, Du et al., SoCC 2023, for knobs of macroblocks). One encoding of the segment per q tells errors and bytes of all tiles.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.knobs.settings import Image, Settings
from gearnn_ray.knobs.tiles import tile_sums

__all__ = ["Regions", "choose_tiles", "tile_bytes", "tile_energy"]


@dataclass(frozen=True)
class Regions:
    """A knob whose values are offsets of the quantisation parameter, the best (usually 0) first.

    tiles: which of the values each tile has at most, [h, w] as from `choose_tiles`; None: the last one everywhere. The knob's
    value is a bound: at the last one every tile has its own of `tiles`, at the first one all tiles have that one.
    Without `tiles` a value is the offset of all tiles, which is the encoding that `choose_tiles` needs of each of them.
    """

    values: tuple[int | float | str, ...]
    tiles: tuple[tuple[int, ...], ...] | None = None
    name: str = "regions"

    def planned(self, tiles: NDArray[np.integer]) -> "Regions":
        """This knob with other tiles [h, w], of indices of its values."""
        return replace(self, tiles=tuple(tuple(map(int, row)) for row in tiles))

    def encode(self, value: int | float | str, settings: Settings) -> Settings:
        offsets = np.array(self.values, np.float64)
        tiles = [[len(offsets) - 1]] if self.tiles is None else self.tiles
        return settings.with_tiles(np.minimum(offsets[np.array(tiles)], float(value)))


def choose_tiles(scores_q: NDArray[np.floating], bytes_q: NDArray[np.floating], mu: float) -> NDArray[np.intp]:
    """The index of each tile's best quality [h, w], which minimises Σ scores + μ · bytes; the first of equal ones.

    scores_q [Q, h, w]: Σ |S · e_q| of each quality. bytes_q [Q, h, w]: of each tile, see `tile_bytes`. mu: what a byte costs.
    Raises ValueError for arrays of different shapes or with values that are not finite.
    """
    if scores_q.shape != bytes_q.shape or scores_q.ndim != 3:
        raise ValueError(f"scores have the shape {scores_q.shape} and bytes {bytes_q.shape}: expected [Q, h, w] of both")
    costs = scores_q.astype(np.float64) + mu * bytes_q
    if not np.isfinite(costs).all():
        raise ValueError("scores, bytes and mu must be finite")
    return np.asarray(costs.argmin(0))


def tile_energy(frames: Sequence[Image]) -> NDArray[np.float32]:
    """What an encoder has to describe in each tile [h, w]: in the first frame how far pixels differ from the ones to the left and
    above, in each later frame from the frame before. Sums of absolute differences of the brightness.
    """
    planes = [frame.mean(-1, dtype=np.float32) for frame in frames]
    first = planes[0]
    changes = np.abs(np.diff(first, axis=0, prepend=first[:1])) + np.abs(np.diff(first, axis=1, prepend=first[:, :1]))
    for before, plane in itertools.pairwise(planes):
        changes += np.abs(plane - before)
    return tile_sums(changes)


def tile_bytes(sizes_q: Sequence[int], energy: NDArray[np.floating]) -> NDArray[np.float64]:
    """Bytes of each tile at each quality [Q, h, w]. x264 does not tell them, so the bytes of the whole segment at each quality,
    `sizes_q`, are spread over its tiles in proportion to their `tile_energy` [h, w].
    """
    total = float(energy.sum())
    share = energy / total if total > 0 else np.full(energy.shape, 1 / energy.size)
    return np.asarray(np.array(sizes_q, np.float64)[:, None, None] * share)
