"""A sweep on a real Ray: what it finds, publishes, reuses and refuses, and what one failure costs."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import gearnn_ray
from gearnn_ray import Store
from gearnn_ray.cli import early_checks
from gearnn_ray.cli.main import run_split, run_sweep
from gearnn_ray.config.budget import budget_floats
from gearnn_ray.core.errors import UserError
from gearnn_ray.store import tables
from gearnn_ray.sweep import pipeline
from tests import tiny
from tests.test_pipeline import files

pytestmark = pytest.mark.usefixtures("ray_cluster")

LEVELS = ["clean", "jpeg-10", "jpeg-30", "brightness-0.4"]
SWEPT = ["jpeg-10", "brightness-0.4"]
BUDGETS = ["10%", "30%", "80%"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Path:
    """A folder with data, a network, a cache, and `released`: a store with a release and nothing else."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny.write_folder(folder / "data")
    tiny.write_weights(folder / "weights.safetensors")
    options = tiny.options(folder, levels=LEVELS, budget="30%", store=folder / "released")
    with tiny.without_figures():
        assert run_split([*options, "--json"]) == 0
    return folder


def told(folder: Path, store: str = "store", **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "store": folder / store, "release": "tiny", "trust": "tests", "data.cache": folder / "cache", "budgets": BUDGETS,
        "levels": SWEPT,
    } | changes  # fmt: skip
    line: list[str] = []
    for name, value in options.items():
        if value is not None:
            line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Exit code, result and events."""
    capsys.readouterr()
    code = run_sweep([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    lines = [json.loads(line) for line in out.splitlines()]
    return code, lines[-1], lines[:-1]


def made(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(level, stage) of what was computed, images aside."""
    return sorted((e["level"], e["stage"]) for e in lines if e["event"] == "finished" and e["stage"] != "images")


def test_every_budget_at_every_level_and_the_smallest_good_one_published(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(spec / "released", spec / "store")
    store = Store(spec / "store")
    latest, manifest = store.manifest("tiny")[0], store.manifest("tiny")[1].as_json()
    code, result, lines = run(told(spec, within=100), capsys)
    assert (code, result["failed"]) == (0, {})

    points = {point["budget"]: point for point in result["points"]}
    assert list(points) == BUDGETS
    assert all(point["complete"] and list(point["levels"]) == SWEPT for point in points.values())
    assert [p["floats"] for p in points.values()] == [budget_floats(b, manifest["model"]["floats"]) for b in BUDGETS]
    assert [p["bytes"] for p in points.values()] == sorted(p["bytes"] for p in points.values())
    released = {level: manifest["levels"][level]["scores"]["adaptor"] for level in SWEPT}
    assert points["30%"]["levels"] == released  # the split job's own, found in the store
    # full fine-tunes are the split's; of the adaptors those of its own budget are there
    assert made(lines) == sorted(
        [*((f"M = {b}", level) for b in ("10%", "80%") for level in SWEPT), ("M = 10%, the rest", "jpeg-30")]
    )

    assert re.match(r"Recommended: 10% \(\d+\.\d mIoU, \d+\.\d kB\)\. It is ", result["sentence"])
    digest, recommended = store.manifest("tiny:recommended")[0], store.manifest("tiny:recommended")[1].as_json()
    assert result["release"] == digest
    assert store.manifest("tiny")[0] == latest  # who follows it is not moved
    assert set(recommended["levels"]) == set(LEVELS)
    assert recommended["budget"] == {"asked": "10%", "floats": points["10%"]["floats"]}
    release = store.pull("tiny:recommended")
    for level in SWEPT:
        assert recommended["levels"][level]["scores"]["adaptor"] == points["10%"]["levels"][level]
        assert sum(t.numel() for t in release.adaptor_state(level).values()) <= points["10%"]["floats"]

    table = store.get_table(result["table"])
    assert table.column_names == [field.name for field in tables.SWEEP]
    assert [(r["budget"], r["level"]) for r in table.to_pylist()] == [(b, level) for b in BUDGETS for level in SWEPT]
    assert (spec / "store" / result["figure"]).read_bytes().startswith(b"\x89PNG")

    before = files(spec / "store")
    code, again, lines = run(told(spec, within=100), capsys)
    assert (code, again, made(lines)) == (0, result, [])
    assert files(spec / "store") == before

    data = {"cache": str(spec / "cache")}
    grid = gearnn_ray.sweep_budgets("tiny", str(spec / "store"), budgets=["10%"], levels=SWEPT, trust=["tests"], data=data)
    (best, point) = grid.get_best_result(), points["10%"]
    assert best.config["trial"] == {"label": "M = 10%", "budget": "10%", "floats": point["floats"], "importance": "mean-abs"}
    assert (best.metrics["scores"], best.metrics["mean"]) == (point["levels"], pytest.approx(point["score"]))
    (row,) = grid.get_dataframe().to_dict("records")
    assert (row["config/trial/budget"], row["mean"]) == ("10%", pytest.approx(point["score"]))
    assert "already in the store" in capsys.readouterr().out  # nothing was computed again


@pytest.mark.usefixtures("no_figures")
def test_values_are_swept_beside_budgets_and_codes_hold_more_in_as_many_bytes(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The release itself is made with codes, by modules and against a control; what the sweep publishes is so too."""
    options = tiny.options(spec, name="coded", levels=["jpeg-10"], budget="30%", store=spec / "coded")
    criterion = ["--selection.storage_formats", "float32", "bfloat16", "int8", "--selection.granularity", "module"]
    criterion += ["--selection.against", "clean"]
    assert run_split([*options, *criterion, "--json"]) == 0
    arguments = told(spec, "coded", release="coded", levels=["jpeg-10"], budgets=["10%"], within=0)
    # of one level ASHA has nothing to stop
    code, result, lines = run([*arguments, "--importance", "fisher", "sum-abs", "--asha", "True"], capsys)
    assert (code, result["failed"]) == (0, {})
    assert [(p["value"], p["budget"]) for p in result["points"]] == [(value, "10%") for value in ("fisher", "sum-abs")]
    assert not any(stage == "full" for _, stage in made(lines)), "the level's and the control's are the split's"
    store = Store(spec / "coded")
    manifest = store.manifest("coded:recommended")[1].as_json()
    assert manifest["schema"] == 2
    entry = manifest["levels"]["jpeg-10"]
    assert set(entry["storage_formats"].values()) & {"bfloat16", "int8"}
    assert manifest["config"]["selection"].items() >= {"granularity": "module", "against": "clean"}.items()
    best = max(result["points"], key=lambda p: p["score"])
    assert manifest["config"]["selection"]["importance"] in {p["value"] for p in result["points"] if p["score"] == best["score"]}
    # what was judged is what is restored
    release = store.pull("coded:recommended")
    assert entry["scores"]["adaptor"] == best["score"]
    assert all(torch.isfinite(tensor).all() for tensor in release.adaptor_state("jpeg-10").values())
    rows = store.get_table("tables/coded/selection/jpeg-10.parquet").to_pylist()
    assert {row["storage_format"] is not None for row in rows if row["selected"]} == {True}
    assert {row["storage_format"] for row in rows if not row["selected"]} <= {None}


@pytest.mark.usefixtures("no_figures")
def test_trials_that_fail_fail_the_job_by_name(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = tiny.options(spec, name="dark", levels=["jpeg-10"], budget="30%", store=spec / "dark")
    model = ["--model.name", "tests.nets:afraid_of_the_dark"]
    assert run_split([*options, *model, "--json"]) == 0
    levels = ["brightness-0.1", "jpeg-10"]
    code, result, _ = run(told(spec, "dark", release="dark", levels=levels, budgets=["30%", "80%"]), capsys)
    assert code == 1
    assert {"M = 30%", "M = 80%"} <= result["failed"].keys()
    assert "brightness-0.1: the loss became nan" in result["failed"]["M = 30%"]
    # of the release's own budget there is what the split left
    assert [list(point["levels"]) for point in result["points"]] == [["jpeg-10"], []]
    assert result["sentence"] == "No budget was evaluated at every level, so none is recommended."
    assert "recommended" not in Store(spec / "dark").tags("dark")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"release": "nothing"}, "No release nothing:latest"),
        ({"budgets": ["0.1%"]}, "fits no layer"),
        ({"budgets": ["lots"]}, "the budget 'lots' is not understood"),
        ({"budgets": ["30%", "30.00%"]}, "are the same number of floats"),
        ({"levels": ["clean"]}, "levels has clean, where nothing is adapted"),
        ({"levels": ["jpeg-10", "jpeg-10"]}, "is given twice"),
        ({"importance": ["luck"]}, "importance"),
        ({"within": -1}, "within"),
        ({"resources.cpus": 99}, "99"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_the_store_as_it_was(
    spec: Path, changes: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(spec / "released")
    assert run_sweep(told(spec, "released", **changes)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert files(spec / "released") == before


def test_how_it_ends_early(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((UserError("no"), 2), (KeyboardInterrupt(), 130)):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(early_checks, "check_release_job", lambda config: None)
        monkeypatch.setattr(pipeline, "sweep", fail)
        assert run_sweep(["--store", "/nowhere"]) == code
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("no_figures")
def test_killed_and_run_again_it_repeats_no_finished_adaptor(
    spec: Path, ray_cluster: Mapping[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(spec / "released", spec / "killed")
    arguments = told(spec, "killed", budgets=["80%"])
    job = tiny.start_job(arguments, "sweep.py", **ray_cluster)
    assert job.stdout is not None
    seen: list[dict[str, Any]] = []
    for line in job.stdout:
        seen += tiny.events(line)
        if made(seen):
            break
    job.kill()
    seen += tiny.events(job.communicate(timeout=60)[0])
    code, result, lines = run(arguments, capsys)
    assert (code, result["failed"]) == (0, {})
    assert made(seen)
    assert not set(made(lines)) & set(made(seen))
