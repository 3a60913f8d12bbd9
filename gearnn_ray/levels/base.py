"""What a distortion level is: an immutable value with a canonical name, which distorts clips of frames."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import __version__ as pillow_version
from PIL import features

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.h264_codec import Frame, Picture, UnequalFramesError

__all__ = ["Frame", "Level", "Picture", "UnequalFramesError", "expect", "image_versions"]


@dataclass(frozen=True)
class Level(ABC):
    """One level of distortion: immutable, hashable, and equal to every level of the same name."""

    family: ClassVar[str]  # such as jpeg, h264-crf or combination; a plot draws one curve per family

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

    @property
    def parts(self) -> "tuple[Level, ...]":
        """The levels that are applied one after the other: of a combination its parts, of any other level itself."""
        return (self,)

    def apply(self, frames: Sequence[Frame]) -> list[Frame]:
        """Distort one clip of consecutive uint8 [H, W, 3] frames. Raises the errors of `stream`."""
        return list(self.stream(frames))

    def stream(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Distort one clip lazily: one uint8 [H, W, 3] frame per input frame, in order, with at most a few dozen in memory.

        Levels of video codecs raise `UnequalFramesError` at frames of different sizes; others treat each frame independently.
        """
        return (picture.pixels for picture in self.pictures(frames))

    def pictures(self, frames: Iterable[Frame]) -> Iterator[Picture]:
        """As `stream`, each frame with the QP of the picture that the level's last H.264 part made of it."""
        return self.apply_to(map(Picture, frames))

    def apply_to(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        """As `pictures`, of frames that other levels have made."""
        return (Picture(self.distort(pixels), qp) for pixels, qp in pictures)

    def distort(self, frame: Frame) -> Frame:
        """One frame, of a level that treats each frame independently."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that decide the pixels."""
        return image_versions()

    def __str__(self) -> str:
        return self.name


def image_versions() -> dict[str, str]:
    """Versions of Pillow and its libjpeg, which read images and write JPEGs."""
    libjpeg = features.version_feature("libjpeg_turbo") or features.version_codec("jpg")
    return {"pillow": pillow_version, "libjpeg": str(libjpeg)}


def expect(holds: bool, level: Level, found: str, expected: str, example: str) -> None:
    """Raise UserError about a level's parameter unless this holds."""
    if not holds:
        raise UserError(f"level {level.name!r} has {found}, expected {expected}: write e.g. {example!r}.")
