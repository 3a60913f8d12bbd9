"""Eq. (2), a 0/1 knapsack, and its multiple-choice form, solved to proven optimality.

    maximise Σ v_i x_i   subject to   Σ s_i x_i ≤ M,   Σ_{i ∈ g} x_i ≤ 1 for each group g,   x_i ∈ {0, 1}

In Eq. (2) every item is a group of its own. The solution follows Pisinger (1995), in exact integers:
1. Values become integer weights. Items that another item of their group dominates (no larger, worth as much) are dropped.
2. The fractional bound (Dantzig; Sinha and Zoltners 1979) proves for most groups which of their items an optimum has.
3. CP-SAT decides the few groups left, the core, starting with those that the bound is least certain about.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ortools.sat.python import cp_model

from gearnn_ray.offline.selection import integers
from gearnn_ray.offline.selection.result import Selection

_FIRST_CORE = 64  # groups in the first core: nearly always enough, and solved in milliseconds


def select(values: ArrayLike, sizes: ArrayLike, budget: int, groups: ArrayLike | None = None) -> Selection:
    """Eq. (2): the items with the largest sum of values whose sizes fit the budget, proven optimal.

    values: [n] v_i ≥ 0, any unit. sizes: [n] whole numbers ≥ 0, any unit; floats in Eq. (2). budget: M ≥ 0, in the unit of the
    sizes. groups: [n] whole numbers ≥ 0; at most one item of each group is chosen. By default every item is a group of its own.
    An item of value 0 is never chosen. No item of positive value that would still fit is left out, in its group's place if that
    chose one of a lower value. Equal input gives an equal result, also between equal optima.

    Values are rounded to multiples of a power of two u ≤ max v · 2^-40, the maximum over the items that fit the budget (beyond
    two million items u grows, to keep sums below 2^62). OPTIMAL is exact for the rounded values. For the values as given it means
    within k·u of the optimum, where k ≤ the number of groups counts those with a rounded value: 1e-10 of the largest value for
    100 layers, 0 for whole numbers of moderate size. `bound` includes the rounding error, so no choice has a larger objective.
    Raises ValueError for NaN, infinite, negative or mismatched input, for sizes, groups or a budget that are not integers, and
    for numbers whose sums exceed float64 or 2^62.
    """
    limit = integers.whole_number(budget, "budget")
    v, s = integers.numbers(values, "value"), integers.whole_numbers(sizes, "size")
    group = np.arange(v.size) if groups is None else integers.whole_numbers(groups, "group")
    if v.ndim != 1 or not v.shape == s.shape == group.shape:
        of_groups = "" if groups is None else f" and groups {group.shape}"
        raise ValueError(f"values {v.shape}, sizes {s.shape}{of_groups}: expected lists of one length")
    fits = np.flatnonzero((v > 0) & (s <= limit))
    integers.check_sum(s[fits])
    fits = fits[np.lexsort((-v[fits], s[fits], group[fits]))]
    fits = _filtered(fits, lambda kept: _pairs(group[kept]) & (v[kept[1:]] <= v[kept[:-1]]), drop_later=True)
    if not fits.size:
        return Selection(chosen=(), objective=0.0, bound=0.0, status="OPTIMAL", used=0, core=0)
    # The upper convex hull of each group in (size, value): the items that the fractional problem can choose.
    hull = _filtered(fits, lambda kept: _is_below_hull(v[kept], s[kept], group[kept]), drop_later=False)

    # Number the groups in descending order of their first item's value per unit of size; sort items by group and size.
    slope = np.full(v.size, -1.0)  # -1: not on the hull
    slope[hull] = _slopes(v[hull], s[hull], group[hull])
    first = hull[np.r_[True, ~_pairs(group[hull])]]
    rank = np.empty(first.size, dtype=np.int64)
    rank[np.argsort(-slope[first], kind="stable")] = np.arange(first.size)
    number = rank[np.cumsum(np.r_[True, ~_pairs(group[fits])]) - 1]
    ordered = np.argsort(number, kind="stable")
    items, number = fits[ordered], number[ordered]
    steps = np.flatnonzero(slope[items] >= 0)
    steps = steps[np.argsort(-slope[items[steps]], kind="stable")]

    weights, exponent, rounded = integers.integer_weights(v[items])
    small = s[items].astype(np.int64)
    picks, upper, core, proven = _maximise(weights, small, number, steps, limit)
    _fill(v[items], small, number, np.argsort(items), picks, limit)
    chosen = np.sort(items[picks[picks >= 0]])

    # Each rounded value changed by at most half a unit. The conversion of int to float rounds to nearest, as fsum does;
    # this keeps the order, so the bound is never below an objective.
    most = math.ldexp(2 * upper + len(np.unique(number[rounded])), -exponent - 1)
    return Selection(
        chosen=tuple(chosen.tolist()),
        objective=math.fsum(v[chosen]),
        bound=min(most, math.fsum(v[items[np.r_[~_pairs(number), True]]])),
        status="OPTIMAL" if proven else "FEASIBLE",
        used=sum(s[chosen].tolist()),
        core=core,
    )


def _filtered(
    kept: NDArray[np.int64], conflicts: Callable[[NDArray[np.int64]], NDArray[np.bool_]], drop_later: bool
) -> NDArray[np.int64]:
    """Drops one item of each pair of neighbours in conflict, until there is no conflict left."""
    while (bad := conflicts(kept)).any():
        kept = kept[~(np.r_[False, bad] if drop_later else np.r_[bad, False])]
    return kept


def _pairs(group: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[n - 1] whether neighbours belong to the same group."""
    same: NDArray[np.bool_] = group[1:] == group[:-1]
    return same


def _slopes(v: NDArray[np.float64], s: NDArray[np.int64], group: NDArray[np.int64]) -> NDArray[np.float64]:
    """The value per unit of size of the step from the item before in its group; of a group's first item, from nothing."""
    rise, run = v.copy(), s.astype(np.int64)
    inside = _pairs(group)
    rise[1:] -= np.where(inside, v[:-1], 0)
    run[1:] -= np.where(inside, run[:-1], 0)
    with np.errstate(divide="ignore"):  # the slope of an item of size 0 is infinite
        return rise / run


def _is_below_hull(v: NDArray[np.float64], s: NDArray[np.int64], group: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[n - 1] whether an item lies on or below the line from the item before it to the item after it."""
    slope = _slopes(v, s, group)
    return _pairs(group) & (slope[1:] >= slope[:-1])


def _maximise(
    weights: NDArray[np.int64], sizes: NDArray[np.int64], group: NDArray[np.int64], steps: NDArray[np.int64], budget: int
) -> tuple[NDArray[np.int64], int, int, bool]:
    """The integer problem, over items that fit the budget, sorted by group and size. steps: the items on their groups' hulls, the
    steepest first. Returns the item picked for each group (-1: none), an upper bound, the size of the largest core, and whether
    the picks are proven optimal (then the bound is their weight).
    """
    w, s, g = weights.tolist(), sizes.tolist(), group.tolist()  # Python integers do not overflow
    # Greedy: take the steps in order while they fit. The first that does not fit is the critical step.
    picks = [-1] * (g[-1] + 1)
    stopped = [False] * len(picks)
    room, scale, price = budget, 0, 0
    for k in steps.tolist():
        at = picks[g[k]]
        step = s[k] - s[at] if at >= 0 else s[k]
        if stopped[g[k]]:
            continue
        if step <= room:
            picks[g[k]] = k
            room -= step
        else:
            stopped[g[k]] = True
            if not scale:
                scale, price = step, w[k] - w[at] if at >= 0 else w[k]
    best = np.array(picks)
    value = sum(w[k] for k in picks if k >= 0)
    if not scale:
        return best, value, 0, True

    # Lagrangian relaxation with the critical step's price per unit of size: its optimum is Dantzig's bound. All numbers are
    # multiplied by the critical step's size to stay integers. A group that deviates from the relaxed optimum loses reduced
    # weight; a group is decided if the bound less this loss is no better than `value`.
    reduced = weights.astype(object) * scale - price * sizes.astype(object)
    starts = np.flatnonzero(np.r_[True, ~_pairs(group)])
    top = np.maximum(np.maximum.reduceat(reduced, starts), 0)
    dantzig = price * budget + sum(top)
    loss = top[group] - reduced
    bests = np.flatnonzero((loss == 0) & (top[group] > 0))
    groups, at_first = np.unique(group[bests], return_index=True)
    relaxed = np.full(starts.size, -1)  # the relaxed optimum's item of each group
    relaxed[groups] = bests[at_first]
    others = loss.copy()
    others[relaxed[groups]] = math.inf
    least = np.minimum.reduceat(others, starts)  # the smallest loss of a deviation
    least[groups] = np.minimum(least[groups], top[groups])

    deadline = time.perf_counter() + integers.WALL_SECONDS
    largest, width = 0, _FIRST_CORE
    slack = dantzig - (value + 1) * scale
    undecided = sorted(np.flatnonzero(least <= slack).tolist(), key=least.__getitem__)  # the least certain first
    ends = np.r_[starts[1:], group.size]
    while undecided:
        core = undecided[:width]
        trial = relaxed.copy()
        trial[core] = -1
        outside = trial[trial >= 0].tolist()
        outside_value = sum(w[k] for k in outside)
        found, proven = _solve_core(
            [[(w[k], s[k], k) for k in range(starts[c], ends[c]) if loss[k] <= slack] for c in core],
            [top[c] > slack for c in core],
            budget - sum(s[k] for k in outside),
            value + 1 - outside_value,
            deadline - time.perf_counter(),
        )
        largest = max(largest, len(core))
        if found is not None:
            best = trial
            best[group[found]] = found
            value = outside_value + sum(w[k] for k in found)
            slack = dantzig - (value + 1) * scale
        # A better value decides more groups, most often all groups outside the core; then the core was the whole problem.
        # The groups are sorted, so those still undecided are the first ones.
        undecided = [c for c in undecided if least[c] <= slack]
        if undecided and not proven:
            return best, dantzig // scale, largest, False
        if len(undecided) <= width:
            break
        width *= 4
    return best, value, largest, True


def _solve_core(
    groups: Sequence[Sequence[tuple[int, int, int]]], must_choose: Sequence[bool], room: int, at_least: int, seconds: float
) -> tuple[list[int] | None, bool]:
    """CP-SAT's heaviest choice of weight ≥ `at_least` or None, and whether that is proven. groups: items (weight, size, name)."""
    if room < 0:
        return None, True
    model = cp_model.CpModel()
    x = [[model.new_bool_var("") for _ in items] for items in groups]
    for literals, must in zip(x, must_choose, strict=True):
        if must:
            model.add_exactly_one(literals)
        elif len(literals) > 1:
            model.add_at_most_one(literals)
    flat = list(chain.from_iterable(x))
    weights, sizes, names = zip(*chain.from_iterable(groups), strict=True)
    weight = cp_model.LinearExpr.weighted_sum(flat, weights)
    model.add(cp_model.LinearExpr.weighted_sum(flat, sizes) <= room)
    model.add(weight >= at_least)
    model.maximize(weight)
    solver, proven = integers.solve(model, seconds, presolve=all(len(literals) == 1 for literals in x))
    if solver is None:
        return None, proven
    return [name for name, literal in zip(names, flat, strict=True) if solver.boolean_value(literal)], proven


def _fill(
    v: NDArray[np.float64],
    s: NDArray[np.int64],
    group: NDArray[np.int64],
    given: NDArray[np.int64],
    picks: NDArray[np.int64],
    budget: int,
) -> None:
    """Adds to `picks` what still fits and gains value: a gain smaller than one unit has no integer weight. given: the items in
    the order of the caller's list, which decides between equals.
    """
    has = picks >= 0
    value, size = np.where(has, v[picks], 0), np.where(has, s[picks], 0)
    room = budget - sum(size.tolist())
    gain = v - value[group]
    order = given[(gain > 0)[given] & (s - size[group] <= room)[given]]
    for k in order[np.argsort(-gain[order], kind="stable")].tolist():
        step = int(s[k] - size[group[k]])
        if v[k] > value[group[k]] and step <= room:
            picks[group[k]], value[group[k]], size[group[k]] = k, v[k], s[k]
            room -= step
