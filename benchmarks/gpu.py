#!/usr/bin/env python3
"""Fine-tuning DRN-D-22 on one GPU: images per second, full and partial, by number of fine-tunes that share the GPU.

    uv run benchmarks/gpu.py            (needs a CUDA device; --device cpu --steps 2 --crops 64 only shows that it runs)

Each process fine-tunes its own network on random 480x360 images with the job's `fine_tune`. All start together; the speed is the
number of images of all processes over the time from the common start until the last one ends. The bound is the arithmetic of a
step (counted by torch's FlopCounterMode) at the rate of a large bf16 matrix product, measured in the same run. The command also
checks that the same fine-tune twice, and one that continues from its checkpoint, end with the same bits.
"""

import argparse
import multiprocessing as mp
import time
from typing import Any

import numpy as np
import torch
from step import smallest_layers
from torch.utils.flop_counter import FlopCounterMode

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.models.layers import network_state, same_bits
from gearnn_ray.models.registry import build_model
from gearnn_ray.tasks import task_by_name
from gearnn_ray.training.precision import fastest_precision, prepare_process
from gearnn_ray.training.predict import Normalisation
from gearnn_ray.training.trainer import fine_tune

CLASSES, BATCH = 11, 8
NORMALISATION, TASK = Normalisation((0.41, 0.42, 0.43), (0.3, 0.31, 0.31)), task_by_name("segmentation")


def pictures(count: int) -> tuple[list[Any], list[Any]]:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (360, 480, 3), dtype=np.uint8) for _ in range(min(count, 64))]
    labels = [rng.integers(0, CLASSES, (360, 480), dtype=np.uint8) for _ in range(min(count, 64))]
    repeat = -(-count // len(images))
    return (images * repeat)[:count], (labels * repeat)[:count]


def worker(device: str, partial: bool, crop: int, batch: int, steps: int, barrier: Any, out: Any) -> None:
    prepare_process(1)
    recipe = Recipe(epochs=1, batch_size=batch, crop=crop)
    model = build_model("drn_d_22", CLASSES).to(device)
    chosen = smallest_layers() if partial else None
    images, labels = pictures(steps * batch)
    precision = fastest_precision(torch.device(device))
    warm_up = slice(3 * batch)
    fine_tune(TASK, model, images[warm_up], labels[warm_up], recipe, NORMALISATION, precision, chosen=chosen, seed=0)
    barrier.wait()
    started = time.time()
    fine_tune(TASK, model, images, labels, recipe, NORMALISATION, precision, chosen=chosen, seed=1)
    if device == "cuda":
        torch.cuda.synchronize()
    out.put((started, time.time(), torch.cuda.max_memory_allocated() if device == "cuda" else 0))


def images_per_second(device: str, partial: bool, crop: int, batch: int, steps: int, processes: int) -> tuple[float, float]:
    """(images/s of all processes together, GiB of GPU memory of one)."""
    context = mp.get_context("spawn")
    barrier, out = context.Barrier(processes), context.Queue()
    running = [context.Process(target=worker, args=(device, partial, crop, batch, steps, barrier, out)) for _ in range(processes)]
    for process in running:
        process.start()
    results = [out.get(timeout=400) for _ in running]
    for process in running:
        process.join()
    span = max(end for _, end, _ in results) - min(start for start, _, _ in results)
    return processes * steps * batch / span, results[0][2] / 2**30


def matmul_rate(device: str, size: int) -> float:
    """FLOP/s of a bf16 matrix product on random data, median of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        _ = a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / sorted(seconds[3:])[5]


def step_flops(partial: bool, crop: int) -> float:
    """FLOPs per image of one training step."""
    from gearnn_ray.models.layers import set_trainable

    model = build_model("drn_d_22", CLASSES)
    set_trainable(model, smallest_layers() if partial else None)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, crop, crop)).sum().backward()
    return float(counter.get_total_flops())


def same_twice(device: str, crop: int) -> tuple[bool, bool]:
    """Whether two equal fine-tunes have the same bits, and whether one that continues after its first epoch has them too."""
    recipe, precision = Recipe(epochs=2, batch_size=4, crop=crop), fastest_precision(torch.device(device))
    images, labels = pictures(12)
    torch.manual_seed(0)
    start = network_state(build_model("drn_d_22", CLASSES))

    class Memory:
        data: bytes | None = None

        def load(self) -> bytes | None:
            return self.data

        def save(self, data: bytes) -> None:
            self.data = data

    def run(checkpoint: Any) -> dict[str, Any]:
        model = build_model("drn_d_22", CLASSES).to(device)
        model.load_state_dict(start)
        fine_tune(TASK, model, images, labels, recipe, NORMALISATION, precision, chosen=None, seed=5, checkpoint=checkpoint)
        return network_state(model)

    memory = Memory()
    first = run(memory)
    second, resumed = run(None), run(memory)
    return tuple(all(same_bits(first[n], other[n]) for n in first) for other in (second, resumed))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--crops", type=int, nargs="+", default=[208, 512])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    device = arguments.device
    print("device", torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch", torch.__version__, flush=True)
    prepare_process(1)
    print("same fine-tune twice, and resumed: bit-identical", same_twice(device, min(arguments.crops)), flush=True)
    rate = matmul_rate(device, 8192 if device == "cuda" else 512)
    print(f"bf16 matrix product: {rate / 1e12:.0f} TFLOP/s")
    print("| crop | batch | what | GFLOP/image | bound images/s | fine-tunes | images/s | of the bound | of one | GiB each |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for crop in arguments.crops:
        for partial in (False, True):
            flops = step_flops(partial, crop)
            alone = 0.0
            for processes in arguments.processes:
                speed, memory = images_per_second(device, partial, crop, BATCH, arguments.steps, processes)
                alone = alone or speed
                print(
                    f"| {crop} | {BATCH} | {'partial' if partial else 'full'} | {flops / 1e9:.1f} | {rate / flops:,.0f} "
                    f"| {processes} "
                    f"| {speed:,.0f} | {100 * speed * flops / rate:.1f}% | {speed / alone:.2f} x | {memory:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
