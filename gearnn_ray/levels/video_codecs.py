"""H.265 and AV1 in memory, on one thread. Imports PyAV only when a clip is encoded, for other levels do not need it."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.h264_codec import LEVEL_RATE, Frame, Picture, padded_to_even, rgb_to_yuv, yuv_to_rgb

if TYPE_CHECKING:
    from av import Packet

__all__ = ["AV1", "HEVC", "VideoCodec"]

T = TypeVar("T")


@dataclass(frozen=True)
class VideoCodec:
    """An encoder of FFmpeg and its decoder. options: which make it deterministic and keep it on one thread. least: side of a
    frame in pixels below which frames are padded for the encoder.
    """

    title: str
    encoder: str
    decoder: str
    options: tuple[tuple[str, str], ...]
    least: int

    def through(self, frames: Iterator[Frame], crf: int) -> Iterator[Picture]:
        """Encode and decode a clip of uint8 [H, W, 3] frames of one size, 4:2:0, BT.709, limited range. Raises UserError if PyAV
        has no such encoder or decoder, or if it refuses frames of this size.
        """
        first = next(frames, None)
        if first is None:
            return
        height, width, _ = first.shape
        clip = (self._padded(frame) for frame in itertools.chain([first], frames))
        for pixels in self._decoded(self._encoded(clip, crf)):
            yield Picture(np.ascontiguousarray(pixels[:height, :width]))

    def versions(self) -> dict[str, str]:
        """Versions of PyAV, whose wheel has the encoder, and of libavcodec."""
        return _versions()

    def _padded(self, frame: Frame) -> Frame:
        height, width, _ = frame.shape
        more = ((0, max(self.least - height, 0)), (0, max(self.least - width, 0)), (0, 0))
        return padded_to_even(np.pad(frame, more, "edge"))

    def _encoded(self, frames: Iterator[Frame], crf: int) -> "Iterator[Packet[Any]]":
        import av

        if missing := {self.encoder, self.decoder} - av.codecs_available:
            raise UserError(f"PyAV was built without {min(missing)}, which {self.title} needs: install PyAV's own wheel.")
        first = next(frames)
        os.environ.setdefault("SVT_LOG", "1")  # errors alone, instead of 17 lines about every clip
        encoder = av.CodecContext.create(self.encoder, "w")
        assert isinstance(encoder, av.VideoCodecContext)
        encoder.options = {**dict(self.options), "crf": str(crf)}
        encoder.thread_count = 1
        encoder.pix_fmt, encoder.framerate, encoder.time_base = "yuv420p", LEVEL_RATE, 1 / LEVEL_RATE
        encoder.height, encoder.width, _ = first.shape
        convert = rgb_to_yuv()
        try:
            for time, frame in enumerate(itertools.chain([first], frames)):
                video = convert(frame)
                video.pts = time
                yield from _at_own_priority(functools.partial(encoder.encode, video))
            yield from _at_own_priority(functools.partial(encoder.encode, None))
        except av.FFmpegError as error:
            height, width, _ = first.shape
            raise UserError(f"{self.encoder} refuses frames of {width} × {height} pixels: use another size or codec.") from error

    def _decoded(self, packets: "Iterator[Packet[Any]]") -> Iterator[Frame]:
        import av

        first = next(packets, None)  # after which it is known that PyAV has the decoder
        decoder, convert = av.CodecContext.create(self.decoder, "r"), yuv_to_rgb()
        assert isinstance(decoder, av.VideoCodecContext)
        decoder.thread_count = 1
        for packet in itertools.chain([first], packets, [None]):
            for video in decoder.decode(packet):
                yield convert(video)


def _at_own_priority(work: Callable[[], T]) -> T:
    """SVT-AV1 gives the thread that calls it real-time priority if the user may have that, and all that this thread starts later
    would inherit it: a job in a container that runs as root would starve the rest of the machine.
    """
    if not hasattr(os, "sched_getscheduler"):
        return work()
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        return work()
    finally:
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, priority)


@functools.cache
def _versions() -> dict[str, str]:
    import av

    return {"pyav": av.__version__, "libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}


HEVC: Final = VideoCodec(
    title="H.265",
    encoder="libx265",
    decoder="hevc",
    options=(("preset", "medium"), ("x265-params", "log-level=none:pools=none:frame-threads=1:wpp=0")),
    least=32,
)
AV1: Final = VideoCodec(
    title="AV1", encoder="libsvtav1", decoder="libdav1d", options=(("preset", "8"), ("svtav1-params", "lp=1")), least=64
)
