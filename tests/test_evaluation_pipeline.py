"""An evaluation on a real Ray: what its tables hold, what it reuses, what it refuses, and what one failure costs."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
from PIL import Image

from gearnn_ray import Store
from gearnn_ray.adaptors.adaptor import put_adaptor
from gearnn_ray.cli.main import run_evaluate, run_split
from gearnn_ray.config.budget import budget_floats
from gearnn_ray.config.command_line import parse_command_line
from gearnn_ray.config.release_jobs import EvaluateConfig
from gearnn_ray.core.events import Event
from gearnn_ray.evaluation import findings, memory, pipeline
from gearnn_ray.evaluation.baselines import CONSTANT, TITLES
from gearnn_ray.evaluation.entropy import MixedByEntropy
from gearnn_ray.levels.level import parse_level
from gearnn_ray.models.registry import build_model
from gearnn_ray.reporting.progress import Plan
from gearnn_ray.store import tables
from gearnn_ray.tasks.base import score
from gearnn_ray.training.predict import Normalisation, Predictor, collect_evidence
from tests import tiny
from tests.conftest import SEGMENTATION
from tests.test_pipeline import files

pytestmark = pytest.mark.usefixtures("ray_cluster")

SEED = 3  # of the release
LEVELS = ["clean", "jpeg-10", "jpeg-30", "jpeg-60", "h264-32x24"]
DISTORTED = LEVELS[1:]
BASELINES = ["jpeg-10", "h264-32x24"]  # levels
RATES = [0.02, 0.1]  # neither is the release's
BUDGET, FURTHER = "30%", "80%"
ADAPTIVE_BASELINES = ["bn-statistics", "bn-tuned", "first-block", "auto-rgn", "random"]
CONSTANT_BASELINES = ["mixed", "stability", "clean-tuned"]
TUNED = {"switching", "gearnn", *CONSTANT_BASELINES, *ADAPTIVE_BASELINES} - {"bn-statistics"}


@dataclass
class Listener:
    """A reporter that only remembers."""

    events: list[Event] = field(default_factory=list)
    plan: dict[tuple[str, str], float] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def expect(self, plan: Plan) -> None:
        self.plan |= plan

    def places(self, *kinds: str) -> set[tuple[str, str]]:
        """(level, stage) of the events of these kinds."""
        return {(e.level, e.stage) for e in self.events if e.kind in kinds and e.stage != "images"}


def command_line(folder: Path, store: str = "store", **changes: Any) -> list[str]:
    """Command line of an evaluation of everything, in a folder that `tiny` filled."""
    given: dict[str, Any] = {
        "store": folder / store,
        "release": "tiny",
        "trust": "tests",
        "data.cache": folder / "cache",
        "baseline-levels": BASELINES,
        "untrained": ["jpeg-30"],
        "seeds": 2,
        "learning-rates": RATES,
        "tuning-level": "jpeg-10",
        "stability.alphas": [1],
        "stability.sigmas": [0.04, 0.1],
        "budgets": [FURTHER],
    } | changes
    line: list[str] = []
    for name, value in given.items():
        if value is not None:
            line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def evaluate(arguments: list[str]) -> tuple[findings.Outcome, Listener]:
    config, _ = parse_command_line(EvaluateConfig, arguments, "")
    with Listener() as said:
        return pipeline.evaluate(config, said, "jobs/evaluate.py --release tiny"), said


def mean_iou(model: Any, images: Sequence[Any], labels: Sequence[Any], normalisation: Normalisation) -> float:
    """In percent, over all these images."""
    (evidence,) = collect_evidence(SEGMENTATION, model, [Predictor(model, normalisation)], images, labels, tiny.CLASSES)
    return score(SEGMENTATION, evidence)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Path:
    """A folder with data, a network, a cache, and `released`: a store with a release and nothing else."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny.write_folder(folder / "data")
    tiny.write_weights(folder / "weights.safetensors")
    options = tiny.options(folder, levels=LEVELS, seed=SEED, budget=BUDGET, store=folder / "released")
    with tiny.without_figures():
        assert run_split([*options, "--json"]) == 0
    return folder


@dataclass(frozen=True)
class Done:
    """The evaluation that most tests look at."""

    folder: Path
    outcome: findings.Outcome
    said: Listener

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    @property
    def manifest(self) -> dict[str, Any]:
        return self.store.manifest("tiny")[1].as_json()

    def rows(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.store.get_table(f"tables/tiny/{name}.parquet").to_pylist()
        return found

    def values(self, method: str, level: str) -> list[float]:
        return [row["value"] for row in self.rows("accuracy") if (row["method"], row["level"]) == (method, level)]


@pytest.fixture(scope="module")
def done(spec: Path) -> Done:
    shutil.copytree(spec / "released", spec / "store")
    return Done(spec, *evaluate(command_line(spec)))


def cells(
    levels: Sequence[str], baselines: Sequence[str], seeds: int, adaptive: Sequence[str], constant: Sequence[str]
) -> set[tuple[str, str, int]]:
    """(method, level, seed) of what an evaluation should hold, as the issue says it; without untrained levels."""
    rows: set[tuple[str, str, int]] = set()
    for level in levels:
        rows.add(("original", level, SEED))
        if level == "clean":
            rows |= {(method, level, SEED) for method in ("switching", "gearnn", *adaptive, *constant)}
            continue
        mains = range(SEED, SEED + (seeds if level in baselines else 1))
        rows |= {(method, level, seed) for method in ("switching", "gearnn") for seed in mains}
        if level in baselines:
            rows |= {(method, level, SEED) for method in (*adaptive, *constant) if method != "random"}
            rows |= {("random", level, draw) for draw in range(2) if "random" in adaptive}
    return rows


def places_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return [(row["method"], row["level"], row["seed"]) for row in rows]


# ── what it finds ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_per_method_level_and_seed(done: Done) -> None:
    assert done.outcome.failed == {}
    table = done.store.get_table("tables/tiny/accuracy.parquet")
    assert table.column_names == ["method", "level", "metric", "value", "seed", "floats", "release"]
    found = places_of(table.to_pylist())
    assert max(Counter(found).values()) == 1
    expected = cells(LEVELS, BASELINES, 2, ADAPTIVE_BASELINES, CONSTANT_BASELINES)
    expected |= {("original-scaled", "h264-32x24", SEED)}  # at the other levels frames have the size of the training images
    expected |= {("gearnn-released", level, SEED) for level in DISTORTED}
    expected |= {(f"gearnn-{kind}", "jpeg-30", SEED) for kind in ("nearest", "interpolated", "entropy")}
    assert set(found) == expected
    assert table.to_pylist() == list(done.outcome.accuracy)
    assert set(table["metric"].to_pylist()) == {"mIoU"}
    assert set(table["release"].to_pylist()) == {done.store.manifest("tiny")[0]}
    assert all(0 <= value <= 100 for value in table["value"].to_pylist())
    order = [(list(TITLES).index(method), list(done.manifest["levels"]).index(level)) for method, level, _ in found]
    assert order == sorted(order)


def test_every_table_says_what_its_columns_are(done: Done) -> None:
    assert len(done.outcome.tables) == 9
    for path in done.outcome.tables:
        table = done.store.get_table(path)
        assert table.num_rows, path
        assert table.schema.metadata[b"gearnn_ray.schema"] == b"1"
        assert all(table.schema.field(name).metadata[b"description"] for name in table.column_names)
    names = {path.rpartition("/")[2].removesuffix(".parquet") for path in done.outcome.tables}
    schemas = {name: getattr(tables, "CHANGES" if name == "weight_changes" else name.removeprefix("changed_").upper())
               for name in names}  # fmt: skip
    for name, schema in schemas.items():
        assert done.store.get_table(f"tables/tiny/{name}.parquet").schema.equals(schema, check_metadata=True)


def test_what_was_released_scores_what_its_manifest_says(done: Done) -> None:
    for level, entry in done.manifest["levels"].items():
        assert done.values("original", level) == pytest.approx([entry["scores"]["original"]])
        if level != "clean":
            assert done.values("gearnn-released", level) == pytest.approx([entry["scores"]["adaptor"]])
    # undistorted, every adaptive method is the base itself
    for method in ("switching", "gearnn", *ADAPTIVE_BASELINES):
        assert done.values(method, "clean") == done.values("original", "clean")


def test_what_each_method_stores(done: Done) -> None:
    floats, budget = done.manifest["model"]["floats"], done.manifest["budget"]["floats"]
    for row in done.rows("accuracy"):
        method, stored = row["method"], row["floats"]
        if method in ("original", "original-scaled") or (row["level"] == "clean" and method not in CONSTANT):
            assert stored == 0, row
        elif method in ("switching", *CONSTANT_BASELINES):
            assert stored == floats, row
        elif method not in ("bn-statistics", "bn-tuned", "gearnn-interpolated", "gearnn-entropy"):
            assert 0 < stored <= budget, row
    stored_at = {(row["method"], row["level"]): row["floats"] for row in done.rows("accuracy") if row["seed"] == SEED}
    assert {stored_at["bn-statistics", level] for level in BASELINES} == {32}  # two BatchNorms of 8 channels
    assert {stored_at["bn-tuned", level] for level in BASELINES} == {64}
    assert stored_at["gearnn-nearest", "jpeg-30"] == stored_at["gearnn", "jpeg-10"]  # 20 away, and 30
    for level, entry in done.manifest["levels"].items():
        if level != "clean":
            assert stored_at["gearnn-released", level] == entry["floats"]


def test_seeds_and_draws_are_different_trainings(done: Done) -> None:
    for method in ("switching", "gearnn", "random"):
        assert any(len(set(done.values(method, level))) == 2 for level in BASELINES), method


def test_interpolated_adaptors_are_those_of_both_neighbours_mixed(done: Done) -> None:
    layers = [{row["layer"] for row in done.rows("weight_changes") if row["level"] == level and row["selected"]}
              for level in ("jpeg-10", "jpeg-60")]  # fmt: skip
    numel = {row["layer"]: row["numel"] for row in done.rows("weight_changes")}
    for method in ("gearnn-interpolated", "gearnn-entropy"):
        (row,) = (row for row in done.rows("accuracy") if row["method"] == method)
        assert row["floats"] == sum(numel[layer] for layer in layers[0] | layers[1])


def test_differences_and_averages_are_those_of_the_accuracy_rows(done: Done) -> None:
    # undistorted, whatever has weights per level is the base, and equal by definition
    compared = ("gearnn", *CONSTANT_BASELINES)
    there = [(m, q) for m, q, _ in places_of(done.rows("accuracy")) if q != "clean" or m in compared]
    mean = {place: fmean(done.values(*place)) for place in there}
    differences = done.rows("differences")
    assert {(row["method"], row["level"]) for row in differences} == {place for place in mean if place[0] != "gearnn"}
    for row in differences:
        place = row["method"], row["level"]
        assert row["value"] == pytest.approx(mean[place] - mean["gearnn", row["level"]])
        assert row["low"] <= row["value"] + 1e-9 or row["high"] >= row["value"] - 1e-9
        assert row["seeds"] == len(done.values(*place))
    axes = {"jpeg": {"jpeg-10", "jpeg-30", "jpeg-60"}, "h264-size": {"h264-32x24", "clean"}}
    averages = done.rows("averages")
    assert averages == list(done.outcome.averages)
    assert {(row["axis"], row["method"]) for row in averages} == {
        (axis, m) for axis, members in axes.items() for m, q in mean if q in members and m != "gearnn"
    }
    for row in averages:
        both = [level for level in axes[row["axis"]] if (row["method"], level) in mean]
        assert row["levels"] == len(both)
        assert row["average"] == pytest.approx(fmean(mean[row["method"], level] for level in both))
        assert row["gearnn"] == pytest.approx(fmean(mean["gearnn", level] for level in both))
        assert row["difference"] == pytest.approx(row["gearnn"] - row["average"])
        assert row["low"] <= row["high"]
    published = {row["method"]: row["published"] for row in averages}
    assert (published["original"], published["stability"], published["random"]) == (18.12, 4.84, None)


def held(done: Done, method: str, seed: int = SEED) -> tuple[int, int]:
    """|Q| and floats in memory, by the rows of the accuracy table."""
    stored = [row["floats"] for row in done.rows("accuracy")
              if (row["method"], row["seed"]) == (method, seed) and row["level"] != "clean"]  # fmt: skip
    return len(stored) + 1, done.manifest["model"]["floats"] + sum(stored)


def test_memory_by_formula_and_as_it_is(done: Done) -> None:
    floats, budget = done.manifest["model"]["floats"], done.manifest["budget"]["floats"]
    rows = done.rows("memory")
    by_formula = {(row["method"], row["levels"]): row["floats"] for row in rows if row["kind"] == "budget"}
    for line in memory.table_1(floats, budget):
        for method in ("original", "switching", "gearnn"):
            assert by_formula.pop((method, line["levels"])) == line[method]
    assert not by_formula
    actual = {row["method"]: (row["levels"], row["floats"]) for row in rows if row["kind"] == "actual"}
    assert actual.keys() == {"original", "switching", "gearnn", *CONSTANT_BASELINES, *ADAPTIVE_BASELINES}
    for method in ("switching", "gearnn", *ADAPTIVE_BASELINES):
        assert method == "random" or actual[method] == held(done, method)
    for method in ("original", *CONSTANT_BASELINES):
        assert actual[method] == (5, floats)
    assert actual["switching"] == (5, 5 * floats)
    assert all(row["of_network"] == pytest.approx(row["floats"] / floats) for row in rows)


def test_memory_of_random_layers_is_that_of_a_draw(done: Done) -> None:
    # draws count from 0, whatever the release's seed
    (row,) = (row for row in done.rows("memory") if (row["method"], row["kind"]) == ("random", "actual"))
    assert (row["levels"], row["floats"]) in [held(done, "random", draw) for draw in range(2)]


def test_one_learning_rate_of_the_grid_is_chosen_for_each_method(done: Done) -> None:
    grid = [row for row in done.rows("tuning") if row["alpha"] is None]
    assert {row["method"] for row in grid} == TUNED
    assert {row["level"] for row in grid} == {"jpeg-10"}
    for method in TUNED:
        tried = {row["learning_rate"]: row for row in grid if row["method"] == method}
        assert sorted(tried) == RATES
        (chosen,) = (row for row in tried.values() if row["chosen"])
        assert chosen["value"] == max(row["value"] for row in tried.values())


def test_one_setting_of_stability_is_chosen(done: Done) -> None:
    grid = [row for row in done.rows("tuning") if row["alpha"] is not None]
    assert {row["method"] for row in grid} == {"stability"}
    places = {(row["level"], row["alpha"], row["sigma"]) for row in grid}
    assert places == {(level, 1.0, sigma) for level in (*BASELINES, "clean") for sigma in (0.04, 0.1)}
    assert len(grid) == len(places)
    average = {sigma: fmean(row["value"] for row in grid if row["sigma"] == sigma) for sigma in (0.04, 0.1)}
    best = max(average, key=average.__getitem__)
    assert {row["sigma"] for row in grid if row["chosen"]} == {best}
    for row in grid:
        if row["chosen"]:
            assert row["value"] == done.values("stability", row["level"])[0]


def test_no_setting_has_two_values(done: Done) -> None:
    settings = ("method", "level", "learning_rate", "alpha", "sigma")
    assert max(Counter(tuple(row[name] for name in settings) for row in done.rows("tuning")).values()) == 1


def test_accuracy_per_byte(done: Done) -> None:
    rows, own = done.rows("bytes"), done.manifest["budget"]["floats"]
    further = budget_floats(FURTHER, done.manifest["model"]["floats"])
    evaluated = {method for method, level, _ in places_of(done.rows("accuracy")) if level == "jpeg-10"}
    assert {row["level"] for row in rows} == {"jpeg-10"}
    assert Counter(row["method"] for row in rows) == Counter([*evaluated, "gearnn"])
    for row in rows:
        assert (row["budget"] is not None) == (row["method"] == "gearnn")
        if row["budget"] != further:
            assert row["value"] == pytest.approx(fmean(done.values(row["method"], "jpeg-10")))
    curve = {row["budget"]: row["floats"] for row in rows if row["method"] == "gearnn"}
    assert curve.keys() == {own, further}
    assert curve[own] <= own < curve[further] <= further


def test_weight_changes_and_what_the_adaptors_hold_of_them(done: Done) -> None:
    rows = done.rows("weight_changes")
    floats = {(row["method"], row["level"]): row["floats"] for row in done.rows("accuracy") if row["seed"] == SEED}
    for level in DISTORTED:
        own = [row for row in rows if row["level"] == level]
        assert sum(row["numel"] for row in own) == done.manifest["model"]["floats"]
        assert sum(row["numel"] for row in own if row["selected"]) == floats["gearnn", level]
    assert {row["level"] for row in rows} == set(DISTORTED)
    shares = done.rows("changed_shares")
    assert [row["level"] for row in shares] == [level for level in done.manifest["levels"] if level != "clean"]
    assert all(0 < row["by_layer"] <= 1 and 0 < row["by_weight"] <= 1 for row in shares)


def test_frequency_responses(done: Done) -> None:
    rows = done.rows("frequency")
    assert [(r["network"], r["level"], r["vertical"], r["horizontal"]) for r in rows] == [
        (network, "jpeg-10", v, h) for network in ("original", "switching", "gearnn") for v in range(8) for h in range(8)
    ]
    assert all(row["magnitude"] > 0 for row in rows)
    magnitudes = np.array([row["magnitude"] for row in rows]).reshape(3, 64)
    assert not np.allclose(magnitudes[0], magnitudes[1])
    assert not np.allclose(magnitudes[1], magnitudes[2])


def test_the_report_is_one_page_about_all_of_it(done: Done) -> None:
    page = (done.folder / "store" / done.outcome.report).read_text(encoding="utf-8")
    assert done.outcome.report == "reports/tiny/evaluation.html"
    evaluated = {row["method"] for row in done.rows("accuracy")}
    assert all(TITLES[method] in page for method in evaluated)
    assert not re.search("https?://(?!www.w3.org/2000/svg)", page)
    assert "<script" not in page
    assert page.count("jobs/evaluate.py --release tiny") >= len(done.outcome.figures)
    assert "6 validation images of" in page
    for path in done.outcome.figures:
        assert path.startswith("figures/tiny/evaluation/")
        assert Image.open(done.folder / "store" / path).size[0] > 300
    names = {Path(path).name for path in done.outcome.figures}
    assert names >= {"accuracy_jpeg.png", "accuracy_h264-size.png", "frequency.png", "picture_1.png", "picture_3.png"}
    worst = sorted(DISTORTED, key=lambda level: done.values("original", level)[0])[:3]
    captions = [page.index(f" at {level}. This image") for level in worst]
    assert captions == sorted(captions)


def test_the_release_is_as_it_was(done: Done) -> None:
    """What the split job published stays, byte for byte; an evaluation only adds to it."""
    before, after = (files(done.folder / name) for name in ("released", "store"))
    assert before.items() <= after.items()


def test_what_was_to_be_expected_was_done(done: Done) -> None:
    """Else the remaining time never reaches zero."""
    assert done.said.plan.keys() <= done.said.places("finished", "reused")


# ── what it reuses ───────────────────────────────────────────────────────────────────────────────────────────────


def test_running_again_computes_nothing_and_changes_nothing(done: Done) -> None:
    before = files(done.folder / "store")
    outcome, said = evaluate(command_line(done.folder))
    assert outcome == done.outcome
    assert {event.kind for event in said.events if event.stage != "images"} == {"reused"}
    assert files(done.folder / "store") == before


@pytest.mark.usefixtures("no_figures")
def test_only_what_is_missing_is_computed(done: Done, tmp_path: Path) -> None:
    """One more level for the baselines and one more seed."""
    shutil.copytree(done.folder / "store", tmp_path / "store")
    cache = str(done.folder / "cache")
    more: dict[str, Any] = {"baseline-levels": [*BASELINES, "jpeg-60"], "data.cache": cache}
    outcome, said = evaluate(command_line(tmp_path, seeds=3, **more))
    assert outcome.failed == {}
    there = ["bn-statistics", "bn-tuned", "first-block", "auto-rgn", "random draw 1", "random draw 2", "evaluation"]
    there += [f"{stage} seed {seed}" for stage in ("switching", "selection", "gearnn") for seed in (4, 5)]
    again = ["switching seed 5", "selection seed 5", "gearnn seed 5", "evaluation"]
    expected = {("jpeg-60", stage) for stage in there} | {(level, stage) for level in BASELINES for stage in again}
    assert said.places("started") == expected
    assert said.places("finished") == expected
    new = {(row["method"], row["level"], row["seed"]): row for row in outcome.accuracy}
    assert all(new[place] == row for place, row in zip(places_of(done.outcome.accuracy), done.outcome.accuracy, strict=True))
    added = cells(LEVELS, [*BASELINES, "jpeg-60"], 3, ADAPTIVE_BASELINES, CONSTANT_BASELINES)
    assert set(places_of(outcome.accuracy)) == added | set(places_of(done.outcome.accuracy))


@pytest.mark.usefixtures("no_figures")
def test_a_lost_blob_is_made_again(done: Done, tmp_path: Path) -> None:
    shutil.copytree(done.folder / "store", tmp_path / "store")
    kept = tiny.blobs(done.folder / "released")
    for name in tiny.blobs(tmp_path / "store") - kept:
        (tmp_path / "store/blobs/sha256" / name).unlink()
    options: dict[str, Any] = {"levels": ["jpeg-10"], "baseline-levels": ["jpeg-10"], "untrained": None, "methods": ["bn-tuned"]}
    options["data.cache"] = done.folder / "cache"
    outcome, _ = evaluate(command_line(tmp_path, seeds=1, **options))
    assert outcome.failed == {}
    before = {(row["method"], row["level"], row["seed"]): row["value"] for row in done.outcome.accuracy}
    found = {(row["method"], row["level"], row["seed"]): row["value"] for row in outcome.accuracy}
    assert {method for method, _, _ in found} == {"original", "switching", "gearnn", "gearnn-released", "bn-tuned"}
    assert found.items() <= before.items()


@pytest.mark.usefixtures("no_figures")
def test_with_the_releases_own_learning_rate_its_adaptors_are_gearnns(spec: Path, tmp_path: Path) -> None:
    shutil.copytree(spec / "released", tmp_path / "store")
    options: dict[str, Any] = {"levels": ["clean", "jpeg-10", "jpeg-60"], "methods": ["clean-tuned"], "learning-rates": None}
    options |= {"untrained": None, "baseline-levels": None, "tuning-level": None, "data.cache": spec / "cache"}
    outcome, said = evaluate(command_line(tmp_path, seeds=1, **options))
    assert outcome.failed == {}
    levels = Store(tmp_path / "store").manifest("tiny")[1].as_json()["levels"]
    worst = min(("jpeg-10", "jpeg-60"), key=lambda level: levels[level]["scores"]["original"])
    asked = ["clean", "jpeg-10", "jpeg-60"]
    assert set(places_of(outcome.accuracy)) == cells(asked, [worst], 1, [], ["clean-tuned"])
    for row in outcome.accuracy:
        scores = levels[row["level"]]["scores"]
        if row["level"] != "clean" and row["method"] in ("switching", "gearnn"):
            assert row["value"] == pytest.approx(scores["full" if row["method"] == "switching" else "adaptor"])
    # the split job keeps no full fine-tunes; its adaptors it does. The worst level has another budget's, too
    assert ("jpeg-60", "switching") in said.places("started")
    assert {level for level, stage in said.places("started") if stage == "gearnn"} == {worst}
    assert {row["level"] for row in Store(tmp_path / "store").get_table("tables/tiny/bytes.parquet").to_pylist()} == {worst}
    assert Store(tmp_path / "store").get_table("tables/tiny/tuning.parquet").num_rows == 0


@pytest.mark.usefixtures("no_figures")
def test_the_control_is_made_once_per_seed_before_the_levels(spec: Path, tmp_path: Path) -> None:
    options = tiny.options(spec, levels=["jpeg-10", "jpeg-60"], seed=SEED, budget=BUDGET, store=tmp_path / "store")
    assert run_split([*options, "--selection.against", "clean", "--selection.granularity", "module", "--json"]) == 0
    changes = {"levels": ["jpeg-10", "jpeg-60"], "baseline-levels": ["jpeg-10"], "methods": None, "learning-rates": None}
    changes |= {"untrained": None, "tuning-level": None, "data.cache": spec / "cache"}
    outcome, said = evaluate([*command_line(tmp_path, **changes), "--methods"])
    assert outcome.failed == {}
    control = [event.kind for event in said.events if (event.level, event.stage) == ("clean", "full")]
    assert sorted(kind for kind in control if kind != "progress") == ["finished", "reused", "started"]
    assert ("clean", "full") in said.plan
    fulls = {(e.level, e.stage) for e in said.events if e.kind == "started" and e.stage.startswith(("full", "switching"))}
    assert fulls == {("clean", "full"), ("jpeg-10", f"switching seed {SEED + 1}")}
    levels = Store(tmp_path / "store").manifest("tiny")[1].as_json()["levels"]
    for row in outcome.accuracy:
        if row["method"] == "gearnn" and row["seed"] == SEED:
            entry = levels[row["level"]]
            assert (row["value"], row["floats"]) == (pytest.approx(entry["scores"]["adaptor"]), entry["floats"])


@pytest.mark.usefixtures("no_figures")
def test_an_untrained_level_has_its_neighbours_adaptors(spec: Path, tmp_path: Path) -> None:
    """Against the released adaptors, put together and evaluated here."""
    shutil.copytree(spec / "released", tmp_path / "store")
    options: dict[str, Any] = {
        "levels": ["jpeg-10", "jpeg-30", "jpeg-60"],
        "baseline-levels": ["jpeg-10"],
        "methods": ["bn-statistics"],
        "learning-rates": None,
        "data.cache": spec / "cache",
    }
    outcome, _ = evaluate(command_line(tmp_path, seeds=1, **options))
    release = Store(tmp_path / "store").pull("tiny")
    base, lower, upper = release.base_state(), release.adaptor_state("jpeg-10"), release.adaptor_state("jpeg-60")
    about = release.manifest["model"]["normalisation"]
    normalisation = Normalisation(tuple(about["mean"]), tuple(about["std"]))
    folder = spec / "data/val"
    images = parse_level("jpeg-30").apply([np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())])
    labels = [np.asarray(Image.open(path)) for path in sorted((folder / "labels").iterdir())]
    mixture = {n: 0.6 * lower.get(n, base[n]) + 0.4 * upper.get(n, base[n]) for n in base if n in lower or n in upper}
    model = build_model("tests.nets:small", tiny.CLASSES)
    for method, state in (("nearest", lower), ("interpolated", mixture)):
        put_adaptor(model, base, state)
        expected = mean_iou(model, images, labels, normalisation)
        (row,) = (row for row in outcome.accuracy if row["method"] == f"gearnn-{method}")
        assert row["value"] == pytest.approx(expected, abs=0.1)
    put_adaptor(model, base, upper)
    assert abs(mean_iou(model, images, labels, normalisation) - expected) > 0.2
    put_adaptor(model, base, {})
    mixed = MixedByEntropy(SEGMENTATION, model, base, lower, upper)
    (evidence,) = collect_evidence(SEGMENTATION, model, [Predictor(mixed, normalisation)], images, labels, tiny.CLASSES)
    (row,) = (row for row in outcome.accuracy if row["method"] == "gearnn-entropy")
    assert row["value"] == pytest.approx(score(SEGMENTATION, evidence), abs=0.1)


# ── what a failure costs ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("no_figures")
def test_what_fails_takes_nothing_else_down(tmp_path: Path, capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    """This network's loss is NaN on dark images: at one level nothing can be trained, nor one network for all."""
    tiny.write_folder(tmp_path / "data")
    tiny.write_weights(tmp_path / "weights.safetensors")
    changes: dict[str, Any] = {"model.name": "tests.nets:afraid_of_the_dark", "data.cache": spec / "cache"}
    assert run_split([*tiny.options(tmp_path, levels=["brightness-0.8"], seed=SEED, **changes), "--json"]) == 0
    levels = ["brightness-0.01", "brightness-0.7", "brightness-0.8", "clean"]
    baselines = ["brightness-0.01", "brightness-0.8"]
    options: dict[str, Any] = {
        "levels": levels,
        "baseline-levels": baselines,
        "untrained": ["brightness-0.7"],
        "data.cache": spec / "cache",
    }
    options |= {"methods": ["mixed", "clean-tuned", "bn-statistics", "bn-tuned"], "tuning-level": "brightness-0.01"}
    capsys.readouterr()
    code = run_evaluate([*command_line(tmp_path, **options), "--json"])
    out = capsys.readouterr()
    result = json.loads(out.out.splitlines()[-1])
    assert code == 1, out.err
    failed, between = result["failed"], "brightness-0.7 by its neighbours"
    assert failed.keys() == {between,
        "mixed", "brightness-0.01 layers", "brightness-0.01 bn-tuned",
        "brightness-0.01 switching and gearnn", f"brightness-0.01 switching and gearnn seed {SEED + 1}",
    }  # fmt: skip
    for unit, reason in failed.items():
        said = "brightness-0.01 and brightness-0.8" if unit == between else "the loss became nan in epoch 1 of 3"
        assert said in reason
    lost = [("mixed", level) for level in levels]
    lost += [(method, "brightness-0.01") for method in ("switching", "gearnn", "bn-tuned")]
    expected = {row for row in cells(levels, baselines, 2, ["bn-statistics", "bn-tuned"], ["mixed", "clean-tuned"])
                if row[:2] not in lost}  # fmt: skip
    found = [place for place in places_of(result["accuracy"]) if place[0] != "gearnn-released"]
    assert max(Counter(found).values()) == 1
    assert set(found) == expected  # without neighbours on both sides nothing is interpolated
    page = (tmp_path / "store" / result["report"]).read_text(encoding="utf-8")
    assert all(unit in page for unit in failed)


# ── what it refuses ──────────────────────────────────────────────────────────────────────────────────────────────


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _another_image(folder: Path) -> None:
    Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(folder / "data/val/images/002.png")


def _other_data(folder: Path) -> None:
    shutil.copytree(folder / "data", folder / "other")
    Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(folder / "other/train/images/002.png")


def _no_ref(folder: Path) -> None:
    (folder / "store/refs/tiny/latest").write_text("nothing of the kind")


BAD: dict[str, tuple[dict[str, Any], Callable[[Path], object] | None, str]] = {
    "no such release": ({"release": "other"}, None, "No release other:latest"),
    "no such store": ({"store": "/proc/nowhere"}, None, "/proc/nowhere"),
    "a baseline level that is not evaluated": ({"baseline-levels": ["jpeg-20"]}, None, "the level jpeg-20 is not among"),
    "an untrained one": ({"untrained": ["jpeg-20"]}, None, "the level jpeg-20 is not among"),
    "one to tune at": ({"tuning-level": "jpeg-20"}, None, "the level jpeg-20 is not among"),
    "one for budgets": ({"budget-levels": ["jpeg-20"]}, None, "the level jpeg-20 is not among"),
    "one for frequencies": ({"frequency-levels": ["jpeg-20"]}, None, "the level jpeg-20 is not among"),
    "tuned undistorted": ({"tuning-level": "clean"}, None, "tuning_level has clean, where nothing is adapted"),
    "budgets undistorted": ({"budget-levels": ["clean"]}, None, "budget_levels has clean"),
    "frequencies undistorted": ({"frequency-levels": ["clean"]}, None, "frequency_levels has clean"),
    "untrained at the end": ({"untrained": ["jpeg-10"]}, None, "jpeg-10 does not lie between"),
    "untrained beside untrained": ({"untrained": ["jpeg-30", "jpeg-60"]}, None, "jpeg-30 does not lie between"),
    "untrained and undistorted": ({"untrained": ["clean"]}, None, "clean does not lie between"),
    "nothing distorted": (
        {"levels": ["clean"], "baseline-levels": None, "untrained": None, "tuning-level": None}, None, "levels has only clean",
    ),
    "a budget that fits no layer": ({"budgets": ["80%", "2"]}, None, "a budget of 2 floats fits no layer"),
    "another image": ({}, _another_image, "the val images"),
    "other data": ({"data.path": "other"}, _other_data, "the train images"),
    "no data": ({"data.path": "nowhere"}, None, "nowhere"),
    "a truncated image": ({}, lambda f: _truncate(f / "data/train/images/005.png"), "train"),
    "more CPUs than there will ever be": ({"resources.cpus": 64}, None, "64 CPU"),
    "more GPUs than there will ever be": ({"resources.gpus": 3}, None, "3 GPU"),
    "a torn manifest": ({}, lambda f: _truncate(next((f / "store/manifests").iterdir())), "is altered"),
    "a tag that is no digest": ({}, _no_ref, "refs/tiny/latest"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_leaves_the_store_as_it_was(
    what: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, damage, found = BAD[what]
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    if damage is not None:
        damage(tmp_path)
    before = files(tmp_path)
    changes = {k: tmp_path / v if k == "data.path" else v for k, v in changes.items()}
    code = run_evaluate([*command_line(tmp_path, **{"data.path": tmp_path / "data"} | changes), "--json"])
    out = capsys.readouterr()
    assert code == 2
    assert found in out.err
    assert out.err.startswith("error: ")
    assert out.err.count("\n") == 1
    assert "Traceback" not in out.err
    assert not tiny.events(out.out)
    assert files(tmp_path) == before


@pytest.fixture(scope="module")
def small(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a store of their own, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(spec / "data", folder / "data")
    shutil.copytree(spec / "released", folder / "store")
    return folder
