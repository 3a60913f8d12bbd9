#!/usr/bin/env python3
"""float32 and bfloat16 on this machine's CPU: a training step and a forward pass of DRN-D-22, one thread. Both take turns.

    uv run benchmarks/precision.py [--repeats N]

Prints which of AVX2, AVX512, AVX512_BF16 and AMX the CPU has, and what `recipe.precision auto` resolves to here.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from gearnn_ray import build_model
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.tasks import task_by_name
from gearnn_ray.training.precision import fastest_precision, prepare_process
from gearnn_ray.training.predict import Normalisation, Predictor, for_inference
from gearnn_ray.training.trainer import fine_tune

CLASSES, STEPS = 11, 2
RECIPE = Recipe(epochs=1, batch_size=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    prepare_process(1)
    features = {
        "AVX2": torch.cpu._is_avx2_supported(),
        "AVX512": torch.cpu._is_avx512_supported(),
        "AVX512_BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    print(f"CPU: {', '.join(name for name, there in features.items() if there) or 'none of ' + ', '.join(features)}")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (360, 480, 3), dtype=np.uint8) for _ in range(STEPS * RECIPE.batch_size)]
    labels = [rng.integers(0, CLASSES, (360, 480), dtype=np.uint8) for _ in images]
    normalisation = Normalisation((0.41, 0.42, 0.43), (0.3, 0.31, 0.31))
    model, task = build_model("drn_d_22", CLASSES), task_by_name("segmentation")
    x = torch.from_numpy(np.stack(images[:2])).permute(0, 3, 1, 2)
    seconds: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats + 1):
        for precision in ("float32", "bfloat16"):
            arguments = (task, model, images, labels, RECIPE, normalisation, precision)
            step = fine_tune(*arguments, chosen=None, seed=repeat).seconds / STEPS
            forward, started = Predictor(for_inference(model), normalisation, precision), time.perf_counter()
            with torch.inference_mode():
                forward(x)
            measured = {"step": step, "forward": time.perf_counter() - started}
            for what, value in measured.items() if repeat else ():  # the first ones warm up
                seconds.setdefault((what, precision), []).append(value)
    shape = {"step": f"training step, batch {RECIPE.batch_size}, crop {RECIPE.crop}", "forward": "forward, 2 images 480x360"}
    for what, title in shape.items():
        float32, bfloat16 = (statistics.median(seconds[what, precision]) for precision in ("float32", "bfloat16"))
        print(f"{title}: float32 {float32:.2f} s, bfloat16 {bfloat16:.2f} s, ratio {float32 / bfloat16:.2f}")
    print(f"recipe.precision auto on a cluster of such nodes: {fastest_precision(torch.device('cpu'))}")


if __name__ == "__main__":
    main()
