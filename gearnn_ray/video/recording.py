"""Writes pictures into an MP4 that can be played to its last fragment, whenever the writer is ended."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gearnn_ray.core.errors import UserError
from gearnn_ray.video.sources import sentence_of

__all__ = ["Recorder"]

_CLOCK = 90_000  # ticks a second, as in MPEG
_LONGEST = 10.0  # seconds between two frames: what is more is a jump of the source's clock


class Recorder:
    """An MP4 with a frame for every picture that is added. Its size is that of the first one; others are fitted into it."""

    def __init__(self, path: Path, frame_seconds: float = 1 / 25) -> None:
        """frame_seconds: how long a frame is shown whose time the source does not say. Raises UserError if the file cannot be
        written.
        """
        self._path, self._usual = path, frame_seconds
        self._video: Any = None
        self._size = (0, 0)
        self._last: float | None = None
        self._ticks = 0
        try:
            # fragments: what was written can be played, also when the process is killed
            self._file = av.open(str(path), "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov+default_base_moof"})
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{path} cannot be written ({sentence_of(error)}): check the path") from error

    def add(self, picture: NDArray[np.uint8], seconds: float | None) -> None:
        """Add a picture RGB [H, W, 3] that is shown from this time of the source on; a clock that jumps is evened out."""
        if self._video is None:
            self._start(picture)
        step = self._usual
        if seconds is not None and self._last is not None and 0 < seconds - self._last < _LONGEST:
            step = seconds - self._last
        if self._last is not None or self._ticks:
            self._ticks += max(1, round(step * _CLOCK))
        self._last = seconds if seconds is not None else (self._last or 0.0) + step
        frame = av.VideoFrame.from_ndarray(_fitted(picture, *self._size), format="rgb24")
        frame.pts = self._ticks
        frame.time_base = Fraction(1, _CLOCK)
        self._mux(frame)

    def close(self) -> None:
        """Write what is left."""
        if self._video is not None:
            self._mux(None)
        self._file.close()

    def _start(self, picture: NDArray[np.uint8]) -> None:
        height, width = (side + side % 2 for side in picture.shape[:2])
        self._size = height, width
        self._video = self._file.add_stream("libx264", rate=Fraction(1 / self._usual).limit_denominator(1001))
        self._video.height, self._video.width, self._video.pix_fmt = height, width, "yuv420p"
        context = self._video.codec_context
        context.time_base = Fraction(1, _CLOCK)
        context.options = {"preset": "veryfast", "crf": "23", "g": "50"}
        context.thread_count = 1

    def _mux(self, frame: av.VideoFrame | None) -> None:
        try:
            for packet in self._video.encode(frame):
                self._file.mux(packet)
        except (av.FFmpegError, OSError) as error:
            raise UserError(
                f"{self._path} cannot be written any further ({sentence_of(error)}): free space on its disk"
            ) from error


def _fitted(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The picture in a frame of this size, with black bars where its shape is another."""
    if picture.shape[:2] == (height, width):
        return np.ascontiguousarray(picture)
    scale = min(height / picture.shape[0], width / picture.shape[1])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    if max(abs(height - picture.shape[0]), abs(width - picture.shape[1])) <= 1:
        return np.pad(picture, ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)), "edge")
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = np.asarray(
        Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    )
    return canvas
