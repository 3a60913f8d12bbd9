"""H.264 headers: read like FFmpeg's own parser reads them, from real encoders and from every branch of the syntax."""

import functools
import io
import re
from fractions import Fraction
from pathlib import Path
from time import monotonic

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext, bitstream_filters_available
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.level import _encode
from gearnn_ray.serving.h264 import H264Reader, read_h264

H, W = 64, 96
FILM = Path(__file__).parents[2] / "shared/data/video/car-detection.mp4"

needs_x264 = pytest.mark.skipif("libx264" not in av.codecs_available, reason="this PyAV has no libx264")
needs_trace = pytest.mark.skipif("trace_headers" not in bitstream_filters_available, reason="FFmpeg traces no headers")


@functools.cache
def clip(count: int = 12) -> list[np.ndarray]:
    """A window that slides over smooth texture, with some noise."""
    rng = np.random.default_rng(0)
    wide = np.kron(rng.integers(40, 216, (H // 8, W // 8 + count, 3)), np.ones((8, 8, 1)))
    frames = [wide[:H, 3 * i : 3 * i + W] + rng.normal(0, 4, (H, W, 3)) for i in range(count)]
    return [np.clip(frame, 0, 255).astype(np.uint8) for frame in frames]


def encode(pixels: str = "yuv420p", profile: str | None = None, **x264: object) -> list[bytes]:
    """The packets of `clip()`, by libx264 with these of its own parameters."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = W, H, pixels
    encoder.framerate, encoder.time_base, encoder.thread_count = Fraction(25), Fraction(1, 25), 1
    encoder.options = {"x264-params": ":".join(f"{key}={value}" for key, value in x264.items())}
    if profile:
        encoder.options |= {"profile": profile}
    packets = []
    for time, pixels_HW3 in enumerate(clip()):
        frame = av.VideoFrame.from_ndarray(pixels_HW3, format="rgb24").reformat(format=pixels)
        frame.pts = time
        packets += encoder.encode(frame)
    return [bytes(packet) for packet in packets + encoder.encode(None)]


def traced(packets: list[bytes]) -> list[tuple[int, str]]:
    """QP and type of every slice, as FFmpeg's `trace_headers` reads them (one picture parameter set)."""
    tracer = BitStreamFilterContext("trace_headers", "h264")
    av.logging.set_level(av.logging.INFO)
    try:
        with av.logging.Capture() as logs:
            for packet in packets:
                tracer.filter(av.Packet(packet))
    finally:
        av.logging.set_level(None)
    slices, init, kind = [], 0, "?"
    for _, _, line in logs:
        if match := re.match(r"\d+ +(pic_init_qp_minus26|slice_type|slice_qp_delta) .* = (-?\d+)\n", line):
            name, value = match[1], int(match[2])
            if name == "slice_type":
                kind = "PBIPI"[value % 5]
            elif name == "pic_init_qp_minus26":
                init = 26 + value
            else:
                slices.append((init + value, kind))
    return slices


def after_lengths(annex_b: bytes, size: int = 4) -> bytes:
    units = [unit.rstrip(b"\0") for unit in annex_b.split(b"\0\0\1")[1:]]
    return b"".join(len(unit).to_bytes(size) + unit for unit in units)


STREAMS = {
    "baseline": {"profile": "baseline"},
    "main": {"profile": "main", "bframes": 3, "b_adapt": 0},
    "high": {"bframes": 3, "b_adapt": 0, "weightp": 2, "weightb": 1, "ref": 4, "cqm": "jvt"},
    "interlaced": {"interlaced": 1, "bframes": 2, "b_adapt": 0},
    "fake interlaced": {"fake-interlaced": 1},
    "slices": {"slices": 3},
    "closed short groups": {"keyint": 4, "aud": 1, "repeat-headers": 1},
    "10 bits": {"pixels": "yuv420p10le"},
    "4:2:2": {"pixels": "yuv422p"},
    "4:4:4": {"pixels": "yuv444p"},
    "grey": {"pixels": "gray"},
    "lengths": {"annexb": 0},
}


@needs_x264
@pytest.mark.parametrize("name", STREAMS)
def test_constant_qp_is_read_as_it_was_asked_for(name: str) -> None:
    packets = encode(qp=31, ipratio=1, pbratio=1, **STREAMS[name])
    stream = read_h264(b"".join(packets))
    assert (stream.height, stream.width, stream.crf) == (H, W, None)
    assert len(stream.pictures) == len(packets) == len(clip())
    # x264 counts from the least QP, which two bits more put 12 lower
    assert {picture.qp for picture in stream.pictures} == {31 - 12 * (name == "10 bits")}
    assert stream.mean_qp == stream.pictures[0].qp
    assert {picture.slices for picture in stream.pictures} == {3 if name == "slices" else 1}


@needs_x264
@needs_trace
@pytest.mark.parametrize("name", [name for name in STREAMS if name != "lengths"])
def test_every_slice_is_read_as_ffmpeg_reads_it(name: str) -> None:
    packets = encode(crf=27, **STREAMS[name])
    stream = read_h264(b"".join(packets))
    expected = traced(packets)
    per_picture = len(expected) // len(stream.pictures)
    assert per_picture == stream.pictures[0].slices
    assert [(p.qp, p.slice_type) for p in stream.pictures] == [
        (np.mean([qp for qp, _ in expected[i : i + per_picture]]), expected[i][1])
        for i in range(0, len(expected), per_picture)
    ]
    assert stream.crf == 27.0


@needs_x264
def test_slices_at_the_qp_that_x264_was_told() -> None:
    """By type: I and B pictures have theirs from the ratios to P's."""
    stream = read_h264(b"".join(encode(qp=30, bframes=2, **{"b-adapt": 0, "ipratio": 1.5, "pbratio": 1.3})))
    by_type = {picture.slice_type: picture.qp for picture in stream.pictures}
    assert by_type == {"I": 30 - round(6 * np.log2(1.5)), "P": 30, "B": 30 + round(6 * np.log2(1.3))}


@needs_x264
def test_rate_factor() -> None:
    assert read_h264(b"".join(encode(crf=18.5))).crf == 18.5
    assert read_h264(b"".join(encode(qp=20))).crf is None
    assert read_h264(b"".join(encode(bitrate=300))).crf is None
    # a VBV may have taken away what the rate factor promises
    assert read_h264(b"".join(encode(crf=23, **{"vbv-maxrate": 50, "vbv-bufsize": 50}))).crf is None


@needs_x264
def test_levels_of_this_package_rise_in_qp() -> None:
    streams = [
        read_h264(b"".join(bytes(packet) for packet in _encode(clip(), crf))) for crf in (15, 18, 21, 24, 30, 40)
    ]
    assert [stream.crf for stream in streams] == [15, 18, 21, 24, 30, 40]
    qps = [stream.mean_qp for stream in streams]
    assert qps == sorted(qps)
    assert np.diff(qps) == pytest.approx(np.diff([stream.crf for stream in streams]), abs=2)


@needs_x264
def test_container_packets_with_parameter_sets_apart() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=25, options={"crf": "22"})
        stream.width, stream.height, stream.pix_fmt = W - 2, H - 6, "yuv420p"  # cropped
        for pixels in clip():
            target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels[:-6, :-2], format="rgb24")))
        target.mux(stream.encode(None))
    with av.open(io.BytesIO(file.getvalue())) as source:
        extradata = bytes(source.streams.video[0].codec_context.extradata)
        packets = [bytes(packet) for packet in source.demux(video=0) if packet.size]
    assert extradata[0] == 1
    reader = H264Reader(extradata)
    assert [len(reader.feed(packet)) for packet in packets] == [1] * len(clip())
    assert (reader.height, reader.width, reader.crf) == (H - 6, W - 2, 22.0)
    whole = read_h264(b"".join(packets), extradata)
    assert whole.mean_qp == pytest.approx(reader.mean_qp)
    with pytest.raises(UserError, match="avcC record"):
        read_h264(packets[3])
    for size in range(1, len(extradata) - 8):  # behind the sets stand 4 bytes more, in High profile
        with pytest.raises(UserError, match="avcC"):
            H264Reader(extradata[:size])


@needs_x264
@pytest.mark.parametrize("size", [1, 2, 4])
def test_lengths_of_other_sizes(size: int) -> None:
    packets = encode(qp=40)
    units = packets[0].split(b"\0\0\1")[1:3]
    (sps, pps) = (unit.rstrip(b"\0") for unit in units)
    record = bytes([1, 100, 0, 30, 0xFC | size - 1, 0xE1]) + len(sps).to_bytes(2) + sps
    reader = H264Reader(record + b"\1" + len(pps).to_bytes(2) + pps)
    short = [packet for packet in packets[1:] if len(packet) < 200]
    assert short
    assert all(len(reader.feed(after_lengths(packet, size))) == 1 for packet in short)


@needs_x264
def test_a_stream_joined_in_the_middle_waits_for_its_parameter_sets() -> None:
    packets = encode(crf=23, keyint=6, **{"repeat-headers": 1, "scenecut": 0})
    reader = H264Reader()
    assert reader.mean_qp is None
    seen = [len(reader.feed(packet)) for packet in packets[1:]]
    assert seen == [0] * 5 + [1] * 6
    assert reader.mean_qp is not None


@needs_x264
def test_another_encoding_makes_a_reader_forget_the_last() -> None:
    one, other = encode(crf=20), encode(qp=40, ipratio=1, pbratio=1, ref=1, bframes=0)
    reader = H264Reader()
    for packet in one:
        reader.feed(packet)
    assert reader.crf == 20
    for packet in other:
        reader.feed(packet)
    assert (reader.crf, reader.mean_qp) == (None, 40)


@needs_x264
def test_memory_does_not_grow_and_old_pictures_fade() -> None:
    coarse, fine = encode(qp=40), encode(qp=20)
    reader = H264Reader()
    for packet in coarse + fine * 10:
        reader.feed(packet)
    assert reader.mean_qp is not None
    assert reader.mean_qp < 25


@needs_x264
def test_a_damaged_packet_leaves_the_reader_usable() -> None:
    packets = encode(qp=33, ipratio=1, pbratio=1)
    reader = H264Reader()
    reader.feed(packets[0])
    with pytest.raises(UserError):
        reader.feed(b"\0\0\0\1\x41")
    assert reader.feed(packets[1])[0].qp == 33


@pytest.mark.skipif(not FILM.exists(), reason="the film is not here")
@needs_trace
def test_a_film_of_another_encoder() -> None:
    with av.open(str(FILM)) as source:
        context = source.streams.video[0].codec_context
        extradata, size = bytes(context.extradata), (context.height, context.width)
        packets = [bytes(packet) for packet in source.demux(video=0) if packet.size]
        to_annex_b = BitStreamFilterContext("h264_mp4toannexb", source.streams.video[0])
        annex_b = [bytes(out) for packet in packets for out in to_annex_b.filter(av.Packet(packet))]
    reader = H264Reader(extradata)
    pictures = [picture for packet in packets for picture in reader.feed(packet)]
    assert [(picture.qp, picture.slice_type) for picture in pictures] == traced(annex_b)
    assert (reader.height, reader.width) == size
    assert read_h264(b"".join(annex_b)).pictures == tuple(pictures)


class Writer:
    """Writes the bits of a NAL unit."""

    def __init__(self, header: int) -> None:
        self.header, self.bits = header, ""

    def u(self, size: int, value: int) -> None:
        self.bits += f"{value:0{size}b}" if size else ""

    def ue(self, value: int) -> None:
        code = f"{value + 1:b}"
        self.bits += "0" * (len(code) - 1) + code

    def se(self, value: int) -> None:
        self.ue(2 * value - 1 if value > 0 else -2 * value)

    def nal(self) -> bytes:
        bits = self.bits + "1"
        bits += "0" * (-len(bits) % 8)
        payload = int(bits, 2).to_bytes(len(bits) // 8)
        return b"\0\0\0\1" + bytes([self.header]) + re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", payload)


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int, str, tuple[int, int]]:
    """A stream of one slice header, with any branch of 7.3.2 and 7.3.3; its QP, type and size."""

    def number(most: int, least: int = 0) -> int:
        return draw(st.integers(least, most))

    def yes() -> bool:
        return draw(st.booleans())

    def flag(writer: Writer, value: bool | None = None) -> bool:
        value = yes() if value is None else value
        writer.u(1, value)
        return value

    high = yes()
    sps = Writer(0x67)
    sps.u(8, 244 if high else 77)
    sps.u(16, 40)
    sps.ue(sps_id := number(31))
    chroma_format, planes, depth = 1, False, 8
    if high:
        sps.ue(chroma_format := number(3))
        if chroma_format == 3:
            planes = flag(sps)
        depth = 8 + number(6)
        sps.ue(depth - 8)
        sps.ue(number(6))
        flag(sps)
        if flag(sps):
            for i in range(12 if chroma_format == 3 else 8):
                if flag(sps):
                    scale = 8
                    for _ in range(16 if i < 6 else 64):
                        following = number(255)
                        sps.se((following - scale + 128) % 256 - 128)
                        scale = following
                        if scale == 0:
                            break
    sps.ue((frame_bits := number(16, 4)) - 4)
    sps.ue(order := number(2))
    order_bits, deltas = 0, False
    if order == 0:
        sps.ue((order_bits := number(16, 4)) - 4)
    elif order == 1:
        deltas = not flag(sps)
        for _ in range(2):
            sps.se(number(1000, -1000))
        sps.ue(cycle := number(4))
        for _ in range(cycle):
            sps.se(number(1000, -1000))
    sps.ue(16)  # reference frames
    flag(sps)
    across, down = number(20, 2), number(20, 2)
    sps.ue(across - 1)
    sps.ue(down - 1)
    frames_only = flag(sps)
    if not frames_only:
        flag(sps)
    flag(sps)
    fields = 1 if frames_only else 2
    width, height = 16 * across, 16 * down * fields
    if flag(sps):
        left, right, top, bottom = (number(3) for _ in range(4))
        for side in (left, right, top, bottom):
            sps.ue(side)
        subsampled = not planes
        width -= (left + right) * (2 if subsampled and chroma_format in (1, 2) else 1)
        height -= (top + bottom) * (2 if subsampled and chroma_format == 1 else 1) * fields
    flag(sps, False)

    pps = Writer(0x68)
    pps.ue(pps_id := number(255))
    pps.ue(sps_id)
    cabac, order_in_frame = flag(pps), flag(pps)
    groups = number(8, 1)
    map_type = number(6)
    pps.ue(groups - 1)
    change_bits = 0
    if groups > 1:
        pps.ue(map_type)
        if map_type == 0:
            for _ in range(groups):
                pps.ue(number(3))
        elif map_type == 2:
            for _ in range(groups - 1):
                first = number(3)
                pps.ue(first)
                pps.ue(first)
        elif map_type in (3, 4, 5):
            flag(pps)
            pps.ue((rate := number(5, 1)) - 1)
            change_bits = (-(-across * down // rate)).bit_length()  # Ceil(Log2(PicSizeInMapUnits ÷ rate + 1))
        elif map_type == 6:
            pps.ue(across * down - 1)
            for _ in range(across * down):
                pps.u((groups - 1).bit_length(), number(groups - 1))
    references = [number(15, 1), number(15, 1)]
    for count in references:
        pps.ue(count - 1)
    weighted = flag(pps)
    pps.u(2, bipred := number(2))
    least = -6 * (depth - 8)
    pps.se((init := number(51, least)) - 26)
    pps.se(number(25, -26))
    pps.se(number(12, -12))
    deblocking = flag(pps)
    flag(pps)
    redundant = flag(pps)

    idr = yes()
    kind = draw(st.sampled_from((2, 4, 7, 9))) if idr else number(9)
    is_p, is_b = kind % 5 in (0, 3), kind % 5 == 1
    reference = number(3, 1 if idr else 0)
    head = Writer(reference << 5 | (5 if idr else 1))
    head.ue(0)
    head.ue(kind)
    head.ue(pps_id)
    if planes:
        head.u(2, number(2))
    head.u(frame_bits, 0 if idr else number(2**frame_bits - 1))
    field = False
    if not frames_only and (field := flag(head)):
        flag(head)
    if idr:
        head.ue(number(65535))
    if order == 0:
        head.u(order_bits, number(2**order_bits - 1))
        if order_in_frame and not field:
            head.se(number(99, -99))
    if deltas:
        head.se(number(99, -99))
        if order_in_frame and not field:
            head.se(number(99, -99))
    if redundant:
        head.ue(0)
    if is_b:
        flag(head)
    counts = references[: 2 if is_b else 1] if is_p or is_b else []
    if counts and flag(head):
        counts = [number(15, 1) for _ in counts]
        for count in counts:
            head.ue(count - 1)
    for count in counts:
        if flag(head):
            for _ in range(number(min(count, 3), 1)):
                head.ue(number(2))
                head.ue(number(7))
            head.ue(3)
    if (weighted and is_p) or (bipred == 1 and is_b):
        chroma = chroma_format != 0 and not planes
        head.ue(number(7))
        if chroma:
            head.ue(number(7))
        for _ in range(sum(counts)):
            for numbers in (2, 4) if chroma else (2,):
                if flag(head):
                    for _ in range(numbers):
                        head.se(number(127, -128))
    if reference and idr:
        flag(head)
        flag(head)
    elif reference and flag(head):
        for operation in draw(st.lists(st.sampled_from((1, 2, 3, 4, 6)), max_size=3)):
            head.ue(operation)
            for _ in range(2 if operation == 3 else 1):
                head.ue(number(9))
        head.ue(0)
    if cabac and counts:
        head.ue(number(2))
    qp = number(51, least)
    head.se(qp - init)
    if kind % 5 in (3, 4):
        if kind % 5 == 3:
            flag(head)
        head.se(0)
    if deblocking:
        head.ue(1)
    if groups > 1 and map_type in (3, 4, 5):
        head.u(change_bits, 0)
    if cabac:
        head.bits += "1" * (-len(head.bits) % 8)
    head.u(32, number(2**32 - 1))  # some slice data
    return sps.nal() + pps.nal() + head.nal(), qp, "PBIPI"[kind % 5], (height, width)


@given(headers())
@settings(max_examples=120, deadline=None)
def test_any_header_gives_its_qp(header: tuple[bytes, int, str, tuple[int, int]]) -> None:
    data, qp, slice_type, size = header
    for stream in (read_h264(data), read_h264(after_lengths(data))):
        (picture,) = stream.pictures
        assert (picture.qp, picture.slice_type, (stream.height, stream.width)) == (qp, slice_type, size)


@needs_trace
@given(headers())
@settings(max_examples=60, deadline=None)
def test_ffmpeg_reads_the_same_headers(header: tuple[bytes, int, str, tuple[int, int]]) -> None:
    """What holds the test above to the standard and not to our own reading of it."""
    data, qp, slice_type, _ = header
    try:
        read = traced([data])
    except av.error.InvalidDataError:
        reject()  # FFmpeg refuses a few parameter sets that it finds implausible: it is no judge of those
    assert read == [(qp, slice_type)]


@functools.cache
def real() -> bytes:
    return b"".join(encode(crf=25, slices=2, bframes=2)[:4]) if "libx264" in av.codecs_available else b"\0\0\1\x67"


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_streams_raise_nothing_but_user_errors(data: st.DataObject) -> None:
    stream = bytearray(real() if data.draw(st.booleans()) else data.draw(headers())[0])
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(len(stream), 900)))
        stream[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    _read_or_refuse(bytes(stream))


@given(st.binary(max_size=300), st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_raise_nothing_but_user_errors(data: bytes, extradata: bytes) -> None:
    _read_or_refuse(data, extradata)
    _read_or_refuse(b"\0\0\1" + data)
    _read_or_refuse(b"\0\0\1\x67" + data)
    _read_or_refuse(data, b"\1" + extradata)


def _read_or_refuse(data: bytes, extradata: bytes = b"") -> None:
    sentence = ""
    try:
        read_h264(data, extradata)
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
        b"\0\0\1\x06\5"
        + b"\xff" * 4000
        + b"\0"
        + bytes.fromhex("dc45e9bde6d948b7962cd820d923eeef")
        + b"rc=crf " * 2**17,
        b"\0\0\1\x67" + b"\x55" * 2**20,
        b"\0\0\1\x67\x64\0\x28" + b"\xff" * 2**20,
        b"\0\0\1\x68" + b"\xff" * 2**20,
    ],
)
def test_nothing_takes_long(data: bytes) -> None:
    start = monotonic()
    _read_or_refuse(data)
    assert monotonic() - start < 5  # seconds; what is not linear takes hours


@pytest.mark.parametrize("data", [b"", b"RIFF....AVI ", b"\x89PNG\r\n\x1a\n" + b"\1" * 50, b"\0\0\0\1\x09\x10"])
def test_what_is_no_stream_is_refused_in_one_sentence(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^\d+ bytes (are no H\.264|hold no H\.264 picture).*\.$"):
        read_h264(data)


def test_a_qp_out_of_range_is_damage() -> None:
    for wrong in (60, 500):
        sps, pps, head = Writer(0x67), Writer(0x68), Writer(0x65)
        sps.u(24, 0x4D0028)
        for value in (0, 0, 2, 1):  # id, frame_num bits, order type, reference frames
            sps.ue(value)
        sps.u(1, 0)
        sps.ue(3)
        sps.ue(3)
        sps.u(4, 0b1100)
        pps.ue(0)
        pps.ue(0)
        pps.u(2, 0)
        for value in (0, 0, 0):
            pps.ue(value)
        pps.u(3, 0)
        for value in (0, 0, 0):
            pps.se(value)
        pps.u(3, 0)
        head.ue(0)
        head.ue(7)
        head.ue(0)
        head.u(4, 0)
        head.ue(0)
        head.u(2, 0)
        head.se(wrong - 26)
        with pytest.raises(UserError, match="slice_qp_delta"):
            read_h264(sps.nal() + pps.nal() + head.nal())
