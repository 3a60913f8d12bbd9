"""How soon methods react to changes: stretches between changes, the price of a bit, and segments until the new best."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from gearnn_ray.knobs.controller import Ceiling
from gearnn_ray.knobs.findings import Replayed, replayed
from gearnn_ray.knobs.methods import fixed, steered
from gearnn_ray.knobs.outcome import NETWORKS, Outcomes
from gearnn_ray.knobs.reaction import KINDS, Reaction, price_of, reaction_rows, reactions
from gearnn_ray.knobs.streams import Stretch, stretches_of
from gearnn_ray.video.generated import TUNNEL, Clip
from tests.test_adapt_methods import EASY, HARD, STREET, outcomes, table


def source_of(segments: Sequence[Outcomes], stretches: tuple[Stretch, ...]) -> Replayed:
    made = table(segments)
    return replayed("street", dict.fromkeys(NETWORKS, made), dict.fromkeys(NETWORKS, segments), True, None, stretches)


CUTS = stretches_of(dict.fromkeys(range(100, 600, 100), "cut"), 10, 60)


@pytest.fixture(scope="module")
def street() -> Replayed:
    """Ten hard segments, ten easy ones, and so on, with a cut between them."""
    return source_of(STREET, CUTS)


def found(source: Replayed) -> dict[tuple[str, str], Reaction]:
    return {(each.method, each.kind): each for each in reactions([source], 2.0)}


def test_the_generated_clip_knows_when_its_scene_and_its_light_change() -> None:
    changes = Clip(shots=TUNNEL, shot_frames=5).changes
    assert changes == {number * 5: "light" if 4 <= number <= 7 else "cut" for number in range(1, 12)}


def test_segments_with_frames_of_both_sides_of_a_change_belong_to_no_stretch() -> None:
    assert stretches_of({20: "cut", 45: "light"}, 10, 6) == (
        Stretch(None, 0, 2), Stretch("cut", 2, 4), Stretch("light", 5, 6),
    )  # fmt: skip
    assert stretches_of({12: "cut", 18: "cut"}, 10, 3) == (Stretch(None, 0, 1), Stretch("cut", 2, 3)), "a shot of no segment"
    assert stretches_of({50: "cut"}, 10, 3) == (Stretch(None, 0, 3),), "the stream is not taken to its end"


def test_at_the_price_of_a_bit_the_fixed_configuration_is_worth_most() -> None:
    made = table(STREET)
    runs = list(fixed(made))
    on_the_frontier = 0
    for number in range(len(runs)):
        price = price_of(made, number)
        worth = [walk.accuracy(made) - price * walk.bandwidth(made) for walk in runs]
        on_the_frontier += worth[number] == pytest.approx(max(worth))
    assert on_the_frontier >= 3


def test_the_oracle_needs_no_time_and_constant_values_never_follow(street: Replayed) -> None:
    by = found(street)
    assert by["oracle", "cut"] == Reaction("oracle", "cut", 5, 5, 0.0)
    # one value is right on hard or on easy content, and already there after the cut
    assert by["fixed", "cut"].reached < 5
    assert by["fixed", "cut"].segments == 0


def test_a_controller_that_follows_needs_some_segments(street: Replayed) -> None:
    found_ = found(street)["oneadapt", "cut"]
    assert found_.changes == 5
    assert found_.reached >= 4
    assert found_.segments is not None
    assert 0 < found_.segments < 8


def test_a_halved_link_is_fitted_into_and_only_controllers_are_given_one(street: Replayed) -> None:
    by = found(street)
    assert by["pixel-change", "fits"].reached == by["pixel-change", "fits"].changes == 5
    assert by["pixel-change", "fits"].segments is not None
    assert 0 < by["pixel-change", "fits"].segments <= 8
    assert by["pixel-change", "link"].changes == 5
    assert not {("fixed", "link"), ("oracle", "fits"), ("profiling", "link")} & by.keys()


def test_a_later_goal_changes_nothing_before_it_holds() -> None:
    made = table(STREET)
    both = [steered(made, "pixels", Ceiling(40_000), later).chosen for later in (None, {30: Ceiling(10_000)})]
    assert both[0][:31].tolist() == both[1][:31].tolist()
    sizes = [made.bytes[np.arange(40, 60), chosen[40:]].mean() for chosen in both]
    assert sizes[1] < 0.6 * sizes[0]


def test_stretches_with_nothing_to_find_do_not_count() -> None:
    blind = [*(outcomes(HARD, t) for t in range(10)), *(outcomes(EASY, t, found=False) for t in range(10)), *STREET[20:30]]
    source = source_of(blind, stretches_of({100: "cut", 200: "light"}, 10, 30))
    by = found(source)
    assert ("fixed", "cut") not in by
    assert by["fixed", "light"].changes == 1
    assert ("pixel-change", "link") not in by


def test_without_known_changes_or_an_equal_run_nothing_is_said(street: Replayed) -> None:
    assert reactions([dataclasses.replace(street, stretches=())], 2.0) == []
    assert reactions([street], -1.0) == []


def test_a_row_has_a_cell_for_each_kind() -> None:
    rows = reaction_rows([Reaction("oneadapt", "cut", 7, 2, 1.25), Reaction("oneadapt", "light", 4, 0, None)], "-")
    assert rows == [["oneadapt", "1.2 (2/7)", "- (0/4)", "-", "-"]]
    assert len(rows[0]) == 1 + len(KINDS)
