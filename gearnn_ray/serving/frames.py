"""Decodes the bytes of a request or a file to a frame, and reads the evidence of its level.

The bytes are untrusted. Whatever is not a usable frame is refused with one sentence, and the size of an image is
checked before memory is allocated for it.
"""

import functools
import io
import math
import re
import struct
import zlib
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from gearnn_ray.core.errors import UserError
from gearnn_ray.serving.jpeg import MOST_SCANS, JpegQuality, quality_of_tables, scans_of

__all__ = ["BadFrameError", "Evidence", "Frame", "Limits", "evidence_of", "read_frame"]

_JPEG, _PNG, _NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_END = b"\xff\xd9"  # end of a JPEG
_TYPES = ("image/jpeg", "image/png", "application/x-npy")
_SEND = "send a JPEG, a PNG or an .npy array of uint8"
_CUT_JPEG = "the JPEG ends before its last pixel"
_SEGMENTS = {*range(0xC0, 0xC8), *range(0xC9, 0xD0), *range(0xDA, 0xF0), 0xFE}  # markers that a length follows
_MOST_SEGMENTS = 10_000  # libpng writes 2,000 chunks for 16 MiB
_MISSING = 128  # the grey that libjpeg fills into blocks without data


class Evidence(NamedTuple):
    """What one frame shows about its level.

    luma: mean Rec. 601 luma, 0 to 255, over a regular subsample of the pixels. jpeg: None if it is not known to have been one.
    qp: mean luma QP of the macroblocks of H.264 pictures. crf: constant rate factor that the encoder wrote into the stream.
    """

    height: int
    width: int
    luma: float
    jpeg: JpegQuality | None = None
    qp: float | None = None
    crf: float | None = None


@dataclass(frozen=True)
class Frame:
    """One decoded frame: RGB [H, W, 3], contiguous, possibly read-only. Its EXIF orientation is not applied."""

    pixels: NDArray[np.uint8]
    evidence: Evidence


@dataclass(frozen=True)
class Limits:
    """Sizes beyond which a frame is refused: most bytes of an encoded frame, most pixels, fewest pixels on either side."""

    body_bytes: int = 16 * 2**20
    pixels: int = 2**24
    shortest_side: int = 16


class BadFrameError(UserError):
    """The bytes are not a usable frame. `status` is the matching HTTP status.

    400: damaged; 413: too large; 415: of another type; 422: a valid image of an unsupported kind, such as CMYK,
    16 bits per channel, or 10,000 × 1 pixels.
    """

    def __init__(self, sentence: str, status: int = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(sentence)
        self.status = int(status)


def read_frame(data: bytes, content_type: str | None, limits: Limits = Limits()) -> Frame:
    """Decode a JPEG, a PNG or an .npy array (uint8, RGB [H, W, 3] or grey [H, W]) to RGB. Raises `BadFrameError`.

    The format is recognised from the bytes; `content_type` only improves the error. Alpha is dropped, and an animated
    PNG gives its still image. A truncated JPEG is refused even if an end marker was appended, which libjpeg accepts.
    Two cases are not noticed: an incomplete last block, and a progressive JPEG that ends between two scans.
    """
    if not data:
        raise _damaged("the body is empty: expected one image")
    if len(data) > limits.body_bytes:
        raise _too_large(f"the body has {len(data)} bytes: expected at most {limits.body_bytes}")
    if data.startswith(_NPY):
        pixels = _read_npy(data, limits)
        return Frame(pixels, evidence_of(pixels))
    if data.startswith(_JPEG):
        image: JpegImageFile | PngImageFile = _open_jpeg(data)
    elif data.startswith(_PNG):
        image = _open_png(data)
    else:
        raise _unknown(data, content_type)
    _check_size(image.height, image.width, limits)
    if image.mode == "CMYK":
        raise _unusable("the JPEG has four colour components (CMYK or YCCK), expected RGB or grey: convert it")
    pixels = _decode(image)
    if isinstance(image, PngImageFile):
        return Frame(pixels, evidence_of(pixels))
    # A truncated JPEG with an end marker has a grey end, or a coarse one if it is progressive
    if ("progressive" in image.info or (pixels[-1, -1] == _MISSING).all()) and not _is_whole(data, pixels):
        raise _damaged(_CUT_JPEG)
    return Frame(pixels, evidence_of(pixels, _jpeg_quality(image)))


def evidence_of(
    pixels: NDArray[np.uint8], jpeg: JpegQuality | None = None, qp: float | None = None, crf: float | None = None
) -> Evidence:
    """The evidence of a frame from its pixels, uint8 RGB [H, W, 3], and from what the caller knows of its file or stream."""
    height, width, _ = pixels.shape
    row, column, weights = _sampling(height, width)
    sample = pixels[row // 2 :: row].reshape(-1, 3 * width)[:, ::column].astype(np.float32)
    return Evidence(height, width, float(weights.dot(sample.ravel())), jpeg, qp, crf)


@functools.lru_cache(maxsize=64)
def _sampling(height: int, width: int) -> tuple[int, int, NDArray[np.float32]]:
    """Which rows and which values of a row of RGB pixels are sampled, and the weights that make them the mean Rec. 601 luma.

    About 1,000 values of each channel give the mean to 2%, a tenth of the difference between scenes. Odd steps sample all
    columns of JPEG's 8×8 blocks equally, and one that is no multiple of 3 takes the channels in turn: values at equal distances
    are copied in a third of the time of pixels.
    """
    step = min(math.isqrt(height * width // 1024), width // 2) | 1
    column = step + 2 if step % 3 == 0 else step
    row = min(height * width // 1024 // column, height) | 1
    channels = np.tile(np.arange(0, 3 * width, column) % 3, len(range(row // 2, height, row)))
    weights = np.array([0.299, 0.587, 0.114]) / np.bincount(channels)
    return row, column, weights[channels].astype(np.float32)


def _open_jpeg(data: bytes) -> JpegImageFile:
    scan = _first_scan(data)
    if data.rfind(_END) < scan:
        raise _damaged(_CUT_JPEG)
    if scans_of(data, scan) > MOST_SCANS:
        raise _unusable(f"the JPEG has more than {MOST_SCANS} scans, encoders write about 10: save it again")
    try:
        return JpegImageFile(io.BytesIO(data))  # not Image.open, which could choose another decoder
    except Exception as error:
        raise _damaged(f"the JPEG's header cannot be read ({error})") from error


def _first_scan(data: bytes) -> int:
    """Offset of the first scan's data, in which 0xFF is escaped, so that every marker found in it is real.

    Refuses headers in which Pillow would search for the next marker byte by byte, for seconds per body.
    """
    place = 2
    for _ in range(_MOST_SEGMENTS):
        if len(data) < place + 4:
            raise _damaged(_CUT_JPEG)
        fill, marker, length = struct.unpack_from(">BBH", data, place)
        if fill != 0xFF or (marker != 0xFF and marker not in _SEGMENTS):
            raise _damaged(f"the JPEG has no marker at byte {place}, where its header needs one")
        place += 1 if marker == 0xFF else 2 + length
        if marker == 0xDA:
            return place
    raise _unusable(f"the JPEG has more than {_MOST_SEGMENTS} segments before its pixels: save it again")


def _is_whole(data: bytes, pixels: NDArray[np.uint8]) -> bool:
    """Whether a JPEG has data for all of its last scan. If it has, appended data change no pixel."""
    scans = data[: data.rfind(_END)].rstrip(b"\xff")
    *_, last = re.findall(rb"\xff[\xd0-\xd7]", b"\xff\xd7" + scans)  # restart markers count from 0xD0 to 0xD7
    following = bytes((0xFF, 0xD0 + (last[1] + 1) % 8))
    more = 64 * b"\x55" + following + 64 * b"\x55"  # for this restart interval or, if it is complete, for the next
    return np.array_equal(_decode(_open_jpeg(scans + more + _END)), pixels)


def _decode(image: JpegImageFile | PngImageFile) -> NDArray[np.uint8]:
    try:
        image.load()
    except Exception as error:  # on damaged bytes decoders raise a dozen types
        raise _damaged(f"the {image.format} cannot be decoded ({error})") from error
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _jpeg_quality(image: JpegImageFile) -> JpegQuality | None:
    """The quality from the tables that Pillow has read; None for a lossless JPEG, which has no tables."""
    tables = [image.quantization.get(component[3]) for component in image.layer]
    if not tables or tables[0] is None:
        return None
    # The second and third component share a table. If all three do, there is no chroma table to compare
    chroma = tables[1] if len(tables) > 1 and tables[1] is not tables[0] else None
    return quality_of_tables(tables[0], chroma)


def _open_png(data: bytes) -> PngImageFile:
    """Check every chunk, and pass only those with pixels to Pillow, which then unpacks no texts, profiles or animations."""
    kept, place = [_PNG], len(_PNG)
    for _ in range(_MOST_SEGMENTS):
        length, kind = struct.unpack(">I4s", data[place : place + 8].ljust(8, b"\0"))
        chunk, place = data[place : place + 12 + length], place + 12 + length
        if len(data) < place:
            raise _damaged("the PNG ends before its last pixel")
        if zlib.crc32(chunk[4:-4]).to_bytes(4) != chunk[-4:]:
            raise _damaged("the PNG is damaged: a chunk does not match its checksum")
        if kind == b"IHDR" and length == 13 and chunk[16] == 16:
            raise _unusable("the PNG has 16 bits per channel, expected up to 8: convert it")
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            kept.append(chunk)
        if kind == b"IEND":
            break
    else:
        raise _unusable(f"the PNG has more than {_MOST_SEGMENTS} chunks: save it again")
    try:
        return PngImageFile(io.BytesIO(b"".join(kept)))
    except Exception as error:
        raise _damaged(f"the PNG's header cannot be read ({error})") from error


def _read_npy(data: bytes, limits: Limits) -> NDArray[np.uint8]:
    """The array as a view of the bytes, after its header is checked against them."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = read_header(file)
    except Exception as error:  # Python's parser of literals raises several types
        raise _damaged("the header of the .npy array cannot be read: write it with numpy.save") from error
    if dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (3,)):
        found = f"the array is {dtype} of shape {shape}"
        raise _unusable(f"{found}, expected uint8 of shape [height, width, 3] or [height, width]")
    _check_size(shape[0], shape[1], limits)
    values = len(data) - file.tell()
    if values != math.prod(shape):
        raise _damaged(f"the array of shape {shape} has {values} values, expected {math.prod(shape)}")
    array = np.frombuffer(data, np.uint8, offset=file.tell()).reshape(shape, order="F" if by_columns else "C")
    return np.ascontiguousarray(array if array.ndim == 3 else np.repeat(array[..., None], 3, 2))


def _check_size(height: int, width: int, limits: Limits) -> None:
    found = f"the frame is {width} × {height} pixels"
    if height * width > limits.pixels:
        raise _too_large(f"{found}, expected at most {limits.pixels} in all: scale it down")
    if min(height, width) < limits.shortest_side:
        raise _unusable(f"{found}, expected at least {limits.shortest_side} on each side")


def _unknown(data: bytes, content_type: str | None) -> BadFrameError:
    named = (content_type or "").partition(";")[0].strip().lower()
    if named in _TYPES:
        return _damaged(f"the body begins with {data[:8].hex(' ')}, so it is not {named}: {_SEND}")
    found = f"the body is neither {_TYPES[0]} nor {_TYPES[1]} nor {_TYPES[2]}"
    return BadFrameError(f"{found}: {_SEND}.", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)


def _damaged(sentence: str) -> BadFrameError:
    return BadFrameError(f"{sentence}.", HTTPStatus.BAD_REQUEST)


def _too_large(sentence: str) -> BadFrameError:
    return BadFrameError(f"{sentence}.", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


def _unusable(sentence: str) -> BadFrameError:
    return BadFrameError(f"{sentence}.", HTTPStatus.UNPROCESSABLE_ENTITY)
