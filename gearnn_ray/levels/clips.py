"""Levels of video codecs: all frames of a clip are encoded as one video."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gearnn_ray.levels import video_codecs
from gearnn_ray.levels.base import Frame, Level, OneNumber, Picture, expect, image_versions
from gearnn_ray.levels.h264_codec import equal_sizes, through_h264, video_versions

__all__ = ["SIZE_CRF", "Av1Crf", "H264Crf", "H264Size", "HevcCrf"]

SIZE_CRF = 18  # constant rate factor of `h264-WxH` levels, as in the paper


@dataclass(frozen=True)
class H264Size(Level):
    """Scaling to width × height pixels (Pillow's antialiased bicubic), then H.264 at CRF 18. The frame keeps the new size."""

    family = "h264-size"
    width: int
    height: int

    def __post_init__(self) -> None:
        for side in (self.width, self.height):
            fits = 16 <= side <= 8192 and side % 2 == 0
            expect(fits, self, f"a side of {side}", "even numbers from 16 to 8192", "h264-512x256")

    @property
    def name(self) -> str:
        return f"h264-{self.width}x{self.height}"

    def apply_to(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        return through_h264(map(self.distort, equal_sizes(pixels for pixels, _ in pictures)), SIZE_CRF)

    def distort(self, frame: Frame) -> Frame:
        size = (self.width, self.height)
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))

    def versions(self) -> dict[str, str]:
        return image_versions() | video_versions()


@dataclass(frozen=True)
class H264Crf(OneNumber):
    """H.264 at the frame's own size, with a constant rate factor (CRF) from 0 (best) to 51 (worst)."""

    family = "h264-crf"
    separator = ""
    limits, quantity, example = (0, 51), "CRF", "h264-crf24"
    crf: int

    def apply_to(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        return through_h264(equal_sizes(pixels for pixels, _ in pictures), self.crf)

    def versions(self) -> dict[str, str]:
        return image_versions() | video_versions()


@dataclass(frozen=True)
class HevcCrf(OneNumber):
    """H.265 (HEVC) by libx265 at the frame's own size, with a constant rate factor from 0 (best) to 51 (worst)."""

    family = "hevc-crf"
    separator = ""
    limits, quantity, example = (0, 51), "CRF", "hevc-crf28"
    crf: int

    def apply_to(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        return video_codecs.HEVC.through(equal_sizes(pixels for pixels, _ in pictures), self.crf)

    def versions(self) -> dict[str, str]:
        return image_versions() | video_codecs.HEVC.versions()


@dataclass(frozen=True)
class Av1Crf(OneNumber):
    """AV1 by SVT-AV1 at the frame's own size, with a constant rate factor from 1 (best) to 63 (worst)."""

    family = "av1-crf"
    separator = ""
    limits, quantity, example = (1, 63), "CRF", "av1-crf40"
    crf: int

    def apply_to(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        return video_codecs.AV1.through(equal_sizes(pixels for pixels, _ in pictures), self.crf)

    def versions(self) -> dict[str, str]:
        return image_versions() | video_codecs.AV1.versions()
