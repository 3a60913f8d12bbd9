"""What a page shows of a stream while it runs: its latest picture and line, its recent levels, its rates."""

import io
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gearnn_ray.video.lines import Line

__all__ = ["LiveStream", "StreamState", "jpeg_of"]

_HISTORY = 600  # frames whose levels are shown
_LINES = 200  # of which a reader may be late
_RATE_SECONDS = 5.0
_PICTURE_SECONDS = 0.2  # between two pictures: a page shows five a second
_WANTED_SECONDS = 10.0  # after which a page that has not asked again counts as closed


@dataclass(frozen=True)
class StreamState:
    """A stream as it is now, in JSON values. online: whether frames come. problem: why they do not. levels: seconds of the stream
    and level used of the latest frames. values: for each of them the running score (in percent of `score_metric`) where labels
    are known, else the confidence of the answer (0 to 1), or None. level_frames: how many frames used each level.
    """

    stream: str
    online: bool = False
    problem: str | None = None
    frames: int = 0
    dropped: int = 0
    lost: int = 0
    frames_per_second: float = 0.0
    line: Line | None = None
    levels: list[tuple[float, str]] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    score_metric: str | None = None
    level_frames: dict[str, int] = field(default_factory=dict)


class LiveStream:
    """The state of one stream. One thread adds frames, others ask."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.score_metric: str | None = None
        self._level_frames: dict[str, int] = {}
        self._lock = threading.Lock()
        self._times: deque[float] = deque()
        self._levels: deque[tuple[float, str, float | None]] = deque(maxlen=_HISTORY)
        self._lines: deque[tuple[int, Line]] = deque(maxlen=_LINES)
        self._picture: bytes | None = None
        self._wanted = self._drawn = -1e9
        self._online, self._dropped, self._lost, self._frames = False, 0, 0, 0
        self._problem: str | None = None

    def add(self, line: Line, value: float | None, level: str, picture: Callable[[], NDArray[np.uint8]] | None = None) -> None:
        """A frame was processed. value: as in `StreamState.values`. level: used. picture: draws the frame; it is called only
        where a picture is due.
        """
        now = time.monotonic()
        if picture is not None and self.is_picture_due():
            self.show(jpeg_of(picture()))
        with self._lock:
            self._frames += 1
            self._online, self._problem = True, None
            self._times.append(now)
            while now - self._times[0] > _RATE_SECONDS:
                self._times.popleft()
            pts = line["pts"]
            self._levels.append((float(pts) if isinstance(pts, float) else now, level, value))
            self._level_frames[level] = self._level_frames.get(level, 0) + 1
            self._lines.append((self._frames, line))

    def is_picture_due(self) -> bool:
        """Whether somebody looks and the latest picture is old. The next one is then due only after a while."""
        now = time.monotonic()
        due = now - self._wanted < _WANTED_SECONDS and now - self._drawn >= _PICTURE_SECONDS
        if due:
            self._drawn = now
        return due

    def show(self, picture: bytes) -> None:
        """Take a JPEG as the latest picture."""
        self._picture = picture

    def count(self, dropped: int, lost: int, problem: str | None) -> None:
        """What the reader of the stream says: frames dropped, packets lost, and why it is offline."""
        with self._lock:
            self._dropped, self._lost = dropped, lost
            if problem is not None:
                self._online, self._problem = False, problem

    def state(self) -> StreamState:
        """The state now."""
        with self._lock:
            times, line = self._times, self._lines[-1][1] if self._lines else None
            span = time.monotonic() - times[0] if times else 0.0
            return StreamState(
                self.stream, self._online, self._problem, self._frames, self._dropped, self._lost,
                round(len(times) / max(span, 1.0), 2), line, [(pts, level) for pts, level, _ in self._levels],
                [value for _, _, value in self._levels], self.score_metric, dict(self._level_frames),
            )  # fmt: skip

    def picture(self) -> bytes | None:
        """The latest picture as a JPEG; None until one was drawn. Asking for it is what makes pictures be drawn."""
        self._wanted = time.monotonic()
        return self._picture

    def lines_after(self, number: int) -> list[tuple[int, Line]]:
        """The kept lines behind the one with this number, which counts from 1, with their numbers."""
        with self._lock:
            return [(at, line) for at, line in self._lines if at > number]


def jpeg_of(pixels: NDArray[np.uint8]) -> bytes:
    """A picture, RGB [H, W, 3], as a page shows it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()
