"""Frames of video files as RGB, and the colour conversion that every decoder of the package shares. Imports PyAV when it is used.

Frames are numbered as the decoder gives them, so that a number names the same picture each time the file is read. Packets that
cannot be decoded are skipped, because the next keyframe mends the damage.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.core.errors import UserError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.reformatter import VideoReformatter

__all__ = ["FILE_FORMATS", "SUFFIXES", "Shot", "rgb_of", "shots_of", "versions"]

FILE_FORMATS = "mov,mp4,mpegts,matroska,webm,h264,hevc,obu,ivf,av1,avi,flv,mjpeg,mpegvideo"
"""FFmpeg's readers of single files. Others, such as concat and playlists, exist to open further files."""

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mts", ".flv", ".mpg", ".mpeg", ".mjpeg", ".h264", ".hevc")
"""Ends of names of video files."""

_UNSPECIFIED, _BT709, _BT601 = 2, 1, 5  # FFmpeg's AVColorSpace


class Shot(NamedTuple):
    """A decoded frame that is not yet converted. seconds: since the file's beginning."""

    number: int
    seconds: float
    picture: "VideoFrame"


def shots_of(path: Path) -> Iterator[Shot]:
    """The frames of a file's first video stream, in the order in which they are shown. Raises UserError for a file that FFmpeg
    cannot open or that has no video.
    """
    import av

    try:
        container = av.open(str(path), options={"format_whitelist": FILE_FORMATS})
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise UserError(f"{path} is no video that can be read ({reason}): replace it, or take it out.") from error
    with container:
        if not container.streams.video or container.streams.video[0].codec_context is None:
            raise UserError(f"{path} has no video stream that FFmpeg can decode: replace it, or take it out.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate, number = float(stream.average_rate or 25), 0
        start: float | None = None
        with suppress(av.FFmpegError):  # a file that ends in the middle has the frames before it
            for packet in container.demux(stream):
                with suppress(av.FFmpegError):
                    for picture in packet.decode():
                        seconds = number / rate if picture.time is None else float(picture.time)
                        start = seconds if start is None else start
                        yield Shot(number, seconds - start, picture)
                        number += 1


def rgb_of(picture: "VideoFrame", convert: "VideoReformatter") -> NDArray[np.uint8]:
    """RGB [H, W, 3], by the colour space that the stream names; without one BT.601 below 720 lines, BT.709 from there on."""
    source = picture.colorspace
    if int(source) == _UNSPECIFIED:
        source = _BT709 if picture.height >= 720 else _BT601
    converted = convert.reformat(picture, format="rgb24", src_colorspace=source, dst_color_range="JPEG", threads=1)
    return np.ascontiguousarray(converted.to_ndarray(), np.uint8)


def versions() -> dict[str, str]:
    """What decides the pixels of a decoded frame beside the file."""
    import av

    names = ("libavcodec", "libswscale")
    return {"pyav": av.__version__, **{name: ".".join(map(str, av.library_versions[name])) for name in names}}
