"""How much of M an adaptor gets where training images are held back to choose by."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.split import SelectionConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Event
from gearnn_ray.offline.held_back import TRIALS, best_part, parted
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.level_run import LevelRun, run_level
from gearnn_ray.offline.selection import LayerSelection
from gearnn_ray.reporting.progress import split_plan
from gearnn_ray.store.releases import Store
from tests import tiny

M = 64


def first(layers: int) -> LayerSelection:
    names = tuple("abcdefgh"[:layers])
    return LayerSelection(layers=names, storage_formats={}, objective=1.0, bound=1.0, status="OPTIMAL", used=8 * layers)


def by_size(floats: int) -> LayerSelection:
    """Layers of 8 floats, as many as fit."""
    return first(floats // 8)


def scored(*scores: float) -> Callable[[LayerSelection, str], float]:
    by_name = dict(zip(TRIALS, scores, strict=True))
    return lambda selection, name: by_name[name]


@pytest.mark.parametrize(
    ("scores", "layers"),
    [((50.0, 51.0, 49.0, 48.0), 4), ((52.0, 51.0, 49.0, 48.0), 8), ((50.0, 51.0, 51.0, 51.0), 1), ((50.0, 50.0, 50.0, 49.9), 2)],
)
def test_the_part_that_does_best_is_taken_and_the_smaller_of_equals(scores: tuple[float, ...], layers: int) -> None:
    assert best_part(by_size, scored(*scores), M) == first(layers)


def test_parts_that_choose_the_same_are_tried_once() -> None:
    tried = []

    def score(selection: LayerSelection, name: str) -> float:
        tried.append(name)
        return 1.0

    best_part(lambda floats: first(8 if floats > 20 else 1), score, M)
    assert tried == ["trial of M", "trial of M/4"]


def test_a_part_that_not_even_the_smallest_layer_fits_ends_the_trials() -> None:
    def select(floats: int) -> LayerSelection:
        if floats < 32:
            raise UserError("too small")
        return by_size(floats)

    assert best_part(select, scored(50.0, 51.0, 99.0, 99.0), M) == first(4)
    with pytest.raises(UserError, match="too small"):
        best_part(select, scored(1.0, 1.0, 1.0, 1.0), 8)


def test_the_last_images_are_held_back() -> None:
    images, targets = [*range(10)], [*"abcdefghij"]
    (kept, their), (held, held_targets) = parted((images, targets), 0.25)  # type: ignore[arg-type]
    assert (list(kept), list(held)) == (images[:8], images[8:])
    assert (list(their), list(held_targets)) == (targets[:8], targets[8:])


@pytest.mark.parametrize("count", [0, 1])
def test_images_of_which_none_can_be_held_back_are_refused(count: int) -> None:
    with pytest.raises(UserError, match="which leaves none: give more images"):
        parted(([0] * count, [0] * count), 0.25)  # type: ignore[arg-type,list-item]


@pytest.mark.parametrize("problem", ["one-memory", "shared-layers"])
def test_levels_that_share_a_budget_are_not_tried_one_by_one(problem: str) -> None:
    with pytest.raises(ValueError, match="where levels share the budget"):
        SelectionConfig(held_back=0.2, problem=problem)  # type: ignore[arg-type]


def test_trials_are_in_the_plan_of_levels_that_are_trained() -> None:
    plan = split_plan(("clean", "jpeg-10"), trials=tuple(TRIALS))
    assert {stage for level, stage in plan if level == "jpeg-10"} >= set(TRIALS)
    assert not {stage for level, stage in plan if level == "clean"} & set(TRIALS)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder: Path = tmp_path_factory.mktemp("held-back")
    tiny.write_folder(folder / "data")
    tiny.write_weights(folder / "weights.safetensors")
    return tiny.job_spec(folder, recipe=Recipe(epochs=1, learning_rate=0.1, batch_size=4, crop=24), budget=64, held_back=0.25)


def test_the_adaptor_of_the_best_part_is_trained_on_all_images(spec: JobSpec) -> None:
    said: list[Event] = []
    result = run_level(spec, "jpeg-10", said.append)
    trials = {event.stage: event.score for event in said if event.kind == "finished" and event.stage in TRIALS}
    assert len(trials) > 1
    assert result.selection is not None

    # what a job of the chosen budget alone makes, to the bit
    best = next(name for name in reversed(TRIALS) if trials.get(name) == max(trials.values()))  # type: ignore[type-var]
    alone = run_level(replace(spec, held_back=0.0, budget=64 // TRIALS[best]), "jpeg-10", lambda _: None)
    assert (alone.layers, alone.digest) == (result.layers, result.digest)


def test_trials_are_kept_and_judged_on_images_that_they_have_not_seen(spec: JobSpec) -> None:
    run = LevelRun(spec, "jpeg-10", lambda _: None)
    selection = run.selection(run.full(), spec.budget)
    tried, made = run.partial(selection, spec.held_back), run.partial(selection)
    assert tried.digest != made.digest
    assert Store(spec.store).is_intact(tried.digest)

    said: list[Event] = []
    run_level(spec, "jpeg-10", said.append)
    assert {event.kind for event in said} == {"reused"}
