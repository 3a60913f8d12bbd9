"""One pass over a level's images for ten sets of weights, against the ten networks' bare forward passes.

    uv run benchmarks/evaluation.py

The pass reads, normalises and evaluates (resize, argmax, confusion matrix); a bare pass only runs the network on prepared
images. Both run in this process with one thread, side by side in every round; the ratio is that of the medians.
"""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro

from gearnn_ray.config.split import ScenesConfig
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.models.layers import network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.job_spec import level_data
from gearnn_ray.tasks import task_by_name
from gearnn_ray.training.precision import fastest_precision, prepare_process
from gearnn_ray.training.predict import Normalisation, Predictor, collect_evidence, for_inference, with_weights

NETWORKS = 10


def main(images: int = 4, rounds: int = 5, height: int = 360, width: int = 480) -> None:
    """images: per pass, generated, of height × width pixels."""
    prepare_process(1)
    scenes = ScenesConfig(train=1, val=images, height=height, width=width)
    data, task = open_dataset("scenes", **scenes.model_dump()), task_by_name("segmentation")
    normalisation, precision = Normalisation((0.4, 0.4, 0.4), (0.3, 0.3, 0.3)), fastest_precision(torch.device("cpu"))
    model = build_model("drn_d_22", data.num_classes)
    states = []
    for seed in range(NETWORKS):
        torch.manual_seed(seed)
        states.append(network_state(build_model("drn_d_22", data.num_classes)))
    predictors = [Predictor(with_weights(model, state), normalisation, precision) for state in states]
    own = Predictor(model, normalisation, precision)
    with TemporaryDirectory() as folder:
        pictures, targets = level_data(data, task, "val", "jpeg-10", str(Path(folder) / "cache"))
        ready = [normalisation(torch.from_numpy(image[None].copy()).permute(0, 3, 1, 2)) for image in pictures]
        ready = [x.contiguous(memory_format=torch.channels_last) for x in ready]
        bare, whole = [], []
        for _ in range(rounds):
            total = 0.0
            for state in states:
                model.load_state_dict(state)
                for_inference(model)
                started = time.perf_counter()
                with torch.inference_mode():
                    for x in ready:
                        own.normalised(x)
                total += time.perf_counter() - started
            bare.append(total)
            started = time.perf_counter()
            collect_evidence(task, model, predictors, pictures, targets, data.num_classes)
            whole.append(time.perf_counter() - started)
    once, all_in_one = statistics.median(bare), statistics.median(whole)
    print(f"{NETWORKS} × DRN-D-22, {images} images {width}x{height}, {precision}, {rounds} rounds, one thread")
    print(f"sum of bare forward passes    {once:.2f} s  ({', '.join(f'{t:.2f}' for t in bare)})")
    print(f"one pass that evaluates all   {all_in_one:.2f} s  ({', '.join(f'{t:.2f}' for t in whole)})")
    print(f"ratio                         {all_in_one / once:.3f}  (aim: at most 1.15)")


if __name__ == "__main__":
    tyro.cli(main)
