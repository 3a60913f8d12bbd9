"""How long Eq. (2) takes to a proof: `python benchmarks/selection.py` prints one row per problem.

Real layer sizes at the paper's budget of 0.2%, with values like those of real runs (1e-5 … 1e-3), then random
layers, far more than any network has. The target is DRN-D-38: under 0.3 s, proven.
"""

import statistics
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.layers import layers_of, model_size
from gearnn_ray.models import build_model
from gearnn_ray.offline.selection import select

REPEATS = 5


def problems() -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.int64], int]]:
    """Name, values, sizes and budget of each problem."""
    rng = np.random.default_rng(0)
    for name in ("drn_d_22", "drn_d_38"):
        model = build_model(name, num_classes=19)
        sizes = np.array([layer.numel for layer in layers_of(model)])
        yield f"{name}, 0.2%", 10.0 ** rng.uniform(-5, -3, len(sizes)), sizes, model_size(model) * 2 // 1000
    for n in (1_000, 10_000, 100_000):
        sizes = rng.integers(1, 10_000, n)
        yield "random, a third", 10.0 ** rng.uniform(-5, -3, n), sizes, int(sizes.sum()) // 3


def main() -> None:
    print(f"{'problem':<17}{'layers':>8}{'seconds':>10}{'core':>7}  {'status':<9}{'gap':>9}")
    for name, values, sizes, budget in problems():
        runs = [select(values, sizes, budget) for _ in range(1 if len(values) > 10_000 else REPEATS)]
        seconds, found = statistics.median(run.runtime for run in runs), runs[0]
        gap = (found.bound - found.objective) / found.objective
        print(f"{name:<17}{len(values):>8,}{seconds:>10.4f}{found.core:>7}  {found.status:<9}{gap:>9.0e}")


if __name__ == "__main__":
    main()
