"""The controller of the knobs: Adam's steps, where they end, what they reach, and what outlives a process."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.controller import LOWEST, Ceiling, Controller, Floor, Goal, Outcome, Trade
from gearnn_ray.knobs.knob import Value
from gearnn_ray.knobs.settings import Settings


@dataclass(frozen=True)
class Dial:
    """A knob whose values are the numbers from 0, the best one."""

    name: str
    count: int

    @property
    def values(self) -> tuple[Value, ...]:
        return tuple(range(self.count))

    def encode(self, value: Value, settings: Settings) -> Settings:
        return settings


@dataclass(frozen=True)
class World:
    """Losses add up over the knobs and bits multiply, both exponentials of how far a knob is turned: convex in each."""

    harm: float = 0.02
    growth: float = 4.0
    saving: float = 3.0

    def outcome(self, dials: Sequence[Dial], values: Mapping[str, Any]) -> Outcome:
        turned = [values[dial.name] / (dial.count - 1) for dial in dials]
        loss = self.harm * sum(math.exp(self.growth * each) - 1 for each in turned)
        return Outcome(loss, 1e6 * math.exp(-self.saving * sum(turned)))

    def best(self, count: int, price: float) -> int:
        dial = Dial("one", count)
        costs = [self.outcome([dial], {"one": value}) for value in dial.values]
        return int(np.argmin([each.loss + price * each.bits / 1e6 for each in costs]))


def run(controller: Controller, dials: Sequence[Dial], world: Callable[[int], World], segments: int) -> list[Outcome]:
    """What the deployed segments cost; accuracy falls by two points per unit of 0.02 that is lost."""
    spent = []
    for number in range(segments):
        at, deployed = world(number), controller.deployed
        outcome = at.outcome(dials, deployed)
        probes = {name: at.outcome(dials, {**deployed, name: value}) for name, value in controller.probes.items()}
        controller.step(outcome, probes, 1.0, 100 - outcome.loss * 100)
        spent.append(outcome)
    return spent


def position(controller: Controller, name: str = "one") -> float:
    return float(controller.state()["knobs"][name]["position"])


# ---- single steps


def test_a_knob_starts_at_its_best_value_and_probes_the_next_one() -> None:
    controller = Controller([Dial("one", 3), Dial("other", 2)], Trade(1.0))
    assert controller.deployed == {"one": 0, "other": 0}
    assert controller.probes == {"one": 1, "other": 1}


def test_the_first_step_by_hand() -> None:
    """Adam's first step is its rate, 0.5, whatever the gradient: from 1 to 0.5, where the third of five values is."""
    controller = Controller([Dial("one", 5)], Trade(1.0))
    controller.step(Outcome(0.0, 100), {"one": Outcome(0.1, 60)}, 1.0)  # saves 0.4 at 0.1
    assert position(controller) == pytest.approx(0.5)
    assert controller.deployed == {"one": 2}
    assert controller.probes == {"one": 3}
    # slope: 4 gaps · (0.1 saved - 0.3 lost) = -0.8 after 1.2: mean -0.1/0.75, root of (0.68/0.75)
    controller.step(Outcome(0.3, 40), {"one": Outcome(0.6, 30)}, 1.0)
    assert position(controller) == pytest.approx(0.5 + 0.5 * (0.1 / 0.75) / math.sqrt(0.68 / 0.75), rel=1e-6)


@settings(deadline=None)  # torch's first step takes a while
@given(st.lists(st.floats(-10, 10).filter(lambda slope: abs(slope) > 1e-3), min_size=1, max_size=12))
def test_steps_are_those_of_torchs_adam(slopes: list[float]) -> None:
    """A knob of two values has one gap, so that no other one ends its steps."""
    controller = Controller([Dial("one", 2)], Trade(0.0))
    s = torch.ones((), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=0.5, betas=(0.5, 0.5), eps=1e-12)
    for slope in slopes:
        s.grad = torch.tensor(slope, dtype=torch.float64)
        adam.step()
        s.data.clamp_(LOWEST, 1)
        cheapest = controller.deployed == {"one": 1}
        deployed, probe = Outcome(0.0, 1.0), Outcome(slope if cheapest else -slope, 1.0)
        controller.step(deployed, {"one": probe}, 1.0)
        # a gap known to lead back may hold the position at one of its ends
        assert position(controller) in (pytest.approx(s.item(), abs=1e-9), 1.0, LOWEST)
        s.data.fill_(position(controller))


def test_at_the_cheapest_value_the_next_better_one_is_probed() -> None:
    controller = Controller([Dial("one", 4)], Trade(10.0))
    for _ in range(2):
        controller.step(Outcome(0, 100), {"one": Outcome(0, 10)}, 1.0)
    assert position(controller) == LOWEST
    assert controller.deployed == {"one": 3}
    assert controller.probes == {"one": 2}


def test_a_probe_that_changes_no_pixel_leaves_its_knob_alone() -> None:
    controller = Controller([Dial("one", 3), Dial("other", 3)], Trade(1.0))
    controller.step(Outcome(0, 100), {"one": None, "other": Outcome(0, 50)}, 1.0)
    assert controller.deployed == {"one": 0, "other": 1}
    controller.step(Outcome(0, 100), {}, 1.0)
    assert controller.deployed == {"one": 0, "other": 1}
    assert controller.state()["knobs"]["one"]["steps"] == 0
    assert controller.ignored == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_leave_the_knobs_where_they_are_and_count(bad: float) -> None:
    controller = Controller([Dial("one", 3), Dial("other", 3)], Trade(1.0))
    controller.step(Outcome(0, 100), {"one": Outcome(bad, 50), "other": Outcome(0, 50)}, 1.0)
    assert controller.deployed == {"one": 0, "other": 1}
    assert controller.ignored == 1
    before = controller.state()["knobs"]
    controller.step(Outcome(bad, 100), {"one": Outcome(0, 50), "other": Outcome(0, 50)}, 1.0)
    assert controller.state()["knobs"] == before
    assert controller.ignored == 2


def test_a_probe_of_an_unknown_knob_is_refused() -> None:
    with pytest.raises(UserError, match="there is no knob 'zoom' here: expected one"):
        Controller([Dial("one", 3)], Trade(1.0)).step(Outcome(0, 1), {"zoom": Outcome(0, 1)}, 1.0)


# ---- many steps


@pytest.mark.parametrize("count", [2, 5, 7, 31])
@pytest.mark.parametrize("price", [0.01, 0.05, 0.3, 1.0, 3.0, 100.0])
def test_it_comes_to_rest_at_the_best_value(count: int, price: float) -> None:
    world, dial = World(), Dial("one", count)
    controller = Controller([dial], Trade(price))
    run(controller, [dial], lambda _: world, 20)
    for _ in range(10):
        run(controller, [dial], lambda _: world, 1)
        assert controller.deployed["one"] == world.best(count, price)


def test_several_knobs_come_to_rest_together() -> None:
    world, dials, price = World(), [Dial("a", 7), Dial("b", 5), Dial("c", 3)], 1.0
    controller = Controller(dials, Trade(price))
    run(controller, dials, lambda _: world, 40)

    def cost(values: Mapping[str, Any]) -> float:
        outcome = world.outcome(dials, values)
        return outcome.loss + price * outcome.bits / 1e6

    found = controller.deployed
    for dial in dials:  # no single knob is better elsewhere
        assert all(cost(found) <= cost({**found, dial.name: value}) + 1e-12 for value in dial.values)


@pytest.mark.parametrize("harm", [0.0005, 0.5])
def test_a_scene_cut_is_followed_within_three_segments(harm: float) -> None:
    """The slope is clear where the harm is 40 times less or 25 times more. A value that costs at most 0.1 more will do."""
    dial, price = Dial("one", 7), 1.0
    controller = Controller([dial], Trade(price))
    run(controller, [dial], lambda _: World(), 20)
    after = World(harm)
    outcomes = run(controller, [dial], lambda _: after, 4)
    best = after.outcome([dial], {"one": after.best(7, price)})
    last = outcomes[-1]  # the one that three steps led to
    assert last.loss + price * last.bits / 1e6 <= best.loss + price * best.bits / 1e6 + 0.1


@pytest.mark.parametrize("harm", [1e-4, 0.02, 50])
@pytest.mark.parametrize("share", [0.6, 0.2, 0.08])
@pytest.mark.parametrize("counts", [(7,), (7, 5), (5, 5, 4)])
def test_a_ceiling_is_held_within_five_percent_whatever_the_losses_units(
    counts: tuple[int, ...], share: float, harm: float
) -> None:
    dials = [Dial(f"dial {number}", count) for number, count in enumerate(counts)]
    outcomes = run(Controller(dials, Ceiling(share * 1e6)), dials, lambda _: World(harm, saving=3 / len(dials)), 100)
    assert np.mean([each.bits for each in outcomes[20:]]) == pytest.approx(share * 1e6, rel=0.05)


def test_a_ceiling_that_is_no_limit_leaves_the_best_values() -> None:
    dials = [Dial("one", 7)]
    controller = Controller(dials, Ceiling(5e6))
    run(controller, dials, lambda _: World(), 60)
    assert controller.deployed == {"one": 0}


def test_a_ceiling_that_cannot_be_held_leads_to_the_cheapest_values_and_back() -> None:
    dials, world = [Dial("one", 7)], World()
    controller = Controller(dials, Ceiling(10.0))
    run(controller, dials, lambda _: world, 60)
    assert controller.deployed == {"one": 6}
    controller.goal = Ceiling(1e6)  # the link is there again
    run(controller, dials, lambda _: world, 20)
    assert int(controller.deployed["one"]) <= 1


@pytest.mark.parametrize("floor", [98.0, 90.0, 80.0])
@pytest.mark.parametrize("counts", [(7,), (7, 5)])
def test_a_floor_of_accuracy_is_held_on_average(counts: tuple[int, ...], floor: float) -> None:
    dials = [Dial(f"dial {number}", count) for number, count in enumerate(counts)]
    outcomes = run(Controller(dials, Floor(floor)), dials, lambda _: World(0.004), 100)
    assert np.mean([100 - 100 * each.loss for each in outcomes[20:]]) == pytest.approx(floor, abs=0.05 * (100 - floor) + 0.5)


def test_without_accuracy_a_floor_leaves_the_price_alone() -> None:
    controller = Controller([Dial("one", 3)], Floor(90.0))
    for accuracy in (None, None, math.nan):
        controller.step(Outcome(0.1, 100), {"one": Outcome(0.2, 50)}, 1.0, accuracy)
    assert controller.price == pytest.approx(0.2)  # at which 0.1 lost is worth half of the bits


# ---- state


GOALS = [Trade(0.3), Ceiling(2e5), Floor(95.0)]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: type(goal).__name__)
def test_a_controller_goes_on_in_another_process(goal: Goal) -> None:
    dials, world = [Dial("a", 7), Dial("b", 3)], World(0.004)
    whole, parted = Controller(dials, goal), Controller(dials, goal)
    run(whole, dials, lambda _: world, 23)
    run(parted, dials, lambda _: world, 11)
    parted = Controller.restore(dials, json.loads(json.dumps(parted.state(), allow_nan=False)))
    run(parted, dials, lambda _: world, 12)
    assert parted.state() == whole.state()
    assert parted.goal == goal


def test_a_new_controllers_state_can_be_restored() -> None:
    dials = [Dial("a", 7)]
    state = Controller(dials, Ceiling(1e5)).state()
    assert Controller.restore(dials, json.loads(json.dumps(state))).state() == state


def test_a_state_of_other_knobs_is_refused() -> None:
    state = Controller([Dial("one", 3)], Trade(1.0)).state()
    with pytest.raises(UserError, match=r"is of the knobs one=0,1,2, expected one=0,1: use the same knobs") as caught:
        Controller.restore([Dial("one", 2)], state)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has the version None, expected 1"):
        Controller.restore([Dial("one", 3)], {})
