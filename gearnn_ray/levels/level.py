"""Distortion levels: names that identify a level completely and are safe in paths, and how levels distort frames."""

import functools
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, ImageEnhance, features
from PIL import __version__ as pillow_version

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.h264_codec import Frame, Picture, equal_sizes, through_h264, video_versions

__all__ = ["CLEAN", "LEVELS_VERSION", "SIZE_CRF", "Level", "codec_versions", "parse_level"]

LEVELS_VERSION: int = 1  # part of every cache key: increase it whenever the pixels of any level change
SIZE_CRF = 18  # constant rate factor of `h264-WxH` levels, as in the paper

_MAX_NAME = 120  # characters; a level's name becomes part of file names, which have at most 255 bytes
_GRAMMAR = (
    "clean, jpeg-Q (quality 1 to 100), brightness-B (factor 0.0001 to 10.0), "
    "h264-WxH (even sizes 16 to 8192), h264-crfC (0 to 51), or several of them joined with '+'"
)


@dataclass(frozen=True)
class Level(ABC):
    """One level of distortion: immutable, hashable, and equal to every level of the same name."""

    family: ClassVar[str]  # clean, jpeg, brightness, h264-size, h264-crf or combination; a plot draws one curve per family

    @property
    @abstractmethod
    def name(self) -> str:
        """The canonical name; `parse_level(level.name) == level`."""

    @property
    def value(self) -> float | None:
        """The number that plots use: quality, factor, width in pixels, or CRF; None for clean and combinations."""
        parameter = next(iter(vars(self).values()), None)
        return parameter if isinstance(parameter, int | float) else None

    @property
    def is_clean(self) -> bool:
        return self.family == "clean"

    @property
    def uses_h264(self) -> bool:
        return self.family.startswith("h264")

    def apply(self, frames: Sequence[Frame]) -> list[Frame]:
        """Distort one clip of consecutive uint8 [H, W, 3] frames. Raises the errors of `stream`."""
        return list(self.stream(frames))

    def stream(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Distort one clip lazily: one uint8 [H, W, 3] frame per input frame, in order, with at most a few dozen in memory. An
        H.264 level raises `UnequalFramesError` at frames of different sizes; other levels treat each frame independently.
        """
        return (picture.pixels for picture in self.pictures(frames))

    def pictures(self, frames: Iterable[Frame]) -> Iterator[Picture]:
        """As `stream`, each frame with the QP of the picture that the level's last H.264 part made of it."""
        return self._apply_to(map(Picture, frames))

    def _apply_to(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        return (Picture(self._distort(pixels), qp) for pixels, qp in pictures)

    def _distort(self, frame: Frame) -> Frame:
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
    """JPEG compression by Pillow at a quality of 1 to 100, with its default 4:2:0 chroma subsampling."""

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
    """Pillow's `ImageEnhance.Brightness`: a factor below 1 darkens, a factor above 1 brightens."""

    family = "brightness"
    factor: float

    def __post_init__(self) -> None:
        # str(float) uses scientific notation below 0.0001, where every pixel is black anyway
        _expect(1e-4 <= self.factor <= 10, self, f"factor {self.factor}", "0.0001 to 10.0", "brightness-0.4")

    @property
    def name(self) -> str:
        return f"brightness-{float(self.factor)}"

    def _distort(self, frame: Frame) -> Frame:
        return np.asarray(ImageEnhance.Brightness(Image.fromarray(frame)).enhance(self.factor))


@dataclass(frozen=True)
class H264Size(Level):
    """Scaling to width × height pixels (Pillow's antialiased bicubic), then H.264 at CRF 18. The frame keeps the new size."""

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

    def _apply_to(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        return through_h264(map(self._distort, equal_sizes(pixels for pixels, _ in pictures)), SIZE_CRF)

    def _distort(self, frame: Frame) -> Frame:
        size = (self.width, self.height)
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class H264Crf(Level):
    """H.264 at the frame's own size, with a constant rate factor (CRF) from 0 (best) to 51 (worst)."""

    family = "h264-crf"
    crf: int

    def __post_init__(self) -> None:
        _expect(0 <= self.crf <= 51, self, f"CRF {self.crf}", "0 to 51", "h264-crf24")

    @property
    def name(self) -> str:
        return f"h264-crf{self.crf}"

    def _apply_to(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        return through_h264(equal_sizes(pixels for pixels, _ in pictures), self.crf)


@dataclass(frozen=True)
class Combination(Level):
    """Two or more levels, applied from left to right."""

    family = "combination"
    parts: tuple[Level, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or any(isinstance(part, Clean | Combination) for part in self.parts):
            useful = "+".join(part.name for part in self.parts if not part.is_clean) or "clean"
            raise UserError(f"level {self.name!r} does not combine two or more distortions: write {useful!r}.")

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    @property
    def uses_h264(self) -> bool:
        return any(part.uses_h264 for part in self.parts)

    def _apply_to(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        return functools.reduce(lambda clip, part: part._apply_to(clip), self.parts, pictures)


def parse_level(name: str) -> Level:
    """Return the level of this canonical name. Raises `UserError`, which suggests the correct spelling where it can."""
    if len(name) > _MAX_NAME:
        raise UserError(f"a level name has {len(name)} characters, expected up to {_MAX_NAME}: combine fewer distortions.")
    parts = tuple(_parse_part(part) for part in name.split("+"))
    level = parts[0] if len(parts) == 1 else Combination(parts)
    if level.name != name:
        raise UserError(f"level {name!r} is not in its canonical spelling: write {level.name!r}.")
    return level


def codec_versions(level: Level | None = None) -> dict[str, str]:
    """Versions of the libraries that decide the pixels of `level`, or of all levels where it is None. Part of cache keys."""
    versions = {
        "pillow": pillow_version,
        "libjpeg": str(features.version_feature("libjpeg_turbo") or features.version_codec("jpg")),
    }
    return versions if level is not None and not level.uses_h264 else versions | video_versions()


def _expect(holds: bool, level: Level, found: str, expected: str, example: str) -> None:
    if not holds:
        raise UserError(f"level {level.name!r} has {found}, expected {expected}: write e.g. {example!r}.")


def _parse_part(text: str) -> Level:
    """Parse one part leniently, so that `parse_level` can suggest the canonical spelling."""
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
    raise UserError(f"{text!r} is not a level: write {_GRAMMAR}.")
