"""Encodes clips with libx264, decodes them and reads QPs, in memory. Imports PyAV only then, for other levels do not need it."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.core.errors import UserError

if TYPE_CHECKING:
    from av import Packet, VideoCodecContext, VideoFrame
    from av.sidedata.sidedata import SideData

__all__ = [
    "DECODER_OPTIONS", "LEVEL_RATE", "Frame", "Picture", "UnequalFramesError", "decode", "encode", "equal_sizes",
    "padded_to_even", "picture_qp", "rgb_to_yuv", "side_data", "through_h264", "video_versions", "x264_encoder",
    "yuv_to_rgb",
]  # fmt: skip

Frame = NDArray[np.uint8]  # an RGB image [H, W, 3]

LEVEL_RATE: Final = Fraction(25)
"""Frames a second that the encoder of levels is told. x264 makes frames that are shown longer better."""
DECODER_OPTIONS: Final = {"export_side_data": "venc_params"}
"""Options of a PyAV decoder that exports QPs. Assign them to `codec_context.options` before the first frame."""
_DELTA_QP = 4  # index of delta_qp among the int32 fields of FFmpeg's AVVideoBlockParams: x, y, width, height, delta_qp


class Picture(NamedTuple):
    """A frame, and the mean macroblock QP of the H.264 picture that it was decoded from; None without H.264."""

    pixels: Frame
    qp: float | None = None


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


def through_h264(frames: Iterator[Frame], crf: int) -> Iterator[Picture]:
    """Encode and decode a clip of uint8 [H, W, 3] frames of one size. Odd sides are padded meanwhile."""
    first = next(frames, None)
    if first is None:
        return
    height, width, _ = first.shape
    for pixels, qp in decode(encode(map(padded_to_even, itertools.chain([first], frames)), crf)):
        yield Picture(np.ascontiguousarray(pixels[:height, :width]), qp)


def padded_to_even(frame: Frame) -> Frame:
    """The frame with its last row and column repeated where its sides are odd, which is impossible in 4:2:0."""
    height, width, _ = frame.shape
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), "edge")


def encode(frames: Iterable[Frame], crf: int) -> Iterator["Packet[Any]"]:
    """Encode with libx264: preset medium, 4:2:0, BT.709, limited range."""
    clip = iter(frames)
    first = next(clip, None)
    if first is None:
        return
    encoder, convert = x264_encoder(first.shape[:2], LEVEL_RATE, {"preset": "medium", "crf": str(crf)}), rgb_to_yuv()
    for time, frame in enumerate(itertools.chain([first], clip)):
        video = convert(frame)
        video.pts = time
        yield from encoder.encode(video)
    yield from encoder.encode(None)


def x264_encoder(
    size: tuple[int, int], rate: Fraction, options: Mapping[str, str], x264: Mapping[str, str] | None = None
) -> "VideoCodecContext":
    """A libx264 that encodes 4:2:0 frames of this size (height, width) on one thread; the bytes are the same on every x86-64
    processor. Times of frames count in 1 / rate seconds. options: FFmpeg's. x264: x264's own. Raises UserError if PyAV has none.
    """
    import av

    if "libx264" not in av.codecs_available:
        raise UserError("PyAV was built without libx264, which H.264 needs: install PyAV's own wheel.")
    encoder = av.CodecContext.create("libx264", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    # Without cpu-independent, libx264's AVX-512 code gives different bytes in about one run of twenty.
    own = {"cpu-independent": "1", **(x264 or {})}
    encoder.options = {**options, "x264-params": ":".join(f"{name}={value}" for name, value in own.items())}
    encoder.thread_count = 1  # several processes encode at the same time
    encoder.pix_fmt, encoder.framerate, encoder.time_base = "yuv420p", rate, 1 / rate
    encoder.height, encoder.width = size
    return encoder


def rgb_to_yuv() -> Callable[[Frame], "VideoFrame"]:
    """A function that converts RGB frames to what `x264_encoder` takes, in BT.709 with limited range."""
    import av

    convert = _converter("yuv420p", "JPEG", "MPEG")
    return lambda frame: convert(av.VideoFrame.from_ndarray(frame, format="rgb24"))


def yuv_to_rgb() -> Callable[["VideoFrame"], Frame]:
    """A function that converts decoded frames in BT.709 with limited range to RGB uint8 [H, W, 3]."""
    convert = _converter("rgb24", "MPEG", "JPEG")
    return lambda frame: np.asarray(convert(frame).to_ndarray(), np.uint8)


def decode(packets: Iterable["Packet[Any]"]) -> Iterator[Picture]:
    """Decode the packets of one clip to pictures of uint8 [H, W, 3], in display order."""
    import av

    decoder = av.CodecContext.create("h264", "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.options, decoder.thread_count = DECODER_OPTIONS, 1
    convert = yuv_to_rgb()
    for packet in itertools.chain(packets, [None]):
        for video in decoder.decode(packet):
            yield Picture(convert(video), picture_qp(video))


def picture_qp(frame: "VideoFrame") -> float | None:
    """Mean luma QP of a frame's macroblocks, at most 51. A skipped macroblock has the QP of the one coded before it.

    None if the frame has no QPs (no H.264, or decoded without `DECODER_OPTIONS`) or if FFmpeg concealed damage in it. The
    parameters of VP9 and MPEG-2 have other scales and are ignored.
    """
    kind, h264 = _enc_params()
    for params in side_data(frame):
        if not isinstance(params, kind) or params.codec_type != h264:
            continue
        if params.nb_blocks and not frame.is_corrupt:
            ints = params.block_size // 4
            blocks = np.frombuffer(memoryview(params), np.int32, params.nb_blocks * ints, params.blocks_offset)
            # FFmpeg counts from 0, but QPs start at -6 for each bit above 8
            delta = int(np.add.reduce(blocks[_DELTA_QP::ints])) / params.nb_blocks
            return float(params.qp + delta - 6 * (frame.format.components[0].bits - 8))
    return None


@functools.cache
def _enc_params() -> tuple[Any, Any]:
    """PyAV's type of a frame's QPs, and its name for those of H.264."""
    from av.sidedata.encparams import VideoEncParams, VideoEncParamsType

    return VideoEncParams, VideoEncParamsType.H264


def side_data(frame: "VideoFrame") -> Iterator["SideData"]:
    """All side data of a frame.

    `frame.side_data` would keep the frame in a reference cycle, and with it its memory until Python's next collection of garbage:
    the decoder would then take new memory for every frame, which costs more than reading the QPs does.
    """
    return iter(_side_data_container()(frame))


@functools.cache
def _side_data_container() -> "Callable[[VideoFrame], Iterable[SideData]]":
    from av.sidedata.sidedata import SideDataContainer

    return cast("Callable[[VideoFrame], Iterable[SideData]]", SideDataContainer)  # PyAV's type stubs leave its argument out


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
