"""One task spread over several workers with Ray Train, which costs 11 to 28 s per run before the first step."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import ray

from gearnn_ray.adaptors.adaptor import ComplementChangedError
from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.core.errors import TrainingFailedError, UserError
from gearnn_ray.ray_jobs.board import WorkerLostError, beside_driver, discard, event_sender, reason_of
from gearnn_ray.training.precision import prepare_process


def spreads_over_workers(resources: ResourcesConfig) -> bool:
    """Whether a task is worth a run of Ray Train: only where it has several workers."""
    return resources.workers_per_level > 1


def run_on_workers(
    function: Callable[..., Any],
    look_up: Callable[..., Any],
    arguments: Sequence[Any],
    label: str,
    threads: int,
    resources: ResourcesConfig,
    board: Any,
    attempt: str,
) -> Any:
    """The reference of a task that runs `function(*arguments, emit)` on every worker of a group. The result comes from the store
    through `look_up`, which may already have it.
    """
    task = _watch_group.options(scheduling_strategy=beside_driver(), name=f"{label}: group of workers")
    return task.remote(function, look_up, label, attempt, threads, resources, board, *arguments)


@ray.remote(num_cpus=0, max_retries=0)
def _watch_group(
    function: Callable[..., Any],
    look_up: Callable[..., Any],
    label: str,
    attempt: str,
    threads: int,
    resources: ResourcesConfig,
    board: Any,
    *arguments: Any,
) -> Any:
    """The process that starts the group and waits for it."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer, get_device

    from gearnn_ray.ray_jobs.loopback_torch import LoopbackTorchConfig

    with event_sender(board) as emit:
        if (result := look_up(*arguments, emit=emit)) is not None:
            return result

    def loop() -> None:
        import torch
        import torch.distributed as dist

        if (device := get_device()).type == "cuda":
            torch.cuda.set_device(device)
        prepare_process(threads)
        with event_sender(board, attempt) as emit:
            try:
                function(*arguments, emit if dist.get_rank() == 0 else discard)
            except (TrainingFailedError, UserError, ComplementChangedError) as error:
                ray.get(board.give_up.remote(label, str(error)))
                raise  # the other workers wait for this one: Ray Train ends them

    bundle = {"CPU": resources.cpus, "GPU": resources.gpus}
    with tempfile.TemporaryDirectory(prefix="gearnn_ray-") as scratch:
        trainer = TorchTrainer(
            loop,
            torch_config=LoopbackTorchConfig(),
            scaling_config=ScalingConfig(
                num_workers=resources.workers_per_level,
                use_gpu=resources.gpus > 0,
                resources_per_worker={name: amount for name, amount in bundle.items() if amount},
            ),
            # Train wants a folder; what it would restore from is in our store. A lost group is started again by the driver.
            run_config=RunConfig(
                name=label.replace(" ", "_"), storage_path=scratch, failure_config=FailureConfig(max_failures=0)
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            if (reason := ray.get(board.given_up.remote(label))) is not None:
                raise TrainingFailedError(reason) from None
            raise WorkerLostError(reason_of(error)) from None
    result = look_up(*arguments, emit=discard)
    assert result is not None, "Ray Train ended without an error but left a stage undone"
    return result
