"""What a sweep over the budget M found: points, their Pareto front and its knee, and the recommended budget.

Plain values; knows nothing of Ray, networks or files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypedDict

from gearnn_ray.offline.level_run import LevelResult


class SweepRow(TypedDict):
    """A row of `tables.SWEEP`: one point at one level."""

    budget: str
    budget_floats: int
    model_floats: int
    value: str
    level: str
    metric: str
    original: float
    full: float | None
    adaptor: float | None
    floats: int
    bytes: int
    layers: int
    seconds_partial: float
    complete: bool
    mean: float
    pareto: bool
    recommended: bool


@dataclass(frozen=True)
class Point:
    """One budget under one importance function, with the results of its levels.

    budget: as configured. floats: M. importance: the function's name. complete: every level has a result (none failed, and ASHA
    did not stop the trial).
    """

    budget: str
    floats: int
    importance: str
    results: tuple[LevelResult, ...]
    complete: bool

    @property
    def score(self) -> float:
        """Mean over its levels of the score with adaptors, in percent; NaN without any."""
        return fmean([r.adaptor for r in self.results if r.adaptor is not None] or [math.nan])

    @property
    def bytes(self) -> int:
        """Bytes of its levels' adaptors in the store, without the base; equal adaptors are stored once."""
        return sum({result.digest: result.bytes for result in self.results}.values())


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The complete points that no other dominates in memory and score, by ascending memory."""
    front: list[Point] = []
    for point in sorted((p for p in points if p.complete), key=lambda p: (p.bytes, -p.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def knee(front: Sequence[Point]) -> Point | None:
    """The point of a Pareto front farthest above the line between its ends: from there, more memory gains little.

    Memory and score are scaled to [0, 1] first (Satopää et al. 2011, "Finding a Kneedle in a Haystack"). None if there are fewer
    than three points, or none lies above the line.
    """
    if len(front) < 3:
        return None
    first, last = front[0], front[-1]

    def above(point: Point) -> float:
        return (point.score - first.score) / (last.score - first.score) - (point.bytes - first.bytes) / (last.bytes - first.bytes)

    best = max(front, key=above)
    return best if above(best) > 0 else None


def recommended(points: Sequence[Point], within: float) -> Point | None:
    """The complete point of least memory whose score is at most `within` points below the best; None without any."""
    front = pareto_front(points)
    return next((point for point in front if point.score >= front[-1].score - within), None)


def sentence(points: Sequence[Point], within: float, metric: str) -> str:
    """The recommendation in words."""
    point, front = recommended(points, within), pareto_front(points)
    if point is None:
        return "No budget was evaluated at every level, so none is recommended."
    several = len({p.importance for p in points}) > 1

    def described(p: Point) -> str:
        return f"{p.budget}{f' by {p.importance}' if several else ''} ({p.score:.1f} {metric}, {_size(p.bytes)})"

    text, best = f"Recommended: {described(point)}.", front[-1]
    if best is point:
        return f"{text} It is also the most accurate budget tried."
    return f"{text} It is the smallest within {within:g} points of the most accurate budget tried, {described(best)}."


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def rows_of(points: Sequence[Point], metric: str, model_floats: int, within: float) -> list[SweepRow]:
    """One row per point and level."""
    front = pareto_front(points)
    marked = recommended(points, within)
    return [
        {
            "budget": point.budget,
            "budget_floats": point.floats,
            "model_floats": model_floats,
            "value": point.importance,
            "level": result.level,
            "metric": metric,
            "original": result.original,
            "full": result.full,
            "adaptor": result.adaptor,
            "floats": result.floats,
            "bytes": result.bytes,
            "layers": len(result.layers),
            "seconds_partial": result.seconds_partial,
            "complete": point.complete,
            "mean": point.score,
            "pareto": point in front,
            "recommended": point is marked,
        }
        for point in points
        for result in point.results
    ]
