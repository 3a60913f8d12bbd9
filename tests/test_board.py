"""The way of events from workers to the driver."""

import logging
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError

from gearnn_ray.core.events import Event
from gearnn_ray.ray_jobs.board import EventRelay, Report, _Notices


class _Board:
    """A board whose answers arrive as `ray.get` is told here; like the real one it gives each event once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self.fails: list[Exception] = []
        self.take = self
        monkeypatch.setattr(ray, "get", self._get)

    def remote(self) -> list[Report]:
        events, self.events = self.events, []
        return [Report("a level #1", event) for event in events]

    def _get(self, taken: list[Report], timeout: float) -> list[Report]:
        if self.fails:
            raise self.fails.pop()
        return taken


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> _Board:
    return _Board(monkeypatch)


def relay_of(board: Any) -> tuple[EventRelay, list[Event]]:
    seen: list[Event] = []
    relay = EventRelay(seen.append)
    vars(relay)["board"] = board
    return relay, seen


def test_what_a_slow_board_gave_arrives_later(board: _Board) -> None:
    relay, seen = relay_of(board)
    first, second = Event("started", "full", "jpeg-10"), Event("started", "full", "jpeg-80")
    board.events, board.fails = [first], [GetTimeoutError()]
    relay.flush()
    assert seen == []
    board.events.append(second)
    relay.flush()
    relay.flush()
    assert seen == [first, second]


def test_a_board_that_died_is_passed_over(board: _Board) -> None:
    relay, seen = relay_of(board)
    board.fails = [ActorDiedError()]
    relay.flush()
    board.events = [Event("started", "full", "jpeg-10")]
    relay.flush()
    assert len(seen) == 1


def test_what_a_worker_warns_of_is_a_notice_and_what_others_log_is_not() -> None:
    seen: list[Event] = []
    with _Notices(seen.append):
        logging.getLogger("gearnn_ray.data.cache").warning("the cached images in %s are made again", "/cache/1")
        logging.getLogger("gearnn_ray.data.cache").info("read")
        logging.getLogger("PIL").warning("odd")
    logging.getLogger("gearnn_ray.data.cache").warning("afterwards")
    assert [(event.kind, event.note) for event in seen] == [("notice", "the cached images in /cache/1 are made again")]
