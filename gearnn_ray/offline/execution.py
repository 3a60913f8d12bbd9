"""Device, precision and threads of a job, decided once from facts about all nodes. Ray asks the nodes (`ray_jobs.cluster`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gearnn_ray.config.recipe import BaseRecipe
from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.offline.records import Execution, ExecutionResult
from gearnn_ray.training.precision import fastest_precision


@dataclass(frozen=True)
class Processor:
    """What one node computes with: the CPUs that Ray may use there, and the fastest precisions of its CPU and its GPU."""

    cpus: int
    cpu_precision: str
    gpu_precision: str | None


def look_at_processor(cpus: int) -> Processor:
    """The processor of this process's node."""
    gpu = fastest_precision(torch.device("cuda")) if torch.cuda.is_available() else None
    return Processor(cpus, fastest_precision(torch.device("cpu")), gpu)


def decide(
    recipe: BaseRecipe, base_recipe: BaseRecipe, resources: ResourcesConfig, processors: Sequence[Processor]
) -> ExecutionResult:
    """Precision `auto` is bfloat16 if every node gains from it, so that it does not matter where a task runs. A level gets as
    many threads as it reserves CPUs; the base, which is trained while nothing else runs, as many as the largest node has.
    """
    device = "cuda" if resources.gpus else "cpu"
    gains = [p.gpu_precision for p in processors if p.gpu_precision] if resources.gpus else [p.cpu_precision for p in processors]
    fastest = "bfloat16" if gains and all(precision == "bfloat16" for precision in gains) else "float32"
    threads = max(1, int(resources.cpus))
    most = max([threads, *(p.cpus for p in processors)])

    def execution(asked: BaseRecipe, threads: int) -> Execution:
        return Execution(device, fastest if asked.precision == "auto" else asked.precision, threads)

    return ExecutionResult(execution(recipe, threads), execution(base_recipe, most))
