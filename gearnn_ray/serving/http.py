"""HTTP: one request makes one response. The networks are behind a `Backend`.

    GET /          the page: compares the original and the adapted network on an image that the user distorts
    GET /health    JSON: ok or degraded, the reason, and the bundles with their levels
    POST /predict  one frame (JPEG, PNG, or application/x-npy) -> the task's answer, for segmentation a palette PNG of class ids

Headers of a request to /predict, all optional:

    accept                       image/png (default), or application/x-npy: the raw outputs, for segmentation logits [K, H, W]
    x-gearnn-level               the level to use instead of the estimated one; "clean" is the original network
    x-gearnn-stream              name of the camera or stream; its brightness is smoothed over frames
    serve_multiplexed_model_id   the bundle, "name:tag"; Ray Serve reads this header too

Headers of the response:

    x-gearnn-level      the level used; for a mixture, two levels with their shares: "jpeg-30*0.60, jpeg-40*0.40"
    x-gearnn-found      the estimated properties of the frame, such as "jpeg-34"
    x-gearnn-distance   distance between these and the level used; 0: equal
    x-gearnn-release    "name@sha256:…"
    server-timing       decode, queue, network and encode in milliseconds

Errors are application/problem+json with one sentence. Knows nothing about Ray or networks.
"""

import asyncio
import io
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.levels.level import parse_level
from gearnn_ray.serving.frames import BadFrameError, Frame, Limits, read_frame
from gearnn_ray.serving.level_estimation import LevelEstimate

__all__ = ["Backend", "BundleHealth", "Health", "Prediction", "UnknownBundleError", "answer", "error"]

PNG, NPY = "image/png", "application/x-npy"
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

    content: `Task.answer`, for segmentation class ids uint8 [H, W]; or the raw outputs, if the request asked for them.
    seconds: time in the "queue" and in the "network".
    """

    content: NDArray[Any]
    estimate: LevelEstimate
    release: str
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class BundleHealth:
    """The state of one bundle: its release (None while none could be loaded), and what went wrong at the last look-up."""

    digest: str | None = None
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

    async def predict(self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, raw: bool) -> Prediction:
        """The task's answer for one frame, or with `raw` the outputs. `level` None: estimated; `bundle` None: the default.

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
    media_type = _media_type(", ".join(request.headers.getlist("accept")))
    level = request.headers.get("x-gearnn-level")
    if level is not None:
        parse_level(level)
    stream, bundle = _id(request, "x-gearnn-stream"), _id(request, *_BUNDLE)

    body = await _body(request, limits.body_bytes)
    start = time.perf_counter()
    frame = await asyncio.to_thread(read_frame, body, request.headers.get("content-type"), limits)
    decoded = time.perf_counter()
    prediction = await backend.predict(frame, level, stream, bundle, media_type == NPY)
    encoding = time.perf_counter()
    content = await asyncio.to_thread(_ENCODERS[media_type], prediction.content)
    seconds = {"decode": decoded - start, **prediction.seconds, "encode": time.perf_counter() - encoding}

    headers = {
        "x-gearnn-level": _spell(prediction.estimate),
        "x-gearnn-found": prediction.estimate.found,
        "x-gearnn-distance": f"{prediction.estimate.distance:.4g}",
        "x-gearnn-release": prediction.release,
        "server-timing": ", ".join(f"{part};dur={1000 * value:.2f}" for part, value in seconds.items()),
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


def _media_type(accept: str) -> str:
    """The media type that the accept header prefers; PNG if it likes both equally."""
    ranges: dict[str, float] = {}
    for item in filter(None, map(str.strip, accept.split(","))):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        ranges[kind] = float(weight) if re.fullmatch(r"[01](\.\d{0,3})?", weight) else 0.0
    if not ranges:
        return PNG

    def preference(offer: str) -> float:
        family = offer.partition("/")[0]
        return next((ranges[kind] for kind in (offer, f"{family}/*", "*/*") if kind in ranges), 0.0)

    best = max((PNG, NPY), key=preference)
    if preference(best) == 0:
        raise _RefusedError(406, f"The accept header is {accept[:100]}: expected {PNG} or {NPY}.")
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


def _png(classes_HW: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(classes_HW)
    image.putpalette(_PALETTE)  # mode P: the value of a pixel is its class id, the palette only colours it
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _npy(outputs: NDArray[np.float32]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(outputs, np.float32))
    return file.getvalue()


_ENCODERS: dict[str, Callable[[NDArray[Any]], bytes]] = {PNG: _png, NPY: _npy}


def _spell(estimate: LevelEstimate) -> str:
    if estimate.neighbour is None or not estimate.weight:
        return estimate.level
    return f"{estimate.level}*{1 - estimate.weight:.2f}, {estimate.neighbour}*{estimate.weight:.2f}"


def _palette() -> bytes:
    """256 RGB colours: the 19 of Cityscapes, then in turn the colour farthest from all before it."""
    chosen = np.array(
        [
            *[(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153)],
            *[(250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60)],
            *[(255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)],
        ]
    )
    steps = np.linspace(0, 255, 9).astype(int)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    distance = np.min([np.sum((grid - colour) ** 2, 1) for colour in chosen], 0)
    while len(chosen) < 256:
        chosen = np.vstack([chosen, grid[distance.argmax()]])
        distance = np.minimum(distance, np.sum((grid - chosen[-1]) ** 2, 1))
    return chosen.astype(np.uint8).tobytes()


_PALETTE = _palette()
