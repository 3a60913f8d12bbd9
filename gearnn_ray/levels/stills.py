"""Levels that treat each frame independently: compression, light, lens and sensor.

Chance is drawn from a frame's own pixels, so that the same frame is always distorted in the same way.
"""

import functools
import io
import math
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, features

from gearnn_ray.levels.base import Frame, Level, OneNumber, image_versions

__all__ = [
    "CLEAN", "Brightness", "Clean", "Defocus", "Fog", "Gamma", "GaussianNoise", "Jpeg", "LowLight", "MotionBlur", "Webp",
]  # fmt: skip

_FULL_WELL: Final = 5_000.0  # electrons that a white pixel holds: a small sensor
_READ_NOISE: Final = 3.0  # electrons, standard deviation
_MOST_GAIN: Final = 16.0  # of the camera's exposure control: in less light than a sixteenth, pictures are dark as well
_AIRLIGHT: Final = 230.0  # pixel value of the fog itself
_HORIZON: Final = 1 / 3  # of a frame's height
_NEAREST: Final = 0.1  # depth of the lowest row; the sky and all that is far away have 1


@dataclass(frozen=True)
class Clean(Level):
    """The undistorted frames."""

    family = "clean"
    name = "clean"

    def distort(self, frame: Frame) -> Frame:
        return frame


CLEAN = Clean()


@dataclass(frozen=True)
class Jpeg(OneNumber):
    """JPEG compression by Pillow at a quality of 1 to 100, with its default 4:2:0 chroma subsampling."""

    family = "jpeg"
    limits, quantity, example = (1, 100), "quality", "jpeg-10"
    quality: int

    def distort(self, frame: Frame) -> Frame:
        return _through_file(frame, "JPEG", self.quality)


@dataclass(frozen=True)
class Webp(OneNumber):
    """Lossy WebP compression by Pillow at a quality of 0 to 100, with its default method."""

    family = "webp"
    limits, quantity, example = (0, 100), "quality", "webp-10"
    quality: int

    def distort(self, frame: Frame) -> Frame:
        return _through_file(frame, "WEBP", self.quality)

    def versions(self) -> dict[str, str]:
        return image_versions() | {"webp": str(features.version_module("webp"))}


def _through_file(frame: Frame, kind: str, quality: int) -> Frame:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, kind, quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


@dataclass(frozen=True)
class Brightness(OneNumber):
    """Pillow's `ImageEnhance.Brightness`: a factor below 1 darkens, a factor above 1 brightens."""

    family = "brightness"
    # str(float) uses scientific notation below 0.0001, where every pixel is black anyway
    limits, quantity, example = (1e-4, 10.0), "factor", "brightness-0.4"
    factor: float

    def distort(self, frame: Frame) -> Frame:
        return np.asarray(ImageEnhance.Brightness(Image.fromarray(frame)).enhance(self.factor))


@dataclass(frozen=True)
class Gamma(OneNumber):
    """Pixel values to this power, of values from 0 to 1: above 1 the shadows darken, below 1 they brighten."""

    family = "gamma"
    limits, quantity, example = (0.1, 10.0), "exponent", "gamma-2.2"
    exponent: float

    def distort(self, frame: Frame) -> Frame:
        table = np.rint(255 * (np.arange(256) / 255) ** self.exponent).astype(np.uint8)
        return np.asarray(table[frame])


@dataclass(frozen=True)
class GaussianNoise(OneNumber):
    """White Gaussian noise of this standard deviation, in pixel values, on every channel; rounded and cut off at 0 and 255."""

    family = "gaussian-noise"
    limits, quantity, example = (0.1, 255.0), "standard deviation", "gaussian-noise-20.0"
    deviation: float

    def distort(self, frame: Frame) -> Frame:
        noise = _chance(frame).standard_normal(frame.shape, np.float32) * np.float32(self.deviation)
        return _rounded(frame + noise)

    def versions(self) -> dict[str, str]:
        return image_versions() | {"numpy": np.__version__}


@dataclass(frozen=True)
class LowLight(OneNumber):
    """A sensor that receives this share of the light, and the gain that makes up for it, at most 16 times.

    The light of a pixel (linear, from sRGB) is counted in electrons, 5,000 of a white one at full light, with the noise of
    photons (Poisson) and of reading (3 electrons); the gain brightens signal and noise alike.
    """

    family = "low-light"
    limits, quantity, example = (1e-4, 1.0), "a share of", "low-light-0.05"
    share: float

    def distort(self, frame: Frame) -> Frame:
        chance, white = _chance(frame), _FULL_WELL * self.share
        electrons = chance.poisson(_linear()[frame] * white) + _READ_NOISE * chance.standard_normal(frame.shape)
        light = np.clip(electrons / white * min(1.0, _MOST_GAIN * self.share), 0, 1)
        return _rounded(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))

    def versions(self) -> dict[str, str]:
        return image_versions() | {"numpy": np.__version__}


@dataclass(frozen=True)
class MotionBlur(OneNumber):
    """The mean over this many pixels of a row, as if the camera turned while its shutter was open."""

    family = "motion-blur"
    limits, quantity, example = (2, 200), "a length of", "motion-blur-9"
    unit = "pixels"
    length: int

    def distort(self, frame: Frame) -> Frame:
        left = (self.length - 1) // 2
        sums = _row_sums(np.pad(frame, ((0, 0), (left, self.length - 1 - left), (0, 0)), "edge"), self.length)
        return _mean(sums, self.length)


@dataclass(frozen=True)
class Defocus(OneNumber):
    """The mean over a disk of this radius in pixels: a lens that is out of focus."""

    family = "defocus"
    limits, quantity, example = (1, 50), "a radius of", "defocus-3"
    unit = "pixels"
    radius: int

    def distort(self, frame: Frame) -> Frame:
        (height, width, _), radius = frame.shape, self.radius
        padded = np.pad(frame, ((radius, radius), (radius, radius), (0, 0)), "edge")
        sums, area = np.zeros(frame.shape, np.int64), 0
        for row in range(-radius, radius + 1):
            half = math.isqrt(radius**2 - row**2)
            line = padded[radius + row : radius + row + height, radius - half : radius + half + width]
            sums += _row_sums(line, 2 * half + 1)
            area += 2 * half + 1
        return _mean(sums, area)


@dataclass(frozen=True)
class Fog(OneNumber):
    """Fog of this density over a level road: each pixel becomes the fog's colour by 1 - exp(-density × depth).

    A frame does not tell its depths. They are taken as those of a plain seen by a camera whose horizon is at a third of the
    height: 0.1 at the lowest row, growing to 1 near the horizon and above it.
    """

    family = "fog"
    limits, quantity, example = (0.01, 20.0), "a density of", "fog-2.0"
    density: float

    def distort(self, frame: Frame) -> Frame:
        below = (np.arange(frame.shape[0]) + 0.5) / frame.shape[0] - _HORIZON
        depth = np.clip(_NEAREST * (1 - _HORIZON) / np.maximum(below, 1e-9), _NEAREST, 1)
        clear = np.exp(-self.density * depth)[:, None, None]
        return _rounded(clear * frame + (1 - clear) * _AIRLIGHT)


def _chance(frame: Frame) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(np.ascontiguousarray(frame).tobytes()), *frame.shape])


def _rounded(values: NDArray[np.floating]) -> Frame:
    return np.asarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _row_sums(frame: Frame, length: int) -> NDArray[np.int64]:
    """Sums over windows of this length in every row: [H, W - length + 1, 3]."""
    sums = np.pad(np.cumsum(frame, 1, np.int64), ((0, 0), (1, 0), (0, 0)))
    return np.asarray(sums[:, length:] - sums[:, :-length])


def _mean(sums: NDArray[np.int64], count: int) -> Frame:
    """Exact, and rounded half up."""
    return np.asarray(((2 * sums + count) // (2 * count)).astype(np.uint8))


@functools.cache
def _linear() -> NDArray[np.float64]:
    """The light of each pixel value of sRGB, 0 to 1."""
    values = np.arange(256) / 255
    return np.asarray(np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4))
