"""Image and label files as they are read: whole 8-bit files or a sentence, whatever is wrong with them."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import Dataset
from tests.test_data import make_folder, open_folder_of_5, plain, some_ids, some_picture

H, W = 6, 8
CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"


def read_image(root: Path, content: Image.Image | bytes, name: str = "a.png", **options: object) -> np.ndarray:
    """The image of a folder data set whose only file holds this."""
    return _with(root, "images", name, content, options).train.image(0)


def read_label(root: Path, content: Image.Image | bytes, **options: object) -> np.ndarray:
    return _with(root, "labels", "a.png", content, options).train.target(0)


def _with(root: Path, part: str, name: str, content: Image.Image | bytes, options: dict[str, object]) -> Dataset:
    make_folder(root, name)
    path = root / "train" / part / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path, **options)
    return open_folder_of_5(root)


def encoded(mode: str, file_format: str) -> bytes:
    buffer = BytesIO()
    Image.fromarray(some_picture(0)).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGB"])
def test_images_of_every_8_bit_mode_are_rgb(mode: str, tmp_path: Path) -> None:
    source = Image.fromarray(some_picture(0)).convert(mode)
    np.testing.assert_array_equal(read_image(tmp_path, source), np.asarray(source.convert("RGB")))


def test_a_cmyk_jpeg_is_rgb(tmp_path: Path) -> None:
    red = Image.new("CMYK", (W, H), (0, 255, 255, 0))
    image = read_image(tmp_path, red, "a.jpg")
    assert image.shape == (H, W, 3)
    assert abs(image.astype(int) - (255, 0, 0)).max() < 10


def test_16_bit_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="16 bits per channel: expected 8"):
        read_image(tmp_path, Image.fromarray(np.full((H, W), 40_000, np.uint16)))
    # RGB, which Pillow reads as 8-bit in silence
    with pytest.raises(UserError, match="16 bits per channel: expected 8"):
        read_image(tmp_path, _png(2, 16, bytes((1 + 6 * W) * H)))


def _png(colour_type: int, depth: int, rows: bytes) -> bytes:
    """A PNG of H × W written by hand, for the kinds that Pillow does not write."""

    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", W, H, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_labels_are_read_as_indices(bits: int, tmp_path: Path) -> None:
    ids = some_ids(0, min(2**bits, 5))
    source = Image.fromarray(ids)
    source.putpalette([200, 10, 30, 0, 0, 0, 9, 9, 9, 70, 70, 0, 1, 2, 3])  # makes it mode P
    np.testing.assert_array_equal(read_label(tmp_path, source, bits=bits), ids)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1"])
def test_labels_of_other_modes_are_refused(mode: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"labels/a\.png has mode {mode} with \d bits? per channel") as caught:
        read_label(tmp_path, Image.fromarray(some_picture(0)).convert(mode))
    plain(caught.value)


def test_grey_labels_of_other_depths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with 16 bits per channel"):
        read_label(tmp_path, Image.fromarray(np.full((H, W), 3, np.uint16)))
    with pytest.raises(UserError, match="mode L with 4 bits per channel"):  # decoded as 0, 17, 34 …
        read_label(tmp_path, _png(0, 4, bytes((1 + W // 2) * H)))


def test_a_label_that_is_a_jpeg_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels/a\.png is no image \(unknown format\): expected a whole PNG file"):
        read_label(tmp_path, encoded("L", "JPEG"))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.9])
def test_a_cut_file_is_refused_by_name(file_format: str, share: float, tmp_path: Path) -> None:
    content = encoded("RGB", file_format)
    with pytest.raises(UserError, match=r"images/a\.png is no image \(.+\): expected a whole PNG or JPEG") as caught:
        read_image(tmp_path, content[: int(share * len(content))])
    plain(caught.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_png_with_any_bit_of_its_pixels_flipped_is_refused(tmp_path: Path) -> None:
    content = encoded("L", "PNG")
    for position in range(content.index(b"IDAT") + 4, content.index(b"IEND") - 4):
        flipped = bytearray(content)
        flipped[position] ^= 1  # towards the end, Pillow alone would hand on wrong pixels
        with pytest.raises(UserError, match=r"labels/a\.png is no image"):
            read_label(tmp_path, bytes(flipped))


def test_a_file_gone_since_is_refused_by_name(tmp_path: Path) -> None:
    data = open_folder_of_5(make_folder(tmp_path))
    data.train.images[0].unlink()
    with pytest.raises(UserError, match=r"images/a\.png is no image \(No such file or directory\)"):
        data.train.image(0)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W // 2 - 1)
    with pytest.raises(UserError, match=r"images/a\.png is no image \(.*exceeds limit") as caught:
        read_image(tmp_path, encoded("RGB", "PNG"))
    plain(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.sampled_from([("RGB", "PNG"), ("P", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG")]),
    end=st.floats(0, 1),
    flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=3),
)
def test_damage_of_any_kind_is_a_user_error_or_harmless(
    source: tuple[str, str], end: float, flips: list[tuple[int, int]], tmp_path: Path
) -> None:
    content = bytearray(encoded(*source))
    for position, value in flips:
        content[position % len(content)] = value
    for read in (read_image, read_label):
        try:
            pixels = read(tmp_path, bytes(content[: int(end * len(content)) + 1]))
        except UserError as error:
            plain(error)
        else:
            assert pixels.dtype == np.uint8
