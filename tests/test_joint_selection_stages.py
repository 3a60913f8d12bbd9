"""Joint selection in a job: its stages without Ray, what an evaluation makes of them, and releases from a real Ray."""

import math
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gearnn_ray.adaptors.storage_formats import decode, formats_of
from gearnn_ray.cli.main import run_evaluate, run_split, run_sweep
from gearnn_ray.config.recipe import Coupling, Criterion, Recipe
from gearnn_ray.config.release_jobs import EvaluateConfig
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.core.errors import TrainingFailedError, UserError
from gearnn_ray.evaluation import findings
from gearnn_ray.evaluation.findings import Cell, Found, publish
from gearnn_ray.evaluation.plan import Plan, _budget_of_each
from gearnn_ray.evaluation.records import Evaluated, Weights
from gearnn_ray.evaluation.runs import released_main
from gearnn_ray.offline import pipeline
from gearnn_ray.offline.base import NetworkFacts
from gearnn_ray.offline.importance import FOLDED
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.level_run import LevelResult, cached, measure_level, run_level, select_jointly
from gearnn_ray.offline.release import _config_to_keep
from gearnn_ray.offline.release_context import ReleaseContext
from gearnn_ray.offline.selection import LayerSelection, select
from gearnn_ray.ray_jobs.run_tasks import TaskRunner
from gearnn_ray.store.manifest import LevelEntry, Scores
from gearnn_ray.store.releases import Store
from tests import tiny
from tests.conftest import NORMALISATION
from tests.manifests import in_no_store
from tests.nets import TRUST, Small

LEVELS = ("jpeg-10", "jpeg-20", "brightness-0.4")


# ── the stages, without Ray ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    tiny.write_folder(folder / "data")
    tiny.write_weights(folder / "weights.safetensors")
    return folder


RECIPE = Recipe(epochs=3, learning_rate=0.05, batch_size=4, crop=24, precision="float32")
SHARED = Coupling(problem="shared-layers", frequencies={"jpeg-10": 3.0})
BUDGET = 300


@pytest.fixture(scope="module")
def spec(folder: Path) -> JobSpec:
    return tiny.job_spec(folder, recipe=RECIPE, budget=BUDGET, seed=0, coupling=SHARED)


def discard(_: object) -> None:
    pass


def chosen_of(spec: JobSpec, *levels: str) -> dict[str, LayerSelection]:
    return select_jointly(spec, {level: measure_level(spec, level, discard)[0] for level in levels}, discard)


def score_of(spec: JobSpec, change: Mapping[str, Tensor], level: str) -> float:
    """mIoU of the base with these tensors replaced."""
    return tiny.score_of(spec, {**Store(spec.store).get_state(spec.base), **change}, level)


TWO = ("brightness-0.4", "jpeg-10")


def test_levels_that_share_layers_train_their_own_adaptors(spec: JobSpec) -> None:
    selections = chosen_of(spec, *reversed(TWO))
    assert selections == chosen_of(spec, *TWO)
    assert selections["jpeg-10"].layers == selections["brightness-0.4"].layers
    store, digests = Store(spec.store), set()
    for level in TWO:
        result = run_level(spec, level, discard, selections[level])
        assert result.adaptor == score_of(spec, store.get_state(result.digest or ""), level) > result.original
        assert cached(partial(run_level, selection=selections[level]), spec, level) == result
        digests.add(result.digest)
    assert len(digests) == 2


def test_equal_selections_of_two_problems_are_one_fine_tune(spec: JobSpec) -> None:
    own = replace(spec, coupling=Coupling(problem="one-memory"), budget=10**6)
    selections = chosen_of(own, *TWO)
    found = {level: run_level(own, level, discard, selections[level]) for level in TWO}
    said: list[Any] = []
    for level in TWO:
        plain = run_level(own, level, said.append)
        assert plain.digest == found[level].digest
    assert {e.stage for e in said if e.kind == "finished"} == {"selection"}, "the fine-tunes are the same stages"


def test_the_key_of_a_joint_selection_has_all_its_inputs(spec: JobSpec) -> None:
    measured_ = {level: measure_level(spec, level, discard)[0] for level in TWO}
    asked: list[dict[str, Any]] = [
        {}, {"budget": 200}, {"coupling": replace_(SHARED, frequencies={})}, {"coupling": Coupling(problem="one-memory")},
        {"criterion": Criterion(importance="l2")},
    ]  # fmt: skip
    folder = Path(spec.store) / "stages"
    select_jointly(spec, measured_, discard)
    before = set(folder.iterdir())
    for changes in asked[1:]:
        select_jointly(replace(spec, **changes), measured_, discard)
    assert len(set(folder.iterdir()) - before) == len(asked) - 1
    # frequencies of other levels and the order of the levels are not in the key; the measurements are
    said: list[Any] = []
    select_jointly(replace(spec, coupling=replace_(SHARED, frequencies={"jpeg-10": 3.0, "jpeg-99": 2.0})), measured_, said.append)
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


class _TasksHere(TaskRunner):
    """Runs the tasks of a job in this process instead of on Ray. The partial fine-tune of the level `broken` fails.

    started: labels of all tasks, in their order.
    """

    def __init__(self, broken: str = "") -> None:
        self.broken, self.failed, self.started = broken, dict[str, str](), list[str]()

    def share(self, value: Any) -> Any:
        return value

    def start(
        self,
        label: str,
        function: Callable[..., Any],
        *arguments: Any,
        then: Callable[[Any], None] = lambda _: None,
        look_up: Callable[..., Any] | None = None,
        threads: int | None = None,
    ) -> None:
        self.started.append(label)
        result = None
        try:
            if function is pipeline._adapt and label == self.broken:
                raise TrainingFailedError("it is broken")
            result = function(*arguments, discard)
        except (TrainingFailedError, UserError) as error:
            self.failed[label] = str(error)
        then(result)

    def settle(self) -> None:
        pass


def levels_here(
    spec: JobSpec, levels: tuple[str, ...], tasks: _TasksHere | None = None
) -> tuple[dict[str, LevelResult], dict[str, str]]:
    """The results of the levels, and why the others have none."""
    tasks = tasks or _TasksHere()
    results = pipeline.run_levels(spec, levels, tasks)
    return results, {level: tasks.failed[level] for level in levels if level in tasks.failed}


def test_a_level_whose_full_fine_tune_fails_is_left_out_and_named(spec: JobSpec) -> None:
    dark = replace(
        spec, network=replace(spec.network, name="tests.nets:afraid_of_the_dark"), coupling=Coupling(problem="one-memory")
    )
    results, failed = levels_here(dark, ("clean", "brightness-0.01", *TWO))
    assert list(failed) == ["brightness-0.01"]
    assert "the loss became nan" in failed["brightness-0.01"]
    assert set(results) == {"clean", *TWO}
    assert results["clean"].adaptor is None
    alone, none = levels_here(dark, TWO)
    assert none == {}
    assert all(alone[level] == results[level] for level in TWO), "the joint selection is that of the other levels"
    assert 0 < sum(results[level].floats for level in TWO) <= BUDGET


def test_an_adaptor_fails_alone_and_a_joint_selection_for_all(spec: JobSpec) -> None:
    for broken in sorted(TWO):
        results, failed = levels_here(spec, ("clean", *TWO), _TasksHere(broken))
        assert set(failed) == {broken}
        assert set(results) == {"clean", *TWO} - set(failed)
    little = replace(spec, coupling=Coupling(problem="one-memory"), criterion=Criterion(storage_formats=("int8",)), budget=1)
    results, failed = levels_here(little, ("clean", *TWO))
    assert set(results) == {"clean"}
    assert set(failed) == set(TWO)
    assert all("a budget of 4 bytes is too small for the levels" in reason for reason in failed.values())


@pytest.mark.parametrize("problem", ["per-level", "one-memory", "shared-layers"])
def test_the_control_is_fine_tuned_first(spec: JobSpec, problem: str) -> None:
    criterion = Criterion(against="clean", granularity="module", importance="l2")
    own = replace(spec, criterion=criterion, coupling=Coupling(problem=problem))  # type: ignore[arg-type]
    dark, light = (
        replace(own, network=replace(own.network, name=f"tests.nets:afraid_of_the_{what}")) for what in ("dark", "light")
    )
    tasks = _TasksHere()
    results, failed = levels_here(dark, ("brightness-0.01", *TWO), tasks)
    assert list(failed) == ["brightness-0.01"]
    assert "the loss became nan" in failed["brightness-0.01"]
    assert set(results) == set(TWO)
    assert tasks.started[0] == "clean"
    assert [tasks.started.count(level) for level in ("clean", "brightness-0.01")] == [1, 1], "a failed fine-tune is not run again"
    # the control is a level of the release only if it was requested, and changes nothing else
    again, none = levels_here(dark, ("clean", *TWO))
    assert none == {}
    assert again.pop("clean").adaptor is None
    assert again == results

    levels = ("brightness-0.3", "brightness-0.4")
    results, failed = levels_here(light, levels)
    assert results == {}
    (reason,) = set(failed.values())
    assert set(failed) == set(levels)
    assert reason.startswith("the fine-tune on undistorted images, which changes are measured against: the loss became")
    against_base = replace(light, criterion=Criterion(granularity="module", importance="l2"))
    assert set(levels_here(against_base, levels)[0]) == set(levels)


def test_a_joint_selection_uses_the_changes_against_the_control(spec: JobSpec) -> None:
    own = replace(spec, criterion=Criterion(against="clean"))
    compared = [measure_level(own, level, discard)[0].rows for level in TWO]
    values, plain = (
        [[row.mean_abs_change for row in rows] for rows in each]
        for each in (compared, [measure_level(spec, level, discard)[0].rows for level in TWO])
    )
    assert values != plain
    joint = select(np.dot((1.0, 3.0), values), [row.numel for row in compared[0]], BUDGET)
    assert chosen_of(own, *TWO)["jpeg-10"].objective == pytest.approx(joint.objective)


@pytest.mark.parametrize("against", ["base", "clean"])
@pytest.mark.parametrize("problem", ["one-memory", "shared-layers"])
def test_storage_formats_and_modules_in_a_joint_selection(spec: JobSpec, problem: str, against: str) -> None:
    storage_formats = ("float32", "int8", "bfloat16")
    criterion = Criterion(importance="sum-abs", granularity="module", storage_formats=storage_formats, against=against)  # type: ignore[arg-type]
    own = replace(spec, criterion=criterion, coupling=Coupling(problem=problem), budget=190)  # type: ignore[arg-type]
    selections = chosen_of(own, *TWO)
    store = Store(own.store)
    stored, found = [], []
    for level in TWO:
        result = run_level(own, level, discard, selections[level])
        state = store.get_state(result.digest or "")
        stored.append(sum(t.numel() * t.element_size() for t in state.values()))
        found.append({layer: selections[level].storage_formats.get(layer, "float32") for layer in result.layers})
        assert math.ceil(stored[-1] / 4) == selections[level].used
        assert {
            name: storage_format for name, storage_format in formats_of(state).items() if storage_format != "float32"
        } == result.storage_formats
        statistics = {layer for layer in result.layers if layer.endswith(".running_stats")}
        assert {layer for layer, storage_format in found[-1].items() if storage_format == FOLDED} == statistics
        assert statistics
        assert not any("running" in name for name in state)
        change = decode(store.get_state(own.base), state)
        assert result.adaptor == score_of(own, change, level)
    assert any(set(each.values()) - {"float32", FOLDED} for each in found)
    if problem == "shared-layers":
        assert found[0] == found[1]
        assert max(stored) <= 4 * 190
    else:
        assert found[0] != found[1]
        assert 0.8 * 4 * 190 < sum(stored) <= 4 * 220


def test_an_empty_adaptor_is_the_base(spec: JobSpec) -> None:
    own = replace(spec, coupling=Coupling(problem="one-memory", frequencies={"jpeg-10": 0.0}))
    result = run_level(own, "jpeg-10", discard, chosen_of(own, *TWO)["jpeg-10"])
    assert (result.adaptor, result.layers, result.floats) == (result.original, (), 0)
    assert Store(own.store).get_state(result.digest or "?") == {}


def test_an_evaluation_takes_the_adaptor_as_released(spec: JobSpec) -> None:
    whole = replace(spec, keep_full=True)
    result = run_level(spec, "jpeg-10", discard, chosen_of(spec, *TWO)["jpeg-10"])
    entry = LevelEntry(digest=result.digest, bytes=result.bytes, layers=result.layers, floats=result.floats, scores=Scores())
    main = released_main(whole, "jpeg-10", entry, discard)
    assert main.gearnn == {BUDGET: Weights(result.digest, result.floats)}
    assert main.layers == result.layers
    assert Store(spec.store).is_intact(main.switching.digest or "?")
    other = released_main(replace(whole, seed=1), "jpeg-10", None, discard)
    assert other.gearnn == {}
    assert other.switching.digest != main.switching.digest


def test_an_evaluation_counts_an_adaptor_of_several_levels_once(
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
    found = Found(rates=dict.fromkeys(made, 0.1), cells=[(cell, Evaluated(50.0, "")) for cell in cells])
    manifest = in_no_store("tests.nets:small", tiny.CLASSES, ("clean", *LEVELS))
    release = ReleaseContext("made:latest", "sha256:0", manifest, SplitConfig(), spec, NetworkFacts(1000, 1))
    plan = Plan(EvaluateConfig(release="made"), release, spec, release.levels, LEVELS, {}, ())
    publish(Store(tmp_path), plan, found, "")
    rows = Store(tmp_path).get_table("tables/made/memory.parquet").to_pylist()
    held = {row["method"]: (row["levels"], row["floats"]) for row in rows if row["kind"] == "actual"}
    assert held == {
        "original": (4, 1000), "gearnn": (4, 1000 + 70 + 50), "switching": (4, 4000), "bn-tuned": (2, 1070),
    }  # fmt: skip
    # the accuracy table has each level's own number of floats
    rows = Store(tmp_path).get_table("tables/made/accuracy.parquet").to_pylist()
    floats = {row["level"]: row["floats"] for row in rows if (row["method"], row["seed"]) == ("gearnn", 0)}
    assert floats == {"clean": 0, "jpeg-10": 70, "jpeg-20": 50, "brightness-0.4": 70}


def test_baselines_get_an_equal_part_of_one_memory(spec: JobSpec) -> None:
    released = ("clean", *LEVELS)
    assert _budget_of_each(replace(spec, budget=301), released) == 301
    assert _budget_of_each(replace(spec, budget=301, coupling=Coupling(problem="one-memory")), released) == 100


@pytest.mark.parametrize(
    "selection",
    [
        {},
        {"against": "clean", "storage_formats": ["int8", "float32"]},
        {"problem": "one-memory", "frequencies": {"jpeg-10": 2, "brightness-0.4": 1}},
    ],
)
def test_the_selection_in_a_releases_configuration_reads_back(selection: dict[str, Any]) -> None:
    config = SplitConfig(levels=TWO, selection=selection)  # type: ignore[arg-type]
    kept = _config_to_keep(config)["selection"]
    assert selection.items() <= kept.items()
    assert SplitConfig(levels=TWO, selection=kept).selection == config.selection


# ── releases, from a real Ray ────────────────────────────────────────────────────────────────────────────────────

# all processes of these tests read it from the environment
DOOMED = Path(os.environ.setdefault("GEARNN_TEST_DOOMED", f"{tempfile.gettempdir()}/gearnn-doomed-{os.getpid()}"))


class _Mortal(Small):
    """Kills its process in the third epoch of a partial fine-tune if the file DOOMED exists, and removes it."""

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


def run(arguments: list[str], capsys: pytest.CaptureFixture[str], job: Any = run_split) -> tuple[int, list[dict[str, Any]]]:
    capsys.readouterr()
    code = job([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    return code, tiny.events(out)


def told(folder: Path, store: str, problem: str, **changes: Any) -> list[str]:
    seen = {"model.mean": list(NORMALISATION.mean), "model.std": list(NORMALISATION.std)}
    return tiny.options(folder, store=folder / store, **{"selection.problem": problem, **seen} | changes)


@pytest.mark.usefixtures("ray_cluster", "no_figures")
def test_a_release_of_shared_layers_after_a_kill(folder: Path, spec: JobSpec, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"selection.frequencies": ["jpeg-10", 3, "brightness-0.4", 1], "levels": ["clean", *TWO], "budget": BUDGET}
    arguments = told(folder, "shared", "shared-layers", **more, **{"model.name": "tests.test_joint_selection_stages:mortal"})
    DOOMED.touch()
    code, lines = run(arguments, capsys)
    assert code == 0
    assert not DOOMED.exists()
    stages = Counter((e["event"], e["stage"]) for e in lines if "stage" in e and e["event"] in ("started", "finished"))
    assert (stages["started", "full"], stages["finished", "full"]) == (2, 2)
    assert stages["finished", "selection"] == 1
    assert (stages["started", "partial"], stages["finished", "partial"]) == (3, 2)  # one was killed
    partial = [e for e in lines if e.get("stage") == "partial" and e["event"] == "progress"]
    assert {e["epoch"] for e in partial} == {1, 2, 3}
    assert tiny.epochs_run(partial) <= 7

    store = Store(folder / "shared")
    release = store.pull("tiny")
    entries = {level: release.manifest["levels"][level] for level in TWO}
    assert release.manifest["config"]["selection"]["problem"] == "shared-layers"
    assert len({tuple(entry["layers"]) for entry in entries.values()}) == 1
    selections = chosen_of(spec, *TWO)
    for level, entry in entries.items():
        adaptor = release.adaptor_state(level)
        assert 0 < sum(t.numel() for t in adaptor.values()) <= BUDGET
        assert entry["scores"]["adaptor"] == tiny.score_of(spec, {**release.base_state(), **adaptor}, level)
        # the result is that of a run without a kill and without Ray
        undisturbed = run_level(spec, level, discard, selections[level])
        assert entry["digest"] == undisturbed.digest

    # an evaluation measures the released adaptors
    again = ["--store", str(folder / "shared"), "--release", "tiny", "--data.cache", str(folder / "cache")]
    code, lines = run([*again, "--trust", *TRUST, "--methods"], capsys, run_evaluate)
    assert (code, lines[-1]["failed"]) == (0, {})
    rows = [row for row in lines[-1]["accuracy"] if row["level"] != "clean"]
    assert {row["method"] for row in rows} == {"original", "switching", "gearnn"}
    for row in rows:
        entry = entries[row["level"]]
        if row["method"] == "gearnn":
            assert (row["value"], row["floats"]) == (pytest.approx(entry["scores"]["adaptor"]), entry["floats"])


@pytest.mark.usefixtures("ray_cluster", "no_figures")
def test_a_release_of_one_memory_without_the_level_that_failed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = ["brightness-0.01", "jpeg-10", "jpeg-20", "jpeg-30"]
    often = ["brightness-0.01", 1, "jpeg-10", 1, "jpeg-20", 0, "jpeg-30", 5]
    more = {"model.name": "tests.nets:afraid_of_the_dark", "selection.frequencies": often}
    storage_formats = {"selection.storage_formats": ["float32", "int8"], "selection.importance": "sum-abs", "recipe.epochs": 1}
    arguments = told(folder, "one", "one-memory", levels=levels, budget=200, **more, **storage_formats)
    code, lines = run(arguments, capsys)
    assert code == 1
    assert list(lines[-1]["failed"]) == ["brightness-0.01"]
    store = Store(folder / "one")
    assert store.tag_digest("tiny", "latest") is None
    release = store.pull("tiny:partial")
    assert release.levels == ("jpeg-10", "jpeg-20", "jpeg-30")
    assert release.adaptor_state("jpeg-20") == {}, "the base itself"
    scores = release.manifest["levels"]["jpeg-20"]["scores"]
    assert scores["adaptor"] == scores["original"]
    stored = [store.get_state(release.manifest["levels"][level]["digest"]).values() for level in release.levels]
    bytes_ = [sum(t.numel() * t.element_size() for t in each) for each in stored]
    assert sum(bytes_) <= 4 * 200
    assert bytes_[2] > 4 * 200 / 3, "more than an equal part"

    # a sweep repeats the joint selection for every budget
    told_sweep = ["--store", str(folder / "one"), "--release", "tiny:partial", "--data.cache", str(folder / "cache")]
    told_sweep += ["--trust", *TRUST]
    code, found = run([*told_sweep, "--budgets", "100", "200", "--within", "100"], capsys, run_sweep)
    assert (code, found[-1]["failed"]) == (0, {})
    points = {point["floats"]: point for point in found[-1]["points"]}
    assert set(points) == {100, 200}
    assert points[200]["levels"] == {level: e["scores"]["adaptor"] for level, e in release.manifest["levels"].items()}
    recommended = store.pull("tiny:recommended").manifest
    assert recommended["budget"]["floats"] == 100
    assert recommended["config"]["selection"]["frequencies"] == {"jpeg-10": 1, "jpeg-20": 0, "jpeg-30": 5}
    assert run_sweep([*told_sweep, "--levels", "jpeg-10"]) == 2
    assert "levels lacks jpeg-20" in capsys.readouterr().err
