"""Tiles of 16 x 16 pixels, in which saliency and errors are counted. Needs no torch, which a camera does without."""

import numpy as np
from numpy.typing import NDArray

TILE = 16  # pixels: the side of a macroblock of H.264


def tile_sums(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Sums over tiles of 16 x 16 pixels [ceil(H / 16), ceil(W / 16)] of values [H, W]; tiles at the edge may have fewer."""
    rows, columns = (np.arange(0, side, TILE) for side in values.shape)
    sums: NDArray[np.float32] = np.add.reduceat(np.add.reduceat(values, rows, 0), columns, 1).astype(np.float32)
    return sums


def tile_means(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Means over tiles of 16 x 16 pixels [ceil(H / 16), ceil(W / 16)] of values [H, W]."""
    return tile_sums(values) / tile_sums(np.ones_like(values))


def tiles_of(size: tuple[int, int]) -> tuple[int, int]:
    """How many rows and columns of tiles a frame of this size (height, width) has."""
    height, width = size
    return -(-height // TILE), -(-width // TILE)
