"""POST /streams/{stream}/segments: a video's frames, each as a line of JSON (application/x-ndjson), sent while it is decoded.

A body with a content-length is one segment, which is checked to its end before the first line. A body in chunks may be endless:
it is decoded while it arrives, and answered at the same time. Optional headers are those of the bundle and of the least score.

    the body ─► a thread that decodes ─► level of each frame, in order ─► the batches of the replica ─► lines, in order
                                           └── at most FRAMES_AHEAD of one stream, so that a batch holds frames of several

What is wrong before the first line is an error response; what goes wrong later is a last line {"error": "…"}. Ray Serve's proxy
takes the chunks of an upload as fast as the client sends them, whether or not they are processed, so that a client cannot be
slowed down: an upload of which more than `Limits.body_bytes` wait ends with an error.

A camera that wants its knobs steered sends application/x-gearnn-segment (`camera_segments`), and gets them in a last line.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gearnn_ray.config.serve import FRAMES_AHEAD
from gearnn_ray.service.admission import Admission, Reservation
from gearnn_ray.service.backend import Backend, Prediction
from gearnn_ray.service.camera_segments import CameraSegment, is_camera_segment
from gearnn_ray.service.requests import RefusedError, bundle_of, is_endless, key_of, least_score_of, name_of, refusal, whole_body
from gearnn_ray.tasks.base import Served, Task
from gearnn_ray.video.decoding import VideoFrame
from gearnn_ray.video.lines import line_of, written
from gearnn_ray.video.sources import SourceError
from gearnn_ray.video.upload import Upload, segment_frames, upload_frames

__all__ = ["answer_segments"]

T = TypeVar("T")
_NextFrame = Callable[[], Awaitable[VideoFrame | None]]


async def answer_segments(request: Request, backend: Backend, admission: Admission) -> Response:
    """The response to one segment or upload. Raises what is wrong with it before its first line."""
    stream = name_of(request.scope["path"].removeprefix("/streams/").removesuffix("/segments"), "The stream")
    answering = _Stream(stream, key_of(request, stream), bundle_of(request), least_score_of(request), backend, admission)
    lines = answering.lines(request)
    return _Lines(await anext(lines), lines)


class _Lines(StreamingResponse):
    """Sends lines while the body may still arrive. Serve cancels it when the client is gone."""

    def __init__(self, first: bytes, lines: AsyncGenerator[bytes, None]) -> None:
        self._first, self._lines = first, lines
        super().__init__(self._all(), media_type="application/x-ndjson", headers={"cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._lines):
            await self.stream_response(send)  # the inherited method would read the body, to hear that the client is gone

    async def _all(self) -> AsyncIterator[bytes]:
        yield self._first
        async for line in self._lines:
            yield line


@dataclass
class _Stream:
    """One segment or upload of a stream. key: of what is remembered of the stream."""

    name: str
    key: str
    bundle: str | None
    least_score: float | None
    backend: Backend
    admission: Admission
    _frames: int = 0
    _room: int = 0

    async def lines(self, request: Request) -> AsyncGenerator[bytes, None]:
        """All lines, in order. Raises only before the first."""
        task, sent = self.backend.task(self.bundle), 0
        try:
            with self.admission.streams.reserved(1), self.admission.memory.reserved() as held:
                async with AsyncExitStack() as stack:
                    camera = None
                    if is_camera_segment(request):
                        camera = await stack.enter_async_context(CameraSegment.received(request, self.admission, held))
                        next_frame = await stack.enter_async_context(_in_a_thread(camera.frames()))
                    else:
                        next_frame = await stack.enter_async_context(_decoding(request, self.admission, held))
                    in_order = _in_order(next_frame, lambda frame: self._answered(frame, task, held))
                    async for answered in await stack.enter_async_context(aclosing(in_order)):
                        line, frame, prediction = answered
                        sent += len(line)
                        if sent > self.admission.answer_bytes:
                            most = f"{self.admission.answer_bytes:,} bytes of lines"
                            raise RefusedError(413, f"The answer has reached the {most} allowed here: go on in another request.")
                        self.backend.count_line(self.bundle, prediction.estimate.level, 200)
                        yield line
                    if camera is not None:
                        told = camera.head, await camera.report()
                        advice = await self.backend.advise(self.key, self.bundle, frame, prediction.estimate, *told)
                        yield advice.line()
        except Exception as problem:
            status, sentence = refusal(problem, "a segment")
            self.backend.count_line(self.bundle, "none", status)
            if not sent:
                raise
            yield json.dumps({"error": sentence}, ensure_ascii=False).encode() + b"\n"

    async def _answered(self, frame: VideoFrame, task: Task, held: Reservation) -> tuple[bytes, VideoFrame, Prediction]:
        """The line of the next frame, and what it is about."""
        number, self._frames = self._frames, self._frames + 1
        if (room := FRAMES_AHEAD * frame.pixels.nbytes) > self._room:
            held.add(room - self._room)
            self._room = room
        prediction = await self.backend.predict_next(frame, self.key, self.bundle)
        line = await asyncio.to_thread(self._written, number, frame, task, prediction)
        return line, frame, prediction

    def _written(self, number: int, frame: VideoFrame, task: Task, prediction: Prediction) -> bytes:
        seconds = {"decode": frame.decode_seconds - frame.level_seconds, "level": frame.level_seconds, **prediction.seconds}
        milliseconds = {name: 1000 * part for name, part in seconds.items()}
        served = Served(frame.pixels, prediction.class_names, {}, self.least_score)
        described = task.described(prediction.content, served)
        line = line_of(self.name, number, frame, prediction.estimate, prediction.release, milliseconds, described)
        return written(line).encode()


@asynccontextmanager
async def _decoding(request: Request, admission: Admission, held: Reservation) -> AsyncIterator[_NextFrame]:
    """A function that waits for the next frame of the body; None at its end."""
    upload, feeding = None, None
    if is_endless(request):
        held.add(admission.frame.body_bytes)
        upload = Upload(admission.frame.body_bytes, admission.body_seconds)
        feeding = asyncio.create_task(_feed(request, upload))
        frames = upload_frames(upload, admission.frame)
    else:
        body = await whole_body(request, admission, held)
        frames = segment_frames(body, admission.frame, admission.segment_frames)
    async with _in_a_thread(frames) as next_frame:
        try:
            yield next_frame
        finally:
            if upload is not None and feeding is not None:
                feeding.cancel()
                upload.end(SourceError("it is not read any further"))  # wakes the thread


@asynccontextmanager
async def _in_a_thread(frames: Generator[VideoFrame, None, None]) -> AsyncIterator[_NextFrame]:
    """A function that waits for the next frame; None at their end."""
    loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "segment")
    try:
        yield lambda: loop.run_in_executor(thread, next, frames, None)
    finally:
        thread.submit(frames.close)
        thread.shutdown(wait=False)


async def _feed(request: Request, upload: Upload) -> None:
    try:
        async for chunk in request.stream():
            upload.add(chunk)
        upload.end()
    except ClientDisconnect:
        upload.end(SourceError("the connection ended before the upload did"))


async def _in_order(next_frame: _NextFrame, answer: Callable[[VideoFrame], Coroutine[Any, Any, T]]) -> AsyncGenerator[T, None]:
    """The answers to all frames in their order, each as soon as it is there; at most `FRAMES_AHEAD` frames are decoded or
    processed at a time. An error of `next_frame` follows the answers to the frames before it.
    """
    answers: asyncio.Queue[asyncio.Future[T] | None] = asyncio.Queue()
    room = asyncio.Semaphore(FRAMES_AHEAD)

    async def read() -> None:
        await room.acquire()
        while (frame := await next_frame()) is not None:
            answers.put_nowait(asyncio.ensure_future(answer(frame)))
            await room.acquire()

    reading = asyncio.ensure_future(read())
    reading.add_done_callback(lambda _: answers.put_nowait(None))
    try:
        while (future := await answers.get()) is not None:
            try:
                answered = await future
            finally:
                room.release()
            yield answered
        reading.result()
    finally:
        left: list[asyncio.Future[Any]] = [reading, *filter(None, _left(answers))]
        for future in left:
            future.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _left(queue: asyncio.Queue[T]) -> list[T]:
    return [queue.get_nowait() for _ in range(queue.qsize())]
