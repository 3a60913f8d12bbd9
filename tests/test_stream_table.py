"""What is remembered of streams: bounded, and a stream in use is not forgotten for an invented one."""

import pytest

from gearnn_ray.serving.stream_table import StreamTable, TooManyStreamsError


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> StreamTable[list[str]]:
    return StreamTable(most=3, idle_seconds=60, now=clock)


def keep(table: StreamTable[list[str]], *keys: str) -> None:
    for key in keys:
        table.state(key, list).append(key)


def test_a_state_is_made_once_and_kept(table: StreamTable[list[str]]) -> None:
    keep(table, "a", "b", "a")
    assert table.state("a", list) == ["a", "a"]


def test_a_full_table_refuses_new_streams_while_all_are_in_use(table: StreamTable[list[str]], clock: Clock) -> None:
    keep(table, "a", "b", "c")
    clock.seconds = 59
    with pytest.raises(TooManyStreamsError, match="3 streams, all of them in use"):
        keep(table, "d")
    keep(table, "a", "b", "c")
    assert [len(table.state(key, list)) for key in "abc"] == [2, 2, 2]


def test_of_the_idle_streams_the_one_used_least_recently_is_forgotten(table: StreamTable[list[str]], clock: Clock) -> None:
    keep(table, "a", "b", "c")
    clock.seconds = 30
    keep(table, "a")
    clock.seconds = 61
    keep(table, "d", "e")  # for b and c
    with pytest.raises(TooManyStreamsError):
        keep(table, "f")
    assert len(table.state("a", list)) == 2
