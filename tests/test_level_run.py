"""The stages of one level without Ray: criteria, storage formats, fewer epochs, from one result to the next."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gearnn_ray.adaptors.adaptor import ComplementChangedError
from gearnn_ray.adaptors.bn_folding import fold, foldable
from gearnn_ray.adaptors.storage_formats import decode, formats_of
from gearnn_ray.cli import output
from gearnn_ray.config.recipe import PAPERS, Criterion, Recipe
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Event
from gearnn_ray.data.cache import ImageStatistics
from gearnn_ray.models.layers import alternatives_of, layers_of, same_bits
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline import level_run
from gearnn_ray.offline.base import NetworkFacts
from gearnn_ray.offline.importance import FOLDED, IMPORTANCE
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.level_run import LevelResult, LevelRun, cached, fine_tune_fully, measure_level, run_level
from gearnn_ray.offline.pipeline import Outcome
from gearnn_ray.offline.records import Execution, FullResult, StageResult
from gearnn_ray.offline.release import manifest_of, summary_row
from gearnn_ray.offline.stage_cache import NotCachedError, StageCache
from gearnn_ray.store.releases import Blob, Store
from gearnn_ray.training.gradients import Gradients, gradients
from tests import tiny
from tests.conftest import NORMALISATION, SEGMENTATION

LEVEL, BUDGET = "jpeg-10", 300


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("street")
    tiny.write_folder(folder / "data")
    tiny.write_weights(folder / "weights.safetensors")
    return tiny.job_spec(folder, recipe=Recipe(epochs=2, learning_rate=0.1, batch_size=4, crop=24), budget=BUDGET)


Ran = Callable[..., tuple[LevelResult, list[str]]]


@pytest.fixture
def ran(spec: JobSpec) -> Ran:
    """The level's result, and the stages that were computed for it."""

    def run(**changes: object) -> tuple[LevelResult, list[str]]:
        said: list[Event] = []
        result = run_level(replace(spec, **changes), LEVEL, said.append)  # type: ignore[arg-type]
        return result, [event.stage for event in said if event.kind == "finished"]

    return run


def score_from_store(spec: JobSpec, result: LevelResult) -> float:
    """mIoU of what anyone restores from the store."""
    store = Store(spec.store)
    assert result.digest is not None
    base = store.get_state(spec.base)
    return tiny.score_of(spec, {**base, **decode(base, store.get_state(result.digest))}, LEVEL)


@pytest.mark.parametrize("value", list(IMPORTANCE))
def test_every_value_chooses_within_the_budget_and_is_kept_under_its_own_key(spec: JobSpec, ran: Ran, value: str) -> None:
    criterion = Criterion(importance=value)  # type: ignore[arg-type]
    result, _ = ran(criterion=criterion)
    assert 0 < result.floats <= BUDGET
    assert result.storage_formats == {}
    rows = {row.layer: row for row in result.sensitivity}
    total = sum(IMPORTANCE[value](rows[layer].change) for layer in result.layers)
    assert result.selection.objective == pytest.approx(total, rel=1e-9)
    assert result.selection.bound >= result.selection.objective
    assert cached(run_level, replace(spec, criterion=criterion), LEVEL) == result
    assert ran(criterion=criterion)[1] == []


@pytest.mark.parametrize("granularity", ["tensor", "module"])
@pytest.mark.parametrize("storage_formats", [("bfloat16", "int8"), ("int8", "float32"), ("float32", "bfloat16", "int8")])
def test_what_is_judged_is_what_is_restored(spec: JobSpec, ran: Ran, granularity: str, storage_formats: tuple[str, ...]) -> None:
    criterion = Criterion(importance="l2", granularity=granularity, storage_formats=storage_formats)  # type: ignore[arg-type]
    result, _ = ran(criterion=criterion, budget=120)
    store = Store(spec.store)
    assert result.digest is not None
    stored = store.get_state(result.digest)
    assert sum(t.numel() * t.element_size() for t in stored.values()) <= 4 * 120
    found = {name: storage_format for name, storage_format in formats_of(stored).items() if storage_format != "float32"}
    assert found == result.storage_formats
    assert set(found.values()) <= set(storage_formats)
    assert found or "float32" in storage_formats
    assert score_from_store(spec, result) == result.adaptor
    whole = {layer for layer, storage_format in result.selection.storage_formats.items() if storage_format == FOLDED}
    tensors = {
        name
        for layer in layers_of(build_model(spec.network.name, 3))
        for name in layer.tensors
        if layer.name in set(result.layers) - whole
    }
    assert set(formats_of(stored)) == tensors
    statistics = {name for name in result.layers if name.endswith(".running_stats")}
    assert whole == (statistics if granularity == "module" else set())


def test_codes_and_gradients_are_measured_once_for_all_values_and_budgets(spec: JobSpec, ran: Ran) -> None:
    storage_formats = ("float32", "bfloat16")
    _, first = ran(criterion=Criterion(importance="sum-abs", storage_formats=storage_formats), seed=11)
    _, second = ran(criterion=Criterion(importance="l2", storage_formats=storage_formats), seed=11)
    _, third = ran(criterion=Criterion(importance="l2", storage_formats=storage_formats), seed=11, budget=200)
    assert "measure" in first
    assert not {"full", "measure"} & {*second, *third}


def test_sensing_leaves_only_what_a_budget_decides(spec: JobSpec, ran: Ran) -> None:
    criteria = (Criterion(), Criterion(importance="fisher"))
    said = list[str]()
    measure_level(replace(spec, seed=12), LEVEL, lambda e: said.append(e.stage) if e.kind == "finished" else None, criteria)
    assert said.count("full") == 1
    for criterion in criteria:
        computed = set(ran(criterion=criterion, seed=12)[1])
        assert "selection" in computed
        assert computed <= {"selection", "partial"}


def test_layers_chosen_after_fewer_epochs(spec: JobSpec, ran: Ran) -> None:
    whole, _ = ran()
    short, computed = ran(sensitivity_epochs=0.34)
    assert computed[:2] == ["full", "selection"]
    assert short.full is None
    assert short.adaptor is not None
    assert short.sensitivity != whole.sensitivity
    assert ran() == (whole, [])  # neither is mistaken for the other
    same, _ = ran(sensitivity_epochs=2.0)
    assert [row.mean_abs_change for row in same.sensitivity] == [r.mean_abs_change for r in whole.sensitivity]


def test_the_share_of_changed_weights_is_said_of_whole_fine_tunes_alone(
    spec: JobSpec, ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    """A short run has not moved them as far: its share is not the paper's."""
    config, seen = SplitConfig(levels=(LEVEL,), store=spec.store), ImageStatistics(32, 40, 100.0, 0.2)

    def said(result: LevelResult) -> tuple[Any, str]:
        images = dict.fromkeys(("clean", LEVEL), seen)
        manifest = manifest_of(config, spec, Blob(digest=spec.base, bytes=0), NetworkFacts(895, 3), images, (result,))
        row = summary_row(result, spec, 895)
        output.show_split(config, Outcome("sha256:" + "0" * 64, (result,), {}, (row,)), json_lines=False)
        return manifest.levels[LEVEL].share_above_2e_4, capsys.readouterr().out

    whole, _ = ran()
    by_layer, by_weight = whole.share_changed
    share, text = said(whole)
    assert share is not None
    assert (share.by_layer, share.by_weight) == (by_layer, by_weight)
    assert f"changed {100 * by_weight:.1f} to {by_weight:.1%} of the weights by more than 2e-4.\n" in text
    assert f"exceeds 2e-4 hold {100 * by_layer:.1f} to {by_layer:.1%} of the weights." in text
    for epochs in (0.34, 0.0):
        share, text = said(ran(sensitivity_epochs=epochs)[0])
        assert share is None
        assert "2e-4" not in text


def test_layers_chosen_by_the_gradient_at_the_base(spec: JobSpec, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """No full fine-tune: Δ is a step along -g, one pass over the images, which the values that need g and F share."""
    passes = list[Gradients]()

    def counted(*args: Any) -> Gradients:
        passes.append(gradients(*args))
        return passes[-1]

    monkeypatch.setattr(level_run, "gradients", counted)
    result, computed = ran(sensitivity_epochs=0.0, criterion=Criterion(importance="first-order"))
    assert computed[:3] == ["full", "measure", "selection"]
    (taken,) = passes
    assert result.full is None
    assert result.adaptor is not None
    assert result.layers
    rate = spec.recipe.learning_rate
    layers = {layer.name: layer for layer in layers_of(build_model("tests.nets:small", tiny.CLASSES))}
    for row in result.sensitivity:
        g = torch.cat([taken.mean[name].reshape(-1).double() for name in layers[row.layer].tensors])
        assert row.mean_abs_change == pytest.approx(float(g.abs().mean()) * rate, rel=1e-3, abs=1e-8)
        assert row.first_order_change == pytest.approx(-float(g.square().sum()) * rate, rel=1e-3, abs=1e-8)


def keys_of(spec: JobSpec, criterion: Criterion) -> dict[str, str]:
    """Keys of what is computed after the full fine-tune, by stage; of the undistorted level by "clean" and stage."""
    seen = dict[str, str]()

    class Data:
        train = val = SimpleNamespace(digest="data")
        labelled = True

    def result(self: StageCache, kind: type[StageResult], key: str, *_: Any, **__: Any) -> Any:
        seen[kind.stage if self.level == LEVEL else f"{self.level} {kind.stage}"] = key[:16]
        return SimpleNamespace(digest="control", selection=None)

    own = replace(spec, base="base", data=Data(), criterion=criterion)  # type: ignore[arg-type]
    run, full = LevelRun(own, LEVEL, lambda _: None), FullResult("full", 0, None, 0.0, ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageCache, "result", result)
        run.measured(full)
        run.selection(full, BUDGET)
    return seen


EXECUTIONS = [Execution("cuda", "float32", 1), Execution("cpu", "bfloat16", 1), Execution("cpu", "float32", 2)]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_how_the_base_is_computed_is_in_the_key_of_its_scores(spec: JobSpec, execution: Execution) -> None:
    assert spec.key("original", level=LEVEL) != replace(spec, execution=execution).key("original", level=LEVEL)


@pytest.mark.parametrize("change", [*({"execution": each} for each in EXECUTIONS), {"seed": 5}, {"world_size": 2}])
def test_what_decides_the_bits_is_in_every_key(spec: JobSpec, change: dict[str, Any]) -> None:
    """Threads, precision, device, seed and workers give other digests: results of one are not taken for another's."""
    before, after = (keys_of(s, Criterion(against="clean")) for s in (spec, replace(spec, **change)))
    assert before.keys() == after.keys() == {"clean full", "measure", "selection"}
    assert not set(before.values()) & set(after.values())


def test_what_is_measured_otherwise_is_kept_under_other_keys(spec: JobSpec) -> None:
    """The control is the undistorted level's full fine-tune, the same stage for all who need one."""
    found = [
        keys_of(spec, Criterion(granularity=granularity, against=against))  # type: ignore[arg-type]
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


# ── normalisations chosen whole ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """States as they were folded, before and after."""
    seen = []

    def seeing(normalisations: Any, base: Any, state: Any) -> dict[str, Tensor]:
        seen.append((dict(state), fold(normalisations, base, state)))
        return seen[-1][1]

    monkeypatch.setattr(level_run, "fold", seeing)
    return seen


Folds = list[tuple[dict[str, Tensor], dict[str, Tensor]]]


@pytest.mark.parametrize("storage_formats", [("float32",), ("float32", "int8"), ("int8",)])
def test_a_normalisation_chosen_whole_holds_no_statistics(
    spec: JobSpec, ran: Ran, folds: Folds, storage_formats: tuple[str, ...]
) -> None:
    model = build_model(spec.network.name, tiny.CLASSES)
    layers = {layer.name: layer for layer in layers_of(model)}
    result, _ = ran(criterion=Criterion(granularity="module", storage_formats=storage_formats), budget=30, seed=21)
    store = Store(spec.store)
    base, stored = store.get_state(spec.base), store.get_state(result.digest or "?")
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
    if storage_formats == ("float32",):
        assert result.floats == sum(t.numel() for t in stored.values()) == result.selection.used
    folded = {
        name: storage_format for name, storage_format in result.selection.storage_formats.items() if storage_format == FOLDED
    }
    assert folded == dict.fromkeys((f"{norm}.running_stats" for norm in norms), FOLDED)
    assert FOLDED not in result.storage_formats.values()
    assert set(result.storage_formats) <= set(held)

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
    assert far < (1e-5 if storage_formats == ("float32",) else 0.05) * size
    assert float((outputs[2] - outputs[0]).abs().max()) > 10 * far, "statistics alone would not have been left out"
    assert result.adaptor == score_from_store(spec, result)


def test_statistics_that_are_not_the_bases_are_never_left_out(spec: JobSpec, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = Criterion(granularity="module")
    measure_level(replace(spec, seed=22), LEVEL, lambda _: None, (criterion,))
    monkeypatch.setattr(level_run, "fold", lambda normalisations, base, state: dict(state))
    with pytest.raises(ComplementChangedError, match=r"bn\d.running_\w+ lies outside"):
        ran(criterion=criterion, seed=22, budget=30)


def test_layers_by_themselves_are_not_folded(ran: Ran, folds: Folds) -> None:
    result, _ = ran(criterion=Criterion(storage_formats=("float32", "bfloat16"), importance="l2"), seed=23)
    assert folds == []
    assert result.compared == result.sensitivity
    assert not set(result.selection.storage_formats.values()) - {"bfloat16"}


# ── what changes are measured against ────────────────────────────────────────────────────────────────────────────


def states_of(spec: JobSpec) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The base, and the full fine-tunes of the level and of the undistorted images, from the store."""
    store = Store(spec.store)
    fulls = (fine_tune_fully(spec, level, lambda _: None, only_cached=True) for level in (LEVEL, "clean"))
    full, control = (store.get_state(each.digest) for each in fulls)
    return store.get_state(spec.base), full, control


@pytest.mark.parametrize("epochs", [None, 0.125, 0.0])
@pytest.mark.parametrize(
    ("granularity", "value"),
    [
        ("tensor", "mean-abs"), ("module", "mean-abs"), ("tensor", "relative"),
        ("module", "relative"), ("tensor", "first-order"), ("module", "fisher"),
    ],
)  # fmt: skip
def test_values_against_the_control_are_those_of_the_three_states(
    spec: JobSpec, ran: Ran, granularity: str, value: str, epochs: float | None
) -> None:
    criterion = Criterion(importance=value, granularity=granularity, against="clean")  # type: ignore[arg-type]
    own = replace(spec, criterion=criterion, sensitivity_epochs=epochs, keep_full=True)
    result, _ = ran(criterion=criterion, sensitivity_epochs=epochs, keep_full=True)
    base, full, control = states_of(own)
    model = build_model(spec.network.name, tiny.CLASSES)
    # Eq. (1), and what the tables say of it, is of the base
    plain = {row.layer: row.mean_abs_change for row in result.sensitivity}
    for layer in layers_of(model):
        moved = torch.cat([(full[n].double() - base[n].double()).reshape(-1) for n in layer.tensors])
        assert plain[layer.name] == pytest.approx(float(moved.abs().mean()), rel=1e-9)

    if granularity == "module":
        full, control = (fold(foldable(model).values(), base, state) for state in (full, control))
    model.load_state_dict(base)
    taken = gradients(SEGMENTATION, model, *spec.training_data(LEVEL), NORMALISATION, "float32", spec.recipe.crop, spec.seed)
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
    assert result.selection.objective == pytest.approx(total, rel=1e-6)


def test_a_layer_that_training_moves_anyhow_is_worth_nothing(spec: JobSpec) -> None:
    """At a brightness of 1 images are the undistorted ones: what moved there is no matter of the level."""
    level = "brightness-1.0"
    against = replace(spec, criterion=Criterion(against="clean", granularity="module"), keep_full=True)
    assert run_level(replace(against, criterion=PAPERS), level, lambda _: None).layers, "it moved"
    run = LevelRun(against, level, lambda _: None)
    measured = run.measured(run.full())
    assert {row.mean_abs_change for row in measured.compared} == {0.0}
    assert all(row.mean_abs_change > 0 for row in measured.sensitivity if row.layer != "up.weight")
    with pytest.raises(UserError, match=r"no layer of brightness-1\.0 has a positive value"):
        run_level(against, level, lambda _: None)


def test_the_control_is_made_once_and_looked_for_before_anything(spec: JobSpec) -> None:
    own = replace(spec, seed=31, criterion=Criterion(against="clean", granularity="module"))
    said: list[tuple[str, str]] = []

    def emit(event: Event) -> None:
        if event.kind == "finished":
            said.append((event.level, event.stage))

    # all there but the control
    measure_level(replace(own, keep_full=True, criterion=PAPERS), LEVEL, emit, (PAPERS,))
    known = partial(measure_level, own, LEVEL, lambda _: None, only_cached=True)
    assert known(criteria=(PAPERS,))
    with pytest.raises(NotCachedError):
        known(criteria=(own.criterion,))
    with pytest.raises(NotCachedError):
        fine_tune_fully(own, "clean", emit, only_cached=True)
    assert cached(run_level, own, LEVEL, emit=emit) is None
    del said[:]
    first = run_level(own, LEVEL, emit)
    assert said == [("clean", "full"), (LEVEL, "measure"), (LEVEL, "selection"), (LEVEL, "partial")]
    assert known(criteria=(own.criterion,))
    del said[:]
    run_level(own, "jpeg-20", emit)
    assert ("clean", "full") not in said
    del said[:]
    # another budget and another value need no other
    other = replace(own, budget=100, criterion=own.criterion.model_copy(update={"importance": "l2"}))
    run_level(other, LEVEL, emit)
    assert {stage for _, stage in said} <= {"selection", "partial"}
    assert cached(run_level, own, LEVEL, emit=emit) == first
    # of another seed, recipe or shorter look it is another, as the level's own is
    digest = fine_tune_fully(own, "clean", emit).digest
    recipe = spec.recipe.model_copy(update={"learning_rate": 0.05})
    for changes in ({"seed": 32}, {"recipe": recipe}, {"sensitivity_epochs": 0.34}):
        assert fine_tune_fully(replace(own, **changes), "clean", emit).digest != digest  # type: ignore[arg-type]


def test_without_a_full_fine_tune_the_control_is_a_step_too(spec: JobSpec, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step along the level's gradient, against one along that of the undistorted images."""
    passes = list[Gradients]()

    def counted(*args: Any) -> Gradients:
        passes.append(gradients(*args))
        return passes[-1]

    monkeypatch.setattr(level_run, "gradients", counted)
    result, computed = ran(sensitivity_epochs=0.0, criterion=Criterion(against="clean"), seed=33)
    assert computed[:4] == ["full", "full", "measure", "selection"]
    level, clean = passes
    rate = spec.recipe.learning_rate
    layers = {layer.name: layer for layer in layers_of(build_model("tests.nets:small", tiny.CLASSES))}
    for row in result.compared:
        g = torch.cat([(level.mean[n] - clean.mean[n]).reshape(-1).double() for n in layers[row.layer].tensors])
        assert row.mean_abs_change == pytest.approx(float(g.abs().mean()) * rate, rel=1e-2, abs=1e-8)


def test_a_store_is_what_it_was_made_with(spec: JobSpec, tmp_path: Path, ran: Ran) -> None:
    """Weights that a criterion needs are put there, and only then."""
    own = replace(spec, store=str(tmp_path))
    own = replace(own, base=Store(own.store).put_state(Store(spec.store).get_state(spec.base)).digest)
    run = LevelRun(own, LEVEL, lambda _: None)
    assert not Store(own.store).is_intact(run.full().digest)
    with_formats = LevelRun(replace(own, criterion=Criterion(storage_formats=("int8",))), LEVEL, lambda _: None)
    assert Store(own.store).is_intact(with_formats.full().digest)


def test_a_choice_that_nothing_fits_is_one_sentence(ran: Ran) -> None:
    with pytest.raises(
        UserError, match="a budget of 4 bytes is too small for jpeg-10: the smallest option by module as int8, float32 takes"
    ):
        ran(criterion=Criterion(importance="l2", granularity="module", storage_formats=("int8", "float32")), budget=1)
