"""`select` with groups, the multiple-choice knapsack, against brute force, plain CP-SAT and `select` without groups; and hard
instances that stop at the time limit."""

import math
from collections.abc import Sequence
from itertools import chain, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ortools.algorithms.python import knapsack_solver
from ortools.sat.python import cp_model

from gearnn_ray.offline.selection import Selection, integers, knapsack, select

Groups = Sequence[Sequence[float]]


def choose(values: Groups, sizes: Sequence[Sequence[int]], budget: int) -> Selection:
    """`select` over all options of all groups."""
    groups = [g for g, options in enumerate(values) for _ in options]
    return select(list(chain.from_iterable(values)), list(chain.from_iterable(sizes)), budget, groups)


def picked(found: Selection, values: Groups) -> tuple[int, ...]:
    """For every group the index of the chosen option in it, -1 for none."""
    index = [(g, j) for g, options in enumerate(values) for j in range(len(options))]
    chosen = dict(index[i] for i in found.chosen)
    assert len(chosen) == len(found.chosen), "two options of one group"
    return tuple(chosen.get(g, -1) for g in range(len(values)))


# ---- oracles


def brute_force(values: Groups, sizes: Sequence[Sequence[int]], budget: int) -> float:
    best = 0.0
    for choice in product(*(range(-1, len(options)) for options in values)):
        taken = [(g, j) for g, j in enumerate(choice) if j >= 0]
        if sum(sizes[g][j] for g, j in taken) <= budget:
            best = max(best, math.fsum(values[g][j] for g, j in taken))
    return best


def whole_problem(values: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]], budget: int) -> int:
    """The optimum for whole numbers, by CP-SAT with every option and no reduction."""
    model = cp_model.CpModel()
    x = [[model.new_bool_var("") for _ in options] for options in values]
    for literals in x:
        model.add_at_most_one(literals)
    flat = [literal for literals in x for literal in literals]
    model.add(cp_model.LinearExpr.weighted_sum(flat, [s for options in sizes for s in options]) <= budget)
    model.maximize(cp_model.LinearExpr.weighted_sum(flat, [v for options in values for v in options]))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    assert solver.solve(model) == cp_model.OPTIMAL
    return round(solver.objective_value)


def dynamic_programme(values: Groups, sizes: Sequence[Sequence[int]], budget: int) -> float:
    best = np.zeros(budget + 1)
    for options in zip(values, sizes, strict=True):
        before = best.copy()
        for v, s in zip(*options, strict=True):
            if s <= budget:
                best[s:] = np.maximum(best[s:], before[: budget + 1 - s] + v)
    return float(best[-1])


def check(found: Selection, values: Groups, sizes: Sequence[Sequence[int]], budget: int) -> None:
    """What holds for every choice, proven or not."""
    taken = [(g, j) for g, j in enumerate(picked(found, values)) if j >= 0]
    assert list(found.chosen) == sorted(found.chosen)
    assert all(type(i) is int for i in found.chosen)
    assert all(values[g][j] > 0 for g, j in taken)
    assert found.used == sum(sizes[g][j] for g, j in taken) <= budget
    assert found.objective == math.fsum(values[g][j] for g, j in taken) <= found.bound
    for g, j in enumerate(picked(found, values)):
        value, size = (values[g][j], sizes[g][j]) if j >= 0 else (0.0, 0)
        for v, s in zip(values[g], sizes[g], strict=True):
            assert v <= value or s > size + budget - found.used, f"group {g} could have been worth {v}"


# ---- small instances

option = st.tuples(st.sampled_from([0.0, 1e-20, 1e-5, 1.1e-5, 2e-5, 0.5, 1.0]) | st.floats(1e-9, 1), st.integers(0, 12))
groups = st.lists(st.lists(option, max_size=4), max_size=5)


def split(options: list[list[tuple[float, int]]]) -> tuple[list[list[float]], list[list[int]]]:
    return [[v for v, _ in group] for group in options], [[s for _, s in group] for group in options]


@settings(max_examples=200, deadline=None)
@given(options=groups, budget=st.integers(0, 40), first_core=st.sampled_from([1, 2, 64]))
def test_agrees_with_brute_force(options: list[list[tuple[float, int]]], budget: int, first_core: int) -> None:
    values, sizes = split(options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_FIRST_CORE", first_core)
        found = choose(values, sizes, budget)
    check(found, values, sizes, budget)
    optimum, rounding = brute_force(values, sizes, budget), 5 * 2.0**-40
    assert found.status == "OPTIMAL"
    assert found.objective >= optimum - rounding
    assert optimum <= found.bound <= found.objective + rounding


@settings(max_examples=50, deadline=None)
@given(options=groups, budget=st.integers(0, 40))
def test_the_time_limit_is_reported_and_the_optimum_bounded(options: list[list[tuple[float, int]]], budget: int) -> None:
    values, sizes = split(options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "WALL_SECONDS", 0.0)
        found = choose(values, sizes, budget)
    check(found, values, sizes, budget)
    optimum = brute_force(values, sizes, budget)
    assert found.objective <= optimum <= found.bound
    assert found.status == "FEASIBLE" or found.objective >= optimum - 5 * 2.0**-40


@settings(max_examples=40, deadline=None)
@given(options=groups, budget=st.integers(0, 40), seed=st.integers(0, 99))
def test_order_does_not_matter(options: list[list[tuple[float, int]]], budget: int, seed: int) -> None:
    options = [[(round(v * 1000), s) for v, s in group] for group in options]  # no rounding: one optimum
    order = np.random.default_rng(seed)
    mixed = [[group[j] for j in order.permutation(len(group))] for group in options]
    mixed = [mixed[g] for g in order.permutation(len(mixed))]
    assert choose(*split(mixed), budget).objective == choose(*split(options), budget).objective


def test_one_option_each_is_select() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(0, 90))
        values, sizes, budget = 10.0 ** rng.uniform(-8, -3, n), rng.integers(0, 500, n), int(rng.integers(0, 20_000))
        chosen = select(values, sizes, budget)
        assert select(values, sizes, budget, rng.permutation(n)) == chosen


def test_the_items_of_a_group_may_stand_anywhere() -> None:
    rng = np.random.default_rng(0)
    values, sizes, groups = rng.integers(1, 10_000, 60), rng.integers(1, 100, 60), rng.integers(0, 12, 60)
    found = select(values, sizes, 300, groups)
    assert len(set(groups[list(found.chosen)])) == len(found.chosen)
    sorted_ = np.argsort(groups, kind="stable")
    again = select(values[sorted_], sizes[sorted_], 300, groups[sorted_])
    assert found.chosen == tuple(sorted(sorted_[list(again.chosen)].tolist()))
    assert (found.objective, found.bound, found.status) == (again.objective, again.bound, "OPTIMAL")


def test_what_the_solvers_presolve_gets_wrong() -> None:
    # CP-SAT 9.15 with its presolve calls 2.0078125 the optimum of this core.
    values, sizes = [[1.0], [0.5078125, 0.3125], [1e-5, 0.5, 0.75]], [[7], [2, 0], [1, 6, 8]]
    assert picked(choose(values, sizes, 15), values) == (0, 1, 2)


# ---- larger ones


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_the_whole_problem(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 7, 60)
    sizes = [np.sort(rng.integers(1, 1000, k)).tolist() for k in lengths]
    values = [np.sort(rng.integers(1, 100_000, k)).tolist() for k in lengths]
    budget = sum(max(s, default=0) for s in sizes) // (seed + 2)
    found = choose(values, sizes, budget)
    check(found, values, sizes, budget)
    assert found.status == "OPTIMAL"
    assert found.objective == found.bound == whole_problem(values, sizes, budget)  # whole numbers: no gap


def test_the_core_stays_small_among_many_groups() -> None:
    rng = np.random.default_rng(0)
    sizes, values = rng.integers(1, 300, (2_000, 5)), 10.0 ** rng.uniform(-5, -3, (2_000, 5))
    budget = int(sizes.sum()) // 100
    found = choose(values, sizes, budget)
    check(found, values.tolist(), sizes.tolist(), budget)
    optimum = dynamic_programme(values.tolist(), sizes.tolist(), budget)
    assert found.status == "OPTIMAL"
    assert optimum * (1 - 1e-12) <= found.bound
    assert math.isclose(found.objective, optimum, rel_tol=1e-9)
    assert 0 < found.core < 200


def test_many_single_options_agree_with_the_knapsack_solver() -> None:
    rng = np.random.default_rng(0)
    sizes, profits = rng.integers(1, 10_000, 5_000), rng.integers(1, 2**30, 5_000)
    budget = int(sizes.sum()) // 3
    kind = knapsack_solver.SolverType.KNAPSACK_MULTIDIMENSION_BRANCH_AND_BOUND_SOLVER
    oracle = knapsack_solver.KnapsackSolver(kind, "oracle")
    oracle.set_time_limit(20.0)
    oracle.init(profits.tolist(), [sizes.tolist()], [budget])
    optimum = oracle.solve()
    found = select(profits, sizes, budget)
    assert oracle.is_solution_optimal()
    assert found.status == "OPTIMAL"
    assert found.objective == found.bound == optimum


@pytest.mark.parametrize("seed", range(3))
def test_strongly_correlated_ones_stop_at_the_limit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Value = size + constant: the classic hard case, where the bound decides almost nothing.
    monkeypatch.setattr(integers, "DETERMINISTIC_SECONDS", 1e-4)
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 1000, (100, 1 + seed))
    values, budget = sizes + 100.5, int(sizes.max(axis=1).sum()) // 3
    found = choose(values, sizes, budget)
    optimum = dynamic_programme(values.tolist(), sizes.tolist(), budget)
    check(found, values.tolist(), sizes.tolist(), budget)
    assert (found.status, found.core > 0) == ("FEASIBLE", True)
    assert found.objective <= optimum <= found.bound < 1.01 * optimum
    assert found == choose(values, sizes, budget), "deterministic time ends equally"
    if seed == 0:
        alone = select(values[:, 0], sizes[:, 0], budget)
        assert (alone.status, alone.objective, alone.bound) == ("FEASIBLE", found.objective, found.bound)


# ---- edges


def test_ties_are_broken_equally() -> None:
    values, sizes = [[1e-4, 1e-4, 2e-4]] * 30 + [[2e-4, 3e-4]] * 30, [[7, 7, 14]] * 30 + [[13, 20]] * 30
    found = choose(values, sizes, 400)
    assert found.core > 0
    assert found == choose(values, sizes, 400) == choose([np.array(v) for v in values], [np.array(s) for s in sizes], 400)
    assert choose([[1.0, 1.0]], [[5, 5]], 5).chosen == (0,)
    assert choose([[1.0, 1.0]], [[5, 4]], 5).chosen == (1,)


def test_nothing_to_choose() -> None:
    for values, sizes in (([], []), ([[], []], [[], []]), ([[1.0], [0.0, 2.0]], [[7], [0, 9]])):
        found = choose(values, sizes, 6)
        assert found.chosen == ()
        assert (found.objective, found.bound, found.status, found.used, found.core) == (0.0, 0.0, "OPTIMAL", 0, 0)


def test_a_budget_for_everything_takes_the_best_of_each() -> None:
    values = [[1.0, 3.0, 2.0], [5.0], [1e-30]]
    found = choose(values, [[2, 9, 1], [2**60], [0]], 10**30)
    assert (picked(found, values), found.status, found.bound) == ((1, 0, 0), "OPTIMAL", found.objective)


def test_a_value_too_small_for_one_unit_is_taken_where_there_is_room() -> None:
    values = [[1.0], [1e-20, 3e-20], [2e-20]]
    assert picked(choose(values, [[5], [1, 2], [2]], 8), values) == (0, 1, -1)
    assert choose([[1.0, 1.0 + 2e-16]], [[5, 6]], 6).chosen == (1,)  # a difference of less than a unit


@pytest.mark.parametrize(
    ("values", "sizes", "groups", "budget", "message"),
    [
        ([1.0, 1.0, math.nan], [1, 1, 1], [0, 1, 1], 1, "value nan at index 2"),
        ([1.0, -1.0], [1, 1], [0, 1], 1, r"value -1\.0 at index 1"),
        ([1.0, 1.0, 2.0], [1, 1, -2], [0, 2, 2], 1, "size -2 at index 2"),
        ([1.0], [1.5], [0], 1, "sizes of type float64: expected whole numbers"),
        ([1.0], [True], [0], 1, "sizes of type bool: expected whole numbers"),
        ([1.0], [2**64], [0], 1, "sizes of type object: expected whole numbers"),
        ([1.0], [1], [0.0], 1, "groups of type float64: expected whole numbers"),
        ([1.0, 1.0], [1, 1], [0, -1], 1, "group -1 at index 1"),
        ([1.0, 2.0], [1], [0, 0], 1, r"values \(2,\), sizes \(1,\) and groups \(2,\): expected lists of one length"),
        ([1.0], [1], [0, 1], 1, r"groups \(2,\): expected lists of one length"),
        ([[1.0]], [[1]], [[0]], 1, "expected lists of one length"),
        ([1.0], [1], [0], -1, "budget -1"),
        ([1.0], [1], [0], 1.0, r"budget 1\.0"),
        ([1.0] * 3, [2**61] * 3, [0, 0, 0], 2**61, "2\\^62"),
        ([1e308] * 3, [1] * 3, [0, 1, 2], 3, "float64"),
    ],
)
def test_wrong_input_is_refused(values: object, sizes: object, groups: object, budget: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(values, sizes, budget, groups)  # type: ignore[arg-type]
