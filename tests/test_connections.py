"""Connections of the proxy, with uvicorn alone and no Ray: what never arrives or is never taken ends, and nobody waits for it."""

import asyncio
import contextlib
import http.client
import select
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gearnn_ray.service import connections
from gearnn_ray.service.connections import Connection
from tests.served import connected

MIB = 2**20
HEAD = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n"
POSTED = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n"


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    """8 MiB for /large, a few bytes for others, for /later after half a second."""
    await asyncio.sleep(0.5 if scope["path"] == "/later" else 0)
    body = bytes(8 * MIB if scope["path"] == "/large" else 3)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def served(
    head_seconds: float = 0.5, most_bytes: int = 1000 * MIB, most_requests: int = 1000
) -> Iterator[tuple[int, uvicorn.Server]]:
    """The port of a server with these bounds, in a thread."""
    protocol = partial(Connection, head_seconds=head_seconds, most_bytes=most_bytes, most_requests=most_requests)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(large, lifespan="off", log_level="error", http=protocol))  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1], server
        server.should_exit = server.force_exit = True
        thread.join(10)


def asked(port: int, method: str = "POST", path: str = "/predict") -> tuple[int, float]:
    """The status of a good request, and the seconds that it took."""
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, b"" if method == "POST" else None)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, time.monotonic() - start


@pytest.mark.parametrize("sent", [b"", HEAD[:5], HEAD, HEAD + b"x: " + b"y" * 5000], ids=["nothing", "a word", "half", "long"])
def test_a_head_that_does_not_end_is_closed_in_time(sent: bytes) -> None:
    with served() as (port, _), connected(port, sent) as connection:
        start = time.monotonic()
        assert connection.recv(1) == b""
        assert 0.3 < time.monotonic() - start < 3


def test_a_head_that_trickles_is_closed_in_time() -> None:
    with served() as (port, _), connected(port) as connection:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in HEAD * 2:
                connection.sendall(bytes((byte,)))
                time.sleep(0.05)
        assert time.monotonic() - start < 3


def test_half_a_further_head_is_closed_in_time_and_an_idle_connection_is_not() -> None:
    with served() as (port, _), connected(port, HEAD + b"\r\n") as connection:
        assert connection.recv(MIB).startswith(b"HTTP/1.1 200")
        time.sleep(1)
        connection.sendall(HEAD + b"\r\n")
        assert connection.recv(MIB).startswith(b"HTTP/1.1 200")
        connection.sendall(HEAD)
        start = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - start < 3


def test_a_body_that_trickles_after_its_answer_is_closed_in_time_and_one_that_arrives_is_not() -> None:
    with served() as (port, _), connected(port, POSTED) as refused, connected(port, POSTED) as late:
        assert refused.recv(MIB).startswith(b"HTTP/1.1 200")
        assert late.recv(MIB).startswith(b"HTTP/1.1 200")
        late.sendall(bytes(1000) + HEAD + b"\r\n")
        assert late.recv(MIB).startswith(b"HTTP/1.1 200")
        start = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < start + 5:
                refused.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - start < 3
        late.sendall(HEAD + b"\r\n")
        assert late.recv(MIB).startswith(b"HTTP/1.1 200")


def test_slow_readers_hold_up_nobody_and_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(connections, "_GRACE_SECONDS", 1.0)
    with served() as (port, server), contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connected(port, HEAD.replace(b"/predict", b"/large") + b"\r\n"))
        for method, path in (("POST", "/predict"), ("GET", "/health")):
            status, seconds = asked(port, method, path)
            assert (status, seconds < 2) == (200, True)
        deadline = time.monotonic() + 10
        while server.server_state.connections:
            assert time.monotonic() < deadline, "the answers are still held"
            time.sleep(0.05)


def test_a_client_that_takes_its_answer_slowly_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(connections, "_GRACE_SECONDS", 2.0)
    with (
        served() as (port, _),
        connected(port, HEAD.replace(b"/predict", b"/large") + b"connection: close\r\n\r\n") as connection,
    ):
        received = 0
        while data := connection.recv(128 * 1024):
            received += len(data)
            time.sleep(0.0005)
        assert received > 8 * MIB


def test_while_too_many_bytes_of_answers_wait_a_post_is_refused_and_health_is_not() -> None:
    with served(most_bytes=20 * MIB) as (port, _), contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connected(port, HEAD.replace(b"/predict", b"/large") + b"\r\n"))
        deadline = time.monotonic() + 10
        while asked(port)[0] != 503:
            assert time.monotonic() < deadline
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("POST", "/predict", b"")
        response = connection.getresponse()
        assert (response.status, response.headers["retry-after"]) == (503, "2")
        assert response.headers["content-type"] == "application/problem+json"
        connection.close()
        assert asked(port, "GET", "/health")[0] == 200
        stack.close()
        while asked(port)[0] != 200:
            assert time.monotonic() < deadline


def test_beside_as_many_requests_as_allowed_a_post_is_refused_but_not_beside_ones_that_have_not_arrived() -> None:
    later = HEAD.replace(b"/predict", b"/later")
    with served(most_requests=2) as (port, _), contextlib.ExitStack() as stack:
        for begin in (HEAD, later.replace(b"length: 0", b"length: 9") + b"\r\n", later + b"\r\n"):
            stack.enter_context(connected(port, begin))
        assert asked(port)[0] == 200
        last = stack.enter_context(connected(port, later + b"\r\n"))
        deadline = time.monotonic() + 0.4
        while asked(port)[0] != 503:
            assert time.monotonic() < deadline
        assert asked(port, "GET", "/health")[0] == 200
        assert last.recv(MIB).startswith(b"HTTP/1.1 200")
        assert asked(port)[0] == 200


def test_an_answer_that_is_cut_off_leaves_nothing_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(connections, "_GRACE_SECONDS", 0.5)
    with served() as (port, _), connected(port, HEAD.replace(b"/predict", b"/large") + b"\r\n") as reader:
        poll = select.poll()
        poll.register(reader, select.POLLRDHUP)
        assert poll.poll(5000), "it is not reset"
