"""Axes of levels: groups, coordinates and neighbours."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearnn_ray.levels.axes import AXES, axes_of, coordinate, coordinates, neighbours, properties_of, short_name
from gearnn_ray.levels.level import parse_level


def test_levels_are_grouped_by_family_in_order_of_their_coordinate() -> None:
    levels = ["jpeg-100", "h264-64x48", "brightness-2.0", "jpeg-5", "h264-crf24", "jpeg-30", "brightness-0.1"]
    levels += ["h264-128x96", "h264-crf15", "brightness-0.4+jpeg-30", "clean"]
    assert axes_of(levels) == {
        "jpeg": ("jpeg-5", "jpeg-30", "jpeg-100"),
        "h264-size": ("h264-64x48", "h264-128x96", "clean"),
        "brightness": ("brightness-0.1", "clean", "brightness-2.0"),
        "h264-crf": ("h264-crf15", "h264-crf24"),
        "combination": ("brightness-0.4+jpeg-30",),
    }


def test_clean_is_left_out_beside_brightness_1() -> None:
    found = axes_of(["clean", "brightness-1.0", "brightness-0.4", "h264-64x48"])
    assert found == {"brightness": ("brightness-0.4", "brightness-1.0"), "h264-size": ("h264-64x48", "clean")}


def test_clean_is_a_group_of_its_own_beside_compression() -> None:
    assert axes_of(["clean", "jpeg-10"]) == {"jpeg": ("jpeg-10",), "clean": ("clean",)}
    assert axes_of(["h264-crf18", "clean"]) == {"h264-crf": ("h264-crf18",), "clean": ("clean",)}
    assert axes_of(["clean"]) == {"clean": ("clean",)}
    assert axes_of([]) == {}


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(1, 30), max_size=6), st.integers(1, 30), st.sampled_from(["jpeg-{}", "h264-crf{}"]))
def test_neighbours_by_brute_force(trained: set[int], wanted: int, axis: str) -> None:
    others = ["brightness-0.4", "brightness-9.0", "clean", "jpeg-3+brightness-0.4", "h264-64x48", "jpeg-3+jpeg-9"]
    names = sorted([*(axis.format(value) for value in trained), *others])
    found = neighbours(axis.format(wanted), names)
    below = [value for value in trained if value < wanted]
    above = [value for value in trained if value > wanted]
    if not below or not above:
        assert found is None
        return
    low, high = max(below), min(above)
    assert found is not None
    assert (found.lower, found.upper) == (axis.format(low), axis.format(high))
    assert found.share == pytest.approx((wanted - low) / (high - low))
    assert found.nearest == axis.format(min(low, high, key=lambda value: (abs(value - wanted), value)))


def test_neighbours_use_logarithms_and_need_one_axis() -> None:
    found = neighbours("brightness-0.7", ["brightness-1.5", "brightness-0.4", "jpeg-10", "brightness-1.0"])
    assert found is not None
    assert (found.lower, found.upper, found.nearest) == ("brightness-0.4", "brightness-1.0", "brightness-1.0")
    assert found.share == pytest.approx(math.log(0.7 / 0.4) / math.log(1.0 / 0.4))
    found = neighbours("h264-80x60", ["h264-160x120", "h264-40x30", "h264-20x16", "jpeg-10"])
    assert found is not None
    assert (found.lower, found.upper) == ("h264-40x30", "h264-160x120")
    assert found.share == pytest.approx(0.5)  # in the logarithm of the area
    for level in ("clean", "brightness-0.4+jpeg-30"):
        assert neighbours(level, ["jpeg-10", "brightness-0.4+jpeg-10", "brightness-0.4+jpeg-50"]) is None


@pytest.mark.parametrize(
    ("level", "short"),
    [("jpeg-10", "10"), ("h264-480x360", "480×360"), ("h264-crf20", "20"), ("brightness-0.4", "0.4"), ("clean", "clean"),
     ("jpeg-10+brightness-0.4", "jpeg-10+brightness-0.4")],
)  # fmt: skip
def test_short_names(level: str, short: str) -> None:
    assert short_name(parse_level(level)) == short


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("clean", (0, 0, 17.5, 101)),
        ("jpeg-10", (0, 0, 17.5, 10)),
        ("brightness-0.5", (math.log(0.5), 0, 17.5, 101)),
        ("h264-640x360", (0, math.log(1 / 4), 17.5, 101)),
        ("h264-crf24", (0, 0, 24, 101)),
        ("brightness-0.5+h264-640x360+brightness-0.8+jpeg-30", (math.log(0.4), math.log(1 / 4), 17.5, 30)),
    ],
)
def test_coordinates(level: str, expected: tuple[float, ...]) -> None:
    assert coordinates(properties_of(parse_level(level)), pixels=1280 * 720) == pytest.approx(expected)


def test_a_level_of_one_property_has_one_coordinate() -> None:
    for level in map(parse_level, ("jpeg-10", "brightness-0.5", "h264-640x360", "h264-crf24")):
        assert coordinate(level) == coordinates(properties_of(level), pixels=1)[AXES.index(level.family)]
    assert coordinate(parse_level("h264-640x360")) == pytest.approx(math.log(640 * 360))
    assert coordinate(parse_level("clean")) is None
    assert coordinate(parse_level("brightness-0.4+jpeg-30")) is None


def test_properties_that_differ_on_one_axis() -> None:
    one, other = (properties_of(parse_level(name)) for name in ("brightness-0.4+jpeg-30", "brightness-0.4+jpeg-50"))
    assert [one.differs_only_on(axis, other) for axis in range(4)] == [False, False, False, True]
    assert not any(one.differs_only_on(axis, properties_of(parse_level("jpeg-50"))) for axis in range(4))
    assert not any(one.differs_only_on(axis, one) for axis in range(4))
