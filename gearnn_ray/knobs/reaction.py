"""How soon each method uses a configuration that is nearly the best one again, after the scene, the light or the link changed.

A stretch is the segments from one change to the next. What a configuration is worth in it is its mean accuracy less the price of
its mean bandwidth, and the new best is the configuration that is worth most: known in hindsight, as the methods cannot. A price
makes both comparable: the one at which the best fixed configuration of the whole stream is worth most, in points per bit a
second. A method has reacted with its first segment that is sent with a configuration worth at most one point less than the best.

Where the link halves, a controller is given half of its ceiling in the middle of a stretch. The new best is then the most
accurate configuration that fits into the link, in the stretch of each segment.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.knobs.controller import Ceiling
from gearnn_ray.knobs.findings import SUFFIX, Replayed, cheapest
from gearnn_ray.knobs.methods import METHODS, STEERED, Table, steered
from gearnn_ray.knobs.streams import Stretch

LINK, FITS = "link", "fits"
KINDS: Final = {"cut": "scene cut", "light": "light", LINK: "link halves", FITS: "link fits"}
"""What changed, with titles: the scene alone, the scene and its light, or what may be sent a second; and how long segments are
too large for the halved link, whatever their accuracy.
"""
POINTS: Final = 1.0
"""Below the new best, at which a method counts as having reacted."""
_OVER_LINK = 1.1  # a ceiling is held on average, so a configuration may need a little more

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reaction:
    """One method's reaction to changes of one kind. changes: how many there were. reached: after how many of them the method
    was within a point of the new best before the next change. segments: until then, a mean over these, where 0 means that its
    knobs were good already; None where `reached` is 0.
    """

    method: str
    kind: str
    changes: int
    reached: int
    segments: float | None


def reactions(sources: Sequence[Replayed], within: float) -> list[Reaction]:
    """Of every method to every kind of change, over all sources whose changes are known. within: as in `at_equal_accuracy`."""
    waits: dict[tuple[str, str], list[int | None]] = {}
    for source in sources:
        for network, table in source.tables.items():
            fixed = cheapest(source, "fixed", network, source.best_accuracy - within)
            if fixed is None or not source.stretches:
                continue
            price, ending = price_of(table, int(fixed.chosen[0])), SUFFIX[network]
            means = _means(table, source.stretches)
            for method in METHODS:
                chosen = _most_worth(source, network, method, price)
                for kind, wait in _after_changes(means, source.stretches, chosen, price):
                    waits.setdefault((method + ending, kind), []).append(wait)
                if method in STEERED:
                    halved = _after_halving(table, means, source.stretches, STEERED[method], fixed.bandwidth(table))
                    for kind, wait in halved:
                        waits.setdefault((method + ending, kind), []).append(wait)
    return [_reaction(method, kind, found) for (method, kind), found in waits.items()]


def reaction_rows(reactions: Sequence[Reaction], nothing: str) -> list[list[str]]:
    """A row for each method, with a cell for each of `KINDS`: segments, and after how many of the changes; `nothing` without."""
    by_method: dict[str, dict[str, Reaction]] = {}
    for each in reactions:
        by_method.setdefault(each.method, {})[each.kind] = each

    def cell(found: Reaction | None) -> str:
        if found is None:
            return nothing
        return f"{nothing if found.segments is None else f'{found.segments:.1f}'} ({found.reached}/{found.changes})"

    return [[method, *(cell(own.get(kind)) for kind in KINDS)] for method, own in by_method.items()]


def price_of(table: Table, number: int) -> float:
    """Points per bit a second at which a fixed configuration is worth most, or loses least to the one that is. Where that is so
    at a range of prices, their geometric mean.
    """
    accuracy, bandwidth = np.nanmean(table.accuracy, 0), 8 * table.bytes.mean(0) / table.seconds
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = (accuracy - accuracy[number]) / (bandwidth - bandwidth[number])
    slopes = slopes[np.isfinite(slopes) & (slopes > 0)]
    if not len(slopes):
        return 0.0
    worth_PQ = accuracy - slopes[:, None] * bandwidth
    losses = worth_PQ.max(1) - worth_PQ[:, number]
    return float(np.exp(np.log(slopes[losses <= losses.min() + 1e-9]).mean()))


class _Means(NamedTuple):
    """Of the stretches, by configuration [S, Q]: accuracy in percent (NaN with nothing to find), bits a second."""

    accuracy: Array
    bandwidth: Array


def _means(table: Table, stretches: Sequence[Stretch]) -> _Means:
    accuracy = [_mean(table.accuracy[each.first : each.end]) for each in stretches]
    bandwidth = [8 * table.bytes[each.first : each.end].mean(0) / table.seconds for each in stretches]
    return _Means(np.array(accuracy), np.array(bandwidth))


def _mean(accuracy_TQ: Array) -> Array:
    """Over the segments in which there is something to find."""
    found = accuracy_TQ[~np.isnan(accuracy_TQ).any(1)]
    return found.mean(0) if len(found) else np.full(accuracy_TQ.shape[1], math.nan)


def _most_worth(source: Replayed, network: str, method: str, price: float) -> NDArray[np.int64]:
    """The configurations that are chosen in a method's best run at this price."""
    table = source.tables[network]
    own = [walk for walk in source.walks[network] if walk.method == method + SUFFIX[network] and not walk.has_goal]
    return max(own, key=lambda walk: walk.accuracy(table) - price * walk.bandwidth(table)).chosen


def _after_changes(
    means: _Means, stretches: Sequence[Stretch], chosen: NDArray[np.int64], price: float
) -> Iterator[tuple[str, int | None]]:
    worth_SQ = means.accuracy - price * means.bandwidth
    for stretch, worth in zip(stretches, worth_SQ, strict=True):
        if stretch.kind is not None and not np.isnan(worth).any():
            yield stretch.kind, _first(worth[chosen[stretch.first : stretch.end]] >= worth.max() - POINTS)


def _after_halving(
    table: Table, means: _Means, stretches: Sequence[Stretch], loss: str, link: float
) -> Iterator[tuple[str, int | None]]:
    """Of a controller with this loss, one run for each stretch but the last: the link halves in its middle, and the wait ends
    with the next stretch. link: bits a second, before.
    """
    fits_SQ = means.bandwidth <= _OVER_LINK * link / 2
    best_S = np.where(fits_SQ, means.accuracy, -np.inf).max(1)
    good_SQ = fits_SQ & (means.accuracy >= best_S[:, None] - POINTS)
    for number, (stretch, after) in enumerate(itertools.pairwise(stretches)):
        if np.isnan(means.accuracy[number : number + 2]).any() or not fits_SQ[number : number + 2].any(1).all():
            continue
        middle = (stretch.first + stretch.end) // 2
        chosen = steered(table, loss, Ceiling(link), {middle: Ceiling(link / 2)}).chosen
        for kind, right_SQ in ((LINK, good_SQ), (FITS, fits_SQ)):
            both = right_SQ[number, chosen[middle : stretch.end]], right_SQ[number + 1, chosen[after.first : after.end]]
            yield kind, _first(np.concatenate(both))


def _first(good: NDArray[np.bool_]) -> int | None:
    return int(good.argmax()) if good.any() else None


def _reaction(method: str, kind: str, waits: Sequence[int | None]) -> Reaction:
    reached = [wait for wait in waits if wait is not None]
    return Reaction(method, kind, len(waits), len(reached), float(np.mean(reached)) if reached else None)
