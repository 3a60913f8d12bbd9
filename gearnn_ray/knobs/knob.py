"""The knobs of a camera's encoder, and their notation: `crf=18,23,28`, `size=1,0.75,0.5`, `my_package.knobs:Denoise`.

    knobs = knobs_of(["crf=18,28,38", "rate=1,2,5"])
    settings = settings_of(knobs, {"crf": 28, "rate": 1})

A knob of the user's own is a class with `name`, `values` and `encode`, as in `Knob`.
"""

import importlib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, runtime_checkable

from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.regions import Regions
from gearnn_ray.knobs.settings import Feature, FrameFilter, Settings
from gearnn_ray.models.names import IMPORT_PATH, is_trusted

__all__ = [
    "CodecOption", "FrameFilterThreshold", "FrameRate", "Grid", "JpegQuality", "Knob", "Preset", "Quantisation", "Regions",
    "Resolution", "Value", "knobs_of", "settings_of",
]  # fmt: skip

Value = int | float | str

PRESETS: Final = ("placebo", "veryslow", "slower", "slow", "medium", "fast", "faster", "veryfast", "superfast", "ultrafast")


class Grid(Protocol):
    """The values of a knob: all that is needed to choose among them."""

    @property
    def name(self) -> str:
        """Unlike the name of every other knob in use."""

    @property
    def values(self) -> tuple[Value, ...]:
        """What it can be set to, the best first and the cheapest last; at least two, which JSON keeps as they are."""


@runtime_checkable
class Knob(Grid, Protocol):
    """One thing that can be changed about an encoding. Built-in ones are immutable; all can be pickled."""

    def encode(self, value: Value, settings: Settings) -> Settings:
        """These settings with the knob at one of its values. A pure function."""


@dataclass(frozen=True)
class Quantisation:
    """x264's constant rate factor ("crf"), or the quantisation parameter of all frames ("qp")."""

    values: tuple[Value, ...]
    name: str = "crf"

    def encode(self, value: Value, settings: Settings) -> Settings:
        return replace(settings, crf=float(value)) if self.name == "crf" else replace(settings, qp=int(value))


@dataclass(frozen=True)
class Resolution:
    """Factors of both sides of the frames, or sizes "WIDTHxHEIGHT"."""

    values: tuple[Value, ...]
    name: str = "size"

    def encode(self, value: Value, settings: Settings) -> Settings:
        if isinstance(value, str):
            width, height = map(int, value.split("x"))
            return replace(settings, size=(height, width))
        return replace(settings, size=float(value))


@dataclass(frozen=True)
class FrameRate:
    """One of so many frames is sent."""

    values: tuple[Value, ...]
    name: str = "rate"

    def encode(self, value: Value, settings: Settings) -> Settings:
        return replace(settings, every=int(value))


@dataclass(frozen=True)
class FrameFilterThreshold:
    """By how much a frame must differ from the last one sent (Reducto, Li et al., SIGCOMM 2020)."""

    values: tuple[Value, ...]
    feature: Feature

    @property
    def name(self) -> str:
        return f"filter-{self.feature}"

    def encode(self, value: Value, settings: Settings) -> Settings:
        return replace(settings, frame_filter=FrameFilter(self.feature, float(value)))


@dataclass(frozen=True)
class Preset:
    """x264's presets: how long it searches."""

    values: tuple[Value, ...]
    name: str = "preset"

    def encode(self, value: Value, settings: Settings) -> Settings:
        return replace(settings, preset=str(value))


@dataclass(frozen=True)
class CodecOption:
    """A numeric option of x264. name: the knob's. option: x264's name of it."""

    values: tuple[Value, ...]
    name: str
    option: str

    def encode(self, value: Value, settings: Settings) -> Settings:
        return settings.with_option(self.option, str(value))


@dataclass(frozen=True)
class JpegQuality:
    """Each frame is sent as a JPEG of this quality."""

    values: tuple[Value, ...]
    name: str = "jpeg"

    def encode(self, value: Value, settings: Settings) -> Settings:
        return replace(settings, jpeg_quality=int(value))


@dataclass(frozen=True)
class _Notation:
    """How the values of a built-in knob are written. rising: whether larger values are cheaper; None: in any order."""

    make: Callable[[tuple[Value, ...]], Knob]
    parse: Callable[[str], Value]
    expected: str
    rising: bool | None


def knobs_of(specs: Sequence[str], trust: Collection[str] | None = None) -> tuple[Knob, ...]:
    """The knobs with these specifications: `name=value,value,…` with the best value first, or the import path of the user's own,
    `package.module:name` of a knob, or of a class of which one is made without arguments.

    trust: modules that may be imported, and those below them; None: any, for specifications that the user wrote. Raises UserError
    for an unknown knob or value, fewer than two values, values that are not in order, and knobs that exclude each other.
    """
    if not specs:
        raise UserError("there are no knobs to steer: give at least one, such as crf=18,28,38")
    knobs = tuple(_own(spec, trust) if ":" in spec and "=" not in spec else _built_in(spec) for spec in specs)
    names = [knob.name for knob in knobs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the knob {name} is given {names.count(name)} times, expected once: join its values")
    for alike, why in _ALTERNATIVES:
        if len(both := [name for name in names if name in alike]) > 1:
            raise UserError(f"the knobs {both[0]} and {both[1]} exclude each other, because {why}: leave one of them out")
    if "jpeg" in names and (video := [name for name in names if name in _VIDEO]):
        raise UserError(f"the knob {video[0]} is for video, and jpeg sends stills: leave one of them out")
    return knobs


def settings_of(knobs: Sequence[Knob], values: Mapping[str, object], base: Settings | None = None) -> Settings:
    """The settings with each knob at its value by name, and those not named at their best; base: what no knob changes.

    Raises UserError for a knob that is not among these and for a value that the knob does not have, such as a server may send.
    """
    settings, names = base or Settings(), [knob.name for knob in knobs]
    if unknown := [name for name in values if name not in names]:
        raise UserError(f"there is no knob {unknown[0]!r} here: expected {', '.join(names)}")
    for knob in knobs:
        wanted = values.get(knob.name, knob.values[0])
        found = [value for value in knob.values if value == wanted and isinstance(wanted, bool) == isinstance(value, bool)]
        if not found:
            grid = ", ".join(map(str, knob.values))
            raise UserError(f"the knob {knob.name} cannot be set to {wanted!r}: expected one of {grid}")
        settings = knob.encode(found[0], settings)
    return settings


def _built_in(spec: str) -> Knob:
    name, equals, text = spec.partition("=")
    name = name.strip()
    notation = _BUILT_IN.get(name)
    if notation is None:
        raise UserError(f"there is no knob {name!r}: expected {', '.join(_BUILT_IN)}, or an import path like package.module:name")
    if not equals:
        raise UserError(f"the knob {name} has no values: write e.g. {name}={notation.expected}")
    values = tuple(_value(name, each.strip(), notation) for each in text.split(","))
    return _checked(name, notation.make(values), notation.rising)


def _value(name: str, text: str, notation: _Notation) -> Value:
    try:
        return notation.parse(text)
    except ValueError as error:
        wrong = f"the knob {name} cannot be set to {text!r}: expected {error}, as in {name}={notation.expected}"
        raise UserError(wrong) from None


def _checked(name: str, knob: Knob, rising: bool | None = None) -> Knob:
    """The knob, if it has two different values or more, in order. rising: whether larger values are cheaper; None: any order."""
    values = knob.values
    if len(values) < 2:
        raise UserError(f"the knob {name} has {len(values)} value, expected two at least: add a cheaper one, or leave it out")
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"the knob {name} has the value {twice[0]} more than once: leave the others out")
    numbers = [value for value in values if not isinstance(value, str)]
    areas = [math.prod(map(int, value.split("x"))) for value in values if isinstance(value, str)] if rising is False else []
    if rising is not None and any(each != sorted(each, reverse=not rising) for each in (numbers, areas)):
        grid, order = ", ".join(map(str, values)), "the smallest" if rising else "the largest"
        raise UserError(f"the knob {name} has the values {grid}, expected the best first: {order} is the best")
    return knob


def _own(path: str, trust: Collection[str] | None) -> Knob:
    """The user's own knob at an import path."""
    if not IMPORT_PATH.fullmatch(path):
        raise UserError(f"{path!r} is no knob: expected name=value,value or an import path like package.module:name")
    module, _, name = path.partition(":")
    if trust is not None and not is_trusted(module, trust):
        raise UserError(f"the knob {path} is not in a trusted module: if you trust the code of {module}, give --trust {module}")
    try:
        found = getattr(importlib.import_module(module), name)
        knob = found() if isinstance(found, type) else found
    except Exception as error:  # importing runs the module, which may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the knob {path} cannot be imported ({reason}): check the path, or install the module") from error
    if not isinstance(knob, Knob) or not isinstance(knob.name, str) or not isinstance(knob.values, tuple):
        raise UserError(f"{path} is no knob: expected a class with name, a tuple of values, and encode(value, settings)")
    if wrong := [value for value in knob.values if not isinstance(value, Value) or value != value]:
        raise UserError(f"the knob {knob.name} of {path} has the value {wrong[0]!r}: expected numbers or text")
    return _checked(knob.name, knob)


def _whole(low: int, high: int) -> Callable[[str], Value]:
    def parse(text: str) -> Value:
        if not re.fullmatch(r"[+-]?\d{1,6}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def _number(low: float, high: float) -> Callable[[str], Value]:
    def parse(text: str) -> Value:
        if not re.fullmatch(r"[+-]?(\d{1,6}(\.\d{0,9})?|\.\d{1,9})", text, re.ASCII) or not low <= float(text) <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        value = float(text)
        return int(value) if value.is_integer() else value

    return parse


def _size(text: str) -> Value:
    if sides := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII):
        if all(16 <= int(side) <= 8192 and int(side) % 2 == 0 for side in sides.groups()):
            return text
    elif re.fullmatch(r"\d?\.?\d{1,9}", text, re.ASCII) and 0.01 <= float(text) <= 1:
        return _number(0.01, 1)(text)
    raise ValueError("a factor from 0.01 to 1, or WIDTHxHEIGHT with even sides from 16 to 8192")


def _preset(text: str) -> Value:
    if text not in PRESETS:
        raise ValueError(f"one of {', '.join(PRESETS)}")
    return text


_FEATURES: Final[tuple[Feature, ...]] = ("pixel", "area", "edge")

_BUILT_IN: Final[dict[str, _Notation]] = {
    "crf": _Notation(Quantisation, _number(0, 51), "18,28,38", True),
    "qp": _Notation(partial(Quantisation, name="qp"), _whole(0, 51), "18,28,38", True),
    "size": _Notation(Resolution, _size, "1,0.75,0.5", False),
    "rate": _Notation(FrameRate, _whole(1, 1000), "1,2,5", True),
    **{
        f"filter-{each}": _Notation(partial(FrameFilterThreshold, feature=each), _number(0, 1), "0,0.01,0.05", True)
        for each in _FEATURES
    },
    "regions": _Notation(Regions, _number(0, 51), "0,4,8,12", True),
    "preset": _Notation(Preset, _preset, "veryslow,medium,veryfast", None),
    "bframes-bias": _Notation(partial(CodecOption, name="bframes-bias", option="b-bias"), _whole(-90, 100), "0,50,100", None),
    "chroma-qp-offset": _Notation(
        partial(CodecOption, name="chroma-qp-offset", option="chroma-qp-offset"), _whole(-12, 12), "0,6,12", True
    ),
    "jpeg": _Notation(JpegQuality, _whole(1, 100), "90,50,10", False),
}

_ALTERNATIVES: Final = (
    (("crf", "qp", "jpeg"), "each sets the quality of all frames"),
    (tuple(f"filter-{feature}" for feature in _FEATURES), "frames are filtered by one feature"),
    (("qp", "regions"), "x264 has no regions with a constant quantisation parameter"),
)
_VIDEO: Final = ("regions", "preset", "bframes-bias", "chroma-qp-offset")
"""Knobs that stills do not have."""
