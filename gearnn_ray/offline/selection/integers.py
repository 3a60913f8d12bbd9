"""What every problem of this package shares: checked numbers, integer weights, and CP-SAT in exact integers.

Values become integer weights because CP-SAT rounds a float objective to an absolute 1e-6, coarser than the
differences between real v_i (1e-5 … 1e-3). It knows nothing of what is chosen, or why.
"""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ortools.sat.python import cp_model

BITS = 41  # the largest weight lies in [2^40, 2^41]: one unit is at most max v · 2^-40
SUM_BITS = 62  # CP-SAT's sums are int64; half of that stays free for the solver's own arithmetic
# Deterministic seconds count the solver's work, so that a problem stopped by them ends the same way on every
# machine; the wall clock, which cannot promise that, is the guard behind them for a whole call.
DETERMINISTIC_SECONDS = 30.0
WALL_SECONDS = 60.0


def numbers(array: ArrayLike, what: str, where: Callable[[int], str]) -> NDArray[np.float64]:
    """As float64, finite and ≥ 0, and small enough to be added up. `where` names an item by its flat index."""
    v = np.asarray(array, dtype=np.float64)
    _refuse(v, ~(np.isfinite(v) & (v >= 0)), what, where)
    if v.size and v.max() > np.finfo(np.float64).max / (2 * v.size):
        raise ValueError(f"{what}s up to {v.max()}: their sum may exceed float64, scale them down")
    return v


def whole_numbers(array: ArrayLike, what: str, where: Callable[[int], str]) -> NDArray[Any]:
    """As an array of integers ≥ 0."""
    s = np.asarray(array)
    if s.size and s.dtype.kind not in "iu":
        raise ValueError(f"{what}s of type {s.dtype}: expected whole numbers of at most 64 bits")
    _refuse(s, s < 0, what, where)
    return s if s.size else s.astype(np.int64)


def whole_number(number: object, what: str, least: int = 0) -> int:
    """As an int ≥ `least`."""
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise ValueError(f"{what} {number!r}: expected a whole number")
    if number < least:
        raise ValueError(f"{what} {number}: expected {least} or more")
    return int(number)


def _refuse(array: NDArray[Any], wrong: NDArray[np.bool_], what: str, where: Callable[[int], str]) -> None:
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(f"{what} {array.flat[i]} of {where(i)}: expected a finite number, 0 or more")


def check_sum(sizes: NDArray[Any]) -> None:
    """ValueError where the sizes, added up, are more than the solver can count."""
    if sum(sizes.ravel().tolist()) >= 2**SUM_BITS:  # Python integers, which do not overflow
        raise ValueError(f"the sizes add up to 2^{SUM_BITS} or more, which is beyond the solver")


def integer_weights(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], int, NDArray[np.bool_]]:
    """round(v · 2^exponent), the exponent, and which values the rounding moved.

    The scale is a power of two: scaling is exact then, and rounding the only error, half a unit per value.
    """
    bits = min(BITS, SUM_BITS - values.size.bit_length())
    exponent = bits - math.frexp(values.max(initial=0.0))[1]
    scaled = np.ldexp(values, exponent)
    rounded = np.rint(scaled)
    return rounded.astype(np.int64), exponent, scaled != rounded


def solve(
    model: cp_model.CpModel, seconds: float, linearization: int = 1, presolve: bool = True
) -> tuple[cp_model.CpSolver | None, bool]:
    """CP-SAT's solution of the model (None: none found), and whether that is proven. Equal models end equally.

    linearization: 2 puts more of the model into its linear relaxation. presolve: False for models with at-most-one
    constraints beside a knapsack: CP-SAT 9.15 simplifies some of them to others of a lower optimum, and calls that OPTIMAL.
    """
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1  # several would race, and chance decide among equals
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = linearization
    solver.parameters.cp_model_presolve = presolve
    solver.parameters.max_deterministic_time = DETERMINISTIC_SECONDS
    solver.parameters.max_time_in_seconds = max(0.0, seconds)
    status = solver.solve(model)
    if status == cp_model.MODEL_INVALID:
        raise RuntimeError(f"CP-SAT refuses the model: {model.validate()}")
    found = solver if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None
    return found, status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
