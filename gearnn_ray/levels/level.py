"""Distortion levels: their names, and what each does to the frames of a clip.

A level is a small frozen object; its name is its whole identity and can stand in a path. Levels know nothing
about data sets, caches, labels or networks. PyAV is imported only where H.264 is really used.
"""

import functools
import io
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, features
from PIL import __version__ as pillow_version

from gearnn_ray.core.errors import UserError

if TYPE_CHECKING:
    from av import Packet, VideoFrame

__all__ = ["CLEAN", "LEVELS_VERSION", "Level", "UnequalFramesError", "codec_versions", "parse_level"]

LEVELS_VERSION: int = 1
"""Part of every cache key: raise it whenever a level makes other pixels than before."""
Frame = NDArray[np.uint8]
"""An RGB image, uint8 [H, W, 3]."""

_SIZE_CRF = 18  # the paper's constant rate factor for the smaller frame sizes
_MAX_NAME = 120  # a level names files, and a file name has 255 bytes in all
_GRAMMAR = (
    "clean, jpeg-Q (quality 1 to 100), brightness-B (factor 0.0001 to 10.0), "
    "h264-WxH (even sizes 16 to 8192), h264-crfC (0 to 51), or several of them joined with '+'"
)


class UnequalFramesError(UserError, ValueError):
    """A video codec was given frames of different sizes as one clip."""


@dataclass(frozen=True)
class Level(ABC):
    """One level of distortion: pure, hashable, and equal to every other of the same name."""

    family: ClassVar[str]
    """What a plot draws as one curve: clean, jpeg, brightness, h264-size, h264-crf or combination."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The canonical name: `parse_level(level.name) == level`."""

    @property
    def value(self) -> float | None:
        """Where the level stands in its family: quality, factor, width in pixels or CRF; otherwise None."""
        parameter = next(iter(vars(self).values()), None)
        return parameter if isinstance(parameter, int | float) else None

    @property
    def is_clean(self) -> bool:
        return self.family == "clean"

    @property
    def uses_h264(self) -> bool:
        return self.family.startswith("h264")

    def apply(self, frames: Sequence[Frame]) -> list[Frame]:
        """Distort one clip: consecutive uint8 [H, W, 3] frames of one recording. Raises as `stream` does."""
        return list(self.stream(frames))

    def stream(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Distort one clip lazily: uint8 [H, W, 3] frames in, as many out, in order.

        Holds a few dozen frames at most, however long the clip. Raises `UnequalFramesError` (a ValueError)
        where a video codec meets frames of different sizes; levels without one take each frame alone.
        """
        return map(self._distort, frames)

    def _distort(self, frame: Frame) -> Frame:
        """One frame alone, for levels that need no clip."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Clean(Level):
    """The undistorted frames."""

    family = "clean"
    name = "clean"

    def _distort(self, frame: Frame) -> Frame:
        return frame


CLEAN = Clean()


@dataclass(frozen=True)
class Jpeg(Level):
    """Saved as JPEG (Pillow, its default 4:2:0 chroma subsampling) at a quality of 1 to 100, and decoded."""

    family = "jpeg"
    quality: int

    def __post_init__(self) -> None:
        _expect(1 <= self.quality <= 100, self, f"quality {self.quality}", "1 to 100", "jpeg-10")

    @property
    def name(self) -> str:
        return f"jpeg-{self.quality}"

    def _distort(self, frame: Frame) -> Frame:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=self.quality)
        return np.asarray(Image.open(file).convert("RGB"))


@dataclass(frozen=True)
class Brightness(Level):
    """Pillow's `ImageEnhance.Brightness`: a factor below 1 darkens, up to 10 brightens."""

    family = "brightness"
    factor: float

    def __post_init__(self) -> None:
        # below 0.0001 str(float) is no plain decimal, and every pixel is black anyway
        _expect(1e-4 <= self.factor <= 10, self, f"factor {self.factor}", "0.0001 to 10.0", "brightness-0.4")

    @property
    def name(self) -> str:
        return f"brightness-{float(self.factor)}"

    def _distort(self, frame: Frame) -> Frame:
        return np.asarray(ImageEnhance.Brightness(Image.fromarray(frame)).enhance(self.factor))


@dataclass(frozen=True)
class H264Size(Level):
    """Scaled to width × height (Pillow's antialiased bicubic), H.264 at CRF 18, and kept at that size."""

    family = "h264-size"
    width: int
    height: int

    def __post_init__(self) -> None:
        for side in (self.width, self.height):
            fits = 16 <= side <= 8192 and side % 2 == 0
            _expect(fits, self, f"a side of {side}", "even numbers from 16 to 8192", "h264-512x256")

    @property
    def name(self) -> str:
        return f"h264-{self.width}x{self.height}"

    def stream(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        return _through_h264(map(self._distort, _equal_sizes(frames)), _SIZE_CRF)

    def _distort(self, frame: Frame) -> Frame:
        size = (self.width, self.height)
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class H264Crf(Level):
    """H.264 at its own size and a constant rate factor from 0 (best) to 51 (worst)."""

    family = "h264-crf"
    crf: int

    def __post_init__(self) -> None:
        _expect(0 <= self.crf <= 51, self, f"CRF {self.crf}", "0 to 51", "h264-crf24")

    @property
    def name(self) -> str:
        return f"h264-crf{self.crf}"

    def stream(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        return _through_h264(_equal_sizes(frames), self.crf)


@dataclass(frozen=True)
class Combination(Level):
    """Two or more levels, applied left to right."""

    family = "combination"
    parts: tuple[Level, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or any(isinstance(part, Clean | Combination) for part in self.parts):
            useful = "+".join(part.name for part in self.parts if not part.is_clean) or "clean"
            raise UserError(f"level {self.name!r} does not join two or more distortions: write {useful!r}.")

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    @property
    def uses_h264(self) -> bool:
        return any(part.uses_h264 for part in self.parts)

    def stream(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        return functools.reduce(lambda clip, part: part.stream(clip), self.parts, iter(frames))


def parse_level(name: str) -> Level:
    """The level of this canonical name. Raises `UserError` that says how to write what was probably meant."""
    if len(name) > _MAX_NAME:
        raise UserError(f"a level name has {len(name)} characters, expected up to {_MAX_NAME}: combine fewer.")
    parts = tuple(_parse_part(part) for part in name.split("+"))
    level = parts[0] if len(parts) == 1 else Combination(parts)
    if level.name != name:
        raise UserError(f"level {name!r} is not spelled as expected: write {level.name!r}.")
    return level


def codec_versions(level: Level | None = None) -> dict[str, str]:
    """Versions of the libraries that decide the pixels of this level, or of any level: part of cache keys.

    A level that needs no video codec does not name PyAV: another FFmpeg leaves its images valid.
    """
    versions = {
        "pillow": pillow_version,
        "libjpeg": str(features.version_feature("libjpeg_turbo") or features.version_codec("jpg")),
    }
    return versions if level is not None and not level.uses_h264 else versions | _video_versions()


def _expect(holds: bool, level: Level, found: str, expected: str, example: str) -> None:
    if not holds:
        raise UserError(f"level {level.name!r} has {found}, expected {expected}: write e.g. {example!r}.")


def _parse_part(text: str) -> Level:
    """Read one part leniently, so that `parse_level` can show the canonical spelling of what was meant."""
    kind, _, value = text.strip().lower().partition("-")
    width, x, height = value.partition("x")
    with suppress(ValueError):  # of int and float
        if kind == "clean" and not value:
            return CLEAN
        if kind == "jpeg":
            return Jpeg(int(value))
        if kind == "brightness":
            return Brightness(float(value))
        if kind == "h264" and value.startswith("crf"):
            return H264Crf(int(value.removeprefix("crf")))
        if kind == "h264" and x:
            return H264Size(int(width), int(height))
    raise UserError(f"{text!r} was found where a level is expected: write {_GRAMMAR}.")


def _equal_sizes(frames: Iterable[Frame]) -> Iterator[Frame]:
    """Hand the frames on, refusing one that differs in size from the first."""
    shape: tuple[int, ...] = ()
    for number, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.shape != shape:
            found = f"frame {number} of a clip has shape {frame.shape}, the first has {shape}"
            raise UnequalFramesError(f"{found}, expected equal ones: give each size a clip of its own.")
        yield frame


def _through_h264(frames: Iterator[Frame], crf: int) -> Iterator[Frame]:
    """Encode one clip of equal frames and decode it again, packet by packet: no container, no file.

    4:2:0 chroma wants even sides: others are padded by repeating their edge, and cropped after.
    """
    first = next(frames, None)
    if first is None:
        return
    height, width, _ = first.shape
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    clip = (np.pad(frame, padding, "edge") for frame in itertools.chain([first], frames))
    for frame in _decode(_encode(clip, crf)):
        yield np.ascontiguousarray(frame[:height, :width])


def _encode(frames: Iterable[Frame], crf: int) -> Iterator["Packet[Any]"]:
    """libx264, preset medium, 4:2:0 in BT.709 and limited range; the same bytes on any run and processor."""
    import av

    if "libx264" not in av.codecs_available:
        raise UserError("this PyAV has no libx264, which h264 levels need: install PyAV from its own wheel.")
    encoder = av.CodecContext.create("libx264", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    # Without cpu-independent, the AVX-512 code of libx264 gives other bytes on some runs (one in twenty).
    encoder.options = {"preset": "medium", "crf": str(crf), "x264-params": "cpu-independent=1"}
    encoder.thread_count = 1  # several levels are made at once, each by a process of its own
    encoder.pix_fmt, encoder.framerate, encoder.time_base = "yuv420p", Fraction(25), Fraction(1, 25)
    convert = _converter("yuv420p", "JPEG", "MPEG")
    for time, frame in enumerate(frames):
        if time == 0:
            encoder.height, encoder.width, _ = frame.shape
        video = convert(av.VideoFrame.from_ndarray(frame, format="rgb24"))
        video.pts = time
        yield from encoder.encode(video)
    yield from encoder.encode(None)


def _decode(packets: Iterable["Packet[Any]"]) -> Iterator[Frame]:
    import av

    decoder = av.CodecContext.create("h264", "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.thread_count = 1
    convert = _converter("rgb24", "MPEG", "JPEG")
    for packet in itertools.chain(packets, [None]):
        for video in decoder.decode(packet):
            yield np.asarray(convert(video).to_ndarray(), np.uint8)


def _converter(pixels: str, source: str, target: str) -> Callable[["VideoFrame"], "VideoFrame"]:
    """BT.709 with exact rounding, so that there and back changes no more than 4:2:0 chroma must."""
    from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

    exact = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
    return functools.partial(
        VideoReformatter().reformat,
        format=pixels,
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=source,
        dst_color_range=target,
        interpolation=Interpolation.BICUBIC | exact,
        threads=1,
    )


@functools.cache
def _video_versions() -> dict[str, str]:
    import av

    # libx264 says which build it is only inside what it encodes
    packets = b"".join(bytes(packet) for packet in _encode([np.zeros((16, 16, 3), np.uint8)], crf=23))
    build = re.search(rb"x264 - core (\w+)", packets)
    return {
        "pyav": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "x264": build[1].decode() if build else "unknown",
    }
