"""How strongly a frame was compressed as JPEG, on libjpeg's scale of quality from 1 to 100.

Read exactly from the quantisation tables of a file, or estimated from the pixels where the file is gone. Knows
nothing about files, levels or networks.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["JpegQuality", "quality_of_pixels", "quality_of_tables"]

# What libjpeg scales: tables K.1 and K.2 of ITU-T T.81, row by row
_LUMA = """
    16 11 10 16  24  40  51  61    12 12 14 19  26  58  60  55    14 13 16 24  40  57  69  56
    14 17 22 29  51  87  80  62    18 22 37 56  68 109 103  77    24 35 55 64  81 104 113  92
    49 64 78 87 103 121 120 101    72 92 95 98 112 100 103  99
"""
_CHROMA = (
    """
    17 18 24 47  99  99  99  99    18 21 26 66  99  99  99  99    24 26 56 99  99  99  99  99
    47 66 99 99  99  99  99  99
"""
    + "99 " * 32
)

_VALUES = 512  # DCT coefficients from here on are too rare to be worth their rows of the histogram
_SMALLEST = 3  # below it a coefficient may be a zero that was rounded away from its place
_BLOCKS = 4096  # about so many tell as much as all of them
_NATS = 20  # of evidence, below which a few coefficients may have met a comb by chance

_Table = tuple[int, ...]


@dataclass(frozen=True)
class JpegQuality:
    """The libjpeg quality that comes closest to how a frame was compressed."""

    quality: int
    """1 (worst) to 100."""
    distance: float
    """0.0: these are exactly libjpeg's tables. Otherwise how far from them, in the units of whoever found it."""


def quality_of_tables(luma_64: Sequence[int], chroma_64: Sequence[int] | None) -> JpegQuality:
    """The quality whose libjpeg tables these are, or else the nearest one.

    Tables of 64 steps, row by row (as Pillow gives them; a file has them in zigzag order); `chroma_64` is None for
    grey images. Steps beyond 255, which baseline files cannot have, are as exact as those that stop there. The
    distance is the mean of |ln(step / libjpeg's step)| over all entries: 0.1 is about 10%.
    """
    luma, chroma = tuple(luma_64), None if chroma_64 is None else tuple(chroma_64)
    exact = _qualities().get((luma, chroma))
    return JpegQuality(exact, 0.0) if exact else _nearest(luma, chroma)


@functools.lru_cache(maxsize=256)  # a camera writes the same few tables into every frame
def _nearest(luma: _Table, chroma: _Table | None) -> JpegQuality:
    known = [pair for pair in _qualities() if (pair[1] is None) == (chroma is None)]
    known_QE = np.log([pair[0] + (pair[1] or ()) for pair in known])
    distances = np.abs(known_QE - np.log(np.maximum(luma + (chroma or ()), 1))).mean(1)
    nearest = int(np.argmin(distances))
    return JpegQuality(_qualities()[known[nearest]], float(distances[nearest]))


@functools.cache
def _qualities() -> dict[tuple[_Table, _Table | None], int]:
    """Quality by (luma, chroma) tables: of colour and grey files, with and without baseline's limit."""
    qualities: dict[tuple[_Table, _Table | None], int] = {}
    for quality in range(1, 101):
        for largest in (255, 32767):
            luma, chroma = (tuple(_scaled(base, quality, largest).tolist()) for base in (_LUMA, _CHROMA))
            qualities[luma, chroma] = qualities[luma, None] = quality
    return qualities


def _scaled(base: str, quality: int, largest: int) -> NDArray[np.int64]:
    """`jpeg_quality_scaling` and `jpeg_add_quant_table` of libjpeg's jcparam.c."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((np.array(base.split(), np.int64) * scale + 50) // 100, 1, largest)


def quality_of_pixels(pixels_HW3: NDArray[np.uint8]) -> JpegQuality | None:
    """The quality of the JPEG that these pixels, uint8 RGB, were decoded from; None where nothing speaks of one.

    Compression leaves the DCT coefficients of 8×8 blocks at multiples of their table's steps: a comb (Fan and
    de Queiroz, "Identification of bitmap compression history", 2003). Finds libjpeg's tables of quality 2 to 99
    whose combs explain the luma's AC coefficients best, by likelihood. The blocks must still lie where they were
    made: an image that was scaled since, cropped off the grid or compressed as video has no comb left, and one that
    was darkened or brightened since can show that of another quality. The distance is the share of the evidence
    expected of such a comb that is missing, from 0.0 to 0.5.
    """
    gain_VS, expected_S = _combs()
    steps_QK = _steps()
    blocks_N64 = _luma_blocks(pixels_HW3)
    positions = np.arange(63)
    # as many histograms as positions, filled in one go
    values_NK = np.rint(np.abs(_product(blocks_N64, _dct().T))).astype(np.int64)
    values_NK[values_NK >= _VALUES] = 0
    counts_KV = np.bincount((values_NK + _VALUES * positions).ravel(), minlength=63 * _VALUES).reshape(63, _VALUES)
    counts_KV[:, :_SMALLEST] = 0

    evidence_QK = _product(counts_KV.astype(np.float32), gain_VS)[positions, steps_QK]
    evidence_Q = evidence_QK.sum(1)
    best = int(evidence_Q.argmax())
    coefficients_K = counts_KV.sum(1)
    # A pattern that repeats in every block makes a comb at one position: the others must agree
    others = evidence_Q[best] - evidence_QK[best].max()
    expected = float(coefficients_K @ expected_S[steps_QK[best]])
    if others < _NATS + 0.05 * coefficients_K.sum() or evidence_Q[best] < 0.5 * expected:
        return None
    return JpegQuality(best + 1, max(0.0, 1 - float(evidence_Q[best]) / expected))


def _luma_blocks(pixels_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rec. 601 luma of the 8×8 blocks [N, 64] that nothing was clipped in: clipping moves every coefficient."""
    rows, columns = (side // 8 for side in pixels_HW3.shape[:2])
    every = max(1, rows * columns // _BLOCKS)
    rgb = pixels_HW3[: 8 * rows, : 8 * columns].reshape(rows, 8, 8 * columns, 3)[::every]
    clipped = (rgb + np.uint8(1) < 2).reshape(len(rgb), 8, columns, 24).any((1, 3))  # 255 wraps to 0, and 0 becomes 1
    luma = rgb[..., 0] * np.float32(0.299) + rgb[..., 1] * np.float32(0.587) + rgb[..., 2] * np.float32(0.114)
    # The decoder's luma was whole before it became RGB, and RGB's own rounding is too small to hide it
    blocks: NDArray[np.float32] = np.rint(luma).reshape(len(rgb), 8, columns, 8).swapaxes(1, 2).reshape(-1, 64)
    return blocks[~clipped.ravel()]


def _product(left_NI: NDArray[np.float32], right_IJ: NDArray[np.float32]) -> NDArray[np.float32]:
    """The matrix product [N, J], in pieces small enough for one thread of OpenBLAS.

    It would start one per core, and on a machine that is busy with networks their waiting makes 3 ms into 40.
    """
    product_NJ = np.empty((len(left_NI), right_IJ.shape[1]), np.float32)
    rows = max(1, 2**18 // right_IJ.size)
    for start in range(0, len(left_NI), rows):
        np.matmul(left_NI[start : start + rows], right_IJ, out=product_NJ[start : start + rows])
    return product_NJ


@functools.cache
def _dct() -> NDArray[np.float32]:
    """The orthonormal 8×8 DCT as a matrix [63, 64], without its first row, the mean."""
    k, x = np.mgrid[:8, :8]
    dct_8 = np.where(k == 0, math.sqrt(1 / 8), 0.5 * np.cos((2 * x + 1) * k * math.pi / 16)).astype(np.float32)
    return (dct_8[:, None, :, None] * dct_8[None, :, None, :]).reshape(64, 64)[1:]


@functools.cache
def _steps() -> NDArray[np.int64]:
    """Luma steps [100, 63] of every quality, without the mean's."""
    return np.stack([_scaled(_LUMA, quality, 255)[1:] for quality in range(1, 101)])


@functools.cache
def _combs() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a coefficient's magnitude says for a step: ln p(value | comb of the step) - ln p(value | no comb) [V, S].

    And what it says on average [S] where the comb is there. Values are whole, S counts from step 0. The teeth are as
    wide as decoders make them: they round pixels, which moves a coefficient by 0.29 (standard deviation) where
    there is texture, and by up to 2 where there is none.
    """
    teeth = {-2: 0.015, -1: 0.08, 0: 0.8, 1: 0.08, 2: 0.015}
    value_V1, step_S = np.arange(_VALUES)[:, None], np.arange(1, 256)
    p_VS = 0.01 / step_S + sum(weight * ((value_V1 - off) % step_S == 0) for off, weight in teeth.items())
    gain_VS = np.log(step_S * p_VS)
    expected_S = np.array([p_VS[:step, step - 1] @ gain_VS[:step, step - 1] for step in step_S])
    return np.pad(gain_VS, ((0, 0), (1, 0))).astype(np.float32), np.pad(expected_S, (1, 0)).astype(np.float32)
