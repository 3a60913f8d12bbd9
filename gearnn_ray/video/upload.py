"""The frames of a segment, and those of an upload that is still arriving.

upload = Upload(most=16 * 2**20, seconds=10)
upload.add(chunk); upload.end()              # where the bytes arrive: never blocks
for frame in upload_frames(upload): ...      # in a thread: blocks until there are bytes
"""

import io
import threading
import time
from collections.abc import Generator
from http import HTTPStatus

from gearnn_ray.serving.frames import Limits
from gearnn_ray.video.decoding import VideoFrame, decoded
from gearnn_ray.video.segments import HEAD_BYTES, Mp4Tables, SegmentError, container_of, open_container, open_segment
from gearnn_ray.video.sources import SourceError

__all__ = ["Upload", "segment_frames", "upload_frames"]


class Upload(io.RawIOBase):
    """The bytes of an upload, as a file that blocks until more of them have arrived. It cannot seek.

    most: bytes that may wait to be read. seconds: within which a frame must be there after it was asked for (`await_frame`).
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._waiting = bytearray()
        self._changed = threading.Condition()
        self._ended = False
        self._tables: Mp4Tables | None = None
        self.problem: SourceError | None = None
        """why the upload ended early; `read` itself raises nothing, because FFmpeg would drop it"""
        self.await_frame()

    def add(self, chunk: bytes) -> None:
        """The next bytes. If more wait than may, the upload ends."""
        with self._changed:
            if len(self._waiting) + len(chunk) > self._most:
                ahead = f"more than {self._most:,} bytes of the upload wait to be processed"
                slower = "send it at the pace of the video, with fewer or smaller frames"
                self._end(SegmentError(f"{ahead}: {slower}", HTTPStatus.REQUEST_ENTITY_TOO_LARGE))
            elif not self._ended:
                self._waiting += chunk
            self._changed.notify_all()

    def end(self, problem: SourceError | None = None) -> None:
        """No more bytes will come. problem: why they do not; what waits is then not read any more."""
        with self._changed:
            self._end(problem)

    def await_frame(self) -> None:
        """From now on the next frame is awaited."""
        self._deadline = time.monotonic() + self._seconds

    def head(self, size: int) -> bytes:
        """The first bytes, which are also read later; fewer at the end of the upload."""
        with self._changed:
            self._wait_for(size)
            return bytes(self._waiting[:size])

    def check(self, tables: Mp4Tables) -> None:
        """Show all bytes to `tables` before they are read."""
        self._tables = tables

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """At least one byte; none at the end, or where there is a `problem`."""
        with self._changed:
            self._wait_for(1)
            taken = bytes(self._waiting[: size if size >= 0 else None])
            del self._waiting[: len(taken)]
            if self._tables is not None and taken:
                try:
                    self._tables.add(taken)
                except SegmentError as problem:
                    self._end(problem)
                    return b""
            return taken

    def _wait_for(self, size: int) -> None:
        if not self._changed.wait_for(lambda: self._ended or len(self._waiting) >= size, self._deadline - time.monotonic()):
            late = f"no frame has arrived for {self._seconds:g} seconds: send the video without pauses"
            self._end(SegmentError(late, HTTPStatus.REQUEST_TIMEOUT))

    def _end(self, problem: SourceError | None) -> None:
        if problem is not None:
            self._waiting.clear()
            self.problem = self.problem or problem
        self._ended = True
        self._changed.notify_all()


def segment_frames(data: bytes, limits: Limits, most_frames: int) -> Generator[VideoFrame, None, None]:
    """The frames of a whole segment. Raises what `open_segment` raises, and SegmentError where its end cannot be decoded."""
    with open_segment(data, limits, most_frames) as container:
        yield from _to_the_end(decoded(container, limits), most_frames)


def upload_frames(upload: Upload, limits: Limits) -> Generator[VideoFrame, None, None]:
    """The frames of an upload while it arrives. Raises SourceError for what is no video, and the upload's own `problem`."""
    try:
        container = container_of(upload.head(HEAD_BYTES))
        if container == "mov":
            upload.check(Mp4Tables(seekable=False))
        with open_container(upload, container, limits) as opened:
            for frame in _to_the_end(decoded(opened, limits)):
                yield frame
                upload.await_frame()
    except SourceError as error:
        raise upload.problem or error from None
    if upload.problem is not None:
        raise upload.problem


def _to_the_end(frames: Generator[VideoFrame, None, int], most: int | None = None) -> Generator[VideoFrame, None, None]:
    """The frames. Raises SegmentError where there is none, where the last one is damaged or lost, or where there are too many."""
    number, damaged = 0, False
    while True:
        try:
            frame = next(frames)
        except StopIteration as end:
            lost: int = end.value
            break
        if number == most:  # a packet may hold several
            raise SegmentError(f"the segment has more than the {most} frames allowed here: send shorter ones", 413)
        number, damaged = number + 1, frame.damaged
        yield frame
    if not number:
        raise SegmentError("no picture of the segment can be decoded: it is damaged", HTTPStatus.UNPROCESSABLE_ENTITY)
    if lost or damaged:
        raise SegmentError("the last picture of the segment is damaged or cut short: send all of it")
