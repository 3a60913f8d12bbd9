"""Time until a solution of Eq. (2) and of its variants is proven optimal.

    uv run benchmarks/selection.py [--largest N]

Prints one row per problem. The first ones have the layer sizes of real networks at the paper's budget of 0.2%, with values like
those of real runs (1e-5 to 1e-3); the aim is under 0.3 s for DRN-D-38. Random layers follow, far more than any network has, alone
and in groups of eight options. The last problems select for ten levels of DRN-D-22, at budgets of 0.2% and 0.03%.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from gearnn_ray.models.layers import layers_of, model_size
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.selection import Selection, select

REPEATS = 5
LEVELS = 10
Solve = Callable[[], Selection]


def problems(largest: int) -> Iterator[tuple[str, int, Solve]]:
    """Name, number of layers or groups, and the call that solves the problem."""
    rng = np.random.default_rng(0)
    for name in ("drn_d_22", "drn_d_38"):
        model = build_model(name, num_classes=19)
        sizes = np.array([layer.numel for layer in layers_of(model)])
        values = 10.0 ** rng.uniform(-5, -3, len(sizes))
        yield f"{name}, 0.2%", len(sizes), partial(select, values, sizes, model_size(model) * 2 // 1000)
    counts = [n for n in (1_000, 10_000, 100_000) if n <= largest]
    for n in counts:
        sizes = rng.integers(1, 10_000, n)
        values = 10.0 ** rng.uniform(-5, -3, n)
        yield "random, a third", n, partial(select, values, sizes, int(sizes.sum()) // 3)
    for n in counts:
        sizes, values = rng.integers(1, 10_000, (n, 8)), 10.0 ** rng.uniform(-5, -3, (n, 8))
        budget, groups = int(sizes.max(axis=1).sum()) // 3, np.repeat(np.arange(n), 8)
        yield "8 options each", n, partial(select, values.ravel(), sizes.ravel(), budget, groups)
        sizes, values = np.sort(sizes, axis=1), np.sort(values, axis=1)  # the larger option is always the better one
        yield "8 in rising order", n, partial(select, values.ravel(), sizes.ravel(), budget, groups)


def joint_problems() -> Iterator[tuple[str, int, Solve]]:
    """The same for joint selections of ten levels with similar values."""
    rng = np.random.default_rng(0)
    model = build_model("drn_d_22", num_classes=19)
    sizes = np.array([layer.numel for layer in layers_of(model)])
    n = len(sizes)
    values = 10.0 ** (rng.uniform(-5, -3, n) + rng.normal(0, 0.3, (LEVELS, n)))
    for name, budget in (("0.2%", model_size(model) * 2 // 1000), ("0.03%", model_size(model) // 3000)):
        yield f"one memory, {name}", n, partial(select, values.ravel(), np.tile(sizes, LEVELS), LEVELS * budget)
        yield f"shared layers, {name}", n, partial(select, values.sum(axis=0), sizes, budget)


def timed(solve: Solve) -> tuple[float, Selection]:
    started = time.perf_counter()
    found = solve()
    return time.perf_counter() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=100_000, help="number of random layers or groups, at most")
    largest = parser.parse_args().largest
    print(f"{'problem':<21}{'layers':>8}{'seconds':>10}{'core':>7}  {'status':<9}{'gap':>9}")
    for name, n, solve in (*problems(largest), *joint_problems()):
        runs = [timed(solve) for _ in range(1 if n > 10_000 else REPEATS)]
        seconds, found = statistics.median(seconds for seconds, _ in runs), runs[0][1]
        gap = (found.bound - found.objective) / found.objective
        print(f"{name:<21}{n:>8,}{seconds:>10.4f}{found.core:>7}  {found.status:<9}{gap:>9.0e}", flush=True)


if __name__ == "__main__":
    main()
