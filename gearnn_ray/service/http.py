"""HTTP: one request makes one response. The networks are behind a `Backend`.

    GET  /                           the page: compares the original and the adapted network on an image that the user distorts
    GET  /health                     JSON: ok or degraded, the reason, and the bundles; 503 while one of them has no release
    POST /predict                    one frame (JPEG, PNG, or application/x-npy) -> the answer of the bundle's task
    POST /streams/{stream}/segments  a video -> a line of JSON for each frame; see `service.streams`
    GET  /streams/{stream}           a camera that the service keeps open, live; see `service.stream_pages`

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
is written, is the task's business. `Admission` bounds what is read, held and answered at a time; it does not hold up the page and
/health.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib import resources

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gearnn_ray.levels.level import parse_level
from gearnn_ray.service.admission import Admission, Quota
from gearnn_ray.service.backend import Backend
from gearnn_ray.service.origins import StrangerError
from gearnn_ray.service.requests import (
    RefusedError,
    bundle_of,
    busy,
    error,
    least_score_of,
    media_type_of,
    refusal,
    stream_of,
    whole_body,
)
from gearnn_ray.service.stream_pages import PAGE_HEADERS, respond
from gearnn_ray.service.streams import answer_segments
from gearnn_ray.serving.frames import read_frame
from gearnn_ray.tasks.base import Served

__all__ = ["answer"]

_PAGE = resources.files("gearnn_ray.service").joinpath("page.html").read_bytes()


async def answer(request: Request, backend: Backend, admission: Admission) -> Response:
    """The response to one request. Every failure becomes a response, too."""
    try:
        admission.hosts.check(request)
    except StrangerError as problem:
        return error(problem.status, str(problem))
    path, method = request.scope["path"], request.method
    route = path
    if path.startswith("/streams/"):
        route = "/streams/{stream}/segments" if path.endswith("/segments") else "/streams/{stream}"
    if route not in _ROUTES:
        return error(404, f"The path {path[:100]} does not exist: use {', '.join(list(_ROUTES)[:-1])} or {list(_ROUTES)[-1]}.")
    allowed, handle = _ROUTES[route]
    if method not in allowed:
        wrong = error(405, f"{route} does not take {method}: use {' or '.join(allowed)}.")
        wrong.headers["allow"] = ", ".join(allowed)
        return wrong
    try:
        return await handle(request, backend, admission)
    except Exception as problem:
        status, sentence = refusal(problem, f"{method} {route}")
        return busy(sentence, status) if status in (429, 503) else error(status, sentence)


async def _page(request: Request, backend: Backend, admission: Admission) -> Response:
    return Response(_PAGE, media_type="text/html", headers=PAGE_HEADERS)


async def _health(request: Request, backend: Backend, admission: Admission) -> Response:
    streams = {
        name: {
            "online": state.online,
            "problem": state.problem,
            "frames_per_second": state.frames_per_second,
            "dropped": state.dropped,
        }
        for name, state in (await backend.cameras.all()).items()
    }
    health = backend.health()
    is_ready = all(bundle.digest for bundle in health.bundles.values())  # an old release or a copy answers, too
    return JSONResponse(asdict(health) | {"streams": streams}, 200 if is_ready else 503, headers={"cache-control": "no-store"})


class _Followed(StreamingResponse):
    """Lines without an end: they count as a stream for as long as they are followed."""

    def __init__(self, lines: StreamingResponse, streams: Quota) -> None:
        super().__init__(lines.body_iterator, headers=lines.headers)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._streams.reserved(1):
            await super().__call__(scope, receive, send)


async def _stream(request: Request, backend: Backend, admission: Admission) -> Response:
    backend.task(bundle_of(request))  # raises for a bundle that is not served
    path = request.scope["path"]
    page = await respond(path, backend.cameras) if backend.has_cameras(bundle_of(request)) else None
    if isinstance(page, StreamingResponse):
        with admission.streams.reserved(1):  # refused here, where there is no room
            return _Followed(page, admission.streams)
    if page is None:
        raise RefusedError(404, f"The camera or page {path[:100]} does not exist here: /health lists the cameras.")
    return page


async def _predict(request: Request, backend: Backend, admission: Admission) -> Response:
    level = request.headers.get("x-gearnn-level")
    if level is not None:
        parse_level(level)
    stream, bundle, least_score = stream_of(request), bundle_of(request), least_score_of(request)
    task = backend.task(bundle)
    media_type = media_type_of(request, task.media_types)

    with ExitStack() as stack:
        held = stack.enter_context(admission.memory.reserved())
        body = await whole_body(request, admission, held)
        stack.enter_context(admission.requests.reserved(1))  # from now on: slow clients do not take the places of others
        start = time.perf_counter()
        frame = await asyncio.to_thread(read_frame, body, request.headers.get("content-type"), admission.frame)
        decoded = time.perf_counter()
        held.add(frame.pixels.nbytes - len(body))
        del body
        size = backend.answer_bytes(bundle, media_type, *frame.pixels.shape[:2])
        if size > admission.answer_bytes:
            raise RefusedError(
                413,
                f"The answer as {media_type} would have {size:,} bytes, expected at most {admission.answer_bytes:,}: send a "
                "smaller frame, or accept another type.",
            )
        held.add(2 * size)  # what the network gives, and beside it what is sent
        prediction = await backend.predict(frame, level, stream, bundle, media_type)
        encoding = time.perf_counter()
        facts = {
            "level": prediction.estimate.spelled,
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


_Handler = Callable[[Request, Backend, Admission], Awaitable[Response]]
_ROUTES: dict[str, tuple[tuple[str, ...], _Handler]] = {
    "/": (("GET", "HEAD"), _page),
    "/health": (("GET", "HEAD"), _health),
    "/predict": (("POST",), _predict),
    "/streams/{stream}": (("GET", "HEAD"), _stream),
    "/streams/{stream}/segments": (("POST",), answer_segments),
}
