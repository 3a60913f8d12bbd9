#!/usr/bin/env python3
"""A detector's mixed batch beside constant weights, in turns: images per second, equality, and the time of a level switch.

uv run benchmarks/detection.py --store STORE --release NAME:TAG [--trust my_package.nets] [--size HEIGHT WIDTH]
uv run benchmarks/detection.py --network maskrcnn_resnet50_fpn      # random weights, every normalisation adapted
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from releases import in_memory

from gearnn_ray import AdaptiveModel, Release, Store
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.models.layers import layers_of, network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.serving.assembly import predictor, released_network
from gearnn_ray.tasks import task_by_name
from gearnn_ray.training.precision import prepare_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="artifacts")
    parser.add_argument("--release", default="centre-scenes:latest")
    parser.add_argument("--network", help="a built-in detector with random weights instead of a release")
    parser.add_argument("--trust", nargs="*", default=())
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    task = task_by_name("detection")
    release = _random(arguments.network) if arguments.network else Store(arguments.store).pull(arguments.release)
    adaptive = AdaptiveModel(release, trust=arguments.trust)
    constant = released_network(release, release.base_state(), arguments.trust).requires_grad_(False)
    run = predictor(release.content, constant)
    scenes = open_dataset("scenes", train=1, val=arguments.batch, height=arguments.size[0], width=arguments.size[1]).val
    images = (
        torch.from_numpy(np.stack([scenes.image(index) for index in range(arguments.batch)])).permute(0, 3, 1, 2).contiguous()
    )
    mixed = [adaptive.levels[i % len(adaptive.levels)] for i in range(arguments.batch)]
    ways: dict[str, Callable[[], object]] = {
        "constant weights": lambda: task.outputs(run(images)),
        "AdaptiveModel, mixed levels": lambda: adaptive(images, levels=mixed),
        "AdaptiveModel, one level": lambda: adaptive(images, levels=[adaptive.levels[1]] * arguments.batch),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for turn in range(arguments.rounds + 2):
            for way, each in ways.items():
                start = time.perf_counter()
                each()
                if turn > 1:
                    seconds[way].append(time.perf_counter() - start)
        found, equal = adaptive(images, levels=mixed), 0
        for image, level, own in zip(images, mixed, found, strict=True):
            adaptor = {} if level == "clean" else release.adaptor_state(level)
            constant.load_state_dict({**release.base_state(), **adaptor}, strict=False)
            equal += task.close([own], task.outputs(run(image[None])))
    switches = []
    for turn in range(1000):
        start = time.perf_counter()
        adaptive.set_level(adaptive.levels[turn % len(adaptive.levels)])
        switches.append(time.perf_counter() - start)
    size = "x".join(map(str, arguments.size))
    print(f"{release.content.model.name}, batch {arguments.batch} of {size}, {len(set(mixed))} levels")
    whole = "as a whole, once per level" if "" in adaptive.methods() else "per image"
    print(f"weights {whole}; {equal} of {arguments.batch} images equal their own level's network alone")
    print(f"set_level: {1e6 * statistics.median(switches):.1f} µs (median of {len(switches)})")
    print(f"{'way':32}{'images/s':>10}{'of constant':>13}")
    for way, took in seconds.items():
        share = statistics.median(c / t for c, t in zip(seconds["constant weights"], took, strict=True))
        print(f"{way:32}{arguments.batch / statistics.median(took):10.2f}{share:13.3f}")


def _random(name: str) -> Release:
    """A release of this detector whose three levels change every normalisation."""
    torch.manual_seed(0)
    model = build_model(name, 2)
    norms = [tensor for layer in layers_of(model) if layer.kind in ("norm_weight", "norm_bias") for tensor in layer.tensors]
    state = network_state(model)
    adaptors = {
        level: {tensor: state[tensor] + 0.01 * torch.randn_like(state[tensor]) for tensor in norms}
        for level in ("jpeg-10", "jpeg-30", "brightness-0.2")
    }
    return in_memory(name, 2, "detection", state, adaptors)


if __name__ == "__main__":
    main()
