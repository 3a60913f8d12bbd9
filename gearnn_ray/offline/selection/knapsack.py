"""Eq. (2), a 0/1 knapsack, and its multiple-choice form, solved to proven optimality.

    maximise Σ v_gj x_gj   subject to   Σ s_gj x_gj ≤ M,   Σ_j x_gj ≤ 1 for each group g,   x_gj ∈ {0, 1}

Eq. (2) is the case of one option per group. The way to a proof (Pisinger 1995), all of it in exact integers:
1. values become integer weights; options that cost no less than another of their group and are worth no more go;
2. the fractional (Dantzig; Sinha and Zoltners 1979) bound shows of most groups that no better choice can treat
   them otherwise;
3. CP-SAT decides the few left, the core, starting with those about which the bound says least.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ortools.sat.python import cp_model

from gearnn_ray.offline.selection import integers

_FIRST_CORE = 64  # groups in the first core: nearly always enough, and solved in milliseconds


@dataclass(frozen=True)
class Selection:
    """A solution of Eq. (2), and what is known of how good it is.

    chosen: indices of the selected layers, ascending. used: the sum of their sizes, in floats.
    objective: the sum of their values, in float64, correctly rounded.
    bound: no choice of layers within the budget has a larger objective than this.
    status: OPTIMAL when proven, in the sense `select` gives; FEASIBLE when time ran out before, and the
    optimum lies anywhere between `objective` and `bound`.
    core: layers in the largest problem put to the solver, 0 if it was not needed. runtime: wall seconds.
    """

    chosen: tuple[int, ...]
    objective: float
    bound: float
    status: Literal["OPTIMAL", "FEASIBLE"]
    used: int
    core: int = field(compare=False)
    runtime: float = field(compare=False)


@dataclass(frozen=True)
class Choice:
    """A solution of the multiple-choice knapsack. picked: for every group its option's index, -1 for none.

    All else is as in `Selection`, for options instead of layers; core counts groups.
    """

    picked: tuple[int, ...]
    objective: float
    bound: float
    status: Literal["OPTIMAL", "FEASIBLE"]
    used: int
    core: int = field(compare=False)
    runtime: float = field(compare=False)


def select(values: ArrayLike, sizes: ArrayLike, budget: int) -> Selection:
    """The layers whose values add up to the most within the budget: Eq. (2), proven optimal.

    values: [n] v_i ≥ 0, any unit. sizes: [n] whole numbers ≥ 0, in floats. budget: M, in floats, ≥ 0.
    A layer of value 0 is never chosen, and no layer of positive value that would still fit is left out. Equal
    input gives an equal result, ties included, whether given as lists or as arrays.

    Values are rounded to multiples of a power of two u ≤ max v · 2^-40, the maximum over the layers that fit
    the budget (beyond two million layers u grows, to keep sums below 2^62). OPTIMAL is exact for the rounded
    values. For the values as given it means within k·u of the optimum, k ≤ n being how many of them the
    rounding moved: 1e-10 of the largest value for 100 layers, nothing for whole numbers of moderate size.
    `bound` has the rounding in it, and so stays above every objective there is.

    Raises ValueError for NaN, infinite, negative or mismatched input, for sizes or a budget that are not
    integers, and for numbers whose sums exceed float64 or 2^62.
    """
    started = time.perf_counter()
    limit = integers.whole_number(budget, "budget")
    v = integers.numbers(values, "value", "layer {}".format)
    s = integers.whole_numbers(sizes, "size", "layer {}".format)
    if v.ndim != 1 or v.shape != s.shape:
        raise ValueError(f"values {v.shape} and sizes {s.shape}: expected two lists of one length")
    taken, bound, core, proven = _best(v, s, np.arange(v.size), limit)
    return Selection(
        chosen=tuple(taken),
        objective=math.fsum(v[taken]),
        bound=bound,
        status="OPTIMAL" if proven else "FEASIBLE",
        used=sum(s[taken].tolist()),
        core=core,
        runtime=time.perf_counter() - started,
    )


def choose(values: Sequence[ArrayLike], sizes: Sequence[ArrayLike], budget: int) -> Choice:
    """At most one option of each group, so that their values add up to the most within the budget: proven optimal.

    values, sizes: for each group the v ≥ 0 and the whole sizes ≥ 0 of its options, any number of them.
    budget: in the unit of the sizes. Taking none of a group is always allowed, and worth 0.
    An option of value 0 is never taken, and none that is worth more than what was taken of its group is left where
    it would still fit. What OPTIMAL means, what equal input gives and what is refused is as in `select`; n counts
    the groups in the rounding and all options in the sums.
    """
    started = time.perf_counter()
    limit = integers.whole_number(budget, "budget")
    lengths, counts = _lengths(values, "values"), _lengths(sizes, "sizes")
    if len(lengths) != len(counts):
        raise ValueError(f"values of {len(lengths)} groups and sizes of {len(counts)}: expected as many")
    for g, (a, b) in enumerate(zip(lengths, counts, strict=True)):
        if a != b:
            raise ValueError(f"{a} values and {b} sizes of group {g}: expected as many")
    first = np.r_[0, np.cumsum(lengths, dtype=np.int64)]
    group = np.repeat(np.arange(len(lengths)), lengths)

    def name(i: int) -> str:
        return f"option {i - first[group[i]]} of group {group[i]}"

    v = integers.numbers(_flat(values), "value", name)
    s = integers.whole_numbers(_flat(sizes), "size", name)
    taken, bound, core, proven = _best(v, s, group, limit)
    picked = np.full(len(lengths), -1)
    picked[group[taken]] = taken - first[group[taken]]
    return Choice(
        picked=tuple(picked.tolist()),
        objective=math.fsum(v[taken]),
        bound=bound,
        status="OPTIMAL" if proven else "FEASIBLE",
        used=sum(s[taken].tolist()),
        core=core,
        runtime=time.perf_counter() - started,
    )


def _lengths(groups: Any, what: str) -> list[int]:
    try:
        return [len(group) for group in groups]
    except TypeError:
        raise ValueError(f"{what} that are no list of lists: expected a list of options for every group") from None


def _flat(groups: Sequence[Any]) -> NDArray[Any]:
    flat = np.array(list(chain.from_iterable(groups)))
    if flat.ndim != 1:
        raise ValueError(f"options of shape {flat.shape[1:]}: expected one number each")
    return flat


def _best(
    v: NDArray[np.float64], s: NDArray[Any], group: NDArray[np.int64], limit: int
) -> tuple[list[int], float, int, bool]:
    """The options taken, ascending, the bound, the groups in the largest core, and whether it is proven.

    group: of every option, ascending.
    """
    fits = np.flatnonzero((v > 0) & (s <= limit))
    integers.check_sum(s[fits])
    fits = fits[np.lexsort((-v[fits], s[fits], group[fits]))]
    fits = _without(fits, lambda kept: _pairs(group[kept]) & (v[kept[1:]] <= v[kept[:-1]]), later=True)
    if not fits.size:
        return [], 0.0, 0, True
    hull = _without(fits, lambda kept: _pairs(group[kept]) & _bends_up(v[kept], s[kept], group[kept]), later=False)

    # Groups in falling order of what their first float is worth, their options in rising order of size.
    slope = np.full(v.size, -1.0)  # where not on the hull
    slope[hull] = _slopes(v[hull], s[hull], group[hull])
    first = hull[np.r_[True, ~_pairs(group[hull])]]
    rank = np.empty(v.size, dtype=np.int64)
    rank[first[np.argsort(-slope[first], kind="stable")]] = np.arange(first.size)
    number = rank[first][np.cumsum(np.r_[True, ~_pairs(group[fits])]) - 1]
    ordered = np.argsort(number, kind="stable")
    options, number = fits[ordered], number[ordered]
    steps = np.flatnonzero(slope[options] >= 0)
    steps = steps[np.argsort(-slope[options[steps]], kind="stable")]

    weights, exponent, moved = integers.integer_weights(v[options])
    small = s[options].astype(np.int64)
    picked, upper, core, proven = _maximise(weights, small, number, steps, limit)
    _fill(v[options], small, number, np.argsort(options), picked, limit)

    # Rounding took at most half a unit from each value it moved. int to float rounds to nearest, as fsum
    # does; that keeps order, so the bound is never below an objective.
    most = math.ldexp(2 * upper + len(np.unique(number[moved])), -exponent - 1)
    bound = min(most, math.fsum(v[options[np.r_[~_pairs(number), True]]]))
    return np.sort(options[picked[picked >= 0]]).tolist(), bound, core, proven


def _without(
    kept: NDArray[np.int64], spoils: Callable[[NDArray[np.int64]], NDArray[np.bool_]], later: bool
) -> NDArray[np.int64]:
    """Without the later (or the earlier) of each two neighbours that spoil one another, until none do."""
    while (bad := spoils(kept)).any():
        kept = kept[~(np.r_[False, bad] if later else np.r_[bad, False])]
    return kept


def _pairs(group: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of each two neighbours, whether they are of one group."""
    same: NDArray[np.bool_] = group[1:] == group[:-1]
    return same


def _slopes(v: NDArray[np.float64], s: NDArray[Any], group: NDArray[np.int64]) -> NDArray[np.float64]:
    """The value per float of going from an option to the next of its group; from none to the first."""
    rise, run = v.copy(), s.astype(np.int64)
    inside = _pairs(group)
    rise[1:] -= np.where(inside, v[:-1], 0)
    run[1:] -= np.where(inside, run[:-1], 0)
    with np.errstate(divide="ignore"):  # an option of no floats is worth infinitely much per float
        return rise / run


def _bends_up(v: NDArray[np.float64], s: NDArray[Any], group: NDArray[np.int64]) -> NDArray[np.bool_]:
    slope = _slopes(v, s, group)
    return slope[1:] >= slope[:-1]


def _maximise(
    weights: NDArray[np.int64],
    sizes: NDArray[np.int64],
    group: NDArray[np.int64],
    steps: NDArray[np.int64],
    budget: int,
) -> tuple[NDArray[np.int64], int, int, bool]:
    """The integer problem over options that each fit, by group and rising size; steps: the hulls', the best first.

    Returns the option picked of each group (-1: none), an upper bound on any choice's weight, the largest core,
    and whether the choice is proven optimal (the bound is its own weight then).
    """
    w, s, g = weights.tolist(), sizes.tolist(), group.tolist()  # Python integers, which do not overflow
    picks = [-1] * (g[-1] + 1)
    stopped = [False] * len(picks)
    room, scale, price = budget, 0, 0
    critical = False
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
            if not critical:
                critical, scale, price = True, step, w[k] - w[at] if at >= 0 else w[k]
    best = np.array(picks)
    value = sum(w[k] for k in picks if k >= 0)
    if not critical:
        return best, value, 0, True

    # Lagrange, a float priced as in the critical step, the first that does not fit: this is Dantzig's bound.
    # All is multiplied by that step's size to stay in integers. Treating a group otherwise than the prices say costs
    # what it loses in reduced weight: where the bound cannot pay it and still beat `value`, it is settled.
    reduced = weights.astype(object) * scale - price * sizes.astype(object)
    starts = np.flatnonzero(np.r_[True, ~_pairs(group)])
    top = np.maximum(np.maximum.reduceat(reduced, starts), 0)
    dantzig = price * budget + sum(top)
    cost = top[group] - reduced
    bests = np.flatnonzero((cost == 0) & (top[group] > 0))
    groups, at_first = np.unique(group[bests], return_index=True)
    priced = np.full(starts.size, -1)  # what the prices say of each group
    priced[groups] = bests[at_first]
    rest = cost.copy()
    rest[priced[groups]] = math.inf
    doubt = np.minimum.reduceat(rest, starts)  # what the second best costs
    doubt[groups] = np.minimum(doubt[groups], top[groups])

    deadline = time.perf_counter() + integers.WALL_SECONDS
    largest, width = 0, _FIRST_CORE
    slack = dantzig - (value + 1) * scale
    undecided = sorted(np.flatnonzero(doubt <= slack).tolist(), key=doubt.__getitem__)  # the tightest first
    ends = np.r_[starts[1:], group.size]
    while undecided:
        core = undecided[:width]
        trial = priced.copy()
        trial[core] = -1
        taken = trial[trial >= 0].tolist()
        taken_value = sum(w[k] for k in taken)
        found, proven = _solve_core(
            [[(w[k], s[k], k) for k in range(starts[c], ends[c]) if cost[k] <= slack] for c in core],
            [top[c] > slack for c in core],
            budget - sum(s[k] for k in taken),
            value + 1 - taken_value,
            deadline - time.perf_counter(),
        )
        largest = max(largest, len(core))
        if found is not None:
            best = trial
            best[group[found]] = found
            value = taken_value + sum(w[k] for k in found)
            slack = dantzig - (value + 1) * scale
        # The better value settles more groups, most often all outside this core, which then was the whole
        # problem. They are sorted: those still open are the first ones.
        undecided = [c for c in undecided if doubt[c] <= slack]
        if undecided and not proven:
            return best, dantzig // scale, largest, False
        if len(undecided) <= width:
            break
        width *= 4
    return best, value, largest, True


def _solve_core(
    groups: Sequence[Sequence[tuple[int, int, int]]],
    must: Sequence[bool],
    room: int,
    at_least: int,
    seconds: float,
) -> tuple[list[int] | None, bool]:
    """CP-SAT's heaviest choice of at least that weight (None: none found), and whether that is proven.

    groups: the (weight, size, name) of every option; must: one of this group has to be taken.
    """
    if room < 0:
        return None, True
    model = cp_model.CpModel()
    x = [[model.new_bool_var("") for _ in options] for options in groups]
    for literals, one in zip(x, must, strict=True):
        if one:
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
    picked: NDArray[np.int64],
    budget: int,
) -> None:
    """Takes into `picked` what is worth having where there is room: a value too small for one unit weighed nothing.

    given: the options in the order given, which decides between equals.
    """
    has = picked >= 0
    value, size = np.where(has, v[picked], 0), np.where(has, s[picked], 0)
    room = budget - sum(size.tolist())
    gain = v - value[group]
    order = given[(gain > 0)[given] & (s - size[group] <= room)[given]]
    for k in order[np.argsort(-gain[order], kind="stable")].tolist():
        step = int(s[k] - size[group[k]])
        if v[k] > value[group[k]] and step <= room:
            picked[group[k]], value[group[k]], size[group[k]] = k, v[k], s[k]
            room -= step
