"""OneAdapt and its rivals as walks through known outcomes: what each may know, pays and chooses."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gearnn_ray.knobs.controller import Ceiling, Floor, Trade
from gearnn_ray.knobs.findings import Found, at_equal_accuracy, average_rows, averages_of, replayed, rows_of
from gearnn_ray.knobs.knob import knobs_of
from gearnn_ray.knobs.methods import (
    METHODS,
    OTHERS,
    STEERED,
    Table,
    configurations_of,
    controllers,
    fixed,
    offline_profile,
    oracle,
    prices,
    profiling,
    steered,
    walks,
)
from gearnn_ray.knobs.outcome import ADAPTED, NETWORKS, ORIGINAL, Outcomes
from gearnn_ray.store import tables

KNOBS = knobs_of(["crf=18,26,34,42", "rate=1,2"])
CONFIGURATIONS = configurations_of(KNOBS)
EASY, HARD = 0.0, 3.0
"""Points of accuracy that each notch of the rate factor costs."""


def outcomes(fall: float, seed: int = 0, found: bool = True, **changes: Any) -> Outcomes:
    """A segment of ten frames whose bytes halve with each notch, and whose accuracy falls by so much."""
    rng = np.random.default_rng(seed)
    crf = np.array([KNOBS[0].values.index(each["crf"]) for each in CONFIGURATIONS])
    rate = np.array([int(each["rate"]) for each in CONFIGURATIONS])
    sizes = np.round(8000 * 0.5**crf * 0.7 ** (rate - 1) * rng.uniform(0.9, 1.1)).astype(int)
    loss = fall * crf + 8 * (rate - 1)
    row = tuple(map(float, loss))
    losses = dict.fromkeys(("saliency", "signed"), (row,) * len(row)) | dict.fromkeys(("pixels", "psnr", "ssim"), (row,))
    losses["random"] = (tuple(map(float, rng.uniform(size=len(row)))),)
    accuracy = tuple(60.0 - each if found else None for each in loss.tolist())
    return dataclasses.replace(
        Outcomes(
            tuple(sizes.tolist()), tuple((10 // rate).tolist()), accuracy,
            tuple(100.0 - each if found else None for each in loss.tolist()), ("clean",) * len(row), tuple(range(len(row))),
            losses, 1.0, 0.25, 0.01,
        ),
        **changes,
    )  # fmt: skip


def table(segments: Sequence[Outcomes]) -> Table:
    return Table.of(KNOBS, 10, 1.0, segments)


STREET = [outcomes(EASY if t // 10 % 2 else HARD, t) for t in range(60)]


def test_the_best_configuration_is_the_first_and_each_is_found_by_its_values() -> None:
    made = table(STREET)
    assert CONFIGURATIONS[0] == {"crf": 18, "rate": 1}
    assert [made.index(values) for values in made.configurations] == list(range(8))
    assert all(made.bytes[:, cheaper].sum() < made.bytes[:, better].sum() for better, cheaper in made.neighbours())


def test_a_gradient_is_counted_in_forward_passes_of_one_frame() -> None:
    made = table(STREET)  # 0.25 s of a gradient, ten frames a second
    assert made.gradient == pytest.approx(2.5)
    costs = {loss: steered(made, loss, Trade(1e-9)).forwards.mean() for loss in ("saliency", "pixels")}
    assert costs == pytest.approx({"saliency": 12.5, "pixels": 10.0})


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("oracle", "offline-profile")])
def test_no_method_knows_what_comes(method: str) -> None:
    changed = [*STREET[:30], *(outcomes(9.0, 100 + t) for t in range(30))]

    def begins(segments: Sequence[Outcomes]) -> list[list[int]]:
        made = table(segments)
        if method in STEERED:  # prices are found on the whole stream
            runs = [steered(made, STEERED[method], Trade(price)) for price in (1.0, 10.0)]
        else:
            runs = list(OTHERS[method](made))
        return [walk.chosen[:31].tolist() for walk in runs]

    assert begins(STREET) == begins(changed)


def test_a_controller_follows_the_content() -> None:
    made = table(STREET)
    walk = steered(made, "saliency", Trade(12.0))
    settled = [t for t in range(60) if t % 10 >= 5]
    hard, easy = ([walk.chosen[t] for t in settled if t // 10 % 2 == part] for part in (0, 1))
    assert (
        np.mean([CONFIGURATIONS[number]["crf"] for number in easy])
        > np.mean([CONFIGURATIONS[number]["crf"] for number in hard]) + 8
    )
    assert walk.encodes.tolist() == [3.0] * 60


def test_losses_that_are_not_finite_leave_the_knobs_where_they_are() -> None:
    broken = tuple((None,) * 8 for _ in range(8))
    blind = [dataclasses.replace(each, losses=each.losses | {"saliency": broken}) for each in STREET]
    assert set(steered(table(blind), "saliency", Trade(100.0)).chosen.tolist()) == {0}


def test_a_probe_that_shows_the_same_pixels_moves_no_knob() -> None:
    still = [dataclasses.replace(each, shows=(7,) * 8) for each in STREET]
    assert set(steered(table(still), "saliency", Trade(100.0)).chosen.tolist()) == {0}


def test_prices_reach_from_the_best_values_to_the_cheapest() -> None:
    made = table(STREET)
    curve = list(controllers(made, "saliency"))
    assert [walk.price for walk in curve] == prices(made, "saliency")
    assert curve[0].bandwidth(made) > 2 * curve[-1].bandwidth(made)
    assert curve[0].accuracy(made) > curve[-1].accuracy(made) + 5


@pytest.mark.parametrize("goal", [Ceiling(20_000.0), Floor(57.0)])
def test_a_goal_is_one_run_more(goal: Ceiling | Floor) -> None:
    made = table(STREET)
    *_, last = controllers(made, "pixels", goal)
    assert last.price is None
    if isinstance(goal, Ceiling):
        assert last.bandwidth(made) < 0.7 * 8 * made.bytes[:, 0].mean()


def test_fixed_is_every_configuration() -> None:
    made = table(STREET)
    assert [set(walk.chosen.tolist()) for walk in fixed(made)] == [{number} for number in range(8)]
    assert next(fixed(made)).bandwidth(made) == pytest.approx(8 * made.bytes[:, 0].mean())


def test_the_oracle_is_at_least_as_good_as_any_fixed_configuration_at_its_price() -> None:
    made = table(STREET)
    for walk in oracle(made):
        assert walk.price is not None
        worth = walk.accuracy(made) - walk.price * walk.bandwidth(made) / 8
        for other in fixed(made):
            assert worth >= other.accuracy(made) - walk.price * other.bandwidth(made) / 8 - 1e-9


def test_a_profile_is_used_as_many_segments_later_as_its_inferences_take() -> None:
    made = table([outcomes(EASY, t) for t in range(30)])
    walk = next(iter(profiling(made)))
    # crf 42 agrees at once (10 frames), rate 2 does not (5 frames): 15 frames are two segments
    cheapest = made.index({"crf": 42, "rate": 1})
    assert walk.chosen[:6].tolist() == [0, 0, 0, cheapest, 0, cheapest]
    assert walk.forwards[:4].tolist() == [25.0, 10.0, 25.0, 10.0]
    assert walk.encodes[:4].tolist() == [3.0, 1.0, 3.0, 1.0]


def test_an_offline_profile_knows_the_first_quarter_alone() -> None:
    segments = [outcomes(HARD, t) for t in range(10)] + [outcomes(EASY, t) for t in range(30)]
    changed = segments[:10] + [outcomes(20.0, t) for t in range(30)]
    both = [[walk.chosen.tolist() for walk in offline_profile(table(each))] for each in (segments, changed)]
    assert both[0] == both[1]
    assert all(len(set(chosen)) == 1 for chosen in both[0])


def test_an_offline_profile_is_paid_for_in_the_segments_that_it_is_made_of() -> None:
    made = table(STREET)
    walk = next(iter(offline_profile(made)))
    # four configurations with ten frames and four with five, and one encoding of each; then what is sent alone
    assert walk.forwards[[0, 14, 15]].tolist() == [70.0, 70.0, 10.0]
    assert walk.encodes[[0, 14, 15]].tolist() == [9.0, 9.0, 1.0]
    assert walk.bandwidth(made) == next(fixed(made)).bandwidth(made)


def test_segments_with_nothing_to_find_do_not_count() -> None:
    made = table([*STREET[:10], *(outcomes(EASY, t, found=False) for t in range(10))])
    best = next(fixed(made))
    assert best.accuracy(made) == pytest.approx(60.0)
    assert math.isnan(next(fixed(table([outcomes(EASY, found=False)]))).accuracy(table([outcomes(EASY, found=False)])))
    assert all(math.isfinite(walk.bandwidth(made)) for walk in walks(made))


def compared(within: float) -> dict[str, Any]:
    sure = [dataclasses.replace(each, accuracy=tuple(60.0 - 8 * (n % 2) for n in range(8))) for each in STREET]
    segments = {ORIGINAL: STREET, ADAPTED: sure}
    source = replayed("street", {network: table(segments[network]) for network in NETWORKS}, segments, True, None)
    return {each.method: each for each in at_equal_accuracy(source, within)}


def test_at_equal_accuracy_the_cheapest_run_of_each_method_is_compared() -> None:
    found = compared(within=2.0)
    assert found["fixed"].to_fixed == pytest.approx(0)
    # half of the segments may be sent at an eighth, and the others at a half, twice in three
    assert found["oracle"].to_fixed is not None
    assert found["oracle"].to_fixed < -40
    assert found["oracle"].of_oracle == pytest.approx(100)
    assert found["oneadapt"].of_oracle is not None
    assert 50 < found["oneadapt"].of_oracle <= 100
    assert found["oneadapt"].overhead == pytest.approx(25)
    assert found["pixel-change"].overhead is None
    assert found["fixed"].accuracy == pytest.approx(58.5)
    # the adaptive network is as good as the original one with the best values at all rate factors
    assert found["fixed+gearnn"].kilobits == pytest.approx(found["fixed"].kilobits / 4, rel=0.01)


def test_a_method_without_a_run_that_is_equal_says_so() -> None:
    found = compared(within=-1.0)
    assert {each.kilobits for each in found.values()} == {None}


def test_an_average_is_over_the_clips_that_have_an_equal_run() -> None:
    clips = [("a", 20.0, 10.0), ("b", 30.0, -10.0), ("c", None, None)]
    found = [Found(name, "ssim", kilobits, to_fixed=to_fixed, accuracy=kilobits and 50.0) for name, kilobits, to_fixed in clips]
    (average, alone) = averages_of([*found, Found("a", "psnr", 5.0, 40.0)])
    assert (average.method, average.sources, average.reached, average.kilobits) == ("ssim", 3, 2, 25.0)
    assert average.kilobits_sd == pytest.approx(50**0.5)
    assert average.to_fixed == 0
    assert average_rows([average, alone], "-") == [
        ["ssim", "25.0 ± 7.1", "+0% ± 14", "50.0", "2 of 3"],
        ["psnr", "5.0", "-", "40.0", "1 of 1"],
    ]


def test_the_rows_are_those_of_the_table() -> None:
    segments = dict.fromkeys(NETWORKS, STREET[:3])
    source = replayed("street", {network: table(STREET[:3]) for network in NETWORKS}, segments, True, Ceiling(20_000.0))
    rows = rows_of([source], "ceiling")
    made = tables.table(tables.adapt_schema({knob.name: knob.values for knob in KNOBS}), rows)
    assert {"source", "method", "segment", "bytes", "accuracy", "forward_equivalents", "encodes", "crf", "rate"} <= set(
        made.column_names
    )
    assert set(made["method"].to_pylist()) == {f"{method}{ending}" for method in METHODS for ending in ("", "+gearnn")}
    keys = list(zip(*(made[name].to_pylist() for name in ("method", "run", "segment")), strict=True))
    assert len(keys) == len(set(keys))
    assert {row["goal"] for row in rows if row["method"] == "oneadapt"} == {"trade", "ceiling"}
    assert all(field.metadata[b"description"] for field in made.schema)
