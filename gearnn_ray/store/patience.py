"""A store in the network is asked again while it does not answer, with growing pauses, for as long as its reader has patience.

The option `patience` of an s3:// address is that time in seconds; it travels with the address to every process. Without it a
reader has 20 s, so that a wrong address shows soon and a server can serve something else. A job has work to lose, hence 300 s.
"""

import itertools
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pyarrow import fs

from gearnn_ray.core.errors import StoreUnavailableError

READERS_SECONDS, JOBS_SECONDS = 20.0, 300.0

CONNECT_SECONDS, SILENT_SECONDS = 5.0, 10.0  # until a connection is open, and without a byte on it: then the request has failed
_LONGEST_PAUSE = 15.0
_LOG = logging.getLogger(__name__)

# the connection and the server's health; not what a server refuses, such as a wrong key or bucket
_TRANSIENT = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT)"
    r"|HTTP status (5\d\d|408|429)"
)
T = TypeVar("T")


def patient(uri: str) -> str:
    """The address of a store with the patience of a job, unless it states another."""
    parts = urlsplit(uri)
    if parts.scheme != "s3" or _option(parts.query) is not None:
        return uri
    return urlunsplit(parts._replace(query="&".join(filter(None, (parts.query, f"patience={JOBS_SECONDS:g}")))))


class Patience:
    """Repeats what fails because the store does not answer, for `seconds`."""

    def __init__(self, uri: str, seconds: float) -> None:
        self.uri, self.seconds = uri, seconds

    def __call__(self, what: str, call: Callable[[], T]) -> T:
        """`call()`, which must be the same when it is repeated. what: its purpose, such as "read refs/x". Raises
        StoreUnavailableError where the patience has ended, and at once whatever does not get better by waiting.
        """
        started = time.monotonic()
        for attempt, pause in enumerate(_pauses(), 1):
            try:
                return call()
            except OSError as error:
                if not is_transient(error):
                    raise
                waited, reason = time.monotonic() - started, " ".join(str(error).split()).removesuffix(".")
            if waited >= self.seconds:
                times = "1 attempt" if attempt == 1 else f"{attempt} attempts"
                raise StoreUnavailableError(
                    f"The store {self.uri} does not answer: {times} in {waited:.0f} s to {what} failed, the last one with "
                    f"{reason!r}. Run the same command again when the store answers; what it holds is not computed again."
                )
            if attempt == 1:
                _LOG.warning("The store %s does not answer (%s): trying again for %g s.", self.uri, reason, self.seconds)
            time.sleep(min(pause, self.seconds - waited))
        raise AssertionError("there is always another pause")


def open_s3(uri: str) -> tuple[fs.S3FileSystem, str, Patience]:
    """The file system of an s3:// address, the path in it, and how patient its reader is. Requests end after 5 s without a
    connection and 10 s without a byte. Raises ValueError for an invalid patience, and what pyarrow raises for other options.
    """
    parts = urlsplit(uri)
    given = _option(parts.query)
    patience = Patience(uri, READERS_SECONDS if given is None else _seconds(given))
    others = "&".join(option for option in parts.query.split("&") if not option.startswith("patience="))
    plain = urlunsplit(parts._replace(query=others))
    found, path = patience("open it", lambda: fs.FileSystem.from_uri(plain))
    # `from_uri` takes no time limits: the same file system, with these
    options: dict[str, Any] = found.__reduce__()[1][0]
    bounded = fs.S3FileSystem(
        **options
        | {
            "connect_timeout": CONNECT_SECONDS,
            "request_timeout": SILENT_SECONDS,
            "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=2),
            "allow_delayed_open": True,  # small files in one request: complete or not there, and no unfinished upload stays
        }
    )
    return bounded, path, patience


def is_transient(error: OSError) -> bool:
    """Whether the store may answer later."""
    return isinstance(error, ConnectionError | TimeoutError) or _TRANSIENT.search(str(error)) is not None


def _pauses() -> Iterator[float]:
    """0.5 s, 1 s, 2 s, up to 15 s, each shortened by up to a half, so that many workers do not come back at the same moment."""
    for doubled in itertools.count():
        yield min(_LONGEST_PAUSE, 0.5 * 2 ** min(doubled, 10)) * random.uniform(0.5, 1)


def _option(query: str) -> str | None:
    return next((option.partition("=")[2] for option in query.split("&") if option.startswith("patience=")), None)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", text):
        raise ValueError(f"patience={text} is not a number of seconds")
    return float(text)
