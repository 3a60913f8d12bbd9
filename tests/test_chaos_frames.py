"""A sample of the campaign's damaged frames and segments, and that a batch sees what it looks for."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import frames
from gearnn_ray.core.errors import UserError
from gearnn_ray.serving.frames import Frame, Limits, read_frame


def test_a_thousand_damaged_files_are_answered_or_refused_in_a_sentence(tmp_path: Path) -> None:
    outcome = frames.bad_frames(random.Random(0), tmp_path)
    assert outcome.figures["mutations"] == 1000
    assert 300 < outcome.figures["refused"] < 1000


def raises(error: Exception) -> Callable[..., Any]:
    def read(*_: object) -> Any:
        raise error

    return read


def slow(data: bytes, kind: str | None, limits: Limits) -> Frame:
    until = time.process_time() + 1.1
    while time.process_time() < until:
        pass
    return read_frame(data, kind, limits)


def large(data: bytes, kind: str | None, limits: Limits) -> Frame:
    assert bytearray(b"x" * 80 * 2**20)
    return read_frame(data, kind, limits)


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (raises(ValueError("broken")), "ValueError: broken"),
        (raises(UserError("two\nlines")), "no sentence"),
        (slow, "s of CPU"),
        (large, "MiB"),
    ],
)
def test_a_batch_names_the_mutation_that_was_answered_wrongly(
    read: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames.kinds()
    calls: list[int] = []

    def whole_ones_first(*arguments: Any) -> Any:
        calls.append(1)
        return (read if len(calls) > 5 else read_frame)(*arguments)  # five kinds are read by `read_frame`

    monkeypatch.setattr(frames, "read_frame", whole_ones_first)
    with pytest.raises(AssertionError, match=rf"mutation \d+ \(of .*{said}"):
        frames.batch(random.Random(0).getstate(), 40)
