"""Faults around the service: slow clients, too many requests, a replica that stops or dies. One service is there for all runs.

CHAOS_SECONDS=5 uv run benchmarks/chaos.py overload     with 5 seconds of load instead of a minute, to try it
"""

import asyncio
import atexit
import contextlib
import functools
import os
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.faults.campaign import Line, Outcome, lasting_folder
from benchmarks.faults.clients import (
    BROKEN,
    LARGE,
    SMALL,
    Answer,
    Asked,
    Clients,
    Service,
    free_descriptors,
    is_over,
    looking,
    memory,
    predicting,
    started,
)
from tests.served import connected

SOCKETS = (1, 40, 400)
LOADS = (1, 2, 10)
REQUESTS = {"small frames": SMALL, "large logits": LARGE}
LOAD_SECONDS = float(os.environ.get("CHAOS_SECONDS", 60))
MOST_SECONDS = 10.0
"""For any answer beside slow clients, on a machine that does other things; forty of them once held a request for 58 seconds."""
GONE_SECONDS = 90.0
"""Within which slow clients are disconnected: by default 10 s for a head or a body, 30 s of grace for an answer."""
BACK_SECONDS = 90.0
_ANSWER_SECONDS = 30.0  # that a client waits in an overload
_CONNECTIONS = 1000  # of the clients of an overload; a request that finds none is not sent


@functools.cache
def _running() -> Service:
    free_descriptors(8192)
    stack = contextlib.ExitStack()
    folder = lasting_folder("service")
    atexit.register(stack.close)  # before the folder goes
    return stack.enter_context(started(folder))


def running() -> Service:
    """The service of this process, well."""
    service = _running()
    service.wait_until_good()
    return service


# ── slow clients ───────────────────────────────────────────────────────────────────────────────────────────────────────

HALF_HEAD = b"POST /predict HTTP/1.1\r\nhost: localhost\r\nx: "
HALF_BODY = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n"
UNREAD = LARGE[0].head() + LARGE[0].frame


def until_gone(connections: Sequence[socket.socket], trickle: bytes, seconds: float) -> float:
    """Send each one another byte every second until the service has closed or refused all of them; how many seconds that took.
    Raises AssertionError where some are still there after so many seconds.
    """
    start, there = time.monotonic(), list(connections)
    for connection in there:
        connection.setblocking(False)
    while there:
        for connection in there:
            with contextlib.suppress(OSError):
                connection.send(trickle)
        for _ in range(10):
            there = [each for each in there if not is_over(each)]
            if there:
                time.sleep(0.1)
        assert time.monotonic() < start + seconds, f"{len(there)} slow clients are still connected after {seconds:.0f} s"
    return time.monotonic() - start


def until_answered(connections: Sequence[socket.socket], seconds: float) -> None:
    """Return when each one has the begin of an answer, which stays unread."""
    deadline = time.monotonic() + seconds
    for connection in connections:
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(ConnectionError):  # it is cut off already
            connection.recv(1, socket.MSG_PEEK)


def slow(service: Service, begin: bytes, trickle: bytes, count: int, before: float = 5.0) -> Outcome:
    """So many clients that never finish, beside a good one and one that asks for /health; seconds of these alone before."""
    free_descriptors(8192)
    with Clients(predicting(service, SMALL), looking(service), pause=0.02) as good, contextlib.ExitStack() as stack:
        begun = time.monotonic()
        time.sleep(before)
        left = time.monotonic()
        slow_ones = [stack.enter_context(connected(service.port, begin)) for _ in range(count)]
        if begin is UNREAD:  # what their answers take is another matter
            until_answered(slow_ones, GONE_SECONDS)
        met = time.monotonic()
        gone = until_gone(slow_ones, trickle, GONE_SECONDS)
        ended = time.monotonic()
    figures = {f"{count} clients, seconds until all are disconnected": gone}
    for what, seen in zip(("/predict", "/health"), good.seen, strict=True):
        beside = seen.since(met, ended)
        for when, part in (("before", seen.since(begun, left)), ("beside them", beside)):
            for name, seconds in zip(("p50", "p99"), part.quantiles(), strict=True):
                figures[f"{count} clients, {name} of {what} {when}, ms"] = 1000 * seconds
        slowest = max(seconds for _, seconds, _ in beside.asked)
        assert slowest < MOST_SECONDS, f"{what} took {slowest:.1f} s beside {count} slow clients"
        counted = Counter(beside.statuses())
        busy = counted.pop(503, 0)
        assert set(counted) == {200}, f"{what} was answered with {dict(counted)}"
        assert not busy or (begin is UNREAD and what == "/predict"), f"{what} was answered with 503 {busy} times"
        if busy:  # answers that wait for slow clients have a limit, beyond which others are refused
            figures[f"{count} clients, share of 503 to {what}"] = busy / len(beside.asked)
    wrong = good.seen[0].wrong
    return Outcome(silent=len(wrong), note="".join(wrong[:1]), figures=figures)


def slow_runs(begin: bytes, trickle: bytes) -> list[Callable[[random.Random, Path], Outcome]]:
    return [lambda _, __, count=count: slow(running(), begin, trickle, count) for count in SOCKETS]


# ── overload ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Load:
    """What came of the requests of a load. asked: status and seconds of each; a status of 0 is a broken connection."""

    asked: list[tuple[int, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unsent: int = 0

    def share(self, *statuses: int) -> float:
        return sum(status in statuses for status, _ in self.asked) / max(1, len(self.asked))


class Pool:
    """Connections that stay open, for clients of one event loop."""

    def __init__(self, service: Service, load: Load) -> None:
        self._service, self.load = service, load
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.busy = 0

    async def ask(self, asked: Asked) -> None:
        """One request, of which the load keeps count."""
        sent, self.busy = time.monotonic(), self.busy + 1
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                answer = await self._answer(asked)
        except (OSError, EOFError, TimeoutError, ValueError, asyncio.LimitOverrunError):
            answer = BROKEN
        self.busy -= 1
        self.load.asked.append((answer.status, time.monotonic() - sent))
        if answer.status == 200 and (problem := self._service.wrong(asked, answer)):
            self.load.wrong.append(problem)

    async def _answer(self, asked: Asked) -> Answer:
        reader, writer = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self._service.port)
        try:
            writer.write(asked.head() + asked.frame)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            pairs = (line.split(": ", 1) for line in head[1:] if line)
            headers = {name.lower(): value for name, value in pairs}
            if "content-length" in headers:
                body = await reader.readexactly(int(headers["content-length"]))
            else:  # of Serve itself, when a replica is gone
                headers["connection"], body = "close", b""
        except BaseException:
            writer.transport.abort()
            raise
        if headers.get("connection") == "close":
            writer.close()
        else:
            self._free.append((reader, writer))
        return Answer(int(head[0].split()[1]), headers, body)

    def close(self) -> None:
        for _, writer in self._free:
            writer.transport.abort()


async def closed_loop(service: Service, requests: Sequence[Asked], clients: int, seconds: float) -> Load:
    """Clients that each send the next request when the last one is answered."""
    pool, end = Pool(service, Load()), time.monotonic() + seconds

    async def client(number: int) -> None:
        while time.monotonic() < end:
            await pool.ask(requests[number % len(requests)])
            number += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    pool.close()
    return pool.load


async def open_loop(service: Service, requests: Sequence[Asked], rate: float, seconds: float, draw: random.Random) -> Load:
    """Requests at random moments, so many a second on average, whether the last ones are answered or not."""
    pool, start, at, under_way = Pool(service, Load()), time.monotonic(), 0.0, set[asyncio.Task[None]]()
    while (at := at + draw.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, start + at - time.monotonic()))
        if time.monotonic() > start + seconds:
            break
        if pool.busy >= _CONNECTIONS:
            pool.load.unsent += 1
            continue
        task = asyncio.create_task(pool.ask(draw.choice(requests)))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    pool.close()
    return pool.load


@functools.cache
def capacity(service: Service, requests: tuple[Asked, ...], seconds: float) -> float:
    """Good answers a second to sixteen clients."""
    asyncio.run(closed_loop(service, requests, 16, seconds / 4))  # what is done first takes longer
    load = asyncio.run(closed_loop(service, requests, 16, seconds))
    return load.share(200) * len(load.asked) / seconds


@contextlib.contextmanager
def peak_of(service: Service) -> Iterator[list[float]]:
    """MiB of all processes of the service, looked at twice a second while the context lasts; the first one before anything."""
    sizes, ended = [memory(service.processes())], threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            sizes.append(memory(service.processes()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield sizes
    finally:
        ended.set()
        thread.join()


def overload(
    service: Service, kind: str, times: int, draw: random.Random, seconds: float = LOAD_SECONDS, measuring: float = 5.0
) -> Outcome:
    """Requests at a multiple of the rate that the service answers; then it must be well again at once."""
    free_descriptors(8192)
    requests = REQUESTS[kind]
    rate = times * capacity(service, requests, measuring)
    with peak_of(service) as sizes:
        load = asyncio.run(open_loop(service, requests, rate, seconds, draw))
    since = time.monotonic()
    service.wait_until_good(BACK_SECONDS)
    recovery = time.monotonic() - since
    took = [taken for status, taken in load.asked if status == 200]
    assert len(took) > 1, f"no request in {seconds:.0f} s was answered: {Counter(status for status, _ in load.asked)}"
    figures = {
        "requests a second": len(load.asked) / seconds,
        "not sent, as 1,000 others waited, share": load.unsent / max(1, load.unsent + len(load.asked)),
        "200, share": load.share(200),
        "503, share": load.share(503),
        "other, share": 1 - load.share(200, 503),
        "p99 of the 200s, ms": 1000 * statistics.quantiles(took, n=100, method="inclusive")[98],
        "memory before, MiB": sizes[0],
        "peak memory, MiB": max(sizes),
    }
    named = {f"{times}× of {kind}, {name}": value for name, value in figures.items()}
    return Outcome(recovery=recovery, silent=len(load.wrong), note="".join(load.wrong[:1]), figures=named)


def overload_runs() -> list[Callable[[random.Random, Path], Outcome]]:
    return [
        lambda draw, _, kind=kind, times=times: overload(running(), kind, times, draw) for kind in REQUESTS for times in LOADS
    ]


# ── a replica that stops or dies ───────────────────────────────────────────────────────────────────────────────────────


def without_replica(
    service: Service,
    draw: random.Random,
    fault: Callable[[psutil.Process], object],
    over: Callable[[psutil.Process], bool] = lambda _: True,
) -> Outcome:
    """Two clients ask on while something happens to the replica, until both are answered again and the fault is over."""
    (victim,) = service.replicas()
    # a client gives up after 5 seconds and asks again
    with Clients(*[predicting(service, SMALL, seconds=5.0)] * 2, pause=0.02) as clients:
        time.sleep(draw.uniform(1, 3))
        at = time.monotonic()
        fault(victim)
        while not (over(victim) and all(seen.first_good(at + 0.5) for seen in clients.seen)):
            assert time.monotonic() < at + BACK_SECONDS, f"there is no good answer {BACK_SECONDS:.0f} s after the fault"
            time.sleep(0.05)
        time.sleep(1)
    back = min(found for seen in clients.seen if (found := seen.first_good(at)) is not None)
    wrong = [problem for seen in clients.seen for problem in seen.wrong]
    failed = sum(status != 200 for seen in clients.seen for status in seen.statuses())
    return Outcome(recovery=back - at, silent=len(wrong), note="".join(wrong[:1]), figures={"requests that failed": failed})


def kill_replica(service: Service, draw: random.Random) -> Outcome:
    """SIGKILL."""
    return without_replica(service, draw, psutil.Process.kill)


def stop_replica(service: Service, draw: random.Random, longest: float = 60.0) -> Outcome:
    """SIGSTOP, and SIGCONT 1 to `longest` seconds later: some are replaced before that, others go on with what they had."""
    pause = draw.uniform(1, longest)
    stopped: list[tuple[psutil.Process, float]] = []

    def stop(victim: psutil.Process) -> None:
        stopped.append((victim, time.monotonic()))
        victim.suspend()

    def over(victim: psutil.Process) -> bool:
        if not victim.is_running():
            return True
        if time.monotonic() < stopped[0][1] + pause:
            return False
        go_on(victim)
        return True

    def go_on(victim: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error):
            victim.resume()

    try:
        outcome = without_replica(service, draw, stop, over)
    finally:
        for victim, _ in stopped:
            go_on(victim)
    return Outcome(**{**vars(outcome), "figures": {**outcome.figures, "paused": pause}})


LINES: tuple[Line, ...] = (
    Line("slow-header", "clients that send half a head, a byte a second", 3, slow_runs(HALF_HEAD, b"x")),
    Line("slow-body", "clients that send half a body, a byte a second", 3, slow_runs(HALF_BODY, b"x")),
    Line("slow-reader", "clients that do not read their answers", 3, slow_runs(UNREAD, b"")),
    Line("overload", "1, 2 and 10 times as many requests as the service can answer", 6, overload_runs()),
    Line("stop-replica", "SIGSTOP of the replica", 30, lambda draw, _: stop_replica(running(), draw)),
    Line("kill-replica", "SIGKILL of the replica", 30, lambda draw, _: kill_replica(running(), draw)),
)
