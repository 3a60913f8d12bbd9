"""When a replica is alive but wedged: its network thread works on one pass for many times as long as passes of that size take.

Serve asks `Service.check_health`, and replaces a replica that fails three times in a row. A release that cannot be loaded is no
reason: it would not load in the next replica either. Whether a replica can answer is for /health to say.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["PassClock", "allowed_seconds"]

_TIMES = 20  # as long as the slowest recent pass of the same size: other programs, colder caches, more levels in a batch
_LEAST_SECONDS = 20.0  # a process that waits for its CPU or its disk may take this long for anything
_FIRST_SECONDS = 120.0  # before any pass was timed; the first one also chooses kernels
_RECENT = 32  # passes whose times count


def allowed_seconds(pixels: int, slowest: float | None) -> float:
    """The time after which a pass over so many pixels counts as wedged.

    slowest: seconds per pixel of the slowest recent pass, of any size; None if there was none. Small passes take longer per
    pixel, so that a mixture of sizes makes the bound larger, never smaller.
    """
    return _FIRST_SECONDS if slowest is None else max(_LEAST_SECONDS, _TIMES * slowest * pixels)


class PassClock:
    """Times the passes of one thread. Another thread may ask how the present one is doing."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """now: a clock, in seconds, that does not count while the machine sleeps."""
        self._now = now
        self._recent: deque[float] = deque(maxlen=_RECENT)  # seconds per pixel
        self._running: tuple[float, float] | None = None  # when the present pass began, and its allowed seconds

    @contextmanager
    def timed(self, pixels: int) -> Iterator[None]:
        """A pass over so many pixels."""
        began = self._now()
        self._running = began, allowed_seconds(pixels, max(self._recent, default=None))
        try:
            yield
        finally:
            self._running = None
        self._recent.append((self._now() - began) / pixels)  # not of a pass that failed early

    def problem(self) -> str | None:
        """Why the replica counts as wedged, in one sentence; None while it does not."""
        if (running := self._running) is None:
            return None
        began, allowed = running
        if (age := self._now() - began) <= allowed:
            return None
        return f"the network has worked on one pass for {age:.0f} seconds, at most {allowed:.0f} are expected"
