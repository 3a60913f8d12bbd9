"""One pass over a level's images for ten methods, against the ten networks' bare forward passes.

    uv run benchmarks/judging.py

The pass reads, normalises and judges (resize, argmax, confusion matrix); a bare pass only runs the network on images that are
prepared already. Both in this process with one thread, side by side in every round; the ratio is of the medians.
"""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.schema import ScenesConfig
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.evaluation.runs import confusions
from gearnn_ray.models.layers import network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.job_spec import JobSpec, Network, validation_data
from gearnn_ray.tasks.segmentation import Normalisation, logits_of
from gearnn_ray.training.trainer import autocast, prepare_process, resolve_precision

METHODS = 10


def main(images: int = 4, rounds: int = 5, height: int = 360, width: int = 480) -> None:
    """images: per pass, generated, of height × width pixels."""
    prepare_process(1)
    scenes = ScenesConfig(train=1, val=images, height=height, width=width)
    data = open_dataset("scenes", **scenes.model_dump())
    normalisation = Normalisation((0.4, 0.4, 0.4), (0.3, 0.3, 0.3))
    network = Network("drn_d_22", data.num_classes, normalisation)
    model = build_model(network.name, network.num_classes)
    states = []
    for seed in range(METHODS):
        torch.manual_seed(seed)
        states.append(network_state(build_model(network.name, network.num_classes)))
    precision = resolve_precision("auto", torch.device("cpu"))
    with TemporaryDirectory() as folder:
        spec = JobSpec(
            store=folder,
            cache=str(Path(folder) / "cache"),
            network=network,
            data=data,
            recipe=Recipe(),
            budget=0,
            seed=0,
        )
        pictures, labels = validation_data(spec, "jpeg-10")
        ready = [
            normalisation(torch.from_numpy(image[None].copy()).permute(0, 3, 1, 2)).contiguous(
                memory_format=torch.channels_last
            )
            for image in pictures
        ]
        bare, judged = [], []
        for _ in range(rounds):
            total = 0.0
            for state in states:
                model.load_state_dict(state)
                model.to(memory_format=torch.channels_last).eval()
                started = time.perf_counter()
                for x in ready:
                    with torch.inference_mode(), autocast(precision, x.device):
                        logits_of(model, x)
                total += time.perf_counter() - started
            bare.append(total)
            started = time.perf_counter()
            confusions(model, states, pictures, labels, spec)
            judged.append(time.perf_counter() - started)
    once, is_joint = statistics.median(bare), statistics.median(judged)
    print(f"{METHODS} × DRN-D-22, {images} images {width}x{height}, {precision}, {rounds} rounds, one thread")
    print(f"sum of bare forward passes  {once:.2f} s  ({', '.join(f'{t:.2f}' for t in bare)})")
    print(f"one pass that judges all    {is_joint:.2f} s  ({', '.join(f'{t:.2f}' for t in judged)})")
    print(f"ratio                       {is_joint / once:.3f}  (aim: at most 1.15)")


if __name__ == "__main__":
    tyro.cli(main)
