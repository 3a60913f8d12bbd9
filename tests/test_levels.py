"""Distortion levels: names that round-trip, and pixels that are what the name says."""

import hashlib
import io
import platform
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.level import CLEAN, LEVELS_VERSION, Level, codec_versions, parse_level

H, W = 48, 64


def texture(height: int = H, width: int = W, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def moving_clip(count: int, height: int = H, width: int = W) -> list[np.ndarray]:
    """A window that slides over one texture: what a video codec is made for."""
    wide = texture(height + height % 4, width + 4 * count)
    return [wide[:height, 2 * i : 2 * i + width] for i in range(count)]


def error(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return float(np.abs(np.array(got, float) - np.array(expected, float)).mean())


jpegs = st.integers(1, 100).map("jpeg-{}".format)
brightnesses = st.floats(1e-4, 10).map("brightness-{}".format)
sizes = st.tuples(st.integers(8, 4096), st.integers(8, 4096)).map(lambda wh: f"h264-{2 * wh[0]}x{2 * wh[1]}")
crfs = st.integers(0, 51).map("h264-crf{}".format)
singles = jpegs | brightnesses | sizes | crfs
names = st.just("clean") | st.lists(singles, min_size=1, max_size=3).map("+".join)


@given(names)
@settings(max_examples=200, deadline=None)
def test_names_round_trip_and_can_stand_in_a_path(name: str) -> None:
    level = parse_level(name)
    assert level.name == str(level) == name
    assert level == parse_level(name)
    assert level.is_clean == (name == "clean")
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789.+-")


junk_near_grammar = st.lists(
    st.sampled_from(["clean", "jpeg", "brightness", "h264", "crf", "JPEG", "nan", "inf", "1e-3", "x", "-", "+"])
    | st.text("0123456789.-+x_ ٣", max_size=5),
    max_size=8,
).map("".join)


@given(st.text() | junk_near_grammar)
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_canonical_level_or_a_user_error(text: str) -> None:
    try:
        level = parse_level(text)
    except UserError as sentence:
        outcome = str(sentence)
    else:
        outcome = level.name
        assert outcome == text
    assert len(outcome.splitlines()) == 1


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("JPEG-10", "jpeg-10"),
        ("jpeg-010", "jpeg-10"),
        (" jpeg-10", "jpeg-10"),
        ("jpeg-+10", None),  # a plus sign joins
        ("brightness-1", "brightness-1.0"),
        ("brightness-4e-1", "brightness-0.4"),
        ("brightness-.40", "brightness-0.4"),
        ("h264-0512X256", "h264-512x256"),
        ("h264-CRF024", "h264-crf24"),
        ("brightness-1+jpeg-30", "brightness-1.0+jpeg-30"),
        ("clean+jpeg-30", "jpeg-30"),
        ("clean+clean", "clean"),
    ],
)
def test_other_spellings_are_refused_naming_the_canonical_one(written: str, canonical: str | None) -> None:
    with pytest.raises(UserError, match=f"write '{canonical}'".replace("+", r"\+") if canonical else None):
        parse_level(written)


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("jpeg-0", "quality 0", "1 to 100"),
        ("jpeg-101", "quality 101", "1 to 100"),
        ("jpeg--5", "quality -5", "1 to 100"),
        ("brightness-0.0", "factor 0.0", "0.0001 to 10.0"),
        ("brightness-1e-05", "factor 1e-05", "0.0001 to 10.0"),
        ("brightness-10.5", "factor 10.5", "0.0001 to 10.0"),
        ("brightness-nan", "factor nan", "0.0001 to 10.0"),
        ("h264-crf52", "CRF 52", "0 to 51"),
        ("h264-511x256", "511", "even numbers from 16 to 8192"),
        ("h264-512x8194", "8194", "even numbers from 16 to 8192"),
        ("h264-14x16", "14", "even numbers from 16 to 8192"),
        ("gif-3", "'gif-3'", "jpeg-Q"),
        ("jpeg-good", "'jpeg-good'", "jpeg-Q"),
        ("jpeg-10+", "''", "jpeg-Q"),
        ("", "''", "jpeg-Q"),
        ("+".join(["jpeg-10"] * 40), "319 characters", "up to"),
    ],
)
def test_values_out_of_range_say_what_was_found_and_expected(name: str, found: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_level(name)
    assert found in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "family", "value"),
    [
        ("clean", "clean", None),
        ("jpeg-10", "jpeg", 10),
        ("brightness-0.4", "brightness", 0.4),
        ("h264-512x256", "h264-size", 512),
        ("h264-crf24", "h264-crf", 24),
        ("brightness-0.4+jpeg-30", "combination", None),
    ],
)
def test_family_and_value_place_a_level_in_a_plot(name: str, family: str, value: float | None) -> None:
    assert (parse_level(name).family, parse_level(name).value) == (family, value)


def through_pillow_jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def brightened(frame: np.ndarray, factor: float) -> np.ndarray:
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(frame)).enhance(factor))


def test_image_levels_are_pillows_and_combinations_go_left_to_right() -> None:
    frame = texture()
    [jpeg] = parse_level("jpeg-10").apply([frame])
    [dark] = parse_level("brightness-0.4").apply([frame])
    [dark_then_jpeg] = parse_level("brightness-0.4+jpeg-10").apply([frame])
    [jpeg_then_dark] = parse_level("jpeg-10+brightness-0.4").apply([frame])
    assert np.array_equal(jpeg, through_pillow_jpeg(frame, 10))
    assert np.array_equal(dark, brightened(frame, 0.4))
    assert np.array_equal(dark_then_jpeg, through_pillow_jpeg(dark, 10))
    assert np.array_equal(jpeg_then_dark, brightened(jpeg, 0.4))
    assert not np.array_equal(dark_then_jpeg, jpeg_then_dark)


def test_image_levels_take_frames_of_any_size_and_change_none_in_place() -> None:
    frames = [texture(48, 64), texture(32, 40)]
    before = [frame.copy() for frame in frames]
    for name in ("clean", "jpeg-10", "brightness-2.0"):
        assert [frame.shape for frame in parse_level(name).apply(frames)] == [(48, 64, 3), (32, 40, 3)]
        assert all(map(np.array_equal, frames, before))


def test_h264_gives_every_frame_back_in_order() -> None:
    clip = moving_clip(70)  # longer than the lookahead of libx264, with reordered B frames
    decoded = parse_level("h264-crf18").apply(clip)
    assert len(decoded) == len(clip)
    for index in range(0, len(clip), 7):
        distances = [error([decoded[index]], [frame]) for frame in clip]
        assert int(np.argmin(distances)) == index


def test_h264_loses_more_at_a_higher_crf() -> None:
    clip = moving_clip(5)
    errors = [error(parse_level(f"h264-crf{crf}").apply(clip), clip) for crf in (0, 15, 24, 35, 51)]
    assert errors == sorted(errors)
    assert errors[-1] > 2 * errors[0] > 0


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 200, 0), (20, 40, 250), (255, 255, 255), (0, 0, 0), (200, 100, 50)])
def test_h264_at_crf_0_keeps_a_flat_colour(colour: tuple[int, int, int]) -> None:
    frame = np.full((H, W, 3), colour, np.uint8)
    [decoded] = parse_level("h264-crf0").apply([frame])
    assert np.abs(decoded.astype(int) - frame).max() <= 2


def test_h264_at_crf_0_shifts_no_colour_of_a_texture() -> None:
    clip = [texture(seed=seed) for seed in range(5)]
    shift_C = (np.array(parse_level("h264-crf0").apply(clip), float) - np.array(clip)).mean((0, 1, 2))
    assert np.abs(shift_C).max() < 0.5


def test_h264_size_scales_like_pillow_and_keeps_the_size() -> None:
    clip = moving_clip(4)
    scaled = [np.asarray(Image.fromarray(f).resize((32, 24), Image.Resampling.BICUBIC)) for f in clip]
    decoded = parse_level("h264-32x24").apply(clip)
    assert [frame.shape for frame in decoded] == [(24, 32, 3)] * 4
    assert decoded[0].dtype == np.uint8
    pairs = zip(decoded, parse_level("h264-crf18").apply(scaled), strict=True)
    assert all(np.array_equal(got, expected) for got, expected in pairs)


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (47, 63), (1, 1)])
def test_h264_crf_keeps_odd_sizes(height: int, width: int) -> None:
    clip = [texture()[:height, :width]] * 2
    decoded = parse_level("h264-crf10").apply(clip)
    assert [frame.shape for frame in decoded] == [(height, width, 3)] * 2
    assert error(decoded, clip) < 20


@pytest.mark.parametrize("name", ["h264-crf20", "h264-32x24", "brightness-0.4+h264-crf20"])
def test_a_clip_of_unequal_frames_is_refused_where_it_is_one_video(name: str) -> None:
    clip = [texture(48, 64), texture(48, 64), texture(32, 64)]
    with pytest.raises(ValueError, match=r"frame 2 .*expected equal ones"):
        parse_level(name).apply(clip)


@pytest.mark.parametrize("name", ["jpeg-10", "h264-crf24", "h264-32x24", "brightness-0.4+jpeg-30+h264-crf30"])
def test_the_same_clip_gives_the_same_bytes(name: str) -> None:
    clip = [texture(seed=seed) for seed in range(20)]
    runs = {np.array(parse_level(name).apply(clip)).tobytes() for _ in range(4)}
    assert len(runs) == 1


PIXELS_OF = {"pillow": "13.0.0", "libjpeg": "3.2.0", "pyav": "18.1.0", "libavcodec": "62.28.102", "x264": "165"}


@pytest.mark.skipif(codec_versions() != PIXELS_OF or platform.machine() != "x86_64", reason="codecs of other versions")
@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("jpeg-10", "d0dc6c9cbd00c428"),
        ("brightness-0.4", "ae466cdc1db91289"),
        ("h264-crf24", "b7a9d48a9fc6c60a"),
        ("h264-32x24", "8fb1d24d3141339a"),
    ],
)
def test_the_pixels_of_this_levels_version(name: str, digest: str) -> None:
    """Other pixels? Raise LEVELS_VERSION, or caches will mix them with the old ones.

    Without `cpu-independent` libx264 makes others on AVX-512 processors, and not always the same.
    """
    clip = [texture(seed=seed) for seed in range(20)]
    pixels = hashlib.sha256(np.array(parse_level(name).apply(clip)).tobytes()).hexdigest()
    assert (LEVELS_VERSION, pixels[:16]) == (1, digest)


@pytest.mark.parametrize("name", ["clean", "jpeg-10", "h264-crf20", "h264-32x24", "jpeg-10+h264-crf20"])
def test_a_clip_may_have_no_frame_or_one(name: str) -> None:
    level = parse_level(name)
    assert level.apply([]) == []
    assert len(level.apply([texture()])) == 1


def qps(name: str) -> list[float | None]:
    return [qp for _, qp in parse_level(name).pictures(moving_clip(12))]


def test_pictures_have_the_qp_of_the_last_h264_part() -> None:
    assert set(qps("brightness-0.4+jpeg-30")) == {None}
    coarse, fine = (np.array(qps(f"h264-crf{crf}"), float) for crf in (40, 20))
    assert (coarse - fine).mean() == pytest.approx(20, abs=3)
    assert qps("h264-crf40+brightness-0.4+jpeg-90") == coarse.tolist()
    assert np.array(qps("h264-crf40+h264-crf20"), float).mean() < fine.mean() + 5
    assert len(qps("h264-32x24")) == 12


def test_a_long_clip_is_streamed() -> None:
    read = []

    def frames():  # type: ignore[no-untyped-def]
        for index, frame in enumerate(moving_clip(200)):
            read.append(index)
            yield frame

    stream = parse_level("brightness-0.9+h264-crf30").stream(frames())
    next(stream)
    assert len(read) < 100
    assert 1 + sum(1 for _ in stream) == 200


def test_pyav_is_imported_only_for_h264(monkeypatch: pytest.MonkeyPatch) -> None:
    level: Level = parse_level("brightness-0.4+jpeg-30")
    monkeypatch.setitem(sys.modules, "av", None)
    level.apply([texture()])
    assert codec_versions(level) == codec_versions(CLEAN)
    assert set(codec_versions(level)) == {"pillow", "libjpeg"}
    with pytest.raises(ImportError):
        parse_level("h264-crf20").apply([texture()])


def test_codec_versions_name_every_codec() -> None:
    versions = codec_versions()
    assert set(versions) == {"pillow", "libjpeg", "pyav", "libavcodec", "x264"}
    assert versions["x264"].isdigit()
    assert versions == codec_versions(parse_level("jpeg-10+h264-crf20"))
