#!/usr/bin/env python3
"""Images per second of a batch with mixed levels, beside constant weights and other implementations. The ways take turns.

uv run --group benchmarks benchmarks/mixed_batch.py [--store STORE --release NAME:TAG] [--compile] [--device cuda]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft_lora import lora_network
from releases import add_options, from_options
from torch import Tensor
from torch.func import functional_call, vmap

from gearnn_ray import build_model
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.training.precision import prepare_process

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--size", type=int, nargs=2, default=(180, 240), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="measure the compiled networks instead of the eager ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    prepare_process(arguments.threads)
    release, device = from_options(arguments), torch.device(arguments.device)
    # ten levels: those of JPEG where the release has them
    ordered = sorted((q for q in release.levels if q != "clean"), key=lambda q: (not q.startswith("jpeg"), q))
    levels = ["clean", *ordered[:9]]
    mixed = [levels[i % len(levels)] for i in range(BATCH)]
    adaptive = AdaptiveModel(release, device)
    model = release.manifest["model"]
    constant = build_model(model["name"], model["num_classes"]).eval().requires_grad_(False)
    constant.load_state_dict(release.base_state())
    constant.to(device)
    x = torch.randn(BATCH, 3, *arguments.size, device=device)

    def one_pass_per_level() -> Tensor:
        outputs: list[Tensor] = [x] * BATCH
        for level in dict.fromkeys(mixed):
            adaptive.set_level(level)
            samples = [i for i, its in enumerate(mixed) if its == level]
            for i, output in zip(samples, adaptive(x[samples]), strict=True):
                outputs[i] = output
        adaptive.set_level(None)
        return torch.stack(outputs)

    def whole_batch_per_level() -> Tensor:
        outputs: list[Tensor] = [x] * BATCH
        for level in dict.fromkeys(mixed):
            adaptive.set_level(level)
            for i, output in enumerate(adaptive(x)):
                outputs[i] = output if mixed[i] == level else outputs[i]
        adaptive.set_level(None)
        return torch.stack(outputs)

    def set_level() -> Tensor:
        adaptive.set_level(levels[1])
        output = adaptive(x)
        adaptive.set_level(None)
        return output

    ways: dict[str, Callable[[], Tensor]] = {
        "constant weights": lambda: constant(x),
        "AdaptiveModel, mixed levels": lambda: adaptive(x, levels=mixed),
        "AdaptiveModel, one level": set_level,
    }
    if arguments.compile:
        adaptive.compile(dynamic=False)
        compiled = torch.compile(constant, fullgraph=True, dynamic=False)
        ways["constant weights"] = lambda: compiled(x)
    else:
        base = {name: t for name, t in constant.state_dict().items() if t.is_floating_point()}
        adaptors = {level: {n: t.to(device) for n, t in release.adaptor_state(level).items()} for level in levels}
        stacked = {
            name: torch.stack([adaptors[level].get(name, base[name]) for level in mixed])
            for name in {name for adaptor in adaptors.values() for name in adaptor}
        }
        one = vmap(lambda state, image: functional_call(constant, state, (image[None],))[0])
        lora = lora_network(build_model(model["name"], model["num_classes"]).eval(), levels[1:]).to(device)
        names = ["__base__" if level == "clean" else level for level in mixed]
        ways |= {
            "a pass per level, over its images": one_pass_per_level,
            "a pass per level, over the batch": whole_batch_per_level,
            "vmap over stacked tensors": lambda: one(stacked, x),
            "PEFT mixed batch (LoRA, rank 1)": lambda: lora(x, adapter_names=names),
        }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for turn in range(arguments.rounds + 1):
            for way, run in ways.items():
                if len(seconds[way]) > 1 and seconds[way][-1] > 4 * seconds["constant weights"][-1]:
                    continue  # two turns of a slow way are enough
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn:  # the first of each warms up or compiles
                    seconds[way].append(time.perf_counter() - start)
        got, worst = adaptive(x, levels=mixed), 0.0
        for level in dict.fromkeys(mixed):
            constant.load_state_dict({**release.base_state(), **release.adaptor_state(level)})
            for i in (i for i, its in enumerate(mixed) if its == level):
                want = constant(x[[i]])[0]
                worst = max(worst, float((got[i] - want).abs().max() / want.abs().max()))
    how = "compiled" if arguments.compile else "eager"
    threads = torch.get_num_threads()
    print(
        f"{how}, batch {BATCH} of {arguments.size[0]}x{arguments.size[1]}, {len(set(mixed))} levels, {device}, {threads} threads"
    )
    print(f"methods: {adaptive.methods()}")
    print(f"largest difference of a sample to its own level's network: {worst:.1e} of the largest logit")
    print(f"{'way':36}{'images/s':>10}{'of constant':>13}{'best turns':>12}")
    for way, took in seconds.items():
        # turn by turn, because the machine's speed drifts
        share = statistics.median(c / t for c, t in zip(seconds["constant weights"], took, strict=False))
        best = min(seconds["constant weights"]) / min(took)
        print(f"{way:36}{BATCH / statistics.median(took):10.2f}{share:13.3f}{best:12.3f}")


if __name__ == "__main__":
    main()
