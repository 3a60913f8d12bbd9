"""Eq. (2) for all levels at once, where few layers or few adaptors are to serve them.

Algorithm 1 gives every level a budget of its own, so its levels are chosen apart. Here one thing couples them: how many
layers they may change between them, or how many adaptors there are. (One memory or one set of layers for all is a single
knapsack over other values: `offline/together.py`.) A level counts as often as it occurs: its values v_i^q are multiplied by
its frequency f_q. One that never occurs may be given nothing.
All values, sizes and budgets are as in `select`, and so is what `OPTIMAL` and `bound` mean, with the rounding of a
problem of Q·n layers; so are the errors.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ortools.sat.python import cp_model

from gearnn_ray.offline.selection import integers
from gearnn_ray.offline.selection.knapsack import Selection, select

_MOST_LEVELS = 12  # for `few_adaptors`, which looks at all sets of levels
_SOLVES = 10_000  # sets of levels solved exactly before `few_adaptors` gives up: a limit that is equal on all machines


@dataclass(frozen=True)
class Joint:
    """A choice of layers for every level, and what is known of how good it is.

    chosen: for each level the indices of its layers, ascending. adaptor_of: for each level the number of the level whose
    adaptor serves it; its own, but in `few_adaptors`. used: the sizes of all adaptors together, one that serves
    several levels counted once. objective, bound, status: as in `Selection`, for Σ_q f_q Σ_i v_i^q.
    """

    chosen: tuple[tuple[int, ...], ...]
    adaptor_of: tuple[int, ...]
    objective: float
    bound: float
    status: Literal["OPTIMAL", "FEASIBLE"]
    used: int


def few_layers(
    values: ArrayLike, sizes: ArrayLike, budget: int, distinct: int, frequencies: ArrayLike | None = None
) -> Joint:
    """At most `distinct` different layers in all adaptors: x_i^q ≤ u_i, Σ_i u_i ≤ distinct, Σ_i N_i x_i^q ≤ budget.

    Switching between levels writes no other layers than these.
    values: [Q, n] ≥ 0. sizes: [n]. frequencies: [Q] ≥ 0, all 1 by default.
    """
    v, s = _weighted(values, sizes, frequencies)
    limit, most = integers.whole_number(budget, "budget"), integers.whole_number(distinct, "distinct")
    found = [select(level, s, limit) for level in v]
    bound, proven = math.fsum(f.bound for f in found), all(f.status == "OPTIMAL" for f in found)
    if len({i for f in found for i in f.chosen}) > most:
        layers, above, proven = _few(np.where(s <= limit, v, 0), s, limit, most)
        bound = min(bound, above)
        # Given the layers, the levels are apart again.
        found = [select(np.where(layers, level, 0), s, limit) for level in v]
    objective = math.fsum(v[q, i] for q, f in enumerate(found) for i in f.chosen)
    return Joint(
        chosen=tuple(f.chosen for f in found),
        adaptor_of=tuple(range(len(v))),
        objective=objective,
        bound=max(bound, objective),  # sums of rounded sums may lie a bit below
        status="OPTIMAL" if proven and all(f.status == "OPTIMAL" for f in found) else "FEASIBLE",
        used=sum(f.used for f in found),
    )


def _few(v: NDArray[np.float64], s: NDArray[Any], budget: int, most: int) -> tuple[NDArray[np.bool_], float, bool]:
    """CP-SAT's layers, `most` of them where there are as many, an upper bound, and whether they are proven best."""
    items = [(int(q), int(i)) for q, i in np.argwhere(v > 0)]
    weights, exponent, moved = integers.integer_weights(np.array([v[item] for item in items]))
    integers.check_sum(np.array([s[i] for _, i in items]))
    model = cp_model.CpModel()
    use = {i: model.new_bool_var("") for i in sorted({i for _, i in items})}
    x = [model.new_bool_var("") for _ in items]
    model.add(sum(use.values()) <= most)
    for (_, i), literal in zip(items, x, strict=True):
        model.add(literal <= use[i])
    for q in range(len(v)):
        mine = [(literal, int(s[i])) for (p, i), literal in zip(items, x, strict=True) if p == q]
        model.add(sum(size * literal for literal, size in mine) <= budget)
    model.maximize(cp_model.LinearExpr.weighted_sum(x, weights.tolist()))
    solver, proven = integers.solve(model, integers.WALL_SECONDS, linearization=2)

    layers = np.zeros(v.shape[1], dtype=bool)
    worth = _together(v)
    bound = math.fsum(v[:, np.argsort(-worth)[:most]].ravel())  # no memory could make them worth more
    if solver is not None:
        layers[[i for i, literal in use.items() if solver.boolean_value(literal)]] = True
        upper = sum(w for w, literal in zip(weights.tolist(), x, strict=True) if solver.boolean_value(literal))
        if not proven:  # the solver gives its bound as a float, rounded either way
            upper = math.ceil(math.nextafter(solver.best_objective_bound, math.inf))
        bound = min(bound, math.ldexp(2 * upper + int(moved.sum()), -exponent - 1))
    # Room for more layers means that they weighed nothing, or that the solver found none.
    others = np.argsort(-np.where(layers, -1.0, worth), kind="stable")
    layers[others[: most - int(layers.sum())]] = True
    return layers, bound, proven


def few_adaptors(
    values: ArrayLike, sizes: ArrayLike, budget: int, adaptors: int, frequencies: ArrayLike | None = None
) -> Joint:
    """At most `adaptors` adaptors, each within the budget, and every level served by one of them.

    values: [Q, Q, n] ≥ 0, v[q, p, i] what level q gains from layer i of an adaptor made for level p; or [Q, n], the same
    for all p: then it only matters which levels share an adaptor, and it is called after the first of them.
    sizes: [n]. frequencies: [Q] ≥ 0, all 1 by default. 1 ≤ adaptors; at most 12 levels, else ValueError.

        maximise Σ_q f_q Σ_{i ∈ S_a(q)} v_i^{q, a(q)}   over   a(q) in at most K levels p, sets S_p within the budget

    Given the levels T that p serves, S_p is a knapsack over Σ_{q ∈ T} f_q v[q, p, i]. A bound (Dantzig's) is known for all
    T and p; a dynamic programme over sets of levels finds the partition whose bounds add up to the most; its
    knapsacks are solved and their bounds replaced, until the best partition consists of solved ones: it is optimal. (Put to
    CP-SAT as one problem with products a·x, 10 levels of 103 layers are left with gaps of 1 to 70 % after 30 s.)
    """
    started = time.perf_counter()
    v, s = _weighted(values, sizes, frequencies, by_adaptor=True)
    limit, most = integers.whole_number(budget, "budget"), integers.whole_number(adaptors, "adaptors", least=1)
    levels = len(v)
    if levels > _MOST_LEVELS:
        raise ValueError(f"{levels} levels: expected at most {_MOST_LEVELS}, leave out some or put them together first")
    # What rounding may take in the knapsacks of one partition: less than this is not worth a proof.
    promised = levels * s.size * v[..., s <= limit].max(initial=0.0) * 2.0 ** (1 - integers.BITS)
    upper = _upper(v, s, limit)
    partitions = _Partitions(levels, min(most, levels))
    solved: dict[tuple[int, int], Selection] = {}
    objective, parts = -1.0, list[tuple[int, int]]()
    while True:
        bound, trial = partitions.best(upper)
        unsolved = [part for part in trial if part not in solved]
        for p, group in unsolved:
            solved[p, group] = select(_together(v[_members(group), min(p, v.shape[1] - 1)]), s, limit)
            upper[p, group] = solved[p, group].bound
        if (worth := math.fsum(solved[part].objective for part in trial)) > objective:
            objective, parts = worth, trial
        late = time.perf_counter() - started > integers.WALL_SECONDS or len(solved) > _SOLVES
        if bound - objective <= promised or not unsolved or late:
            break
    adaptor_of = [next(p for p, group in parts if group >> q & 1) for q in range(levels)]
    sets = {part[0]: solved[part] for part in parts}
    return Joint(
        chosen=tuple(sets[p].chosen for p in adaptor_of),
        adaptor_of=tuple(adaptor_of),
        objective=objective,
        bound=max(bound, objective),
        status="OPTIMAL" if bound - objective <= promised else "FEASIBLE",
        used=sum(f.used for f in sets.values()),
    )


def _members(group: int) -> list[int]:
    """A set of levels is an integer with their bits set."""
    return [q for q in range(group.bit_length()) if group >> q & 1]


def _upper(v: NDArray[np.float64], s: NDArray[Any], budget: int) -> NDArray[np.float64]:
    """[Q, 2^Q] above what an adaptor made for p can be worth to a set of levels; -inf where it is not to be made.

    v: [Q, P, n]. Where P = 1 an adaptor bears the number of the first level that it serves, so that every partition
    has one name.
    """
    levels = len(v)
    inside = np.arange(2**levels)[:, None] >> np.arange(levels) & 1
    # A set of levels gains of an adaptor at most what each would of its own: tight where they are alike.
    alone = [[select(v[q, p], s, budget).bound for q in range(levels)] for p in range(v.shape[1])]
    shared = [_dantzig(inside @ v[:, p], s, budget) for p in range(v.shape[1])]
    upper = np.minimum(shared, np.array(alone) @ inside.T)
    upper = upper * (1 + (levels + s.size + 8) * 2.0**-52)  # more than float64 can lose in these sums
    allowed = inside.argmax(axis=1) == np.arange(levels)[:, None]
    return np.where(allowed | (v.shape[1] > 1), upper, -math.inf)


def _dantzig(worth: NDArray[np.float64], s: NDArray[Any], budget: int) -> NDArray[np.float64]:
    """[N] the values of the fractional knapsacks of [N, n] values: the best per float first, the last in part."""
    worth, s = worth[:, s <= budget], s[s <= budget].astype(np.float64)
    density = np.divide(worth, s, out=np.full_like(worth, math.inf), where=s > 0)
    order = np.argsort(-density, axis=1, kind="stable")
    size = s[order]
    end = size.cumsum(axis=1)
    part = np.clip((budget - end + size) / np.maximum(size, 1), 0, 1)
    best: NDArray[np.float64] = np.take_along_axis(worth, order, axis=1) * np.where(end <= budget, 1, part)
    return np.asarray(best.sum(axis=1))


class _Partitions:
    """The dynamic programme over all ways to divide the levels among at most `most` adaptors."""

    def __init__(self, levels: int, most: int) -> None:
        self.levels, self.most = levels, most
        groups = np.arange(2**levels, dtype=np.int16)
        # All pairs of a set of levels and a subset of it, sorted by the set: 3^Q.
        self.whole, self.part = (k.astype(np.int64) for k in np.nonzero(groups[None] & ~groups[:, None] == 0))
        self.starts = np.flatnonzero(np.r_[True, self.whole[1:] != self.whole[:-1]])
        self.rest = self.whole ^ self.part

    def best(self, upper: NDArray[np.float64]) -> tuple[float, list[tuple[int, int]]]:
        """The largest sum of `upper` [Q, 2^Q] over a partition, and the parts of one as good: (p, set of levels)."""
        full = 2**self.levels - 1
        # before[p][k, T]: the most that T can be worth, divided among exactly k adaptors of levels below p
        before = [np.full((self.most + 1, full + 1), -math.inf)]
        before[0][0, 0] = 0.0
        for p in range(self.levels):
            after = before[p].copy()
            for k in range(self.most):
                after[k + 1] = np.maximum(
                    after[k + 1], np.maximum.reduceat(self._sums(upper, before, p, k), self.starts)
                )
            before.append(after)
        totals, left = before[-1][:, full], full
        bound = float(totals.max())
        k = int((totals >= bound * (1 - 1e-13)).argmax())  # no more adaptors than are worth it, sums being rounded
        parts = []
        for p in reversed(range(self.levels)):
            if before[p + 1][k, left] != before[p][k, left]:
                k -= 1
                mine = slice(self.starts[left], self.starts[left + 1] if left < full else None)
                at = int(self._sums(upper, before, p, k)[mine].argmax())
                parts.append((p, int(self.part[mine][at])))
                left = int(self.rest[mine][at])
        return bound, parts[::-1]

    def _sums(self, upper: NDArray[np.float64], before: Sequence[NDArray[np.float64]], p: int, k: int) -> Any:
        return before[p][k][self.rest] + upper[p][self.part]


def _weighted(
    values: ArrayLike, sizes: ArrayLike, frequencies: ArrayLike | None, by_adaptor: bool = False
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """f_q v, [Q, n] or, by adaptor, [Q, Q or 1, n], and the sizes [n]."""
    v = np.asarray(values, dtype=np.float64)
    s = integers.whole_numbers(sizes, "size", "layer {}".format)
    if (
        s.ndim != 1
        or v.shape[-1:] != s.shape
        or not (v.ndim == 2 or (by_adaptor and v.ndim == 3 and v.shape[0] == v.shape[1]))
    ):
        expected = "[levels, layers] or [levels, levels, layers]" if by_adaptor else "[levels, layers]"
        raise ValueError(f"values {v.shape} and sizes {s.shape}: expected {expected} and [layers]")

    if not len(v):
        raise ValueError("values of no levels: expected at least one")

    def name(flat: int) -> str:
        q, *p, i = np.unravel_index(flat, v.shape)
        return f"layer {i} at level {q}" + "".join(f" with the adaptor of level {other}" for other in p)

    integers.numbers(v, "value", name)
    f = np.ones(len(v)) if frequencies is None else integers.numbers(frequencies, "frequency", "level {}".format)
    if f.shape != v.shape[:1]:
        raise ValueError(f"frequencies {f.shape} of {len(v)} levels: expected one number for each")
    with np.errstate(over="ignore"):  # it is found by the check
        v = integers.numbers((v.T * f).T, "weighted value", name)
    return (v[:, None] if by_adaptor and v.ndim == 2 else v), s


def _together(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """[levels, layers] summed over the levels, rounded once."""
    return np.array([math.fsum(layer) for layer in v.T])
