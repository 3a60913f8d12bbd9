"""What a report is made from, and the words and numbers that its tables, figures and sentences share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gearnn_ray.evaluation.frequency import high_frequency_share, similarity
from gearnn_ray.evaluation.records import (
    AccuracyRow,
    AverageRow,
    BytesRow,
    ChangeRow,
    DifferenceRow,
    FrequencyRow,
    MemoryRow,
    Picture,
    ShareRow,
    TuningRow,
)
from gearnn_ray.evaluation.report.figures import maps_of
from gearnn_ray.levels.axes import AXIS_TITLES

AtLevelT = TypeVar("AtLevelT", AccuracyRow, DifferenceRow)


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report shows. Rows are those of the tables of the same names; any may be empty.

    release: manifest digest. data: one line, the data set and the number of validation images. task: decides how pictures are
    drawn. budget_floats: M. axes: axis to its levels, sorted. notes: what a reader must know about the methods. failed: label
    of a task to the reason.
    """

    name: str
    release: str
    command: str
    data: str
    network: str
    task: str
    metric: str
    model_floats: int
    budget_floats: int
    seed: int
    axes: Mapping[str, Sequence[str]]
    accuracy: Sequence[AccuracyRow]
    differences: Sequence[DifferenceRow]
    averages: Sequence[AverageRow]
    memory: Sequence[MemoryRow]
    tuning: Sequence[TuningRow]
    bytes: Sequence[BytesRow]
    changes: Sequence[ChangeRow]
    shares: Sequence[ShareRow]
    frequency: Sequence[FrequencyRow]
    pictures: Sequence[Picture]
    notes: Sequence[str]
    failed: Mapping[str, str]


@dataclass(frozen=True)
class Response:
    """One level's frequency response in numbers.

    shares: high-frequency share by network, 0 to 1. similarity: of the changes by both fine-tunes, None if one is missing.
    """

    level: str
    shares: Mapping[str, float]
    similarity: float | None


def responses(e: Evaluation) -> list[Response]:
    """The frequency responses by level."""
    found = []
    for level, maps in maps_of(e.frequency).items():
        alike = None
        if {"original", "switching", "gearnn"} <= maps.keys():
            alike = similarity(*(np.subtract(maps[n], maps["original"]) for n in ("switching", "gearnn")))
        found.append(Response(level, {network: high_frequency_share(map_) for network, map_ in maps.items()}, alike))
    return found


def at_levels(rows: Sequence[AtLevelT], levels: Sequence[str]) -> list[AtLevelT]:
    """The rows of these levels."""
    return [row for row in rows if row["level"] in levels]


def axis_title(axis: str) -> str:
    """The axis in words."""
    return AXIS_TITLES.get(axis, axis)


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def listed(items: Iterable[str]) -> str:
    """`a, b and c`."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def signed(value: float) -> str:
    """Two decimals with a sign (U+2212 for minus); no sign if it rounds to 0."""
    text = f"{value:+.2f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def interval(row: AverageRow | DifferenceRow) -> str:
    """The row's interval in brackets."""
    return f"[{signed(row['low'])}, {signed(row['high'])}]"
