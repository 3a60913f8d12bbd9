"""Levels beside JPEG, brightness and H.264: stills (noise, blur, fog, light, WebP), H.265 and AV1, and the user's own."""

import io
import math
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gearnn_ray import Store
from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.axes import coordinate, neighbours, properties_of
from gearnn_ray.levels.level import parse_level
from gearnn_ray.levels.own import Own
from gearnn_ray.models.names import check_released_levels
from gearnn_ray.serving.frames import evidence_of
from gearnn_ray.serving.level_estimation import LevelEstimator, Reference
from tests.manifests import level_entry, manifest_of

STILLS = [
    "webp-20", "gamma-2.2", "low-light-0.05", "gaussian-noise-20.0", "motion-blur-9", "defocus-3", "fog-2.0",
]  # fmt: skip
CLIPS = ["hevc-crf40", "av1-crf55"]
OWN = """
import numpy as np

class Shift:
    def __init__(self, by, *more):
        self.by = by
    def __call__(self, frame):
        return np.roll(frame, self.by, 1)

class Grows:
    def __call__(self, frame):
        return np.concatenate([frame, frame])

class Fails:
    def __call__(self, frame):
        raise ZeroDivisionError("division by zero")

NOT_A_CLASS = 3
"""


def frame(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """A picture with edges and colours: noise, enlarged."""
    small = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_levels_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("name", [*STILLS, *CLIPS, "low-light-0.1+jpeg-20", "motion-blur-5+hevc-crf30"])
def test_names_round_trip_and_the_same_clip_gives_the_same_pixels(name: str) -> None:
    level, clip = parse_level(name), [np.roll(frame(), shift, 1) for shift in range(3)]
    before = [each.copy() for each in clip]
    made = level.apply(clip)
    assert level.name == name
    assert [each.shape for each in made] == [each.shape for each in clip]
    assert all(each.dtype == np.uint8 for each in made)
    assert all(np.array_equal(a, b) for a, b in zip(made, level.apply(clip), strict=True)), "chance comes from the frame alone"
    assert all(np.array_equal(a, b) for a, b in zip(clip, before, strict=True)), "the given frames stay as they are"
    assert not np.array_equal(made[1], clip[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gamma-0.0", "0.1 to 10.0"),
        ("gaussian-noise-0", "0.1 to 255.0"),
        ("low-light-2", "0.0001 to 1.0"),
        ("motion-blur-1", "2 to 200 pixels"),
        ("defocus-51", "1 to 50 pixels"),
        ("fog-0", "0.01 to 20.0"),
        ("webp-101", "0 to 100"),
        ("hevc-crf52", "0 to 51"),
        ("av1-crf0", "1 to 63"),
        ("gamma-nan", "0.1 to 10.0"),
    ],
)
def test_a_value_out_of_range_is_one_sentence(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse_level(name)


def test_gamma_is_a_power_of_the_pixel_values() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, 2)
    for exponent in (0.5, 2.2):
        (made,) = parse_level(f"gamma-{exponent}").apply([values])
        assert [int(each) for each in made[0, :, 1]] == [round(255 * (v / 255) ** exponent) for v in range(256)]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(3, 15), st.integers(3, 15))
def test_blurs_are_means_over_their_pixels(length: int, radius: int, height: int, width: int) -> None:
    pixels = frame(height, width, seed=height * width)
    (moved,) = parse_level(f"motion-blur-{length}").apply([pixels])
    (blurred,) = parse_level(f"defocus-{radius}").apply([pixels])
    disk = [(dy, dx) for dy in range(-radius, radius + 1) for dx in range(-radius, radius + 1) if dx**2 + dy**2 <= radius**2]

    def at(y: int, x: int) -> np.ndarray:
        return pixels[min(max(y, 0), height - 1), min(max(x, 0), width - 1)].astype(int)

    for y, x in [(0, 0), (height - 1, width - 1), (height // 2, width // 2)]:
        row = [at(y, x + step - (length - 1) // 2) for step in range(length)]
        assert moved[y, x].tolist() == np.floor(np.mean(row, 0) + 0.5).tolist()
        assert blurred[y, x].tolist() == np.floor(np.sum([at(y + dy, x + dx) for dy, dx in disk], 0) / len(disk) + 0.5).tolist()


def test_noise_has_its_standard_deviation_and_no_bias() -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    (made,) = parse_level("gaussian-noise-20.0").apply([grey])
    noise = made.astype(float) - 128
    assert abs(noise.mean()) < 0.3
    assert noise.std() == pytest.approx(20, rel=0.02)
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.02, "white"


def test_low_light_keeps_the_mean_and_makes_noise_that_grows_as_the_light_fades() -> None:
    grey = np.full((100, 100, 3), 100, np.uint8)
    spread = {}
    for share in (1.0, 0.1, 0.0625):
        (made,) = parse_level(f"low-light-{share}").apply([grey])
        light = ((made / 255 + 0.055) / 1.055) ** 2.4
        assert light.mean() == pytest.approx(((100 / 255 + 0.055) / 1.055) ** 2.4, rel=0.05), "the gain makes up for the light"
        spread[share] = light.std() / light.mean()
    electrons = 5000 * ((100 / 255 + 0.055) / 1.055) ** 2.4
    for share, found in spread.items():
        signal = electrons * share
        assert found == pytest.approx(math.sqrt(signal + 9) / signal, rel=0.1), "photons and reading"
    (dark,) = parse_level("low-light-0.01").apply([grey])
    assert dark.mean() < 60, "the gain has an end"


def test_fog_hides_what_is_far_and_leaves_what_is_near() -> None:
    black = np.zeros((90, 10, 3), np.uint8)
    (made,) = parse_level("fog-3.0").apply([black])
    rows = made[:, 0, 0].astype(int)
    assert rows[0] == rows[30] == round(230 * (1 - math.exp(-3))), "sky and horizon"
    assert rows[-1] == pytest.approx(230 * (1 - math.exp(-0.3)), abs=2), "the road before the camera"
    assert (np.diff(rows) <= 0).all()


def test_webp_is_pillows() -> None:
    pixels, file = frame(), io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=20)
    assert np.array_equal(parse_level("webp-20").apply([pixels])[0], np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize("family", ["hevc-crf", "av1-crf"])
def test_video_codecs_lose_more_at_a_higher_crf_and_keep_order_and_sizes(family: str) -> None:
    clip = [np.roll(frame(50, 71), 3 * shift, 1) for shift in range(9)]
    loss = {}
    for crf in (20, 50):
        made = parse_level(f"{family}{crf}").apply(clip)
        assert [each.shape for each in made] == [(50, 71, 3)] * 9
        loss[crf] = [np.abs(a.astype(int) - b).mean() for a, b in zip(made, clip, strict=True)]
        nearest = [int(np.argmin([np.abs(each.astype(int) - other).mean() for other in clip])) for each in made]
        assert nearest == list(range(9)), "in order"
    assert np.mean(loss[20]) < np.mean(loss[50])
    assert parse_level(f"{family}30").apply([]) == []
    with pytest.raises(UserError, match="frame 1 of a clip has shape"):
        parse_level(f"{family}30").apply([frame(), frame(48, 56)])


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system has no scheduling policies")
def test_av1_leaves_this_thread_at_its_own_priority() -> None:
    parse_level("av1-crf50").apply([frame(64, 64)])
    # not compared with the time before: any test that encodes AV1 may have run by then
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_level_that_cannot_be_read_off_a_frame_is_used_where_it_is_named() -> None:
    reference = Reference(40, 56, 100.0, 0.2)
    estimator = LevelEstimator(["gaussian-noise-10.0", "gaussian-noise-30.0", "brightness-0.2"], reference)
    dark, noisy = (
        np.full((40, 56, 3), 20, np.uint8),
        parse_level("gaussian-noise-30.0").apply([np.full((40, 56, 3), 100, np.uint8)])[0],
    )
    assert estimator.estimate(evidence_of(dark, None)).level == "brightness-0.2"
    assert estimator.estimate(evidence_of(noisy, None)).level == "clean", "no evidence, no guess"
    only_both = LevelEstimator(["brightness-0.2+gaussian-noise-10.0"], reference)
    assert only_both.estimate(evidence_of(dark, None)).level == "clean", "light alone does not tell of noise"
    assert estimator.match("gaussian-noise-30.0").level == "gaussian-noise-30.0"
    assert (estimator.match("gaussian-noise-12.0").level, estimator.match("gaussian-noise-12.0").distance) == (
        "gaussian-noise-10.0",
        2,
    )
    with pytest.raises(UserError, match="no level of its kind"):
        estimator.match("fog-1.0")
    with pytest.raises(UserError, match="in JPEG quality: use one of"):
        estimator.match("jpeg-10")


def test_levels_without_an_axis_have_the_number_in_their_name_as_coordinate() -> None:
    found = neighbours("fog-2.0", ["fog-1.0", "fog-4.0", "defocus-2"])
    assert found is not None
    assert (found.lower, found.upper, found.share) == ("fog-1.0", "fog-4.0", pytest.approx(1 / 3))
    assert coordinate(parse_level("defocus-3+jpeg-10")) is None
    assert properties_of(parse_level("defocus-3+jpeg-10")).unread == ("defocus-3",)


# ---- levels of the user's own


def test_an_own_level_is_named_by_path_and_numbers_and_distorts(own_module: str) -> None:
    level = parse_level(f"{own_module}:Shift(2)")
    assert isinstance(level, Own)
    assert (level.name, level.family, level.value) == (f"{own_module}:Shift(2)", f"{own_module}:Shift", 2)
    assert parse_level(f"{own_module}:Shift(2,0.5)+jpeg-20").name == f"{own_module}:Shift(2,0.5)+jpeg-20"
    (made,) = level.apply([frame()])
    assert np.array_equal(made, np.roll(frame(), 2, 1))
    level.check()
    assert f"{own_module}:Shift" in level.versions(), "images are made again when the class changes"


def test_a_name_alone_imports_nothing() -> None:
    assert parse_level("no_such_package.levels:Rain(3)").name == "no_such_package.levels:Rain(3)"
    assert "no_such_package" not in sys.modules
    estimator = LevelEstimator(["no_such_package.levels:Rain(3)"], None)
    assert estimator.match("no_such_package.levels:Rain(4)").level == "no_such_package.levels:Rain(3)"


@pytest.mark.parametrize(
    ("level", "sentence"),
    [
        ("{}:Grows()", r"returned uint8 \[48, 32, 3\] for a frame: expected uint8 \[24, 32, 3\]"),
        ("{}:Fails()", "failed on a frame .division by zero"),
        ("{}:Missing(1)", "cannot be made .*has no attribute 'Missing'"),
        ("{}:NOT_A_CLASS()", "cannot be made .*not callable"),
        ("{}:Shift()", "cannot be made .*missing 1 required"),
        ("no_such_package:Rain(1)", "cannot be made .No module named"),
    ],
)
def test_an_own_level_that_does_not_work_is_one_sentence(own_module: str, level: str, sentence: str) -> None:
    own = parse_level(level.format(own_module))
    assert isinstance(own, Own)
    with pytest.raises(UserError, match=sentence):
        own.check()


@pytest.mark.parametrize(
    "name", ["a.b:C", "a.b:C(x)", "a.b:C(1,2,3,4,5)", "a/b:C(1)", "a:C(inf)", "a:C(1)(2)", ":C(1)", "a.b:C(01)"]
)
def test_other_spellings_of_own_levels_are_refused(name: str) -> None:
    with pytest.raises(UserError):
        parse_level(name)


def test_an_own_level_in_a_release_needs_trust() -> None:
    levels = ["jpeg-10", "their.levels:Rain(3)+jpeg-10"]
    with pytest.raises(UserError, match=r"only the code of their.levels can make.*--trust their.levels"):
        check_released_levels(levels, ())
    check_released_levels(levels, ("their",))


def test_a_release_may_have_an_own_level_and_its_tables(tmp_path: Path) -> None:
    name = "their.levels:Rain(3,0.5)+jpeg-10"
    store = Store(str(tmp_path))
    base = {"weight": torch.zeros(2)}
    blobs = store.put_state(base), store.put_state({"weight": torch.ones(2)})
    manifest = manifest_of("own", "drn_d_22", 2, blobs[0], {name: level_entry(blobs[1], 2, ["weight"])})
    store.publish(manifest, {f"tables/own/summary/{name}.parquet": pa.table({"level": [name]})})
    assert store.pull("own").levels == (name,)
    assert store.verify() == []
