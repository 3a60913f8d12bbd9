#!/usr/bin/env python3
"""Time to estimate the level of a JPEG file, beside the time in which Pillow decodes it. The ways take turns.

uv run benchmarks/level_estimation.py [--rounds N]
"""

import argparse
import io
import statistics
import time

import numpy as np
from http_latency import frames
from PIL import Image
from releases import JPEG

from gearnn_ray.serving.frames import evidence_of, read_frame
from gearnn_ray.serving.jpeg import quality_of_pixels, quality_of_tables
from gearnn_ray.serving.level_estimation import LevelEstimator, Reference

LEVELS = ("clean", *JPEG, "brightness-0.2", "brightness-0.5", "brightness-2.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    level_estimator = LevelEstimator(LEVELS, Reference(360, 480, 100.0, 0.3))
    files = frames(360, 480)
    seconds: dict[str, list[float]] = {"Pillow": [], "level estimate": [], "read_frame": [], "from pixels alone": []}
    for turn in range(rounds):
        file = files[turn % len(files)]
        started = [time.perf_counter()]
        image = Image.open(io.BytesIO(file))
        pixels = np.asarray(image.convert("RGB"))
        started.append(time.perf_counter())
        tables = image.quantization  # type: ignore[attr-defined]
        level_estimator.estimate(evidence_of(pixels, quality_of_tables(tables[0], tables.get(1))))
        started.append(time.perf_counter())
        read_frame(file, "image/jpeg")
        started.append(time.perf_counter())
        quality_of_pixels(pixels)
        started.append(time.perf_counter())
        for name, start, end in zip(seconds, started, started[1:], strict=False):
            seconds[name].append(end - start)
    decoding = statistics.median(seconds["Pillow"])
    for name, took in seconds.items():
        print(f"{name:20}{1e6 * statistics.median(took):9.0f} µs{statistics.median(took) / decoding:9.1%} of Pillow's decoding")


if __name__ == "__main__":
    main()
