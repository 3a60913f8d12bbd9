"""The cluster of a job: the one that it belongs to, or a Ray of its own; and its nodes."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gearnn_ray.config.command_line import read_yaml
from gearnn_ray.core.errors import UserError
from gearnn_ray.ray_jobs.local_ray import LocalRay, address_to_join, local_ray
from gearnn_ray.ray_jobs.resources import autoscaler_ceiling

_BOOTSTRAP = Path.home() / "ray_bootstrap_config.yaml"


@contextmanager
def cluster() -> Iterator[LocalRay | None]:
    """The cluster of this process (None), or a guarded Ray of its own while the context lasts. Raises UserError where no Ray
    answers at RAY_ADDRESS, or a Ray of its own cannot be guarded.
    """
    if ray.is_initialized():
        yield None
        return
    if (address := address_to_join()) is None:
        with local_ray(log_to_driver=False, logging_level=logging.ERROR) as own:
            yield own
        return
    try:
        # bare: inside a submitted job the address and the runtime environment are injected
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(f"no Ray answers at {address}: start it, or unset RAY_ADDRESS to let this job start its own") from error
    try:
        yield None
    finally:
        ray.shutdown()


def alive_nodes() -> list[Mapping[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def cluster_resources() -> tuple[list[Mapping[str, float]], Mapping[str, float] | None]:
    """Resources of each node there is, and the most an autoscaler may bring in all (None: there is none)."""
    nodes = [node["Resources"] for node in alive_nodes()]
    ceiling: Mapping[str, float] | None = cluster_state.get_max_resources_from_cluster_config()
    if ceiling is None and _BOOTSTRAP.is_file():
        # the cluster launcher's autoscaler does not tell the cluster its node types; its file on the head does
        ceiling = autoscaler_ceiling(read_yaml(_BOOTSTRAP))
    return nodes, ceiling


def ask_every_node(question: Callable[[int], Any], gpus: float) -> list[Any]:
    """What `question(CPUs of the node)` returns on each node with CPUs; with `gpus`, on each node with GPUs. Where no node has a
    GPU yet, one task waits for the autoscaler to bring one.
    """
    ask = ray.remote(num_cpus=0)(question)
    refs = []
    for node in alive_nodes():
        cpus = int(node["Resources"].get("CPU", 0))
        if cpus and (not gpus or node["Resources"].get("GPU", 0)):
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            # a sliver of a GPU, because a task without one does not see it
            refs.append(ask.options(num_gpus=0.01 if gpus else 0, scheduling_strategy=here).remote(cpus))
    return list(ray.get(refs or [ask.options(num_gpus=gpus, num_cpus=1).remote(1)]))
