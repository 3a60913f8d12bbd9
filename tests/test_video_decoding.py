"""Decoding: every frame once and in order, with what the stream says of it, whatever the stream does."""

import io
import os
from collections.abc import Iterator
from contextlib import suppress

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gearnn_ray.serving.frames import Limits
from gearnn_ray.video.decoding import DEFAULT_LIMITS, TooLargeError, VideoFrame, decoded
from gearnn_ray.video.sources import FORMATS, SourceError
from tests.streams import encoded, moving, number_of, transport_stream


def frames_in(data: bytes, limits: Limits = DEFAULT_LIMITS, threads: int = 1) -> Iterator[VideoFrame]:
    with av.open(io.BytesIO(data), options={"format_whitelist": FORMATS}) as container:
        yield from decoded(container, limits, threads)


CODECS = {
    "libx264": ("mp4", "mpegts", "matroska", "h264"),
    "libx265": ("mp4", "mpegts", "hevc"),
    "libvpx-vp9": ("webm", "ivf"),
    "libsvtav1": ("mp4", "obu"),
    "mjpeg": ("avi",),
}


@pytest.mark.parametrize(("codec", "container"), [(codec, each) for codec in CODECS for each in CODECS[codec]])
def test_every_frame_once_and_in_order(codec: str, container: str) -> None:
    frames = list(frames_in(encoded(moving(10, 96, 128), codec, container)))
    assert [number_of(frame.pixels) for frame in frames] == list(range(10))
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "neither the codec nor its test keeps the machine to itself"
    assert frames[0].keyframe
    assert all(frame.bytes > 0 for frame in frames[:1])
    assert sum(frame.lost for frame in frames) == 0


def test_pictures_that_are_coded_out_of_order_are_shown_in_order() -> None:
    data = encoded(moving(20), container="mpegts", preset="medium", bf=3, g=20)
    frames = list(frames_in(data))
    assert [number_of(frame.pixels) for frame in frames] == list(range(20))
    seconds = [frame.seconds for frame in frames if frame.seconds is not None]
    assert seconds == sorted(seconds)


def test_a_variable_frame_rate_keeps_its_times() -> None:
    times = [0, 1, 5, 6, 30, 31]
    frames = list(frames_in(encoded(moving(6), times=times)))
    start = frames[0].seconds or 0.0
    assert [round(10 * ((frame.seconds or 0.0) - start)) for frame in frames] == times


def test_a_clock_that_jumps_loses_no_frame() -> None:
    first, second = (encoded(moving(5), container="mpegts", start=start) for start in (0, 90_000))
    frames = list(frames_in(first + second + first))
    assert [number_of(frame.pixels) for frame in frames] == [*range(5)] * 3


@pytest.mark.parametrize(("height", "width"), [(50, 66), (51, 67), (17, 33)])
def test_an_odd_size(height: int, width: int) -> None:
    frames = [np.full((height, width, 3), 90, np.uint8)] * 3
    found = list(frames_in(encoded(frames, "libvpx-vp9", "webm")))
    assert [frame.pixels.shape for frame in found] == [(height, width, 3)] * 3
    assert abs(int(found[0].pixels.mean()) - 90) < 4


def test_a_4k_frame() -> None:
    frame = np.zeros((2160, 3840, 3), np.uint8)
    found = list(frames_in(encoded([frame], container="mpegts")))
    assert found[0].pixels.shape == (2160, 3840, 3)


def test_frames_beyond_the_limit_are_not_decoded() -> None:
    data = encoded(moving(3, 480, 640), container="mpegts")
    with pytest.raises(TooLargeError, match="640 × 480"):
        list(frames_in(data, Limits(pixels=100_000)))


def test_a_stream_that_grows_beyond_the_limit_ends_in_one_sentence() -> None:
    data = transport_stream([moving(5), moving(5, 480, 640)])
    with pytest.raises(SourceError, match=r"pixels|picture"):
        list(frames_in(data * 20, Limits(pixels=100_000)))


def test_damage_in_the_middle_is_counted_and_mended_by_the_next_keyframe() -> None:
    data = bytearray(encoded(moving(40, 96, 128), container="mpegts", g=5, preset="medium"))
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    frames = list(frames_in(bytes(data)))
    assert 20 <= len(frames) <= 40
    assert [number_of(frame.pixels) for frame in frames[:10]] == list(range(10))
    assert [number_of(frame.pixels) for frame in frames[-5:]] == [n % 28 for n in range(35, 40)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(where=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=40), cut=st.floats(0, 1))
def test_whatever_is_damaged_gives_frames_or_one_sentence(where: list[tuple[float, int]], cut: float) -> None:
    data = bytearray(_WHOLE)
    for place, value in where:
        data[min(int(place * len(data)), len(data) - 1)] = value
    # errors of FFmpeg are those of av.open, which `sources` and `segments` put into a sentence
    with suppress(SourceError, av.FFmpegError):
        for frame in frames_in(bytes(data[: max(1, int(len(data) * cut))])):
            assert frame.pixels.shape == (48, 64, 3)


_WHOLE = encoded(moving(8), container="mpegts", g=4)


def test_a_file_without_video() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        output.mux(sound.encode(frame) + sound.encode(None))
    with pytest.raises(SourceError, match="there is no video"):
        list(frames_in(file.getvalue()))


def test_h264_says_its_rate_factor_and_its_qp() -> None:
    frames = list(frames_in(encoded(moving(6), container="mpegts", crf=31)))
    assert {frame.evidence.crf for frame in frames} == {31.0}
    assert all(frame.evidence.qp is not None for frame in frames)


def test_motion_jpeg_says_its_quality() -> None:
    frames = list(frames_in(encoded(moving(4, 96, 128), "mjpeg", "avi")))
    assert all(frame.evidence.jpeg is not None for frame in frames)


def test_other_codecs_have_no_qp() -> None:
    for codec, container in (("libx265", "mp4"), ("libvpx-vp9", "webm"), ("libsvtav1", "mp4")):
        assert {frame.evidence.qp for frame in frames_in(encoded(moving(3, 96, 128), codec, container))} == {None}


def test_colours_are_those_that_were_encoded() -> None:
    colours = np.zeros((64, 96, 3), np.uint8)
    colours[:, :32], colours[:, 32:64], colours[:, 64:] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
    found = next(frames_in(encoded([colours] * 8, container="mpegts", crf=5)))
    inner = found.pixels[8:56, [16, 48, 80]].astype(int)
    assert abs(inner - colours[8:56, [16, 48, 80]]).max() < 12
