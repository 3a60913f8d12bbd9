"""The controllers of all cameras' knobs, in one Ray actor that every replica asks by its name.

It outlives every replica, and Ray starts it again where it dies: then each stream begins anew, with the best values. It is
started by the first segment that asks for knobs; a service without such cameras has no process for them.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError

from gearnn_ray.knobs.controllers import Controllers
from gearnn_ray.knobs.wire import Advice, Costs

__all__ = ["SharedControllers", "controllers"]

_NAMESPACE, _NAME = "gearnn_steering", "controllers"
_SECONDS = 10.0  # for its answer, its start included
_LOG = logging.getLogger("ray.serve")


class SharedControllers:
    """The controllers, as a replica sees them."""

    async def step(self, stream: str, costs: Costs) -> Advice:
        """As `Controllers.step`; while the actor does not answer, the knobs stay as they are."""
        try:
            async with asyncio.timeout(_SECONDS):
                actor = await asyncio.to_thread(_actor)
                advice: Advice = await actor.step.remote(stream, costs)
                return advice
        except (RayError, ValueError, TimeoutError) as error:
            _LOG.warning("the controllers do not answer: %s", error)
            problem = "the controllers of the knobs are being started"
            return Advice(knobs=dict(costs.values), probes=dict(costs.probed or {}), problem=problem)


def _actor() -> Any:
    options = {"name": _NAME, "namespace": _NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
    return ray.remote(Controllers).options(**options, num_cpus=0, max_restarts=-1).remote()


@contextmanager
def controllers() -> Iterator[None]:
    """End the actor with the context, wherever it was started."""
    try:
        yield
    finally:
        with suppress(ValueError, RayError):
            ray.kill(ray.get_actor(_NAME, _NAMESPACE))
