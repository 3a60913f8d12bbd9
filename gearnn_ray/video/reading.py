"""Reads a source in a thread of its own, so that it decodes while the network computes, and survives a camera that goes away.

Between reader and network there is a queue of a few frames. When it is full, either the oldest frame goes (a camera, whose newest
frame counts), or the reader waits (a film). So memory is bounded at any speed of the source.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from gearnn_ray.serving.frames import Limits
from gearnn_ray.video.decoding import DEFAULT_LIMITS, VideoFrame, decoded
from gearnn_ray.video.sources import Source, SourceError, open_source

__all__ = ["Reader", "Slow", "pauses"]

Slow = Literal["newest", "all"]
"""What happens when frames come faster than they are processed: only the newest is kept, or the source waits."""

_QUEUED = 4  # frames; one is being processed meanwhile
_LONGEST_PAUSE = 30.0


def pauses() -> Iterator[float]:
    """Seconds before each further attempt: 1, 2, 4, … 30."""
    pause = 1.0
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)


@dataclass(frozen=True)
class Ended:
    """The end of a source; problem: the error that ended it, None at a regular end."""

    problem: SourceError | None


class Reader:
    """The frames of a source, decoded ahead. Iterate over it, or `take` what there is."""

    def __init__(
        self,
        address: str,
        slow: Slow,
        *,
        again: bool = False,
        patient: bool = False,
        limits: Limits = DEFAULT_LIMITS,
        hosts: Collection[str] = (),
        hardware: str | None = None,
        threads: int = 1,
        open_frames: Callable[[], Iterator[VideoFrame]] | None = None,
        arrived: Callable[[], object] = lambda: None,
    ) -> None:
        """again: open a source that ended or failed again, after growing pauses, for ever; patient: also one that has not given a
        frame yet, and may have a wrong address. open_frames: what is read instead of the address. arrived: called by the reading
        thread after each frame, for those who do not wait in `take`.
        """
        self.address, self._slow, self._again = address, slow, again and patient
        self._again_after_a_frame = again
        self._arrived = arrived
        self._open = open_frames or (lambda: self._decoded(limits, hosts, hardware, threads))
        self._frames: deque[VideoFrame] = deque()
        self._changed = threading.Condition()
        self._stopped = self._overflowed = False
        self._ended: Ended | None = None
        self.dropped = 0
        """frames that were decoded and not processed"""
        self.problem: str | None = None
        """why the source is offline; None while it is read"""
        self.refused: list[str] = []
        """addresses that a playlist named and that were not opened"""
        self._thread = threading.Thread(target=self._read, name=f"read {address[:40]}", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[VideoFrame]]:
        """Batches of the frames that are there, at least one; until the source ends. Raises SourceError where it failed."""
        while batch := self.take():
            yield batch

    def take(self, most: int = _QUEUED, seconds: float | None = None) -> list[VideoFrame]:
        """Up to `most` frames, the oldest first; waits for the first one, for at most `seconds`. Empty at the end of the source,
        or when time is up.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._ended, seconds)
            if self._overflowed:
                self.dropped += len(self._frames) - 1
                self._frames = deque([self._frames[-1]])
                self._overflowed = False
            taken = [self._frames.popleft() for _ in range(min(most, len(self._frames)))]
            self._changed.notify_all()
            if not taken and self._ended is not None and self._ended.problem is not None:
                raise self._ended.problem
            return taken

    @property
    def ended(self) -> bool:
        """Whether all frames were taken and no more will come."""
        with self._changed:
            return self._ended is not None and not self._frames

    def close(self) -> None:
        """Stop reading."""
        with self._changed:
            self._stopped = True
            self._frames.clear()
            self._changed.notify_all()
        self._thread.join(timeout=15)

    def _decoded(self, limits: Limits, hosts: Collection[str], hardware: str | None, threads: int) -> Iterator[VideoFrame]:
        source: Source = open_source(self.address, hosts, hardware, limits)
        frames = 0
        try:
            for frame in decoded(source.container, limits, threads):
                frames += 1
                yield frame
        finally:
            source.close()
            self.refused += source.refused
        if not frames:
            reason = f"it names {source.refused[0]}, which may not be opened here" if source.refused else "no frame was in it"
            raise SourceError(f"{self.address} gave no picture: {reason}")

    def _read(self) -> None:
        waits = pauses()
        while not self._stopped:
            problem: SourceError | None = None
            try:
                for frame in self._open():
                    self._again = self._again_after_a_frame
                    if self.problem is not None:
                        self.problem, waits = None, pauses()
                    if not self._put(frame):
                        break
            except SourceError as error:
                problem = error
            except Exception as error:
                problem = SourceError(f"{self.address} cannot be read ({type(error).__name__}: {error})")
            if not self._again or self._stopped:
                with self._changed:
                    self._ended = Ended(problem)
                    self._changed.notify_all()
                return
            self.problem = str(problem or "the source has ended")
            until = time.monotonic() + next(waits)
            with self._changed:
                self._changed.wait_for(lambda: self._stopped, until - time.monotonic())
        with self._changed:
            self._ended = self._ended or Ended(None)
            self._changed.notify_all()

    def _put(self, frame: VideoFrame) -> bool:
        with self._changed:
            if self._slow == "newest":
                if len(self._frames) >= _QUEUED:
                    self._frames.popleft()
                    self.dropped += 1
                    self._overflowed = True  # what is next taken is the newest frame alone
            else:
                self._changed.wait_for(lambda: len(self._frames) < _QUEUED or self._stopped)
            if self._stopped:
                return False
            self._frames.append(frame)
            self._changed.notify_all()
        self._arrived()
        return True
