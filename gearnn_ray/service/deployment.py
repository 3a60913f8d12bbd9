"""Releases behind HTTP as one Ray Serve deployment. Other modules of this room know nothing about Ray.

    request ─► http.answer ─► predict: which bundle, which level ─► batches of one size, of all levels and streams
                                                                          │ one thread
    store ◄── every poll_seconds: has a tag moved? ─► pull, verify, swap  ▼
                                                                   AdaptiveModel

A replica holds every configured bundle and serves no other, so a client cannot make it load anything. Each request looks up the
release of its bundle once and keeps it: a new release drops no request, and the old one is freed after its last batch. The
brightness of a stream is smoothed over the frames that one replica receives.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

# Ray starts workers at niceness 15: requests would wait for any other process on the machine.
os.environ.setdefault("RAY_worker_niceness", "0")
# A thread of Serve's that outlives the service would start another Ray, in the moment when the job ends.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
# A replica that is not healthy is ended at once: one that does not answer does not end its requests either.
os.environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")

import ray
import torch
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response

from gearnn_ray.config.release_ref import full_reference
from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.wire import Advice, Costs, Head, Report
from gearnn_ray.ray_jobs.cluster import cluster
from gearnn_ray.ray_jobs.local_ray import address_to_join, bind_replica_to_its_node
from gearnn_ray.service import http
from gearnn_ray.service.admission import Admission
from gearnn_ray.service.backend import BundleHealth, Health, Prediction, UnknownBundleError
from gearnn_ray.service.batching import Batcher, Group
from gearnn_ray.service.bundles import Bundle, Item, check_bundles, group_of, predict, values_of, weights_at
from gearnn_ray.service.cameras import CameraAnswer, CameraStreams, LevelFacts, cameras, process_names
from gearnn_ray.service.connections import bound_proxies
from gearnn_ray.service.liveness import PassClock
from gearnn_ray.service.metrics import Metrics
from gearnn_ray.service.steering import SharedControllers, controllers
from gearnn_ray.serving.frames import Frame
from gearnn_ray.serving.level_estimation import LevelEstimate, Reference
from gearnn_ray.store.signatures import public_key
from gearnn_ray.tasks.base import Served, Task
from gearnn_ray.video.decoding import VideoFrame
from gearnn_ray.video.live import jpeg_of

APP = "gearnn"

_SPARE = 256  # requests for the page and /health, and refusals: these never wait for those that a replica processes
_QUEUED = 128  # requests that wait in Serve's proxy while a replica has even more than that; more are answered with 503
_START_SECONDS = 60.0
_LOG = logging.getLogger("ray.serve")  # Ray Serve writes this log to a file of the replica
T = TypeVar("T")


class Service:
    """One replica: answers HTTP requests."""

    async def __init__(self, config: ServeConfig, processes: Mapping[str, str]) -> None:  # type: ignore[misc]  # Serve awaits it
        """processes: as in `CameraStreams`."""
        bind_replica_to_its_node()
        self._config = config
        self._admission = Admission.of_config(config)
        threads = max(1, int(config.num_cpus))
        torch.set_num_threads(threads)
        self._clock = PassClock()
        self._batches = Batcher(self._run, self._group, config.batch_wait_ms / 1000, partial(_prepare_thread, threads))
        self.cameras, self._controllers = CameraStreams(processes), SharedControllers()
        self._metrics = Metrics()
        self._bundles: dict[str, Bundle] = {}
        for ref in config.bundles:
            await self._load(ref)
        self._watcher = asyncio.create_task(self._watch())

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        start = time.perf_counter()
        visit = _Visit(self)
        response = await http.answer(request, visit, self._admission)
        if request.url.path == "/predict":
            self._metrics.seconds.observe(time.perf_counter() - start)
            tags = {"bundle": visit.bundle, "level": visit.level, "status": str(response.status_code)}
            self._metrics.requests.inc(tags=tags)
        return response

    def check_health(self) -> None:
        """Raise RuntimeError while the network is wedged. Serve asks, and replaces the replica."""
        if (problem := self._clock.problem()) is not None:
            raise RuntimeError(problem)

    def health(self) -> Health:
        """As in `backend.Backend`."""
        bundles = {ref: self._bundles[ref].health() for ref in self._config.bundles}
        degraded = any(bundle.problem for bundle in bundles.values())
        return Health("degraded" if degraded else "ok", self._config.device, bundles)

    def task(self, bundle: str | None) -> Task:
        """As in `backend.Backend`."""
        return self._bundles[self.reference(bundle)].model().task

    async def predict(
        self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, media_type: str
    ) -> Prediction:
        """As in `backend.Backend`. A level that the release does not have is mapped to its levels as `untrained` says."""
        since = time.perf_counter()
        ref = self.reference(bundle)
        model = (await self._load(ref)).model()
        # also if a level is given, because the estimator smooths the brightness of the stream
        estimate = model.level_estimator.estimate(frame.evidence, stream)
        if level is None:
            self._metrics.distance.observe(estimate.distance, {"bundle": ref})
        else:
            estimate = replace(model.level_estimator.match(level), found=estimate.found)
        return await self._batches.submit(Item(model, frame, estimate, media_type, since))

    async def predict_next(self, frame: VideoFrame, stream: str, bundle: str | None) -> Prediction:
        """As in `backend.Backend`."""
        since, ref = time.perf_counter(), self.reference(bundle)
        model, estimate = self._bundles[ref].level_of_next(stream, frame.evidence)
        self._metrics.distance.observe(estimate.distance, {"bundle": ref})
        return await self._batches.submit(Item(model, frame, estimate, None, since))

    async def predict_at(self, frame: VideoFrame, estimate: LevelEstimate, draw: bool) -> CameraAnswer:
        """The answer to a camera's next frame, at a level that its own process has found. draw: whether a picture is wanted."""
        since, ref = time.perf_counter(), self.reference(None)
        model = self._bundles[ref].model()
        if not {estimate.level, estimate.neighbour or estimate.level} <= set(model.levels):  # of another release than now
            estimate = replace(model.level_estimator.match(estimate.level), found=estimate.found)
        self._metrics.distance.observe(estimate.distance, {"bundle": ref})
        prediction = await self._batches.submit(Item(model, frame, estimate, None, since))
        return await asyncio.to_thread(_camera_answer, model.task, frame, prediction, draw)

    async def advise(
        self, stream: str, bundle: str | None, frame: VideoFrame, estimate: LevelEstimate, head: Head, report: Report
    ) -> Advice:
        """As in `backend.Backend`."""
        ref = self.reference(bundle)
        model, weights = self._bundles[ref].model(), None
        if report.errors is not None:
            work = partial(weights_at, model, frame, estimate, head)
            weights = await self._batches.call(partial(self._timed, values_of(model, frame), work))
        return await self._controllers.step(f"{ref}/{stream}", Costs.of(head, report, weights))

    def level_facts(self) -> LevelFacts:
        """What cameras find the levels of their frames with."""
        model = self._bundles[self.reference(None)].model()
        return LevelFacts(model.digest, model.levels, Reference.of_manifest(model.content))

    def has_cameras(self, bundle: str | None) -> bool:
        """As in `backend.Backend`."""
        return self.reference(bundle) == self.reference(None)

    def answer_bytes(self, bundle: str | None, media_type: str, height: int, width: int) -> int:
        """As in `backend.Backend`."""
        model = self._bundles[self.reference(bundle)].model()
        return model.task.answer_bytes(media_type, model.content.model.num_classes, height, width)

    def count_line(self, bundle: str | None, level: str, status: int) -> None:
        """As in `backend.Backend`."""
        self._metrics.lines.inc(tags={"bundle": self.reference(bundle), "level": level, "status": str(status)})

    def reference(self, bundle: str | None) -> str:
        """The configured bundle that a request names, or the first one. Raises UnknownBundleError for any other."""
        if bundle is None:
            return self._config.bundles[0]
        try:
            ref = full_reference(bundle)
        except ValueError:
            ref = bundle
        if ref not in self._config.bundles:
            raise UnknownBundleError(f"the bundle {bundle} is not served here: choose one of {', '.join(self._config.bundles)}")
        return ref

    # without a limit, because only configured bundles are loaded, and all of them stay
    @serve.multiplexed(max_num_models_per_replica=-1)  # type: ignore[untyped-decorator]
    async def _load(self, ref: str) -> Bundle:
        bundle = self._bundles[ref] = Bundle(ref, self._config)
        await self._refresh(bundle)
        return bundle

    async def _refresh(self, bundle: Bundle) -> None:
        before = bundle.current
        await asyncio.to_thread(bundle.refresh)
        if before is not None and bundle.current is not before:
            self._metrics.release.set(0, {"bundle": bundle.ref, "digest": before.digest})
        self._metrics.copy.set(float(bundle.is_copy), {"bundle": bundle.ref})
        if bundle.current is not None:  # at every refresh, because Ray drops a gauge that is not set again
            self._metrics.release.set(1, {"bundle": bundle.ref, "digest": bundle.current.digest})

    async def _watch(self) -> None:
        admission = self._admission
        most_requests = self._config.replicas * (admission.requests.most + admission.streams.most)
        bounds = admission.body_seconds, admission.memory.most, most_requests
        while True:
            try:
                await asyncio.to_thread(bound_proxies, *bounds)
            except Exception as error:  # releases are followed all the same
                _LOG.warning("the connections of Serve's proxy have no bounds: %r", error)
            await asyncio.sleep(self._config.poll_seconds)
            for bundle in self._bundles.values():
                await self._refresh(bundle)

    def _group(self, item: Item) -> Group:
        """At most as many pixels in total as one frame may have."""
        return group_of(item, self._config.max_batch, self._admission.frame.pixels)

    def _run(self, items: Sequence[Item]) -> Sequence[Prediction]:
        self._metrics.batch_size.observe(len(items))
        self._metrics.batch_levels.observe(len({item.estimate.level for item in items}))
        return self._timed(sum(values_of(item.model, item.frame) for item in items), partial(predict, items))

    def _timed(self, pixels: int, work: Callable[[], T]) -> T:
        with self._clock.timed(pixels):
            return work()


@dataclass
class _Visit:
    """The backend of one request: remembers for the metrics which bundle and level answered it."""

    service: Service
    bundle: str = "none"
    level: str = "none"

    @property
    def cameras(self) -> CameraStreams:
        return self.service.cameras

    def has_cameras(self, bundle: str | None) -> bool:
        return self.service.has_cameras(bundle)

    def task(self, bundle: str | None) -> Task:
        return self.service.task(bundle)

    async def predict(
        self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, media_type: str
    ) -> Prediction:
        self.bundle = self.service.reference(bundle)
        prediction = await self.service.predict(frame, level, stream, bundle, media_type)
        self.level = prediction.estimate.level
        return prediction

    async def predict_next(self, frame: VideoFrame, stream: str, bundle: str | None) -> Prediction:
        return await self.service.predict_next(frame, stream, bundle)

    async def advise(
        self, stream: str, bundle: str | None, frame: VideoFrame, estimate: LevelEstimate, head: Head, report: Report
    ) -> Advice:
        return await self.service.advise(stream, bundle, frame, estimate, head, report)

    def answer_bytes(self, bundle: str | None, media_type: str, height: int, width: int) -> int:
        return self.service.answer_bytes(bundle, media_type, height, width)

    def count_line(self, bundle: str | None, level: str, status: int) -> None:
        self.service.count_line(bundle, level, status)

    def health(self) -> Health:
        return self.service.health()


def _camera_answer(task: Task, frame: VideoFrame, prediction: Prediction, draw: bool) -> CameraAnswer:
    served = Served(frame.pixels, prediction.class_names, {})
    described = task.described(prediction.content, served)
    picture = jpeg_of(task.drawn(prediction.content, served)) if draw else None
    return CameraAnswer(prediction.estimate, prediction.release, prediction.seconds, described, picture)


def _prepare_thread(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # as in evaluation; threads that this one starts inherit it


def application(config: ServeConfig, processes: Mapping[str, str]) -> serve.Application:
    """The Serve application. `config` must have a device other than auto, and num_gpus (see `_resolved`). processes: as
    in `CameraStreams`.
    """
    gpus = {"num_gpus": config.num_gpus} if config.num_gpus else {}
    admission = Admission.of_config(config)
    deployment = serve.deployment(
        name=APP,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.num_cpus, **gpus},
        max_ongoing_requests=admission.requests.most + admission.streams.most + _SPARE,
        max_queued_requests=_QUEUED,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=10,
        # a dead replica is noticed within the period, one that does not answer after three timeouts; then another one is started
        health_check_period_s=2,
        health_check_timeout_s=5,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )(Service)
    return deployment.bind(config, processes)


@dataclass(frozen=True)
class Serving:
    """A running service: its address, the addresses of Prometheus metrics (one per node), and its bundles."""

    url: str
    metrics: tuple[str, ...]
    bundles: Mapping[str, BundleHealth]


@contextmanager
def serving(config: ServeConfig) -> Iterator[Serving]:
    """Serve while the context lasts, on the cluster that this process belongs to or on a Ray of its own.

    Raises UserError if a bundle, the port or the resources are not available; nothing is left running then.
    """
    check_bundles(config)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if not ray.is_initialized() and address_to_join() is None:
        _check_port(config)
    with cluster() as own:
        # because Ray's own handler exits with an error
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        config = _resolved(config)
        if own:
            _check_resources(config)
        if serve.status().proxies:
            raise UserError("this cluster runs Ray Serve already: end it with `serve shutdown`, or use another cluster")
        try:
            processes = process_names(tuple(config.watched), int(_cluster_resources().get("CPU", 1)))
            started = _started(config, processes)
            if own:
                own.check_listening(besides=config.port)
            with cameras(APP, config, processes), controllers():
                yield started
        finally:
            # Both calls answer running requests first. A Ray of its own ends completely after this.
            _quietly(lambda: serve.delete(APP)) if own else _quietly(serve.shutdown)


def wait_until_gone() -> None:
    """Return when another process has ended the service."""
    with suppress(RayError):
        while APP in serve.status().applications:
            time.sleep(2)


def _resolved(config: ServeConfig) -> ServeConfig:
    """The configuration with device and num_gpus resolved to what the cluster has, and with the public key instead of its file,
    because replicas may be on other nodes.
    """
    has_gpu = _cluster_resources().get("GPU", 0) >= 1
    gpus = config.num_gpus if config.num_gpus is not None else float(has_gpu and config.device != "cpu")
    device = config.device if config.device != "auto" else "cuda" if gpus else "cpu"
    key = config.require_signature and public_key(config.require_signature)
    return config.model_copy(update={"num_gpus": gpus, "device": device, "require_signature": key})


def _check_port(config: ServeConfig) -> None:
    try:
        with socket.create_server((config.host, config.port), family=socket.AF_INET6 if ":" in config.host else socket.AF_INET):
            pass
    except OSError as error:
        raise _no_port(config, os.strerror(error.errno) if error.errno else str(error)) from error


def _no_port(config: ServeConfig, reason: str) -> UserError:
    return UserError(f"{config.host} port {config.port} cannot be used ({reason}): free it or choose another port")


def _check_resources(config: ServeConfig) -> None:
    for resource, each in (("CPU", config.num_cpus), ("GPU", config.num_gpus or 0)):
        available = _cluster_resources().get(resource, 0)
        if each * config.replicas > available:
            raise UserError(
                f"{config.replicas} × {each:g} {resource} are needed and this machine has {available:g}: "
                f"lower replicas or num_{resource.lower()}s"
            )


def _started(config: ServeConfig, processes: Mapping[str, str]) -> Serving:
    options = HTTPOptions(host=config.host, port=config.port)  # `Admission` has deadlines; an upload may be endless
    logs = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=logs)
    except RayTaskError as error:
        raise _no_port(config, _last_line(error)) from error
    try:
        handle = serve.run(application(config, processes), name=APP, route_prefix="/")
        health: Health = handle.health.remote().result(timeout_s=_START_SECONDS)
    except (RayError, RuntimeError, TimeoutError) as error:
        raise UserError(f"the service did not start: {_last_line(error)}") from error
    for bundle in health.bundles.values():
        if bundle.problem:
            raise UserError(bundle.problem)
    host = f"[{config.host}]" if ":" in config.host else config.host
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    exported = tuple(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes)
    return Serving(f"http://{host}:{config.port}/", exported, health.bundles)


def _cluster_resources() -> Mapping[str, float]:
    resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _quietly(end: Callable[[], None]) -> None:
    try:
        end()
    except Exception:
        _LOG.exception("Ray Serve did not end cleanly")  # such as when another process has ended it
