"""A camera's way to the service: a buffer that drops the oldest, a limit of the rate, and one request for each segment."""

import http.client
import json
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Generic, TypeVar
from urllib.parse import urlsplit

from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.wire import CONTENT_TYPE

__all__ = ["PIECE", "Answer", "AwayError", "Buffer", "RefusedError", "TokenBucket", "pieces_of", "post"]

T = TypeVar("T")

PIECE: Final = 4096
"""Bytes that are sent at once."""
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 30.0
_MOST_ANSWER = 64 * 2**20  # bytes
_MOST_SENTENCE = 300


class AwayError(UserError):
    """The service cannot be reached, or cannot answer now: the same segment may be answered later."""


class RefusedError(UserError):
    """The service does not take this segment, or answers something else: sent again, it would be no better."""


class TokenBucket:
    """A limit of a rate that lets short bursts through. Knows no clock: who uses it tells the time."""

    def __init__(self, rate: float, burst: float) -> None:
        """rate: units a second. burst: so many units may go at once after a rest."""
        self._rate, self._burst = rate, burst
        self._tokens, self._at = burst, float("-inf")

    def take(self, units: float, now: float) -> float:
        """Take so many units; returns how many seconds from now they may go. They may be more than a burst."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        self._tokens -= units
        return max(0.0, -self._tokens / self._rate)


class Buffer(Generic[T]):
    """What waits between two threads, the oldest first. Where it is full, the oldest goes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: deque[T] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> T | None:
        """Add the newest; returns the one that was dropped for it."""
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()
            return self._items.popleft() if len(self._items) > self._most else None

    def take(self) -> T | None:
        """The oldest, when there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            return self._items.popleft() if self._items else None

    def give_back(self, item: T) -> bool:
        """Put what was taken last back as the oldest; returns whether there was still room for it."""
        with self._changed:
            if len(self._items) >= self._most:
                return False
            self._items.appendleft(item)
            return True

    def close(self) -> None:
        """Nothing is added any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait_closed(self, seconds: float) -> bool:
        """Wait so long, or until it is closed; returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed, seconds)


@dataclass(frozen=True)
class Answer:
    """lines: of the frames, as they came. last: the line behind them."""

    lines: tuple[bytes, ...]
    last: bytes


def pieces_of(data: bytes) -> Iterator[bytes]:
    """The bytes in pieces that are small enough for a rate to be even."""
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


def post(server: str, stream: str, body: Iterable[bytes]) -> Answer:
    """Send a segment and wait for its answer. body: in pieces, as they are ready. Raises AwayError and RefusedError."""
    address = urlsplit(server)
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = kind(address.hostname or "", address.port, timeout=_CONNECT_SECONDS)
    path = f"{address.path.rstrip('/')}/streams/{stream}/segments"
    try:
        connection.connect()
        connection.sock.settimeout(_ANSWER_SECONDS)
        headers = {"content-type": CONTENT_TYPE, "transfer-encoding": "chunked"}
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent: the answer says why
            connection.request("POST", path, body, headers, encode_chunked=True)
        response = connection.getresponse()
        said = response.read(_MOST_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise AwayError(f"{server} does not answer ({' '.join(str(reason).split())[:_MOST_SENTENCE]})") from error
    finally:
        connection.close()
    if response.status != 200:
        sentence = f"{server} answers {response.status}{_detail(said)}"
        # anything else comes from whatever stands at the address while the service does not
        refused = response.headers.get_content_type() == "application/problem+json" and 400 <= response.status < 500
        raise RefusedError(sentence) if refused and response.status not in (408, 429) else AwayError(sentence)
    *lines, last = said.splitlines() or [b""]
    return Answer(tuple(lines), last)


def _detail(said: bytes) -> str:
    """What an error in JSON says (RFC 9457)."""
    try:
        detail = json.loads(said)["detail"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return f" ({detail[:_MOST_SENTENCE].removesuffix('.')})" if isinstance(detail, str) else ""
