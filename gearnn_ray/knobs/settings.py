"""What a camera's encoder is told for one segment. Knobs change settings; `encoding.encode` obeys them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.levels.level import SIZE_CRF

Image = NDArray[np.uint8]  # RGB [H, W, 3]
Feature = Literal["pixel", "area", "edge"]


@dataclass(frozen=True)
class FrameFilter:
    """Send a frame only where it differs from the last one sent by at least `threshold`, a share of the frame's pixels from 0
    (every frame is sent) to 1. feature: what is compared, see `frame_filter`.
    """

    feature: Feature
    threshold: float


@dataclass(frozen=True)
class Settings:
    """Of one segment; equal settings of equal frames make equal bytes. Immutable, hashable, and small to send.

    crf: x264's constant rate factor, 0 (best) to 51. qp: a constant quantisation parameter instead of it. size: of the frames
    sent, as a factor of both sides or as (height, width) in pixels. every: one of so many frames may be sent. frame_filter: which
    of these are. tiles: offsets [h, w] of the quantisation parameter, positive for coarser, of tiles of 16 × 16 pixels of the
    pristine frames; the last row and column reach to the edge. preset: x264's. options: further ones by x264's names.
    jpeg_quality: 1 to 100; each frame is then a JPEG, and what is for H.264 does not matter. before: the user's own changes of a
    frame, from left to right, before it is scaled; they keep its size.
    """

    crf: float = SIZE_CRF
    qp: int | None = None
    size: float | tuple[int, int] = 1.0
    every: int = 1
    frame_filter: FrameFilter | None = None
    tiles: tuple[tuple[float, ...], ...] | None = None
    preset: str = "medium"
    options: tuple[tuple[str, str], ...] = ()
    jpeg_quality: int | None = None
    before: tuple[Callable[[Image], Image], ...] = ()

    def with_option(self, name: str, value: str) -> "Settings":
        """These settings, with one of x264's options set."""
        return replace(self, options=tuple(sorted({**dict(self.options), name: value}.items())))

    def with_tiles(self, offsets: NDArray[np.floating]) -> "Settings":
        """These settings, with offsets [h, w] of the quantisation parameter; offsets that are all 0 are none."""
        return replace(self, tiles=tuple(tuple(map(float, row)) for row in offsets) if np.any(offsets) else None)
