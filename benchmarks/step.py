#!/usr/bin/env python3
"""Time of a partial fine-tune's step beside a full one's: DRN-D-22, the recipe's batch and crop, one thread. Both take turns.

    uv run benchmarks/step.py [--store STORE --release NAME:TAG --level LEVEL]

Without a release the selected layers are the smallest that fit M = 0.2%. The first convolution is one of them, which makes it
the costliest choice: gradients must be computed back to the input.
"""

import argparse
import statistics

import numpy as np
import torch

from gearnn_ray import Store
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.models.layers import layers_of
from gearnn_ray.models.registry import build_model
from gearnn_ray.tasks import task_by_name
from gearnn_ray.training.precision import fastest_precision, prepare_process
from gearnn_ray.training.predict import Normalisation
from gearnn_ray.training.trainer import fine_tune

CLASSES, BUDGET, STEPS = 11, 31_814, 4


def smallest_layers() -> tuple[str, ...]:
    """The smallest layers that fit M = 0.2% of DRN-D-22."""
    chosen, used = [], 0
    for layer in sorted(layers_of(build_model("drn_d_22", CLASSES)), key=lambda x: x.numel):
        if used + layer.numel <= BUDGET:
            chosen.append(layer.name)
            used += layer.numel
    return tuple(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store")
    parser.add_argument("--release")
    parser.add_argument("--level", default="jpeg-10")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    prepare_process(1)
    if arguments.store:
        release = Store(arguments.store).pull(arguments.release)
        chosen = tuple(release.manifest["levels"][arguments.level]["layers"])
    else:
        chosen = smallest_layers()
    rng = np.random.default_rng(0)
    recipe = Recipe(epochs=1)
    count = STEPS * recipe.batch_size
    images = [rng.integers(0, 256, (360, 480, 3), dtype=np.uint8) for _ in range(count)]
    labels = [rng.integers(0, CLASSES, (360, 480), dtype=np.uint8) for _ in range(count)]
    normalisation, task = Normalisation((0.41, 0.42, 0.43), (0.3, 0.31, 0.31)), task_by_name("segmentation")
    precision = fastest_precision(torch.device("cpu"))
    seconds: dict[str, list[float]] = {"full": [], "partial": []}
    model = build_model("drn_d_22", CLASSES)
    for repeat in range(arguments.repeats + 1):
        for what in seconds:
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            model.up.weight.requires_grad_(False)
            outcome = fine_tune(
                task, model, images, labels, recipe, normalisation, precision,
                chosen=None if what == "full" else chosen, seed=repeat,
            )  # fmt: skip
            if repeat:  # the first one of each warms up
                seconds[what].append(outcome.seconds / STEPS)
    full, partial = (statistics.median(seconds[what]) for what in seconds)
    print(f"{precision}, {torch.get_num_threads()} thread, {len(chosen)} layers selected")
    print(f"full step    {full:.3f} s (from {min(seconds['full']):.3f} to {max(seconds['full']):.3f})")
    print(f"partial step {partial:.3f} s (from {min(seconds['partial']):.3f} to {max(seconds['partial']):.3f})")
    print(f"partial / full {partial / full:.2f}")


if __name__ == "__main__":
    main()
