"""Exact numbers for the solver: checked input, integer weights, and CP-SAT with fixed settings. CP-SAT rounds a float objective
to an absolute precision of 1e-6, which is coarser than the differences between real v_i of 1e-5 to 1e-3.
"""

import math
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ortools.sat.python import cp_model

BITS = 41  # the largest weight lies in [2^40, 2^41]: one unit is at most max v · 2^-40
SUM_BITS = 62  # CP-SAT's sums are int64; half of the range stays free for the solver's own arithmetic
# Deterministic seconds count the solver's work, so that a search that they stop ends equally on every machine. The
# wall-clock limit cannot promise that; it is only a second guard, for a whole call of `select`.
DETERMINISTIC_SECONDS = 30.0
WALL_SECONDS = 60.0


def numbers(array: ArrayLike, what: str) -> NDArray[np.float64]:
    """The array as float64. Raises ValueError unless all are finite, ≥ 0, and small enough to be summed."""
    v = np.asarray(array, dtype=np.float64)
    _refuse(v, ~(np.isfinite(v) & (v >= 0)), what)
    if v.size and v.max() > np.finfo(np.float64).max / (2 * v.size):
        raise ValueError(f"{what}s up to {v.max()}: their sum may exceed float64, scale them down")
    return v


def whole_numbers(array: ArrayLike, what: str) -> NDArray[Any]:
    """The array as integers. Raises ValueError unless all are whole numbers ≥ 0."""
    s = np.asarray(array)
    if s.size and s.dtype.kind not in "iu":
        raise ValueError(f"{what}s of type {s.dtype}: expected whole numbers of at most 64 bits")
    _refuse(s, s < 0, what)
    return s if s.size else s.astype(np.int64)


def whole_number(number: object, what: str) -> int:
    """The number as an int. Raises ValueError unless it is a whole number ≥ 0."""
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise ValueError(f"{what} {number!r}: expected a whole number")
    if number < 0:
        raise ValueError(f"{what} {number}: expected 0 or more")
    return int(number)


def _refuse(array: NDArray[Any], wrong: NDArray[np.bool_], what: str) -> None:
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(f"{what} {array.flat[i]} at index {i}: expected a finite number, 0 or more")


def check_sum(sizes: NDArray[Any]) -> None:
    """Raises ValueError if the sum of the sizes is too large for the solver."""
    if sum(sizes.tolist()) >= 2**SUM_BITS:  # Python integers do not overflow
        raise ValueError(f"the sizes sum to 2^{SUM_BITS} or more, which the solver cannot represent: use a larger unit")


def integer_weights(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], int, NDArray[np.bool_]]:
    """round(v · 2^exponent), the exponent, and which values the rounding changed, each by at most half a unit."""
    bits = min(BITS, SUM_BITS - values.size.bit_length())
    exponent = bits - math.frexp(values.max(initial=0.0))[1]
    scaled = np.ldexp(values, exponent)
    rounded = np.rint(scaled)
    return rounded.astype(np.int64), exponent, scaled != rounded


def solve(model: cp_model.CpModel, seconds: float, presolve: bool) -> tuple[cp_model.CpSolver | None, bool]:
    """The solver with its solution (None if it found none), and whether that result is proven. Equal models end equally.
    presolve: must be False for models that have at-most-one constraints beside a knapsack: CP-SAT 9.15 simplifies some of them to
    models with a lower optimum, and reports that optimum as OPTIMAL.
    """
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1  # with several, the fastest worker would decide between equal solutions
    solver.parameters.random_seed = 0
    solver.parameters.cp_model_presolve = presolve
    solver.parameters.max_deterministic_time = DETERMINISTIC_SECONDS
    solver.parameters.max_time_in_seconds = max(0.0, seconds)
    status = solver.solve(model)
    if status == cp_model.MODEL_INVALID:
        raise RuntimeError(f"CP-SAT rejects the model: {model.validate()}")
    solved = solver if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None
    return solved, status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
