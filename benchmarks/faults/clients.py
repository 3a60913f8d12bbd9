"""A service in a process of its own on loopback, and clients that know the right answer to each of their requests."""

import contextlib
import functools
import http.client
import io
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from unittest import mock

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from benchmarks.serving import ROOT
from benchmarks.serving import service as serve_job
from gearnn_ray.store.releases import Store
from tests import served

BUNDLE = "tiny"
LOGITS = "application/x-npy"


@dataclass(frozen=True)
class Asked:
    """A request to /predict: a frame, its level, and the media type of the answer."""

    frame: bytes
    level: str
    accept: str = "image/png"

    def head(self, *more: str) -> bytes:
        """Of HTTP/1.1, up to the body."""
        lines = ("POST /predict HTTP/1.1", "host: localhost", f"accept: {self.accept}", f"content-length: {len(self.frame)}")
        return "\r\n".join((*lines, *more, "\r\n")).encode()


SMALL = (
    Asked(served.jpeg(served.picture(1), 10), "jpeg-10"),
    Asked(served.jpeg(served.picture(2, 48, 96), 50), "jpeg-50"),
    Asked(served.png(served.picture(3)), "clean"),
)
LARGE = (
    Asked(served.jpeg(served.picture(4, 720, 1280), 10), "jpeg-10", LOGITS),
    Asked(served.jpeg(served.picture(5, 720, 1280), 50), "jpeg-50", LOGITS),
)
"""Frames of a few thousand pixels, whose answers have a few hundred bytes; frames of 720p, whose logits have 11 MB."""


@dataclass(frozen=True)
class Answer:
    """status: 0 where the connection broke or the answer did not come in time. headers: with names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


BROKEN = Answer(0, {}, b"")


@dataclass(frozen=True, eq=False)
class Service:
    """A running service. processes: all of its processes, as they are now. served: digests of the releases that it may serve."""

    port: int
    store: Path
    processes: Callable[[], list[psutil.Process]]
    served: set[str] = field(default_factory=set)
    _right: dict[tuple[str, Asked], bytes] = field(default_factory=dict)  # answers that were found right, by release

    def publish(self, seed: int, whole: bool = True) -> str:
        """A release with weights of its own, without a tag. Returns its digest. whole: the service may serve it."""
        digest = served.publish(Store(self.store), BUNDLE, seed=seed, latest=False)
        if whole:
            self.served.add(digest)
        return digest

    def release(self, digest: str) -> None:
        """Let the tag that the service follows point to this release."""
        Store(self.store).tag(BUNDLE, "latest", digest)

    def ask(self, asked: Asked, seconds: float = 60, **headers: str) -> Answer:
        """One request, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            told = {name.replace("_", "-"): text for name, text in headers.items()}
            connection.request("POST", "/predict", asked.frame, {"accept": asked.accept, **told})
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        except (OSError, http.client.HTTPException):
            return BROKEN
        finally:
            connection.close()

    def health(self, seconds: float = 60) -> tuple[int, Any]:
        """The status of /health, 0 where it does not come, and what it says."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            return 0, {}
        finally:
            connection.close()

    def wrong(self, asked: Asked, answer: Answer) -> str:
        """What is wrong with an answer of status 200, in a sentence; "" for a right one."""
        release, level = answer.headers.get("x-gearnn-release", ""), answer.headers.get("x-gearnn-level")
        if release.removeprefix(f"{BUNDLE}@") not in self.served:
            return f"an answer is of {release!r}, which was never published"
        if level != asked.level:
            return f"a frame of {asked.level} was answered at {level}"
        key = release, asked
        if self._right.get(key) == answer.body:
            return ""
        try:
            is_right = _is_right(asked, answer.body, expected(self.store, release, asked))
        except (OSError, ValueError) as error:
            return f"an answer cannot be read: {error}"
        if not is_right:
            return f"another answer than the network of {level} of {release[:24]} gives"
        self._right[key] = answer.body
        return ""

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        return [each for each in self.processes() if "ServeReplica:gearnn" in name_of(each)]

    def wait_until_good(self, seconds: float = 120) -> None:
        """Return when it answers and has nothing to complain about."""
        deadline = time.monotonic() + seconds
        while True:
            status, health = self.health(10)
            if status == 200 and health["status"] == "ok" and all(self.ask(each, 10).status == 200 for each in SMALL):
                return
            assert time.monotonic() < deadline, f"the service is not well after {seconds:.0f} s: {status} {health}"
            time.sleep(0.2)


@functools.lru_cache(64)
def expected(store: Path, release: str, asked: Asked) -> NDArray[np.float32]:
    """Logits [K, H, W] of the level's own plain network."""
    return served.expected_logits(store, release, asked.level, asked.frame)


def _is_right(asked: Asked, body: bytes, logits: NDArray[np.float32]) -> bool:
    if asked.accept == LOGITS:
        found = np.load(io.BytesIO(body), allow_pickle=False)
        return found.shape == logits.shape and bool(np.abs(found - logits).max() < 1e-3 * np.abs(logits).max())
    classes = np.asarray(Image.open(io.BytesIO(body)))
    right = logits.argmax(0)
    return classes.shape == right.shape and bool(np.mean(classes == right) > 0.999)  # elsewhere two logits are almost equal


@contextlib.contextmanager
def started(folder: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Service]:
    """`jobs/serve.py` while the context lasts, over a store with one release. options: further ones of the job."""
    store = folder / "store"
    digest = served.publish(Store(store), BUNDLE)
    told = ("--store", str(store), "--bundles", BUNDLE, "--trust", "tests", "--cache", str(folder / "copies"))
    with (
        mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT), **(environment or {})}),
        serve_job(*told, "--poll-seconds", "1", *options) as port,
    ):
        yield Service(port, store, functools.partial(_its_processes, port), {digest})


def _its_processes(port: int) -> list[psutil.Process]:
    (job,) = (each for each in psutil.Process().children() if f"serve.py --port {port} " in name_of(each))
    return [job, *job.children(recursive=True)]


def name_of(process: psutil.Process) -> str:
    """Its command line; "" when it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


# ── what clients see ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Seen:
    """What clients have seen. asked: of each request, when it was sent, its seconds and its status. wrong: sentences."""

    asked: list[tuple[float, float, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def since(self, begin: float, end: float = float("inf")) -> "Seen":
        """The requests that were sent in this time."""
        return Seen([each for each in list(self.asked) if begin <= each[0] < end], self.wrong)

    def quantiles(self) -> tuple[float, float]:
        """p50 and p99 of the seconds of good answers."""
        took = [seconds for _, seconds, status in self.asked if status == 200]
        assert len(took) > 1, "there are no good answers"
        cuts = statistics.quantiles(took, n=100, method="inclusive")
        return cuts[49], cuts[98]

    def statuses(self) -> list[int]:
        return [status for _, _, status in self.asked]

    def first_good(self, since: float) -> float | None:
        """When the first good answer came to a request that was sent after this time."""
        return min((sent + took for sent, took, status in list(self.asked) if status == 200 and sent >= since), default=None)


class Clients:
    """Threads that ask one thing after the other while the context lasts. Raises AssertionError at its end for what went wrong
    in them.
    """

    def __init__(self, *asks: Callable[[Seen], int], pause: float = 0.0) -> None:
        """asks: of each thread, which sends one request and returns its status. pause: seconds after each answer."""
        self.seen = [Seen() for _ in asks]
        self._ended, self._failed = threading.Event(), list[BaseException]()
        self._pause = pause
        self._threads = [
            threading.Thread(target=self._work, args=each, daemon=True) for each in zip(asks, self.seen, strict=True)
        ]

    def _work(self, ask: Callable[[Seen], int], seen: Seen) -> None:
        try:
            while not self._ended.is_set():
                sent = time.monotonic()
                status = ask(seen)
                seen.asked.append((sent, time.monotonic() - sent, status))
                self._ended.wait(self._pause if status == 200 else max(self._pause, 0.1))
        except BaseException as error:
            self._failed.append(error)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        assert not self._failed, f"a client failed: {self._failed[0]!r}"


def predicting(service: Service, requests: Sequence[Asked], seconds: float = 60) -> Callable[[Seen], int]:
    """A client that sends these in turns, and looks at each answer."""
    turn = iter(range(10**12))

    def ask(seen: Seen) -> int:
        asked = requests[next(turn) % len(requests)]
        answer = service.ask(asked, seconds)
        if answer.status == 200 and (problem := service.wrong(asked, answer)):
            seen.wrong.append(problem)
        return answer.status

    return ask


def looking(service: Service) -> Callable[[Seen], int]:
    """A client that asks for /health."""
    return lambda _: service.health()[0]


def free_descriptors(count: int) -> None:
    """Let this process, and those that it starts from now on, open so many files."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count if hard < 0 else min(count, hard), hard))


def is_over(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection, though what it sent before was not read, or has refused with 503.

    connection: one that does not block.
    """
    import select

    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    if any(found for _, found in poll.poll(0)):
        return True
    try:
        return connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 503"
    except BlockingIOError:
        return False
    except OSError:
        return True


def memory(processes: Sequence[psutil.Process]) -> float:
    """MiB that processes hold, with shared pages in shares."""
    total = 0.0
    for each in processes:
        with contextlib.suppress(psutil.Error):
            total += each.memory_full_info().pss / 2**20
    return total
