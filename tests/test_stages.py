"""The stages of one level without Ray: criteria, codes, low ranks and a shorter look, from one record to the next."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gearnn_ray import cli
from gearnn_ray.adaptors import ComplementChangedError, put_adaptor
from gearnn_ray.codes import codes_of, decode
from gearnn_ray.config import SplitConfig
from gearnn_ray.data import open_dataset
from gearnn_ray.errors import UserError
from gearnn_ray.folding import fold, foldable
from gearnn_ray.layers import alternatives_of, layers_of, same_bits
from gearnn_ray.models import build_model
from gearnn_ray.offline import stages
from gearnn_ray.offline.base import NetworkFacts, publish_given_base
from gearnn_ray.offline.events import Event
from gearnn_ray.offline.finetune import evaluate
from gearnn_ray.offline.gradients import Gradients, gradients
from gearnn_ray.offline.pipeline import Outcome
from gearnn_ray.offline.recipe import PAPERS, Criterion, Recipe
from gearnn_ray.offline.release import manifest_of, summary_row
from gearnn_ray.offline.sensitivity import Sensitivity
from gearnn_ray.offline.stages import (
    LevelResult,
    LevelRun,
    NotYetError,
    fine_tune_fully,
    known_level,
    run_level,
    sense_level,
)
from gearnn_ray.offline.values import FOLDED, VALUES
from gearnn_ray.offline.work import ImageStatistics, Network, Work, training_data, validation_data
from gearnn_ray.store import Blob, Store
from tests import tiny
from tests.conftest import NORMALISATION

LEVEL, BUDGET = "jpeg-10", 300
KEYS = {
    "original": "01ce2b518da3060f", "full": "b6560b9f047b56ab", "selection": "5cc9b017de8e09f2", "partial": "d006eae4a78a955f",
}  # fmt: skip
OLDER = [  # criteria, and the keys that they had when they were all there were
    (PAPERS, {"selection": KEYS["selection"]}),
    (Criterion(value="l2"), {"selection": "478fc65670c045a7"}),
    (Criterion(value="fisher"), {"measure": "c9de4df63ba9ae57", "selection": "a949eab325d0f3aa"}),
    (Criterion(codes=("int8",)), {"measure": "2f7a4ef7d1602bc9", "selection": "282bfa1fbaffa67c"}),
]


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
@pytest.mark.parametrize("codes", [("bfloat16", "int8"), ("int8", "float32"), ("float32", "bfloat16", "int8")])
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
    whole = {layer for layer, code in result.selection["codes"].items() if code == FOLDED}
    tensors = {
        name
        for layer in layers_of(build_model(work.network.name, 3))
        for name in layer.tensors
        if layer.name in set(result.layers) - whole
    }
    assert set(codes_of(stored)) == tensors
    statistics = {name for name in result.layers if name.endswith(".running_stats")}
    assert whole == (statistics if granularity == "module" else set())


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


def test_the_share_of_changed_weights_is_said_of_whole_fine_tunes_alone(
    work: Work, ran: Ran, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short run has not moved them as far: its share is not the paper's."""
    monkeypatch.setattr(cli, "_pictures", lambda *_: {})
    config, seen = SplitConfig(levels=(LEVEL,), store=work.store), ImageStatistics(32, 40, 100.0, 0.2)

    def said(result: LevelResult) -> tuple[Any, str]:
        images = dict.fromkeys(("clean", LEVEL), seen)
        manifest = manifest_of(config, work, Blob(work.base, 0), NetworkFacts(895, 3), images, (result,))
        row = summary_row(result, work.budget, 895)
        cli._show(config, Outcome("sha256:" + "0" * 64, (result,), {}, (row,)), json_lines=False)
        return manifest["levels"][LEVEL].get("share_above_2e_4"), capsys.readouterr().out

    whole, _ = ran()
    by_layer, by_weight = whole.share_changed
    share, text = said(whole)
    assert share == {"by_layer": by_layer, "by_weight": by_weight}
    assert f"moved {by_weight:.1%} to {by_weight:.1%} of the weights by more than 2e-4;\n{by_layer:.1%}" in text
    for epochs in (0.34, 0.0):
        share, text = said(ran(sensitivity_epochs=epochs)[0])
        assert share is None
        assert "2e-4" not in text


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


def keys_of(work: Work, criterion: Criterion) -> dict[str, str]:
    """Of what is computed after the full fine-tune, by stage."""
    seen = dict[str, str]()

    class Data:
        train = val = SimpleNamespace(digest="data")

    def stage(self: LevelRun, name: str, key: str, *_: Any) -> dict[str, Any]:
        seen[name if self.level == LEVEL else f"{self.level} {name}"] = key[:16]
        return {"digest": "control"}

    own = replace(work, base="base", data=Data(), criterion=criterion)  # type: ignore[arg-type]
    run, full = LevelRun(own, LEVEL, lambda _: None), {"digest": "full", "sensitivity": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LevelRun, "stage", stage)
        run.measured(full)
        run.selection(full, BUDGET)
    return seen


@pytest.mark.parametrize(("criterion", "keys"), OLDER)
def test_older_criteria_have_the_keys_they_always_had(work: Work, criterion: Criterion, keys: dict[str, str]) -> None:
    assert keys_of(work, criterion) == keys
    assert list(criterion.inputs()) == ["value", "granularity", "codes"]


def test_what_is_measured_otherwise_is_kept_under_other_keys(work: Work) -> None:
    """The control is the undistorted level's full fine-tune, the same stage for all who need one."""
    found = [
        keys_of(work, Criterion(granularity=granularity, against=against))  # type: ignore[arg-type]
        for granularity in ("tensor", "module")
        for against in ("base", "clean")
    ]
    assert [set(keys) for keys in found] == [
        {"selection"}, {"clean full", "measure", "selection"}, {"measure", "selection"},
        {"clean full", "measure", "selection"},
    ]  # fmt: skip
    for stage in ("measure", "selection"):
        different = [keys[stage] for keys in found if stage in keys]
        assert len(set(different)) == len(different)
    assert found[1]["clean full"] == found[3]["clean full"]
    assert Criterion(against="clean").inputs()["against"] == "clean"


def test_a_selection_from_before_modules_were_folded_is_no_selection_of_now(work: Work) -> None:
    before = {("float32",): "0642c0c8c37f8701", ("int8", "float32"): "cd85a2905f909dc7"}
    for codes, key in before.items():
        assert keys_of(work, Criterion(granularity="module", codes=codes))["selection"] != key


# ── normalisations chosen whole ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """States as they were folded, before and after."""
    seen = []

    def seeing(normalisations: Any, base: Any, state: Any) -> dict[str, Tensor]:
        seen.append((dict(state), fold(normalisations, base, state)))
        return seen[-1][1]

    monkeypatch.setattr(stages, "fold", seeing)
    return seen


Folds = list[tuple[dict[str, Tensor], dict[str, Tensor]]]


@pytest.mark.parametrize("codes", [("float32",), ("float32", "int8"), ("int8",)])
def test_a_normalisation_chosen_whole_holds_no_statistics(
    work: Work, ran: Ran, folds: Folds, codes: tuple[str, ...]
) -> None:
    model = build_model(work.network.name, tiny.CLASSES)
    layers = {layer.name: layer for layer in layers_of(model)}
    result, _ = ran(criterion=Criterion(granularity="module", codes=codes), budget=30, seed=21)
    store = Store(work.store)
    base, stored = store.get_state(work.base), store.get_state(result.digest or "?")
    adaptor = decode(base, stored)

    # normalisations fit alone, and their statistics are chosen with them
    chosen = [name for name in result.layers if name.startswith("bn")]
    norms = {name.partition(".")[0] for name in chosen}
    assert set(chosen) == {f"{norm}.{leaf}" for norm in norms for leaf in ("weight", "bias", "running_stats")}
    assert norms
    held = [name for name in result.layers if not name.endswith(".running_stats")]
    assert set(adaptor) == set(held)
    assert result.floats == sum(layers[name].numel for name in held)
    assert sum(layers[name].numel for name in chosen) == 2 * sum(layers[n].numel for n in chosen if n in held)
    if codes == ("float32",):
        assert result.floats == sum(t.numel() for t in stored.values()) == result.selection["used"]
    folded = {name: code for name, code in result.selection["codes"].items() if code == FOLDED}
    assert folded == dict.fromkeys((f"{norm}.running_stats" for norm in norms), FOLDED)
    assert FOLDED not in result.codes.values()
    assert set(result.codes) <= set(held)

    # it was trained with statistics of its own: they moved, and nothing that was not chosen did
    trained, whole = folds[-1]
    inside = {tensor for name in result.layers for tensor in layers[name].tensors}
    assert {name for name in base if not same_bits(trained[name], base[name])} == inside
    assert {name for name in base if not same_bits(whole[name], base[name])} == set(held)
    # what is restored is the network that was trained, to rounding; what is judged is what is restored
    x = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    outputs = []
    for state in (trained, {**base, **adaptor}, {**trained, **{n: base[n] for n in inside if "running" in n}}):
        model.load_state_dict(state)
        with torch.no_grad():
            outputs.append(model.eval()(x))
    size = float(outputs[0].abs().max())
    far = float((outputs[1] - outputs[0]).abs().max())
    assert far < (1e-5 if codes == ("float32",) else 0.05) * size
    assert float((outputs[2] - outputs[0]).abs().max()) > 10 * far, "statistics alone would not have been left out"
    assert result.adaptor == judged(work, result)


def test_statistics_that_are_not_the_bases_are_never_left_out(
    work: Work, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion = Criterion(granularity="module")
    sense_level(replace(work, seed=22), LEVEL, (criterion,), lambda _: None)
    monkeypatch.setattr(stages, "fold", lambda normalisations, base, state: dict(state))
    with pytest.raises(ComplementChangedError, match=r"bn\d.running_\w+ lies outside"):
        ran(criterion=criterion, seed=22, budget=30)


def test_layers_by_themselves_are_not_folded(ran: Ran, folds: Folds) -> None:
    result, _ = ran(criterion=Criterion(codes=("float32", "bfloat16"), value="l2"), seed=23)
    assert folds == []
    assert result.judged == result.sensitivity
    assert not set(result.selection["codes"].values()) - {"bfloat16"}


# ── what changes are measured against ────────────────────────────────────────────────────────────────────────────


def states_of(work: Work) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The base, and the full fine-tunes of the level and of the undistorted images, from the store."""
    store = Store(work.store)
    fulls = (fine_tune_fully(work, level, lambda _: None, only_look=True) for level in (LEVEL, "clean"))
    full, control = (store.get_state(each["digest"]) for each in fulls)
    return store.get_state(work.base), full, control


@pytest.mark.parametrize("epochs", [None, 0.125, 0.0])
@pytest.mark.parametrize(
    ("granularity", "value"),
    [
        ("tensor", "mean-abs"), ("module", "mean-abs"), ("tensor", "relative"),
        ("module", "relative"), ("tensor", "first-order"), ("module", "fisher"),
    ],
)  # fmt: skip
def test_values_against_the_control_are_those_of_the_three_states(
    work: Work, ran: Ran, granularity: str, value: str, epochs: float | None
) -> None:
    criterion = Criterion(value=value, granularity=granularity, against="clean")  # type: ignore[arg-type]
    own = replace(work, criterion=criterion, sensitivity_epochs=epochs, keep_full=True)
    result, _ = ran(criterion=criterion, sensitivity_epochs=epochs, keep_full=True)
    base, full, control = states_of(own)
    model = build_model(work.network.name, tiny.CLASSES)
    # Eq. (1), and what the tables say of it, is of the base
    plain = {row["layer"]: row["mean_abs_change"] for row in result.sensitivity}
    for layer in layers_of(model):
        moved = torch.cat([(full[n].double() - base[n].double()).reshape(-1) for n in layer.tensors])
        assert plain[layer.name] == pytest.approx(float(moved.abs().mean()), rel=1e-9)

    if granularity == "module":
        full, control = (fold(foldable(model).values(), base, state) for state in (full, control))
    model.load_state_dict(base)
    taken = gradients(model, *training_data(work, LEVEL), NORMALISATION, work.recipe.crop, work.seed, "float32")
    picked = set(result.layers)
    best = total = 0.0
    for group in alternatives_of(model, granularity):  # type: ignore[arg-type]
        worths = {}
        for names in group:
            tensors = [
                tensor
                for layer in layers_of(model)
                for tensor in layer.tensors
                if layer.name in names and (granularity == "tensor" or "running" not in tensor)
            ]
            delta, p, g, f = (
                torch.cat([state[name].double().reshape(-1) for name in tensors])
                for state in ({n: full[n].double() - control[n].double() for n in full}, base, taken.mean, taken.square)
            )
            worths[frozenset(names)] = {
                "mean-abs": delta.abs().mean(), "relative": delta.norm() / p.norm(),
                "first-order": (g * delta).sum().abs(), "fisher": (f * delta.square()).sum(),
            }[value].item()  # fmt: skip
        best = max(best, *worths.values())
        total += max((worth for names, worth in worths.items() if names <= picked), default=0.0)
    assert best > 0
    assert result.selection["objective"] == pytest.approx(total, rel=1e-6)


def test_a_layer_that_training_moves_anyhow_is_worth_nothing(work: Work) -> None:
    """At a brightness of 1 images are the undistorted ones: what moved there is no matter of the level."""
    level = "brightness-1.0"
    against = replace(work, criterion=Criterion(against="clean", granularity="module"), keep_full=True)
    assert run_level(replace(against, criterion=PAPERS), level, lambda _: None).layers, "it moved"
    (measured,) = sense_level(against, level, (against.criterion,), lambda _: None)
    assert {row["mean_abs_change"] for row in measured["judged"]} == {0.0}
    assert all(row["mean_abs_change"] > 0 for row in measured["sensitivity"] if row["layer"] != "up.weight")
    with pytest.raises(UserError, match="no layer is worth anything"):
        run_level(against, level, lambda _: None)


def test_the_control_is_made_once_and_looked_for_before_anything(work: Work) -> None:
    own = replace(work, seed=31, criterion=Criterion(against="clean", granularity="module"))
    said: list[tuple[str, str]] = []

    def say(event: Event) -> None:
        if event.kind == "finished":
            said.append((event.level, event.stage))

    # all there but the control
    sense_level(replace(own, keep_full=True, criterion=PAPERS), LEVEL, (PAPERS,), say)
    known = partial(sense_level, own, LEVEL, say=lambda _: None, only_look=True)
    assert known((PAPERS,))
    with pytest.raises(NotYetError):
        known((own.criterion,))
    with pytest.raises(NotYetError):
        fine_tune_fully(own, "clean", say, only_look=True)
    assert known_level(own, LEVEL, say) is None
    del said[:]
    first = run_level(own, LEVEL, say)
    assert said == [("clean", "full"), (LEVEL, "measure"), (LEVEL, "selection"), (LEVEL, "partial")]
    assert known((own.criterion,))
    del said[:]
    run_level(own, "jpeg-20", say)
    assert ("clean", "full") not in said
    del said[:]
    # another budget and another value need no other
    other = replace(own, budget=100, criterion=own.criterion.model_copy(update={"value": "l2"}))
    run_level(other, LEVEL, say)
    assert {stage for _, stage in said} <= {"selection", "partial"}
    assert known_level(own, LEVEL, say) == first
    # of another seed, recipe or shorter look it is another, as the level's own is
    digest = fine_tune_fully(own, "clean", say)["digest"]
    recipe = work.recipe.model_copy(update={"learning_rate": 0.05})
    for changes in ({"seed": 32}, {"recipe": recipe}, {"sensitivity_epochs": 0.34}):
        assert fine_tune_fully(replace(own, **changes), "clean", say)["digest"] != digest  # type: ignore[arg-type]


def test_without_a_full_fine_tune_the_control_is_a_step_too(
    work: Work, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step along the level's gradient, against one along that of the undistorted images."""
    passes = list[Gradients]()

    def counted(*args: Any) -> Gradients:
        passes.append(gradients(*args))
        return passes[-1]

    monkeypatch.setattr(stages, "gradients", counted)
    result, computed = ran(sensitivity_epochs=0.0, criterion=Criterion(against="clean"), seed=33)
    assert computed[:4] == ["full", "full", "measure", "selection"]
    level, clean = passes
    rate = work.recipe.learning_rate
    layers = {layer.name: layer for layer in layers_of(build_model("tests.nets:small", tiny.CLASSES))}
    for row in result.judged:
        g = torch.cat([(level.mean[n] - clean.mean[n]).reshape(-1).double() for n in layers[row["layer"]].tensors])
        assert row["mean_abs_change"] == pytest.approx(float(g.abs().mean()) * rate, rel=1e-2, abs=1e-8)


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
        UserError, match="4 bytes hold none of jpeg-10's choices by module as int8, float32: the smallest"
    ):
        ran(criterion=Criterion(value="l2", granularity="module", codes=("int8", "float32")), budget=1)
