"""How much of M an adaptor gets where training images are held back to choose by."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gearnn_ray.config.recipe import Criterion, Recipe
from gearnn_ray.config.split import SelectionConfig
from gearnn_ray.core.errors import StoreUnavailableError, UserError
from gearnn_ray.core.events import Event
from gearnn_ray.offline import level_run
from gearnn_ray.offline.held_back import NOTHING, TRIALS, best_part, parted
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.level_run import LevelRun, cached, run_level
from gearnn_ray.offline.selection import LayerSelection
from gearnn_ray.reporting.progress import split_plan
from gearnn_ray.store.releases import Store
from gearnn_ray.training.predict import collect_evidence
from gearnn_ray.training.trainer import fine_tune
from tests import tiny

BUDGET = 64


def first(layers: int) -> LayerSelection:
    """The first layers, of 8 floats each."""
    names = tuple("abcdefgh"[:layers])
    return LayerSelection(layers=names, storage_formats={}, objective=1.0, bound=1.0, status="OPTIMAL", used=8 * layers)


def scored(*scores: float) -> Callable[[LayerSelection, str], float]:
    by_name = dict(zip(TRIALS, scores, strict=True))
    return lambda selection, name: by_name[name]


def parts(*layers: int) -> dict[str, LayerSelection]:
    return {name: first(count) if count else NOTHING for name, count in zip(TRIALS, layers, strict=True)}


@pytest.mark.parametrize(
    ("scores", "layers"),
    [((50.0, 51.0, 49.0, 48.0), 4), ((52.0, 51.0, 49.0, 48.0), 8), ((50.0, 51.0, 51.0, 51.0), 1), ((50.0, 50.0, 50.0, 49.9), 2)],
)
def test_the_part_that_does_best_is_taken_and_the_smaller_of_equals(scores: tuple[float, ...], layers: int) -> None:
    assert best_part(parts(8, 4, 2, 1), scored(*scores)) == first(layers)


def test_parts_that_choose_the_same_are_tried_once() -> None:
    tried = []

    def score(selection: LayerSelection, name: str) -> float:
        tried.append(name)
        return 1.0

    best_part(parts(8, 8, 1, 1), score)
    assert tried == ["trial of M", "trial of M/4"]


def test_where_nothing_fits_the_base_is_tried_too() -> None:
    assert best_part(parts(1, 0, 0, 0), scored(50.0, 51.0, 0.0, 0.0)) == NOTHING


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
    return tiny.job_spec(folder, recipe=Recipe(epochs=1, learning_rate=0.1, batch_size=4, crop=24), budget=BUDGET, held_back=0.25)


def test_the_adaptor_of_the_best_part_is_trained_on_all_images(spec: JobSpec) -> None:
    said: list[Event] = []
    result = run_level(spec, "jpeg-10", said.append)
    trials = {event.stage: event.score for event in said if event.kind == "finished" and event.stage in TRIALS}
    assert len(trials) > 1
    assert result.selection is not None

    # what a job of the chosen budget alone makes, to the bit
    best = next(name for name in reversed(TRIALS) if trials.get(name) == max(trials.values()))  # type: ignore[type-var]
    alone = run_level(replace(spec, held_back=0.0, budget=BUDGET // TRIALS[best]), "jpeg-10", lambda _: None)
    assert (alone.layers, alone.digest) == (result.layers, result.digest)


def test_trials_are_kept_and_judged_on_images_that_they_have_not_seen(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LevelRun(replace(spec, seed=5), "jpeg-10", lambda _: None)
    images, _ = run.spec.training_data("jpeg-10")
    count, trained, judged = len(images), list[Any](), list[Any]()

    def tune(*arguments: Any, **options: Any) -> Any:
        trained.append(arguments[2])
        return fine_tune(*arguments, **options)

    def collect(*arguments: Any) -> Any:
        judged.append(arguments[3])
        return collect_evidence(*arguments)

    selection = run.selection(run.full(), spec.budget)
    monkeypatch.setattr(level_run, "fine_tune", tune)
    monkeypatch.setattr(level_run, "collect_evidence", collect)
    run = LevelRun(replace(spec, seed=6), "jpeg-10", lambda _: None)
    tried = run.partial(selection, spec.held_back)
    assert [np.array_equal(seen, images[at]) for at, seen in enumerate(trained[0])] == [True] * (3 * count // 4)
    assert [np.array_equal(seen, images[3 * count // 4 + at]) for at, seen in enumerate(judged[0])] == [True] * (count // 4)
    assert Store(spec.store).is_intact(tried.digest)
    assert run.partial(selection).digest != tried.digest


@pytest.mark.parametrize(
    ("criterion", "budget"),
    [
        (Criterion(importance="fisher", granularity="module"), 64),
        (Criterion(importance="sum-abs", storage_formats=("int8", "float32")), 8),
    ],
)
def test_a_level_whose_smallest_part_fits_nothing_is_found_finished(spec: JobSpec, criterion: Criterion, budget: int) -> None:
    some = replace(spec, criterion=criterion, budget=budget)
    result, said = run_level(some, "jpeg-10", lambda _: None), list[Event]()
    assert cached(run_level, some, "jpeg-10", emit=said.append) == result
    assert {event.kind for event in said} == {"reused"}


def test_a_store_that_is_away_during_a_trial_is_no_smaller_budget(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LevelRun(replace(spec, seed=7), "jpeg-10", lambda _: None)
    full = run.full()

    def away(*_: object) -> None:
        raise StoreUnavailableError("the store does not answer")

    monkeypatch.setattr(level_run, "select_layers", away)
    with pytest.raises(StoreUnavailableError):
        run.selection(full, spec.budget)
