"""OneAdapt and its rivals: each is a walk through the outcomes of a stream's segments.

A method chooses a configuration for the next segment from what it could know by then, and pays for what it looks at: bytes,
forward passes of the server, encodings of the camera. Most have a price or a threshold that trades bandwidth for accuracy, and
are walked once for each of many, which makes a curve.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.knobs.controller import Controller, Goal, Trade
from gearnn_ray.knobs.controller import Outcome as Cost
from gearnn_ray.knobs.knob import Knob, Value
from gearnn_ray.knobs.outcome import Outcomes

Array = NDArray[np.float64]

PRICES = 25  # of a curve
THRESHOLDS = (99.5, 99.0, 98.0, 97.0, 95.0, 93.0, 90.0, 85.0, 80.0, 70.0, 60.0, 50.0)
"""Least agreements in percent that profiling asks for."""
PAUSES = (0, 4, 16)  # segments
_PROFILED = 0.25  # share of the stream that the offline profile is made of


def configurations_of(knobs: Sequence[Knob]) -> tuple[dict[str, Value], ...]:
    """All combinations of the knobs' values, the best one first."""
    names = [knob.name for knob in knobs]
    return tuple(dict(zip(names, values, strict=True)) for values in itertools.product(*(knob.values for knob in knobs)))


@dataclass(frozen=True, eq=False)
class Table:
    """The outcomes of T segments at Q configurations over one network.

    frames, seconds: of a segment. bytes, sent, accuracy, agreement, shows: [T, Q], NaN where there is nothing to find. losses:
    [T, Q, Q] by name: at which configuration, and of which. gradient: a gradient's time in forward passes of one frame.
    """

    knobs: tuple[Knob, ...]
    frames: int
    seconds: float
    bytes: Array
    sent: Array
    accuracy: Array
    agreement: Array
    shows: NDArray[np.int64]
    losses: Mapping[str, Array]
    gradient: float

    @classmethod
    def of(cls, knobs: Sequence[Knob], frames: int, seconds: float, segments: Sequence[Outcomes]) -> "Table":
        """Arguments as above."""
        count = len(segments[0].bytes)

        def rows(name: str) -> Array:
            return np.array([getattr(each, name) for each in segments], np.float64)  # None becomes NaN

        losses = {
            name: np.array([np.broadcast_to(np.array(each.losses[name], np.float64), (count, count)) for each in segments])
            for name in segments[0].losses
        }
        passes = [each.seconds_gradient / (each.seconds_forward / frames) for each in segments]
        shows = np.array([each.shows for each in segments], np.int64)
        return cls(
            tuple(knobs), frames, seconds, rows("bytes"), rows("sent"), rows("accuracy"), rows("agreement"), shows, losses,
            float(np.median(passes)),
        )  # fmt: skip

    @property
    def segments(self) -> int:
        return len(self.bytes)

    @cached_property
    def configurations(self) -> tuple[dict[str, Value], ...]:
        return configurations_of(self.knobs)

    def index(self, values: Mapping[str, Value]) -> int:
        """The number of a configuration."""
        number = 0
        for knob in self.knobs:
            number = number * len(knob.values) + knob.values.index(values[knob.name])
        return number

    def neighbours(self) -> Iterator[tuple[int, int]]:
        """Configurations that differ by one notch of one knob: the better one, and the cheaper one."""
        for number, values in enumerate(self.configurations):
            for knob in self.knobs:
                place = knob.values.index(values[knob.name])
                if place + 1 < len(knob.values):
                    yield number, self.index({**values, knob.name: knob.values[place + 1]})


@dataclass(frozen=True, eq=False)
class Walk:
    """What one method does. chosen: the configuration's number in each segment [T]. forwards: the server's forward passes of one
    frame, gradients in such passes included. encodes: of the camera. price: λ, or the threshold in percent; None without.
    """

    method: str
    chosen: NDArray[np.int64]
    forwards: Array
    encodes: Array
    price: float | None = None

    @property
    def has_goal(self) -> bool:
        """Whether it is a controller that holds a ceiling or a floor, instead of one of a curve."""
        return self.price is None and self.method.partition("+")[0] in STEERED

    def bandwidth(self, table: Table) -> float:
        """Bits a second."""
        return float(8 * self._of(table.bytes).mean() / table.seconds)

    def accuracy(self, table: Table) -> float:
        """Percent, the mean over segments in which there is something to find; NaN without."""
        found = self._of(table.accuracy)
        return float(found[~np.isnan(found)].mean()) if not np.isnan(found).all() else math.nan

    def _of(self, values_TQ: Array) -> Array:
        return values_TQ[np.arange(len(self.chosen)), self.chosen]


Method = Callable[[Table], Iterator[Walk]]


def steered(table: Table, loss: str, goal: Goal, later: Mapping[int, Goal] | None = None) -> Walk:
    """OneAdapt's controller, which sees the loss of this name: knobs of a segment follow from the segment before.

    later: goals that replace it, by the first segment during which they hold.
    """
    controller, has_gradient = Controller(table.knobs, goal), loss in _OF_GRADIENTS
    chosen, forwards, encodes = [], [], []
    for t in range(table.segments):
        deployed, controller.goal = controller.deployed, (later or {}).get(t, controller.goal)
        at = table.index(deployed)
        places = {name: table.index({**deployed, name: value}) for name, value in controller.probes.items()}
        costs = {place: Cost(table.losses[loss][t, at, place], 8 * table.bytes[t, place]) for place in (at, *places.values())}
        probes = {name: costs[place] if table.shows[t, place] != table.shows[t, at] else None for name, place in places.items()}
        controller.step(costs[at], probes, table.seconds, table.accuracy[t, at])
        chosen.append(at)
        forwards.append(table.sent[t, at] + has_gradient * table.gradient)
        encodes.append(1 + len(places))
    return Walk("", np.array(chosen), np.array(forwards), np.array(encodes, np.float64))


def prices(table: Table, loss: str, count: int = PRICES) -> list[float]:
    """Prices λ from one at which almost no knob moves to one at which almost all do, at equal ratios."""
    better, cheaper = np.array(list(table.neighbours())).T
    losses = table.losses[loss][:, better, cheaper] - table.losses[loss][:, better, better]
    shares = (table.bytes[:, better] - table.bytes[:, cheaper]) / table.bytes[:, :1]
    turning = losses[(losses > 0) & (shares > 0)] / shares[(losses > 0) & (shares > 0)]
    if not len(turning):
        return [1.0]
    low, high = np.quantile(turning, (0.01, 0.99))
    return [float(price) for price in np.geomspace(low, high * 1.01, count)]


def controllers(table: Table, loss: str, goal: Goal | None = None) -> Iterator[Walk]:
    """The curve of a controller, and its run with a goal."""
    for price in prices(table, loss):
        yield replace(steered(table, loss, Trade(price)), price=price)
    if goal is not None:
        yield steered(table, loss, goal)


def fixed(table: Table) -> Iterator[Walk]:
    """Every configuration for the whole stream: the static frontier."""
    for number in range(len(table.configurations)):
        yield _constant(table, number)


def offline_profile(table: Table) -> Iterator[Walk]:
    """AWStream (Zhang et al., SIGCOMM 2018) with a constant link: the configurations of which no other was better and cheaper in
    the first quarter of the stream, judged by the network's own answers. For that the camera encodes each of these segments at
    every configuration, and the server answers all of them. The profile is made beforehand, so that no bits count for it.
    """
    first = max(1, round(_PROFILED * table.segments))
    forwards, encodes = np.zeros(table.segments), np.zeros(table.segments)
    forwards[:first], encodes[:first] = table.sent[:first].sum(1), len(table.configurations)
    cost, worth = table.bytes[:first].mean(0), np.nan_to_num(table.agreement[:first], nan=100.0).mean(0)
    for number in range(len(cost)):
        if not ((cost < cost[number]) & (worth >= worth[number])).any():
            walk = _constant(table, number)
            yield replace(walk, forwards=walk.forwards + forwards, encodes=walk.encodes + encodes)


def profiling(table: Table) -> Iterator[Walk]:
    """Chameleon (Jiang et al., SIGCOMM 2018): a segment is sent with the best values, and the server tries one knob after the
    other, each from its cheapest value, until its answers agree enough with those to the best values. It has as much time for
    that as for its answers, so the result is used as many segments later as its inferences are segments. Then it profiles again,
    at once or after a pause.
    """
    for threshold, pause in itertools.product(THRESHOLDS, PAUSES):
        chosen, forwards, encodes = [], [], []
        current, found, ready = 0, 0, 0
        for t in range(table.segments):
            spent, tried = 0.0, 0
            if t >= ready:
                current = found
            if profiles := t >= ready + (pause if t else 0):
                found, spent, tried = _profile(table, t, threshold)
                ready = t + max(1, math.ceil(spent / table.sent[t, 0]))
            chosen.append(0 if profiles else current)
            forwards.append(table.sent[t, chosen[-1]] + spent)
            encodes.append(1 + tried)
        yield Walk("", np.array(chosen), np.array(forwards), np.array(encodes, np.float64), threshold)


def oracle(table: Table) -> Iterator[Walk]:
    """Knows the accuracy of each configuration in each segment, and takes the one with the best accuracy less price · bytes."""
    worth = np.nan_to_num(table.accuracy, nan=0.0)
    better, cheaper = np.array(list(table.neighbours())).T
    falls, saved = worth[:, better] - worth[:, cheaper], table.bytes[:, better] - table.bytes[:, cheaper]
    turning = falls[(falls > 0) & (saved > 0)] / saved[(falls > 0) & (saved > 0)]
    span = np.quantile(turning, (0.01, 0.99)) if len(turning) else (1.0, 1.0)
    for price in np.geomspace(span[0] / 10, span[1] * 1.01, 3 * PRICES):
        yield replace(_walk(table, (worth - price * table.bytes).argmax(1)), price=float(price))


def _profile(table: Table, t: int, threshold: float) -> tuple[int, float, int]:
    """The configuration that profiling chooses in segment t, the forward passes for it, and how many were tried."""
    values, spent, tried = dict(table.configurations[0]), 0.0, 0
    for knob in table.knobs:
        for value in reversed(knob.values[1:]):
            number = table.index({**values, knob.name: value})
            spent, tried = spent + table.sent[t, number], tried + 1
            if not table.agreement[t, number] < threshold:  # nothing to find: nothing to lose
                values[knob.name] = value
                break
    return table.index(values), spent, tried


def _constant(table: Table, number: int) -> Walk:
    return _walk(table, np.full(table.segments, number))


def _walk(table: Table, chosen: NDArray[np.integer]) -> Walk:
    sent = table.sent[np.arange(table.segments), chosen]
    return Walk("", chosen.astype(np.int64), sent, np.ones(table.segments))


_OF_GRADIENTS = ("saliency", "signed")
STEERED: Final[dict[str, str]] = {
    "oneadapt": "saliency", "oneadapt-signed": "signed", "pixel-change": "pixels", "psnr": "psnr", "ssim": "ssim",
    "random": "random",
}  # fmt: skip
"""Methods with OneAdapt's controller, and the losses that they see."""

OTHERS: Final[dict[str, Method]] = {
    "fixed": fixed, "profiling": profiling, "offline-profile": offline_profile, "oracle": oracle,
}  # fmt: skip

METHODS: Final = (*STEERED, *OTHERS)


def walks(table: Table, goal: Goal | None = None, suffix: str = "") -> list[Walk]:
    """Every run of every method. suffix: appended to their names."""
    methods: dict[str, Method] = {name: partial(controllers, loss=loss, goal=goal) for name, loss in STEERED.items()}
    return [replace(walk, method=name + suffix) for name, method in (methods | OTHERS).items() for walk in method(table)]
