"""What is remembered of streams, by their keys: bounded, and invented names do not have a stream forgotten that is in use."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from gearnn_ray.core.errors import UserError

__all__ = ["StreamTable", "TooManyStreamsError"]

_MOST = 4096
_IDLE_SECONDS = 60.0  # without a frame, after which a stream may be forgotten for another one
StateT = TypeVar("StateT")


class TooManyStreamsError(UserError):
    """A new stream while all that are remembered are in use. 429."""

    status = 429


class StreamTable(Generic[StateT]):
    """The states of streams. Not safe for several threads at once."""

    def __init__(self, most: int = _MOST, idle_seconds: float = _IDLE_SECONDS, now: Callable[[], float] = time.monotonic) -> None:
        """most: streams that are remembered. idle_seconds: after which one of them may be forgotten. now: a clock, in seconds."""
        self._most, self._idle, self._now = most, idle_seconds, now
        self._states: OrderedDict[str, tuple[float, StateT]] = OrderedDict()  # with the time of the last use, the oldest first

    def state(self, key: str, new: Callable[[], StateT]) -> StateT:
        """The state of a stream, made by `new` for one that is not remembered. A full table forgets the stream that was used
        least recently. Raises TooManyStreamsError if even that one is in use.
        """
        now = self._now()
        if key in self._states:
            _, state = self._states.pop(key)
        else:
            if len(self._states) >= self._most:
                used, _ = next(iter(self._states.values()))
                if now - used < self._idle:
                    raise TooManyStreamsError(
                        f"the service follows {self._most:,} streams, all of them in use: try again when one has been idle for "
                        f"{self._idle:g} seconds, or use the name of a stream that is followed"
                    )
                self._states.popitem(last=False)
            state = new()
        self._states[key] = now, state
        return state
