"""Decodes a video frame by frame, and reads from container and bitstream what they say about the quality of each frame.

The data are a stranger's: FFmpeg's decoders refuse pictures of too many pixels before they allocate memory for them, and damage
is counted, not fatal, because the next keyframe mends it.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from gearnn_ray.data.video_files import rgb_of
from gearnn_ray.serving.frames import BadFrameError, Evidence, Limits, evidence_of, read_frame
from gearnn_ray.serving.h264 import DECODER_OPTIONS, H264Quality
from gearnn_ray.video.sources import DEFAULT_LIMITS, SourceError, sentence_of

__all__ = ["DEFAULT_LIMITS", "VideoFrame", "decoded", "first_video", "packets_of"]

_MOST_DAMAGED = 150  # packets in a row without a picture: five seconds in which nothing was seen; a camera is then opened again


class VideoFrame(NamedTuple):
    """One decoded frame.

    pixels: RGB uint8 [H, W, 3]. seconds: its presentation time, as the stream says; None where it says nothing. keyframe:
    whether it was decoded without others. bytes: of the packets since the frame before. evidence: of its level. decode_seconds:
    the time that it took here, of which `level_seconds` went into evidence. lost: packets since the frame before that could not
    be decoded. damaged: whether the decoder concealed damage in it.
    """

    pixels: NDArray[np.uint8]
    seconds: float | None
    keyframe: bool
    bytes: int
    evidence: Evidence
    decode_seconds: float
    level_seconds: float
    lost: int = 0
    damaged: bool = False


def first_video(container: InputContainer, limits: Limits, threads: int = 1) -> Any:
    """The container's first video stream, with its decoder prepared. Raises SourceError if there is none, or one too large."""
    if not container.streams.video:
        raise SourceError("there is no video in it: give a file or an address with a video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
        raise SourceError("FFmpeg has no decoder for this video: give H.264, H.265, VP9, AV1 or MJPEG")
    check_size(context.width, context.height, limits)
    context.options = {**DECODER_OPTIONS, "max_pixels": str(limits.pixels)}
    context.thread_count = threads
    context.thread_type = "SLICE" if threads == 1 else "AUTO"
    return stream


def packets_of(container: InputContainer) -> Iterator[Any]:
    """The packets of the first video stream."""
    with suppress(IndexError):  # PyAV's, at the end of a file to which streams were added in its middle
        yield from container.demux(container.streams.video[0])


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raise SourceError unless frames of this size may be decoded; 0: not known yet."""
    if width * height > limits.pixels:
        raise TooLargeError(f"{_found(width, height)}, expected at most {limits.pixels} in all: scale it down")
    if width and min(width, height) < limits.shortest_side:
        raise SourceError(f"{_found(width, height)}, expected at least {limits.shortest_side} on each side")


def _found(width: int, height: int) -> str:
    return f"the video has frames of {width} × {height} pixels"


class TooLargeError(SourceError):
    """Frames of too many pixels."""

    status = int(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


@dataclass
class _Progress:
    """What has happened since the last frame."""

    bytes: int = 0
    seconds: float = 0.0
    lost: int = 0


def decoded(container: InputContainer, limits: Limits = DEFAULT_LIMITS, threads: int = 1) -> Generator[VideoFrame, None, int]:
    """The frames of the first video stream in the order in which they are shown; returns how many packets the end lost.

    limits: `pixels` and `shortest_side` of a frame. threads: of the decoder. Packets that cannot be decoded are counted in the
    next frame's `lost`. Raises SourceError if there is no video, if reading fails, or where nothing can be decoded any more.
    """
    stream = first_video(container, limits, threads)
    read, progress, without = _Reading(stream, limits), _Progress(), 0
    packets = packets_of(container)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.EOFError):
            return progress.lost
        except (av.FFmpegError, OSError) as error:
            raise SourceError(f"the video cannot be read any further ({sentence_of(error)}): check its source") from error
        if packet.stream is not stream:
            continue
        progress.bytes += packet.size
        without += 1
        pictures = _pictures(packet, read.codec)
        while True:
            start = time.perf_counter()
            try:
                picture = next(pictures, None)
                frame = None if picture is None else read.frame(picture, progress, start)
            except av.MemoryError as error:
                raise TooLargeError("a frame of the video is too large to be decoded here: scale it down") from error
            except (av.FFmpegError, BadFrameError):
                progress.lost += 1
                break
            if frame is None:
                progress.seconds += time.perf_counter() - start
                break
            yield frame
            progress, without = _Progress(), 0
        if without > _MOST_DAMAGED:
            raise SourceError(f"{without} packets in a row hold no picture: the video is damaged, or its codec has changed")


def _pictures(packet: "av.Packet[Any]", codec: str) -> Iterator[Any]:
    """The decoded frames that a packet completes; a JPEG as it is. Raises FFmpegError for what cannot be decoded."""
    if codec != "mjpeg":
        yield from packet.decode()
    elif packet.size:
        yield packet


_Read = tuple[NDArray[np.uint8], Evidence, float]  # pixels, evidence, and the seconds that the evidence took


class _Reading:
    """Makes frames of decoded pictures."""

    def __init__(self, stream: Any, limits: Limits) -> None:
        self._stream, self._limits, self.codec = stream, limits, stream.codec_context.name
        self._quality, self._convert = H264Quality(), VideoReformatter()

    def frame(self, picture: Any, progress: _Progress, start: float) -> VideoFrame:
        """The frame of a picture whose decoding began at `start`. Raises SourceError and BadFrameError for one not usable."""
        still = isinstance(picture, av.Packet)
        pixels, evidence, level_seconds = self._still(picture) if still else self._picture(picture)
        return VideoFrame(
            pixels=pixels,
            seconds=_seconds(picture, self._stream),
            keyframe=still or picture.key_frame,
            bytes=progress.bytes,
            evidence=evidence,
            decode_seconds=progress.seconds + time.perf_counter() - start,
            level_seconds=level_seconds,
            lost=progress.lost,
            damaged=not still and picture.is_corrupt,
        )

    def _still(self, packet: "av.Packet[Any]") -> _Read:
        frame = read_frame(bytes(packet), "image/jpeg", self._limits)
        return frame.pixels, frame.evidence, 0.0

    def _picture(self, picture: Any) -> _Read:
        check_size(picture.width, picture.height, self._limits)
        pixels = rgb_of(picture, self._convert)
        start = time.perf_counter()
        if self.codec == "h264":
            self._quality.add(picture)
        evidence = evidence_of(pixels, qp=self._quality.mean_qp, crf=self._quality.crf)
        return pixels, evidence, time.perf_counter() - start


def _seconds(picture: Any, stream: Any) -> float | None:
    if picture.pts is None:
        return None
    if isinstance(picture, av.VideoFrame) and (seconds := picture.time):  # fractions take 10 µs
        return float(seconds)
    base = picture.time_base or stream.time_base
    return None if base is None else float(picture.pts * base)
