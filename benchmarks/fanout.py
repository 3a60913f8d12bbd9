#!/usr/bin/env python3
"""The cost of the fan-out: wall time of the split job, over the time of the same stages in a loop divided by the slots.

    uv run benchmarks/fanout.py --camvid PATH --weights FILE

The stages are those of the job (evaluate the base, fine-tune, select, fine-tune partially, evaluate twice) for ten JPEG levels
of every n-th CamVid frame at full size, with the default recipe but fewer epochs. In one run, one after the other:

    bare     `level_run.run_level` for each level in a loop: one process, one thread, no Ray
    job      `pipeline.split` with two slots; the time starts when Ray runs and the images are cached
    trainer  each level as a TorchTrainer run of one worker, two at a time

Ratio = job seconds / (bare seconds / 2). Every part has a new store, so that nothing is reused.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    from gearnn_ray.config.split import DataConfig, ModelConfig, SplitConfig

    return SplitConfig(
        name="fanout", store=str(store), levels=LEVELS[: arguments.levels],
        data=DataConfig(kind="camvid", path=str(arguments.work / "camvid"), cache=str(arguments.work / "cache")),
        model=ModelConfig(name="drn_d_22", weights=arguments.weights), recipe=Recipe(epochs=arguments.epochs),
    )  # fmt: skip


def bare(arguments: argparse.Namespace) -> float:
    """Seconds of the loop. Called in a process of its own."""
    from gearnn_ray.config.budget import budget_floats
    from gearnn_ray.data.dataset import open_dataset
    from gearnn_ray.offline.base import check_network, network_of, publish_given_base
    from gearnn_ray.offline.execution import decide, look_at_processor
    from gearnn_ray.offline.job_spec import JobSpec
    from gearnn_ray.offline.level_run import run_level
    from gearnn_ray.training.precision import prepare_process

    prepare_process(1)
    split = config(arguments, arguments.work / "bare")
    data = open_dataset("camvid", split.data.path)
    network = network_of(split.model, data.num_classes, split.task)
    facts = check_network(network, arguments.weights)
    spec = JobSpec(
        store=split.store, cache=split.data.cache, network=network, data=data, recipe=split.recipe, seed=0,
        base=publish_given_base(split.store, network, arguments.weights).digest,
        budget=budget_floats(split.budget, facts.floats),
        execution=decide(split.recipe, split.base_recipe, split.resources, [look_at_processor(2)]).levels,
    )  # fmt: skip
    for level in split.levels:
        for read in (spec.training_data, spec.validation_data):
            read(level)
    started = time.perf_counter()
    for level in split.levels:
        run_level(spec, level, lambda _: None)
    return time.perf_counter() - started


def job(arguments: argparse.Namespace, trainer: bool) -> float:
    """Seconds of the job, without the start of Ray. Called in a process of its own."""
    from gearnn_ray.offline import pipeline
    from gearnn_ray.ray_jobs import run_tasks
    from gearnn_ray.ray_jobs.local_ray import local_ray

    split = config(arguments, arguments.work / ("trainer" if trainer else "job"))
    if trainer:  # the way of several workers, with one
        run_tasks.spreads_over_workers = lambda resources: True
    with local_ray(num_cpus=2, log_to_driver=False, logging_level="error"):
        started = time.perf_counter()
        outcome = pipeline.split(split, lambda _: None)
        seconds = time.perf_counter() - started
    assert not outcome.failed, outcome.failed
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
            command += ["--epochs", str(arguments.epochs), "--levels", str(arguments.levels), "--work", folder, "--part", part]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seconds[part] = float(done.stdout.split()[-1])
            ratio = seconds[part] / (seconds["bare"] / 2)
            print(f"{part:8s} {seconds[part]:7.1f} s   over bare / 2 slots: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
