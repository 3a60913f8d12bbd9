"""Frames out of bytes: what is accepted, what is refused and how, and that nothing else can happen."""

import io
import pickle
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gearnn_ray.data import scenes
from gearnn_ray.levels.level import parse_level
from gearnn_ray.serving.frames import BadFrameError, Limits, evidence_of, read_frame
from gearnn_ray.serving.jpeg import JpegQuality

H, W = 48, 64
PIXELS = scenes.render(0, 0, 0, H, W).image


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def png(height: int, width: int, depth: int = 8, colour: int = 2, body: bytes = b"") -> bytes:
    """A PNG as its header says, with this for its rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


JPEG, PNG, NPY = encoded(PIXELS, "JPEG", quality=34), encoded(PIXELS, "PNG"), npy(PIXELS)
PROGRESSIVE = encoded(PIXELS, "JPEG", quality=34, progressive=True)
SCAN = JPEG.index(b"\xff\xda")
DEFAULT = Limits()


def refused(data: bytes, content_type: str | None = None, limits: Limits = DEFAULT) -> tuple[int, str]:
    """Status and sentence of a refusal."""
    with pytest.raises(BadFrameError) as caught:
        read_frame(data, content_type, limits)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert len(sentence) < 250
    return caught.value.status, sentence


# Accepted


@pytest.mark.parametrize("content_type", ["image/jpeg", "image/png", "text/plain; charset=utf-8", "", None])
@pytest.mark.parametrize("data", [JPEG, PNG, NPY], ids=["jpeg", "png", "npy"])
def test_the_bytes_say_what_they_are(data: bytes, content_type: str | None) -> None:
    frame = read_frame(data, content_type)
    expected = parse_level("jpeg-34").apply([PIXELS])[0] if data is JPEG else PIXELS
    assert np.array_equal(frame.pixels, expected)
    assert frame.pixels.flags.c_contiguous
    assert (frame.evidence.height, frame.evidence.width) == (H, W)
    assert frame.evidence.jpeg == (JpegQuality(34, 0.0) if data is JPEG else None)


def as_rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_8_bit_png_becomes_rgb_without_alpha(mode: str) -> None:
    colour = Image.fromarray(PIXELS)
    image = colour.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize((W, H)))
    frame = read_frame(encoded(image, "PNG"), "image/png")
    assert np.array_equal(frame.pixels, as_rgb(image))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_small_palettes_and_transparent_ones(bits: int) -> None:
    image = Image.fromarray(PIXELS).quantize(2**bits)
    for options in ({}, {"transparency": 0}):
        assert np.array_equal(read_frame(encoded(image, "PNG", bits=bits, **options), None).pixels, as_rgb(image))


def test_grey_of_2_and_4_bits_covers_black_to_white() -> None:
    for depth in (2, 4):
        rows = b"".join(b"\0" + bytes(16 * depth // 8 // 2) + b"\xff" * (16 * depth // 8 // 2) for _ in range(16))
        pixels = read_frame(png(16, 16, depth, 0, rows), None).pixels
        assert (pixels[:, :8] == 0).all()
        assert (pixels[:, 8:] == 255).all()


def test_interlaced_png_and_grey_and_progressive_jpeg() -> None:
    grey = read_frame(encoded(PIXELS[..., 1], "JPEG", quality=90), None)
    assert grey.pixels.shape == (H, W, 3)
    assert grey.evidence.jpeg == JpegQuality(90, 0.0)
    assert np.array_equal(read_frame(PROGRESSIVE, None).pixels, read_frame(JPEG, None).pixels)


def test_arrays_in_any_order_and_grey() -> None:
    for array in (np.asfortranarray(PIXELS), PIXELS[::-1], PIXELS[..., 0], np.asfortranarray(PIXELS[..., 0])):
        for version in ((1, 0), (2, 0)):
            pixels = read_frame(npy(array, version=version), "application/x-npy").pixels
            expected = array if array.ndim == 3 else np.stack([array] * 3, 2)
            assert np.array_equal(pixels, expected)
            assert pixels.flags.c_contiguous


def test_orientation_is_left_as_the_sensor_had_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_frame(encoded(PIXELS, "JPEG", exif=exif), None).pixels.shape == (H, W, 3)


def test_an_animated_png_gives_its_still_image() -> None:
    others = [Image.fromarray(255 - PIXELS)] * 2
    data = encoded(PIXELS, "PNG", save_all=True, append_images=others)
    assert b"acTL" in data
    assert np.array_equal(read_frame(data, None).pixels, PIXELS)


def test_texts_of_a_png_are_not_unpacked() -> None:
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 * 2**20), 9))
    data = PNG[:33] + bomb + PNG[33:]
    tracemalloc.start()
    assert np.array_equal(read_frame(data, None).pixels, PIXELS)
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


def test_a_jpeg_that_really_ends_in_grey() -> None:
    pixels = PIXELS.copy()
    pixels[16:] = 128
    for options in ({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 1}):
        assert (read_frame(encoded(pixels, "JPEG", **options), None).pixels[-1] == 128).all()
        assert read_frame(encoded(np.full_like(pixels, 128), "JPEG", **options), None).evidence.luma == pytest.approx(128)
        assert read_frame(encoded(np.full((H, W), 128, np.uint8), "JPEG", **options), None).evidence.luma == pytest.approx(128)


@pytest.mark.parametrize("quality", [1, 10, 50, 95, 100])
def test_whole_progressive_jpegs_are_not_taken_for_cut_ones(quality: int) -> None:
    for index in range(4):
        pixels = scenes.render(2, 0, index, 51, 77).image
        for options in ({}, {"subsampling": 0}, {"restart_marker_rows": 1}):
            read_frame(encoded(pixels, "JPEG", quality=quality, progressive=True, **options), None)
        read_frame(encoded(pixels[..., 0], "JPEG", quality=quality, progressive=True), None)


def test_bytes_after_the_end_do_not_matter() -> None:
    for data in (JPEG, PROGRESSIVE, PNG):
        expected = read_frame(data, None)
        for tail in (b"\0" * 100, JPEG):
            assert np.array_equal(read_frame(data + tail, None).pixels, expected.pixels)


# Evidence


def test_luma_is_the_mean_within_a_percent() -> None:
    for height, width in ((16, 16), (48, 64), (360, 480), (1080, 1920)):
        pixels = np.asarray(Image.fromarray(PIXELS).resize((width, height), Image.Resampling.BICUBIC))
        exact = float((pixels @ np.array([0.299, 0.587, 0.114])).mean())
        evidence = evidence_of(pixels)
        assert evidence.luma == pytest.approx(exact, rel=0.01)
        assert (evidence.height, evidence.width, evidence.jpeg) == (height, width, None)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (2, 3), (5, 4), (3, 2), (16, 10**6), (10**6, 16), (17, 9000), (1, 10**6), (4000, 1)]
)
def test_luma_of_any_shape(height: int, width: int) -> None:
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = (10, 100, 200)
    assert evidence_of(pixels).luma == pytest.approx(0.299 * 10 + 0.587 * 100 + 0.114 * 200, rel=1e-4)
    assert evidence_of(pixels[::-1, ::-1]).luma == evidence_of(pixels).luma


def test_luma_is_that_of_all_columns_and_rows() -> None:
    """Edges of JPEG's blocks and fine stripes must not be seen alone."""
    for height, width in ((96, 128), (360, 480), (432, 768), (1080, 1920)):
        lines = np.zeros((height, width, 3), np.uint8)
        for stripes in (lines[:, ::8], lines[::8]):
            lines[:] = 0
            stripes[:] = 240
            assert evidence_of(lines).luma == pytest.approx(30, abs=12)


def test_what_is_known_from_elsewhere_is_kept() -> None:
    evidence = evidence_of(PIXELS, JpegQuality(7, 0.1), qp=31.5, crf=23.0)
    assert (evidence.jpeg, evidence.qp, evidence.crf) == (JpegQuality(7, 0.1), 31.5, 23.0)


# Refused


def test_nothing_and_too_much() -> None:
    assert refused(b"")[0] == 400
    assert refused(JPEG, limits=Limits(body_bytes=len(JPEG) - 1))[0] == 413
    read_frame(JPEG, None, Limits(body_bytes=len(JPEG)))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_other_formats(kind: str) -> None:
    status, sentence = refused(encoded(PIXELS, kind), "image/gif")
    assert status == 415
    assert "send a JPEG" in sentence
    assert refused(encoded(PIXELS, kind))[0] == 415
    assert refused(encoded(PIXELS, kind), "image/jpeg")[0] == 400


def test_only_the_type_promised_makes_it_damaged() -> None:
    for content_type in ("image/jpeg", "image/png", "application/x-npy", "IMAGE/JPEG; q=1"):
        assert refused(b"hello world", content_type)[0] == 400
    assert refused(b"hello world", "text/plain")[0] == 415
    assert refused(b"hello world")[0] == 415


@pytest.mark.parametrize("make", [lambda p: encoded(p, "JPEG"), lambda p: encoded(p, "PNG"), npy], ids=["jpeg", "png", "npy"])
def test_sizes(make: Callable[[np.ndarray], bytes]) -> None:
    def shaped(height: int, width: int) -> bytes:
        return make(np.zeros((height, width, 3), np.uint8))

    assert refused(shaped(1, 10_000))[0] == 422
    assert refused(shaped(10_000, 1))[0] == 422
    assert refused(shaped(15, 400))[0] == 422
    assert refused(shaped(400, 401), limits=Limits(pixels=160_000))[0] == 413
    read_frame(shaped(400, 400), None, Limits(pixels=160_000))
    read_frame(shaped(16, 16), None)


def with_size(jpeg: bytes, height: int, width: int) -> bytes:
    """The same JPEG, with another size in its header."""
    place = max(jpeg.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2")) + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


NPY_BOMB = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
NPY_BOMB += b"{'descr': '|u1', 'fortran_order': False, 'shape': (60000, 60000, 3), }".ljust(117) + b"\n"


@pytest.mark.parametrize(
    "bomb",
    [
        png(60_000, 60_000, 1, 0, bytes(10**6)),
        png(2**31 - 1, 2**31 - 1),
        with_size(JPEG, 65_000, 65_000),
        with_size(PROGRESSIVE, 65_000, 65_000),
        NPY_BOMB,
    ],
    ids=["png", "largest png", "jpeg", "progressive", "npy"],
)
def test_pixel_bombs_are_refused_before_they_are_unpacked(bomb: bytes) -> None:
    before = peak_bytes()
    assert refused(bomb)[0] == 413
    assert peak_bytes() - before < 64 * 2**20


def peak_bytes() -> int:
    """The most that this process has ever held: what C libraries allocate counts too."""
    resource = pytest.importorskip("resource")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def test_cmyk_and_16_bits() -> None:
    status, sentence = refused(encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"))
    assert status == 422
    assert "CMYK" in sentence
    deep = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
    status, sentence = refused(encoded(deep, "PNG"))
    assert status == 422
    assert "16 bits" in sentence
    assert refused(png(H, W, 16, 2, bytes(H * (1 + 6 * W))))[0] == 422


@pytest.mark.parametrize(
    "array",
    [
        PIXELS.astype(np.float32),
        PIXELS.astype(np.int8),
        np.zeros((H, W, 4), np.uint8),
        np.zeros((3, H, W), np.uint8),
        np.zeros((1, H, W, 3), np.uint8),
        np.zeros((H, W, 1), np.uint8),
        np.zeros(H, np.uint8),
        np.zeros((), np.uint8),
        np.zeros((H, W), [("a", np.uint8)]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_of_another_kind(array: np.ndarray) -> None:
    assert refused(npy(array), "application/x-npy")[0] == 422


def test_arrays_are_never_unpickled() -> None:
    array = np.full((H, W), object(), object)
    array.fill(pickle.dumps)
    assert refused(npy(array), "application/x-npy")[0] == 422


def test_arrays_of_another_length_than_they_say() -> None:
    assert refused(NPY[:-1])[0] == 400
    assert refused(NPY + b"\0")[0] == 400
    for header in (b"{'shape': (1", b"(" * 9000, b"-" * 9000 + b"1", b"{'shape': (%s, 9)}" % (b"9" * 5000), b"\xff"):
        data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + PIXELS.tobytes()
        assert refused(data)[0] == 400


@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE, PNG, NPY], ids=["jpeg", "progressive", "png", "npy"])
def test_every_truncation_is_refused(data: bytes) -> None:
    for length in range(1, len(data), 1 + len(data) // 300):
        assert refused(data[:length], "image/jpeg")[0] == 400
    for length in range(len(data) - 12, len(data)):
        assert refused(data[:length], "image/jpeg")[0] == 400


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
def test_jpegs_that_were_cut_and_closed_again_are_refused(options: dict[str, object]) -> None:
    """What a camera's receiver makes of lost packets; libjpeg fills in grey and says nothing."""
    data = encoded(scenes.render(0, 0, 1, 96, 128).image, "JPEG", quality=60, **options)
    first = data.index(b"\xff\xda") + 20
    for length in range(first, len(data) - 100, 1 + (len(data) - first) // 60):  # the last block may be half there
        if options == {"progressive": True} and data[length : length + 2] in (b"\xff\xc4", b"\xff\xda"):
            continue  # between two scans: a whole JPEG, if a coarse one
        assert refused(data[:length] + b"\xff\xd9")[0] == 400


def test_headers_that_take_long_to_search() -> None:
    for junk in (b"\0", b"\xff", b"\xff\xd0", b"\xff\xfe\0\2", b"\xff\xe1\0\2", b"\xff\xe1\0\x08Exif\0\0"):
        assert refused(JPEG[:20] + junk * (2**20 // len(junk)) + JPEG[20:])[0] in (400, 422)
    assert refused(PNG[:33] + 100_000 * chunk(b"juNk", b"") + PNG[33:])[0] == 422


def with_scans(jpeg: bytes, scans: int) -> bytes:
    """The progressive JPEG, its last scan repeated until there are so many."""
    first, last = jpeg.index(b"\xff\xda"), jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * (scans + 1 - jpeg.count(b"\xff\xda", first)) + b"\xff\xd9"


def test_more_scans_than_any_encoder_writes_are_refused_before_they_are_decoded() -> None:
    flat = encoded(np.full((H, W, 3), 120, np.uint8), "JPEG", progressive=True)
    read_frame(with_scans(flat, 20), None)
    for scans in (21, 99, 1000):
        status, sentence = refused(with_scans(flat, scans))
        assert (status, "more than 20 scans" in sentence) == (422, True)
    bomb = with_scans(encoded(np.full((2160, 3840, 3), 120, np.uint8), "JPEG", quality=30, progressive=True), 99)
    assert len(bomb) < 60_000
    start = time.process_time()
    assert refused(bomb)[0] == 422
    assert time.process_time() - start < 0.1  # decoding takes 2 seconds


def test_any_flipped_bit_of_a_png_is_seen() -> None:
    for place in range(0, len(PNG), 1 + len(PNG) // 300):
        damaged = bytearray(PNG)
        damaged[place] ^= 1
        refused(bytes(damaged))


def test_the_error_survives_a_trip_between_processes() -> None:
    with pytest.raises(BadFrameError) as caught:
        read_frame(JPEG, None, Limits(pixels=1))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.status) == (str(caught.value), 413)


# Anything at all

LIMITS = Limits(pixels=2**20)  # a mutated size stays cheap


def read_or_refuse(data: bytes) -> None:
    try:
        frame = read_frame(data, None, LIMITS)
    except BadFrameError as error:
        status, sentence = error.status, str(error)
    else:
        assert frame.pixels.dtype == np.uint8
        assert frame.pixels.shape == (frame.evidence.height, frame.evidence.width, 3)
        assert min(frame.pixels.shape[:2]) >= LIMITS.shortest_side
        assert 0 <= frame.evidence.luma <= 255.01
        return
    assert status in (400, 413, 415, 422)
    assert "\n" not in sentence


@given(st.sampled_from([b"", JPEG[:3], PNG[:8], PNG[:33], NPY[:6], NPY[:10], JPEG[:SCAN]]), st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_random_bytes_make_a_frame_or_a_refusal(head: bytes, tail: bytes) -> None:
    read_or_refuse(head + tail)


def test_a_jpeg_that_claims_more_pixels_than_it_has_is_a_frame_or_a_refusal() -> None:
    read_or_refuse(with_size(JPEG, 600, 800))
