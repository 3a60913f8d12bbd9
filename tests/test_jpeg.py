"""JPEG quality: exact from the tables of files by several encoders, close from the pixels alone."""

import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gearnn_ray.data import scenes
from gearnn_ray.levels.level import parse_level
from gearnn_ray.serving.frames import read_frame
from gearnn_ray.serving.jpeg import MOST_SCANS, JpegQuality, quality_of_pixels, quality_of_tables, scans_of
from tests.programs import installed

CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"
QUALITIES = range(1, 101)


def saved(pixels: np.ndarray, quality: int, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def quality_of(data: bytes) -> JpegQuality | None:
    return read_frame(data, "image/jpeg").evidence.jpeg


@pytest.fixture(scope="module")
def small() -> np.ndarray:
    return scenes.render(0, 0, 0, 48, 64).image


@pytest.fixture(scope="module")
def streets() -> list[np.ndarray]:
    """Undistorted scenes of two sizes."""
    return [scenes.render(1, 0, index, *size).image for size in ((96, 128), (360, 480)) for index in range(3)]


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"progressive": True}, {"optimize": True}], ids=str
)
def test_every_quality_that_pillow_writes_is_found_exactly(small: np.ndarray, options: dict[str, object]) -> None:
    for quality in QUALITIES:
        assert quality_of(saved(small, quality, **options)) == JpegQuality(quality, 0.0)


def test_every_quality_of_a_grey_file_is_found_exactly(small: np.ndarray) -> None:
    for quality in QUALITIES:
        assert quality_of(saved(small[..., 0], quality)) == JpegQuality(quality, 0.0)


def written_by(product: str, folder: Path, pixels: np.ndarray, *command: str) -> bytes:
    """Return out.jpg, which a program makes from in.ppm. Skips the test unless the program is this product's."""
    if installed(command[0], product, "-version") is None:
        pytest.skip(f"no program {command[0]} that is {product}")
    Image.fromarray(pixels).save(folder / "in.ppm")
    subprocess.run(command, cwd=folder, check=True, timeout=30)
    return (folder / "out.jpg").read_bytes()


@pytest.mark.parametrize(
    ("script", "taken"),
    [
        ("#!/bin/sh\necho Version: ImageMagick 7.1\n", True),
        ("#!/bin/sh\necho convert of temperatures 1.0\n", False),
        ("#!/bin/sh\necho no ImageMagick here >&2\nexit 1\n", False),
        ("no program", False),
    ],
)
def test_a_program_is_what_its_version_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, taken: bool) -> None:
    name = f"convert-{sum(script.encode())}"  # the answer for a name is cached
    (tmp_path / name).write_text(script)
    (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installed(name, "Version: ImageMagick") == (str(tmp_path / name) if taken else None)
    assert installed("absent", "ImageMagick") is None


@pytest.mark.parametrize("quality", [1, 2, 5, 30, 49, 50, 75, 90, 99, 100])
@pytest.mark.parametrize("option", ["-dct int", "-baseline", "-progressive", "-grayscale", "-rgb"])
def test_cjpeg(small: np.ndarray, tmp_path: Path, option: str, quality: int) -> None:
    """Without -baseline its steps go beyond 255; -rgb files have one table for all components."""
    command = f"cjpeg -quality {quality} {option} -outfile out.jpg in.ppm"
    assert quality_of(written_by("libjpeg", tmp_path, small, *command.split())) == JpegQuality(quality, 0.0)


@pytest.mark.parametrize("program", ["convert", "magick"])
@pytest.mark.parametrize("quality", [1, 10, 50, 92, 100])
@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:0"])
def test_imagemagick(small: np.ndarray, tmp_path: Path, program: str, quality: int, sampling: str) -> None:
    command = f"{program} in.ppm -quality {quality} -sampling-factor {sampling} out.jpg"
    assert quality_of(written_by("Version: ImageMagick", tmp_path, small, *command.split())) == JpegQuality(quality, 0.0)


def test_the_last_save_counts(small: np.ndarray) -> None:
    for first, last in ((20, 80), (80, 20), (95, 10)):
        assert quality_of(saved(decoded(saved(small, first)), last)) == JpegQuality(last, 0.0)


def tables_of(quality: int) -> tuple[list[int], list[int]]:
    image = Image.open(io.BytesIO(saved(np.zeros((16, 16, 3), np.uint8), quality)))
    return image.quantization[0], image.quantization[1]


@pytest.mark.parametrize("quality", [10, 30, 60, 85])
def test_tables_a_tenth_coarser_are_near_with_that_distance(quality: int) -> None:
    luma, chroma = ([round(1.1 * step) for step in table] for table in tables_of(quality))
    found = quality_of_tables(luma, chroma)
    # qualities below 50 scale tables by 50 / quality, those above by 2 - quality / 50
    expected = quality / 1.1 if quality < 50 else 100 - 1.1 * (100 - quality)
    assert abs(found.quality - expected) < 1
    assert 0 < found.distance < 0.1


def test_tables_of_another_shape_are_near(small: np.ndarray) -> None:
    """mozjpeg's own table (its default, after ImageMagick's) for both planes, as it is at quality 50."""
    mozjpeg = """16 16 16 18 25 37 56 85  16 17 20 27 34 40 53 75  16 20 24 31 43 62 91 135  18 27 31 40 53 74 106 156
        25 34 43 53 69 94 131 189  37 40 62 74 94 124 169 238  56 53 91 106 131 169 226 311  85 75 135 156 189 238 311 418"""
    table = [min(int(step), 255) for step in mozjpeg.split()]
    found = quality_of(saved(small, 50, qtables=[table, table]))
    assert found is not None
    assert 40 < found.quality < 60
    assert 0.1 < found.distance < 0.5


def test_luma_and_chroma_of_different_qualities_are_between() -> None:
    found = quality_of_tables(tables_of(70)[0], tables_of(50)[1])
    assert 50 <= found.quality <= 70
    assert found.distance > 0


tables = st.lists(st.integers(0, 65535), min_size=64, max_size=64)


@given(tables, st.none() | tables)
@settings(max_examples=50)
def test_any_tables_have_a_nearest_quality(luma: list[int], chroma: list[int] | None) -> None:
    found = quality_of_tables(luma, chroma)
    assert found.quality in QUALITIES
    assert 0 <= found.distance < np.log(65536)


@pytest.mark.parametrize("quality", [5, 7, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95, 98])
def test_pixels_alone_tell_the_quality(streets: list[np.ndarray], quality: int) -> None:
    for pixels in streets:
        found = quality_of_pixels(decoded(saved(pixels, quality)))
        assert found is not None
        assert abs(found.quality - quality) <= 2
        assert 0 <= found.distance <= 0.5


def test_pixels_tell_the_quality_whatever_the_chroma(streets: list[np.ndarray]) -> None:
    for options in ({"subsampling": "4:4:4"}, {"progressive": True}):
        found = quality_of_pixels(decoded(saved(streets[0], 40, **options)))
        assert found is not None
        assert abs(found.quality - 40) <= 2
    grey = quality_of_pixels(decoded(saved(streets[0][..., 1], 40)))
    assert grey is not None
    assert abs(grey.quality - 40) <= 2


def test_pixels_tell_the_last_quality(streets: list[np.ndarray]) -> None:
    for first, last in ((20, 80), (80, 20), (50, 60)):
        found = quality_of_pixels(decoded(saved(decoded(saved(streets[-1], first)), last)))
        assert found is not None
        assert abs(found.quality - last) <= 2


def test_pixels_tell_the_quality_of_a_darkened_frame(streets: list[np.ndarray]) -> None:
    [dark] = parse_level("brightness-0.4+jpeg-30").apply([streets[-1]])
    found = quality_of_pixels(dark)
    assert found is not None
    assert abs(found.quality - 30) <= 2


@pytest.mark.parametrize("level", ["clean", "brightness-0.4", "brightness-2.0", "h264-crf23", "h264-crf40", "h264-256x192"])
def test_pixels_that_were_no_jpeg_tell_none(streets: list[np.ndarray], level: str) -> None:
    for pixels in parse_level(level).apply(streets[3:]):
        assert quality_of_pixels(pixels) is None


@pytest.mark.parametrize("size", [(240, 180), (480, 352), (720, 540), (960, 720)])
def test_pixels_that_were_resized_tell_none(streets: list[np.ndarray], size: tuple[int, int]) -> None:
    for pixels in streets[3:]:
        jpeg = Image.fromarray(decoded(saved(pixels, 30)))
        for how in (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS):
            assert quality_of_pixels(np.asarray(jpeg.resize(size, how))) is None


def test_pixels_that_are_no_photograph_tell_none() -> None:
    rng = np.random.default_rng(0)
    ramp = np.arange(480, dtype=np.uint8)[None, :, None] // 2 + 5
    for pixels in (
        np.full((64, 64, 3), 77, np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        rng.integers(0, 2, (64, 64, 3), dtype=np.uint8) * 100 + 50,
        np.ascontiguousarray(np.broadcast_to(ramp, (360, 480, 3))),
        np.repeat(np.repeat(rng.integers(1, 255, (45, 60, 3), dtype=np.uint8), 8, 0), 8, 1),
        np.full((7, 100, 3), 9, np.uint8),
        np.full((100, 7, 3), 9, np.uint8),
    ):
        assert quality_of_pixels(pixels) is None


@pytest.mark.skipif(not CAMVID.exists(), reason="needs CamVid in shared/data/camvid")
def test_pixels_of_camvid() -> None:
    for path in sorted((CAMVID / "val").iterdir())[::25]:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert quality_of_pixels(pixels) is None  # compressed as video once, which is no JPEG
        for quality in (5, 10, 30, 60, 90):
            found = quality_of_pixels(decoded(saved(pixels, quality)))
            assert found is not None
            assert abs(found.quality - quality) <= 2


# Scans


def test_scans_are_those_that_encoders_write(small: np.ndarray) -> None:
    for pixels, progressive, scans in ((small, False, 1), (small, True, 10), (small[..., 0], True, 6)):
        for options in ({}, {"restart_marker_blocks": 1}):
            data = saved(pixels, 50, progressive=progressive, **options)
            assert scans_of(data, data.index(b"\xff\xda") + 2) == scans


def marked(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + (2 + len(payload)).to_bytes(2) + payload


scan_data = st.binary(max_size=30).map(lambda data: data.replace(b"\xff", b"\xff\x00"))
restarts = st.integers(0xD0, 0xD7).map(lambda marker: bytes((0xFF, marker)))
payloads = st.lists(st.sampled_from([b"\xff\xda", b"\xff\xd9", b"\xff", b"\0", b"x"]), max_size=6).map(b"".join)
scan = st.tuples(scan_data, st.lists(st.tuples(restarts, scan_data).map(b"".join), max_size=3).map(b"".join)).map(b"".join)
tables = st.tuples(st.sampled_from([0xC4, 0xDB, 0xDD, 0xE1, 0xFE]), payloads).map(lambda each: marked(*each))
fill = st.integers(0, 3).map(lambda count: b"\xff" * count)


@given(
    st.lists(st.tuples(st.lists(st.tuples(fill, tables).map(b"".join), max_size=3), fill, payloads, scan), max_size=25),
    st.binary(),
)
@settings(max_examples=200, deadline=None)
def test_scans_are_counted_whatever_lies_between_them(
    further: list[tuple[list[bytes], bytes, bytes, bytes]], behind: bytes
) -> None:
    """Tables, fill bytes and restart markers between scans, markers inside of tables, and anything behind the end."""
    data = b"".join(b"".join(between) + filled + marked(0xDA, header) + each for between, filled, header, each in further)
    assert scans_of(b"head" + data + b"\xff\xd9" + behind, 4) == min(1 + len(further), MOST_SCANS + 1)


@given(
    st.binary(max_size=300) | st.lists(st.sampled_from([b"\xff", b"\xda", b"\xd9", b"\0", b"\x01"]), max_size=200).map(b"".join)
)
@settings(max_examples=200, deadline=None)
def test_any_bytes_have_a_number_of_scans(data: bytes) -> None:
    assert 1 <= scans_of(data, 0) <= MOST_SCANS + 1
