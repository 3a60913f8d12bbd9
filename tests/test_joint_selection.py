"""Levels chosen together: the problems against every choice there is, and their releases from a real Ray."""

import itertools
import math
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gearnn_ray import Store
from gearnn_ray.adaptors.storage_formats import decode, formats_of
from gearnn_ray.cli.main import run_evaluate, run_split, run_sweep
from gearnn_ray.config.recipe import Coupling, Criterion, Recipe
from gearnn_ray.config.schema import EvaluateConfig, SplitConfig
from gearnn_ray.core.errors import TrainingFailedError, UserError
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.evaluation import findings
from gearnn_ray.evaluation.findings import Cell, Found, Plan, publish
from gearnn_ray.evaluation.pipeline import _budget_of_each
from gearnn_ray.evaluation.runs import Judged, Weights, released_main
from gearnn_ray.models.layers import Alternatives
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline import level_run, pipeline
from gearnn_ray.offline.base import publish_given_base
from gearnn_ray.offline.importance import FOLDED, VALUES
from gearnn_ray.offline.job_spec import JobSpec, Network, validation_data
from gearnn_ray.offline.joint_selection import Measured, _shares, in_turn, joint_selection
from gearnn_ray.offline.level_run import (
    LevelResult,
    adapt_together,
    known,
    run_level,
    select_jointly,
    sense_own,
)
from gearnn_ray.offline.release import _config_to_keep
from gearnn_ray.offline.selection import few_adaptors, few_layers, select
from gearnn_ray.offline.sensitivity import Change, Sensitivity, StoredVariant
from gearnn_ray.training.trainer import evaluate
from tests import tiny
from tests.conftest import NORMALISATION
from tests.nets import Small

LAYERS = ("conv", "norm", "head")
TENSORS: Alternatives = tuple(((name,),) for name in LAYERS)
MODULES: Alternatives = ((("norm",), ("conv", "norm")), (("head",),))
LEVELS = ("jpeg-10", "jpeg-20", "brightness-0.4")
PLAIN, CODED = ("float32",), ("float32", "int8")


def measured(seed: int, storage_formats: tuple[str, ...] = PLAIN) -> dict[str, Measured]:
    """Levels of three layers that moved, and what int8 would lose of each."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, len(LAYERS))
    levels = {}
    for level in LEVELS[: 2 if len(storage_formats) > 1 else 3]:
        rows, stored_variants = [], []
        for index, name in enumerate(LAYERS):
            n, moved = int(sizes[index]), float(rng.choice([0.0, 1.0, 2.0, 3.0])) * float(rng.uniform(0.5, 1))
            rows.append(Sensitivity(name, "conv_weight", index, n, moved, moved, moved * math.sqrt(n), 1.0, 0.0))
            if "int8" in storage_formats:
                lost = moved * float(rng.uniform(0, 0.9))
                stored_variants.append(
                    StoredVariant(name, "int8", n + 4, Change(n, lost * n, lost**2 * n, 1.0, None, None))
                )
        levels[level] = Measured(rows, stored_variants)
    return levels


def ways(alternatives: Alternatives, storage_formats: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Every choice of layers with codes that a level has."""
    groups = [
        [
            {},
            *(
                dict(zip(names, each, strict=True))
                for names in group
                for each in itertools.product(storage_formats, repeat=len(names))
            ),
        ]
        for group in alternatives
    ]
    for picked in itertools.product(*groups):
        yield {layer: storage_format for each in picked for layer, storage_format in each.items()}


def worth(level: Measured, chosen: Mapping[str, str], alternatives: Alternatives, value: str) -> tuple[float, int]:
    """Value and bytes of a level's choice, group by group, from what the documentation says of both."""
    rows, stored_variants = {r.layer: r for r in level.rows}, {c.layer: c for c in level.stored_variants}
    total, size = 0.0, 0
    for group in alternatives:
        names = max((n for n in group if set(n) <= chosen.keys()), key=len, default=())
        if not names:
            continue
        change = math.fsum(rows[n].change.sum_abs for n in names)
        lost = math.fsum(stored_variants[n].error.sum_abs for n in names if chosen[n] == "int8")
        count = sum(rows[n].numel for n in names) if value == "mean-abs" else 1
        total += max(0.0, change / count - lost / count)
        size += sum(stored_variants[n].bytes if chosen[n] == "int8" else 4 * rows[n].numel for n in names)
    return total, size


def picked(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    return {
        level: {layer: s["storage_formats"].get(layer, "float32") for layer in s["layers"]}
        for level, s in found.items()
    }


PROBLEMS = [(TENSORS, PLAIN), (TENSORS, CODED), (MODULES, CODED)]


@pytest.mark.parametrize(("alternatives", "storage_formats"), PROBLEMS)
@pytest.mark.parametrize("problem", ["one-memory", "shared-layers"])
@pytest.mark.parametrize("value", ["mean-abs", "sum-abs"])
def test_no_choice_of_options_is_better(
    problem: str, value: str, alternatives: Alternatives, storage_formats: tuple[str, ...]
) -> None:
    for seed in range(6):
        levels = measured(seed, storage_formats)
        often = dict(zip(levels, (3.0, 1.0, 0.5), strict=False))
        budget = 6 + 2 * seed
        granularity = "tensor" if alternatives is TENSORS else "module"
        criterion = Criterion(importance=value, storage_formats=storage_formats, granularity=granularity)  # type: ignore[arg-type]
        coupling = Coupling(problem=problem, frequencies=often)  # type: ignore[arg-type]
        choices = [
            {
                w: worth(level, dict(w), alternatives, value)
                for way in ways(alternatives, storage_formats)
                for w in [tuple(way.items())]
            }
            for level in levels.values()
        ]
        best = 0.0
        for each in itertools.product(*choices) if problem == "one-memory" else zip(*choices, strict=True):
            known_ = [choice[w] for choice, w in zip(choices, each, strict=True)]
            if (sum(size for _, size in known_) if problem == "one-memory" else known_[0][1]) <= 4 * budget:
                best = max(best, math.fsum(f * v for f, (v, _) in zip(often.values(), known_, strict=True)))
        if not best:
            with pytest.raises(UserError, match=r"no layer is worth anything|the smallest choice takes"):
                joint_selection(
                    levels, alternatives, Criterion(importance="l2", storage_formats=storage_formats), coupling, budget
                )
            continue
        found = joint_selection(levels, alternatives, criterion, coupling, budget)
        own = {level: worth(levels[level], each, alternatives, value) for level, each in picked(found).items()}
        assert math.fsum(often[level] * v for level, (v, _) in own.items()) == pytest.approx(best, rel=1e-9)
        assert all(s["objective"] == pytest.approx(best, rel=1e-9) for s in found.values())
        assert {s["status"] for s in found.values()} == {"OPTIMAL"}
        assert [s["used"] for s in found.values()] == [math.ceil(size / 4) for _, size in own.values()]
        if problem == "shared-layers":
            assert len({str(each) for each in picked(found).values()}) == 1


def test_what_a_level_would_not_look_at_may_be_best_for_all() -> None:
    """A way of storing a module that a level by itself would never look at."""

    def level(errors: Mapping[str, float]) -> Measured:
        rows = [Sensitivity(n, "conv_weight", i, 8, 1.0, 1.0, 1.0, 1.0, 0.0) for i, n in enumerate(errors)]
        stored_variants = [StoredVariant(n, "int8", 12, Change(8, e, e, 1.0, None, None)) for n, e in errors.items()]
        return Measured(rows, stored_variants)

    # 44 bytes hold one int8 and one float32; at jpeg-20 alone int8 for both is as good in 24
    levels = {"jpeg-10": level({"a": 4, "b": 0.0}), "jpeg-20": level({"a": 0.0, "b": 3})}
    module: Alternatives = ((("a", "b"),),)
    criterion = Criterion(importance="sum-abs", storage_formats=CODED, granularity="module")
    found = joint_selection(levels, module, criterion, Coupling(problem="shared-layers"), 11)
    assert picked(found) == {level: {"a": "float32", "b": "int8"} for level in levels}
    assert found["jpeg-10"]["objective"] == 16 + 16 - 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.lists(st.floats(0, 9), min_size=3, max_size=3))
def test_tensors_as_they_are_are_the_plain_problems(seed: int, budget: int, often: list[float]) -> None:
    levels = measured(seed)
    values = [[VALUES["l2"](row.change) for row in level.rows] for level in levels.values()]
    sizes = [row.numel for row in levels["jpeg-10"].rows]
    if sum(often) == 0 or min(sizes) > budget:
        return
    told = {"frequencies": dict(zip(LEVELS, often, strict=True))}
    criterion = Criterion(importance="l2")
    plain: dict[str, tuple[Any, dict[str, int]]] = {
        "one-memory": (select(np.multiply(values, np.transpose([often])).ravel(), sizes * 3, budget), {}),
        "shared-layers": (select(np.dot(often, values), sizes, budget), {}),
        "few-layers": (few_layers(values, sizes, budget, 2, often), {"distinct": 2}),
        "few-adaptors": (few_adaptors(values, sizes, budget, 2, often), {"adaptors": 2}),
    }
    for problem, (joint, more) in plain.items():
        if not joint.objective:
            continue  # then nothing can be stored, which these criteria refuse
        coupling = Coupling(problem=problem, **told, **more)  # type: ignore[arg-type]
        found = joint_selection(levels, TENSORS, criterion, coupling, budget)
        for level, selection in found.items():
            assert selection["objective"] == pytest.approx(joint.objective)
            assert selection["bound"] >= selection["objective"]
            assert selection["used"] == sum(r.numel for r in levels[level].rows if r.layer in selection["layers"])
        chosen = [tuple(LAYERS.index(layer) for layer in s["layers"]) for s in found.values()]
        if problem.startswith("few"):
            assert chosen == list(joint.chosen)
        if problem != "few-adaptors":
            assert not any("shared_by" in s for s in found.values())
            continue
        for (level, s), adaptor in zip(found.items(), joint.adaptor_of, strict=True):
            group = [name for name, other in zip(LEVELS, joint.adaptor_of, strict=True) if other == adaptor]
            assert list(s.get("shared_by", [level])) == (group if s["layers"] else [level])


def test_a_level_that_never_occurs_is_given_nothing_and_nothing_that_fits_nothing() -> None:
    levels = measured(1)
    often = Coupling(problem="one-memory", frequencies={"jpeg-20": 0.0})
    found = joint_selection(levels, TENSORS, Criterion(), often, 100)
    assert found["jpeg-20"]["layers"] == []
    assert found["jpeg-20"]["used"] == 0
    assert found["jpeg-10"]["layers"]
    still = {
        name: Measured([replace(row, mean_abs_change=0.0) for row in level.rows]) for name, level in levels.items()
    }
    one = joint_selection(still, TENSORS, Criterion(), Coupling(problem="few-adaptors", adaptors=1), 100)
    assert all(s["layers"] == [] and "shared_by" not in s for s in one.values()), "an empty adaptor is each level's own"
    with pytest.raises(UserError, match="4 bytes hold none of the levels' choices by tensor as int8: the smallest"):
        joint_selection(
            measured(1, CODED), TENSORS, Criterion(storage_formats=("int8",)), Coupling(problem="one-memory"), 1
        )


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_shares_are_small_whole_numbers_in_proportion(often: list[float]) -> None:
    shares = _shares(often)
    assert math.gcd(*shares) == 1
    assert min(shares) > 0
    assert max(shares) <= 60
    close = [abs(share / max(shares) - f / max(often)) for share, f in zip(shares, often, strict=True)]
    assert max(close) <= 1 / 60
    assert _shares([3 * f for f in often]) == pytest.approx(shares, abs=1)


def test_shares_and_turns() -> None:
    assert _shares([7.0, 7.0, 7.0]) == [1, 1, 1]
    assert _shares([3000, 1000, 0]) == [3, 1, 0]
    assert _shares([0.5, 0.2]) == [5, 2]
    turns = in_turn({"a": 6, "b": 2, "c": 0, "d": 1})
    assert Counter(turns) == {"a": 6, "b": 2, "d": 1}
    assert Counter(turns[:5])["a"] == 3  # spread evenly
    assert in_turn({"a": 1, "b": 1}) == ["a", "b"]


# ── the stages, without Ray ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    tiny.write_folder(folder / "data")
    tiny.write_weights(folder / "weights.safetensors")
    return folder


RECIPE = Recipe(epochs=3, learning_rate=0.05, batch_size=4, crop=24, precision="float32")
FEW = Coupling(problem="few-adaptors", adaptors=1, frequencies={"jpeg-10": 3.0})
BUDGET = 300


@pytest.fixture(scope="module")
def spec(folder: Path) -> JobSpec:
    spec = JobSpec(
        store=str(folder / "store"),
        cache=str(folder / "cache"),
        network=Network("tests.nets:small", tiny.CLASSES, NORMALISATION),
        data=open_dataset("folder", str(folder / "data"), num_classes=tiny.CLASSES),
        recipe=RECIPE,
        budget=BUDGET,
        seed=0,
        coupling=FEW,
    )
    return replace(spec, base=publish_given_base(spec, str(folder / "weights.safetensors")).digest)


def discard(_: object) -> None:
    pass


def chosen_of(spec: JobSpec, *levels: str) -> dict[str, dict[str, Any]]:
    return select_jointly(spec, {level: sense_own(spec, level, discard)[0] for level in levels}, discard)


def judged(store: Store, base: Mapping[str, Tensor], change: Mapping[str, Tensor], spec: JobSpec, level: str) -> float:
    model = build_model("tests.nets:small", tiny.CLASSES)
    model.load_state_dict({**base, **change})
    return evaluate(model, *validation_data(spec, level), spec.network.normalisation, "float32")


TWO = ("brightness-0.4", "jpeg-10")


def test_one_adaptor_for_two_levels_is_trained_once_on_both(spec: JobSpec) -> None:
    selections = chosen_of(spec, *reversed(TWO))
    assert selections == chosen_of(spec, *TWO)
    assert [s["shared_by"] for s in selections.values()] == [{"brightness-0.4": 1, "jpeg-10": 3}] * 2
    said: list[Any] = []
    found = adapt_together(spec, (TWO, selections["jpeg-10"]), said.append)
    assert [e.level for e in said if e.kind == "finished"] == ["brightness-0.4"]
    one, other = found
    assert (one.level, other.level) == TWO
    assert one.digest == other.digest
    store = Store(spec.store)
    base, adaptor = store.get_state(spec.base), store.get_state(one.digest or "")
    for result in found:
        assert result.adaptor == judged(store, base, adaptor, spec, result.level)
        assert result.adaptor > result.original
    # of itself alone, and of other shares, it is another
    alone = adapt_together(spec, (("jpeg-10",), {**selections["jpeg-10"], "shared_by": {}}), discard)[0]
    evenly = {**selections["jpeg-10"], "shared_by": dict.fromkeys(TWO, 1)}
    assert len({one.digest, alone.digest, adapt_together(spec, (TWO, evenly), discard)[0].digest}) == 3
    assert known(adapt_together, spec, (TWO, selections["jpeg-10"]), discard) == found
    # who draws nothing of a level sees nothing of it
    never = {**selections["jpeg-10"], "shared_by": {"brightness-0.4": 0, "jpeg-10": 1}}
    only = {**selections["jpeg-10"], "shared_by": {"jpeg-10": 1}}
    assert (
        adapt_together(spec, (TWO, never), discard)[0].digest
        == adapt_together(spec, (("jpeg-10",), only), discard)[0].digest
    )


def test_what_a_shared_adaptor_is_trained_on_is_opened_once(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a level is drawn from."""
    selection, opened, training_data = chosen_of(spec, *TWO)["jpeg-10"], Counter[str](), level_run.training_data

    def counted(spec: JobSpec, level: str) -> Any:
        opened[level] += 1
        return training_data(spec, level)

    monkeypatch.setattr(level_run, "training_data", counted)
    adapt_together(spec, (TWO, {**selection, "shared_by": {"brightness-0.4": 3, "jpeg-10": 5}}), discard)
    assert opened["jpeg-10"] == 1
    assert opened["brightness-0.4"] <= 2  # the labels come with the images of the first


def test_a_group_of_one_is_that_levels_own_adaptor(spec: JobSpec) -> None:
    own = replace(spec, coupling=Coupling(problem="few-adaptors", adaptors=2))
    selections = chosen_of(own, *TWO)
    assert not any("shared_by" in s for s in selections.values())
    found = {level: adapt_together(own, ((level,), selections[level]), discard)[0] for level in TWO}
    said: list[Any] = []
    for level in TWO:
        plain = run_level(own, level, said.append)
        assert plain.digest == found[level].digest
    assert {e.stage for e in said if e.kind == "finished"} == {"selection"}, "the fine-tunes are the same stages"


def test_the_joint_problem_is_kept_under_what_it_is_made_of(spec: JobSpec) -> None:
    measured_ = {level: sense_own(spec, level, discard)[0] for level in TWO}
    asked: list[dict[str, Any]] = [
        {}, {"budget": 200}, {"coupling": replace_(FEW, frequencies={})}, {"coupling": Coupling(problem="one-memory")},
        {"coupling": Coupling(problem="few-layers", distinct=1)}, {"coupling": Coupling(problem="few-layers", distinct=2)},
        {"criterion": Criterion(importance="l2")},
    ]  # fmt: skip
    folder = Path(spec.store) / "stages"
    select_jointly(spec, measured_, discard)
    before = set(folder.iterdir())
    for changes in asked[1:]:
        select_jointly(replace(spec, **changes), measured_, discard)
    assert len(set(folder.iterdir()) - before) == len(asked) - 1
    # the frequency of a level that is not there, or another order, is no other problem; other measurements are
    said: list[Any] = []
    select_jointly(
        replace(spec, coupling=replace_(FEW, frequencies={"jpeg-10": 3.0, "jpeg-99": 2.0})), measured_, said.append
    )
    assert [e.kind for e in said] == ["reused"]
    assert [e.level for e in said] == ["all"]
    other = replace(spec, budget=201)
    for order, kind in ((measured_, "finished"), (dict(reversed(measured_.items())), "reused")):
        select_jointly(other, order, said.append)
        assert said[-1].kind == kind
    changed = {**measured_, "jpeg-10": measured_["brightness-0.4"]}
    select_jointly(spec, changed, said.append)
    assert said[-1].kind == "finished"


def replace_(coupling: Coupling, **changes: Any) -> Coupling:
    return coupling.model_copy(update=changes)


def levels_here(
    spec: JobSpec,
    levels: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    broken: str = "",
    ran: list[str] | None = None,
) -> tuple[dict[str, LevelResult], dict[str, str]]:
    """The job's waves with a loop in Ray's place; the adaptor of `broken` comes to nothing. ran: gets what each begins."""

    def run_all(
        resources: object, spec: JobSpec, board: object, relay: object, step: Any, whats: Mapping[str, Any]
    ) -> Any:
        results, failed = {}, {}
        for name, what in whats.items():
            if ran is not None:
                ran.append(name)
            try:
                if step is adapt_together and name == broken:
                    raise TrainingFailedError("it is broken")
                results[name] = step(spec, what, discard)
            except (TrainingFailedError, UserError) as error:
                failed[name] = str(error)
        return results, failed

    choose = SimpleNamespace(remote=lambda spec, measured, board: lambda: select_jointly(spec, measured, discard))
    monkeypatch.setattr(pipeline, "_run_all", run_all)
    monkeypatch.setattr(pipeline, "_choose_together", choose)
    config = SplitConfig(levels=levels)
    return pipeline._levels(config, spec, None, SimpleNamespace(wait=lambda made: made()))  # type: ignore[arg-type]


def test_a_level_that_cannot_be_sensed_is_left_out_and_named(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    dark = replace(
        spec,
        network=replace(spec.network, name="tests.nets:afraid_of_the_dark"),
        coupling=Coupling(problem="one-memory"),
    )
    results, failed = levels_here(dark, ("clean", "brightness-0.01", *TWO), monkeypatch)
    assert list(failed) == ["brightness-0.01"]
    assert "the loss became nan" in failed["brightness-0.01"]
    assert set(results) == {"clean", *TWO}
    assert results["clean"].adaptor is None
    alone, none = levels_here(dark, TWO, monkeypatch)
    assert none == {}
    assert all(alone[level] == results[level] for level in TWO), "chosen as if it had not been asked for"
    assert 0 < sum(results[level].floats for level in TWO) <= BUDGET


def test_what_fails_for_all_is_said_of_each(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in sorted(TWO):
        results, failed = levels_here(spec, ("clean", *TWO), monkeypatch, broken)
        # one adaptor for both, which bears the name of the first
        assert set(failed) == (set(TWO) if broken == "brightness-0.4" else set())
        assert set(results) == {"clean", *TWO} - set(failed)
    little = replace(
        spec, coupling=Coupling(problem="one-memory"), criterion=Criterion(storage_formats=("int8",)), budget=1
    )
    results, failed = levels_here(little, ("clean", *TWO), monkeypatch)
    assert set(results) == {"clean"}
    assert set(failed) == set(TWO)
    assert all("4 bytes hold none of the levels' choices" in reason for reason in failed.values())


@pytest.mark.parametrize("problem", ["per-level", "one-memory", "shared-layers"])
def test_the_undistorted_fine_tune_comes_before_what_is_measured_against_it(
    spec: JobSpec, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion = Criterion(against="clean", granularity="module", importance="l2")
    own = replace(spec, criterion=criterion, coupling=Coupling(problem=problem))  # type: ignore[arg-type]
    dark, light = (
        replace(own, network=replace(own.network, name=f"tests.nets:afraid_of_the_{what}"))
        for what in ("dark", "light")
    )
    ran: list[str] = []
    results, failed = levels_here(dark, ("brightness-0.01", *TWO), monkeypatch, ran=ran)
    assert list(failed) == ["brightness-0.01"]
    assert "the loss became nan" in failed["brightness-0.01"]
    assert set(results) == set(TWO)
    assert ran[0] == "clean"
    assert (ran.count("clean"), ran.count("brightness-0.01")) == (1, 1), "what has failed is not tried again"
    # it is no level of its own unless it is asked for, and then the same
    again, none = levels_here(dark, ("clean", *TWO), monkeypatch)
    assert none == {}
    assert again.pop("clean").adaptor is None
    assert again == results

    levels = ("brightness-0.3", "brightness-0.4")
    results, failed = levels_here(light, levels, monkeypatch)
    assert results == {}
    (reason,) = set(failed.values())
    assert set(failed) == set(levels)
    assert reason.startswith("the fine-tune on undistorted images, which changes are measured against: the loss became")
    against_base = replace(light, criterion=Criterion(granularity="module", importance="l2"))
    assert set(levels_here(against_base, levels, monkeypatch)[0]) == set(levels)


def test_few_adaptors_go_by_what_is_measured_against_the_control(spec: JobSpec) -> None:
    own = replace(spec, criterion=Criterion(against="clean"))
    judged_ = [sense_own(own, level, discard)[0]["judged"] for level in TWO]
    values, plain = (
        [[row["mean_abs_change"] for row in rows] for rows in each]
        for each in (judged_, [sense_own(spec, level, discard)[0]["sensitivity"] for level in TWO])
    )
    assert values != plain
    joint = few_adaptors(values, [row["numel"] for row in judged_[0]], BUDGET, 1, (1.0, 3.0))
    assert chosen_of(own, *TWO)["jpeg-10"]["objective"] == pytest.approx(joint.objective)


@pytest.mark.parametrize("against", ["base", "clean"])
@pytest.mark.parametrize("problem", ["one-memory", "shared-layers"])
def test_codes_and_modules_are_chosen_together_too(spec: JobSpec, problem: str, against: str) -> None:
    storage_formats = ("float32", "int8", "bfloat16")
    criterion = Criterion(importance="sum-abs", granularity="module", storage_formats=storage_formats, against=against)  # type: ignore[arg-type]
    own = replace(spec, criterion=criterion, coupling=Coupling(problem=problem), budget=190)  # type: ignore[arg-type]
    selections = chosen_of(own, *TWO)
    store = Store(own.store)
    stored, found = [], []
    for level in TWO:
        result = adapt_together(own, ((level,), selections[level]), discard)[0]
        state = store.get_state(result.digest or "")
        stored.append(sum(t.numel() * t.element_size() for t in state.values()))
        found.append({layer: selections[level]["storage_formats"].get(layer, "float32") for layer in result.layers})
        assert math.ceil(stored[-1] / 4) == selections[level]["used"]
        assert {
            name: storage_format for name, storage_format in formats_of(state).items() if storage_format != "float32"
        } == result.storage_formats
        statistics = {layer for layer in result.layers if layer.endswith(".running_stats")}
        assert {layer for layer, storage_format in found[-1].items() if storage_format == FOLDED} == statistics
        assert statistics
        assert not any("running" in name for name in state)
        change = decode(store.get_state(own.base), state)
        assert result.adaptor == judged(store, store.get_state(own.base), change, own, level)
    assert any(set(each.values()) - {"float32", FOLDED} for each in found)
    if problem == "shared-layers":
        assert found[0] == found[1]
        assert max(stored) <= 4 * 190
    else:
        assert found[0] != found[1]
        assert 0.8 * 4 * 190 < sum(stored) <= 4 * 220


def test_an_empty_adaptor_is_the_base(spec: JobSpec) -> None:
    own = replace(spec, coupling=Coupling(problem="one-memory", frequencies={"jpeg-10": 0.0}))
    result = adapt_together(own, (("jpeg-10",), chosen_of(own, *TWO)["jpeg-10"]), discard)[0]
    assert (result.adaptor, result.layers, result.floats) == (result.original, (), 0)
    assert Store(own.store).get_state(result.digest or "?") == {}


def test_an_evaluation_takes_the_adaptor_as_released(spec: JobSpec) -> None:
    whole = replace(spec, keep_full=True)
    result = adapt_together(spec, (TWO, chosen_of(spec, *TWO)["jpeg-10"]), discard)[1]
    entry = {"digest": result.digest, "layers": list(result.layers), "floats": result.floats}
    main = released_main(whole, "jpeg-10", entry, discard)
    assert main.gearnn == {BUDGET: Weights(result.digest, result.floats)}
    assert main.layers == result.layers
    assert Store(spec.store).has_blob(main.switching.digest or "?")
    other = released_main(replace(whole, seed=1), "jpeg-10", None, discard)
    assert other.gearnn == {}
    assert other.switching.digest != main.switching.digest


def test_an_evaluation_counts_a_shared_adaptor_once(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "figures_of", lambda _: {})
    shared = {"jpeg-10": ("a", 70), "jpeg-20": ("b", 50), "brightness-0.4": ("a", 70)}
    own = {level: (level, 1000) for level in LEVELS}
    made = {"gearnn": shared, "switching": own, "bn-tuned": {"jpeg-10": ("a", 70)}}
    cells = [
        *(Cell("original", level, 0, Weights()) for level in ("clean", *LEVELS)),
        *(Cell(method, level, 0, Weights(*weights)) for method, its in made.items() for level, weights in its.items()),
        Cell("gearnn", "clean", 0, Weights()),
        Cell("gearnn", "jpeg-10", 0, Weights("large", 300), budget=300),  # of another budget
        Cell("gearnn", "jpeg-20", 1, Weights("again", 40)),  # of several seeds one is held
    ]
    found = Found(rates=dict.fromkeys(made, 0.1), cells=[(cell, Judged(50.0, "")) for cell in cells])
    plan = Plan("tiny", "sha256:0", {}, spec, 1000, ("clean", *LEVELS), LEVELS, {}, ())
    publish(Store(tmp_path), EvaluateConfig(release="tiny"), plan, found, "")
    rows = Store(tmp_path).get_table("tables/tiny/memory.parquet").to_pylist()
    held = {row["method"]: (row["levels"], row["floats"]) for row in rows if row["kind"] == "actual"}
    assert held == {
        "original": (4, 1000), "gearnn": (4, 1000 + 70 + 50), "switching": (4, 4000), "bn-tuned": (2, 1070),
    }  # fmt: skip
    # each level's accuracy stands beside all the floats that it was had with
    rows = Store(tmp_path).get_table("tables/tiny/accuracy.parquet").to_pylist()
    floats = {row["level"]: row["floats"] for row in rows if (row["method"], row["seed"]) == ("gearnn", 0)}
    assert floats == {"clean": 0, "jpeg-10": 70, "jpeg-20": 50, "brightness-0.4": 70}


def test_rivals_get_an_equal_part_of_one_memory(spec: JobSpec) -> None:
    released = ("clean", *LEVELS)
    assert _budget_of_each(replace(spec, budget=301), released) == 301
    assert _budget_of_each(replace(spec, budget=301, coupling=Coupling(problem="one-memory")), released) == 100


def test_what_a_release_says_of_its_problem(spec: JobSpec) -> None:
    told = {"levels": TWO, "selection": {"problem": "one-memory", "frequencies": {"jpeg-10": 2, "brightness-0.4": 1}}}
    kept = _config_to_keep(SplitConfig(**told))["selection"]  # type: ignore[arg-type]
    assert kept["problem"] == "one-memory"
    assert SplitConfig(levels=TWO, selection=kept).selection.frequencies == {"jpeg-10": 2, "brightness-0.4": 1}
    # others' manifests, and so their digests, are what they were
    assert set(_config_to_keep(SplitConfig())["selection"]) == {"value", "granularity", "storage_formats"}
    against = SplitConfig(selection={"against": "clean"})  # type: ignore[arg-type]
    kept = _config_to_keep(against)["selection"]
    assert (set(kept), kept["against"]) == ({"value", "granularity", "storage_formats", "against"}, "clean")
    assert SplitConfig(selection=kept).selection == against.selection


# ── releases, from a real Ray ────────────────────────────────────────────────────────────────────────────────────

# every process of these tests knows it from the environment
DOOMED = Path(os.environ.setdefault("GEARNN_TEST_DOOMED", f"{tempfile.gettempdir()}/gearnn-doomed-{os.getpid()}"))


class _Mortal(Small):
    """Kills its process in the third epoch of a partial fine-tune where a file says so, once."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.steps += 1
            frozen = sum(not parameter.requires_grad for parameter in self.parameters())
            if self.steps == 7 and frozen > 1 and DOOMED.exists():
                DOOMED.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def mortal(num_classes: int) -> nn.Module:
    return _Mortal(num_classes)


def run(
    arguments: list[str], capsys: pytest.CaptureFixture[str], job: Any = run_split
) -> tuple[int, list[dict[str, Any]]]:
    capsys.readouterr()
    storage_format = job([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    return storage_format, tiny.events(out)


def told(folder: Path, store: str, problem: str, **changes: Any) -> list[str]:
    seen = {"model.mean": list(NORMALISATION.mean), "model.std": list(NORMALISATION.std)}
    return tiny.options(folder, store=folder / store, **{"selection.problem": problem, **seen} | changes)


@pytest.mark.usefixtures("ray_cluster")
def test_a_release_of_fewer_adaptors_than_levels_through_a_kill(
    folder: Path, spec: JobSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {
        "selection.adaptors": 1,
        "selection.frequencies": ["jpeg-10", 3, "brightness-0.4", 1],
        "levels": ["clean", *TWO],
        "budget": BUDGET,
    }
    arguments = told(folder, "few", "few-adaptors", **more, **{"model.name": "tests.test_joint_selection:mortal"})
    DOOMED.touch()
    storage_format, lines = run(arguments, capsys)
    assert storage_format == 0
    assert not DOOMED.exists()
    stages = Counter((e["event"], e["stage"]) for e in lines if "stage" in e and e["event"] in ("started", "finished"))
    assert (stages["started", "full"], stages["finished", "full"]) == (2, 2)
    assert stages["finished", "selection"] == 1
    assert (stages["started", "partial"], stages["finished", "partial"]) == (2, 1)  # it had been killed
    partial = [e for e in lines if e.get("stage") == "partial" and e["event"] == "progress"]
    assert {e["epoch"] for e in partial} == {1, 2, 3}
    assert tiny.epochs_run(partial) <= 4

    store = Store(folder / "few")
    release = store.pull("tiny")
    entries = {level: release.manifest["levels"][level] for level in TWO}
    assert release.manifest["config"]["selection"]["problem"] == "few-adaptors"
    assert len({entry["digest"] for entry in entries.values()}) == 1
    for level, entry in entries.items():
        adaptor = release.adaptor_state(level)
        assert 0 < sum(t.numel() for t in adaptor.values()) <= BUDGET
        assert entry["scores"]["adaptor"] == judged(store, release.base_state(), adaptor, spec, level)
    # what came of it is what comes of the same without a kill, or Ray
    undisturbed = adapt_together(spec, (TWO, chosen_of(spec, *TWO)["jpeg-10"]), discard)
    assert entries["jpeg-10"]["digest"] == undisturbed[0].digest

    # an evaluation judges it as it is
    again = ["--store", str(folder / "few"), "--release", "tiny", "--data.cache", str(folder / "cache"), "--methods"]
    storage_format, lines = run(again, capsys, run_evaluate)
    assert (storage_format, lines[-1]["failed"]) == (0, {})
    rows = [row for row in lines[-1]["accuracy"] if row["level"] != "clean"]
    assert {row["method"] for row in rows} == {"original", "switching", "gearnn"}
    for row in rows:
        entry = entries[row["level"]]
        if row["method"] == "gearnn":
            assert (row["value"], row["floats"]) == (pytest.approx(entry["scores"]["adaptor"]), entry["floats"])


@pytest.mark.usefixtures("ray_cluster")
def test_one_memory_for_the_levels_that_can_be_sensed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = ["brightness-0.01", "jpeg-10", "jpeg-20", "jpeg-30"]
    often = ["brightness-0.01", 1, "jpeg-10", 1, "jpeg-20", 0, "jpeg-30", 5]
    more = {"model.name": "tests.nets:afraid_of_the_dark", "selection.frequencies": often}
    storage_formats = {
        "selection.storage_formats": ["float32", "int8"],
        "selection.importance": "sum-abs",
        "recipe.epochs": 1,
    }
    arguments = told(folder, "one", "one-memory", levels=levels, budget=200, **more, **storage_formats)
    storage_format, lines = run(arguments, capsys)
    assert storage_format == 1
    assert list(lines[-1]["failed"]) == ["brightness-0.01"]
    store = Store(folder / "one")
    release = store.pull("tiny")
    assert release.levels == ("jpeg-10", "jpeg-20", "jpeg-30")
    assert release.adaptor_state("jpeg-20") == {}, "the base itself"
    scores = release.manifest["levels"]["jpeg-20"]["scores"]
    assert scores["adaptor"] == scores["original"]
    stored = [store.get_state(release.manifest["levels"][level]["digest"]).values() for level in release.levels]
    bytes_ = [sum(t.numel() * t.element_size() for t in each) for each in stored]
    assert sum(bytes_) <= 4 * 200
    assert bytes_[2] > 4 * 200 / 3, "more than an equal part"

    # a sweep chooses them together again, under every budget
    told_sweep = ["--store", str(folder / "one"), "--release", "tiny", "--data.cache", str(folder / "cache")]
    storage_format, found = run([*told_sweep, "--budgets", "100", "200", "--within", "100"], capsys, run_sweep)
    assert (storage_format, found[-1]["failed"]) == (0, {})
    points = {point["floats"]: point for point in found[-1]["points"]}
    assert set(points) == {100, 200}
    assert points[200]["levels"] == {level: e["scores"]["adaptor"] for level, e in release.manifest["levels"].items()}
    recommended = store.pull("tiny:recommended").manifest
    assert recommended["budget"]["floats"] == 100
    assert recommended["config"]["selection"]["frequencies"] == {"jpeg-10": 1, "jpeg-20": 0, "jpeg-30": 5}
    assert run_sweep([*told_sweep, "--levels", "jpeg-10"]) == 2
    assert "levels lacks jpeg-20" in capsys.readouterr().err
