"""Passes of a network over items that wait for it, each pass formed in the moment when the network is free.

    submit ─► waiting items ─► a thread takes the oldest one, and with it all that may share its pass ─► results

A batch that is closed by an event loop leaves the network idle until the loop has delivered the results before it; under load
that was a third of the time. Here the thread of the network takes its next items itself. Knows nothing about networks, HTTP or
Ray.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Batcher", "Group"]

T = TypeVar("T")
R = TypeVar("R")
C = TypeVar("C")


@dataclass(frozen=True)
class Group:
    """The pass that an item may be part of: that of all items with an equal key, at most `most` of them."""

    key: Hashable
    most: int


@dataclass(eq=False)
class _Waiting:
    """An item. work: what is called instead of a pass over it."""

    item: Any
    group: Group
    since: float
    result: asyncio.Future[Any]
    work: Callable[[], Any] | None = None


class Batcher(Generic[T, R]):
    """One thread that runs passes. Its methods are called on one event loop, that of the constructor."""

    def __init__(
        self,
        run: Callable[[Sequence[T]], Sequence[R | Exception]],
        group: Callable[[T], Group],
        wait_seconds: float,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        """run: a pass; gives a result or an error for each item, and an error that it raises counts for all of them.
        wait_seconds: for which an idle network waits for more items. prepare: what the thread does first.
        """
        self._run, self._group, self._wait, self._prepare = run, group, wait_seconds, prepare
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="network", daemon=True)
        self._thread.start()

    async def submit(self, item: T) -> R:
        """The item's result, or its error raised. Items are taken in the order in which they came."""
        result: R = await self._queued(item, self._group(item))
        return result

    async def call(self, work: Callable[[], C]) -> C:
        """The result of `work`, which the thread calls between passes."""
        result: C = await self._queued(None, Group(object(), 1), work)
        return result

    def _queued(self, item: Any, group: Group, work: Callable[[], Any] | None = None) -> asyncio.Future[Any]:
        waiting = _Waiting(item, group, time.monotonic(), self._loop.create_future(), work)
        with self._changed:
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.result

    def _work(self) -> None:
        self._prepare()
        while True:
            taken = self._taken()
            results = self._results(taken)
            try:
                self._loop.call_soon_threadsafe(_deliver, taken, results)
            except RuntimeError:  # the loop is closed: nobody waits for results any more
                return

    def _taken(self) -> list[_Waiting]:
        """The oldest item, and others of its group. Waits for one, and a little for others."""
        with self._changed:
            while True:
                self._waiting = [each for each in self._waiting if not each.result.cancelled()]
                if not self._waiting:
                    self._changed.wait()
                    continue
                oldest = self._waiting[0]
                together = [each for each in self._waiting if each.group.key == oldest.group.key][: oldest.group.most]
                left = oldest.since + self._wait - time.monotonic()
                if len(together) == oldest.group.most or left <= 0:
                    taken = {id(each) for each in together}
                    self._waiting = [each for each in self._waiting if id(each) not in taken]
                    return together
                self._changed.wait(left)

    def _results(self, taken: list[_Waiting]) -> Sequence[Any]:
        work = taken[0].work
        try:
            return [work()] if work is not None else self._run([each.item for each in taken])
        except Exception as error:
            return [error] * len(taken)


def _deliver(taken: Sequence[_Waiting], results: Sequence[Any]) -> None:
    for waiting, result in zip(taken, results, strict=True):
        if waiting.result.cancelled():
            continue
        if isinstance(result, Exception):
            waiting.result.set_exception(result)
        else:
            waiting.result.set_result(result)
