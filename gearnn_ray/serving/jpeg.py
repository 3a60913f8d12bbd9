"""How strongly a frame was compressed as JPEG, on libjpeg's quality scale from 1 to 100.

The quality is read exactly from the quantisation tables of a file, or estimated from the pixels if there is no file.
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_SCANS", "JpegQuality", "quality_of_pixels", "quality_of_tables", "scans_of"]

MOST_SCANS = 20
"""Scans of a JPEG that are decoded. Every scan costs a pass over the whole image, whatever its size in bytes: at 8.3 megapixels
20 ms, a third of decoding a baseline JPEG. libjpeg writes 10 for a progressive one, encoders that search for the best script a
few more."""

# The tables that libjpeg scales: K.1 and K.2 of ITU-T T.81, row by row
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

_VALUES = 512  # bins of the histogram; larger DCT coefficients are too rare to matter
_SMALLEST = 3  # a smaller coefficient may be a zero that rounding moved
_BLOCKS = 4096  # this many blocks are about as informative as all of them
_NATS = 20  # with less evidence, a few coefficients may match a comb by chance

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_EOI, _SOS, _ALONE = 0xD9, 0xDA, {0x01, 0xD8}  # end of image, start of scan; markers that no length follows
_Table = tuple[int, ...]


@dataclass(frozen=True)
class JpegQuality:
    """The libjpeg quality closest to a frame's compression, 1 (worst) to 100.

    distance: 0.0 for exactly libjpeg's tables. `quality_of_tables` and `quality_of_pixels` define its unit.
    """

    quality: int
    distance: float


def scans_of(data: bytes, first: int) -> int:
    """The scans of a JPEG up to its end marker; first: offset of its first scan's data, behind the scan's header.

    Markers are found as libjpeg finds them: in scans a byte 0xFF of data is followed by 0, or by a restart marker. Counting ends
    beyond `MOST_SCANS`.
    """
    scans, place = 1, first
    while scans <= MOST_SCANS and (found := _MARKER.search(data, place)) is not None:
        marker, place = data[found.end() - 1], found.end()
        if marker == _EOI:
            break
        scans += marker == _SOS
        if marker not in _ALONE:
            place += int.from_bytes(data[place : place + 2])
    return scans


def quality_of_tables(luma_64: Sequence[int], chroma_64: Sequence[int] | None) -> JpegQuality:
    """The quality whose libjpeg tables equal these, or else the quality of the nearest tables.

    Tables have 64 steps, row by row, as Pillow returns them (files store zigzag order); `chroma_64` is None for grey
    images. Tables with and without baseline's limit of 255 are recognised exactly. The distance is the mean of
    |ln(step / libjpeg's step)| over all entries; 0.1 means about 10%.
    """
    luma, chroma = tuple(luma_64), None if chroma_64 is None else tuple(chroma_64)
    exact = _qualities().get((luma, chroma))
    return JpegQuality(exact, 0.0) if exact else _nearest(luma, chroma)


@functools.lru_cache(maxsize=256)  # a camera writes the same tables into every frame
def _nearest(luma: _Table, chroma: _Table | None) -> JpegQuality:
    known = [pair for pair in _qualities() if (pair[1] is None) == (chroma is None)]
    known_QE = np.log([pair[0] + (pair[1] or ()) for pair in known])
    distances = np.abs(known_QE - np.log(np.maximum(luma + (chroma or ()), 1))).mean(1)
    nearest = int(np.argmin(distances))
    return JpegQuality(_qualities()[known[nearest]], float(distances[nearest]))


@functools.cache
def _qualities() -> dict[tuple[_Table, _Table | None], int]:
    """Quality by (luma, chroma) tables, for colour and grey files, with and without baseline's limit of 255."""
    qualities: dict[tuple[_Table, _Table | None], int] = {}
    for quality in range(1, 101):
        for largest in (255, 32767):
            luma, chroma = (tuple(_scaled(base, quality, largest).tolist()) for base in (_LUMA, _CHROMA))
            qualities[luma, chroma] = qualities[luma, None] = quality
    return qualities


def _scaled(base: str, quality: int, largest: int) -> NDArray[np.int64]:
    """A table at a quality, as `jpeg_quality_scaling` and `jpeg_add_quant_table` in libjpeg's jcparam.c compute it."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((np.array(base.split(), np.int64) * scale + 50) // 100, 1, largest)


def quality_of_pixels(pixels_HW3: NDArray[np.uint8]) -> JpegQuality | None:
    """The quality of the JPEG from which these pixels, uint8 RGB, were decoded; None if they show no compression.

    Compression leaves the DCT coefficients of 8×8 blocks at multiples of their table's steps: a comb (Fan and
    de Queiroz, "Identification of bitmap compression history", 2003). The result is the quality from 2 to 99 whose
    combs have the highest likelihood for the AC coefficients of the luma. The block grid must be intact: an image
    that was scaled, cropped off the grid or compressed as video afterwards has no comb left. An image that was
    darkened or brightened afterwards can show the comb of another quality. The distance is the missing share of the
    evidence that is expected for such a comb, from 0.0 to 0.5.
    """
    gain_VS, expected_S = _combs()
    steps_QK = _steps()
    blocks_N64 = _luma_blocks(pixels_HW3)
    positions = np.arange(63)
    # One histogram per position, all filled in one call
    values_NK = np.rint(np.abs(_product(blocks_N64, _dct().T))).astype(np.int64)
    values_NK[values_NK >= _VALUES] = 0
    counts_KV = np.bincount((values_NK + _VALUES * positions).ravel(), minlength=63 * _VALUES).reshape(63, _VALUES)
    counts_KV[:, :_SMALLEST] = 0

    evidence_QK = _product(counts_KV.astype(np.float32), gain_VS)[positions, steps_QK]
    evidence_Q = evidence_QK.sum(1)
    best = int(evidence_Q.argmax())
    coefficients_K = counts_KV.sum(1)
    # A pattern that repeats in every block produces a comb at one position, so the other positions must agree
    others = evidence_Q[best] - evidence_QK[best].max()
    expected = float(coefficients_K @ expected_S[steps_QK[best]])
    if others < _NATS + 0.05 * coefficients_K.sum() or evidence_Q[best] < 0.5 * expected:
        return None
    return JpegQuality(best + 1, max(0.0, 1 - float(evidence_Q[best]) / expected))


def _luma_blocks(pixels_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rec. 601 luma [N, 64] of 8×8 blocks without clipped pixels, because clipping moves every coefficient."""
    rows, columns = (side // 8 for side in pixels_HW3.shape[:2])
    every = max(1, rows * columns // _BLOCKS)
    rgb = pixels_HW3[: 8 * rows, : 8 * columns].reshape(rows, 8, 8 * columns, 3)[::every]
    clipped = (rgb + np.uint8(1) < 2).reshape(len(rgb), 8, columns, 24).any((1, 3))  # 255 wraps to 0, and 0 becomes 1
    luma = rgb[..., 0] * np.float32(0.299) + rgb[..., 1] * np.float32(0.587) + rgb[..., 2] * np.float32(0.114)
    # The decoder's luma was an integer before its conversion to RGB, whose rounding is small enough to recover it
    blocks: NDArray[np.float32] = np.rint(luma).reshape(len(rgb), 8, columns, 8).swapaxes(1, 2).reshape(-1, 64)
    return blocks[~clipped.ravel()]


def _product(left_NI: NDArray[np.float32], right_IJ: NDArray[np.float32]) -> NDArray[np.float32]:
    """The matrix product [N, J], in pieces so small that OpenBLAS computes each in one thread.

    With one thread per core, waiting for busy cores turns 3 ms into 40 ms beside running networks.
    """
    product_NJ = np.empty((len(left_NI), right_IJ.shape[1]), np.float32)
    rows = max(1, 2**18 // right_IJ.size)
    for start in range(0, len(left_NI), rows):
        np.matmul(left_NI[start : start + rows], right_IJ, out=product_NJ[start : start + rows])
    return product_NJ


@functools.cache
def _dct() -> NDArray[np.float32]:
    """The orthonormal 8×8 DCT as a matrix [63, 64], without its first row, which is the mean."""
    k, x = np.mgrid[:8, :8]
    dct_8 = np.where(k == 0, math.sqrt(1 / 8), 0.5 * np.cos((2 * x + 1) * k * math.pi / 16)).astype(np.float32)
    return (dct_8[:, None, :, None] * dct_8[None, :, None, :]).reshape(64, 64)[1:]


@functools.cache
def _steps() -> NDArray[np.int64]:
    """Luma steps [100, 63] of every quality, without the step of the mean."""
    return np.stack([_scaled(_LUMA, quality, 255)[1:] for quality in range(1, 101)])


@functools.cache
def _combs() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Evidence of a coefficient's magnitude for each step: ln p(value | comb of the step) - ln p(value | no comb) [V, S].

    The second array is the mean evidence [S] if the comb is present. Values are integers, and S counts from step 0.
    The teeth have the width that decoders cause by rounding pixels: a coefficient moves by 0.29 (standard deviation)
    in texture, and by up to 2 in flat regions.
    """
    teeth = {-2: 0.015, -1: 0.08, 0: 0.8, 1: 0.08, 2: 0.015}
    value_V1, step_S = np.arange(_VALUES)[:, None], np.arange(1, 256)
    p_VS = 0.01 / step_S + sum(weight * ((value_V1 - off) % step_S == 0) for off, weight in teeth.items())
    gain_VS = np.log(step_S * p_VS)
    expected_S = np.array([p_VS[:step, step - 1] @ gain_VS[:step, step - 1] for step in step_S])
    return np.pad(gain_VS, ((0, 0), (1, 0))).astype(np.float32), np.pad(expected_S, (1, 0)).astype(np.float32)
