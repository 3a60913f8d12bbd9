"""`service.batching`: passes over what waits, formed when the network is free."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from gearnn_ray.service.batching import Batcher, Group


class Network:
    """Records its passes, and runs each one when it is let through."""

    def __init__(self) -> None:
        self.passes: list[list[str]] = []
        self.began, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def run(self, items: Sequence[str]) -> list[str | Exception]:
        self.passes.append(list(items))
        self.began.set()
        assert self.gate.wait(10)
        if "broken pass" in items:
            raise RuntimeError("the pass failed")
        return [ValueError(item) if item == "bad" else item.upper() for item in items]


def group(item: str) -> Group:
    return Group(item[0], 3)


def with_batcher(body: Callable[[Network, "Batcher[str, str]"], Awaitable[None]], wait_seconds: float = 0.0) -> None:
    async def main() -> None:
        network = Network()
        await asyncio.wait_for(body(network, Batcher(network.run, group, wait_seconds)), 10)

    asyncio.run(main())


async def busy(network: Network, batcher: "Batcher[str, str]") -> "asyncio.Task[str]":
    """Keep the network busy with one item until its gate opens."""
    network.gate.clear()
    first = asyncio.create_task(batcher.submit("first"))
    await asyncio.to_thread(network.began.wait, 10)
    return first


def test_what_waits_for_a_busy_network_shares_the_next_pass() -> None:
    async def body(network: Network, batcher: "Batcher[str, str]") -> None:
        first = await busy(network, batcher)
        waiting = [asyncio.create_task(batcher.submit(item)) for item in ("a1", "b1", "a2", "a3", "a4", "b2")]
        await asyncio.sleep(0)
        network.gate.set()
        assert await asyncio.gather(first, *waiting) == ["FIRST", "A1", "B1", "A2", "A3", "A4", "B2"]
        assert network.passes == [["first"], ["a1", "a2", "a3"], ["b1", "b2"], ["a4"]], "groups by the age of their oldest item"

    with_batcher(body)


def test_an_idle_network_waits_for_others_but_not_when_the_pass_is_full() -> None:
    async def body(network: Network, batcher: "Batcher[str, str]") -> None:
        items = [asyncio.create_task(batcher.submit(f"a{number}")) for number in range(3)]
        await asyncio.gather(*items)  # long before the minute has passed
        assert network.passes == [["a0", "a1", "a2"]]

    with_batcher(body, wait_seconds=60)


def test_a_single_item_goes_after_the_wait() -> None:
    async def body(network: Network, batcher: "Batcher[str, str]") -> None:
        assert await batcher.submit("a") == "A"
        assert network.passes == [["a"]]

    with_batcher(body, wait_seconds=0.01)


def test_an_error_is_that_of_its_item_or_of_its_pass() -> None:
    async def body(network: Network, batcher: "Batcher[str, str]") -> None:
        first = await busy(network, batcher)
        items = [asyncio.create_task(batcher.submit(item)) for item in ("bad", "broken pass", "a")]
        await asyncio.sleep(0)
        network.gate.set()
        results = await asyncio.gather(first, *items, return_exceptions=True)
        assert [type(result) for result in results] == [str, RuntimeError, RuntimeError, str], "the passes are [bad, broken], [a]"
        with pytest.raises(ValueError, match="bad"):
            await batcher.submit("bad")
        assert await batcher.submit("good") == "GOOD", "the thread goes on"

    with_batcher(body)


def test_who_does_not_wait_any_more_takes_no_place_in_a_pass() -> None:
    async def body(network: Network, batcher: "Batcher[str, str]") -> None:
        first = await busy(network, batcher)
        gone, stays = (asyncio.create_task(batcher.submit(item)) for item in ("a-gone", "a-stays"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        network.gate.set()
        assert await asyncio.gather(first, stays) == ["FIRST", "A-STAYS"]
        assert network.passes == [["first"], ["a-stays"]]

    with_batcher(body)


def test_a_result_that_nobody_waits_for_is_dropped() -> None:
    async def body(network: Network, batcher: "Batcher[str, str]") -> None:
        first = await busy(network, batcher)
        first.cancel()
        await asyncio.sleep(0)
        network.gate.set()
        assert await batcher.submit("next") == "NEXT"

    with_batcher(body)


def test_other_work_runs_on_the_same_thread_between_passes() -> None:
    async def body(network: Network, batcher: "Batcher[str, str]") -> None:
        first = await busy(network, batcher)
        name = asyncio.create_task(batcher.call(lambda: threading.current_thread().name))
        later = asyncio.create_task(batcher.submit("a"))
        await asyncio.sleep(0)
        network.gate.set()
        assert await asyncio.gather(first, name, later) == ["FIRST", "network", "A"]
        with pytest.raises(KeyError):
            await batcher.call(lambda: {}["nothing"])

    with_batcher(body)
