"""Level estimation: exact for frames of a level, the nearest level or a mixture between levels, steady over a stream."""

import io
import itertools
import math
import threading
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.scenes import open_scenes
from gearnn_ray.levels.h264_codec import encode
from gearnn_ray.levels.level import parse_level
from gearnn_ray.serving.frames import Evidence, evidence_of, read_frame
from gearnn_ray.serving.h264 import read_h264
from gearnn_ray.serving.jpeg import JpegQuality
from gearnn_ray.serving.level_estimation import LevelEstimate, LevelEstimator, Reference
from gearnn_ray.serving.stream_table import TooManyStreamsError
from gearnn_ray.store.blobs import Blob
from gearnn_ray.store.manifest import DataEntry
from tests.manifests import CLEAN, level_entry, manifest_of

H, W, LUMA, SPREAD = 720, 1280, 100.0, 0.25
REFERENCE = Reference(H, W, LUMA, SPREAD)
JPEGS = [f"jpeg-{quality}" for quality in range(10, 101, 10)]


def frame(
    jpeg: int | None = None, luma: float = LUMA, size: tuple[int, int] = (H, W), tables: float = 0.0, **h264: float
) -> Evidence:
    """An undistorted frame of the reference, but for this."""
    return Evidence(*size, luma, JpegQuality(jpeg, tables) if jpeg else None, **h264)


def found(levels: Sequence[str], evidence: Evidence, reference: Reference | None = REFERENCE, **kind: Any) -> LevelEstimate:
    return LevelEstimator(levels, reference, **kind).estimate(evidence)


@pytest.mark.parametrize(
    ("evidence", "level", "read"),
    [
        (frame(), "clean", "clean"),
        (frame(jpeg=30), "jpeg-30", "jpeg-30"),
        (frame(jpeg=34), "jpeg-30", "jpeg-34"),
        (frame(jpeg=36), "jpeg-40", "jpeg-36"),
        (frame(jpeg=35), "jpeg-30", "jpeg-35"),  # as near to 40: the more distorted one
        (frame(jpeg=1), "jpeg-10", "jpeg-1"),
        (frame(jpeg=100), "jpeg-100", "jpeg-100"),  # not clean, which stands one further
        (frame(jpeg=10, luma=20), "jpeg-10", "jpeg-10"),  # no level here is dark
        (frame(jpeg=90, size=(90, 160)), "jpeg-90", "jpeg-90"),
        (frame(jpeg=90, crf=40), "jpeg-90", "jpeg-90"),
    ],
)
def test_jpeg(evidence: Evidence, level: str, read: str) -> None:
    estimate = found(JPEGS, evidence)
    assert (estimate.level, estimate.found) == (level, read)
    assert (estimate.neighbour, estimate.weight) == (None, 0.0)
    assert (estimate.distance == 0) == (level == read)


def test_clean_stands_one_step_above_the_best_jpeg() -> None:
    assert found(["jpeg-90"], frame(jpeg=95)).level == "jpeg-90"
    assert found(["jpeg-90"], frame(jpeg=96)).level == "clean"
    assert found(["jpeg-90"], frame(jpeg=96)).found == "jpeg-96"
    assert found(["jpeg-90"], frame()).distance == 0


@given(st.sets(st.integers(1, 100), min_size=1), st.integers(1, 100) | st.none())
def test_the_nearest_quality_wins(qualities: set[int], quality: int | None) -> None:
    estimate = found([f"jpeg-{q}" for q in qualities], frame(jpeg=quality))
    stands = 101 if quality is None else quality
    best = min(qualities | {101}, key=lambda q: (abs(q - stands), q))
    assert estimate.level == ("clean" if best == 101 else f"jpeg-{best}")
    assert estimate.distance == pytest.approx(abs(best - stands) / 5)


@pytest.mark.parametrize(
    ("evidence", "level", "read"),
    [
        (frame(), "clean", "clean"),
        (frame(luma=97), "clean", "clean"),  # scenes differ by as much
        (frame(luma=40), "brightness-0.4", "brightness-0.4"),
        (frame(luma=55), "brightness-0.4", "brightness-0.55"),
        (frame(luma=70), "clean", "brightness-0.7"),
        (frame(luma=200), "brightness-2.0", "brightness-2.0"),
        (frame(luma=0), "brightness-0.2", "brightness-0.01"),
        (frame(jpeg=80, luma=20.0), "brightness-0.2", "brightness-0.2"),
    ],
)
def test_brightness(evidence: Evidence, level: str, read: str) -> None:
    estimate = found(["brightness-0.2", "brightness-0.4", "brightness-2.0"], evidence)
    assert (estimate.level, estimate.found) == (level, read)


def test_measured_brightness_of_a_level_counts_more_than_its_factor() -> None:
    """Bright pixels saturate: twice as bright is not twice the luma."""
    levels, reference = ["brightness-2.0", "brightness-4.0"], Reference(H, W, LUMA, SPREAD, {"brightness-2.0": 165.0})
    estimate = found(levels, frame(luma=165), reference)
    assert (estimate.level, estimate.distance, estimate.found) == ("brightness-2.0", 0, "brightness-2.0")
    assert found(levels, frame(luma=220), reference).level == "brightness-2.0"  # nearer to 165 than to 400
    assert found(levels, frame(luma=220), REFERENCE).level == "brightness-2.0"
    assert found(levels, frame(luma=290), REFERENCE).level == "brightness-4.0"


def test_a_wider_spread_makes_brightness_say_less() -> None:
    levels = ["brightness-0.4+jpeg-30", "jpeg-50"]
    evidence = frame(jpeg=46, luma=45)
    assert found(levels, evidence, Reference(H, W, LUMA, 0.1)).level == "brightness-0.4+jpeg-30"
    assert found(levels, evidence, Reference(H, W, LUMA, 2.0)).level == "jpeg-50"
    unknown, usual = (found(levels, evidence, Reference(H, W, LUMA, spread)) for spread in (0.0, 0.25))
    assert unknown == usual
    assert found(levels, evidence, Reference(H, W, LUMA, 1e-9)).distance < 20  # one scene again and again


def test_a_camera_has_its_own_brightness() -> None:
    level_estimator = LevelEstimator(["brightness-0.4"], REFERENCE, cameras={"tunnel": 40.0})
    assert level_estimator.estimate(frame(luma=40), "street").level == "brightness-0.4"
    assert level_estimator.estimate(frame(luma=40), "tunnel").level == "clean"
    assert level_estimator.estimate(frame(luma=16), "tunnel").level == "clean"  # one frame is a flash
    assert [level_estimator.estimate(frame(luma=16), "tunnel").level for _ in range(2)] == ["clean", "brightness-0.4"]
    # and needs no reference
    assert LevelEstimator(["brightness-0.4"], None, cameras={"a": 40.0}).estimate(frame(luma=16), "a").level == "brightness-0.4"
    with pytest.raises(UserError, match="camera 'a' has a mean luma of 0"):
        LevelEstimator(["brightness-0.4"], REFERENCE, cameras={"a": 0.0})


SIZES = ["h264-640x360", "h264-320x180"]


@pytest.mark.parametrize(
    ("evidence", "level", "read"),
    [
        (frame(), "clean", "clean"),
        (frame(size=(360, 640)), "h264-640x360", "h264-640x360"),
        (frame(size=(361, 639)), "h264-640x360", "h264-639x361"),
        (frame(size=(180, 320), crf=30), "h264-320x180", "h264-320x180"),
        (frame(size=(100, 100)), "h264-320x180", "h264-100x100"),
        (frame(size=(1080, 1920)), "clean", "h264-1920x1080"),
        (frame(crf=18), "clean", "clean"),
    ],
)
def test_sizes(evidence: Evidence, level: str, read: str) -> None:
    estimate = found(SIZES, evidence)
    assert (estimate.level, estimate.found) == (level, read)
    assert found(["jpeg-50"], evidence).found == "clean"


CRFS = ["h264-crf18", "h264-crf24", "h264-crf30"]
QPS = Reference(H, W, LUMA, SPREAD, level_qp={"h264-crf18": 22.0, "h264-crf24": 28.5})


@pytest.mark.parametrize(
    ("evidence", "reference", "level", "distance", "read"),
    [
        (frame(), REFERENCE, "clean", 0, "clean"),
        (frame(crf=24), REFERENCE, "h264-crf24", 0, "h264-crf24"),
        (frame(crf=23), REFERENCE, "h264-crf24", 1, "h264-crf23"),
        (frame(crf=21.0), REFERENCE, "h264-crf24", 3, "h264-crf21"),
        (frame(crf=5), REFERENCE, "clean", 0, "h264-crf5"),  # better than undistorted images need
        (frame(crf=30, qp=18), REFERENCE, "h264-crf30", 0, "h264-crf30"),  # the rate factor takes precedence
        (frame(qp=35.0), REFERENCE, "h264-crf30", 0, "h264-crf30"),  # libx264's mean QP is its CRF + 5
        (frame(qp=28.0), REFERENCE, "h264-crf24", 1, "h264-crf23"),
        (frame(qp=22), QPS, "h264-crf18", 0, "h264-crf18"),
        (frame(qp=28.5), QPS, "h264-crf24", 0, "h264-crf24"),
        (frame(qp=34.5), QPS, "h264-crf30", 0, "h264-crf30"),  # as far above its CRF as the nearest one with a QP is
        (frame(qp=19), QPS, "clean", 0, "h264-crf15"),
        (frame(qp=26.333333), QPS, "h264-crf24", 2, "h264-crf22"),  # two thirds of the way from 22 to 28.5
        (frame(qp=24), Reference(H, W, LUMA, SPREAD, level_qp={"h264-crf24": 24.0}), "h264-crf24", 0, "h264-crf24"),
        (frame(qp=29), Reference(H, W, LUMA, SPREAD, level_qp={"h264-crf24": 24.0}), "h264-crf30", 1, "h264-crf29"),
        (frame(crf=24), QPS, "h264-crf24", 0, "h264-crf24"),
    ],
)
def test_h264_quality(evidence: Evidence, reference: Reference, level: str, distance: float, read: str) -> None:
    estimate = found(CRFS, evidence, reference)
    assert (estimate.level, estimate.found) == (level, read)
    assert estimate.distance == pytest.approx(distance, abs=1e-5)


tables = st.dictionaries(st.integers(0, 51), st.integers(-24, 102).map(lambda half: half / 2), min_size=1, max_size=6)


@given(tables, st.lists(st.floats(-36, 51), min_size=2))
@settings(deadline=None)
def test_a_higher_qp_is_a_higher_rate_factor(table: dict[int, float], qps: list[float]) -> None:
    """Whatever QPs a manifest says that its levels have."""
    qp_of = {f"h264-crf{crf}": qp for crf, qp in table.items()}
    level_estimator = LevelEstimator(["h264-crf0", *qp_of], Reference(H, W, LUMA, SPREAD, level_qp=qp_of))
    found = [level_estimator.estimate(frame(qp=qp)).found for qp in sorted(qps)]
    crfs = [int(name.removeprefix("h264-crf")) for name in found]
    assert crfs == sorted(crfs)


rising = st.dictionaries(st.integers(1, 51), st.floats(0.5, 5), min_size=2, max_size=6).map(
    lambda steps: dict(zip(sorted(steps), itertools.accumulate(steps.values(), initial=10.0), strict=False))
)


@given(rising, st.integers(1, 51))
@settings(deadline=None)
def test_a_qp_between_two_levels_is_the_rate_factor_between_them(table: dict[int, float], crf: int) -> None:
    names = {f"h264-crf{crf}": qp for crf, qp in table.items()}
    level_estimator = LevelEstimator(list(names), Reference(H, W, LUMA, SPREAD, level_qp=names), "interpolate")
    for name, qp in names.items():
        assert level_estimator.estimate(frame(qp=qp)) == LevelEstimate(name, found=name)
    qp = float(np.interp(crf, list(table), list(table.values())))
    if min(table) <= crf <= max(table):
        by_name, by_qp = level_estimator.match(f"h264-crf{crf}"), level_estimator.estimate(frame(qp=qp))
        assert by_qp.found == f"h264-crf{crf}"
        assert shares(by_qp) == pytest.approx(shares(by_name), abs=1e-6)


def shares(estimate: LevelEstimate) -> dict[str, float]:
    """Of both levels of a mixture, without those of no weight to speak of."""
    share = estimate.weight or 0.0
    both = {estimate.level: 1 - share} | ({estimate.neighbour: share} if estimate.neighbour else {})
    return {level: share for level, share in both.items() if share > 1e-6}


def test_light_and_size_move_the_qp_of_a_level_but_not_of_others() -> None:
    dark, small = "brightness-0.4+h264-crf24", "h264-640x360"
    qps = {"h264-crf18": 22.0, "h264-crf24": 28.0, dark: 25.0, small: 20.0}
    level_estimator = LevelEstimator([*CRFS, dark, small], Reference(H, W, LUMA, SPREAD, level_qp=qps))
    assert level_estimator.estimate(frame(qp=28)).found == "h264-crf24"
    estimate = level_estimator.estimate(frame(qp=25, luma=40))
    assert (estimate.level, estimate.distance) == (dark, 0)
    estimate = level_estimator.estimate(frame(qp=20, size=(360, 640)))
    assert (estimate.level, estimate.distance) == (small, 0)
    # where every level has its own light, their QPs are all there is
    assert found([dark], frame(qp=25, luma=40), Reference(H, W, LUMA, SPREAD, level_qp=qps)).found == dark


def test_sizes_beside_rate_factors() -> None:
    levels = [*CRFS, *SIZES]
    assert found(levels, frame(size=(360, 640), crf=18)) == LevelEstimate("h264-640x360", found="h264-640x360+h264-crf18")
    assert found(levels, frame(size=(360, 640))).level == "h264-640x360"  # of a still image
    assert found(levels, frame(crf=18)).level == "h264-crf18"
    assert found(levels, frame(crf=18), None).level == "h264-crf18"


def test_an_axis_that_was_not_read_claims_no_distortion() -> None:
    both = ["brightness-0.4", "brightness-0.4+h264-crf24"]
    slightly = Reference(H, W, LUMA, SPREAD, {"brightness-0.4": 40.2, "brightness-0.4+h264-crf24": 40.0})
    assert found(both, frame(luma=40), slightly).level == "brightness-0.4"
    assert found(both, frame(luma=40, crf=24), slightly).level == "brightness-0.4+h264-crf24"
    assert found(both[1:], frame(luma=40)).level == "brightness-0.4+h264-crf24"
    assert found(both[1:], frame()).level == "clean"
    assert found(["brightness-0.4", "h264-640x360"], frame(luma=40, size=(360, 640)), None) == LevelEstimate("clean")


def test_combinations() -> None:
    levels = [*JPEGS, "brightness-0.4", "brightness-0.4+jpeg-30"]
    assert found(levels, frame(jpeg=30, luma=40)) == LevelEstimate("brightness-0.4+jpeg-30", found="brightness-0.4+jpeg-30")
    assert found(levels, frame(luma=40)).level == "brightness-0.4"
    assert found(levels, frame(jpeg=30)).level == "jpeg-30"
    assert found(levels, frame(jpeg=80, luma=90)).level == "jpeg-80"
    everything = found([*levels, *CRFS, *SIZES], frame(jpeg=34, luma=40, size=(360, 640), crf=23))
    assert everything.found == "brightness-0.4+h264-640x360+h264-crf23+jpeg-34"
    # of two that differ in order alone, either
    assert found(["jpeg-30+brightness-0.4", "brightness-0.4+jpeg-30"], frame(jpeg=30, luma=40)).distance == 0
    assert found(["brightness-0.5+brightness-0.8"], frame(luma=40)).distance == 0


def test_other_tables_than_libjpegs_show_in_the_distance_alone() -> None:
    exact, other = (found(JPEGS, frame(jpeg=30, tables=tables)) for tables in (0.0, 0.1))
    assert (exact.level, other.level) == ("jpeg-30", "jpeg-30")
    assert (exact.distance, other.distance) == (0, 0.5)


levels_of_a_release = st.lists(
    st.sampled_from(
        [
            *(JPEGS + SIZES + CRFS),
            *("brightness-0.2", "brightness-0.4", "brightness-2.0"),
            *("brightness-0.4+jpeg-30", "brightness-0.2+h264-crf30", "h264-320x180+jpeg-50"),
        ]
    ),
    unique=True,
)


def made_of(level: str) -> Evidence:
    """What can be read off a frame of this level."""
    known: dict[str, Any] = {}
    for part in level.split("+"):
        kind, _, value = part.partition("-")
        if kind == "jpeg":
            known["jpeg"] = int(value)
        elif kind == "brightness":
            known["luma"] = LUMA * float(value)
        elif value.startswith("crf"):
            known["crf"] = float(value[3:])
        elif kind == "h264":
            width, height = map(int, value.split("x"))
            known |= {"size": (height, width), "crf": 18.0}
    return frame(**known)


@given(levels_of_a_release, st.sampled_from(["nearest", "interpolate"]))
@settings(deadline=None)
def test_a_frame_of_a_level_is_found_to_be_of_that_level(levels: list[str], untrained: str) -> None:
    level_estimator = LevelEstimator(levels, REFERENCE, untrained)  # type: ignore[arg-type]
    for level in ["clean", *levels]:
        estimate = level_estimator.estimate(made_of(level))
        assert (estimate.level, estimate.distance, estimate.neighbour) == (level, 0, None)


evidences = st.builds(
    frame,
    jpeg=st.none() | st.integers(1, 100),
    luma=st.floats(0, 255),
    size=st.tuples(st.integers(16, 4000), st.integers(16, 4000)),
    qp=st.none() | st.floats(-36, 51),
    crf=st.none() | st.floats(-12, 60),
)


@given(levels_of_a_release, evidences, st.booleans(), st.booleans())
@example(["jpeg-10", "h264-crf18"], frame(crf=5e-324), True, False)
@settings(deadline=None)
def test_whatever_is_read_gives_levels_of_the_release(
    levels: list[str], evidence: Evidence, interpolate: bool, known: bool
) -> None:
    level_estimator = LevelEstimator(levels, REFERENCE if known else None, "interpolate" if interpolate else "nearest")
    estimate = level_estimator.estimate(evidence, "stream")
    assert estimate.level in ["clean", *levels]
    assert estimate.neighbour in [None, "clean", *levels]
    assert estimate.neighbour != estimate.level
    assert (0 < estimate.weight < 1) if estimate.neighbour else estimate.weight == 0
    assert interpolate or estimate.neighbour is None
    assert 0 <= estimate.distance < math.inf
    even = evidence.height % 2 == evidence.width % 2 == 0
    assert not even or parse_level(estimate.found).name == estimate.found


@pytest.mark.parametrize(
    ("evidence", "level", "neighbour", "weight"),
    [
        (frame(jpeg=34), "jpeg-30", "jpeg-40", 0.4),
        (frame(jpeg=38), "jpeg-40", "jpeg-30", 0.2),
        (frame(jpeg=35), "jpeg-30", "jpeg-40", 0.5),
        (frame(jpeg=40), "jpeg-40", None, 0),
        (frame(jpeg=3), "jpeg-10", None, 0),  # nothing beyond
        (frame(jpeg=60), "jpeg-40", "clean", 20 / 61),
        (frame(luma=60), "brightness-0.5", "clean", math.log(1.2) / math.log(2)),
        (frame(luma=30), "brightness-0.5", None, 0),
        (frame(jpeg=40, luma=60), "jpeg-40", None, 0),  # no level is dark and of quality 40...
        (frame(jpeg=36, luma=95), "jpeg-40", "jpeg-30", 0.4),  # ... but quality 30 is there
        (frame(jpeg=19, luma=52), "brightness-0.5+jpeg-20", "brightness-0.5+jpeg-10", 0.1),
        (frame(jpeg=20, luma=60), "brightness-0.5+jpeg-20", None, 0),
    ],
)
def test_interpolation(evidence: Evidence, level: str, neighbour: str | None, weight: float) -> None:
    levels = ["jpeg-10", "jpeg-30", "jpeg-40", "brightness-0.5", "brightness-0.5+jpeg-20", "brightness-0.5+jpeg-10"]
    estimate = found(levels, evidence, untrained="interpolate")
    assert (estimate.level, estimate.neighbour) == (level, neighbour)
    assert estimate.weight == pytest.approx(weight)


def test_interpolation_between_sizes_and_rate_factors() -> None:
    between = found([*CRFS, *SIZES], frame(crf=20), untrained="interpolate")
    assert (between.level, between.neighbour, between.weight) == ("h264-crf18", "h264-crf24", pytest.approx(1 / 3))
    area = 640 * 360
    for size in ((270, 480), (200, 356)):
        between = found(SIZES, frame(size=size), untrained="interpolate")
        share = math.log(area / math.prod(size)) / math.log(4)
        assert {between.level, between.neighbour} == set(SIZES)
        assert between.weight == pytest.approx(share if between.level == "h264-640x360" else 1 - share)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("jpeg-30", LevelEstimate("jpeg-30", found="jpeg-30")),
        ("clean", LevelEstimate("clean")),
        ("jpeg-33", LevelEstimate("jpeg-30", "jpeg-40", 0.3, 0.6, "jpeg-33")),
        ("brightness-1.5", LevelEstimate("brightness-2.0", "clean", pytest.approx(0.415, abs=1e-3), 0.881, "brightness-1.5")),
        ("h264-480x270", LevelEstimate("h264-640x360", "h264-320x180", pytest.approx(0.415, abs=1e-3), 11.507, "h264-480x270")),
    ],
)
def test_a_level_by_name(level: str, expected: LevelEstimate) -> None:
    reference = Reference(H, W, LUMA, SPREAD, {"brightness-2.0": 170.0})
    got = LevelEstimator([*JPEGS, *SIZES, "brightness-2.0"], reference, "interpolate").match(level)
    assert (got.level, got.neighbour, got.weight, got.found) == (
        expected.level,
        expected.neighbour,
        pytest.approx(expected.weight),
        expected.found,
    )
    assert got.distance == pytest.approx(expected.distance, abs=1e-3)


@pytest.mark.parametrize("level", ["h264-crf24", "h264-640x360", "brightness-0.4", "jpeg-30+brightness-0.4", "jpeg", ""])
def test_a_level_that_no_other_is_near_is_refused(level: str) -> None:
    with pytest.raises(UserError, match="level"):
        LevelEstimator(JPEGS, REFERENCE).match(level)
    with pytest.raises(UserError, match="nearest in frame size"):
        LevelEstimator(SIZES, None).match("h264-500x300")


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="'nearest', 'interpolate' or 'entropy'"):
        LevelEstimator(JPEGS, REFERENCE, "best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="jpeg-0"):
        LevelEstimator(["jpeg-0"], REFERENCE)


def test_only_what_matters_need_be_read() -> None:
    assert LevelEstimator(["brightness-0.4+jpeg-30"], None).sees_jpeg
    assert not LevelEstimator(["brightness-0.4", "h264-crf20"], None).sees_jpeg
    assert not LevelEstimator([], REFERENCE).sees_jpeg
    assert found([], frame(jpeg=5, luma=3)) == LevelEstimate("clean")


def used(level_estimator: LevelEstimator, frames: Iterable[Evidence], margin: float) -> list[str]:
    """The levels of a stream whose estimates are held."""
    levels: list[str] = []
    for evidence in frames:
        levels.append(level_estimator.estimate(evidence, held=levels[-1] if levels else None, margin=margin).level)
    return levels


@given(st.lists(st.floats(-0.24, 0.24), min_size=2), st.sampled_from(["nearest", "interpolate"]))
@settings(deadline=None)
def test_noise_of_less_than_half_the_margin_never_changes_the_level(noise: list[float], untrained: str) -> None:
    level_estimator = LevelEstimator(CRFS, REFERENCE, untrained)  # type: ignore[arg-type]
    halfway = [frame(qp=21 + 5 + each) for each in noise]
    assert len(set(used(level_estimator, halfway, margin=0.5))) == 1


def test_a_real_change_is_taken_at_once() -> None:
    level_estimator = LevelEstimator(CRFS, REFERENCE)
    stream = [frame(crf=crf) for crf in (18, 20.9, 21.2, 21.3, 24, 20.8, 30)]
    assert used(level_estimator, stream, 0.5) == [
        "h264-crf18", "h264-crf18", "h264-crf18", "h264-crf24", "h264-crf24", "h264-crf24", "h264-crf30",
    ]  # fmt: skip
    assert used(level_estimator, stream, 0.0)[2] == "h264-crf24"


def test_the_facts_are_those_of_the_level_that_is_held() -> None:
    level_estimator = LevelEstimator(CRFS, REFERENCE, "interpolate")
    evidence = frame(crf=21.2)
    free, held = (level_estimator.estimate(evidence, held=level, margin=0.5) for level in (None, "h264-crf18"))
    assert (free.level, free.neighbour, free.weight) == ("h264-crf24", "h264-crf18", pytest.approx(2.8 / 6))
    assert (held.level, held.neighbour, held.weight) == ("h264-crf18", "h264-crf24", pytest.approx(3.2 / 6))
    assert (free.distance, held.distance) == (pytest.approx(2.8), pytest.approx(3.2))
    assert (free.spelled, held.spelled) == ("h264-crf24*0.53, h264-crf18*0.47", "h264-crf18*0.47, h264-crf24*0.53")
    assert LevelEstimate("jpeg-30").spelled == "jpeg-30"


def test_a_level_of_another_release_is_not_held() -> None:
    assert LevelEstimator(CRFS, REFERENCE).estimate(frame(crf=24), held="h264-crf23", margin=9.0).level == "h264-crf24"


def levels_of(level_estimator: LevelEstimator, lumas: Sequence[float], stream: str = "a") -> list[str]:
    return [level_estimator.estimate(frame(luma=luma), stream).level for luma in lumas]


def test_brightness_is_smoothed_over_a_stream() -> None:
    """Luma that flickers about the border between two levels: alone it changes level in every other frame."""
    levels = ["brightness-0.5"]
    flicker = [67.0, 85.0] * 20  # the border is at 70.7
    alone = [found(levels, frame(luma=luma)).level for luma in flicker]
    assert len(set(alone)) == 2
    assert set(levels_of(LevelEstimator(levels, REFERENCE), flicker)[8:]) == {"clean"}
    dusk = [100 * 0.985**i for i in range(60)]
    faded = levels_of(LevelEstimator(levels, REFERENCE), dusk)
    assert sorted(faded, key=["clean", "brightness-0.5"].index) == faded  # changes once, some frames late
    assert 24 < faded.index("brightness-0.5") < 24 + 10


def test_a_flash_changes_nothing_and_a_lamp_soon_does() -> None:
    level_estimator = LevelEstimator(["brightness-0.2"], REFERENCE)
    assert levels_of(level_estimator, [100, 100, 5, 100, 5, 5, 100]) == ["clean"] * 7
    assert levels_of(level_estimator, [20] * 4) == ["clean"] * 2 + ["brightness-0.2"] * 2
    assert levels_of(level_estimator, [100] * 4) == ["brightness-0.2"] * 2 + ["clean"] * 2


def test_streams_are_apart_and_a_frame_alone_leaves_no_trace() -> None:
    level_estimator = LevelEstimator(["brightness-0.2"], REFERENCE)
    assert levels_of(level_estimator, [100], "day") == ["clean"]
    assert levels_of(level_estimator, [20], "night") == ["brightness-0.2"]
    assert levels_of(level_estimator, [20], "day") == ["clean"]
    assert level_estimator.estimate(frame(luma=20)).level == "brightness-0.2"


def test_invented_names_leave_a_stream_in_use_its_brightness() -> None:
    level_estimator = LevelEstimator(["brightness-0.2"], REFERENCE)
    level_estimator.estimate(frame(), "first")
    for number in range(4095):
        level_estimator.estimate(frame(), f"stream {number}")
    with pytest.raises(TooManyStreamsError) as refused:
        level_estimator.estimate(frame(), "stream 4095")
    assert refused.value.status == 429
    assert levels_of(level_estimator, [20], "first") == ["clean"]  # a flash, which a stream's first frame is not
    assert level_estimator.estimate(frame(luma=20)).level == "brightness-0.2"  # a frame alone is not refused


def test_cameras_of_one_name_and_two_credentials_are_apart_and_share_the_lamp_that_is_configured() -> None:
    level_estimator = LevelEstimator(["brightness-0.2"], REFERENCE, cameras={"gate": 20})
    assert levels_of(level_estimator, [20], "gate") == ["clean"]
    assert levels_of(level_estimator, [3, 3, 3], "gate/of-another") == ["brightness-0.2"] * 3
    assert levels_of(level_estimator, [20], "gate") == ["clean"]


def test_threads_share_an_estimator() -> None:
    level_estimator = LevelEstimator(["brightness-0.2", *JPEGS], REFERENCE)
    wrong: list[LevelEstimate] = []

    def watch(number: int) -> None:
        for step in range(1500):
            quality = 10 * (1 + (step + number) % 10)
            estimate = level_estimator.estimate(frame(jpeg=quality), f"{number}-{step % 600}")
            if estimate != LevelEstimate(f"jpeg-{quality}", found=f"jpeg-{quality}"):
                wrong.append(estimate)

    threads = [threading.Thread(target=watch, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_estimating_is_quick() -> None:
    level_estimator = LevelEstimator([*JPEGS, *CRFS, *SIZES, "brightness-0.4", "brightness-2.0"], REFERENCE, "interpolate")
    evidence, times = frame(jpeg=34, luma=60, crf=20), []
    for _ in range(300):
        start = perf_counter()
        level_estimator.estimate(evidence, "a")
        times.append(perf_counter() - start)
    assert min(times) < 100e-6  # 15 µs on an idle core


def test_reference_of_a_manifest() -> None:
    blob = Blob(digest="sha256:" + "0" * 64, bytes=1)
    levels = {
        "clean": CLEAN,
        "brightness-0.4": {**level_entry(blob, 1, ()), "luma": 44.0},
        "h264-crf24": {**level_entry(blob, 1, ()), "luma": 110.0, "qp": 27.5},
    }
    reference = {"height": 96, "width": 128, "luma": 110.5, "luma_spread": 0.2}
    manifest = manifest_of("made", "drn_d_22", 3, blob, levels, reference)
    assert Reference.of_manifest(manifest) == Reference(
        96, 128, 110.5, 0.2, {"brightness-0.4": 44.0, "h264-crf24": 110.0}, {"h264-crf24": 27.5}
    )
    assert Reference.of_manifest(manifest_of("made", "drn_d_22", 3, blob, levels)) is None
    assert Reference.of_manifest(manifest.model_copy(update={"data": DataEntry(name="scenes")})) is None


@pytest.fixture(scope="module")
def scenes() -> list[np.ndarray]:
    split = open_scenes(train=16, val=1, height=96, width=128).train
    return [split.image(index) for index in range(16)]


@pytest.fixture(scope="module")
def reference(scenes: list[np.ndarray]) -> Reference:
    lumas = [evidence_of(scene).luma for scene in scenes]
    factors = ("brightness-0.2", "brightness-0.4", "brightness-2.0")
    of_levels = {name: float(np.mean([evidence_of(image).luma for image in parse_level(name).apply(scenes)])) for name in factors}
    return Reference(96, 128, float(np.mean(lumas)), float(np.std(np.log(lumas))), of_levels)


def test_jpeg_files_of_scenes(scenes: list[np.ndarray], reference: Reference) -> None:
    level_estimator = LevelEstimator(JPEGS, reference)
    for quality in range(10, 101, 10):
        file = io.BytesIO()
        Image.fromarray(scenes[quality % 16]).save(file, "JPEG", quality=quality)
        estimate = level_estimator.estimate(read_frame(file.getvalue(), "image/jpeg").evidence)
        assert estimate == LevelEstimate(f"jpeg-{quality}", found=f"jpeg-{quality}")


def test_brightness_of_scenes(scenes: list[np.ndarray], reference: Reference) -> None:
    """Frame by frame a scene's own luma misleads now and then; as a stream of scenes the level is right."""
    levels = ["brightness-0.2", "brightness-0.4", "brightness-2.0"]
    for level in ["clean", *levels]:
        level_estimator = LevelEstimator(levels, reference)
        images = parse_level(level).apply(scenes)
        alone = [level_estimator.estimate(evidence_of(image)).level for image in images]
        assert alone.count(level) >= 14
        stream = [level_estimator.estimate(evidence_of(image), "camera").level for image in images]
        assert set(stream[3:]) == {level}


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="this PyAV has no libx264")
def test_h264_of_scenes_with_and_without_the_encoders_settings(scenes: list[np.ndarray]) -> None:
    def encoded(crf: int) -> bytes:
        return b"".join(bytes(packet) for packet in encode(scenes, crf))

    crfs = (18, 24, 30, 36)
    streams = {crf: read_h264(encoded(crf)) for crf in crfs}
    levels = [f"h264-crf{crf}" for crf in crfs]
    qps = {f"h264-crf{crf}": stream.mean_qp for crf, stream in streams.items()}
    level_estimator = LevelEstimator(levels, Reference(96, 128, LUMA, SPREAD, level_qp=qps))
    for crf, stream in streams.items():
        assert level_estimator.estimate(evidence_of(scenes[0], crf=stream.crf)).level == f"h264-crf{crf}"
        assert level_estimator.estimate(evidence_of(scenes[0], qp=stream.mean_qp)).level == f"h264-crf{crf}"
    unseen = read_h264(encoded(23)).mean_qp
    assert level_estimator.estimate(evidence_of(scenes[0], qp=unseen)) == LevelEstimate(
        "h264-crf24", distance=pytest.approx(1, abs=0.5), found="h264-crf23"
    )
