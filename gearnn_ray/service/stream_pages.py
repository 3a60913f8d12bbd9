"""Pages of live streams: `/streams/NAME`, and beneath it `state` (JSON), `picture` (JPEG) and `lines` (NDJSON without an end).

The service asks a board of all its cameras, `jobs/watch.py --port` its own stream; both answer through `respond`.
"""

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import resources
from typing import Protocol

import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gearnn_ray.core.errors import UserError
from gearnn_ray.service.origins import Hosts, StrangerError
from gearnn_ray.video.lines import Line, written
from gearnn_ray.video.live import LiveStream, StreamState

__all__ = ["PAGE_HEADERS", "LiveStreams", "respond", "stream_page_at"]

_PAGE = resources.files("gearnn_ray.service").joinpath("stream.html").read_bytes()
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'",
    "cache-control": "no-cache",
}
_FRESH = {"cache-control": "no-store"}
_POLL_SECONDS = 0.2  # between two looks for new lines
_STARTED_SECONDS = 10.0
_PATH = re.compile(r"/streams/(?P<name>[A-Za-z0-9._:@+-]{1,128})(?:/(?P<part>state|picture|lines))?")


class LiveStreams(Protocol):
    """Streams by name. None: there is no such stream here."""

    async def state(self, name: str) -> StreamState | None:
        """How a stream is now."""
        ...

    async def picture(self, name: str) -> bytes | None:
        """Its latest picture, a JPEG; also None before the first."""
        ...

    async def lines_after(self, name: str, number: int) -> list[tuple[int, Line]]:
        """Its latest lines behind this number, with their numbers."""
        ...


async def respond(path: str, streams: LiveStreams) -> Response | None:
    """The response to a GET of a path beneath /streams/; None if there is no such page or stream."""
    match = _PATH.fullmatch(path)
    if match is None or (state := await streams.state(match["name"])) is None:
        return None
    match match["part"]:
        case "state":
            return JSONResponse(asdict(state), headers=_FRESH)
        case "picture":
            # 204 has no body: the page asks again
            picture = await streams.picture(match["name"])
            return Response(picture, 200 if picture else 204, headers=_FRESH, media_type="image/jpeg" if picture else None)
        case "lines":
            return StreamingResponse(_lines(match["name"], streams), media_type="application/x-ndjson", headers=_FRESH)
        case _:
            return Response(_PAGE, media_type="text/html", headers=PAGE_HEADERS)


async def _lines(name: str, streams: LiveStreams) -> AsyncIterator[str]:
    last = 0
    while (state := await streams.state(name)) is not None:
        last = min(last, state.frames)  # a camera whose process was started again counts anew
        for number, line in await streams.lines_after(name, last):
            last = number
            yield written(line)
        await asyncio.sleep(_POLL_SECONDS)


class _Own:
    """The one stream of this process."""

    def __init__(self, live: LiveStream) -> None:
        self._live = live

    async def state(self, name: str) -> StreamState | None:
        return self._live.state() if name == self._live.stream else None

    async def picture(self, name: str) -> bytes | None:
        return self._live.picture()

    async def lines_after(self, name: str, number: int) -> list[tuple[int, Line]]:
        return self._live.lines_after(number)


class _Collector:
    """The stream's numbers for Prometheus. Levels are the release's, so that their number is bounded."""

    def __init__(self, live: LiveStream) -> None:
        self._live = live

    def collect(self) -> Iterator[Metric]:
        state = self._live.state()
        for name, text, value in (
            ("gearnn_stream_frames", "Frames processed.", state.frames),
            ("gearnn_stream_dropped", "Frames dropped because newer ones had come.", state.dropped),
            ("gearnn_stream_lost", "Packets that could not be decoded.", state.lost),
        ):
            counter = CounterMetricFamily(name, text, labels=["stream"])
            counter.add_metric([state.stream], value)
            yield counter
        for name, text, number in (
            ("gearnn_stream_online", "1: frames come, 0: they do not.", float(state.online)),
            ("gearnn_stream_frames_per_second", "Frames processed a second, over the last seconds.", state.frames_per_second),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["stream"])
            gauge.add_metric([state.stream], number)
            yield gauge
        used = CounterMetricFamily("gearnn_stream_level_frames", "Frames processed, by level used.", labels=["stream", "level"])
        for level, frames in state.level_frames.items():
            used.add_metric([state.stream, level], frames)
        yield used


@contextmanager
def stream_page_at(port: int, live: LiveStream) -> Iterator[str]:
    """Serve one stream's page and /metrics on loopback while the context lasts; yields the page's address.

    Raises UserError if the port cannot be used.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(live))
    streams = _Own(live)

    async def page(request: Request) -> Response:
        answer = await respond(request.url.path, streams)
        return answer or _problem(404, f"there is no {request.url.path[:100]} here: use /streams/{live.stream}")

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    async def home(request: Request) -> Response:
        return RedirectResponse(f"/streams/{live.stream}")

    routes = [Route("/", home), Route("/metrics", metrics), Route("/{path:path}", page)]
    app = Starlette(routes=routes, middleware=[Middleware(_OwnHost)])
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=_run, args=(server,), daemon=True)
    thread.start()
    deadline = time.monotonic() + _STARTED_SECONDS
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    if not server.started:
        raise UserError(f"127.0.0.1 port {port} cannot be used: free it or choose another port")
    try:
        yield f"http://127.0.0.1:{port}/streams/{live.stream}"
    finally:
        server.should_exit = True
        thread.join(timeout=5)


def _problem(status: int, detail: str) -> Response:
    return JSONResponse({"status": status, "detail": detail}, status, media_type="application/problem+json")


class _OwnHost:
    """Refuses requests under names of other hosts, as `origins` describes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http":
                Hosts().check(Request(scope))
        except StrangerError as problem:
            await _problem(problem.status, str(problem))(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _run(server: uvicorn.Server) -> None:
    try:
        server.run()
    except SystemExit:  # uvicorn's way to say that the port is taken
        return
