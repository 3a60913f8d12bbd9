"""What a camera and the service tell each other about one segment. Both use it, and neither trusts the other.

    request   Head, a line of JSON ─ the segment, `Head.bytes` long ─ Report, a line of JSON
    reply     a line of JSON for each frame ─ Advice, a line of JSON

The report comes behind the segment, because the camera encodes its probes while the segment is under way.
"""

import base64
import binascii
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StringConstraints, ValidationError, model_validator

from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.controller import Ceiling, Goal, Outcome, Trade
from gearnn_ray.knobs.knob import Grid, Value
from gearnn_ray.knobs.tiles import tiles_of

__all__ = [
    "CONTENT_TYPE", "HEAD_BYTES", "Advice", "Costs", "Head", "Probe", "Report", "Tiles", "Values", "WireError", "check_knobs",
    "jpegs", "parsed",
]  # fmt: skip

CONTENT_TYPE: Final = "application/x-gearnn-segment"
HEAD_BYTES: Final = 32_768
"""Most bytes of a head."""
_TILE_VALUES = 255  # a tile's error is a share of the largest one, in steps of its root: small errors need the finer steps
_MOST_KNOBS, _MOST_VALUES, _MOST_FRAMES, _MOST_SIDE = 8, 64, 3000, 16_384
_MOST_GOAL = 1e15

_NAME = r"^[A-Za-z0-9._-]{1,64}$"
_LONGEST = 64  # characters of a value
Name = Annotated[str, StringConstraints(pattern=_NAME)]
WireValue = StrictInt | StrictFloat | Annotated[str, StringConstraints(strict=True, max_length=_LONGEST)]
Side = Annotated[int, Field(ge=1, le=_MOST_SIDE)]
ModelT = TypeVar("ModelT", bound=BaseModel)


class WireError(UserError):
    """A message that is not as it must be."""

    status = 400


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def line(self) -> bytes:
        """As it is sent."""
        return self.model_dump_json(exclude_none=True).encode() + b"\n"


def parsed(kind: type[ModelT], line: bytes, what: str) -> ModelT:
    """The message in a line of JSON. what: its name in a sentence. Raises WireError."""
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        reason = first["msg"].removeprefix("Value error, ")
        raise WireError(f"{what} is not as expected{f' at {where}' * bool(where)}: {reason[0].lower()}{reason[1:200]}") from None


def check_knobs(knobs: Sequence[Grid]) -> None:
    """Raise UserError for knobs that cannot be told to the service."""
    if len(knobs) > _MOST_KNOBS:
        raise UserError(f"{len(knobs)} knobs are given: the service steers {_MOST_KNOBS} at most, so leave some out")
    for knob in knobs:
        if not re.match(_NAME, knob.name):
            raise UserError(f"the name of the knob {knob.name!r} has other than 1 to 64 of A-Z, a-z, 0-9 and . _ -: rename it")
        if len(knob.values) > _MOST_VALUES:
            raise UserError(f"the knob {knob.name} has {len(knob.values)} values: expected {_MOST_VALUES} at most")
        if too_long := [value for value in knob.values if len(str(value)) > _LONGEST]:
            found = f"the knob {knob.name} has the value {str(too_long[0])[:20]}…"
            raise UserError(f"{found}: expected {_LONGEST} characters at most")


class Tiles(_Message):
    """Errors of all tiles. largest: of them. data: base64 of zlib of a byte for each tile, 255 · √(error / largest)."""

    largest: float = Field(ge=0, le=1e9)
    data: str

    @classmethod
    def of(cls, errors: NDArray[np.floating]) -> Self:
        """Errors [h, w], none of them below 0."""
        largest = float(errors.max(initial=0))
        roots = np.sqrt(errors / largest) if largest else np.zeros_like(errors)
        packed = zlib.compress(np.rint(_TILE_VALUES * roots).astype(np.uint8).tobytes())
        return cls(largest=largest, data=base64.b64encode(packed).decode())

    def errors(self, size: tuple[int, int]) -> NDArray[np.float32]:
        """Errors [h, w] of the tiles of a frame of this size (height, width). Raises WireError where there are more or fewer."""
        rows, columns = tiles_of(size)
        try:
            packed = base64.b64decode(self.data, validate=True)
            unpacker = zlib.decompressobj()
            values = unpacker.decompress(packed, rows * columns + 1)  # no more is unpacked, whatever the data claim
        except (binascii.Error, ValueError, zlib.error):
            raise WireError("the errors of tiles are not base64 of zlib: correct the camera") from None
        if len(values) != rows * columns or not unpacker.eof:
            raise WireError(f"the errors are not of the {rows} × {columns} tiles of the frames: correct the camera")
        roots = np.frombuffer(values, np.uint8).reshape(rows, columns).astype(np.float32) / _TILE_VALUES
        errors: NDArray[np.float32] = (self.largest * roots**2).astype(np.float32)
        return errors


class Head(_Message):
    """What a segment is.

    bytes: of the segment, which is H.264 (Annex B), or JPEGs of so many bytes each (`packets`), one after the other. size: height
    and width of the frames sent; of H.264, whose sides are even, without the padding. frame: of the frames as the camera sees
    them. sent: which of the `frames` of the segment are in it. start: of the segment, and its duration, in seconds of the stream.
    crf, qp: what the encoder was told. gradient: whether errors are weighed by the network's gradient, or all alike. knobs: all
    values of each, the best first. values: those of this segment. price, ceiling: the goal, `Trade` unless there is a ceiling
    in bits a second.
    """

    version: Literal[1] = 1
    codec: Literal["h264", "jpeg"]
    bytes: int = Field(ge=1, le=2**31)
    packets: tuple[int, ...] = Field((), max_length=_MOST_FRAMES)
    size: tuple[Side, Side]
    frame: tuple[Side, Side]
    frames: int = Field(ge=1, le=_MOST_FRAMES)
    sent: tuple[int, ...] = Field(min_length=1, max_length=_MOST_FRAMES)
    start: float = Field(ge=-1e9, le=1e9)
    seconds: float = Field(gt=0, le=3600)
    crf: float | None = Field(None, ge=0, le=51)
    qp: int | None = Field(None, ge=0, le=51)
    knobs: dict[Name, Annotated[tuple[WireValue, ...], Field(min_length=2, max_length=_MOST_VALUES)]] = Field(
        min_length=1, max_length=_MOST_KNOBS
    )
    values: dict[Name, WireValue]
    gradient: bool = False
    price: float | None = Field(None, ge=0, le=_MOST_GOAL)
    ceiling: float | None = Field(None, gt=0, le=_MOST_GOAL)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if list(self.sent) != sorted(set(self.sent)) or self.sent[0] < 0 or self.sent[-1] >= self.frames:
            raise ValueError(f"sent must be rising numbers from 0 to {self.frames - 1}")
        one_each = len(self.packets) == len(self.sent) and min(self.packets) > 0 and sum(self.packets) == self.bytes
        if self.codec == "jpeg" and not one_each:
            raise ValueError("packets must be the bytes of each JPEG, and as many together as the segment")
        if self.values.keys() != self.knobs.keys():
            raise ValueError("values must have one value of each knob")
        for name, grid in self.knobs.items():
            if len(set(map(str, grid))) != len(grid) or self.values[name] not in grid:
                raise ValueError(f"the knob {name} must have different values, among them that of the segment")
        return self

    @property
    def goal(self) -> Goal:
        return Trade(self.price) if self.ceiling is None else Ceiling(self.ceiling)

    @property
    def grids(self) -> "tuple[Values, ...]":
        return tuple(Values(name, grid) for name, grid in self.knobs.items())

    @property
    def report_bytes(self) -> int:
        """Most bytes of the report."""
        rows, columns = tiles_of(self.frame)
        return 1024 + (1 + len(self.knobs)) * (512 + rows * columns * 3 // 2)


class Probe(_Message):
    """The segment with one knob at another value. bytes: of it. errors: of its tiles; None where it shows the same pixels."""

    value: WireValue
    bytes: int = Field(ge=0, le=2**31)
    errors: Tiles | None = None


class Report(_Message):
    """What the camera found out about a segment. errors: of its tiles; None where it had no time for probes."""

    errors: Tiles | None = None
    probes: dict[Name, Probe] = Field({}, max_length=_MOST_KNOBS)


class Advice(_Message):
    """The knobs of the next segment, and which values are to be probed. price: λ. steps: of the controller so far. ignored:
    losses that were not finite. problem: why the knobs are as they were.
    """

    knobs: dict[Name, WireValue] = Field(min_length=1, max_length=_MOST_KNOBS)
    probes: dict[Name, WireValue] = Field({}, max_length=_MOST_KNOBS)
    price: float | None = None
    steps: int = Field(0, ge=0)
    ignored: int = Field(0, ge=0)
    problem: str | None = Field(None, max_length=1000)


@dataclass(frozen=True)
class Values:
    """A knob as the service knows it."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Costs:
    """What a segment cost, in numbers: what a controller steps by. deployed: None where the camera had no time for probes."""

    knobs: tuple[Values, ...]
    goal: Goal
    values: Mapping[str, Value]
    seconds: float
    deployed: Outcome | None = None
    probed: Mapping[str, Value] | None = None
    probes: Mapping[str, Outcome | None] | None = None

    @classmethod
    def of(cls, head: Head, report: Report, weights: NDArray[np.float32] | None) -> "Costs":
        """weights: of the tiles of the camera's frames. Raises WireError for a report of other knobs or tiles."""
        nothing = cls(head.grids, head.goal, head.values, head.seconds)
        if report.errors is None or weights is None:
            return nothing
        for name, probe in report.probes.items():
            if probe.value not in head.knobs.get(name, ()):
                found = f"the report has a probe of {name} at {probe.value!r}"
                raise WireError(f"{found}, which is not among its values: correct the camera")
        overhead = len(head.line()) + len(report.line())  # a ceiling is to hold for all bytes

        def outcome(errors: Tiles, size: int) -> Outcome:
            return Outcome(float((weights * errors.errors(head.frame)).sum()), 8 * (size + overhead))

        return cls(
            head.grids, head.goal, head.values, head.seconds, outcome(report.errors, head.bytes),
            {name: probe.value for name, probe in report.probes.items()},
            {
                name: None if probe.errors is None else outcome(probe.errors, probe.bytes)
                for name, probe in report.probes.items()
            },
        )  # fmt: skip


def jpegs(data: bytes, head: Head) -> Iterator[bytes]:
    """The single JPEGs of a segment."""
    place = 0
    for size in head.packets:
        yield data[place : place + size]
        place += size
