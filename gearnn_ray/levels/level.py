"""Distortion levels by their names, which identify a level completely and are safe in paths.

    parse_level("brightness-0.4+jpeg-30").apply(frames)

`base` says what a level is; `stills` has those that treat each frame alone, `clips` those of video codecs, `own` the user's own.
"""

import functools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.base import Level, OneNumber, Picture, image_versions
from gearnn_ray.levels.clips import SIZE_CRF, Av1Crf, H264Crf, H264Size, HevcCrf
from gearnn_ray.levels.h264_codec import video_versions
from gearnn_ray.levels.own import parse_own
from gearnn_ray.levels.stills import (
    CLEAN,
    Brightness,
    Clean,
    Defocus,
    Fog,
    Gamma,
    GaussianNoise,
    Jpeg,
    LowLight,
    MotionBlur,
    Webp,
)

__all__ = [
    "CLEAN", "LEVELS_VERSION", "SIZE_CRF", "Av1Crf", "Brightness", "Combination", "Defocus", "Fog", "Gamma", "GaussianNoise",
    "H264Crf", "H264Size", "HevcCrf", "Jpeg", "Level", "LowLight", "MotionBlur", "Webp", "codec_versions", "parse_level",
]  # fmt: skip

LEVELS_VERSION: int = 1  # part of every cache key: increase it whenever the pixels of any level change

_MAX_NAME = 120  # characters; a level's name becomes part of file names, which have at most 255 bytes
_GRAMMAR = (
    "clean, jpeg-Q (quality 1 to 100), webp-Q (0 to 100), brightness-B (factor 0.0001 to 10.0), gamma-G, low-light-S, "
    "gaussian-noise-D, motion-blur-L, defocus-R, fog-D, h264-WxH (even sizes 16 to 8192), h264-crfC or hevc-crfC (0 to 51), "
    "av1-crfC (1 to 63), one of your own such as my_package.levels:Rain(3), or several of them joined with '+'"
)
_KINDS: tuple[type[OneNumber], ...] = (
    Jpeg, Webp, Brightness, Gamma, LowLight, GaussianNoise, MotionBlur, Defocus, Fog, H264Crf, HevcCrf, Av1Crf,
)  # fmt: skip


@dataclass(frozen=True)
class Combination(Level):
    """Two or more levels, applied from left to right."""

    family = "combination"
    parts: tuple[Level, ...] = ()

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

    def apply_to(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        return functools.reduce(lambda clip, part: part.apply_to(clip), self.parts, pictures)

    def versions(self) -> dict[str, str]:
        return {name: version for part in self.parts for name, version in part.versions().items()}


def parse_level(name: str) -> Level:
    """Return the level of this canonical name. Raises `UserError`, which suggests the correct spelling where it can.

    A level of the user's own is not imported.
    """
    if len(name) > _MAX_NAME:
        raise UserError(f"a level name has {len(name)} characters, expected up to {_MAX_NAME}: combine fewer distortions.")
    parts = tuple(_parse_part(part) for part in name.split("+"))
    level = parts[0] if len(parts) == 1 else Combination(parts)
    if level.name != name:
        raise UserError(f"level {name!r} is not in its canonical spelling: write {level.name!r}.")
    return level


def codec_versions(level: Level | None = None) -> dict[str, str]:
    """Versions of the libraries that decide the pixels of `level`, or of JPEG and H.264 where it is None. Part of cache keys."""
    return image_versions() | video_versions() if level is None else dict(level.versions())


def _parse_part(text: str) -> Level:
    """Parse one part leniently, so that `parse_level` can suggest the canonical spelling."""
    written = text.strip()
    lower = written.lower()
    with suppress(ValueError, TypeError):  # of int, float, and of a size with one side
        if lower == CLEAN.name:
            return CLEAN
        for kind in _KINDS:
            if (level := kind.parsed(lower)) is not None:
                return level
        if lower.startswith("h264-"):
            return H264Size(*map(int, lower.removeprefix("h264-").split("x", 1)))
        if (own := parse_own(written)) is not None:
            return own
    raise UserError(f"{text!r} is not a level: write {_GRAMMAR}.")
