#!/usr/bin/env python3
"""Time to switch to another level in several ways, and the cost of adaptors in smaller storage formats. The ways take turns.

uv run --group benchmarks benchmarks/switch.py [--store STORE --release NAME:TAG]
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from peft_lora import lora_network
from releases import add_options, from_options

from gearnn_ray import Release, build_model
from gearnn_ray.adaptors import storage_formats
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.serving.modules import AdaptiveConv
from gearnn_ray.training.precision import prepare_process

ROUNDS = 400  # of the fast ways; a slow one gets what fits a few seconds
PASSES = 5  # of one size and one way of using levels
SIZES = ((360, 480), (180, 240), (90, 120))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    arguments = parser.parse_args()
    prepare_process(1)
    release = from_options(arguments)
    levels = [level for level in release.levels if level != "clean"][:9]
    base, adaptors = release.base_state(), {level: release.adaptor_state(level) for level in levels}
    union = sorted({name for adaptor in adaptors.values() for name in adaptor})

    adaptive = AdaptiveModel(release)
    model = release.manifest["model"]
    network = build_model(model["name"], model["num_classes"]).eval().requires_grad_(False)
    network.load_state_dict(base)
    states = {level: {**base, **adaptor} for level, adaptor in adaptors.items()}
    targets = [network.state_dict()[name] for name in union]
    sources = {level: [states[level][name] for name in union] for level in levels}
    whole = {}
    for level in levels:
        whole[level] = copy.deepcopy(network)
        whole[level].load_state_dict(states[level])
    lora = lora_network(build_model(model["name"], model["num_classes"]).eval(), levels)

    with tempfile.TemporaryDirectory() as folder:
        files = {level: Path(folder) / f"{level}.safetensors" for level in levels}
        for level, file in files.items():
            safetensors.torch.save_file(states[level], file)
        ways: dict[str, Callable[[str], object]] = {
            "AdaptiveModel.set_level": adaptive.set_level,
            "the same, and the index written": lambda level: (adaptive.set_level(level), adaptive._selection.write()),
            "torch._foreach_copy_ of the union": lambda level: torch._foreach_copy_(targets, sources[level]),
            "load_state_dict of the adaptor": lambda level: network.load_state_dict(
                {name: states[level][name] for name in union}, strict=False
            ),
            "load_state_dict of the network": lambda level: network.load_state_dict(states[level]),
            "PEFT set_adapter (LoRA, rank 1)": lora.set_adapter,
            "whole networks in memory": whole.__getitem__,
            "whole networks from disk": lambda level: network.load_state_dict(safetensors.torch.load_file(files[level])),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(ROUNDS):
            for way, switch in ways.items():
                if turn > 20 and sum(seconds[way]) > 5:
                    continue
                level = levels[turn % len(levels)]
                start = time.perf_counter()
                switch(level)
                seconds[way].append(time.perf_counter() - start)
    print(f"{len(levels) + 1} levels on {adaptive.device}; AdaptiveModel holds the base + {extra(adaptive, release):.2%}")
    print(f"{'way':36}{'p50 µs':>12}{'p99 µs':>12}")
    for way, took in seconds.items():
        p99 = statistics.quantiles(took, n=100)[98]
        print(f"{way:36}{1e6 * statistics.median(took):12.1f}{1e6 * p99:12.1f}")
    compare_storage_formats(adaptive, release, levels)


def extra(model: AdaptiveModel, release: Release) -> float:
    """Memory of a model beyond the base, as a share of the base."""
    return model.weight_bytes / sum(t.nbytes for t in release.base_state().values()) - 1


def in_smallest_formats(release: Release) -> Release:
    """The release in the smallest storage formats that a split job offers: int8, and bfloat16 for running statistics."""
    base, stored = release.base_state(), {}
    for level in release.levels:
        adaptor = release.adaptor_state(level)
        smallest = {name: "bfloat16" if ".running_" in name else "int8" for name in adaptor}
        applying = {name: each for name, each in smallest.items() if storage_formats.applies(each, base[name].shape)}
        stored[level] = storage_formats.encode(base, adaptor, applying)
    return Release(release.content, release.digest, base, stored)


def compare_storage_formats(plain: AdaptiveModel, release: Release, levels: list[str]) -> None:
    """CPU time of a pass in one thread with adaptors in the smallest formats, over that as released; and the memory of both."""
    models = {"released": plain, "smallest": AdaptiveModel(in_smallest_formats(release))}
    convolutions = [[m for m in model.modules() if isinstance(m, AdaptiveConv)] for model in models.values()]
    for ours, its in zip(*convolutions, strict=True):  # the same kernels in both
        its.eager_method = ours.eager_method
    for name, model in models.items():
        print(f"adaptors, {name} formats: the base + {extra(model, release):.2%}", end="")
        model.set_level(levels[0])
        model(torch.randn(1, 3, *SIZES[-1]))
        print(f", after set_level {extra(model, release):.2%}")
    print(f"{'a pass, smallest / released formats':36}{'set_level':>12}{'given':>12}{'two levels':>12}")
    for size in SIZES:
        shares = []
        for given in (None, levels[:1], levels[:2]):
            images = torch.randn(len(given or "1"), 3, *size)
            took: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(PASSES + 1):
                for name in sorted(models, reverse=bool(turn % 2)):
                    start = time.thread_time()
                    models[name](images, given)
                    took[name].append(time.thread_time() - start)
            shares.append(statistics.median(s / r for s, r in zip(took["smallest"][1:], took["released"][1:], strict=True)))
        print(f"{f'{size[0]} x {size[1]}':36}" + "".join(f"{share:12.3f}" for share in shares))


if __name__ == "__main__":
    main()
