"""OneAdapt's controller (Du et al., SoCC 2023, Section 4): one step of Adam per segment over all knobs, on measured slopes.

    controller = Controller(knobs, Trade(0.5))
    settings = settings_of(knobs, controller.deployed)             # of segment t
    controller.step(Outcome(…), {"crf": Outcome(…)}, seconds=1.0)  # what segment t and its `probes` cost: knobs of segment t + 1

A knob of n values, the best first, has them at places 1, 1 - 1/(n-1), …, 0, and a position in [1e-7, 1]. Deployed is the value
at the position or the next one above it, probed is the next cheaper one; at the lower end the cheapest is deployed and the next
better one probed. What is minimised is, for each knob, loss + λ · bits / bits of the best values, linear between two values: its
slope there follows from the deployed and the probed outcome.

Adam alone keeps swinging around the best value, because the slope jumps there. So a step ends at a value behind which a recent
slope leads back. There the two neighbours are probed in turn.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.knob import Grid, Value

LOWEST = 1e-7  # of a position
_BETAS, _RATE, _EPSILON = (0.5, 0.5), 0.5, 1e-12  # of Adam; ε is far below any slope, whatever the units of the loss
_CLOSE = 1e-6  # a position this near to a value is at it
_MOST_AGE = 4  # segments for which a slope counts as recent
_CHANGE = 0.5  # a slope one of whose parts has changed by more than this share of the larger part is of other content
_SPEED = 0.5  # of the logarithm of λ per segment, at an error of 100%
_MOST_ERROR = 4.0  # so that one busy segment does not throw λ away
_POINTS = 10.0  # of accuracy that count as an error of 100%
_MARGIN = 4.0  # factor by which λ may exceed, or fall below, the prices at which the knobs would move
_VERSION = 1


@dataclass(frozen=True)
class Trade:
    """The loss, in its own units, that it is worth to save the bits of the best values. None: the geometric mean of what the
    knobs lose for these bits in the first segment, one notch each.
    """

    price: float | None = None


@dataclass(frozen=True)
class Ceiling:
    """The bandwidth that the segments have on average. λ is found by dual ascent."""

    bits_per_second: float


@dataclass(frozen=True)
class Floor:
    """The accuracy in percent that the segments have on average, where it is known. λ is found by dual ascent."""

    accuracy: float


Goal = Trade | Ceiling | Floor
_GOALS: dict[str, type[Goal]] = {"trade": Trade, "ceiling": Ceiling, "floor": Floor}


@dataclass(frozen=True)
class Outcome:
    """What one encoding of a segment costs. loss: of `objective`. bits: of the segment."""

    loss: float
    bits: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.bits)


@dataclass(frozen=True)
class Slope:
    """Measured between two neighbouring values: what the cheaper one loses more, and which share of the best bits it saves."""

    loss: float
    share: float
    age: int = 0  # segments

    def at(self, price: float) -> float:
        """The fall of the objective from the better to the cheaper value; negative: the better one is worth its bits."""
        return price * self.share - self.loss

    def is_like(self, other: "Slope", price: float) -> bool:
        """Whether both may be of the same content."""
        most = max(abs(self.loss), abs(other.loss), abs(price * self.share), abs(price * other.share))
        return max(abs(self.loss - other.loss), abs(price * (self.share - other.share))) <= _CHANGE * most


@dataclass
class _Steered:
    """One knob. Gaps are the intervals between neighbouring values, from 0 at the best ones."""

    knob: Grid
    position: float = 1.0
    mean: float = 0.0  # of the gradients, as Adam keeps it
    square: float = 0.0
    steps: int = 0
    last_gap: int | None = None  # measured last
    slopes: dict[int, Slope] = field(default_factory=dict)  # by gap

    @property
    def gaps(self) -> int:
        return len(self.knob.values) - 1

    def place(self, index: int) -> float:
        return max(1 - index / self.gaps, LOWEST)

    @property
    def deployed(self) -> int:
        """The index of the value at the position or above it."""
        return self.gaps if self.position <= LOWEST else math.floor((1 - self.position) * self.gaps + _CLOSE)

    @property
    def gap(self) -> int:
        """Which one is measured next: the cheaper one, or where the position stands at a value, both in turn."""
        index = self.deployed
        at_value = math.isclose(self.position, self.place(index), abs_tol=_CLOSE)
        return index - 1 if index == self.gaps or (index > 0 and at_value and self.last_gap == index) else index

    @property
    def probe(self) -> int:
        return self.gap if self.gap < self.deployed else self.gap + 1

    def measured(self, deployed: Outcome, probe: Outcome, best_bits: float) -> Slope:
        better, cheaper = (deployed, probe) if self.gap == self.deployed else (probe, deployed)
        return Slope(float(cheaper.loss - better.loss), float((better.bits - cheaper.bits) / best_bits))

    def step(self, slope: Slope, price: float) -> None:
        """Adam's step, as far as the slopes known of other gaps allow."""
        gap, fall = self.gap, slope.at(price)
        before = self.slopes.get(gap)
        if before is not None and not slope.is_like(before, price):
            self.slopes = {}
        self.slopes[gap] = slope
        beta, beta_square = _BETAS
        gradient = fall * self.gaps  # by the position, which a cheaper value lowers
        self.steps += 1
        self.mean = beta * self.mean + (1 - beta) * gradient
        self.square = beta_square * self.square + (1 - beta_square) * gradient**2
        root = math.sqrt(self.square / (1 - beta_square**self.steps))
        step = _RATE * self.mean / (1 - beta**self.steps) / (root + _EPSILON)
        self.position = self._allowed(min(max(self.position - step, LOWEST), 1.0), price)
        self.last_gap = gap

    def grow_older(self) -> None:
        older = {gap: Slope(slope.loss, slope.share, slope.age + 1) for gap, slope in self.slopes.items()}
        self.slopes = {gap: slope for gap, slope in older.items() if slope.age <= _MOST_AGE}

    def _allowed(self, wanted: float, price: float) -> float:
        """The position on the way to this one before a gap whose slope is known to lead back."""
        for gap in sorted(self.slopes, reverse=wanted > self.position):
            upper, lower, fall = self.place(gap), self.place(gap + 1), self.slopes[gap].at(price)
            if fall < 0 and wanted < upper <= self.position + _CLOSE:
                return upper
            if fall > 0 and wanted > lower >= self.position - _CLOSE:
                return lower
        return wanted


class Controller:
    """The knobs of one stream. Everything that a step depends on is in `state`.

    ignored: how many outcomes were not finite, and left their knobs where they were.
    """

    def __init__(self, knobs: Sequence[Grid], goal: Goal) -> None:
        self.goal = goal
        self.price: float | None = goal.price if isinstance(goal, Trade) else None  # λ; None: not found yet
        self.best_bits: float | None = None  # per second, when all knobs were at their best last
        self.ignored = 0
        self._steered = {knob.name: _Steered(knob) for knob in knobs}

    @property
    def grids(self) -> dict[str, tuple[Value, ...]]:
        """The values of each knob, the best first."""
        return {name: each.knob.values for name, each in self._steered.items()}

    @property
    def deployed(self) -> dict[str, Value]:
        """The value of each knob for the next segment."""
        return {name: each.knob.values[each.deployed] for name, each in self._steered.items()}

    @property
    def probes(self) -> dict[str, Value]:
        """For each knob, the value that the next segment is to be encoded with once more, all other knobs as deployed."""
        return {name: each.knob.values[each.probe] for name, each in self._steered.items()}

    def step(
        self, deployed: Outcome, probes: Mapping[str, Outcome | None], seconds: float, accuracy: float | None = None
    ) -> None:
        """Take in what a segment of this duration and its probes cost, and choose the knobs of the next one.

        probes: by knob; None, or no entry, where the probe shows the same pixels as the deployed segment: such a knob stays where
        it is. accuracy: of the segment in percent, where it is known. Raises UserError for a probe of a knob that is not steered.
        """
        if unknown := next((name for name in probes if name not in self._steered), None):
            raise UserError(f"there is no knob {unknown!r} here: expected {', '.join(self._steered)}")
        measured = [each for each in (deployed, *probes.values()) if each is not None]
        self.ignored += sum(not each.is_finite for each in measured)
        if not deployed.is_finite:
            return
        if self.best_bits is None or all(each.deployed == 0 for each in self._steered.values()):
            self.best_bits = max(float(deployed.bits / seconds), 1.0)
        slopes = {
            name: self._steered[name].measured(deployed, probe, self.best_bits * seconds)
            for name, probe in probes.items()
            if probe is not None and probe.is_finite
        }
        self._find_price(deployed.bits / seconds, accuracy, slopes.values())
        for name, each in self._steered.items():
            each.grow_older()
            if name in slopes and self.price is not None:
                each.step(slopes[name], self.price)

    def state(self) -> Mapping[str, Any]:
        """Plain JSON, from which `restore` makes the same controller."""
        return {
            "version": _VERSION,
            "goal": {"kind": next(kind for kind, goal in _GOALS.items() if isinstance(self.goal, goal)), **asdict(self.goal)},
            "price": self.price,
            "best_bits": self.best_bits,
            "ignored": self.ignored,
            "knobs": {
                name: {
                    "values": list(each.knob.values),
                    **{part: getattr(each, part) for part in ("position", "mean", "square", "steps", "last_gap")},
                    "slopes": [[gap, *asdict(slope).values()] for gap, slope in each.slopes.items()],
                }
                for name, each in self._steered.items()
            },
        }

    @classmethod
    def restore(cls, knobs: Sequence[Grid], state: Mapping[str, Any]) -> "Controller":
        """The controller that gave this state. Raises UserError if it is of another version, or steered other knobs or values."""
        if state.get("version") != _VERSION:
            raise UserError(
                f"the controller's state has the version {state.get('version')!r}, expected {_VERSION}: start a new controller"
            )
        grids = {name: list(each["values"]) for name, each in state["knobs"].items()}
        if grids != (own := {knob.name: list(knob.values) for knob in knobs}):
            raise UserError(f"the controller's state is of the knobs {_text(grids)}, expected {_text(own)}: use the same knobs")
        kind, *numbers = state["goal"].values()
        controller = cls(knobs, _GOALS[kind](*numbers))
        controller.price, controller.best_bits, controller.ignored = state["price"], state["best_bits"], state["ignored"]
        for name, each in controller._steered.items():
            parts = dict(state["knobs"][name])
            del parts["values"]
            slopes = {gap: Slope(*numbers) for gap, *numbers in parts.pop("slopes")}
            controller._steered[name] = _Steered(each.knob, **parts, slopes=slopes)
        return controller

    def _find_price(self, bits_per_second: float, accuracy: float | None, measured: Iterable[Slope]) -> None:
        """Dual ascent on the logarithm of λ, within reach of the prices at which the knobs would move."""
        if isinstance(self.goal, Trade) and self.price is not None:
            return
        slopes = [*measured, *(slope for each in self._steered.values() for slope in each.slopes.values())]
        turning = [slope.loss / slope.share for slope in slopes if slope.loss > 0 and slope.share > 0]
        if self.price is None:
            self.price = math.exp(sum(map(math.log, turning)) / len(turning)) if turning else None
            return
        error = 0.0
        if isinstance(self.goal, Ceiling):
            error = bits_per_second / self.goal.bits_per_second - 1
        elif isinstance(self.goal, Floor) and accuracy is not None and math.isfinite(accuracy):
            error = (accuracy - self.goal.accuracy) / _POINTS
        self.price *= math.exp(_SPEED * min(max(float(error), -1.0), _MOST_ERROR))
        if turning:  # else λ would go on rising or falling while no knob can follow
            self.price = min(max(self.price, min(turning) / _MARGIN), max(turning) * _MARGIN)


def _text(grids: Mapping[str, Sequence[object]]) -> str:
    return "; ".join(f"{name}={','.join(map(str, values))}" for name, values in grids.items())
