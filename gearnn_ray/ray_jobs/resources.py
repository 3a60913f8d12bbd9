"""Whether a cluster can ever have the requested resources: decisions over plain numbers. nodes: resources of each existing node.
ceiling: the most an autoscaler may bring in all, None where there is none.
"""

from collections.abc import Mapping, Sequence

from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.core.errors import UserError


def autoscaler_ceiling(launcher: object) -> Mapping[str, float] | None:
    """The most CPUs and GPUs a cluster launcher's configuration allows, head included; None where it names no nodes."""
    types = launcher.get("available_node_types") if isinstance(launcher, dict) else None
    if not isinstance(launcher, dict) or not isinstance(types, dict):
        return None
    most: dict[str, float] = {}
    for name, node in types.items():
        at_most = 1 if name == launcher.get("head_node_type") else node.get("max_workers", launcher.get("max_workers", 0))
        for resource, amount in node.get("resources", {}).items():
            most[resource] = most.get(resource, 0) + amount * at_most
    return most


def check_resources(wanted: ResourcesConfig, nodes: Sequence[Mapping[str, float]], ceiling: Mapping[str, float] | None) -> None:
    """Raise UserError when a fine-tune asks for more than the cluster has or will ever have."""
    for resource, each in (("CPU", wanted.cpus), ("GPU", wanted.gpus)):
        total = each * wanted.workers_per_level
        largest = max((node.get(resource, 0) for node in nodes), default=0)
        most = _most(resource, nodes, ceiling)
        if total > most or (ceiling is None and each > largest):
            workers = f" by {wanted.workers_per_level} workers" if wanted.workers_per_level > 1 else ""
            raise UserError(
                f"a fine-tune asks for {each:g} {resource}{workers} but the cluster will never have more than {most:g}: "
                f"lower resources.{resource.lower()}s or resources.workers_per_level, or use a larger cluster"
            )


def groups_that_fit(wanted: ResourcesConfig, nodes: Sequence[Mapping[str, float]], ceiling: Mapping[str, float] | None) -> int:
    """Worker groups that run at once: a group that waits for another's workers would time out inside Ray Train."""
    fits = [
        int(_most(resource, nodes, ceiling) // (each * wanted.workers_per_level))
        for resource, each in (("CPU", wanted.cpus), ("GPU", wanted.gpus))
        if each
    ]
    return max(1, min(fits))


def _most(resource: str, nodes: Sequence[Mapping[str, float]], ceiling: Mapping[str, float] | None) -> float:
    """What the cluster has of a resource, or will have at most."""
    return max(sum(node.get(resource, 0) for node in nodes), (ceiling or {}).get(resource, 0))
