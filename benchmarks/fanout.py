#!/usr/bin/env python3
"""What the fan-out costs: the job's wall time over the same tasks in a bare loop, divided by the slots.

    uv run benchmarks/fanout.py --camvid PATH --weights FILE

The tasks are those of the real job (judge the base, fine-tune, select, fine-tune partially, judge twice) for ten JPEG levels
over every n-th CamVid frame at full size, with the real recipe but fewer epochs. In one run, one after the other:

    bare     `stages.run_level` for each level in a loop, one process, one thread, no Ray
    job      `pipeline.split` with two slots; its clock starts when Ray is up and the images are cached
    trainer  each level as one TorchTrainer run of one worker, two at a time (for the record)

Ratio = job seconds / (bare seconds / 2). Every store is fresh, so nothing is reused.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

LEVELS = tuple(f"jpeg-{q}" for q in range(10, 101, 10))


def subset(camvid: Path, out: Path, train: int, val: int) -> None:
    """Every n-th frame in CamVid's own layout."""
    for part, count in (("train", train), ("val", val)):
        names = sorted(p.name for p in (camvid / part).iterdir())
        for kind in (part, f"{part}annot"):
            (out / kind).mkdir(parents=True)
            for name in names[:: max(1, len(names) // count)][:count]:
                shutil.copy(camvid / kind / name, out / kind / name)


def config(arguments: argparse.Namespace, store: Path):  # type: ignore[no-untyped-def]
    from gearnn_ray.config.recipe import Recipe
    from gearnn_ray.config.schema import DataConfig, ModelConfig, SplitConfig

    return SplitConfig(
        name="fanout", store=str(store), levels=LEVELS[: arguments.levels],
        data=DataConfig(kind="camvid", path=str(arguments.spec / "camvid"), cache=str(arguments.spec / "cache")),
        model=ModelConfig(name="drn_d_22", weights=arguments.weights), recipe=Recipe(epochs=arguments.epochs),
    )  # fmt: skip


def bare(arguments: argparse.Namespace) -> float:
    """Runs in a process of its own; prints the seconds of the loop."""
    from gearnn_ray.config.schema import budget_floats, normalisation_values
    from gearnn_ray.data.dataset import open_dataset
    from gearnn_ray.models.registry import read_weights
    from gearnn_ray.offline.base import check_network, publish_given_base
    from gearnn_ray.offline.job_spec import JobSpec, Network, prepare_images
    from gearnn_ray.offline.level_run import run_level
    from gearnn_ray.tasks.segmentation import Normalisation
    from gearnn_ray.training.trainer import prepare_process

    prepare_process(1)
    told = config(arguments, arguments.spec / "bare")
    data = open_dataset("camvid", told.data.path)
    about = dict(read_weights(arguments.weights).about)
    network = Network("drn_d_22", data.num_classes, Normalisation(*normalisation_values(told.model, about)))
    facts = check_network(network, arguments.weights)
    spec = JobSpec(
        store=told.store, cache=told.data.cache, network=network, data=data, recipe=told.recipe,
        budget=budget_floats(told.budget, facts.floats), seed=0,
    )  # fmt: skip
    for level in told.levels:
        for part in ("train", "val"):
            prepare_images(spec, level, part)
    spec = replace(spec, base=publish_given_base(spec, arguments.weights).digest)
    started = time.perf_counter()
    for level in told.levels:
        run_level(spec, level, lambda _: None)
    return time.perf_counter() - started


def job(arguments: argparse.Namespace, trainer: bool) -> float:
    """Runs in a process of its own; seconds of the job after Ray is up."""
    import ray

    from gearnn_ray.offline import pipeline

    told = config(arguments, arguments.spec / ("trainer" if trainer else "job"))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    if trainer:  # the pipeline's own code for several workers, with one
        pipeline.spreads_over_workers = lambda resources: True  # type: ignore[assignment]
    started = time.perf_counter()
    outcome = pipeline.split(told, lambda _: None)
    seconds = time.perf_counter() - started
    assert not outcome.failed, outcome.failed
    ray.shutdown()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--train", type=int, default=96, help="training frames")
    parser.add_argument("--val", type=int, default=12, help="validation frames")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--levels", type=int, default=10)
    parser.add_argument("--without-trainer", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=["bare", "job", "trainer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(bare(arguments) if arguments.part == "bare" else job(arguments, arguments.part == "trainer"))
        return
    arguments.weights = os.path.abspath(arguments.weights)
    with tempfile.TemporaryDirectory(prefix="fanout-") as folder:
        subset(arguments.camvid, Path(folder) / "camvid", arguments.train, arguments.val)
        seconds: dict[str, float] = {}
        for part in ("bare", "job") if arguments.without_trainer else ("bare", "job", "trainer"):
            command = [sys.executable, __file__, "--camvid", str(arguments.camvid), "--weights", arguments.weights]
            command += [
                "--epochs",
                str(arguments.epochs),
                "--levels",
                str(arguments.levels),
                "--work",
                folder,
                "--part",
                part,
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seconds[part] = float(done.stdout.split()[-1])
            ratio = seconds[part] / (seconds["bare"] / 2)
            print(f"{part:8s} {seconds[part]:7.1f} s   over bare / 2 slots: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
