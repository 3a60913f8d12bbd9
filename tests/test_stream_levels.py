"""The level of a stream: at once where the stream changes, and calm everywhere else."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from gearnn_ray.serving.frames import Evidence
from gearnn_ray.serving.level_estimation import LevelEstimator, Reference
from gearnn_ray.video.stream_levels import StreamLevels

LEVELS = ("h264-crf24", "h264-crf36", "h264-64x48", "brightness-0.5", "brightness-0.2")
REFERENCE = Reference(height=96, width=128, luma=100.0, luma_spread=0.2)


def stream(levels: tuple[str, ...] = LEVELS) -> StreamLevels:
    return StreamLevels(LevelEstimator(levels, REFERENCE), "camera")


def evidence(height: int = 96, width: int = 128, luma: float = 100.0, **known: Any) -> Evidence:
    return Evidence(height, width, luma, **known)


def test_size_and_rate_factor_take_effect_on_the_frame_where_they_change() -> None:
    rng = np.random.default_rng(0)
    codings = [evidence(crf=24.0), evidence(crf=36.0), evidence(48, 64, crf=18.0), evidence(crf=15.0)]
    expected = ["h264-crf24", "h264-crf36", "h264-64x48", "clean"]
    levels, wrong, changes = stream(), 0, 0
    before = -1
    while changes < 10_000:
        now = int(rng.integers(4))
        changes += now != before
        before = now
        wrong += levels.estimate(codings[now]).level != expected[now]
    assert wrong == 0


def test_brightness_between_two_levels_does_not_flap() -> None:
    rng = np.random.default_rng(0)
    between = 100 * np.exp((np.log(0.5) + np.log(0.2)) / 2)
    levels = stream()
    used = [levels.estimate(evidence(luma=between * float(np.exp(rng.normal(0, 0.05))))).level for _ in range(500)]
    assert sum(a != b for a, b in pairwise(used)) <= 1


def test_light_that_fails_is_followed_within_a_few_frames() -> None:
    levels = stream()
    for _ in range(50):
        assert levels.estimate(evidence()).level == "clean"
    used = [levels.estimate(evidence(luma=20.0)).level for _ in range(10)]
    assert used[3:] == ["brightness-0.2"] * 7


def test_a_single_black_frame_changes_nothing() -> None:
    levels = stream()
    used = [levels.estimate(evidence(luma=100.0 if number != 30 else 1.0)).level for number in range(60)]
    assert set(used) == {"clean"}


def test_changes_are_counted() -> None:
    levels = stream()
    for crf in (15.0, 36.0, 36.0, 24.0):
        levels.estimate(evidence(crf=crf))
    assert levels.changes == 2


@pytest.mark.parametrize("start", [20.0, 28.0])
def test_a_qp_that_drifts_changes_the_level_once(start: float) -> None:
    rng = np.random.default_rng(1)
    levels = stream(("h264-crf24", "h264-crf36"))
    ramp = np.linspace(start, 44, 600)
    used = [levels.estimate(evidence(qp=float(qp + rng.normal(0, 0.2)))).level for qp in ramp]
    assert used[-1] == "h264-crf36"
    assert sum(a != b for a, b in pairwise(used)) <= 2
