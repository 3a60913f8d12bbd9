#!/usr/bin/env python3
"""Peak memory of the driver by number of levels. Weights do not pass through the driver: it must not grow with the levels.

    uv run benchmarks/driver_memory.py

Runs the split job for DRN-D-22 (61 MiB of weights) on a few small generated scenes, with 2 and with 12 levels, each in its own
process, and prints the peak resident memory of that process.
"""

import resource
import subprocess
import sys
import tempfile

SIZES = (2, 12)
MODEL_MIB = 15_899_449 * 4 / 2**20


def one(levels: int, folder: str) -> None:
    from gearnn_ray.cli.main import run_split

    names = [f"jpeg-{5 + 7 * i}" for i in range(levels)]
    code = run_split(
        [
            "--levels", *names, "--store", f"{folder}/store-{levels}", "--data.cache", f"{folder}/cache",
            "--data.scenes.train", "8", "--data.scenes.val", "2", "--data.scenes.height", "64", "--data.scenes.width", "64",
            "--recipe.epochs", "1", "--recipe.crop", "32", "--base-recipe.epochs", "1", "--base-recipe.crop", "32", "--json",
        ]
    )  # fmt: skip
    assert code == 0
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    if len(sys.argv) == 3:
        one(int(sys.argv[1]), sys.argv[2])
        return
    peaks = {}
    with tempfile.TemporaryDirectory(prefix="driver-") as folder:
        for levels in SIZES:
            command = [sys.executable, __file__, str(levels), folder]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            peaks[levels] = float(out.split("peak")[-1])
            print(f"{levels:3d} levels: driver's peak {peaks[levels]:.0f} MiB", flush=True)
    few, many = SIZES
    growth = (peaks[many] - peaks[few]) / (many - few)
    print(f"growth per level {growth:.2f} MiB, {100 * growth / MODEL_MIB:.1f}% of the network's {MODEL_MIB:.0f} MiB")


if __name__ == "__main__":
    main()
