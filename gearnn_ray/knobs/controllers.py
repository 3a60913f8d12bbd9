"""The controllers of many streams, whose segments come from cameras. Needs neither torch nor Ray."""

from collections import OrderedDict
from dataclasses import dataclass

from gearnn_ray.knobs.controller import Controller
from gearnn_ray.knobs.wire import Advice, Costs

__all__ = ["Controllers"]

_STREAMS = 4096


@dataclass
class _Stream:
    controller: Controller
    steps: int = 0


class Controllers:
    """One controller for each stream, the best values first. A stream whose knobs or goal are others than before begins anew."""

    def __init__(self, most: int = _STREAMS) -> None:
        """most: streams that are remembered; the one that was used least recently is forgotten."""
        self._most = most
        self._streams: OrderedDict[str, _Stream] = OrderedDict()

    def step(self, stream: str, costs: Costs) -> Advice:
        """Take in what a segment of a stream cost, and say the knobs of the next one.

        A segment that was encoded before its camera had heard of the latest knobs tells nothing about them: it changes nothing,
        and neither does a probe of another value than was asked for.
        """
        own = self._of(stream, costs)
        controller = own.controller
        if costs.deployed is not None and costs.values == controller.deployed:
            asked, probed = controller.probes, costs.probed or {}
            probes = {name: each for name, each in (costs.probes or {}).items() if probed.get(name) == asked[name]}
            controller.step(costs.deployed, probes, costs.seconds)
            own.steps += 1
        return Advice(
            knobs=controller.deployed,
            probes=controller.probes,
            price=controller.price,
            steps=own.steps,
            ignored=controller.ignored,
        )

    def _of(self, stream: str, costs: Costs) -> _Stream:
        own, grids = self._streams.get(stream), {knob.name: knob.values for knob in costs.knobs}
        if own is None or (own.controller.goal, own.controller.grids) != (costs.goal, grids):
            own = self._streams[stream] = _Stream(Controller(costs.knobs, costs.goal))
        self._streams.move_to_end(stream)
        if len(self._streams) > self._most:
            self._streams.popitem(last=False)
        return own
