"""Which layers of a network get an adaptor: Eq. (2) of GearNN, a 0/1 knapsack, solved to proven optimality.

    maximise Σ v_i x_i   subject to   Σ s_i x_i ≤ M,   x_i ∈ {0, 1}

v_i is how much fine-tuning changed layer i (Eq. 1), s_i its size in floats, M the memory budget in floats.
Works on plain numbers: it knows nothing of networks, tensors, levels, files or Ray.

The way to a proof has three steps, all of them in exact integers:
1. values become integer weights, because CP-SAT rounds a float objective to an absolute 1e-6, coarser than
   the differences between real v_i (1e-5 … 1e-3);
2. the fractional (Dantzig) bound shows of most layers that no better choice can treat them otherwise;
3. CP-SAT decides the few left, the core, starting with those about which the bound says least.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ortools.sat.python import cp_model

_BITS = 41  # the largest weight lies in [2^40, 2^41]: one unit is at most max v · 2^-40
_SUM_BITS = 62  # CP-SAT's sums are int64; half of that stays free for the solver's own arithmetic
_FIRST_CORE = 64  # layers in the first core: nearly always enough, and solved in milliseconds
# Deterministic seconds count the solver's work, so that a core stopped by them ends the same way on every
# machine; the wall clock, which cannot promise that, is the guard behind them for a whole call of `select`.
_DETERMINISTIC_SECONDS = 30.0
_WALL_SECONDS = 60.0


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
    v, s, limit = _checked(values, sizes, budget)
    fits = np.flatnonzero((v > 0) & (s <= limit))
    with np.errstate(divide="ignore"):  # a layer of no floats is worth infinitely much per float
        order = fits[np.argsort(-v[fits] / s[fits], kind="stable")].tolist()
    size = s.tolist()  # Python integers, which do not overflow
    if sum(size[i] for i in order) >= 2**_SUM_BITS:
        raise ValueError(f"the sizes add up to 2^{_SUM_BITS} floats or more, which is beyond the solver")
    weights, exponent, moved = _integer_weights(v[order])
    positions, upper, core, proven = _maximise(weights, [size[i] for i in order], limit)

    chosen = {order[p] for p in positions}
    room = limit - sum(size[i] for i in chosen)
    # A value too small for one unit weighed nothing above, yet is worth having where there is room for it.
    for i in sorted(set(order) - chosen, key=lambda i: (-v[i], i)):
        if size[i] <= room:
            chosen.add(i)
            room -= size[i]

    # Rounding took at most half a unit from each value it moved. int to float rounds to nearest, as fsum
    # does; that keeps order, so the bound is never below an objective.
    bound = min(math.ldexp(2 * upper + moved, -exponent - 1), math.fsum(v[order]))
    return Selection(
        chosen=tuple(sorted(chosen)),
        objective=math.fsum(v[i] for i in chosen),
        bound=bound,
        status="OPTIMAL" if proven else "FEASIBLE",
        used=limit - room,
        core=core,
        runtime=time.perf_counter() - started,
    )


def _checked(values: ArrayLike, sizes: ArrayLike, budget: object) -> tuple[NDArray[np.float64], NDArray[Any], int]:
    v, s = np.asarray(values, dtype=np.float64), np.asarray(sizes)
    if v.ndim != 1 or v.shape != s.shape:
        raise ValueError(f"values {v.shape} and sizes {s.shape}: expected two lists of one length")
    if s.size and s.dtype.kind not in "iu":
        raise ValueError(f"sizes of type {s.dtype}: expected whole numbers of at most 64 bits")
    if isinstance(budget, bool) or not isinstance(budget, Integral):
        raise ValueError(f"budget {budget!r}: expected a whole number of floats")
    if budget < 0:
        raise ValueError(f"budget {budget}: expected 0 or more floats")
    for name, array, wrong in (("value", v, ~(np.isfinite(v) & (v >= 0))), ("size", s, s < 0)):
        if wrong.any():
            i = int(wrong.argmax())
            raise ValueError(f"{name} {array[i]} of layer {i}: expected a finite number, 0 or more")
    if v.size and v.max() > np.finfo(np.float64).max / (2 * v.size):
        raise ValueError(f"values up to {v.max()}: their sum may exceed float64, scale them down")
    return v, s, int(budget)


def _integer_weights(values: NDArray[np.float64]) -> tuple[list[int], int, int]:
    """round(v · 2^exponent), the exponent, and how many values the rounding moved.

    The scale is a power of two: scaling is exact then, and rounding the only error, half a unit per value.
    """
    if not values.size:
        return [], 0, 0
    bits = min(_BITS, _SUM_BITS - values.size.bit_length())
    exponent = bits - math.frexp(values.max())[1]
    scaled = np.ldexp(values, exponent)
    rounded = np.rint(scaled)
    return rounded.astype(np.int64).tolist(), exponent, int(np.count_nonzero(scaled != rounded))


def _maximise(weights: list[int], sizes: list[int], budget: int) -> tuple[list[int], int, int, bool]:
    """The integer knapsack over layers that each fit, in falling order of weight per size.

    Returns the chosen positions, an upper bound on any choice's weight, the largest core, and whether the
    choice is proven optimal (the bound is its own weight then).
    """
    best: list[int] = []
    room, critical = budget, -1
    for i, size in enumerate(sizes):
        if size <= room:
            best.append(i)
            room -= size
        elif critical < 0:
            critical = i
    value = sum(weights[i] for i in best)
    if critical < 0:
        return best, value, 0, True

    # Lagrange, a float priced as in the critical layer, the first that does not fit: this is Dantzig's bound.
    # All is multiplied by that layer's size to stay in integers. Treating a layer against the sign of its
    # reduced weight costs that much: where the bound cannot pay it and still beat `value`, it is settled.
    scale, price = sizes[critical], weights[critical]
    reduced = [w * scale - price * s for w, s in zip(weights, sizes, strict=True)]
    dantzig = price * budget + sum(r for r in reduced if r > 0)

    def open_among(layers: Sequence[int]) -> list[int]:
        return [i for i in layers if dantzig - abs(reduced[i]) >= (value + 1) * scale]

    deadline = time.perf_counter() + _WALL_SECONDS
    largest, width = 0, _FIRST_CORE
    undecided = open_among(sorted(range(len(sizes)), key=lambda i: abs(reduced[i])))  # the tightest first
    while undecided:
        core = undecided[:width]
        inside = set(core)
        taken = [i for i, r in enumerate(reduced) if r > 0 and i not in inside]
        taken_value = sum(weights[i] for i in taken)
        found, proven = _solve_core(
            [weights[i] for i in core],
            [sizes[i] for i in core],
            budget - sum(sizes[i] for i in taken),
            value + 1 - taken_value,
            deadline - time.perf_counter(),
        )
        largest = max(largest, len(core))
        if found is not None:
            best = taken + [core[k] for k in found]
            value = sum(weights[i] for i in best)
        if not proven:
            return best, dantzig // scale, largest, False
        # The better value settles more layers, most often all outside this core, which then was the whole
        # problem. They are sorted: those still open are the first ones.
        undecided = open_among(undecided)
        if len(undecided) <= width:
            break
        width *= 4
    return best, value, largest, True


def _solve_core(
    weights: list[int], sizes: list[int], room: int, at_least: int, seconds: float
) -> tuple[list[int] | None, bool]:
    """CP-SAT's heaviest choice of at least that weight (None: none found), and whether that is proven."""
    if room < 0:
        return None, True
    model = cp_model.CpModel()
    x = [model.new_bool_var("") for _ in weights]
    weight = cp_model.LinearExpr.weighted_sum(x, weights)
    model.add(cp_model.LinearExpr.weighted_sum(x, sizes) <= room)
    model.add(weight >= at_least)
    model.maximize(weight)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1  # several would race, and chance decide among equals
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = _DETERMINISTIC_SECONDS
    solver.parameters.max_time_in_seconds = max(0.0, seconds)
    status = solver.solve(model)
    if status == cp_model.MODEL_INVALID:
        raise RuntimeError(f"CP-SAT refuses the model: {model.validate()}")
    found = None
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = [k for k, variable in enumerate(x) if solver.boolean_value(variable)]
    return found, status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
