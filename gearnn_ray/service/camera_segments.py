"""Segments of cameras that the service steers (`knobs.wire`): read in their three parts, and made into frames.

The head is read first, the segment is answered when all of it is there, and the report follows whenever the camera is done with
it. All of it is read as it comes, so that neither side waits for the other.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager

import numpy as np
from starlette.requests import ClientDisconnect, Request

from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.wire import CONTENT_TYPE, HEAD_BYTES, Head, Report, jpegs, parsed
from gearnn_ray.service.admission import Admission, Reservation
from gearnn_ray.service.requests import RefusedError
from gearnn_ray.serving.frames import Limits, evidence_of, read_frame
from gearnn_ray.video.decoding import VideoFrame, check_size
from gearnn_ray.video.upload import segment_frames

__all__ = ["CameraSegment", "is_camera_segment"]


def is_camera_segment(request: Request) -> bool:
    """Whether the request asks for knobs."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == CONTENT_TYPE


class CameraSegment:
    """A segment and what its camera says of it. decoded: how many of its frames there were."""

    def __init__(self, head: Head, data: bytes, body: "_Body", admission: Admission) -> None:
        self.head, self._data, self._body, self._admission = head, data, body, admission
        self.decoded = 0

    @classmethod
    @asynccontextmanager
    async def received(cls, request: Request, admission: Admission, held: Reservation) -> AsyncIterator["CameraSegment"]:
        """The segment; its report may still be on its way. Raises RefusedError, WireError, SourceError and BusyError."""
        body = _Body(request, held, admission.body_seconds)
        reading = asyncio.create_task(body.read())
        try:
            await body.allow(HEAD_BYTES)
            head = parsed(Head, await body.line(HEAD_BYTES, "head"), "the segment's head")
            if head.bytes > admission.frame.body_bytes:
                raise RefusedError(413, f"The segment is larger than the {admission.frame.body_bytes:,} bytes allowed here.")
            if len(head.sent) > admission.segment_frames:
                raise RefusedError(413, f"The segment has more than the {admission.segment_frames} frames allowed here.")
            for height, width in (head.frame, head.size):
                check_size(width, height, admission.frame)
            # the report, too: a camera that waits for room would not read its answer
            await body.allow(head.bytes + head.report_bytes)
            yield cls(head, await body.exactly(head.bytes), body, admission)
        finally:
            reading.cancel()

    def frames(self) -> Generator[VideoFrame, None, None]:
        """Its frames, at their times in the stream. Raises what `segment_frames` raises."""
        limits, step = self._admission.frame, self.head.seconds / self.head.frames
        frames = self._stills(limits) if self.head.codec == "jpeg" else self._video(limits)
        for frame in frames:
            index = self.head.sent[min(self.decoded, len(self.head.sent) - 1)]
            self.decoded += 1
            yield frame._replace(seconds=self.head.start + index * step)

    async def report(self) -> Report:
        """What its camera says behind the segment. Raises RefusedError and WireError."""
        expected = len(self.head.sent)
        if self.decoded != expected:
            raise RefusedError(422, f"The segment has {self.decoded} frames, and its head says {expected}: send all of them.")
        return parsed(Report, await self._body.line(self.head.report_bytes, "report"), "the segment's report")

    def _stills(self, limits: Limits) -> Generator[VideoFrame, None, None]:
        for data in jpegs(self._data, self.head):
            frame = read_frame(data, "image/jpeg", limits)
            yield VideoFrame(frame.pixels, None, True, len(data), frame.evidence, 0.0, 0.0)

    def _video(self, limits: Limits) -> Generator[VideoFrame, None, None]:
        """Decoded frames as they were before they were padded, with what the encoder was told as their evidence: nothing about
        the coding has to be guessed. Where the size is not the declared one, nothing declared is believed.
        """
        height, width = self.head.size
        for frame in segment_frames(self._data, limits, self._admission.segment_frames):
            if frame.pixels.shape[:2] != (height + height % 2, width + width % 2):
                yield frame
                continue
            pixels = np.ascontiguousarray(frame.pixels[:height, :width])
            qp = None if self.head.qp is None else float(self.head.qp)
            yield frame._replace(pixels=pixels, evidence=evidence_of(pixels, qp=qp, crf=self.head.crf))


class _Body:
    """The body of a request, which is read as fast as it comes."""

    def __init__(self, request: Request, held: Reservation, seconds: float) -> None:
        """held: counts the bytes. seconds: in which each part must arrive after it was asked for."""
        self._request, self._held, self._seconds = request, held, seconds
        self._most = 0
        self._bytes = bytearray()
        self._ended = False
        self._problem: UserError | None = None
        self._changed = asyncio.Condition()

    async def read(self) -> None:
        """Read until all of it is there, or more waits than may."""
        try:
            async for chunk in self._request.stream():
                async with self._changed:
                    await self._changed.wait_for(lambda: len(self._bytes) <= self._most)
                    self._held.add(len(chunk))
                    self._bytes += chunk
                    self._changed.notify_all()
        except ClientDisconnect:
            self._problem = RefusedError(400, "The connection ended before the whole segment was received.")
        except UserError as problem:
            self._problem = problem
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    async def line(self, most: int, what: str) -> bytes:
        """The next line, without its end."""
        await self._wait(lambda: b"\n" in self._bytes or len(self._bytes) > most, what)
        line, found, _ = bytes(self._bytes[: most + 1]).partition(b"\n")
        if not found:
            problem = f"has no end within {most:,} bytes" if len(line) > most else "is missing or cut short"
            raise RefusedError(400, f"The segment's {what} {problem}: send one line of JSON.")
        del self._bytes[: len(line) + 1]
        return line

    async def exactly(self, size: int) -> bytes:
        """The next so many bytes."""
        await self._wait(lambda: len(self._bytes) >= size, "video")
        if len(self._bytes) < size:
            raise RefusedError(400, f"The segment ends after {len(self._bytes)} of its {size} bytes: send all of them.")
        taken = bytes(self._bytes[:size])
        del self._bytes[:size]
        return taken

    async def allow(self, most: int) -> None:
        """From now on so many bytes may wait."""
        async with self._changed:
            self._most = most
            self._changed.notify_all()

    async def _wait(self, done: Callable[[], bool], what: str) -> None:
        """Wait until it is done, or the body has ended."""
        try:
            async with asyncio.timeout(self._seconds), self._changed:
                await self._changed.wait_for(lambda: self._ended or done())
        except TimeoutError:
            late = f"The segment's {what} did not arrive within {self._seconds:g} seconds: send it faster, or less of it."
            raise RefusedError(408, late) from None
        if self._problem is not None and not done():
            raise self._problem
