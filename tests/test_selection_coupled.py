"""The problems that couple levels, against all choices there are and against their parts."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, permutations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from gearnn_ray.offline.selection import (
    Joint,
    coupled,
    few_adaptors,
    few_layers,
    integers,
    select,
)

Values = NDArray[np.float64]
Solve = Callable[..., Joint]
FEW: tuple[Solve, ...] = (few_layers, few_adaptors)


# ---- oracles


def subsets(n: int) -> list[tuple[int, ...]]:
    return [tuple(np.flatnonzero(x).tolist()) for x in product((0, 1), repeat=n)]


def knapsack(values: Values, sizes: Values, budget: int, layers: Iterable[int] | None = None) -> float:
    """The optimum of Eq. (2) among some layers."""
    allowed = set(range(len(sizes)) if layers is None else layers)
    sets = [s for s in subsets(len(sizes)) if sizes[list(s)].sum() <= budget and allowed.issuperset(s)]
    return max(math.fsum(values[i] for i in s) for s in sets)


def all_few_layers(v: Values, sizes: Values, budget: int, distinct: int) -> float:
    n = len(sizes)
    unions = combinations(range(n), min(distinct, n))
    return max(math.fsum(knapsack(level, sizes, budget, union) for level in v) for union in unions)


def all_few_adaptors(v: Values, sizes: Values, budget: int, adaptors: int) -> float:
    """v: [Q, Q, n]; every assignment of levels to adaptors."""
    levels = len(v)
    known = {
        (p, group): knapsack(v[list(group), p].sum(axis=0), sizes, budget)
        for p in range(levels)
        for group in subsets(levels)[1:]
    }
    best = 0.0
    for to in product(range(levels), repeat=levels):
        if len(set(to)) <= adaptors:
            groups = [(p, tuple(q for q in range(levels) if to[q] == p)) for p in set(to)]
            best = max(best, math.fsum(known[group] for group in groups))
    return best


def check(found: Joint, v: Values, sizes: Values, limit: int) -> None:
    """v: [Q, n] or [Q, Q, n], weighted. Values, sizes and names agree; each adaptor is within the limit."""
    assert len(found.chosen) == len(found.adaptor_of) == len(v)
    gains = [v[q, p] if v.ndim == 3 else v[q] for q, p in enumerate(found.adaptor_of)]
    total = math.fsum(gain[i] for gain, chosen in zip(gains, found.chosen, strict=True) for i in chosen)
    assert found.objective == pytest.approx(total, rel=1e-14, abs=0)
    assert found.objective <= found.bound
    sets = dict(zip(found.adaptor_of, found.chosen, strict=True))
    assert all(sets[p] == chosen for p, chosen in zip(found.adaptor_of, found.chosen, strict=True))
    assert all(list(s) == sorted(set(s)) and all(type(i) is int for i in s) for s in sets.values())
    used = [int(sizes[list(s)].sum()) for s in sets.values()]
    assert found.used == sum(used)
    assert max(used) <= limit


def check_optimal(found: Joint, optimum: float, v: Values) -> None:
    promised = (v.size + 1) * v.max(initial=0.0) * 2.0**-40
    assert found.status == "OPTIMAL"
    assert found.objective >= optimum - promised
    assert optimum * (1 - 1e-14) <= found.bound <= found.objective + promised


def instance(seed: int, levels: int = 3, n: int = 5) -> tuple[np.random.Generator, Values, Values, int]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0 if seed % 3 else 1, 12, n)
    v = rng.integers(0, 4, (levels, n)).astype(float) if seed % 2 else 10.0 ** rng.uniform(-5, -3, (levels, n))
    return rng, v, sizes, int(rng.integers(0, max(1, sizes.sum())))


# ---- small instances: all choices


@pytest.mark.parametrize("seeds", [range(40), range(40, 80)])
def test_few_layers_agrees_with_brute_force(seeds: range) -> None:
    for seed in seeds:
        rng, v, sizes, budget = instance(seed)
        distinct, f = int(rng.integers(0, 7)), rng.integers(0, 4, 3)
        found = few_layers(v, sizes, budget, distinct, f)
        weighted = v * f[:, None]
        check(found, weighted, sizes, budget)
        assert len({i for chosen in found.chosen for i in chosen}) <= distinct
        assert found.adaptor_of == (0, 1, 2)
        check_optimal(found, all_few_layers(weighted, sizes, budget, distinct), weighted)


@pytest.mark.parametrize("by_adaptor", [False, True])
@pytest.mark.parametrize("seeds", [range(40), range(40, 80)])
def test_few_adaptors_agrees_with_brute_force(seeds: range, by_adaptor: bool) -> None:
    for seed in seeds:
        rng, v, sizes, budget = instance(seed)
        if by_adaptor:
            v = np.moveaxis(np.array([instance(seed + 100 * k)[1] for k in range(3)]), 0, 1)
        adaptors, f = int(rng.integers(1, 5)), rng.integers(0, 4, 3)
        found = few_adaptors(v, sizes, budget, adaptors, f)
        weighted = (v.T * f).T
        check(found, weighted, sizes, budget)
        assert len(set(found.adaptor_of)) <= adaptors
        if not by_adaptor:  # named after the first level served
            assert all(p == found.adaptor_of.index(p) for p in found.adaptor_of)
        full = weighted if by_adaptor else np.repeat(weighted[:, None], 3, axis=1)
        check_optimal(found, all_few_adaptors(full, sizes, budget, adaptors), full)


# ---- larger ones, by their parts


def alike(seed: int, levels: int, n: int) -> tuple[Values, Values, int]:
    """Levels that resemble one another, as those of a network do."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 500, n)
    return 10.0 ** (rng.uniform(-5, -3, n) + rng.normal(0, 0.2, (levels, n))), sizes, int(sizes.sum()) // 6


def best_partition(worth: dict[tuple[int, ...], float], levels: Sequence[int], adaptors: int) -> float:
    """By trying every set for the first level's adaptor."""
    if not levels:
        return 0.0
    if not adaptors:
        return -math.inf
    first, rest = levels[0], levels[1:]
    return max(
        worth[(first, *others)] + best_partition(worth, [q for q in rest if q not in others], adaptors - 1)
        for k in range(len(rest) + 1)
        for others in combinations(rest, k)
    )


@pytest.mark.parametrize("adaptors", [1, 2, 3, 6])
def test_few_adaptors_agrees_with_every_partition(adaptors: int) -> None:
    v, sizes, budget = alike(adaptors, levels=6, n=30)
    worth = {g: select(v[list(g)].sum(axis=0), sizes, budget).objective for g in subsets(6)[1:]}
    found = few_adaptors(v, sizes, budget, adaptors)
    check(found, v, sizes, budget)
    check_optimal(found, best_partition(worth, range(6), adaptors), v)
    # adaptors that are as good for any level, given one by one: the same problem
    again = few_adaptors(np.repeat(v[:, None], 6, axis=1), sizes, budget, adaptors)
    assert again.objective == pytest.approx(found.objective, rel=1e-12)


def test_a_limit_that_does_not_bind_leaves_the_levels_apart() -> None:
    v, sizes, budget = alike(0, levels=4, n=40)
    apart = [select(level, sizes, budget) for level in v]
    many = few_layers(v, sizes, budget, 40)
    assert (many.used, many.adaptor_of) == (sum(f.used for f in apart), (0, 1, 2, 3))
    for found in (many, few_adaptors(v, sizes, budget, 4), few_adaptors(v, sizes, budget, 99)):
        assert found.chosen == tuple(f.chosen for f in apart)
    assert few_adaptors(v, sizes, budget, 1).chosen == (select(v.sum(axis=0), sizes, budget).chosen,) * 4


def test_more_freedom_is_never_worse() -> None:
    v, sizes, budget = alike(1, levels=5, n=40)
    for solve, limits in ((few_layers, (0, 3, 9, 27)), (few_adaptors, (1, 2, 3, 5))):
        objectives = [solve(v, sizes, budget, limit).objective for limit in limits]
        assert objectives == sorted(objectives)
        assert objectives[0] < objectives[-1]


def test_levels_that_are_alike_share_one_adaptor() -> None:
    v, sizes, budget = alike(2, levels=1, n=40)
    found = few_adaptors(np.repeat(v, 7, axis=0), sizes, budget, 5)
    assert (found.status, found.adaptor_of) == ("OPTIMAL", (0,) * 7)


def test_order_of_levels_and_layers_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    v, sizes, budget = rng.integers(0, 1000, (4, 12)), rng.integers(1, 30, 12), 60
    layers = rng.permutation(12)
    for levels in list(permutations(range(4)))[::5]:
        for solve in FEW:
            mixed = solve(v[list(levels)][:, layers], sizes[layers], budget, 3)
            assert mixed.objective == solve(v, sizes, budget, 3).objective


# ---- out of time, edges


@pytest.mark.parametrize("solve", FEW)
@pytest.mark.parametrize("seconds", ["WALL_SECONDS", "DETERMINISTIC_SECONDS"])
def test_out_of_time_is_said_and_bounded(solve: Solve, seconds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    v, sizes, budget = alike(4, levels=6, n=40)
    best = solve(v, sizes, budget, 3)
    monkeypatch.setattr(integers, seconds, 0.0)
    found = solve(v, sizes, budget, 3)
    check(found, v, sizes, budget)
    assert found.status == "FEASIBLE"
    assert found.objective <= best.bound
    assert best.objective <= found.bound < 2 * best.objective
    if solve is few_layers:
        assert len({i for chosen in found.chosen for i in chosen}) <= 3
    else:
        monkeypatch.undo()
        monkeypatch.setattr(coupled, "_SOLVES", 0)
        few = solve(v, sizes, budget, 3)
        check(few, v, sizes, budget)
        assert few.objective <= best.objective <= few.bound


@pytest.mark.parametrize("solve", FEW)
def test_equal_input_gives_an_equal_result(solve: Solve) -> None:
    v, sizes = np.full((5, 20), 1e-4), np.full(20, 7)
    v[:, 10:] = 3e-4
    found = solve(v, sizes, 40, 4)
    assert found == solve(v.tolist(), sizes.tolist(), 40, 4) == solve(v, sizes, 40, 4, np.ones(5))


@pytest.mark.parametrize("solve", FEW)
def test_edges(solve: Solve) -> None:
    for v, sizes in ((np.zeros((2, 3)), [1, 2, 3]), (np.ones((2, 0)), []), (np.ones((2, 2)), [7, 8])):
        found = solve(v, np.array(sizes, dtype=int), 6, 1)
        assert (found.chosen, found.objective, found.bound) == (((), ()), 0.0, 0.0)
        assert (found.status, found.used) == ("OPTIMAL", 0)
    found = solve([[1.0, 1e-30], [1.0, 1e-30]], [2**40, 0], 2**50, 2)
    assert found.chosen == ((0, 1), (0, 1)), "what weighs nothing is taken where there is room"
    assert solve([[1.0, 5.0], [0.0, 9.0]], [1, 1], 1, 1, [1, 0]).objective == 5.0
    for values, sizes, limit, frequencies, said in (
        ([[1.0], [math.nan]], [1], 1, None, "value nan of layer 0 at level 1"),
        ([[1.0, -1.0]], [1, 1], 1, None, "value -1.0 of layer 1 at level 0"),
        ([[1.0]], [-1], 1, None, "size -1 of layer 0"),
        ([[1.0]], [1.5], 1, None, "whole numbers"),
        ([[1.0]], [1, 2], 1, None, "expected \\[levels, layers\\]"),
        ([1.0], [1], 1, None, "expected \\[levels, layers\\]"),
        (np.ones((0, 1)), [1], 1, None, "no levels"),
        ([[1.0]], [1], 1, [1, 2], "one number for each"),
        ([[1.0]], [1], 1, [-1], "frequency -1.0 of level 0"),
        ([[1.0]], [1], -1, None, "budget -1"),
        ([[1e300]], [1], 1, [1e300], "weighted value inf"),
    ):
        with pytest.raises(ValueError, match=said):
            solve(values, sizes, limit, 1, frequencies)


def test_wrong_limits_are_refused() -> None:
    v = np.ones((2, 3))
    with pytest.raises(ValueError, match="distinct -1"):
        few_layers(v, [1, 1, 1], 1, -1)
    with pytest.raises(ValueError, match="adaptors 0"):
        few_adaptors(v, [1, 1, 1], 1, 0)
    with pytest.raises(ValueError, match="13 levels"):
        few_adaptors(np.ones((13, 1)), [1], 1, 2)
    with pytest.raises(ValueError, match=r"value -1\.0 of layer 2 at level 1 with the adaptor of level 0"):
        few_adaptors([[[1, 1, 1], [1, 1, 1]], [[1, 1, -1], [1, 1, 1]]], [1, 1, 1], 1, 2)
    with pytest.raises(ValueError, match="levels, levels, layers"):
        few_adaptors(np.ones((2, 3, 1)), [1], 1, 2)
