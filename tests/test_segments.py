"""Video segments: recognised, checked to their end without decoding, opened without opening anything else."""

import io
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gearnn_ray.serving.frames import Limits
from gearnn_ray.video.decoding import VideoFrame
from gearnn_ray.video.segments import HEAD_BYTES, Mp4Tables, SegmentError, container_of
from gearnn_ray.video.sources import SourceError
from gearnn_ray.video.upload import Upload, segment_frames, upload_frames
from tests.streams import encoded, moving, number_of, web_site

LIMITS = Limits(pixels=100_000)
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
LIVE = {"live": "1"}
# codec, container, options of the container
KINDS = [
    ("libx264", "mp4", {}),
    ("libx264", "mp4", FRAGMENTED),
    ("libx264", "mpegts", {}),
    ("libx264", "matroska", {}),
    ("libx264", "matroska", LIVE),
    ("libx264", "h264", {}),
    ("libx265", "mpegts", {}),
    ("libx265", "hevc", {}),
    ("libvpx-vp9", "webm", {}),
    ("libvpx-vp9", "webm", LIVE),
    ("libvpx-vp9", "ivf", {}),
    ("libsvtav1", "mp4", {}),
    ("libsvtav1", "obu", {}),
]
NAMES = [f"{codec}-{container}{'-live' if options else ''}" for codec, container, options in KINDS]
SEGMENTS = {
    name: encoded(moving(6, 64, 80), codec, container, muxing=options)
    for name, (codec, container, options) in zip(NAMES, KINDS, strict=True)
}


def frames_of(data: bytes, most: int = 100, limits: Limits = LIMITS) -> list[VideoFrame]:
    return list(segment_frames(data, limits, most))


def refused(data: bytes, most: int = 100) -> tuple[int, str]:
    """Status and sentence of the refusal of a segment."""
    with pytest.raises(SourceError) as caught:
        frames_of(data, most)
    assert "\n" not in str(caught.value)
    return caught.value.status, str(caught.value)


def uploaded(data: bytes, size: int = 500, seconds: float = 5.0, most: int = 10**6) -> Iterator[VideoFrame]:
    """The frames of an upload that arrives in pieces of this size."""
    upload = Upload(most, seconds)

    def feed() -> None:
        for place in range(0, len(data), size):
            upload.add(data[place : place + size])
        upload.end()

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield from upload_frames(upload, LIMITS)
    finally:
        thread.join()


@pytest.mark.parametrize("name", NAMES)
def test_a_segment_gives_every_frame_whole_or_in_pieces(name: str) -> None:
    for frames in (frames_of(SEGMENTS[name]), list(uploaded_or_whole(name))):
        assert [number_of(frame.pixels) for frame in frames] == list(range(6))
        assert frames[0].keyframe


def uploaded_or_whole(name: str) -> Iterator[VideoFrame]:
    """An MP4 that is not fragmented has its index at its end."""
    return uploaded(SEGMENTS[name]) if name not in ("libx264-mp4", "libsvtav1-mp4") else iter(frames_of(SEGMENTS[name]))


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 400, "empty"),
        (b"hello", 415, "no video container"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n", 415, "playlist"),
        (b"\xef\xbb\xbf\n#EXTM3U\nhttp://169.254.169.254/a.ts\n", 415, "playlist"),
        (b'<?xml version="1.0"?>\n<MPD><BaseURL>http://10.0.0.1/</BaseURL></MPD>', 415, "playlist"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", 415, "no video container"),
        (b"\xff\xd8\xff\xe0" + bytes(100), 415, "no video container"),
        (b"\0\0\1\xb3" + bytes(100), 415, "neither H.264 nor H.265"),
        (b"\0\0\0\1", 415, "no video container"),
        (b"\0\0\0\x18ftypmp42" + bytes(12), 400, "damaged"),
        (b"G" + bytes(100), 415, "no video container"),
        ((b"G" + bytes(187)) * 10, 400, "damaged"),
        (b"\x1aE\xdf\xa3\x80", 400, "damaged"),
        (b"DKIF" + bytes(28), 400, "damaged"),
        (b"DKIF\0\0\x20\0VP80" + struct.pack("<HHIII", 80, 64, 10, 1, 1) + bytes(4 + 12), 415, "vp8"),
        (b"\x12\x00", 422, "keyframe"),
    ],
)
def test_what_is_no_segment_is_refused_in_one_sentence(data: bytes, status: int, words: str) -> None:
    found, sentence = refused(data)
    assert words in sentence
    assert found == status


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("libx264-h264", "libx265-hevc")])
def test_a_segment_that_is_cut_off_anywhere_gives_no_frame(name: str) -> None:
    data = SEGMENTS[name]
    for end in range(1, len(data) - 1, max(1, len(data) // 40)):
        with suppress(SourceError):
            assert len(frames_of(data[:end])) < 6  # cut between two elements, which only a stream without an index has
            assert name not in ("libx264-mp4", "libvpx-vp9-webm", "libx264-matroska")


def test_a_last_picture_that_is_cut_off_ends_the_frames_with_a_sentence() -> None:
    data = SEGMENTS["libx264-h264"]
    frames = segment_frames(data[: len(data) * 2 // 3], LIMITS, 100)
    assert number_of(next(frames).pixels) == 0
    with pytest.raises(SegmentError, match="last picture"):
        list(frames)


def test_a_segment_without_a_keyframe_at_its_beginning() -> None:
    frames = moving(8, 64, 80)
    data = encoded(frames, container="h264", g=100, **{"x264-params": "annexb=1:repeat-headers=1:aud=1"})
    second = data.index(b"\0\0\0\1\x09", 4)
    assert refused(data[second:]) == (422, "the segment does not begin with a keyframe: cut the stream where one is")


def test_too_many_frames_are_refused_before_they_are_decoded() -> None:
    for name in ("libx264-mpegts", "libx264-h264", "libx264-mp4"):
        status, sentence = refused(SEGMENTS[name], most=5)
        assert status == 413
        assert "5 frames" in sentence
    assert len(frames_of(SEGMENTS["libx264-mpegts"], most=6)) == 6


def test_a_size_beyond_the_limit_is_refused_before_anything_is_decoded() -> None:
    large = encoded(moving(2, 480, 640))
    assert refused(large)[0] == 413
    small = encoded([np.zeros((8, 640, 3), np.uint8)] * 2, "libvpx-vp9", "webm")
    assert refused(small)[0] == 422


def test_a_claim_of_100_000_by_100_000_pixels_allocates_nothing() -> None:
    webm = bytearray(SEGMENTS["libvpx-vp9-webm"])
    for name, found in ((b"\xb0\x81", 80), (b"\xba\x81", 64)):  # PixelWidth and PixelHeight of one byte
        place = webm.index(name + bytes([found]))
        webm[place + 2] = 0xFF
    with pytest.raises(SourceError, match="255 × 255"):
        frames_of(bytes(webm), limits=Limits(pixels=20_000))
    before = psutil.Process().memory_info().rss
    for side in (16_000, 100_000):
        data = claiming(side, side)
        assert refused(data)[0] in (413, 422)
        with pytest.raises(SourceError):
            list(uploaded(data))
    assert psutil.Process().memory_info().rss - before < 200 * 2**20


def claiming(height: int, width: int) -> bytes:
    """H.264 whose parameters claim pictures of this size, followed by a few bytes of slices."""

    def u(value: int, bits: int) -> str:
        return format(value, f"0{bits}b")

    def ue(value: int) -> str:
        digits = format(value + 1, "b")
        return "0" * (len(digits) - 1) + digits

    def unit(header: int, *fields: str) -> bytes:
        bits = "".join(fields) + "1"
        bits += "0" * (-len(bits) % 8)
        payload = int(bits, 2).to_bytes(len(bits) // 8)
        return b"\0\0\0\1" + bytes([header]) + payload.replace(b"\0\0\0", b"\0\0\3\0")

    parameters = (u(66, 8), u(0, 8), u(62, 8), ue(0), ue(0), ue(2), ue(1), "0")
    sequence = unit(0x67, *parameters, ue(width // 16 - 1), ue(height // 16 - 1), "1100")
    picture = unit(0x68, ue(0), ue(0), "00", ue(0), ue(0), ue(0), "000", ue(0), ue(0), ue(0), "000")
    return sequence + picture + (unit(0x65, ue(0), ue(7), ue(0), u(0, 4), ue(0), "00", ue(0)) + b"\x88" * 300) * 3


def box(kind: bytes, *parts: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)


def bombs(samples: int, runs: int = 1) -> dict[str, bytes]:
    """MP4s with tables of a few bytes that claim this many frames each."""
    fragmented = SEGMENTS["libx264-mp4-live"]
    run = box(b"trun", struct.pack(">II", 0, samples)) * runs
    header = box(b"tfhd", struct.pack(">IIII", 0x020018, 1, 512, 10))
    fragment = box(b"moof", box(b"mfhd", struct.pack(">II", 0, 1)), box(b"traf", header, run)) + box(b"mdat", bytes(100))
    whole = bytearray(SEGMENTS["libx264-mp4"])
    sizes, chunks = whole.index(b"stsz"), whole.index(b"stsc")
    whole[sizes + 8 : sizes + 16] = struct.pack(">II", 10, samples)
    whole[chunks + 16 : chunks + 20] = struct.pack(">I", samples)
    return {"trun": fragmented[: fragmented.index(b"moof") - 4] + fragment, "stsz": bytes(whole)}


@pytest.mark.parametrize("table", ["trun", "stsz"])
def test_a_table_that_claims_millions_of_frames_allocates_nothing(table: str) -> None:
    before = psutil.Process().memory_info().rss
    data = bombs(50_000_000)[table]
    status, sentence = refused(data)
    assert status == 413
    assert "claims 50000000 frames" in sentence
    if table == "trun":
        for size in (1, 7, 500):
            with pytest.raises(SegmentError, match="claims 50000000 frames"):
                list(uploaded(data, size))
    assert psutil.Process().memory_info().rss - before < 100 * 2**20


@settings(max_examples=200, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 40), max_size=60),
    table=st.sampled_from([(6, 1), (1_000_000, 1), (100_000, 10), (1_002_000, 1), (100_200, 10), (2**32 - 1, 1)]),
)
def test_tables_are_counted_once_however_the_bytes_are_cut(cuts: list[int], table: tuple[int, int]) -> None:
    data, tables = bombs(*table)["trun"], Mp4Tables()
    place, refused = 0, True
    with suppress(SegmentError):
        for cut in [*cuts, len(data)]:
            tables.add(data[place : place + cut])
            place += cut
        refused = False
    assert refused == (table[0] * table[1] > 1_001_000)


def test_an_index_that_uses_the_same_bytes_again_and_again_is_refused() -> None:
    data = bytearray(encoded(moving(30, 64, 80), g=1))
    sizes = data.index(b"stsz")
    data[sizes + 8 : sizes + 12] = struct.pack(">I", len(data) // 2)  # every frame: half of the file
    assert refused(bytes(data))[0] == 400


def test_a_fragment_needs_its_initialisation() -> None:
    data = SEGMENTS["libx264-mp4-live"]
    assert refused(data[data.index(b"moof") - 4 :])[0] == 422


def test_an_mp4_with_its_index_at_the_end_cannot_be_decoded_while_it_arrives() -> None:
    with pytest.raises(SegmentError, match="no index"):
        list(uploaded(SEGMENTS["libx264-mp4"]))


def test_other_codecs_and_sound_are_refused() -> None:
    status, sentence = refused(encoded(moving(3, 64, 80), "mpeg4"))
    assert (status, "mpeg4" in sentence) == (415, True)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        output.mux([*sound.encode(frame), *sound.encode(None)])
    assert refused(file.getvalue())[0] == 422


def test_a_sound_that_begins_in_the_middle_ends_no_video() -> None:
    """PyAV fails at the end of a transport stream to which a stream was added."""
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts") as output:
        video, sound = output.add_stream("libx264", rate=10), output.add_stream("aac", rate=8000)
        video.height, video.width, video.pix_fmt = 64, 80, "yuv420p"
        for number, pixels in enumerate(moving(6, 64, 80)):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts = number
            output.mux(video.encode(picture))
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        heard.rate = 8000
        output.mux([*video.encode(None), *sound.encode(heard), *sound.encode(None)])
    data = SEGMENTS["libx264-mpegts"] + file.getvalue()
    for frames in (frames_of(data), list(uploaded(data))):
        assert [number_of(frame.pixels) for frame in frames] == [*range(6), *range(6)]


def test_nothing_that_a_segment_names_is_fetched(tmp_path: Path) -> None:
    """A playlist names segments, and an MP4 may say that its frames are in another file."""
    (tmp_path / "secret.mp4").write_bytes(SEGMENTS["libx264-mp4"])
    with web_site(tmp_path) as (address, asked):
        for place in (f"{address}/secret.mp4", f"file://{tmp_path}/secret.mp4"):
            playlist = f"#EXTM3U\n#EXTINF:1,\n{place}\n#EXT-X-ENDLIST\n".encode()
            for body in (playlist, elsewhere(place), elsewhere("secret.mp4"), SEGMENTS["libx264-mpegts"] + playlist):
                with suppress(SourceError):
                    frames_of(body)
                with suppress(SourceError):
                    list(uploaded(body))
    assert asked == []


def elsewhere(place: str) -> bytes:
    """An MP4 whose frames are at this address."""
    data, name = bytearray(SEGMENTS["libx264-mp4"]), place.encode() + b"\0"
    flags = data.index(b"url \0\0\0\1") + 4
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref", b"url "):
        size = data.index(kind) - 4
        data[size : size + 4] = struct.pack(">I", struct.unpack_from(">I", data, size)[0] + len(name))
    data[flags : flags + 4] = bytes(4) + name  # 1: in this file
    return bytes(data)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_arrives_gives_frames_or_one_sentence(data: st.DataObject) -> None:
    """Random bytes, and segments that are cut off or damaged: never another exception."""
    body = bytearray(SEGMENTS[data.draw(st.sampled_from(NAMES))])
    match data.draw(st.sampled_from(["random", "cut", "damaged", "begun"])):
        case "random":
            body[:] = data.draw(st.binary(max_size=400))
        case "begun":
            body[data.draw(st.integers(4, 300)) :] = data.draw(st.binary(max_size=400))
        case "cut":
            del body[data.draw(st.integers(0, len(body))) :]
        case "damaged":
            for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), max_size=20)):
                body[place] = value
    for frames in (segment_frames(bytes(body), LIMITS, 100), uploaded(bytes(body))):
        problem: SourceError | None = None
        try:
            for frame in frames:
                assert frame.pixels.shape[0] * frame.pixels.shape[1] <= LIMITS.pixels
        except SourceError as error:
            problem = error
        assert problem is None or (400 <= problem.status < 500 and "\n" not in str(problem))


# ---- uploads


def test_frames_of_an_upload_come_before_its_end() -> None:
    data, upload = encoded(moving(20, 64, 80), container="mpegts", g=5), Upload(10**6, 5.0)
    upload.add(data[: len(data) // 2])
    frames = upload_frames(upload, LIMITS)
    assert [number_of(next(frames).pixels) for _ in range(3)] == [0, 1, 2]
    upload.add(data[len(data) // 2 :])
    upload.end()
    assert [number_of(frame.pixels) for frame in frames] == list(range(3, 20))


@pytest.mark.parametrize("sent", [0, HEAD_BYTES, 4000])
def test_an_upload_that_brings_no_frame_ends(sent: int) -> None:
    data, upload = SEGMENTS["libx264-mpegts"], Upload(10**6, 0.3)
    upload.add(data[:sent])
    start = time.monotonic()
    with pytest.raises(SegmentError, match=r"no frame has arrived for 0\.3 seconds") as caught:
        list(upload_frames(upload, LIMITS))
    assert caught.value.status == 408
    assert time.monotonic() - start < 3


def test_a_byte_now_and_then_does_not_keep_an_upload_alive() -> None:
    upload = Upload(10**6, 0.5)
    stop = threading.Event()

    def drip() -> None:
        for byte in SEGMENTS["libx264-mpegts"]:
            if stop.wait(0.02):
                return
            upload.add(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    with pytest.raises(SegmentError, match="no frame"):
        list(upload_frames(upload, LIMITS))
    stop.set()
    thread.join()


def test_an_upload_that_is_far_ahead_of_its_processing_ends() -> None:
    upload = Upload(most=10_000, seconds=5.0)
    frames = upload_frames(upload, LIMITS)
    data = encoded(moving(60, 64, 80), container="mpegts")
    assert len(data) > 20_000
    upload.add(data[:8000])
    next(frames)
    for place in range(8000, len(data), 1000):
        upload.add(data[place : place + 1000])
    with pytest.raises(SegmentError, match="pace") as caught:
        list(frames)
    assert caught.value.status == 413


def test_the_reason_for_an_early_end_is_told() -> None:
    upload = Upload(10**6, 5.0)
    upload.add(SEGMENTS["libx264-mpegts"][:3000])
    upload.end(SourceError("the connection ended"))
    with pytest.raises(SourceError, match="the connection ended"):
        list(upload_frames(upload, LIMITS))


def test_the_first_bytes_decide() -> None:
    assert {name: container_of(data[:HEAD_BYTES]) for name, data in SEGMENTS.items()} == {
        name: {"mp4": "mov", "webm": "matroska"}.get(kind[1], kind[1]) for name, kind in zip(NAMES, KINDS, strict=True)
    }
