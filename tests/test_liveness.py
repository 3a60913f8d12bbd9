"""When a replica counts as wedged: pure functions of times, and a clock that is set by hand."""

from contextlib import suppress

import pytest

from gearnn_ray.service.liveness import PassClock, allowed_seconds


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_pass_may_take_a_multiple_of_what_its_pixels_took_and_never_less_than_a_floor() -> None:
    assert allowed_seconds(1000, None) == 120
    assert allowed_seconds(1000, 1e-6) == 20
    assert allowed_seconds(8_000_000, 2.5e-6) == pytest.approx(400)  # twenty times the 20 seconds of such a frame
    assert allowed_seconds(2_000_000, 2.5e-6) == pytest.approx(100)


def test_a_replica_is_wedged_only_while_a_pass_is_late() -> None:
    now = Clock()
    clock = PassClock(now)
    assert clock.problem() is None
    with clock.timed(1_000_000):
        now.seconds += 119
        assert clock.problem() is None
    with clock.timed(1_000_000):  # one took 119 seconds
        now.seconds += 20 * 119
        assert clock.problem() is None
        now.seconds += 1
        assert "has worked on one pass for 2381 seconds, at most 2380 are expected" in str(clock.problem())
    assert clock.problem() is None


def test_a_pass_that_fails_ends_and_teaches_nothing() -> None:
    now = Clock()
    clock = PassClock(now)
    with suppress(ValueError), clock.timed(1000):
        now.seconds += 0.001
        raise ValueError("out of memory")
    assert clock.problem() is None
    with clock.timed(1000):
        now.seconds += 100
        assert clock.problem() is None  # still the time of a first pass


def test_old_passes_no_longer_count() -> None:
    now = Clock()
    clock = PassClock(now)
    for seconds in (100.0, *[0.1] * 32):
        with clock.timed(1000):
            now.seconds += seconds
    with clock.timed(1000):
        now.seconds += 21
        assert clock.problem() is not None
