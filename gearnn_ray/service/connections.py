"""Bounds for connections of Ray Serve's HTTP proxy, for which Serve 2.60 and uvicorn have no settings: time until the head of a
request has arrived, and answers that nobody takes. Requests that have arrived are bounded by `admission`.

    a connection ─► head within `seconds` ─► Serve ─► replica ─► answer, taken at `_LEAST_RATE` or faster
                    └─ else it is closed                         ├─ else it is closed, and what waits is freed
                                                                 └─ before the body has arrived (a refusal): the rest within
                                                                    `seconds`, else it is closed

The proxy is an actor of Serve's. From then on its connections are of another class; the code of Ray and uvicorn stays as it is.
"""

import asyncio
import socket
import struct
from functools import partial
from typing import Any

import ray
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gearnn_ray.service.requests import busy

__all__ = ["Connection", "bound_proxies", "proxies"]

_LEAST_RATE = 64 * 1024  # bytes a second that a client takes of an answer...
_GRACE_SECONDS = 30.0  # ... on average, but for so long: the kernel takes megabytes at once, and then none for a while
_LOOK_SECONDS = 5.0  # between two looks at what was taken
_RESET = struct.pack("ii", 1, 0)  # a struct linger: on, no seconds
_PROXY = "SERVE_PROXY_ACTOR"  # how the names of Serve's proxies begin
_ASKED_SECONDS = 5.0  # for a proxy's answer


class Connection(HttpToolsProtocol):
    """A connection whose requests must arrive in time, and whose client must take its answers.

    head_seconds: from the connection, or from the first byte of a further request, to the end of the request's head; and from an
    answer that comes before its request's body to the end of that body. most_bytes: of answers that wait for all clients.
    most_requests: that have arrived and are not answered. A POST beyond either is answered with 503, where that costs the least.
    """

    def __init__(self, *args: Any, head_seconds: float, most_bytes: int, most_requests: int, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head_seconds, self._most_bytes, self._most_requests = head_seconds, most_bytes, most_requests
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
        refused = self._refused() if self.parser.get_method() == b"POST" else None
        self.app = partial(_full, refused) if refused else self.config.loaded_app
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._has_head()

    def on_response_complete(self) -> None:
        # nobody reads the rest of this body; a request that waits behind it has its own time
        is_early = self.cycle is not None and self.cycle.more_body and not self.pipeline
        super().on_response_complete()
        if is_early and self._late is None:
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._look is None:
            self._take_a_look(self.loop.time(), self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _refused(self) -> str | None:
        """Why there is no room for another request; None where there is."""
        connections = list(self.connections)
        if sum(_is_processed(getattr(each, "cycle", None)) for each in connections) >= self._most_requests:
            return "requests"
        if sum(each.transport.get_write_buffer_size() for each in connections) > self._most_bytes:
            return "answers that their clients have not taken"
        return None

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
            # a reset, else the kernel holds megabytes until the client has taken them, or is gone
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
        else:
            self._look = self.loop.call_later(_LOOK_SECONDS, self._take_a_look, since, waited)


def _is_processed(cycle: Any) -> bool:
    """Whether a request has arrived and is not answered yet. cycle: a connection's latest request; None before its first one."""
    return cycle is not None and not cycle.more_body and not cycle.response_complete


def bound_proxies(head_seconds: float, most_bytes: int, most_requests: int) -> None:
    """Give the connections of every proxy these bounds, as in `Connection`. To be repeated, because Serve starts a proxy that
    died again. Raises whatever a proxy raises that has just gone, or is not what it is in Ray 2.60.
    """
    for proxy in proxies():
        ray.get(proxy.__ray_call__.remote(_bound, head_seconds, most_bytes, most_requests), timeout=_ASKED_SECONDS)


def proxies() -> list[Any]:
    """Serve's proxies in this cluster, as actors."""
    named = (each for each in ray.util.list_named_actors(all_namespaces=True) if each["name"].startswith(_PROXY))
    return [ray.get_actor(each["name"], each["namespace"]) for each in named]


def _bound(proxy: Any, head_seconds: float, most_bytes: int, most_requests: int) -> None:
    """Runs in the proxy."""
    if proxy._start_http_server_task.done():
        _, server = proxy._start_http_server_task.result()
        server.config.http_protocol_class = partial(
            Connection, head_seconds=head_seconds, most_bytes=most_bytes, most_requests=most_requests
        )


async def _full(what: str, scope: Scope, receive: Receive, send: Send) -> None:
    response = busy(f"The service is busy with {what}: try again in a few seconds.")
    response.headers["connection"] = "close"  # the body of the request is not read
    await response(scope, receive, send)
