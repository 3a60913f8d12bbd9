"""HTTP in and out: one request makes one response, with a `Backend` behind it that knows the networks.

    GET /          the page: see what a distortion does to the original and to the adapted network
    GET /health    JSON: ok or degraded, and why; which bundles with which levels
    POST /predict  one frame (JPEG, PNG, or raw as application/x-npy) -> its class map as a palette PNG, or logits

What a request of /predict may say, all of it optional:

    accept                       image/png (default) or application/x-npy: logits, float32 [K, H, W]
    x-gearnn-level               the level to use instead of the one read off the frame, "clean" for the original network
    x-gearnn-stream              the camera or stream, whose brightness is smoothed from frame to frame
    serve_multiplexed_model_id   the bundle, "name:tag"; Ray Serve looks at this header too

and what its answer says:

    x-gearnn-level      the level used; of a mixture its two levels with their shares: "jpeg-30*0.60, jpeg-40*0.40"
    x-gearnn-found      what was read off the frame, e.g. "jpeg-34"
    x-gearnn-distance   how far that is from the level used, 0 for exactly there
    x-gearnn-release    "name@sha256:…"
    server-timing       decode, queue, network and encode in milliseconds

What is wrong with a request is said in one sentence as application/problem+json. Knows no Ray and no networks.
"""

import asyncio
import io
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.levels.level import parse_level
from gearnn_ray.serving.frames import BadFrameError, Frame, Limits, read_frame
from gearnn_ray.serving.level_estimation import LevelEstimate

__all__ = ["Backend", "Prediction", "UnknownBundleError", "answer", "error"]

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
    """A request names a bundle that is not served here."""


@dataclass(frozen=True)
class Prediction:
    """What a network made of one frame. One of `classes` and `logits` is there, as it was asked for."""

    classes: NDArray[np.uint8] | None  # class ids [H, W]
    logits: NDArray[np.float32] | None  # [K, H, W]
    estimate: LevelEstimate  # the level used
    release: str  # "name@sha256:<hex>"
    seconds: Mapping[str, float]  # parts of the time: "queue", "network"


class Backend(Protocol):
    """What stands behind the requests: the networks of one or more bundles."""

    async def predict(
        self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, logits: bool
    ) -> Prediction:
        """Class map or logits of one frame. `level` None: the one read off the frame; `bundle` None: the default.

        Raises `UnknownBundleError` for a bundle and `UserError` for a level that is not served.
        """
        ...

    def health(self) -> Mapping[str, Any]:
        """{"status": "ok" | "degraded", "bundles": {ref: {"digest", "levels", "class_names", "problem", …}}, …}."""
        ...


async def answer(request: Request, backend: Backend, limits: Limits) -> Response:
    """The response to one request; whatever goes wrong is a response too."""
    path, method = request.scope["path"], request.method
    if path not in _ROUTES:
        return error(404, f"There is nothing at {path[:100]}: see /, /health and /predict.")
    allowed, handle = _ROUTES[path]
    if method not in allowed:
        wrong = error(405, f"{path} was asked with {method}, expected {' or '.join(allowed)}.")
        wrong.headers["allow"] = ", ".join(allowed)
        return wrong
    try:
        return await handle(request, backend, limits)
    except (_RefusedError, BadFrameError) as refused:
        return error(refused.status, str(refused))
    except UnknownBundleError as unknown:
        return error(404, str(unknown))
    except CorruptStoreError as corrupt:  # no fault of the request
        return error(503, str(corrupt))
    except UserError as wrong_level:
        return error(422, str(wrong_level))
    except ClientDisconnect:
        return error(400, "The connection ended before the whole frame had come.")  # for the log: nobody reads it
    except Exception:
        _LOG.exception("%s %s failed", method, path)
        return error(500, "The server failed on this request, its log says why: try again.")


def error(status: int, sentence: str) -> Response:
    """A problem in one sentence (RFC 9457): application/problem+json {"status", "detail"}."""
    return JSONResponse({"status": status, "detail": sentence}, status, media_type="application/problem+json")


class _RefusedError(UserError):
    """A request that is refused with this HTTP status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


async def _page(request: Request, backend: Backend, limits: Limits) -> Response:
    return Response(_PAGE, media_type="text/html", headers=_PAGE_HEADERS)


async def _health(request: Request, backend: Backend, limits: Limits) -> Response:
    return JSONResponse(dict(backend.health()), headers={"cache-control": "no-store"})


async def _predict(request: Request, backend: Backend, limits: Limits) -> Response:
    wanted = _wanted(", ".join(request.headers.getlist("accept")))
    level = request.headers.get("x-gearnn-level")
    if level is not None:
        parse_level(level)
    stream, bundle = _id(request, "x-gearnn-stream"), _id(request, *_BUNDLE)

    body = await _body(request, limits.body_bytes)
    start = time.perf_counter()
    frame = await asyncio.to_thread(read_frame, body, request.headers.get("content-type"), limits)
    decoded = time.perf_counter()
    made = await backend.predict(frame, level, stream, bundle, wanted == NPY)
    encoding = time.perf_counter()
    content = await asyncio.to_thread(_encode, made)
    seconds = {"decode": decoded - start, **made.seconds, "encode": time.perf_counter() - encoding}

    headers = {
        "x-gearnn-level": _spell(made.estimate),
        "x-gearnn-found": made.estimate.found,
        "x-gearnn-distance": f"{made.estimate.distance:.4g}",
        "x-gearnn-release": made.release,
        "server-timing": ", ".join(f"{part};dur={1000 * value:.2f}" for part, value in seconds.items()),
        "cache-control": "no-store",
        "vary": "accept",
    }
    return Response(content, media_type=wanted, headers=headers)


_Handler = Callable[[Request, Backend, Limits], Awaitable[Response]]
_ROUTES: dict[str, tuple[tuple[str, ...], _Handler]] = {
    "/": (("GET", "HEAD"), _page),
    "/health": (("GET", "HEAD"), _health),
    "/predict": (("POST",), _predict),
}


def _wanted(accept: str) -> str:
    """The media type of the answer: of the two the one preferred by the accept header, PNG where both are alike."""
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
        raise _RefusedError(406, f"The answer is asked for as {accept[:100]}: expected {PNG} or {NPY}.")
    return best


def _id(request: Request, *headers: str) -> str | None:
    """What the first of these headers says, None where there is none of them."""
    for header in headers:
        if (value := request.headers.get(header)) is not None:
            if not _ID.fullmatch(value):
                raise _RefusedError(
                    400, f"{header} is not 1 to 128 characters of A-Z, a-z, 0-9 and . _ : @ + -: rename it."
                )
            return value
    return None


async def _body(request: Request, most: int) -> bytes:
    """The request's body; one of more than `most` bytes is refused before, or while, it comes."""
    length = request.headers.get("content-length")
    if length is None and "transfer-encoding" not in request.headers:
        raise _RefusedError(
            411, "There is no frame in this request: send its bytes as the body, with a content-length."
        )
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


def _encode(made: Prediction) -> bytes:
    file = io.BytesIO()
    if made.logits is not None:
        np.save(file, np.asarray(made.logits, np.float32))
    else:
        assert made.classes is not None
        image = Image.fromarray(made.classes)
        image.putpalette(_PALETTE)  # mode P: a pixel's value is its class id, whatever colour shows it
        image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _spell(estimate: LevelEstimate) -> str:
    if estimate.neighbour is None or not estimate.weight:
        return estimate.level
    return f"{estimate.level}*{1 - estimate.weight:.2f}, {estimate.neighbour}*{estimate.weight:.2f}"


def _palette() -> bytes:
    """256 RGB colours: Cityscapes' nineteen, then always the one farthest from all before it."""
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
