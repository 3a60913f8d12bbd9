"""Cameras that the service keeps open itself, in Ray actors that decode, find levels, and send frames to the replicas.

    camera ─► reader (thread) ─► level of each frame ─► replicas' batches ─► lines, picture and rates ─► /streams/NAME
                 newest frame counts                     at most FRAMES_AHEAD under way, answered in order

Each camera has an actor of its own while there are no more cameras than CPUs in the cluster; more cameras share as many actors,
because a further process would cost its memory and decode nothing faster. What is in an answer the replicas say, and they draw
it too: a camera's process knows nothing of tasks, and does without torch, which takes seconds and 300 MB to import.

A camera that goes offline is opened again after growing pauses. An actor that dies is started again by Ray with all its
cameras, on another node if its own is gone; replicas look actors up by name, so that nothing else knows where they are.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

# Ray starts workers at niceness 15: cameras would lose frames to any other process on the machine.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util import metrics

from gearnn_ray.config.serve import FRAMES_AHEAD, ServeConfig
from gearnn_ray.serving.frames import Limits
from gearnn_ray.serving.level_estimation import LevelEstimate, LevelEstimator, Reference
from gearnn_ray.video.decoding import VideoFrame
from gearnn_ray.video.lines import Line, line_of
from gearnn_ray.video.live import LiveStream, StreamState
from gearnn_ray.video.reading import Reader
from gearnn_ray.video.stream_levels import StreamLevels

__all__ = ["CameraAnswer", "CameraStreams", "LevelFacts", "cameras", "process_names"]

_NAMESPACE = "gearnn_cameras"
_ANSWER_SECONDS = 30.0  # after which a frame counts as lost with its replica
_ASKED_SECONDS = 2.0  # for an actor's answer to a page
_PAUSE = 0.5  # seconds before a replica that failed is asked again
_GAUGES_SECONDS = 5.0  # between two looks at what gauges show; Ray drops a gauge that is not set again
_PAGES = 8  # calls of pages that an actor answers at the same time
_LATENCIES = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LevelFacts:
    """What levels of a release's frames are found with."""

    digest: str
    levels: tuple[str, ...]
    reference: Reference | None


@dataclass(frozen=True)
class CameraAnswer:
    """A replica's answer to one frame of a camera.

    estimate, release, seconds: as in `backend.Prediction`. described: `Task.described`. picture: the frame with the answer drawn
    on it, a JPEG; None where none was wanted.
    """

    estimate: LevelEstimate
    release: str
    seconds: Mapping[str, float]
    described: Mapping[str, object]
    picture: bytes | None


def process_names(cameras: Sequence[str], cpus: int) -> dict[str, str]:
    """The name of the actor that keeps each camera open: at most one actor for each CPU, with equally many cameras each."""
    count = max(1, min(len(cameras), cpus))
    return {camera: f"cameras-{position % count}" for position, camera in enumerate(cameras)}


class _Metrics:
    """Metrics for Prometheus of all cameras of one process."""

    def __init__(self) -> None:
        self.frames = metrics.Counter("gearnn_stream_frames", "Frames processed, by level used.", ("stream", "level"))
        self.dropped = metrics.Gauge("gearnn_stream_dropped", "Frames dropped because newer ones had come.", ("stream",))
        self.online = metrics.Gauge("gearnn_stream_online", "1: frames come, 0: they do not.", ("stream",))
        self.seconds = metrics.Histogram("gearnn_stream_seconds", "Time from a frame to its answer.", _LATENCIES, ("stream",))


class _Camera:
    """One camera. A thread reads it; all else happens in the event loop of its process, but for `state` and `live`, which any
    thread may use.
    """

    def __init__(self, name: str, address: str, config: ServeConfig, loop: asyncio.AbstractEventLoop, counted: _Metrics) -> None:
        self.live = LiveStream(name)
        self._name, self._config, self._metrics = name, config, counted
        self._arrived = asyncio.Event()
        self._reader = Reader(
            address, config.slow, again=True, patient=True, limits=Limits(pixels=int(config.limits.megapixels * 1e6)),
            hosts=config.hosts, arrived=partial(loop.call_soon_threadsafe, self._arrived.set),
        )  # fmt: skip
        under_way = FRAMES_AHEAD - 2  # one more is waited for in `_receive`, another one in `_send`
        self._under_way: asyncio.Queue[tuple[VideoFrame, float, Awaitable[CameraAnswer]]] = asyncio.Queue(under_way)
        self._facts: LevelFacts | None = None
        self._answered = self._lost = 0

    def state(self) -> StreamState:
        """How the stream is now."""
        self.live.count(self._reader.dropped + self._lost, 0, self._reader.problem)
        return self.live.state()

    async def work(self, replicas: Any) -> None:
        """Read, send and receive for ever, whatever a frame, a replica or the store does. replicas: a handle of Serve's."""
        await asyncio.gather(
            *(_always(self._name, work) for work in (lambda: self._send(replicas), self._receive, self._measure))
        )

    async def _send(self, replicas: Any) -> None:
        """Frames to the replicas, until there is a new release, whose levels are others."""
        async with asyncio.timeout(_ANSWER_SECONDS):
            facts: LevelFacts = await replicas.level_facts.remote()
        self._facts = facts
        estimator = LevelEstimator(facts.levels, facts.reference, self._config.untrained, self._config.cameras)
        levels = StreamLevels(estimator, self._name)
        while self._facts is facts:
            frame = await self._next_frame()
            estimate = levels.estimate(frame.evidence)
            answer = replicas.predict_at.remote(frame, estimate, self.live.is_picture_due())
            await self._under_way.put((frame, time.perf_counter(), answer))

    async def _next_frame(self) -> VideoFrame:
        while True:
            self._arrived.clear()
            if frames := self._reader.take(1, seconds=0):
                return frames[0]
            await self._arrived.wait()

    async def _receive(self) -> None:
        """Answers from the replicas, in the order of the frames."""
        while True:
            frame, since, response = await self._under_way.get()
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    answer = await response
            except (RayError, TimeoutError, RuntimeError, asyncio.CancelledError):
                self._lost += 1
                self._facts = None
                continue
            self._metrics.seconds.observe(time.perf_counter() - since, {"stream": self._name})
            self._metrics.frames.inc(1, {"stream": self._name, "level": answer.estimate.level})
            self._show(frame, answer)
            if self._facts is not None and not answer.release.endswith(self._facts.digest):
                self._facts = None

    def _show(self, frame: VideoFrame, answer: CameraAnswer) -> None:
        parts = {"decode": frame.decode_seconds - frame.level_seconds, "level": frame.level_seconds, **answer.seconds}
        milliseconds = {name: 1000 * part for name, part in parts.items()}
        line = line_of(self._name, self._answered, frame, answer.estimate, answer.release, milliseconds, answer.described)
        self._answered += 1
        detections: Any = answer.described.get("detections", ())
        best = max((found["score"] for found in detections), default=None)
        self.live.add(line, best, answer.estimate.level)
        if answer.picture is not None:
            self.live.show(answer.picture)

    async def _measure(self) -> None:
        while True:
            state, tags = self.state(), {"stream": self._name}
            self._metrics.dropped.set(state.dropped, tags)
            self._metrics.online.set(float(state.online), tags)
            await asyncio.sleep(_GAUGES_SECONDS)


class CameraProcess:
    """The cameras of one process. Replicas call its methods, while a thread of its own works."""

    def __init__(self, app: str, config: ServeConfig, cameras: Sequence[str]) -> None:
        loop, counted = asyncio.new_event_loop(), _Metrics()
        self._cameras = {name: _Camera(name, config.watched[name], config, loop, counted) for name in cameras}
        work = _always("process", lambda: self._work(app))
        threading.Thread(target=loop.run_until_complete, args=(work,), name="cameras", daemon=True).start()

    def states(self, names: Sequence[str]) -> dict[str, StreamState]:
        """How streams are now, by name."""
        return {name: self._cameras[name].state() for name in names}

    def picture(self, name: str) -> bytes | None:
        """A camera's latest picture, a JPEG."""
        return self._cameras[name].live.picture()

    def lines_after(self, name: str, number: int) -> list[tuple[int, Line]]:
        """A camera's latest lines behind this number."""
        return self._cameras[name].live.lines_after(number)

    async def _work(self, app: str) -> None:
        replicas = await asyncio.to_thread(serve.get_app_handle, app)  # one for all: each would ask the controller for news
        await asyncio.gather(*(camera.work(replicas) for camera in self._cameras.values()))


async def _always(name: str, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await work()
        except (Exception, asyncio.CancelledError):  # nobody cancels this work, but the end of a replica cancels its answers
            _LOG.exception("camera %s", name)
            await asyncio.sleep(_PAUSE)


class CameraStreams:
    """The cameras of a service, as `stream_pages.LiveStreams`: asked for by name, wherever their actors run."""

    def __init__(self, processes: Mapping[str, str]) -> None:
        """processes: as `process_names` gives them."""
        self._processes = processes

    async def state(self, name: str) -> StreamState | None:
        """How a camera is now; offline while its actor is started again."""
        return (await self._states((name,)))[name] if name in self._processes else None

    async def picture(self, name: str) -> bytes | None:
        """Its latest picture."""
        found: bytes | None = await self._asked(name, "picture", name)
        return found

    async def lines_after(self, name: str, number: int) -> list[tuple[int, Line]]:
        """Its latest lines. After its actor was started again, numbers begin anew."""
        found: list[tuple[int, Line]] = await self._asked(name, "lines_after", name, number) or []
        return found

    async def all(self) -> Mapping[str, StreamState]:
        """How every camera is now."""
        each = await asyncio.gather(*(self._states(names) for names in _by_process(self._processes).values()))
        states = {name: state for part in each for name, state in part.items()}
        return {name: states[name] for name in self._processes}

    async def _states(self, names: Sequence[str]) -> Mapping[str, StreamState]:
        """How cameras of one process are now."""
        found: Mapping[str, StreamState] = await self._asked(names[0], "states", names) or {}
        problem = "the process that reads this camera is being started again"
        return {name: found.get(name) or StreamState(name, problem=problem) for name in names}

    async def _asked(self, camera: str, method: str, *arguments: Any) -> Any:
        """What a method of the camera's actor returns; None if there is no such camera, or its actor does not answer."""
        with suppress(KeyError, RayError, ValueError, TimeoutError):
            actor = await asyncio.to_thread(ray.get_actor, self._processes[camera], _NAMESPACE)
            return await asyncio.wait_for(getattr(actor, method).remote(*arguments), _ASKED_SECONDS)
        return None


def _by_process(processes: Mapping[str, str]) -> dict[str, list[str]]:
    """The cameras of each process."""
    return {process: [name for name, its in processes.items() if its == process] for process in dict.fromkeys(processes.values())}


@contextmanager
def cameras(app: str, config: ServeConfig, processes: Mapping[str, str]) -> Iterator[None]:
    """Keep the configured cameras open while the context lasts, in the processes that `process_names` gave them."""
    actor: Any = ray.remote(CameraProcess)
    options = {"namespace": _NAMESPACE, "num_cpus": 0, "max_restarts": -1, "max_concurrency": _PAGES}
    running = [
        actor.options(name=process, scheduling_strategy="SPREAD", **options).remote(app, config, names)
        for process, names in _by_process(processes).items()
    ]
    try:
        yield
    finally:
        for each in running:
            with suppress(RayError):
                ray.kill(each)
