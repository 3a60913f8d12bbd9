#!/usr/bin/env python3
"""Time of a partial fine-tune's step, and of one that learns from a teacher, beside a full one's: DRN-D-22, the recipe's batch
and crop, one thread. They take turns.

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
from gearnn_ray.training.teacher import Teacher
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
    model = build_model("drn_d_22", CLASSES)
    taught = Recipe(epochs=1, objective="both")
    teacher = Teacher(task, build_model("drn_d_22", CLASSES), images, taught, normalisation, precision)
    small = [np.ascontiguousarray(image[::4, ::4]) for image in images]
    ways: dict[str, tuple[list[np.ndarray], Recipe, tuple[str, ...] | None, Teacher | None]] = {
        "full": (images, recipe, None, None),
        "partial": (images, recipe, chosen, None),
        "full, with a teacher": (images, taught, None, teacher),
        "full, 120x90": (small, recipe, None, None),
        "full, 120x90, with a teacher": (small, taught, None, teacher),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats + 1):
        for way, (frames, how, layers, its) in ways.items():
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            model.up.weight.requires_grad_(False)
            outcome = fine_tune(
                task, model, frames, labels, how, normalisation, precision, chosen=layers, seed=repeat, teacher=its
            )
            if repeat:  # the first one of each warms up
                seconds[way].append(outcome.seconds / STEPS)
    print(f"{precision}, {torch.get_num_threads()} thread, {len(chosen)} layers selected")
    for way, found in seconds.items():
        beside = "full, 120x90" if "120x90" in way else "full"
        ratio = statistics.median(found) / statistics.median(seconds[beside])
        print(f"{way:30} {statistics.median(found):.3f} s (from {min(found):.3f} to {max(found):.3f})  {ratio:.2f} of {beside}")


if __name__ == "__main__":
    main()
