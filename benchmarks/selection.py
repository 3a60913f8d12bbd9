"""How long Eq. (2) and its relatives take to a proof: `python benchmarks/selection.py` prints one row per problem.

Real layer sizes at the paper's budget of 0.2%, with values like those of real runs (1e-5 … 1e-3), then random
layers, far more than any network has, alone and as groups of eight options each. The target is DRN-D-38: under 0.3 s,
proven. Last come the problems that couple ten levels of DRN-D-22, at 0.2% and at a sixth of that, where memory is short.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from gearnn_ray.models.layers import layers_of, model_size
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.selection import (
    Choice,
    Joint,
    Selection,
    choose,
    few_adaptors,
    few_layers,
    select,
)

REPEATS = 5
LEVELS = 10
Solve = Callable[[], Selection | Choice | Joint]


def problems() -> Iterator[tuple[str, int, Solve]]:
    """Name, layers or groups, and the call that solves it."""
    rng = np.random.default_rng(0)
    for name in ("drn_d_22", "drn_d_38"):
        model = build_model(name, num_classes=19)
        sizes = np.array([layer.numel for layer in layers_of(model)])
        values = 10.0 ** rng.uniform(-5, -3, len(sizes))
        yield f"{name}, 0.2%", len(sizes), partial(select, values, sizes, model_size(model) * 2 // 1000)
    for n in (1_000, 10_000, 100_000):
        sizes = rng.integers(1, 10_000, n)
        values = 10.0 ** rng.uniform(-5, -3, n)
        yield "random, a third", n, partial(select, values, sizes, int(sizes.sum()) // 3)
    for n in (1_000, 10_000, 100_000):
        sizes, values = rng.integers(1, 10_000, (n, 8)), 10.0 ** rng.uniform(-5, -3, (n, 8))
        yield "8 options each", n, partial(choose, values, sizes, int(sizes.max(axis=1).sum()) // 3)
        sizes, values = np.sort(sizes, axis=1), np.sort(values, axis=1)  # every option is dearer and better
        yield "8 in rising order", n, partial(choose, values, sizes, int(sizes[:, -1].sum()) // 3)


def coupled_problems() -> Iterator[tuple[str, int, Solve]]:
    """The same for ten levels that resemble one another, and adaptors that suit other levels less."""
    rng = np.random.default_rng(0)
    model = build_model("drn_d_22", num_classes=19)
    sizes = np.array([layer.numel for layer in layers_of(model)])
    n = len(sizes)
    values = 10.0 ** (rng.uniform(-5, -3, n) + rng.normal(0, 0.3, (LEVELS, n)))
    gains = values[:, None] * 10.0 ** -np.abs(rng.normal(0, 0.3, (LEVELS, LEVELS, n)))
    for name, budget in (("0.2%", model_size(model) * 2 // 1000), ("0.03%", model_size(model) // 3000)):
        yield f"one memory, {name}", n, partial(select, values.ravel(), np.tile(sizes, LEVELS), LEVELS * budget)
        yield f"shared layers, {name}", n, partial(select, values.sum(axis=0), sizes, budget)
        for distinct in (20, 40):
            yield f"{distinct} layers, {name}", n, partial(few_layers, values, sizes, budget, distinct)
        for adaptors in (2, 5):
            yield f"{adaptors} adaptors, {name}", n, partial(few_adaptors, values, sizes, budget, adaptors)
            yield f"{adaptors} made for, {name}", n, partial(few_adaptors, gains, sizes, budget, adaptors)


def timed(solve: Solve) -> tuple[float, Selection | Choice | Joint]:
    started = time.perf_counter()
    found = solve()
    return time.perf_counter() - started, found


def main() -> None:
    print(f"{'problem':<21}{'layers':>8}{'seconds':>10}{'core':>7}  {'status':<9}{'gap':>9}")
    for name, n, solve in (*problems(), *coupled_problems()):
        runs = [timed(solve) for _ in range(1 if n > 10_000 else REPEATS)]
        seconds, found = statistics.median(seconds for seconds, _ in runs), runs[0][1]
        gap = (found.bound - found.objective) / found.objective
        core = "" if isinstance(found, Joint) else found.core
        print(f"{name:<21}{n:>8,}{seconds:>10.4f}{core:>7}  {found.status:<9}{gap:>9.0e}", flush=True)


if __name__ == "__main__":
    main()
