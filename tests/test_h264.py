"""H.264 quality from side data: what x264 was asked for, whatever the profile, container or damage."""

import functools
import gc
import io
import re
import statistics
from fractions import Fraction
from itertools import pairwise
from time import monotonic

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearnn_ray.core.errors import UserError
from gearnn_ray.serving.frames import Evidence
from gearnn_ray.serving.h264 import DECODER_OPTIONS, H264Quality, picture_qp, read_h264, x264_crf
from gearnn_ray.serving.level_estimation import LevelEstimator, Reference

H, W = 64, 96

pytestmark = pytest.mark.skipif("libx264" not in av.codecs_available, reason="this PyAV has no libx264")


@functools.cache
def clip(count: int = 12) -> list[np.ndarray]:
    """A window that slides over smooth texture, with some noise."""
    rng = np.random.default_rng(0)
    wide = np.kron(rng.integers(40, 216, (H // 8, W // 8 + count, 3)), np.ones((8, 8, 1)))
    frames = [wide[:H, 3 * i : 3 * i + W] + rng.normal(0, 4, (H, W, 3)) for i in range(count)]
    return [np.clip(frame, 0, 255).astype(np.uint8) for frame in frames]


def encode(
    pixels: str = "yuv420p", profile: str | None = None, preset: str = "medium", count: int = 12, height: int = H, **x264: object
) -> list[bytes]:
    """The packets of `clip(count)`, cut off below `height`, by libx264 with these of its own parameters."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = W, height, pixels
    encoder.framerate, encoder.time_base, encoder.thread_count = Fraction(25), Fraction(1, 25), 1
    parameters = {"cpu-independent": 1} | x264
    encoder.options = {"preset": preset, "x264-params": ":".join(f"{key}={value}" for key, value in parameters.items())}
    if profile:
        encoder.options |= {"profile": profile}
    packets = []
    for time, pixels_HW3 in enumerate(clip(count)):
        frame = av.VideoFrame.from_ndarray(pixels_HW3[:height], format="rgb24").reformat(format=pixels)
        frame.pts = time
        packets += encoder.encode(frame)
    return [bytes(packet) for packet in packets + encoder.encode(None)]


def decode(packets: list[bytes], **options: str) -> list[av.VideoFrame]:
    decoder = av.CodecContext.create("h264", "r")
    decoder.options = options
    return [frame for packet in (*map(av.Packet, packets), None) for frame in decoder.decode(packet)]


def without_sei(packets: list[bytes]) -> list[bytes]:
    """Without SEI messages, which some packagers drop because no decoder needs them."""
    units = [packet.split(b"\0\0\1")[1:] for packet in packets]
    kept = [b"".join(b"\0\0\1" + unit.rstrip(b"\0") for unit in packet if unit[0] & 31 != 6) for packet in units]
    assert len(b"".join(kept)) < len(b"".join(packets))
    return kept


STREAMS = {
    "baseline": {"profile": "baseline"},
    "main": {"profile": "main", "bframes": 3, "b_adapt": 0},
    "high": {"bframes": 3, "b_adapt": 0, "weightp": 2, "weightb": 1, "ref": 4, "cqm": "jvt"},
    "ultrafast": {"preset": "ultrafast"},
    "interlaced": {"interlaced": 1, "bframes": 2, "b_adapt": 0},
    "slices": {"slices": 3},
    "closed short groups": {"keyint": 4, "aud": 1, "repeat-headers": 1},
    "10 bits": {"pixels": "yuv420p10le"},
    "4:2:2": {"pixels": "yuv422p"},
    "4:4:4": {"pixels": "yuv444p"},
    "grey": {"pixels": "gray"},
}


@pytest.mark.parametrize("name", STREAMS)
def test_constant_qp_is_read_as_it_was_asked_for(name: str) -> None:
    packets = encode(qp=31, ipratio=1, pbratio=1, **STREAMS[name])
    # x264 counts QPs from 0, and 10 bits shift the scale by -12
    expected = 31 - 12 * (name == "10 bits")
    frames = decode(packets, **DECODER_OPTIONS)
    assert [picture_qp(frame) for frame in frames] == [expected] * len(clip())
    assert [x264_crf(frame) for frame in frames] == [None] * len(clip())
    stream = read_h264(b"".join(packets))
    assert (stream.mean_qp, stream.crf) == (expected, None)


@pytest.mark.parametrize("name", STREAMS)
def test_rate_factor_of_any_stream(name: str) -> None:
    frames = decode(encode(crf=27, **STREAMS[name]))  # the settings need no option
    assert x264_crf(frames[0]) == 27
    assert {x264_crf(frame) for frame in frames[1:] if not frame.key_frame} == {None}
    assert {picture_qp(frame) for frame in frames} == {None}


def test_pictures_have_the_qp_that_x264_was_given() -> None:
    """The QPs of I and B pictures follow from their ratios to that of P pictures."""
    packets = encode(qp=30, bframes=2, **{"b-adapt": 0, "ipratio": 1.5, "pbratio": 1.3})
    by_type = {frame.pict_type: picture_qp(frame) for frame in decode(packets, **DECODER_OPTIONS)}
    kinds = av.video.frame.PictureType
    assert by_type == {kinds.I: 30 - round(6 * np.log2(1.5)), kinds.P: 30, kinds.B: 30 + round(6 * np.log2(1.3))}


def test_rate_factor() -> None:
    assert read_h264(b"".join(encode(crf=18.5))).crf == 18.5
    assert read_h264(b"".join(encode(qp=20))).crf is None
    assert read_h264(b"".join(encode(bitrate=300))).crf is None
    # a VBV can force a lower quality than the rate factor
    assert read_h264(b"".join(encode(crf=23, **{"vbv-maxrate": 50, "vbv-bufsize": 50}))).crf is None


def test_streams_without_settings_have_qps() -> None:
    packets = encode(crf=24)
    with_it, without = read_h264(b"".join(packets)), read_h264(b"".join(without_sei(packets)))
    assert (with_it.crf, without.crf) == (24, None)
    assert with_it.mean_qp == without.mean_qp


# CRF to the mean QP in the slice headers of `clip()`
SLICES = {15: 21.92, 18: 24.92, 21: 27.92, 24: 30.92, 30: 36.92, 40: 46.92}


def test_macroblock_qp_rises_with_the_rate_factor() -> None:
    streams = {crf: read_h264(b"".join(encode(crf=crf))) for crf in SLICES}
    assert {crf: stream.crf for crf, stream in streams.items()} == {crf: crf for crf in SLICES}
    qps = [stream.mean_qp for stream in streams.values()]
    assert qps == sorted(qps)
    assert np.diff(qps) == pytest.approx(np.diff(list(SLICES)), abs=2)
    assert qps == pytest.approx(list(SLICES.values()), abs=1)


@pytest.mark.parametrize("container", ["mp4", "mpegts", "matroska", "h264"])
def test_containers_by_frame(container: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as target:
        stream = target.add_stream("libx264", rate=25, options={"crf": "22"})
        stream.width, stream.height, stream.pix_fmt = W - 2, H - 6, "yuv420p"  # cropped
        for pixels in clip():
            target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels[:-6, :-2], format="rgb24")))
        target.mux(stream.encode(None))
    quality, qps = H264Quality(), []
    with av.open(io.BytesIO(file.getvalue())) as source:
        source.streams.video[0].codec_context.options = DECODER_OPTIONS
        for frame in source.decode(video=0):
            quality.add(frame)
            qps.append(picture_qp(frame))
    assert len(qps) == len(clip())
    assert quality.crf == 22
    assert quality.mean_qp == pytest.approx(np.mean(qps))


def test_macroblocks_are_where_ffmpeg_puts_them() -> None:
    (frame, *_) = decode(encode(crf=24), **DECODER_OPTIONS)
    params = frame.side_data["VIDEO_ENC_PARAMS"]
    assert params.qp_map().std() > 0
    assert picture_qp(frame) == pytest.approx(params.qp_map().mean())


def test_a_frame_that_is_no_h264_has_no_qp() -> None:
    frame = av.VideoFrame.from_ndarray(clip()[0], format="rgb24")
    assert (picture_qp(frame), x264_crf(frame)) == (None, None)


def test_memory_does_not_grow_and_old_pictures_fade() -> None:
    coarse, fine = (decode(encode(qp=qp), **DECODER_OPTIONS) for qp in (40, 20))
    quality = H264Quality()
    assert quality.mean_qp is None
    for frame in coarse + fine * 10:
        quality.add(frame)
    assert quality.mean_qp is not None
    assert quality.mean_qp < 25


def test_another_encoding_is_noticed_by_its_settings() -> None:
    quality = H264Quality()
    for frame in decode(encode(crf=40), **DECODER_OPTIONS):
        quality.add(frame)
    assert quality.crf == 40
    bounded = decode(encode(crf=20, **{"vbv-maxrate": 5000, "vbv-bufsize": 5000}), **DECODER_OPTIONS)
    quality.add(bounded[0])
    assert quality.crf is None
    assert quality.mean_qp == pytest.approx(mean_qp(bounded), abs=3)


def mean_qp(frames: list[av.VideoFrame]) -> float:
    return statistics.fmean(qp for frame in frames if (qp := picture_qp(frame)) is not None)


def means(frames: list[av.VideoFrame]) -> list[float]:
    """The mean QP after each frame of a stream."""
    quality, values = H264Quality(), []
    for frame in frames:
        quality.add(frame)
        assert quality.mean_qp is not None
        values.append(quality.mean_qp)
    return values


CODINGS = {
    "P pictures alone": {"bframes": 0, "keyint": 25},
    "B pictures": {"bframes": 3, "keyint": 25, "scenecut": 0},
    "short groups": {"bframes": 2, "keyint": 10, "min_keyint": 10},
    "other ratios": {"bframes": 3, "keyint": 25, "ipratio": 1.6, "pbratio": 1.6},
    "equal ratios": {"bframes": 3, "keyint": 25, "ipratio": 1, "pbratio": 1, "mbtree": 0},
}


@functools.cache
def coded(coding: str, crf: int) -> list[av.VideoFrame]:
    """Frames of a stream that does not say what it was encoded with."""
    return decode(without_sei(encode(count=100, preset="veryfast", crf=crf, **CODINGS[coding])), **DECODER_OPTIONS)


@pytest.mark.parametrize("coding", CODINGS)
def test_where_nothing_changes_it_is_the_mean_of_the_latest_64_pictures(coding: str) -> None:
    """To a QP, because after the first 16 not every picture is read."""
    frames = coded(coding, 30)
    plain = [mean_qp(frames[max(0, last - 63) : last + 1]) for last in range(len(frames))]
    found = means(frames)
    assert found[:16] == pytest.approx(plain[:16])
    assert found == pytest.approx(plain, abs=1)


@pytest.mark.parametrize(("before", "after"), [(20, 30), (30, 20), (22, 42)])
@pytest.mark.parametrize("coding", [name for name in CODINGS if name != "equal ratios"])
def test_a_change_of_quality_counts_on_its_keyframe(coding: str, before: int, after: int) -> None:
    old, new = coded(coding, before), coded(coding, after)
    changed, lasting = means(old + new)[100:], mean_qp(new[:64])
    assert lasting - mean_qp(old) == pytest.approx(after - before, abs=1)
    assert changed == pytest.approx([lasting] * 100, abs=2)
    assert changed[63:] == pytest.approx(means(new)[63:], abs=1)  # by then the old pictures are forgotten


@pytest.mark.parametrize("coding", ["P pictures alone", "B pictures", "short groups"])
def test_a_rendition_that_says_nothing_is_found_from_its_first_picture_on(coding: str) -> None:
    qps = {f"h264-crf{crf}": mean_qp(coded(coding, crf)) for crf in (20, 30, 42)}
    level_estimator = LevelEstimator(list(qps), Reference(H, W, 100.0, 0.2, level_qp=qps))
    stream, quality, found = (20, 42, 30, 20), H264Quality(), []
    for frame in (frame for crf in stream for frame in coded(coding, crf)):
        quality.add(frame)
        found.append(level_estimator.estimate(Evidence(H, W, 100.0, qp=quality.mean_qp, crf=quality.crf)).level)
    assert found[1:] == [f"h264-crf{crf}" for crf in stream for _ in range(100)][1:]


def test_only_a_keyframe_begins_another_quality() -> None:
    """A coarse picture amid a group, such as after a burst of motion, counts as one of 64."""
    old, new = coded("P pictures alone", 22), coded("P pictures alone", 42)
    burst = [frame for frame in new if not frame.key_frame][:3]
    steps = [abs(later - earlier) for earlier, later in pairwise(means(old[:80] + burst))]
    assert max(steps[64:]) < 1


def test_without_keyframes_it_follows_within_64_pictures() -> None:
    """Such as with intra refresh, where an encoder raises its QP amid an endless group."""
    old, new = coded("P pictures alone", 22), [frame for frame in coded("P pictures alone", 42) if not frame.key_frame]
    assert means(old + new[:72])[-1] == pytest.approx(mean_qp(new[8:72]), abs=1.5)


def test_qps_are_read_only_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[av.VideoFrame] = []
    monkeypatch.setattr("gearnn_ray.serving.h264.picture_qp", lambda frame: read.append(frame) or picture_qp(frame))
    silent = coded("P pictures alone", 30)
    means(silent)
    assert len(read) <= 16 + len(silent) / 7 + sum(frame.key_frame for frame in silent)
    read.clear()
    means(decode(encode(count=100, preset="veryfast", crf=30, keyint=25), **DECODER_OPTIONS))
    assert len(read) == 16


def test_a_rate_factor_that_ends_gives_way_to_the_qps() -> None:
    told = decode(encode(count=100, preset="veryfast", crf=22), **DECODER_OPTIONS)
    bounded = encode(preset="veryfast", crf=40, **{"vbv-maxrate": 5000, "vbv-bufsize": 5000})
    quality, new = H264Quality(), decode(bounded, **DECODER_OPTIONS)
    for frame in (*told, *new):
        quality.add(frame)
    assert quality.crf is None
    assert quality.mean_qp == pytest.approx(mean_qp(new), abs=2)


def alive() -> int:
    return sum(type(each) is av.VideoFrame for each in gc.get_objects())


def test_a_frame_that_was_read_needs_no_garbage_collection() -> None:
    """Else decoders take new memory for every frame until Python's next collection."""
    decoder = av.CodecContext.create("h264", "r")
    decoder.options = DECODER_OPTIONS
    packets = [av.Packet(packet) for packet in encode(crf=30, bframes=0)]
    gc.collect()
    gc.disable()
    try:
        quality, before = H264Quality(), alive()
        for packet in (*packets, None):
            for frame in decoder.decode(packet):
                quality.add(frame)
        del frame, decoder  # which keeps a frame for the next picture
        assert alive() == before
    finally:
        gc.enable()


def test_another_frame_size_is_another_encoding() -> None:
    """A rate factor that the first rendition wrote says nothing about the second one."""
    quality = H264Quality()
    for frame in decode(encode(crf=40), **DECODER_OPTIONS):
        quality.add(frame)
    smaller = encode(crf=38, height=H - 16)
    silent, told = (decode(packets, **DECODER_OPTIONS) for packets in (without_sei(smaller), smaller))
    quality.add(silent[0])
    assert quality.crf is None
    assert quality.mean_qp == pytest.approx(mean_qp(silent), abs=4)
    quality.add(silent[1])
    quality.add(told[0])
    assert quality.crf == 38
    quality.add(told[1])
    assert quality.crf == 38


def test_equal_settings_at_another_size_keep_the_rate_factor_but_not_the_pictures() -> None:
    quality = H264Quality()
    large, small = (decode(encode(crf=30, height=height), **DECODER_OPTIONS) for height in (H, H - 16))
    for frame in large:
        quality.add(frame)
    quality.add(small[0])
    assert quality.crf == 30
    assert len(quality._recent) == 1


@pytest.mark.parametrize("codec", ["libvpx-vp9", "mpeg2video"])
def test_quantisers_of_other_codecs_are_not_qps(codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = W, H, "yuv420p"
    encoder.framerate, encoder.time_base = Fraction(25), Fraction(1, 25)
    frames = [av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p") for pixels in clip()[:4]]
    for time, frame in enumerate(frames):
        frame.pts = time
    packets = [packet for frame in (*frames, None) for packet in encoder.encode(frame)]
    decoder = av.CodecContext.create(codec.removeprefix("libvpx-"), "r")
    decoder.options = DECODER_OPTIONS
    decoded = [frame for packet in (*packets, None) for frame in decoder.decode(packet)]
    assert any("VIDEO_ENC_PARAMS" in {data.type.name for data in frame.side_data} for frame in decoded)
    assert {picture_qp(frame) for frame in decoded} == {None}


def test_a_damaged_picture_has_no_qp() -> None:
    packets = encode(qp=33, ipratio=1, pbratio=1, bframes=0)
    broken = [packets[0], packets[1][: len(packets[1]) // 2], *packets[2:]]
    qps = [picture_qp(frame) for frame in decode(broken, **DECODER_OPTIONS)]
    assert qps[:2] == [33, None]
    assert set(qps) == {33, None}
    with pytest.raises(UserError, match=r"damaged.*\.$"):
        read_h264(b"".join(broken))


@given(st.binary(max_size=300), st.sampled_from([b"", b"\0\0\1", b"\0\0\1\x67", b"\0\0\1\x06\5"]))
@settings(max_examples=100, deadline=None)
def test_any_bytes_raise_nothing_but_user_errors(data: bytes, before: bytes) -> None:
    _read_or_refuse(before + data)


def _read_or_refuse(data: bytes) -> None:
    sentence = ""
    try:
        assert -36 <= (read_h264(data).mean_qp or 0) <= 51
    except UserError as error:
        sentence = str(error)
    assert re.fullmatch(r"([^\n]+\.)?", sentence)


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 2**20,
        b"\0\0\1" * 2**18,
        b"\0\0\1\x06" + b"\5\0" * 2**19,  # a million empty messages
        b"\0\0\1\x06" + b"\xff" * 2**20,
        b"\0\0\1\x67" + b"\x55" * 2**20,
        b"\0\0\1\x68" + b"\xff" * 2**20,
    ],
)
def test_nothing_takes_long(data: bytes) -> None:
    start = monotonic()
    _read_or_refuse(data)
    assert monotonic() - start < 5  # seconds


@pytest.mark.parametrize("data", [b"", b"RIFF....AVI ", b"\x89PNG\r\n\x1a\n" + b"\1" * 50, b"\0\0\0\1\x09\x10"])
def test_what_is_no_stream_is_refused_in_one_sentence(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^\d+ bytes (are not H\.264|contain no H\.264 picture).*\.$"):
        read_h264(data)


def test_a_stream_joined_before_its_parameter_sets_is_refused() -> None:
    with pytest.raises(UserError, match="whole Annex B stream"):
        read_h264(b"".join(encode(crf=23)[1:]))
