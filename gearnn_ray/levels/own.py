"""A level of the user's own, by import path: `my_package.levels:Rain(3)`.

    class Rain:
        def __init__(self, rate: float) -> None: ...
        def __call__(self, frame): ...  # RGB uint8 [H, W, 3] in, the same out

Reading such a name imports nothing, because names come from releases, too: only distorting a frame does.
"""

import functools
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.base import Frame, Level, image_versions

__all__ = ["Own", "parse_own"]

_NAME: Final = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)\(([^()]*)\)", re.ASCII)
_MOST_ARGUMENTS = 4
_TRIED: Final = (24, 32, 3)  # shape of the frame that `check` distorts


@dataclass(frozen=True)
class Own(Level):
    """A distortion of the user's own: a class, and the numbers that one is made with."""

    path: str
    arguments: tuple[float, ...]

    @property
    def family(self) -> str:  # type: ignore[override]  # each class is a family of its own
        """The import path of the class."""
        return self.path

    @property
    def name(self) -> str:
        return f"{self.path}({','.join(map(_spelled, self.arguments))})"

    @property
    def value(self) -> float | None:
        """The first number; None without any."""
        return self.arguments[0] if self.arguments else None

    @property
    def module(self) -> str:
        """The module that has the class."""
        return self.path.partition(":")[0]

    def distort(self, frame: Frame) -> Frame:
        """Raises UserError if the class cannot be imported, fails, or returns anything but a frame of the same size."""
        made = _made(self)
        try:
            distorted = made(frame.copy())
        except Exception as error:  # the user's code may raise anything
            raise UserError(f"the level {self.name} failed on a frame ({_reason(error)}): correct it.") from error
        if not isinstance(distorted, np.ndarray) or distorted.shape != frame.shape or distorted.dtype != np.uint8:
            found = (
                f"{distorted.dtype} {list(distorted.shape)}" if isinstance(distorted, np.ndarray) else type(distorted).__name__
            )
            raise UserError(f"the level {self.name} returned {found} for a frame: expected uint8 {list(frame.shape)}.")
        return distorted

    def check(self) -> None:
        """Raise UserError unless the class can be imported and distorts a frame."""
        self.distort(np.random.default_rng(0).integers(0, 256, _TRIED, np.uint8))

    def versions(self) -> dict[str, str]:
        """With a digest of the class's source, so that images made by another version of it are not reused."""
        try:
            source = inspect.getsource(type(_made(self)))
        except (OSError, TypeError):
            source = ""
        return image_versions() | {self.path: hashlib.sha256(source.encode()).hexdigest()[:12]}


def parse_own(text: str) -> Own | None:
    """The level of the user's own with this name; None if this is no such name. Imports nothing. Raises ValueError for arguments
    that are not numbers.
    """
    if (found := _NAME.fullmatch(text)) is None:
        return None
    module, name, arguments = found.groups()
    numbers = tuple(float(each) for each in arguments.split(",")) if arguments.strip() else ()
    if len(numbers) > _MOST_ARGUMENTS or not all(np.isfinite(numbers)):
        raise ValueError
    return Own(f"{module}:{name}", numbers)


def _spelled(number: float) -> str:
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else str(number)


@functools.lru_cache(32)
def _made(level: Own) -> Callable[[Frame], object]:
    module, _, name = level.path.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)(*map(_as_given, level.arguments))
    except Exception as error:  # importing runs the module, which may raise anything
        found = f"the level {level.name} cannot be made ({_reason(error)})"
        raise UserError(f"{found}: check the path and the numbers, or install {module}.") from error
    if not callable(made):
        raise UserError(f"the level {level.name} cannot be called: expected a class with __call__(frame).")
    return made  # type: ignore[no-any-return]


def _as_given(number: float) -> float | int:
    return int(number) if number.is_integer() else number


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
