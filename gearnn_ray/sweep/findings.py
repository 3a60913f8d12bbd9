"""What a sweep over the budget M found: points, their Pareto front and its knee, the budget worth recommending.

Plain values; knows nothing of Ray, networks or files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gearnn_ray.offline.level_run import LevelResult


@dataclass(frozen=True)
class Point:
    """One budget under one value function, with what is known of its levels.

    budget: as asked for. floats: M. value: name of the value function. complete: every level was judged (none failed, and ASHA
    did not stop it).
    """

    budget: str
    floats: int
    value: str
    results: tuple[LevelResult, ...]
    complete: bool

    @property
    def score(self) -> float:
        """Mean over its levels of the score with adaptors, in percent; NaN without any."""
        return fmean([r.adaptor for r in self.results if r.adaptor is not None] or [math.nan])

    @property
    def bytes(self) -> int:
        """What its levels' adaptors take in the store, beside the base; one that levels share is there once."""
        return sum({result.digest: result.bytes for result in self.results}.values())


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The complete points that no other beats: less memory or a better score than each; by memory, ascending."""
    front: list[Point] = []
    for point in sorted((p for p in points if p.complete), key=lambda p: (p.bytes, -p.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def knee(front: Sequence[Point]) -> Point | None:
    """Where more memory begins to give little: the point of a Pareto front farthest above the line between its ends.

    Memory and score are scaled to [0, 1] first (Satopää et al. 2011, "Finding a Kneedle in a Haystack"). None where fewer than
    three points leave no bend.
    """
    if len(front) < 3:
        return None
    first, last = front[0], front[-1]

    def above(point: Point) -> float:
        return (point.score - first.score) / (last.score - first.score) - (point.bytes - first.bytes) / (
            last.bytes - first.bytes
        )

    best = max(front, key=above)
    return best if above(best) > 0 else None


def recommended(points: Sequence[Point], within: float) -> Point | None:
    """The complete point of least memory whose score is at most `within` points below the best; None without any."""
    front = pareto_front(points)
    return next((point for point in front if point.score >= front[-1].score - within), None)


def sentence(points: Sequence[Point], within: float) -> str:
    """What is recommended, in one sentence."""
    point, front = recommended(points, within), pareto_front(points)
    if point is None:
        return "No budget was judged at every level, so none is recommended."
    best = front[-1]
    beside = f" ({point.value})" if len({p.value for p in points}) > 1 else ""
    text = f"M = {point.budget}{beside}: smallest budget within {within:g} points of the best"
    if best is point:
        return f"{text}, which it is itself, with {point.score:.1f} in {point.bytes:,} bytes."
    return f"{text}, {point.score:.1f} in {point.bytes:,} bytes against {best.score:.1f} in {best.bytes:,} at {best.budget}."


def rows_of(points: Sequence[Point], metric: str, model_floats: int, within: float) -> list[dict[str, Any]]:
    """Rows of tables.SWEEP, one per point and level."""
    front = pareto_front(points)
    marked = recommended(points, within)
    return [
        {
            "budget": point.budget,
            "budget_floats": point.floats,
            "model_floats": model_floats,
            "value": point.value,
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
