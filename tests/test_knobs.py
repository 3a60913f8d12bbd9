"""The notation of knobs, the settings they make, and the frame filter's differences."""

import pickle
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.frame_filter import difference, frames_to_send
from gearnn_ray.knobs.knob import Knob, Quantisation, Regions, knobs_of, settings_of
from gearnn_ray.knobs.settings import FrameFilter, Settings

ALL = [
    "crf=18,23.5,28", "size=1,0.75,320x240", "rate=1,2,5", "filter-pixel=0,0.01,0.05", "regions=0,4,8,12",
    "preset=veryslow,medium,veryfast", "bframes-bias=-50,0,100", "chroma-qp-offset=-2,0,6",
]  # fmt: skip


class Grey:
    """A knob of the user's own."""

    name = "grey"
    values = ("colour", "grey")

    def encode(self, value: str, settings: Settings) -> Settings:
        return settings


class Nothing:
    name = "nothing"


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("cameras_of_ours")
    module.Grey, module.made, module.Nothing, module.Bad = Grey, Grey(), Nothing, type("Bad", (Grey,), {"values": ((1, 2), 3)})
    module.Once = type("Once", (Grey,), {"values": ("grey",)})
    monkeypatch.setitem(sys.modules, "cameras_of_ours", module)


def test_every_kind_of_knob_is_known_by_its_notation() -> None:
    knobs = knobs_of(ALL)
    assert [knob.name for knob in knobs] == [spec.partition("=")[0] for spec in ALL]
    assert all(isinstance(knob, Knob) and pickle.loads(pickle.dumps(knob)) == knob for knob in knobs)
    worst = settings_of(knobs, {knob.name: knob.values[-1] for knob in knobs})
    assert worst == Settings(
        crf=28, size=(240, 320), every=5, frame_filter=FrameFilter("pixel", 0.05), tiles=((12.0,),), preset="veryfast",
        options=(("b-bias", "100"), ("chroma-qp-offset", "6")),
    )  # fmt: skip
    assert hash(worst) == hash(pickle.loads(pickle.dumps(worst)))
    assert settings_of(knobs_of(["qp=20,30"]), {"qp": 30}).qp == 30
    assert settings_of(knobs_of(["jpeg=90,50"]), {"jpeg": 50}).jpeg_quality == 50
    assert settings_of(knobs_of(["filter-edge=0,1"]), {"filter-edge": 1}).frame_filter == FrameFilter("edge", 1)


def test_knobs_that_are_not_named_are_at_their_best_value() -> None:
    assert settings_of(knobs_of(["crf=20,30", "rate=1,2"]), {"rate": 2}) == Settings(crf=20, every=2)
    assert settings_of(knobs_of(["rate=1,2"]), {}, Settings(crf=40)) == Settings(crf=40)


@given(st.lists(st.integers(0, 5100), min_size=2, max_size=9, unique=True))
def test_numbers_in_order_are_the_values(hundredths: list[int]) -> None:
    values = sorted(number / 100 for number in hundredths)
    assert knobs_of([f"crf={','.join(map(str, values))}"]) == (Quantisation(tuple(values)),)
    with pytest.raises(UserError, match="expected the best first"):
        knobs_of([f"crf={','.join(map(str, reversed(values)))}"])


@given(st.text(max_size=12), st.text(max_size=12))
def test_any_text_is_a_knob_or_refused(name: str, values: str) -> None:
    for spec in (f"{name}={values}", f"crf=18,{values}", f"size=1,{values}", f"regions={values},4", f"{values},{name}"):
        try:
            (knob,) = knobs_of([spec])
        except UserError:
            continue
        assert len(knob.values) > 1
        assert all(settings_of([knob], {knob.name: value}) for value in knob.values)


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        ([], "there are no knobs to steer"),
        (["sharpness=1,2"], "there is no knob 'sharpness': expected crf, qp, size"),
        (["crf"], "the knob crf has no values: write e.g. crf=18,28,38"),
        (["crf="], "the knob crf cannot be set to '': expected a number from 0 to 51"),
        (["crf=18,nan"], "cannot be set to 'nan'"),
        (["crf=18,52"], "cannot be set to '52': expected a number from 0 to 51"),
        (["crf=18"], "the knob crf has 1 value, expected two at least"),
        (["crf=18,18.0"], "the knob crf has the value 18 more than once"),
        (["size=0.5,1"], "expected the best first: the largest is the best"),
        (["size=320x240,640x480"], "expected the best first: the largest is the best"),
        (["size=1,321x240"], "expected a factor from 0.01 to 1, or WIDTHxHEIGHT with even sides"),
        (["size=2,1"], "the knob size cannot be set to '2'"),
        (["rate=0,1"], "expected a whole number from 1 to 1000"),
        (["rate=1,1.5"], "expected a whole number from 1 to 1000"),
        (["preset=medium,quick"], "expected one of placebo, veryslow"),
        (["crf=18,28", "crf=18,38"], "the knob crf is given 2 times"),
        (["crf=18,28", "qp=18,28"], "the knobs crf and qp exclude each other"),
        (["filter-pixel=0,1", "filter-edge=0,1"], "the knobs filter-pixel and filter-edge exclude each other"),
        (["qp=18,28", "regions=0,4"], "x264 has no regions with a constant quantisation parameter"),
        (["jpeg=90,10", "preset=medium,fast"], "the knob preset is for video, and jpeg sends stills"),
        (["nowhere.at.all:Knob"], "the knob nowhere.at.all:Knob cannot be imported (No module named 'nowhere')"),
        (["not a path:Knob"], "'not a path:Knob' is no knob"),
    ],
)  # fmt: skip
def test_a_wrong_knob_is_refused_with_one_sentence(specs: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        knobs_of(specs)
    assert sentence in str(error.value)


@pytest.mark.usefixtures("nets")
def test_a_knob_of_the_users_own_is_imported_where_its_module_is_trusted() -> None:
    for path in ("cameras_of_ours:Grey", "cameras_of_ours:made"):
        (knob,) = knobs_of([path])
        assert isinstance(knob, Grey)
        assert knobs_of([path], trust=("cameras_of_ours",))
    with pytest.raises(UserError, match="not in a trusted module"):
        knobs_of(["cameras_of_ours:Grey"], trust=("cameras",))
    for name, sentence in (
        ("Nothing", "is no knob: expected a class with name"),
        ("Bad", r"has the value \(1, 2\): expected numbers or text"),
        ("Once", "has 1 value, expected two at least"),
        ("Missing", "cannot be imported"),
    ):
        with pytest.raises(UserError, match=sentence):
            knobs_of([f"cameras_of_ours:{name}"])


@pytest.mark.parametrize("value", [19, "18", None, [18], True, float("nan")])
def test_a_value_from_elsewhere_that_the_camera_does_not_have_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"the knob crf cannot be set to .*: expected one of 1, 18, 28"):
        settings_of(knobs_of(["crf=1,18,28"]), {"crf": value})
    with pytest.raises(UserError, match="there is no knob 'zoom' here: expected crf"):
        settings_of(knobs_of(["crf=18,28"]), {"zoom": 1})


def test_the_value_of_regions_bounds_how_coarse_the_tiles_are() -> None:
    knob = Regions((0, 4, 8)).planned(np.array([[0, 1, 2]]))
    assert [knob.encode(value, Settings()).tiles for value in knob.values] == [None, ((0, 4, 4),), ((0, 4, 8),)]
    assert Regions((0, 4, 8)).encode(4, Settings()).tiles == ((4,),)


def grey(height: int = 40, width: int = 50, level: int = 100) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def with_box(top: int, left: int, side: int, level: int = 200, frame: np.ndarray | None = None) -> np.ndarray:
    frame = grey() if frame is None else frame.copy()
    frame[top : top + side, left : left + side] = level
    return frame


def test_the_pixel_difference_is_the_share_of_changed_pixels() -> None:
    assert difference("pixel", with_box(5, 5, 10), grey()) == pytest.approx(100 / 2000)
    assert difference("pixel", grey(level=120), grey()) == 0  # noise
    assert difference("pixel", grey(level=122), grey()) == 1


def test_the_area_difference_is_that_of_the_largest_connected_area() -> None:
    one = with_box(4, 4, 12)
    two = with_box(26, 36, 8, frame=one)
    assert difference("area", one, grey()) == difference("area", two, grey())  # the smaller one is another area
    assert 144 / 2000 <= difference("area", one, grey()) <= (12 + 10) ** 2 / 2000
    assert difference("area", with_box(4, 4, 1), grey()) == 0  # a pixel alone vanishes in the blur
    assert difference("area", grey(level=200), grey()) == 1


def test_areas_are_connected_as_a_search_finds_them() -> None:
    from gearnn_ray.knobs.frame_filter import _largest_component

    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.3, 0.45, 0.6, 1.0):
        mask = rng.random((17, 23)) < share
        assert _largest_component(mask) == searched(mask)


def searched(mask: np.ndarray) -> int:
    left, most = {tuple(place) for place in np.argwhere(mask)}, 0
    while left:
        found, size = [left.pop()], 0
        while found:
            y, x = found.pop()
            size += 1
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            found += near
        most = max(most, size)
    return most


def test_the_edge_difference_counts_edges_that_come_and_go() -> None:
    assert difference("edge", grey(level=200), grey()) == 0  # light alone
    moved = difference("edge", with_box(10, 10, 16), with_box(10, 18, 16))
    assert 0 < difference("edge", with_box(10, 10, 16), with_box(10, 11, 16)) < moved
    assert moved == difference("edge", with_box(10, 18, 16), with_box(10, 10, 16))


@pytest.mark.parametrize("feature", ["pixel", "area", "edge"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 40)])
def test_tiny_frames_have_differences(feature: str, shape: tuple[int, int]) -> None:
    assert difference(feature, grey(*shape), grey(*shape)) == 0
    assert 0 <= difference(feature, grey(*shape, 255), grey(*shape, 0)) <= 1


def test_frames_are_compared_with_the_last_one_sent() -> None:
    boxes = [with_box(10, 5 + step, 10) for step in range(8)]  # a step of 1 pixel changes 20 pixels of 2,000
    assert frames_to_send(boxes) == tuple(range(8))
    assert frames_to_send(boxes, every=3) == (0, 3, 6)
    assert frames_to_send(boxes, 1, FrameFilter("pixel", 0)) == tuple(range(8))
    assert frames_to_send(boxes, 1, FrameFilter("pixel", 0.01)) == tuple(range(8))
    assert frames_to_send(boxes, 1, FrameFilter("pixel", 0.015)) == (0, 2, 4, 6)
    assert frames_to_send(boxes, 3, FrameFilter("pixel", 0.04)) == (0, 6)
    assert frames_to_send([grey()] * 4, 1, FrameFilter("pixel", 0.001)) == (0,)
    assert frames_to_send([], 1, FrameFilter("area", 0.1)) == ()
