"""Segments encoded as knobs say, by the real libx264 and Pillow, on generated scenes over which a camera pans."""

import functools
import io
import pickle
from itertools import pairwise

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.scenes import ScenesSplit
from gearnn_ray.knobs.encoding import Encoded, _per_macroblock, _rectangles, decode, encode, encode_all, shown
from gearnn_ray.knobs.knob import knobs_of, settings_of
from gearnn_ray.knobs.regions import Regions, choose_tiles, tile_bytes, tile_energy
from gearnn_ray.knobs.settings import FrameFilter, Settings
from gearnn_ray.knobs.tiles import tile_sums
from gearnn_ray.levels.h264_codec import UnequalFramesError
from gearnn_ray.levels.level import parse_level
from gearnn_ray.serving.frames import Limits
from gearnn_ray.video.decoding import decoded
from gearnn_ray.video.segments import open_segment

H, W, T = 96, 128, 10

pytestmark = pytest.mark.skipif("libx264" not in av.codecs_available, reason="this PyAV has no libx264")


@functools.cache
def clip(height: int = H, width: int = W, frames: int = T, scene: int = 3) -> tuple[np.ndarray, ...]:
    scenes = ScenesSplit("val", 1000, height, width, 0, "segmentation", frames)
    return tuple(scenes.image(scene * frames + number) for number in range(frames))


def error(encoded: Encoded, frames: tuple[np.ndarray, ...]) -> np.ndarray:
    """|decoded - pristine| [H, W], a mean over frames and channels."""
    return np.abs(shown(encoded, frames).astype(int) - np.stack(frames)).mean((0, 3))


@pytest.mark.parametrize(
    "spec",
    [
        "crf=0,18,23,28,33,38,43,51", "qp=0,18,28,38,51", "size=1,0.75,0.5,0.25", "size=1,96x72,64x48", "rate=1,2,3,5",
        "filter-pixel=0,0.1,0.9", "filter-area=0,0.02,0.1", "filter-edge=0,0.05,0.1", "regions=0,4,8,12",
        "bframes-bias=-90,0,100", "chroma-qp-offset=-6,0,6,12", "jpeg=100,90,50,10,1",
    ],
)  # fmt: skip
def test_the_next_value_of_a_knob_makes_no_more_bytes_and_no_smaller_error(spec: str) -> None:
    (knob,) = knobs_of([spec])
    encodings = encode_all(clip(), [settings_of([knob], {knob.name: value}) for value in knob.values], threads=2)
    sizes, errors = [len(each) for each in encodings], [error(each, clip()).mean() for each in encodings]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    slack = 0.05 if knob.name == "bframes-bias" else 0  # which says little about the error
    assert all(worse >= better - slack for better, worse in pairwise(errors))


def test_a_preset_makes_other_bytes() -> None:
    (knob,) = knobs_of(["preset=veryslow,medium,ultrafast"])
    assert len({encode(clip(), settings_of([knob], {"preset": value})).data for value in knob.values}) == 3


MANY = (
    Settings(), Settings(crf=33, size=0.5, every=2), Settings(jpeg_quality=40),
    Settings(frame_filter=FrameFilter("area", 0.02)).with_tiles(np.array([[0.0, 9.0]])),
)  # fmt: skip


def test_the_same_frames_and_settings_make_the_same_bytes_on_any_thread() -> None:
    alone = [encode(clip(), settings) for settings in MANY]
    together = encode_all(clip(), MANY * 2, threads=4)
    assert together == alone * 2
    assert together[0] is together[len(MANY)]  # encoded once
    assert encode([frame.copy() for frame in clip()], pickle.loads(pickle.dumps(MANY[3]))) == alone[3]
    assert pickle.loads(pickle.dumps(alone)) == alone


def test_a_rate_factor_means_the_quality_of_the_level_with_its_name() -> None:
    """Also where frames are left out, because the encoder is not told that frames are shown longer."""
    level = parse_level("h264-crf33").apply(clip())
    ours = decode(encode(clip(), Settings(crf=33)))
    assert np.array_equal(level, ours)
    assert np.array_equal(parse_level("h264-crf33").apply(clip()[::3]), decode(encode(clip(), Settings(crf=33, every=3))))
    assert np.array_equal(parse_level("h264-64x48").apply(clip()), decode(encode(clip(), Settings(size=(48, 64)))))
    assert np.array_equal(parse_level("jpeg-40").apply(clip()), decode(encode(clip(), Settings(jpeg_quality=40))))


def test_a_segment_is_taken_in_by_the_service_as_it_is() -> None:
    """Annex B that begins with a keyframe and names its colour space, without x264's own name."""
    encoded = encode(clip(), Settings(crf=12))
    assert b"x264" not in encoded.data
    frames = list(decoded(open_segment(encoded.data, Limits(), most_frames=T)))
    assert [frame.keyframe for frame in frames] == [True] + [False] * (T - 1)
    assert np.abs(np.stack([frame.pixels for frame in frames]).astype(int) - np.stack(decode(encoded))).mean() < 2
    with av.open(io.BytesIO(encoded.data), format="h264") as container:
        picture = next(container.decode(video=0))
        assert (int(picture.colorspace), int(picture.color_range)) == (Colorspace.ITU709, ColorRange.MPEG)


def test_frames_that_are_not_sent_repeat_the_last_one_sent() -> None:
    encoded = encode(clip(), Settings(every=4))
    assert encoded.sent == (0, 4, 8)
    seen = shown(encoded, clip())
    assert [int(np.flatnonzero([np.array_equal(seen[t], seen[u]) for u in range(T)])[0]) for t in range(T)] == [
        0, 0, 0, 0, 4, 4, 4, 4, 8, 8,
    ]  # fmt: skip
    assert encode((clip()[0],) * 5, Settings(frame_filter=FrameFilter("pixel", 0.001))).sent == (0,)


@pytest.mark.parametrize("settings", MANY)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (17, 33), (31, 16), (96, 127)])
@pytest.mark.parametrize("count", [1, 2])
def test_odd_sizes_and_short_segments_come_back_in_their_own_size(shape: tuple[int, int], count: int, settings: Settings) -> None:
    frames = tuple(np.ascontiguousarray(frame[: shape[0], : shape[1]]) for frame in clip()[:count])
    encoded = encode(frames, settings)
    assert shown(encoded, frames).shape == (count, *shape, 3)
    assert encoded.sent[0] == 0
    assert len(encoded) == len(encoded.data)


def test_what_cannot_be_encoded_is_refused_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    long = np.zeros((16, 16_400, 3), np.uint8)
    with pytest.raises(UserError, match="x264 refuses frames of 16400 × 16 pixels with crf 18, preset medium"):
        encode([long], Settings())
    with pytest.raises(UserError, match="the segment has no frames"):
        encode([], Settings())
    with pytest.raises(UnequalFramesError):
        encode([clip()[0], clip()[1][:50]], Settings())
    for change, found in (
        (lambda frame: frame[::2], r"uint8 \[48, 128, 3\]"),
        (lambda frame: frame / 2, "float64"),
        (lambda frame: None, "NoneType"),
    ):
        with pytest.raises(UserError, match=f"a knob of your own made {found}.* of a frame: expected uint8"):
            encode(clip(), Settings(before=(change,)))
    encoded = encode(clip(), Settings())
    with pytest.raises(UserError, match="9 of the segment's 10 frames can be decoded"):
        decode(Encoded("h264", encoded.packets[:-1], encoded.sent, encoded.size))
    monkeypatch.setattr(av, "codecs_available", frozenset({"h264"}))
    with pytest.raises(UserError, match="PyAV was built without libx264"):
        encode(clip(), Settings())


def test_changes_of_the_users_own_are_made_in_order() -> None:
    changed = encode(clip(), Settings(before=(lambda frame: frame // 2, lambda frame: frame + np.uint8(9))))
    assert changed.data == encode([frame // 2 + np.uint8(9) for frame in clip()], Settings()).data


@pytest.mark.parametrize("size", [1.0, 0.5])
@pytest.mark.parametrize("preset", ["medium", "ultrafast"])
def test_the_favoured_half_is_more_exact_and_the_other_one_pays(preset: str, size: float) -> None:
    tiles = np.zeros((H // 16, W // 16))
    tiles[:, : W // 32], tiles[:, W // 32 :] = -6, 10
    even = error(encode(clip(), Settings(crf=28, preset=preset, size=size)), clip())
    uneven = error(encode(clip(), Settings(crf=28, preset=preset, size=size).with_tiles(tiles)), clip())
    assert uneven[:, : W // 2].mean() < even[:, : W // 2].mean()
    assert uneven[:, W // 2 :].mean() > even[:, W // 2 :].mean()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
@hypothesis_settings(max_examples=50)
def test_rectangles_cover_each_macroblock_with_an_offset_once(rows: int, columns: int, seed: int) -> None:
    offsets = np.random.default_rng(seed).choice([0.0, 2.0, 4.0], (rows, columns))
    covered, times = np.zeros_like(offsets), np.zeros((rows, columns), int)
    for top, left, bottom, right, offset in _rectangles(offsets):
        covered[top:bottom, left:right] = offset
        times[top:bottom, left:right] += 1
    assert np.array_equal(covered, offsets)
    assert np.array_equal(times, offsets != 0)


def test_macroblocks_of_smaller_frames_have_the_tile_of_their_centre() -> None:
    tiles = np.arange(12.0).reshape(3, 4)
    assert np.array_equal(_per_macroblock(tiles, (48, 64), (48, 64)), tiles)
    assert np.array_equal(_per_macroblock(tiles, (24, 32), (48, 64)), [[5, 7], [9, 11]])
    assert np.array_equal(_per_macroblock(tiles[:1, :1] + 3, (40, 40), (33, 33)), np.full((3, 3), 3))


def test_each_tile_gets_the_quality_with_the_least_cost() -> None:
    rng = np.random.default_rng(0)
    scores, sizes = rng.random((4, 5, 6)), rng.random((4, 5, 6))
    for mu in (0.0, 0.3, 100.0):
        chosen = choose_tiles(scores, sizes, mu)
        costs = scores + mu * sizes
        assert np.array_equal(np.take_along_axis(costs, chosen[None], 0)[0], costs.min(0))
    assert not choose_tiles(np.ones((3, 2, 2)), np.ones((3, 2, 2)), 1).any()  # the best of equal ones
    for broken in (scores[:3], scores[0], np.full_like(scores, np.nan)):
        with pytest.raises(ValueError, match=r"expected \[Q, h, w\]|must be finite"):
            choose_tiles(broken, sizes, 1.0)


def test_tile_bytes_are_the_segments_bytes_and_go_where_there_is_much_to_describe() -> None:
    flat_left = [frame.copy() for frame in clip()]
    for frame in flat_left:
        frame[:, : W // 2] = 90
    energy = tile_energy(flat_left)
    spread = tile_bytes([5000, 1000], energy)
    assert spread.sum((1, 2)) == pytest.approx([5000, 1000])
    assert spread[:, :, : W // 32].sum() < 1e-3 < spread[:, :, W // 32 :].min()
    assert tile_bytes([12], tile_energy([np.zeros((33, 33, 3), np.uint8)]))[0] == pytest.approx(np.full((3, 3), 12 / 9))


@pytest.mark.parametrize("scene", [3, 7])
def test_regions_in_closed_form_beat_every_even_offset_where_half_of_the_frame_matters(scene: int) -> None:
    frames = clip(scene=scene)
    saliency = np.full((H // 16, W // 16), 0.05)
    saliency[:, : W // 32] = 1
    knob, base = Regions((0, 4, 8, 12)), Settings(crf=22)

    def scored(encoded: Encoded) -> np.ndarray:
        return saliency * tile_sums(error(encoded, frames))

    probes = encode_all(frames, [knob.encode(value, base) for value in knob.values], threads=2)
    scores, sizes = np.stack([scored(probe) for probe in probes]), [len(probe) for probe in probes]
    chosen = choose_tiles(scores, tile_bytes(sizes, tile_energy(frames)), 0.5 * scores[0].sum() / sizes[0])
    uneven = encode(frames, knob.planned(chosen).encode(12, base))
    even_at_its_bytes = np.interp(len(uneven), sizes[::-1], scores.sum((1, 2))[::-1])
    assert scored(uneven).sum() < 0.9 * even_at_its_bytes


def test_stills_can_be_told_apart() -> None:
    encoded = encode(clip(), Settings(jpeg_quality=60, every=5))
    assert encoded.codec == "jpeg"
    assert len(encoded.packets) == 2
    with av.open(io.BytesIO(encoded.data), format="mjpeg") as container:
        assert len(list(container.decode(video=0))) == 2
