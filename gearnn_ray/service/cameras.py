"""Cameras that the service keeps open itself: one Ray actor each, which decodes, finds levels, and sends frames to the replicas.

    camera ─► reader (thread) ─► level of each frame ─► replicas' batches ─► lines, picture and rates ─► /streams/NAME
                 newest frame counts                     at most FRAMES_AHEAD under way, answered in order

A camera that goes offline is opened again after growing pauses. An actor that dies is started again by Ray, on another node if
its own is gone; replicas look actors up by name, so that nothing else knows where they are.
"""

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

# Ray starts workers at niceness 15: cameras would lose frames to any other process on the machine.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util import metrics

from gearnn_ray.config.serve import FRAMES_AHEAD, ServeConfig
from gearnn_ray.ray_jobs.local_ray import bind_replica_to_its_node
from gearnn_ray.serving.frames import Limits
from gearnn_ray.serving.level_estimation import LevelEstimator, Reference
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import Served
from gearnn_ray.video.decoding import VideoFrame
from gearnn_ray.video.lines import Line, line_of
from gearnn_ray.video.live import LiveStream, StreamState
from gearnn_ray.video.reading import Reader
from gearnn_ray.video.stream_levels import StreamLevels

__all__ = ["CameraStreams", "LevelFacts", "cameras"]

_NAMESPACE = "gearnn_cameras"
_ANSWER_SECONDS = 30.0  # after which a frame counts as lost with its replica
_ASKED_SECONDS = 2.0  # for an actor's answer to a page
_PAUSE = 0.5  # seconds before a replica that failed is asked again
_LATENCIES = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LevelFacts:
    """What levels of a release's frames are found with, and what its answers are described with."""

    digest: str
    task: str
    levels: tuple[str, ...]
    reference: Reference | None


class Camera:
    """One camera. Its methods are called by replicas, while a thread of its own works."""

    def __init__(self, app: str, name: str, address: str, config: ServeConfig) -> None:
        bind_replica_to_its_node()
        self._app, self._name, self._config = app, name, config
        self._live = LiveStream(name)
        limits = Limits(pixels=int(config.limits.megapixels * 1e6))
        self._reader = Reader(address, config.slow, again=True, patient=True, limits=limits, hosts=config.hosts)
        self._under_way: queue.Queue[tuple[VideoFrame, float, Any]] = queue.Queue(FRAMES_AHEAD)
        self._facts: LevelFacts | None = None
        self._task = "segmentation"
        self._lost = 0
        tags = {"stream": name}
        self._frames = metrics.Counter("gearnn_stream_frames", "Frames processed, by level used.", ("stream", "level"))
        self._dropped = metrics.Gauge("gearnn_stream_dropped", "Frames dropped because newer ones had come.", ("stream",))
        self._online = metrics.Gauge("gearnn_stream_online", "1: frames come, 0: they do not.", ("stream",))
        self._seconds = metrics.Histogram("gearnn_stream_seconds", "Time from a frame to its answer.", _LATENCIES, ("stream",))
        for metric in (self._frames, self._dropped, self._online, self._seconds):
            metric.set_default_tags(tags)
        for work in (self._send, self._receive):
            threading.Thread(target=self._always, args=(work,), name=work.__name__, daemon=True).start()

    def state(self) -> StreamState:
        """How the stream is now."""
        self._count()
        return self._live.state()

    def picture(self) -> bytes | None:
        """Its latest picture, a JPEG."""
        return self._live.picture()

    def lines_after(self, number: int) -> list[tuple[int, Line]]:
        """Its latest lines behind this number."""
        return self._live.lines_after(number)

    def _always(self, work: Any) -> None:
        while True:
            try:
                work()
            except Exception:  # the camera goes on whatever a frame, a replica or the store did
                _LOG.exception("camera %s", self._name)
                time.sleep(_PAUSE)

    def _send(self) -> None:
        """Frames to the replicas."""
        handle = serve.get_app_handle(self._app)
        facts = handle.level_facts.remote().result(timeout_s=_ANSWER_SECONDS)
        self._facts, self._task = facts, facts.task
        estimator = LevelEstimator(facts.levels, facts.reference, self._config.untrained, self._config.cameras)
        levels = StreamLevels(estimator, self._name)
        while self._facts is facts:  # else there is a new release, whose levels are others
            frames = self._reader.take(1, seconds=1.0)
            self._count()
            for frame in frames:
                estimate = levels.estimate(frame.evidence)
                self._under_way.put((frame, time.perf_counter(), handle.predict_at.remote(frame, estimate)))

    def _receive(self) -> None:
        """Answers from the replicas, in the order of the frames."""
        while True:
            frame, since, response = self._under_way.get()
            try:
                prediction = response.result(timeout_s=_ANSWER_SECONDS)
            except (RayError, TimeoutError, RuntimeError):
                self._lost += 1
                self._facts = None
                continue
            seconds = time.perf_counter() - since
            self._seconds.observe(seconds)
            self._frames.inc(1, {"level": prediction.estimate.level})
            self._show(frame, prediction)
            if self._facts is not None and not prediction.release.endswith(self._facts.digest):
                self._facts = None

    def _show(self, frame: VideoFrame, prediction: Any) -> None:
        task = task_by_name(self._task)
        served = Served(frame.pixels, prediction.class_names, {})
        parts = {"decode": frame.decode_seconds - frame.level_seconds, "level": frame.level_seconds, **prediction.seconds}
        milliseconds = {name: 1000 * part for name, part in parts.items()}
        described = task.described(prediction.content, served)
        number = self._live.state().frames
        line = line_of(self._name, number, frame, prediction.estimate, prediction.release, milliseconds, described)
        detections: Any = described.get("detections", ())
        best = max((found["score"] for found in detections), default=None)
        self._live.add(line, best, prediction.estimate.level, lambda: task.drawn(prediction.content, served))

    def _count(self) -> None:
        reader = self._reader
        self._live.count(reader.dropped + self._lost, 0, reader.problem)
        self._dropped.set(reader.dropped + self._lost)
        self._online.set(float(reader.problem is None and self._live.state().online))


class CameraStreams:
    """The cameras of a service, as `stream_pages.LiveStreams`: asked for by name, wherever their actors run."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    async def state(self, name: str) -> StreamState | None:
        """How a camera is now; offline while its actor is started again."""
        if name not in self._names:
            return None
        found: StreamState | None = await self._asked(name, "state")
        return found or StreamState(name, problem="the process that reads this camera is being started again")

    async def picture(self, name: str) -> bytes | None:
        """Its latest picture."""
        found: bytes | None = await self._asked(name, "picture")
        return found

    async def lines_after(self, name: str, number: int) -> list[tuple[int, Line]]:
        """Its latest lines. After its actor was started again, numbers begin anew."""
        found: list[tuple[int, Line]] = await self._asked(name, "lines_after", number) or []
        return found

    async def all(self) -> Mapping[str, StreamState]:
        """How every camera is now."""
        states = {name: await self.state(name) for name in self._names}
        return {name: state for name, state in states.items() if state is not None}

    async def _asked(self, name: str, method: str, *arguments: Any) -> Any:
        with suppress(RayError, ValueError, TimeoutError):
            actor = await asyncio.to_thread(ray.get_actor, name, _NAMESPACE)
            return await asyncio.wait_for(getattr(actor, method).remote(*arguments), _ASKED_SECONDS)
        return None


@contextmanager
def cameras(app: str, config: ServeConfig) -> Iterator[None]:
    """Keep the configured cameras open while the context lasts."""
    actor: Any = ray.remote(Camera)
    running = [
        actor.options(name=name, namespace=_NAMESPACE, num_cpus=0, max_restarts=-1, max_concurrency=4).remote(
            app, name, address, config
        )
        for name, address in config.watched.items()
    ]
    try:
        yield
    finally:
        for each in running:
            with suppress(RayError):
                ray.kill(each)
