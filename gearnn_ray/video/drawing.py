"""Draws what networks found on frames: one panel for each network, with a badge of level, bitrate and time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Panel", "enlargement", "side_by_side"]

_LEAST_HEIGHT = 360  # of a panel: text on smaller ones cannot be read
_STRIP = (0, 0, 0, 150)
_GAP = 4


@dataclass(frozen=True, eq=False)
class Panel:
    """A frame with a network's answer, RGB [H, W, 3], and what stands on it. head: at its top. foot: at its bottom."""

    picture: NDArray[np.uint8]
    head: str
    foot: str


def enlargement(height: int) -> int:
    """How many times as large a frame of this height is shown."""
    return max(1, -(-_LEAST_HEIGHT // height))


def side_by_side(panels: Sequence[Panel], height: int, width: int) -> NDArray[np.uint8]:
    """The panels beside each other, each fitted into `height` × `width` pixels, with their texts: RGB [height, W, 3]."""
    drawn = [_labelled(panel, height, width) for panel in panels]
    gap = np.zeros((height, _GAP, 3), np.uint8)
    return np.hstack([part for picture in drawn for part in (gap, picture)][1:])


def _labelled(panel: Panel, height: int, width: int) -> NDArray[np.uint8]:
    picture = Image.fromarray(panel.picture)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    font = _font(max(13, height // 22))
    strip = ImageDraw.Draw(picture, "RGBA")
    line = font.size + 8
    for text, top in ((panel.head, 0), (panel.foot, height - line)):
        if text:
            strip.rectangle((0, top, width, top + line), fill=_STRIP)
            strip.text((6, top + 2), text, font=font, fill=(255, 255, 255, 255))
    return np.asarray(picture)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # takes a second to import, and has a font with all letters

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
