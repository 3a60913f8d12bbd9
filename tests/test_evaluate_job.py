"""`jobs/evaluate.py` as its user sees it: what it refuses, what it prints, how it exits; and `kill -9` of it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from gearnn_ray import evaluation
from gearnn_ray.cli import early_checks
from gearnn_ray.cli.main import run_evaluate, run_split
from gearnn_ray.config.release_jobs import EvaluateConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Event
from gearnn_ray.evaluation.baselines import TITLES
from gearnn_ray.reporting.progress import Reporter, reporter
from gearnn_ray.store.releases import Store
from tests import tiny
from tests.conftest import ROOT
from tests.nets import Small
from tests.running_jobs import GATES, Job, closed, descendants, wait_until_gone


@dataclass(frozen=True)
class Outcome:
    """An outcome as the pipeline hands it over."""

    accuracy: tuple[dict[str, Any], ...] = ()
    averages: tuple[dict[str, Any], ...] = ()
    report: str = "reports/tiny.html"
    tables: tuple[str, ...] = ("tables/tiny/accuracy.parquet",)
    figures: tuple[str, ...] = ("figures/tiny/averages.png",)
    failed: dict[str, str] = field(default_factory=dict)


def accuracy(method: str, level: str, value: float, seed: int = 0) -> dict[str, Any]:
    return {
        "method": method, "level": level, "metric": "mIoU", "value": value, "seed": seed, "floats": 1, "release": "sha256:0",
    }  # fmt: skip


def average(method: str, low: float, high: float) -> dict[str, Any]:
    return {
        "axis": "jpeg", "method": method, "levels": 4, "average": 50.0, "gearnn": 50.0 + (low + high) / 2,
        "difference": (low + high) / 2, "low": low, "high": high, "published": None,
    }  # fmt: skip


ACCURACY = (
    accuracy("gearnn", "jpeg-10", 51.0, 0), accuracy("gearnn", "jpeg-10", 52.0, 1), accuracy("original", "jpeg-10", 43.21),
    accuracy("original", "jpeg-100", 60.0),
)  # fmt: skip
AVERAGES = (average("gearnn", 0, 0), average("original", 8.0, 9.5), average("bn-tuned", -1.0, 0.5), average("switching", -3, -1))


def job(monkeypatch: pytest.MonkeyPatch, outcome: Outcome | BaseException) -> list[tuple[EvaluateConfig, str]]:
    """In the pipeline's place: says one thing and ends so. Returns what it is told."""
    told: list[tuple[EvaluateConfig, str]] = []

    def evaluate(config: EvaluateConfig, emit: Reporter, command: str) -> Outcome:
        told.append((config, command))
        emit.expect({("jpeg-10", "evaluation"): 1.0})
        emit(Event("finished", "evaluation", "jpeg-10"))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    fake = ModuleType("gearnn_ray.evaluation.pipeline")
    fake.evaluate = evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(evaluation, "pipeline", fake, raising=False)
    monkeypatch.setattr(early_checks, "check_release_job", lambda config: None)
    return told


def test_what_is_wrong_is_one_sentence_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    line = [sys.executable, str(ROOT / "jobs/evaluate.py"), "--levels", "jpeg-101"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    said = [(done.returncode, done.stdout, done.stderr)]
    for arguments in (["--config", "nowhere.yaml"], ["--speed", "3"], ["--methods", "magic"], ["--release", "../x"]):
        said.append((run_evaluate(arguments), *capsys.readouterr()))
    for code, out, err in said:
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert os.access(ROOT / "jobs/evaluate.py", os.X_OK)


def test_levels_are_checked_before_a_cluster_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gearnn_ray.evaluation import pipeline

    manifest = SimpleNamespace(levels={"clean": None, "jpeg-10": None, "jpeg-30": None})
    monkeypatch.setattr(Store, "manifest", lambda store, ref: ("sha256:0", manifest))
    monkeypatch.setattr(pipeline, "job_tasks", lambda *_: pytest.fail("a cluster was started"))
    for options, sentence in (
        ({"tuning_level": "jpeg-20"}, "the level jpeg-20 is not among the levels evaluated"),
        ({"budget_levels": ("jpeg-5",)}, "the level jpeg-5 is not among the levels evaluated"),
        ({"untrained": ("jpeg-10",)}, "the untrained level jpeg-10 does not lie between"),
    ):
        config = EvaluateConfig.model_validate({"store": str(tmp_path), **options})
        with pytest.raises(UserError, match=sentence):
            pipeline.evaluate(config, reporter({}, json_lines=True), "")


def test_it_prints_scores_verdicts_and_where_things_lie(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = job(monkeypatch, Outcome(ACCURACY, AVERAGES))
    assert run_evaluate(["--store", "/s", "--release", "tiny", "--data.path", "/my data"]) == 0
    assert told[0][1] == "jobs/evaluate.py --store /s --release tiny --data.path '/my data'"
    assert told[0][0].release == "tiny:latest"
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["jpeg-10", "43.2", "51.5"] in lines  # the mean over seeds
    assert ["jpeg-100", "60.0", "-"] in lines
    assert ["jpeg", "4", "wins", "original", "+8.75", "+8.00", "to", "+9.50"] in lines
    assert ["jpeg", "4", "ties", "bn-tuned", "-0.25", "-1.00", "to", "+0.50"] in lines
    assert ["jpeg", "4", "loses", "switching", "-2.00", "-3.00", "to", "-1.00"] in lines
    assert sum(line[:2] == ["jpeg", "4"] for line in lines) == 3  # none against itself
    assert lines[-3:] == [
        ["report:", "/s/reports/tiny.html"],
        ["table:", "/s/tables/tiny/accuracy.parquet"],
        ["figure:", "/s/figures/tiny/averages.png"],
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_table_is_no_wider_than_the_terminal_and_leaves_nothing_out(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    levels = ("brightness-0.4+jpeg-30", "h264-512x256")
    scores = {(m, level): 10.1 + 3 * i for i, (m, level) in enumerate((m, level) for m in TITLES for level in levels)}
    job(monkeypatch, Outcome(tuple(accuracy(*place, value) for place, value in scores.items())))
    assert run_evaluate(["--store", "/s"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    for level in levels:
        shown = [value for line in out.splitlines() if line.startswith(level) for value in line.split()[1:]]
        assert shown == [f"{scores[method, level]:.1f}" for method in TITLES]


def test_machines_get_one_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    job(monkeypatch, Outcome(ACCURACY, AVERAGES, failed={"mixed": "no memory"}))
    assert run_evaluate(["--store", "/s", "--json"]) == 1
    said, result = map(json.loads, capsys.readouterr().out.splitlines())
    assert (said["event"], said["stage"]) == ("finished", "evaluation")
    assert result["event"] == "result"
    assert result["accuracy"] == list(ACCURACY)
    assert result["averages"] == list(AVERAGES)
    assert (result["release"], result["store"]) == ("drn22-scenes-jpeg:latest", "/s")
    assert (result["report"], result["failed"]) == ("reports/tiny.html", {"mixed": "no memory"})


@pytest.mark.parametrize(
    ("ends", "code", "sentence"),
    [
        (UserError("there is no release tiny: publish one"), 2, "error: there is no release tiny: publish one\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; run the same command again to continue\n"),
    ],
)
def test_how_it_ends_early(
    ends: BaseException, code: int, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job(monkeypatch, ends)
    assert run_evaluate([]) == code
    assert capsys.readouterr().err == sentence


def test_a_failure_is_said_beside_what_was_evaluated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    job(monkeypatch, Outcome(ACCURACY, failed={"mixed, all levels": "the loss is [nan]"}))
    assert run_evaluate(["--store", "/s"]) == 1
    out = capsys.readouterr().out
    assert "mixed, all levels failed: the loss is [nan]\n" in out
    assert "43.2" in out
    assert "average of each axis" not in out


# ── kill -9 ──────────────────────────────────────────────────────────────────────────────────────────────────────

BRIGHT, DARK = ["jpeg-10", "jpeg-60"], "brightness-0.1"
EPOCHS, STEPS = 4, 4  # of one fine-tune, and of one epoch
GATE = 2 * STEPS + 1  # a training step of the third epoch


class _Gated(Small):
    """Waits in the third epoch on dark images while the gate is closed: all other levels go on meanwhile."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.mean() < -1.5:
            while self.steps >= GATE and (GATES / str(GATE)).exists():
                time.sleep(0.02)
            self.steps += 1
        return super().forward(x)


def gated(num_classes: int) -> nn.Module:
    return _Gated(num_classes)


def told(spec: Path, store: str) -> list[str]:
    return [
        "--store", str(spec / store), "--release", "tiny", "--trust", "tests", "--data.cache", str(spec / "cache"),
        "--levels", "clean", *BRIGHT, DARK, "--baseline-levels", BRIGHT[0],
        "--methods", "clean-tuned", "bn-statistics", "bn-tuned", "random", "--draws", "1",
        "--tuning-level", BRIGHT[0], "--budgets", "60%", "--json",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Path:
    """A folder with a release of one level in the store `released`."""
    folder = tmp_path_factory.mktemp("killed")
    tiny.write_folder(folder / "data", train=16)
    tiny.write_weights(folder / "weights.safetensors")
    changes = {"model.name": "tests.test_evaluate_job:gated", "recipe.epochs": EPOCHS, "store": folder / "released"}
    with tiny.without_figures():
        assert run_split([*tiny.options(folder, levels=BRIGHT[:1], **changes), "--json"]) == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(spec: Path) -> dict[str, Any]:
    """The result of an evaluation that nobody kills."""
    shutil.copytree(spec / "released", spec / "undisturbed")
    with tiny.without_figures():
        return run_here(spec, "undisturbed")[-1]


def run_here(spec: Path, store: str) -> list[dict[str, Any]]:
    """A job on the Ray of all tests, which must succeed: its events and its result."""
    said = Said()
    with contextlib.redirect_stdout(said):
        assert run_evaluate(told(spec, store)) == 0
    return said.lines


class Said:
    """Standard output whose events can be watched from another thread."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self._text = ""

    def write(self, text: str) -> int:
        *whole, self._text = (self._text + text).split("\n")
        for line in whole:
            self.lines += tiny.events(line)
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def places(kind: str, lines: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(e["level"], e["stage"]) for e in lines if e["event"] == kind and e["stage"] != "images"]


def only_darkness_is_left(lines: Sequence[dict[str, Any]]) -> bool:
    """All other levels are evaluated, and the dark one's fine-tune has done two epochs of four."""
    evaluated = {level for level, stage in places("finished", lines) if stage == "evaluation"}
    waits = any(e["event"] == "progress" and (e["level"], e["stage"], e["epoch"]) == (DARK, "switching", 2) for e in lines)
    return waits and evaluated >= {"clean", *BRIGHT}


def assert_same(spec: Path, store: str, result: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    assert result["accuracy"] == undisturbed["accuracy"]
    assert result["averages"] == undisturbed["averages"]
    assert tiny.blobs(spec / store) == tiny.blobs(spec / "undisturbed")
    stages = [{path.name for path in (spec / folder / "stages").iterdir()} for folder in (store, "undisturbed")]
    assert stages[0] == stages[1]
    assert not list((spec / store / "checkpoints").iterdir())


@pytest.mark.usefixtures("no_figures")
def test_killed_and_run_again_it_repeats_nothing_it_had_finished(
    spec: Path, undisturbed: dict[str, Any], ray_cluster: Mapping[str, str]
) -> None:
    """As a process of its own on the Ray of all tests, which ends the tasks of a driver that is gone."""
    shutil.copytree(spec / "released", spec / "driver")
    with closed(GATE):
        job = Job(tiny.start_job(told(spec, "driver")[:-1], "evaluate.py", **ray_cluster))
        try:
            job.wait_for(only_darkness_is_left)
        finally:
            workers, _ = descendants(os.getpid())
            job.process.kill()
            job.end()
            wait_until_gone(workers, [])
    assert len(workers) == 1
    assert len(list((spec / "driver/checkpoints").iterdir())) == 1
    *lines, result = run_here(spec, "driver")
    finished = set(places("finished", job.lines))
    assert not finished & set(places("started", lines))
    assert finished <= set(places("reused", lines))
    # what was under way goes on with its third epoch
    assert (DARK, "switching") in places("started", lines)
    assert {e["epoch"] for e in lines if e["event"] == "progress" and e["stage"] == "switching"} == {3, 4}
    assert_same(spec, "driver", result, undisturbed)


@pytest.mark.usefixtures("no_figures")
def test_a_killed_worker_costs_an_epoch(spec: Path, undisturbed: dict[str, Any]) -> None:
    shutil.copytree(spec / "released", spec / "worker")
    said, codes = Said(), list[int]()
    killed: list[psutil.Process] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not only_darkness_is_left(said.lines) and time.monotonic() < deadline:
            time.sleep(0.05)
        killed.extend(descendants(os.getpid())[0])
        for process in killed:
            process.kill()
        (GATES / str(GATE)).unlink()

    with closed(GATE), contextlib.redirect_stdout(said):
        killer = threading.Thread(target=kill)
        killer.start()
        codes.append(run_evaluate(told(spec, "worker")))
        killer.join()
    assert codes == [0]
    assert len(killed) == 1
    *lines, result = said.lines
    assert places("started", lines).count((DARK, "switching")) == 2
    third = [e for e in lines if e["event"] == "progress" and (e["level"], e["stage"]) == (DARK, "switching")]
    assert [e["epoch"] for e in third if e["step"] % STEPS == 0] == [1, 2, 3, 4]
    assert max(places("started", lines).count(place) for place in places("started", lines)) == 2
    assert_same(spec, "worker", result, undisturbed)


@pytest.fixture(autouse=True)
def _no_orphans() -> Iterator[None]:
    yield
    for process in psutil.Process().children():
        if "evaluate.py" in " ".join(process.cmdline()):
            for each in (*process.children(recursive=True), process):
                with contextlib.suppress(psutil.Error):
                    each.kill()
