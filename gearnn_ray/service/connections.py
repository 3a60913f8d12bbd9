"""Bounds for connections of Ray Serve's HTTP proxy, for which Serve 2.60 and uvicorn have no settings: time until the head of a
request has arrived, and answers that nobody takes. Requests that have arrived are bounded by `admission`.

    a connection ─► head within `seconds` ─► Serve ─► replica ─► answer, taken at `_LEAST_RATE` or faster
                    └─ else it is closed                         └─ else it is closed, and what waits is freed

The proxy is an actor of Serve's. From then on its connections are of another class; the code of Ray and uvicorn stays as it is.
"""

import asyncio
from functools import partial
from typing import Any

import ray
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gearnn_ray.service.requests import busy

__all__ = ["Connection", "bound_proxies"]

_LEAST_RATE = 64 * 1024  # bytes a second that a client takes of an answer...
_GRACE_SECONDS = 30.0  # ... on average, but for so long: the kernel takes megabytes at once, and then none for a while
_LOOK_SECONDS = 5.0  # between two looks at what was taken
_PROXY = "SERVE_PROXY_ACTOR"  # how the names of Serve's proxies begin
_ASKED_SECONDS = 5.0  # for a proxy's answer


class Connection(HttpToolsProtocol):
    """A connection whose requests must arrive in time, and whose client must take its answers.

    head_seconds: from the connection, or from the first byte of a further request, to the end of the request's head. most_bytes:
    of answers that wait for all clients; a POST beyond is answered with 503.
    """

    def __init__(self, *args: Any, head_seconds: float, most_bytes: int, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head_seconds, self._most_bytes = head_seconds, most_bytes
        self._late: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_head()
        self.resume_writing()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._late is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._has_head()
        waiting = sum(each.transport.get_write_buffer_size() for each in self.connections)
        is_full = self.parser.get_method() == b"POST" and waiting > self._most_bytes
        self.app = _full if is_full else self.config.loaded_app
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._look is None:
            self._take_a_look(self.loop.time(), self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _await_head(self) -> None:
        self._late = self.loop.call_later(self._head_seconds, self.transport.close)

    def _has_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _take_a_look(self, since: float, waited: int) -> None:
        """Free an answer that is not taken. since: when so many bytes waited; none are added before they are taken."""
        taken = waited - self.transport.get_write_buffer_size()
        if self.loop.time() - since > _GRACE_SECONDS + taken / _LEAST_RATE:
            self.transport.abort()
        else:
            self._look = self.loop.call_later(_LOOK_SECONDS, self._take_a_look, since, waited)


def bound_proxies(head_seconds: float, most_bytes: int) -> None:
    """Give the connections of every proxy these bounds. To be repeated, because Serve starts a proxy that died again. Raises
    whatever a proxy raises that has just gone, or is not what it is in Ray 2.60.
    """
    for named in ray.util.list_named_actors(all_namespaces=True):
        if named["name"].startswith(_PROXY):
            actor: Any = ray.get_actor(named["name"], named["namespace"])
            ray.get(actor.__ray_call__.remote(_bound, head_seconds, most_bytes), timeout=_ASKED_SECONDS)


def _bound(proxy: Any, head_seconds: float, most_bytes: int) -> None:
    """Runs in the proxy."""
    if proxy._start_http_server_task.done():
        _, server = proxy._start_http_server_task.result()
        server.config.http_protocol_class = partial(Connection, head_seconds=head_seconds, most_bytes=most_bytes)


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    response = busy("The service is busy with answers that their clients have not taken: try again in a few seconds.")
    response.headers["connection"] = "close"  # the body of the request is not read
    await response(scope, receive, send)
