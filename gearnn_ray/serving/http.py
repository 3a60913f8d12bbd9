"""HTTP: one request makes one response. The networks are behind a `Backend`.

    GET /          the page: compares the original and the adapted network on an image that the user distorts
    GET /health    JSON: ok or degraded, the reason, and the bundles with their levels
    POST /predict  one frame (JPEG, PNG, or application/x-npy) -> the answer of the bundle's task

Headers of a request to /predict, all optional:

    accept                       one of the task's media types; docs/serving.md has them
    x-gearnn-score               the least score of a detection in the answer, 0 to 1
    x-gearnn-level               the level to use instead of the estimated one; "clean" is the original network
    x-gearnn-stream              name of the camera or stream; its brightness is smoothed over frames
    serve_multiplexed_model_id   the bundle, "name:tag"; Ray Serve reads this header too

Headers of the response:

    x-gearnn-level      the level used; for a mixture, two levels with their shares: "jpeg-30*0.60, jpeg-40*0.40"
    x-gearnn-found      the estimated properties of the frame, such as "jpeg-34"
    x-gearnn-distance   distance between these and the level used; 0: equal
    x-gearnn-release    "name@sha256:…"
    server-timing       decode, queue, network and encode in milliseconds

Errors are application/problem+json with one sentence. Knows nothing about Ray or networks. What an answer is made of, and how it
is written, is the task's business.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Literal, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.levels.level import parse_level
from gearnn_ray.serving.frames import BadFrameError, Frame, Limits, read_frame
from gearnn_ray.serving.level_estimation import LevelEstimate
from gearnn_ray.tasks.base import Served, Task

__all__ = ["Backend", "BundleHealth", "Health", "Prediction", "UnknownBundleError", "answer", "error"]

_BUNDLE = ("serve_multiplexed_model_id", "serve-multiplexed-model-id")  # Ray Serve reads both spellings
_ID = re.compile(r"[A-Za-z0-9._:@+-]{1,128}")
_PAGE = resources.files("gearnn_ray.serving").joinpath("page.html").read_bytes()
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'",
    "cache-control": "no-cache",
}
_LOG = logging.getLogger(__name__)


class UnknownBundleError(UserError):
    """A request names a bundle that is not served."""


@dataclass(frozen=True)
class Prediction:
    """A network's result for one frame, at the level used, by the release name@sha256:<hex>.

    content: `Task.content` of the media type asked for. seconds: time in the "queue" and in the "network". class_names: of the
    release, possibly empty.
    """

    content: Any
    estimate: LevelEstimate
    release: str
    seconds: Mapping[str, float]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class BundleHealth:
    """The state of one bundle: its release (None while none could be loaded), and what went wrong at the last look-up."""

    digest: str | None = None
    task: str | None = None
    levels: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Health:
    """The state of a replica: degraded if any bundle has a problem. `bundles` is by reference, "name:tag" or "name@sha256:…"."""

    status: Literal["ok", "degraded"]
    device: str
    bundles: Mapping[str, BundleHealth]


class Backend(Protocol):
    """Answers requests with the networks of one or more bundles."""

    def task(self, bundle: str | None) -> Task:
        """The task of a bundle's network. `bundle` None: the default.

        Raises `UnknownBundleError` for a bundle that is not served, and `CorruptStoreError` while it could not be loaded.
        """
        ...

    async def predict(
        self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, media_type: str
    ) -> Prediction:
        """What an answer for one frame is made of. `level` None: estimated; `bundle` None: the default.

        Raises `UnknownBundleError` for a bundle, and `UserError` for a level, that is not served.
        """
        ...

    def health(self) -> Health:
        """The state of this replica."""
        ...


async def answer(request: Request, backend: Backend, limits: Limits) -> Response:
    """The response to one request. Every failure becomes a response, too."""
    path, method = request.scope["path"], request.method
    if path not in _ROUTES:
        return error(404, f"The path {path[:100]} does not exist: use /, /health or /predict.")
    allowed, handle = _ROUTES[path]
    if method not in allowed:
        wrong = error(405, f"{path} does not take {method}: use {' or '.join(allowed)}.")
        wrong.headers["allow"] = ", ".join(allowed)
        return wrong
    try:
        return await handle(request, backend, limits)
    except (_RefusedError, BadFrameError) as refused:
        return error(refused.status, str(refused))
    except UnknownBundleError as unknown:
        return error(404, str(unknown))
    except CorruptStoreError as corrupt:  # not a fault of the request
        return error(503, str(corrupt))
    except UserError as wrong_level:
        return error(422, str(wrong_level))
    except ClientDisconnect:
        return error(400, "The connection ended before the whole frame was received.")  # only the log shows this
    except Exception:
        _LOG.exception("%s %s failed", method, path)
        return error(500, "The server failed on this request: try again, and see the server's log for the reason.")


def error(status: int, sentence: str) -> Response:
    """An error in one sentence (RFC 9457): application/problem+json {"status", "detail"}."""
    return JSONResponse({"status": status, "detail": sentence}, status, media_type="application/problem+json")


class _RefusedError(UserError):
    """A request that is refused with this HTTP status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


async def _page(request: Request, backend: Backend, limits: Limits) -> Response:
    return Response(_PAGE, media_type="text/html", headers=_PAGE_HEADERS)


async def _health(request: Request, backend: Backend, limits: Limits) -> Response:
    return JSONResponse(asdict(backend.health()), headers={"cache-control": "no-store"})


async def _predict(request: Request, backend: Backend, limits: Limits) -> Response:
    level = request.headers.get("x-gearnn-level")
    if level is not None:
        parse_level(level)
    stream, bundle, least_score = _id(request, "x-gearnn-stream"), _id(request, *_BUNDLE), _score(request)
    task = backend.task(bundle)
    media_type = _media_type(", ".join(request.headers.getlist("accept")), task.media_types)

    body = await _body(request, limits.body_bytes)
    start = time.perf_counter()
    frame = await asyncio.to_thread(read_frame, body, request.headers.get("content-type"), limits)
    decoded = time.perf_counter()
    prediction = await backend.predict(frame, level, stream, bundle, media_type)
    encoding = time.perf_counter()
    facts = {
        "level": _spell(prediction.estimate),
        "found": prediction.estimate.found,
        "distance": float(f"{prediction.estimate.distance:.4g}"),
        "release": prediction.release,
    }
    milliseconds = {name: round(1000 * part, 2) for name, part in {"decode": decoded - start, **prediction.seconds}.items()}
    served = Served(frame.pixels, prediction.class_names, {**facts, "milliseconds": milliseconds}, least_score)
    content = await asyncio.to_thread(task.encode, prediction.content, media_type, served)
    milliseconds["encode"] = 1000 * (time.perf_counter() - encoding)

    headers = {
        **{f"x-gearnn-{name}": value if isinstance(value, str) else f"{value:.4g}" for name, value in facts.items()},
        "server-timing": ", ".join(f"{name};dur={part:.2f}" for name, part in milliseconds.items()),
        "cache-control": "no-store",
        "vary": "accept",
    }
    return Response(content, media_type=media_type, headers=headers)


_Handler = Callable[[Request, Backend, Limits], Awaitable[Response]]
_ROUTES: dict[str, tuple[tuple[str, ...], _Handler]] = {
    "/": (("GET", "HEAD"), _page),
    "/health": (("GET", "HEAD"), _health),
    "/predict": (("POST",), _predict),
}


def _media_type(accept: str, offers: Sequence[str]) -> str:
    """The one of the offered media types that the accept header prefers; the first of those that it likes equally."""
    ranges: dict[str, float] = {}
    for item in filter(None, map(str.strip, accept.split(","))):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        ranges[kind] = float(weight) if re.fullmatch(r"[01](\.\d{0,3})?", weight) else 0.0
    if not ranges:
        return offers[0]

    def preference(offer: str) -> float:
        family = offer.partition("/")[0]
        return next((ranges[kind] for kind in (offer, f"{family}/*", "*/*") if kind in ranges), 0.0)

    best = max(offers, key=preference)
    if preference(best) == 0:
        raise _RefusedError(406, f"The accept header is {accept[:100]}: expected {' or '.join(offers)}.")
    return best


def _id(request: Request, *headers: str) -> str | None:
    """The value of the first of these headers that the request has; None if it has none of them."""
    for header in headers:
        if (value := request.headers.get(header)) is not None:
            if not _ID.fullmatch(value):
                raise _RefusedError(
                    400, f"{header} has other than 1 to 128 characters of A-Z, a-z, 0-9 and . _ : @ + -: rename it."
                )
            return value
    return None


def _score(request: Request) -> float | None:
    """The least score that the request asks for, None without."""
    if (value := request.headers.get("x-gearnn-score")) is None:
        return None
    if not re.fullmatch(r"0(\.\d{0,9})?|\.\d{1,9}|1(\.0{0,9})?", value):
        raise _RefusedError(400, f"x-gearnn-score is {value[:100]}, expected a number from 0 to 1 such as 0.3: correct it.")
    return float(value)


async def _body(request: Request, most: int) -> bytes:
    """The body of the request. A body of more than `most` bytes is refused before or while it is received."""
    length = request.headers.get("content-length")
    if length is None and "transfer-encoding" not in request.headers:
        raise _RefusedError(411, "The request has no content-length: send the bytes of a frame as its body.")
    too_large = _RefusedError(413, f"The body is larger than the {most:,} bytes allowed here: send a smaller frame.")
    if length is not None and int(length) > most:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def _spell(estimate: LevelEstimate) -> str:
    if estimate.neighbour is None or not estimate.weight:
        return estimate.level
    return f"{estimate.level}*{1 - estimate.weight:.2f}, {estimate.neighbour}*{estimate.weight:.2f}"
