"""Releases behind HTTP as one Ray Serve deployment: the only room that knows Ray Serve.

    request ─► http.answer ─► predict: which bundle, which level ─► batch of all levels, streams and sizes
                                                                          │ one thread, one pass per frame size
    store ◄── every poll_seconds: has a tag moved? ─► pull, verify, swap  ▼
                                                                   AdaptiveModel

A replica holds every configured bundle and answers for exactly those: a client cannot make it load anything else. Which
release a bundle is gets looked up once per request, and the request keeps it: a swap drops none, and the old release goes
when its last batch is done. The brightness of a stream is smoothed over the frames that one replica sees.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

# Under `uv run` Ray would upload the folder and build a second environment for its workers; the one at hand will do.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Ray's workers run at niceness 15: beside anything else on the machine, requests would wait.
os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np
import ray
import torch
from ray import serve
from ray._private import ray_constants, services
from ray.exceptions import RayError, RayTaskError
from ray.serve import metrics
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response

from gearnn_ray.config.schema import ServeConfig, full_reference
from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.serving import http
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.serving.frames import Frame, Limits
from gearnn_ray.serving.http import Prediction, UnknownBundleError
from gearnn_ray.serving.level_estimation import LevelEstimate, LevelEstimator, Reference
from gearnn_ray.store.releases import Store

APP = "gearnn"

_QUEUED = 128  # requests that wait in Serve's proxy, each with its body in memory, before it answers 503
_REQUEST_SECONDS = 60.0  # a client that sends half a frame and stops must not keep its place for ever
_LATENCIES = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
# between whole numbers, because Ray makes a histogram's sum from the middles of its buckets
_COUNTS = [0.5, 1.5, 2.5, 4.5, 8.5, 16.5, 32.5, 64.5, 128.5]
_DISTANCES = [0.01, 0.5, 1, 2, 4, 8, 16, 32]
_LOG = logging.getLogger("ray.serve")  # the log that Serve writes for a replica


# ── what is served ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Served:
    """One release in memory."""

    model: AdaptiveModel
    level_estimator: LevelEstimator  # the model's, with the configured cameras

    @property
    def release(self) -> str:
        return f"{self.model.name}@{self.model.digest}"


class _Bundle:
    """A configured bundle: the release it is now, and what was wrong when it was last looked up."""

    def __init__(self, ref: str, config: ServeConfig) -> None:
        self.ref, self._config = ref, config
        self.served: _Served | None = None
        self.problem: str | None = None

    def refresh(self) -> None:
        """Pull the release if there is none yet or the tag has moved. Blocks; whatever fails, the old one stays."""
        try:
            if self.served is None or self._pointed_to() != self.served.model.digest:
                self.served = self._pull()
            self.problem = None
        except UserError as error:
            self.problem = str(error)
        except Exception as error:
            _LOG.exception("%s could not be looked up", self.ref)
            self.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"

    def serving(self) -> _Served:
        """The release. Raises CorruptStoreError while none could be pulled yet."""
        if self.served is None:
            raise CorruptStoreError(f"the bundle {self.ref} is not loaded ({self.problem}): try again later")
        return self.served

    def _pointed_to(self) -> str:
        name, pinned, digest = self.ref.partition("@")
        if pinned:
            return digest
        name, _, tag = self.ref.partition(":")
        store = Store(self._config.store)
        if (now := store.tags(name).get(tag)) is None:
            raise UserError(f"{self.ref} is not in {store.uri} any more: bring the store or the tag back")
        return now

    def _pull(self) -> _Served:
        config = self._config
        model = AdaptiveModel.pull(config.store, self.ref, config.device, config.untrained)
        reference = Reference.of_manifest(model.manifest)
        return _Served(model, LevelEstimator(model.levels, reference, config.untrained, config.cameras))


@dataclass(frozen=True, eq=False)
class _Item:
    """One frame on its way through a batch."""

    served: _Served
    frame: Frame
    estimate: LevelEstimate
    logits: bool
    since: float  # time.perf_counter


def _passes(items: Sequence[_Item], pixels: int) -> Iterator[list[int]]:
    """Positions of the items that go through the network together: of one release and size, at most `pixels` in all."""
    groups: dict[Any, list[int]] = {}
    for position, item in enumerate(items):
        groups.setdefault((id(item.served), item.frame.pixels.shape), []).append(position)
    for (_, (height, width, _)), positions in groups.items():
        most = max(1, pixels // (height * width))
        for start in range(0, len(positions), most):
            yield positions[start : start + most]


@torch.inference_mode()
def _predict(items: Sequence[_Item]) -> list[Prediction]:
    """One pass over frames of one release and size, each at its own level."""
    start = time.perf_counter()
    images_BHWC = torch.from_numpy(np.stack([item.frame.pixels for item in items]))
    logits_BKHW = items[0].served.model(images_BHWC.permute(0, 3, 1, 2).contiguous(), [i.estimate for i in items])
    classes_BHW = logits_BKHW.argmax(1).to(torch.uint8).cpu().numpy()
    results = []
    for item, classes_HW, logits_KHW in zip(items, classes_BHW, logits_BKHW, strict=True):
        answer = (None, logits_KHW.cpu().numpy()) if item.logits else (classes_HW, None)
        seconds = {"queue": start - item.since, "network": time.perf_counter() - start}
        results.append(Prediction(answer[0], answer[1], item.estimate, item.served.release, seconds))
    return results


class _Metrics:
    """What Prometheus gets, beside Serve's own. Tags hold only names of ours, none that a client makes up."""

    def __init__(self) -> None:
        def keys(*names: str) -> Any:
            return names  # Ray's annotation says one key

        self.seconds = metrics.Histogram("gearnn_request_seconds", "Time from request to answer.", _LATENCIES)
        self.requests = metrics.Counter(
            "gearnn_requests", "Answers of /predict, by the level used.", keys("bundle", "level", "status")
        )
        self.batch_size = metrics.Histogram("gearnn_batch_size", "Frames of one pass.", _COUNTS)
        self.batch_levels = metrics.Histogram("gearnn_batch_levels", "Different levels of one pass.", _COUNTS)
        self.distance = metrics.Histogram(
            "gearnn_level_distance", "From what was read off a frame to the level used.", _DISTANCES, keys("bundle")
        )
        self.release = metrics.Gauge("gearnn_release", "1: served now, 0: before.", keys("bundle", "digest"))


# ── the deployment ───────────────────────────────────────────────────────────────────────────────────────────────


class Service:
    """One replica: HTTP requests in, class maps or logits out."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._config = config
        self._limits = Limits(int(config.limits.body_mib * 2**20), int(config.limits.megapixels * 1e6))
        self._worker = ThreadPoolExecutor(1, "network", _prepare_thread, (max(1, int(config.num_cpus)),))
        torch.set_num_threads(max(1, int(config.num_cpus)))
        self._free = asyncio.Event()
        self._free.set()
        self._batch.set_max_batch_size(config.max_batch)  # type: ignore[attr-defined]
        self._batch.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)  # type: ignore[attr-defined]

        self._metrics = _Metrics()
        self._bundles: dict[str, _Bundle] = {}
        for ref in config.bundles:
            await self._load(ref)
        self._watcher = asyncio.create_task(self._watch())

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        start = time.perf_counter()
        visit = _Visit(self)
        response = await http.answer(request, visit, self._limits)
        if request.url.path == "/predict":
            self._metrics.seconds.observe(time.perf_counter() - start)
            tags = {"bundle": visit.bundle, "level": visit.level, "status": str(response.status_code)}
            self._metrics.requests.inc(tags=tags)
        return response

    def health(self) -> dict[str, Any]:
        """What this replica serves and what is wrong with it, as `http.Backend` says."""
        bundles = {ref: _health(self._bundles[ref]) for ref in self._config.bundles}
        well = all(about["problem"] is None for about in bundles.values())
        return {"status": "ok" if well else "degraded", "device": self._config.device, "bundles": bundles}

    async def predict(
        self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, logits: bool
    ) -> Prediction:
        """As `http.Backend` says. A level that is given is found in the release as one that is read: the nearest."""
        since = time.perf_counter()
        ref = self.reference(bundle)
        served = (await self._load(ref)).serving()
        # of every frame, for the stream's brightness
        estimate = served.level_estimator.estimate(frame.evidence, stream)
        if level is None:
            self._metrics.distance.observe(estimate.distance, {"bundle": ref})
        else:
            estimate = replace(served.level_estimator.match(level), found=estimate.found)
        # Serve closes a batch when its time is up, even while the last one still runs: under load it would queue many
        # small batches. So frames gather here until the network is free, and then go as one.
        await self._free.wait()
        result = await self._batch(_Item(served, frame, estimate, logits, since))
        if isinstance(result, Exception):
            raise result
        return result

    def reference(self, bundle: str | None) -> str:
        """The configured bundle that is asked for. Raises UnknownBundleError for any other."""
        if bundle is None:
            return self._config.bundles[0]
        try:
            ref = full_reference(bundle)
        except ValueError:
            ref = bundle
        if ref not in self._config.bundles:
            raise UnknownBundleError(f"the bundle {bundle} is not served here, only {', '.join(self._config.bundles)}")
        return ref

    # every configured bundle stays: no other id comes this far
    @serve.multiplexed(max_num_models_per_replica=-1)  # type: ignore[untyped-decorator]
    async def _load(self, ref: str) -> _Bundle:
        bundle = self._bundles[ref] = _Bundle(ref, self._config)
        await self._refresh(bundle)
        return bundle

    async def _refresh(self, bundle: _Bundle) -> None:
        before = bundle.served
        await asyncio.to_thread(bundle.refresh)
        if before is not None and bundle.served is not before:
            self._metrics.release.set(0, {"bundle": bundle.ref, "digest": before.model.digest})
        if bundle.served is not None:  # said again every time: Ray forgets a gauge that nobody sets
            self._metrics.release.set(1, {"bundle": bundle.ref, "digest": bundle.served.model.digest})

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.poll_seconds)
            for bundle in self._bundles.values():
                await self._refresh(bundle)

    @serve.batch
    async def _batch(self, items: list[_Item]) -> list[Prediction | Exception]:
        """All frames that waited. Serve parts them by the bundle id in their headers, never by level, stream or size."""
        self._free.clear()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._run, items)
        finally:
            self._free.set()

    def _run(self, items: Sequence[_Item]) -> list[Prediction | Exception]:
        results: dict[int, Prediction | Exception] = {}
        for positions in _passes(items, self._limits.pixels):
            is_joint = [items[position] for position in positions]
            self._metrics.batch_size.observe(len(is_joint))
            self._metrics.batch_levels.observe(len({item.estimate.level for item in is_joint}))
            try:
                results.update(zip(positions, _predict(is_joint), strict=True))
            except Exception as error:  # theirs alone: other sizes of this batch are answered
                results.update(dict.fromkeys(positions, error))
        return [results[position] for position in range(len(items))]


@dataclass
class _Visit:
    """The backend of one request: remembers for the metrics what it was answered with."""

    service: Service
    bundle: str = "none"
    level: str = "none"

    async def predict(
        self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, logits: bool
    ) -> Prediction:
        self.bundle = self.service.reference(bundle)
        prediction = await self.service.predict(frame, level, stream, bundle, logits)
        self.level = prediction.estimate.level
        return prediction

    def health(self) -> Mapping[str, Any]:
        return self.service.health()


def _health(bundle: _Bundle) -> dict[str, Any]:
    about: dict[str, Any] = {"digest": None, "levels": [], "class_names": []}
    if (served := bundle.served) is not None:
        model = served.model
        names = model.manifest["model"].get("class_names", [])
        about = {"digest": model.digest, "levels": list(model.levels), "class_names": names}
    return {**about, "problem": bundle.problem}


def _prepare_thread(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # as when the release was judged; the thread's helpers inherit it


def application(config: ServeConfig) -> serve.Application:
    """The Serve application of a configuration whose device and num_gpus are decided (`serving` does)."""
    gpus = {"num_gpus": config.num_gpus} if config.num_gpus else {}
    deployment = serve.deployment(
        name=APP,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.num_cpus, **gpus},
        # one batch in the network, one that gathers, and the page
        max_ongoing_requests=2 * config.max_batch + 8,
        max_queued_requests=_QUEUED,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,  # how soon a replica that died is missed
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )(Service)
    return deployment.bind(config)


# ── from start to end ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Serving:
    """What is served where, once it is."""

    url: str
    metrics: tuple[str, ...]  # Prometheus, of each node
    bundles: Mapping[str, Mapping[str, Any]]  # as in `http.Backend.health`


def check_bundles(config: ServeConfig) -> None:
    """Raise UserError, before any Ray is started, unless every bundle can be pulled."""
    store = Store(config.store)
    for ref in config.bundles:
        store.pull(ref)


@contextmanager
def serving(config: ServeConfig) -> Iterator[Serving]:
    """Serve for as long as the context lasts, on the cluster this process is in or on a Ray of its own.

    Raises UserError, with nothing left running, when a bundle, the port or the resources are not to be had.
    """
    check_bundles(config)
    with _cluster(config) as own:
        config = _decided(config)
        if own:
            _check_resources(config)
        if serve.status().proxies:
            raise UserError(
                "this cluster runs Ray Serve already: end that with `serve shutdown`, or use another cluster"
            )
        try:
            yield _started(config)
        finally:
            # Requests under way are answered first. A Ray of our own ends as a whole right after.
            _quietly(lambda: serve.delete(APP)) if own else _quietly(serve.shutdown)


def wait_until_gone() -> None:
    """Return when somebody else has ended what is served here."""
    with suppress(RayError):
        while APP in serve.status().applications:
            time.sleep(2)


@contextmanager
def _cluster(config: ServeConfig) -> Iterator[bool]:
    """The cluster this process is in (False), or a Ray of its own on loopback for as long as the context lasts (True)."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    own, started = False, not ray.is_initialized()
    if started:
        find: Any = services.get_ray_address_from_environment  # what `ray.init` itself asks
        address = find(None, None)
        if own := address in (None, "local"):
            address = "local"
            _check_port(config)
            # Ray's switch for a Ray that is no cluster: all its ports on loopback. In this process it was read at import.
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
            ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise UserError(
                f"there is no Ray at {address}: start it, or unset RAY_ADDRESS for one of this job's own"
            ) from error
        # Ray's own handler exits with an error
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield own
    finally:
        if started:
            ray.shutdown()


def _decided(config: ServeConfig) -> ServeConfig:
    """With `auto` and defaults replaced by what the cluster has."""
    has_gpu = _cluster_resources().get("GPU", 0) >= 1
    gpus = config.num_gpus if config.num_gpus is not None else float(has_gpu and config.device != "cpu")
    device = config.device if config.device != "auto" else "cuda" if gpus else "cpu"
    return config.model_copy(update={"num_gpus": gpus, "device": device})


def _check_port(config: ServeConfig) -> None:
    try:
        with socket.create_server(
            (config.host, config.port), family=socket.AF_INET6 if ":" in config.host else socket.AF_INET
        ):
            pass
    except OSError as error:
        raise _no_port(config, os.strerror(error.errno) if error.errno else str(error)) from error


def _no_port(config: ServeConfig, reason: str) -> UserError:
    return UserError(
        f"nothing can listen on {config.host} port {config.port} ({reason}): free it or choose another port"
    )


def _check_resources(config: ServeConfig) -> None:
    for resource, each in (("CPU", config.num_cpus), ("GPU", config.num_gpus or 0)):
        there = _cluster_resources().get(resource, 0)
        if each * config.replicas > there:
            raise UserError(
                f"{config.replicas} × {each:g} {resource} are asked for and this machine has {there:g}: "
                f"lower replicas or num_{resource.lower()}s"
            )


def _started(config: ServeConfig) -> Serving:
    options = HTTPOptions(host=config.host, port=config.port, request_timeout_s=_REQUEST_SECONDS)
    logs = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=logs)
    except RayTaskError as error:
        raise _no_port(config, _last_line(error)) from error
    try:
        handle = serve.run(application(config), name=APP, route_prefix="/")
        health = handle.health.remote().result(timeout_s=_REQUEST_SECONDS)
    except (RayError, RuntimeError, TimeoutError) as error:
        raise UserError(f"the service did not start: {_last_line(error)}") from error
    for about in health["bundles"].values():
        if about["problem"]:
            raise UserError(about["problem"])
    host = f"[{config.host}]" if ":" in config.host else config.host
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    exported = tuple(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes)
    return Serving(f"http://{host}:{config.port}/", exported, health["bundles"])


def _cluster_resources() -> Mapping[str, float]:
    resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _quietly(end: Callable[[], None]) -> None:
    try:
        end()
    except Exception:
        _LOG.exception("Ray Serve did not end in order")  # whatever ended it before us
