"""The stages of one level without Ray: criteria, codes, low ranks and a shorter look, from one record to the next."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gearnn_ray.adaptors import put_adaptor
from gearnn_ray.codes import codes_of, decode
from gearnn_ray.data import open_dataset
from gearnn_ray.errors import UserError
from gearnn_ray.layers import layers_of
from gearnn_ray.models import build_model
from gearnn_ray.offline import stages
from gearnn_ray.offline.events import Event
from gearnn_ray.offline.finetune import evaluate
from gearnn_ray.offline.gradients import Gradients, gradients
from gearnn_ray.offline.recipe import Criterion, Recipe
from gearnn_ray.offline.sensitivity import Sensitivity
from gearnn_ray.offline.stages import (
    LevelResult,
    LevelRun,
    Network,
    Work,
    known_level,
    publish_given_base,
    run_level,
    sense_level,
    validation_data,
)
from gearnn_ray.offline.values import VALUES
from gearnn_ray.store import Store
from tests import tiny
from tests.conftest import NORMALISATION

LEVEL, BUDGET = "jpeg-10", 300
KEYS = {
    "original": "01ce2b518da3060f", "full": "b6560b9f047b56ab", "selection": "5cc9b017de8e09f2", "partial": "d006eae4a78a955f",
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("street")
    tiny.write_folder(folder / "data")
    tiny.write_weights(folder / "weights.safetensors")
    work = Work(
        store=str(folder / "store"),
        cache=str(folder / "cache"),
        network=Network("tests.nets:small", tiny.CLASSES, NORMALISATION),
        data=open_dataset("folder", str(folder / "data"), num_classes=tiny.CLASSES),
        recipe=Recipe(epochs=2, learning_rate=0.1, batch_size=4, crop=24, precision="float32"),
        budget=BUDGET,
        seed=4,
    )
    return replace(work, base=publish_given_base(work, str(folder / "weights.safetensors")).digest)


Ran = Callable[..., tuple[LevelResult, list[str]]]


@pytest.fixture
def ran(work: Work) -> Ran:
    """The level's result, and the stages that were computed for it."""

    def run(**changes: object) -> tuple[LevelResult, list[str]]:
        said: list[Event] = []
        result = run_level(replace(work, **changes), LEVEL, said.append)  # type: ignore[arg-type]
        return result, [event.stage for event in said if event.kind == "finished"]

    return run


def judged(work: Work, result: LevelResult) -> float:
    """mIoU of what anyone restores from the store."""
    store = Store(work.store)
    assert result.digest is not None
    base, model = store.get_state(work.base), build_model(work.network.name, tiny.CLASSES)
    put_adaptor(model, base, decode(base, store.get_state(result.digest)))
    return evaluate(model, *validation_data(work, LEVEL), NORMALISATION, "float32")


@pytest.mark.parametrize("value", list(VALUES))
def test_every_value_chooses_within_the_budget_and_is_kept_under_its_own_key(work: Work, ran: Ran, value: str) -> None:
    criterion = Criterion(value=value)  # type: ignore[arg-type]
    result, _ = ran(criterion=criterion)
    assert 0 < result.floats <= BUDGET
    assert result.codes == {}
    rows = {row["layer"]: Sensitivity(**row) for row in result.sensitivity}
    total = sum(VALUES[value](rows[layer].change) for layer in result.layers)
    assert result.selection["objective"] == pytest.approx(total, rel=1e-9)
    assert result.selection["bound"] >= result.selection["objective"]
    assert known_level(replace(work, criterion=criterion), LEVEL, lambda _: None) == result
    assert ran(criterion=criterion)[1] == []


@pytest.mark.parametrize("granularity", ["tensor", "module"])
@pytest.mark.parametrize(
    "codes", [("bfloat16", "int8"), ("rank-1", "float32"), ("float32", "bfloat16", "int8", "rank-1")]
)
def test_what_is_judged_is_what_is_restored(work: Work, ran: Ran, granularity: str, codes: tuple[str, ...]) -> None:
    criterion = Criterion(value="l2", granularity=granularity, codes=codes)  # type: ignore[arg-type]
    result, _ = ran(criterion=criterion, budget=120)
    store = Store(work.store)
    assert result.digest is not None
    stored = store.get_state(result.digest)
    assert sum(t.numel() * t.element_size() for t in stored.values()) <= 4 * 120
    found = {name: code for name, code in codes_of(stored).items() if code != "float32"}
    assert found == result.codes
    assert set(found.values()) <= set(codes)
    assert found or "float32" in codes
    assert judged(work, result) == result.adaptor
    tensors = {
        name
        for layer in layers_of(build_model(work.network.name, 3))
        for name in layer.tensors
        if layer.name in result.layers
    }
    assert set(codes_of(stored)) == tensors


def test_a_change_of_low_rank_is_trained_as_such(work: Work, ran: Ran) -> None:
    result, _ = ran(criterion=Criterion(value="l2", codes=("rank-1",)), budget=140)
    store = Store(work.store)
    assert result.digest is not None
    base, stored = store.get_state(work.base), store.get_state(result.digest)
    change = decode(base, stored)["conv2.weight"] - base["conv2.weight"]
    assert change.norm() > 0.01
    assert torch.linalg.svdvals(change.reshape(8, 72).double())[1] < 1e-6
    full = LevelRun(replace(work, criterion=Criterion(codes=("rank-1",))), LEVEL, lambda _: None).full()
    moved = store.get_state(full["digest"])["conv2.weight"] - base["conv2.weight"]
    first = torch.linalg.svd(moved.reshape(8, 72)).Vh[0]
    right = stored["conv2.weight..right"][0]
    assert abs(float(first @ right / right.norm())) > 0.8, "it began in the direction of the full fine-tune's change"


def test_codes_and_gradients_are_measured_once_for_all_values_and_budgets(work: Work, ran: Ran) -> None:
    codes = ("float32", "bfloat16")
    _, first = ran(criterion=Criterion(value="sum-abs", codes=codes), seed=11)
    _, second = ran(criterion=Criterion(value="l2", codes=codes), seed=11)
    _, third = ran(criterion=Criterion(value="l2", codes=codes), seed=11, budget=200)
    assert "measure" in first
    assert not {"full", "measure"} & {*second, *third}


def test_sensing_leaves_only_what_a_budget_decides(work: Work, ran: Ran) -> None:
    criteria = (Criterion(), Criterion(value="fisher"))
    said = list[str]()
    sense_level(
        replace(work, seed=12), LEVEL, criteria, lambda e: said.append(e.stage) if e.kind == "finished" else None
    )
    assert said.count("full") == 1
    for criterion in criteria:
        computed = set(ran(criterion=criterion, seed=12)[1])
        assert "selection" in computed
        assert computed <= {"selection", "partial"}


def test_layers_chosen_after_fewer_epochs(work: Work, ran: Ran) -> None:
    whole, _ = ran()
    short, computed = ran(sensitivity_epochs=0.34)
    assert computed[:2] == ["full", "selection"]
    assert short.full is None
    assert short.adaptor is not None
    assert short.sensitivity != whole.sensitivity
    assert ran() == (whole, [])  # neither is mistaken for the other
    same, _ = ran(sensitivity_epochs=2.0)
    assert [row["mean_abs_change"] for row in same.sensitivity] == [r["mean_abs_change"] for r in whole.sensitivity]


def test_layers_chosen_by_the_gradient_at_the_base(work: Work, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """No full fine-tune: Δ is a step along -g, one pass over the images, which the values that need g and F share."""
    passes = list[Gradients]()

    def counted(*args: Any) -> Gradients:
        passes.append(gradients(*args))
        return passes[-1]

    monkeypatch.setattr(stages, "gradients", counted)
    result, computed = ran(sensitivity_epochs=0.0, criterion=Criterion(value="first-order"))
    assert computed[:3] == ["full", "measure", "selection"]
    (taken,) = passes
    assert result.full is None
    assert result.adaptor is not None
    assert result.layers
    rate = work.recipe.learning_rate
    layers = {layer.name: layer for layer in layers_of(build_model("tests.nets:small", tiny.CLASSES))}
    for row in result.sensitivity:
        g = torch.cat([taken.mean[name].reshape(-1).double() for name in layers[row["layer"]].tensors])
        assert row["mean_abs_change"] == pytest.approx(float(g.abs().mean()) * rate, rel=1e-3, abs=1e-8)
        assert row["first_order_change"] == pytest.approx(-float(g.square().sum()) * rate, rel=1e-3, abs=1e-8)


def test_the_papers_criterion_has_the_keys_it_always_had(work: Work) -> None:
    """Stores made before there was any other are still found."""

    class Data:
        train = val = SimpleNamespace(digest="data")

    run = LevelRun(replace(work, base="base", data=Data()), LEVEL, lambda _: None)  # type: ignore[arg-type]
    keys = {stage: run.key(stage, **more)[:16] for stage, more in (
        ("original", {}), ("full", {}), ("selection", {"budget": BUDGET}), ("partial", {"chosen": ("a", "b")})
    )}  # fmt: skip
    assert keys == KEYS
    run.work = replace(run.work, criterion=Criterion(codes=("int8",)))
    assert run.key("full")[:16] == KEYS["full"]  # what is fine-tuned does not depend on what is made of it


def test_a_store_is_what_it_was_made_with(work: Work, tmp_path: Path, ran: Ran) -> None:
    """Weights that a criterion needs are put there, and only then."""
    own = replace(work, store=str(tmp_path))
    own = replace(own, base=Store(own.store).put_state(Store(work.store).get_state(work.base)).digest)
    run = LevelRun(own, LEVEL, lambda _: None)
    assert not Store(own.store).has_blob(run.full()["digest"])
    coded = LevelRun(replace(own, criterion=Criterion(codes=("int8",))), LEVEL, lambda _: None)
    assert Store(own.store).has_blob(coded.full()["digest"])


def test_a_choice_that_nothing_fits_is_one_sentence(ran: Ran) -> None:
    with pytest.raises(
        UserError, match="40 bytes hold none of jpeg-10's choices by module as rank-1, float32: the smallest"
    ):
        ran(criterion=Criterion(value="l2", granularity="module", codes=("rank-1", "float32")), budget=10)
