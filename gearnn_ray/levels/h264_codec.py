"""Encodes clips with libx264 and decodes them, in memory. Imports PyAV only then, because other levels do not need it."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.core.errors import UserError

if TYPE_CHECKING:
    from av import Packet, VideoFrame

__all__ = ["Frame", "UnequalFramesError", "decode", "encode", "equal_sizes", "through_h264", "video_versions"]

Frame = NDArray[np.uint8]  # an RGB image [H, W, 3]


class UnequalFramesError(UserError, ValueError):
    """A video codec was given frames of different sizes as one clip."""


def equal_sizes(frames: Iterable[Frame]) -> Iterator[Frame]:
    """Yield the frames unchanged. Raises `UnequalFramesError` at a frame whose size differs from the first frame's."""
    shape: tuple[int, ...] = ()
    for number, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.shape != shape:
            found = f"frame {number} of a clip has shape {frame.shape}, and the first frame has {shape}"
            raise UnequalFramesError(f"{found}: expected equal ones; pass frames of each size as a separate clip.")
        yield frame


def through_h264(frames: Iterator[Frame], crf: int) -> Iterator[Frame]:
    """Encode and decode a clip of uint8 [H, W, 3] frames of one size. Odd sides, impossible in 4:2:0, are padded meanwhile."""
    first = next(frames, None)
    if first is None:
        return
    height, width, _ = first.shape
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    clip = (np.pad(frame, padding, "edge") for frame in itertools.chain([first], frames))
    for frame in decode(encode(clip, crf)):
        yield np.ascontiguousarray(frame[:height, :width])


def encode(frames: Iterable[Frame], crf: int) -> Iterator["Packet[Any]"]:
    """Encode with libx264: preset medium, 4:2:0, BT.709, limited range. The bytes are the same on every x86-64 processor."""
    import av

    if "libx264" not in av.codecs_available:
        raise UserError("PyAV was built without libx264, which the h264 levels need: install PyAV's own wheel.")
    encoder = av.CodecContext.create("libx264", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    # Without cpu-independent, libx264's AVX-512 code gives different bytes in about one run of twenty.
    encoder.options = {"preset": "medium", "crf": str(crf), "x264-params": "cpu-independent=1"}
    encoder.thread_count = 1  # several processes encode at the same time, one per level
    encoder.pix_fmt, encoder.framerate, encoder.time_base = "yuv420p", Fraction(25), Fraction(1, 25)
    convert = _converter("yuv420p", "JPEG", "MPEG")
    for time, frame in enumerate(frames):
        if time == 0:
            encoder.height, encoder.width, _ = frame.shape
        video = convert(av.VideoFrame.from_ndarray(frame, format="rgb24"))
        video.pts = time
        yield from encoder.encode(video)
    yield from encoder.encode(None)


def decode(packets: Iterable["Packet[Any]"]) -> Iterator[Frame]:
    """Decode the packets of one clip to uint8 [H, W, 3] frames, in display order."""
    import av

    decoder = av.CodecContext.create("h264", "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.thread_count = 1
    convert = _converter("rgb24", "MPEG", "JPEG")
    for packet in itertools.chain(packets, [None]):
        for video in decoder.decode(packet):
            yield np.asarray(convert(video).to_ndarray(), np.uint8)


def _converter(pixels: str, source: str, target: str) -> Callable[["VideoFrame"], "VideoFrame"]:
    """Convert pixel formats in BT.709 with exact rounding, so that only 4:2:0 chroma subsampling loses information."""
    from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

    exact = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
    return functools.partial(
        VideoReformatter().reformat,
        format=pixels,
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=source,
        dst_color_range=target,
        interpolation=Interpolation.BICUBIC | exact,
        threads=1,
    )


@functools.cache
def video_versions() -> dict[str, str]:
    """Versions of PyAV, libavcodec and x264, which together decide the pixels of H.264 levels."""
    import av

    # libx264 writes its build number only into the streams that it encodes
    packets = b"".join(bytes(packet) for packet in encode([np.zeros((16, 16, 3), np.uint8)], crf=23))
    build = re.search(rb"x264 - core (\w+)", packets)
    return {
        "pyav": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "x264": build[1].decode() if build else "unknown",
    }
