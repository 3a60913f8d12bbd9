"""Eq. (2): `select` against its own bound and independent oracles, never against a chosen set."""

import math
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ortools.algorithms.python import knapsack_solver

from gearnn_ray.models.layers import layers_of, model_size
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline import selection
from gearnn_ray.offline.selection import Selection, integers, knapsack, select

BUDGETS = {"drn_d_22": 31_814, "drn_d_38": 52_045}  # floor(0.2 %) of the model's floats


# ---- oracles


def brute_force(values: Sequence[float], sizes: Sequence[int], budget: int) -> float:
    """The optimum of Eq. (2) by looking at all 2^n choices."""
    return max(
        math.fsum(v for v, x in zip(values, choice, strict=True) if x)
        for choice in product((0, 1), repeat=len(values))
        if sum(s for s, x in zip(sizes, choice, strict=True) if x) <= budget
    )


def dynamic_programme(values: Sequence[float], sizes: Sequence[int], budget: int) -> float:
    """The optimum by a table over capacities; exact but for float64's own rounding."""
    best = np.zeros(budget + 1)
    for v, s in zip(values, sizes, strict=True):
        if s <= budget:
            best[s:] = np.maximum(best[s:], best[: budget + 1 - s] + v)
    return float(best[-1])


def check(found: Selection, values: Sequence[float], sizes: Sequence[int], budget: int) -> None:
    """What holds for every selection, proven or not."""
    assert list(found.chosen) == sorted(set(found.chosen))
    assert all(type(i) is int and values[i] > 0 for i in found.chosen)
    assert found.used == sum(sizes[i] for i in found.chosen) <= budget
    assert found.objective == math.fsum(values[i] for i in found.chosen) <= found.bound
    left_out = set(range(len(values))) - set(found.chosen)
    assert not [i for i in left_out if values[i] > 0 and sizes[i] <= budget - found.used]


def check_optimal(found: Selection, values: Sequence[float], sizes: Sequence[int], budget: int, optimum: float) -> None:
    """Proven, and as near to the oracle's optimum as `select` promises."""
    check(found, values, sizes, budget)
    fitting = [v for v, s in zip(values, sizes, strict=True) if s <= budget]
    promised = len(fitting) * max(fitting, default=0.0) * 2.0**-40
    rounding = 1e-14 * optimum  # of the oracles' sums, and of the two float64 numbers compared
    assert found.status == "OPTIMAL"
    assert found.bound >= optimum - rounding
    assert found.objective >= optimum - promised - rounding
    assert found.bound - found.objective <= promised + rounding


# ---- small instances: brute force

magnitudes = st.integers(-120, 0).map(lambda e: 10.0 ** (e / 10))
any_value = st.floats(0, 1, allow_subnormal=False)  # which training flushes to zero, here too
layer_values = st.sampled_from([0.0, 1e-5, 1.1e-5, 2e-5, 0.25, 0.5, 1.0]) | any_value | magnitudes
layers = st.lists(st.tuples(layer_values, st.integers(0, 12)), max_size=9)


@settings(max_examples=150, deadline=None)
@given(layers=layers, budget=st.integers(0, 60), first_core=st.sampled_from([1, 3, 64]))
def test_agrees_with_brute_force(layers: list[tuple[float, int]], budget: int, first_core: int) -> None:
    values, sizes = [v for v, _ in layers], [s for _, s in layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_FIRST_CORE", first_core)  # a small one grows in several rounds
        found = select(values, sizes, budget)
    check_optimal(found, values, sizes, budget, brute_force(values, sizes, budget))
    assert found.bound >= brute_force(values, sizes, budget)  # fsum on both sides: not one bit below


@settings(max_examples=60, deadline=None)
@given(layers=layers, budget=st.integers(0, 40))
def test_the_time_limit_is_reported_and_the_optimum_bounded(layers: list[tuple[float, int]], budget: int) -> None:
    values, sizes = [v for v, _ in layers], [s for _, s in layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "WALL_SECONDS", 0.0)
        found = select(values, sizes, budget)
    check(found, values, sizes, budget)
    optimum = brute_force(values, sizes, budget)
    assert found.objective <= optimum <= found.bound
    assert found.status == "FEASIBLE" or found.objective >= optimum - 9 * 2.0**-40


def test_out_of_time_is_feasible_not_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    values, sizes = [6.0, 5.0, 5.0], [6, 5, 5]  # greedy takes the 6 and leaves 4 floats unused
    assert (select(values, sizes, 10).status, select(values, sizes, 10).objective) == ("OPTIMAL", 10.0)
    monkeypatch.setattr(integers, "WALL_SECONDS", 0.0)
    found = select(values, sizes, 10)
    assert (found.status, found.objective, found.bound) == ("FEASIBLE", 6.0, 10.0)


@settings(max_examples=60, deadline=None)
@given(layers=st.lists(st.tuples(st.floats(1e-5, 1e-3), st.integers(1, 12)), min_size=1, max_size=9), budget=st.integers(1, 40))
def test_the_unit_of_the_values_does_not_matter(layers: list[tuple[float, int]], budget: int) -> None:
    values, sizes = np.array([v for v, _ in layers]), [s for _, s in layers]
    found, tiny = select(values, sizes, budget), select(values * 2.0**-50, sizes, budget)
    assert (tiny.chosen, tiny.objective, tiny.bound) == (found.chosen, found.objective * 2.0**-50, found.bound * 2.0**-50)


def test_differences_below_the_solvers_float_precision_decide() -> None:
    # Given these values as they are, CP-SAT (9.15) rounds them to nothing and calls the empty set OPTIMAL.
    values, sizes, budget = [1.00e-5, 1.00e-5, 1.04e-5, 1.54e-5, 1.53e-5], [4, 4, 4, 6, 6], 12
    assert select(values, sizes, budget).objective == math.fsum([1.54e-5, 1.53e-5])


# ---- edges


@pytest.mark.parametrize(
    ("values", "sizes", "budget"),
    [
        ([], [], 10),
        ([1.0, 2.0], [3, 4], 0),
        ([1.0, 2.0], [3, 4], 2),
        ([0.0, 0.0], [1, 1], 10),
        (np.array([]), np.array([], dtype=np.int64), 0),
    ],
)
def test_nothing_to_choose_is_an_empty_proven_selection(values: Sequence[float], sizes: Sequence[int], budget: int) -> None:
    found = select(values, sizes, budget)
    assert (found.chosen, found.objective, found.bound, found.used) == ((), 0.0, 0.0, 0)
    assert (found.status, found.core) == ("OPTIMAL", 0)


@pytest.mark.parametrize("budget", [9, 10, 2**63, 10**30])
def test_a_budget_for_everything_takes_all_that_changed(budget: int) -> None:
    found = select([0.1, 0.0, 1e-30, 0.7], [2, 5, 3, 4], budget)
    assert (found.chosen, found.used, found.status) == ((0, 2, 3), 9, "OPTIMAL")
    assert found.bound == found.objective


def test_values_too_small_for_one_unit_fill_what_room_is_left() -> None:
    found = select([1.0, 1e-20, 3e-20], [5, 2, 2], 8)
    assert found.chosen == (0, 2)
    assert found.objective <= math.fsum([1.0, 3e-20]) <= found.bound
    assert select([7.7, 5.0, 5.0, 1e-20], [7, 5, 5, 1], 11).chosen == (1, 2, 3)  # also after the solver's turn


def test_sizes_and_values_at_the_edge_of_their_types() -> None:
    huge = [2**59, 2**59 + 1, 2**59 + 2]
    assert select([1.0, 1.5, 1.75], huge, 2**60 + 2).objective == 2.75
    assert select([1e-300, 2e-300], [2, 2], 3).objective == 2e-300
    assert select([1e300, 2e300, 2e300], [3, 2, 2], 4).objective == 4e300
    with pytest.raises(ValueError, match="2\\^62"):
        select([1.0] * 3, [2**61] * 3, 2**61)
    with pytest.raises(ValueError, match="float64"):
        select([1e308] * 3, [1] * 3, 3)


def test_weights_of_very_many_layers_stay_within_the_solvers_integers() -> None:
    weights, _, _ = integers.integer_weights(np.full(2**21, math.nextafter(1.0, 0.0)))
    assert sum(weights.tolist()) < 2**62


@pytest.mark.parametrize(
    ("values", "sizes", "budget"),
    [
        ([math.nan], [1], 1),
        ([math.inf], [1], 1),
        ([None], [1], 1),
        ([-1e-9, 1.0], [1, 1], 1),
        ([1.0, 2.0], [1], 1),
        ([1.0], [], 1),
        ([[1.0]], [[1]], 1),
        (1.0, 1, 1),
        ([1.0], [-1], 1),
        ([1.0], [1.0], 1),
        ([1.0], [True], 1),
        ([1.0], ["1"], 1),
        ([1.0], [2**64], 1),
        ([1.0], [1], -1),
        ([1.0], [1], 1.0),
        ([1.0], [1], True),
        ([1.0], [1], np.True_),
        ([1.0], [1], None),
        ([1.0], [1], math.nan),
    ],
)
def test_wrong_input_is_refused(values: object, sizes: object, budget: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        select(values, sizes, budget)  # type: ignore[arg-type]


def test_equal_input_gives_an_equal_result() -> None:
    values, sizes = [1e-4] * 30 + [2e-4] * 30, [7] * 30 + [13] * 30  # ties throughout
    found = select(values, sizes, 200)
    assert found.core > 0, "the case is too easy to reach the solver"
    assert found == select(values, sizes, 200)
    for sizes_type in (np.int64, np.int32, np.uint64):
        assert found == select(np.array(values), np.array(sizes, dtype=sizes_type), np.int64(200))


# ---- real layers and many layers


@pytest.fixture(scope="module", params=["drn_d_22", "drn_d_38"])
def network(request: pytest.FixtureRequest) -> tuple[list[int], int]:
    """The layer sizes of a real network, and the paper's budget for it."""
    model = build_model(request.param, num_classes=19)
    budget = BUDGETS[request.param]
    assert budget == model_size(model) * 2 // 1000
    return [layer.numel for layer in layers_of(model)], budget


@pytest.mark.parametrize("seed", range(4))
def test_real_layers_agree_with_a_dynamic_programme(network: tuple[list[int], int], seed: int) -> None:
    sizes, budget = network
    values = (10.0 ** np.random.default_rng(seed).uniform(-5, -3, len(sizes))).tolist()  # the v_i of real runs
    for limit in (budget // 10, budget, 2 * budget):
        found = select(values, sizes, limit)
        check_optimal(found, values, sizes, limit, dynamic_programme(values, sizes, limit))


@pytest.mark.parametrize("seed", range(4))
def test_real_layers_agree_with_the_knapsack_solver_to_the_last_unit(network: tuple[list[int], int], seed: int) -> None:
    sizes, budget = network
    profits = np.random.default_rng(seed).integers(0, 2**30, len(sizes)).tolist()
    oracle = knapsack_solver.KnapsackSolver(knapsack_solver.SolverType.KNAPSACK_MULTIDIMENSION_BRANCH_AND_BOUND_SOLVER, "oracle")
    oracle.init(profits, [sizes], [budget])
    optimum = oracle.solve()
    assert oracle.is_solution_optimal()
    found = select(profits, sizes, budget)
    check(found, profits, sizes, budget)
    assert found.status == "OPTIMAL"
    assert found.objective == found.bound == optimum  # whole numbers: no rounding, hence no gap


@pytest.mark.parametrize("seed", range(40))
def test_values_in_step_with_sizes_are_proven_too(seed: int) -> None:
    # All layers have about the same value per float, so the bound decides few of them.
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 100, 40).tolist()
    values = [(s + d) * 1e-6 for s, d in zip(sizes, rng.uniform(0, 10, 40).tolist(), strict=True)]
    budget = sum(sizes) // 4
    found = select(values, sizes, budget)
    check_optimal(found, values, sizes, budget, dynamic_programme(values, sizes, budget))


def test_the_core_stays_small_among_many_layers() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 1000, 10_000).tolist()
    values = [(s + d) * 1e-6 for s, d in zip(sizes, rng.uniform(0, 100, 10_000).tolist(), strict=True)]
    budget = sum(sizes) // 200
    found = select(values, sizes, budget)
    check_optimal(found, values, sizes, budget, dynamic_programme(values, sizes, budget))
    assert found.core < len(values) // 100


def test_the_module_needs_neither_torch_nor_ray() -> None:
    code = f"import runpy, sys; runpy.run_path({str(Path(selection.__file__))!r}); "
    code += "sys.exit(bool({'torch', 'ray'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
