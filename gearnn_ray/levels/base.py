"""What a distortion level is: an immutable value with a canonical name, which distorts clips of frames."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from PIL import __version__ as pillow_version
from PIL import features

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.h264_codec import Frame, Picture, UnequalFramesError

__all__ = ["Frame", "Level", "OneNumber", "Picture", "UnequalFramesError", "expect", "image_versions"]


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


@dataclass(frozen=True)
class OneNumber(Level):
    """A level that its family and one number name, such as `fog-2.0`. The number is the only field of a subclass.

    limits: least and most number, whole ones for whole numbers. quantity, unit: what the number is, in the sentence of an error.
    """

    limits: ClassVar[tuple[int, int] | tuple[float, float]]
    quantity: ClassVar[str]
    example: ClassVar[str]
    unit: ClassVar[str] = ""
    separator: ClassVar[str] = "-"

    def __post_init__(self) -> None:
        least, most = self.limits
        fits = least <= self._number <= most
        expect(fits, self, f"{self.quantity} {self._number}", f"{least} to {most} {self.unit}".rstrip(), self.example)

    @classmethod
    def parsed(cls, text: str) -> Self | None:
        """The level of a name in lower case; None if it is of another family. Raises ValueError for what is no number."""
        prefix = cls.family + cls.separator
        if not text.startswith(prefix):
            return None
        return cls(type(cls.limits[0])(text.removeprefix(prefix)))  # type: ignore[call-arg]  # a subclass has the field

    @property
    def name(self) -> str:
        return f"{self.family}{self.separator}{type(self.limits[0])(self._number)}"

    @property
    def _number(self) -> float:
        number: float = next(iter(vars(self).values()))
        return number


def image_versions() -> dict[str, str]:
    """Versions of Pillow and its libjpeg, which read images and write JPEGs."""
    libjpeg = features.version_feature("libjpeg_turbo") or features.version_codec("jpg")
    return {"pillow": pillow_version, "libjpeg": str(libjpeg)}


def expect(holds: bool, level: Level, found: str, expected: str, example: str) -> None:
    """Raise UserError about a level's parameter unless this holds."""
    if not holds:
        raise UserError(f"level {level.name!r} has {found}, expected {expected}: write e.g. {example!r}.")
