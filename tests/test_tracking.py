"""What `--track` sends to TensorBoard, MLflow and Weights & Biases, and that no tracker can end a job."""

import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gearnn_ray import UserError
from gearnn_ray.cli import early_checks
from gearnn_ray.cli.main import run_gc, run_split
from gearnn_ray.core.events import Event
from gearnn_ray.offline import pipeline
from gearnn_ray.offline.level_run import LevelResult
from gearnn_ray.offline.pipeline import Outcome
from gearnn_ray.reporting import tracking
from gearnn_ray.reporting.progress import _Plain
from gearnn_ray.reporting.tracking import Tracked, Tracker, flat, points, tracked
from tests.test_progress import ROW

DIGEST = "sha256:" + "5" * 64
EVENTS = (
    Event("progress", "full", "jpeg-10", 1, 4, 1, 2, 0.5),
    Event("progress", "full", "jpeg-10", 4, 4, 2, 2, 0.25),
    Event("finished", "full", "jpeg-10", score=50.0, metric="mIoU", seconds=3.0),
    Event("reused", "partial", "brightness-0.4+jpeg-30", score=40.0, metric="mIoU"),
)


def track(where: str, succeeded: bool = True) -> str:
    """A job's life with this tracker; what it printed."""
    out = io.StringIO()
    with tracked(_Plain({}, out), [where], "split-tiny", {"recipe": {"epochs": 2}}) as emit:
        for event in EVENTS:
            emit(event)
        emit.conclude({"jpeg-10/adaptor": 48.0, "jpeg-10/full": None}, {"release": f"tiny@{DIGEST}", "tag": None}, succeeded)
    return out.getvalue()


def test_curves_are_named_by_level_stage_and_metric() -> None:
    found = [points(event) for event in EVENTS]
    assert found == [
        {"jpeg-10/full/loss": (0.5, 1)},
        {"jpeg-10/full/loss": (0.25, 4)},
        {"jpeg-10/full/mIoU": (50.0, 0), "jpeg-10/full/seconds": (3.0, 0)},
        {"brightness-0.4_jpeg-30/partial/mIoU": (40.0, 0)},
    ]
    assert points(Event("notice", "job", "all", note="a remark")) == {}
    # MLflow takes no such characters
    assert points(Event("reused", "my.levels:Rain(3)", "M = 10%", score=1.0)) == {"M _ 10_/my.levels_Rain_3_/score": (1.0, 0)}


def test_options_have_the_names_of_the_command_line() -> None:
    assert flat({"seed": 1, "data": {"scenes": {"train": 2}}, "levels": ["jpeg-10"]}) == {
        "seed": "1", "data.scenes.train": "2", "levels": "['jpeg-10']",
    }  # fmt: skip


def tensorboard(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, str]]:
    """Curves and texts of the one event file below a folder, read as TensorBoard does: records of length, checksum, event."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    (path,) = folder.rglob("events.out.tfevents.*")
    data, curves, texts = path.read_bytes(), dict[str, list[tuple[int, float]]](), dict[str, str]()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, data = event_pb2.Event.FromString(data[12 : 12 + length]), data[16 + length :]
        for value in event.summary.value:
            if value.HasField("tensor"):
                texts[value.tag.removesuffix("/text_summary")] = value.tensor.string_val[0].decode()
            else:
                curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves, texts


def test_tensorboard_gets_losses_scores_options_and_the_release(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    track(f"tensorboard:{tmp_path / 'runs'}")
    curves, texts = tensorboard(tmp_path)
    assert curves == {
        "jpeg-10/full/loss": [(1, 0.5), (4, 0.25)],
        "jpeg-10/full/mIoU": [(0, 50.0)],
        "jpeg-10/full/seconds": [(0, 3.0)],
        "brightness-0.4_jpeg-30/partial/mIoU": [(0, 40.0)],
        "scores/jpeg-10/adaptor": [(0, 48.0)],
    }
    assert texts == {"options": "    recipe.epochs: 2", "release": f"tiny@{DIGEST}", "state": "succeeded"}


@pytest.mark.parametrize(("succeeded", "status"), [(True, "FINISHED"), (False, "FAILED")])
def test_mlflow_gets_the_same(tmp_path: Path, succeeded: bool, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    track(f"mlflow:{uri}", succeeded)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("gearnn_ray").experiment_id])
    assert (run.info.status, run.data.params) == (status, {"recipe.epochs": "2"})
    assert run.data.tags["release"] == f"tiny@{DIGEST}"
    assert run.data.metrics["scores/jpeg-10/adaptor"] == 48.0
    losses = client.get_metric_history(run.info.run_id, "jpeg-10/full/loss")
    assert [(each.step, each.value) for each in losses] == [(1, 0.5), (4, 0.25)]


def test_wandb_gets_the_same_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    track("wandb:street")
    (path,) = tmp_path.rglob("*.wandb")
    data = path.read_bytes()
    texts = ("jpeg-10/full/loss", "scores/jpeg-10/adaptor", f"tiny@{DIGEST}", "street")
    assert [text for text in texts if text.encode() not in data] == []


class _Fails(Tracker):
    """Takes one point."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def scalar(self, name: str, value: float, step: int, seconds: float) -> None:
        self.calls.append(name)
        if len(self.calls) > 1:
            raise ConnectionError("the server is\n gone.")

    def describe(self, facts: Mapping[str, str]) -> None:
        self.calls.append("describe")

    def close(self, succeeded: bool) -> None:
        self.calls.append(f"close {succeeded}")
        raise ConnectionError("still gone")


class _Lists(_Fails):
    def scalar(self, name: str, value: float, step: int, seconds: float) -> None:
        self.calls.append(name)

    def close(self, succeeded: bool) -> None:
        self.calls.append(f"close {succeeded}")


def test_a_tracker_that_fails_costs_a_notice_and_neither_the_job_nor_the_others() -> None:
    out, fails, lists = io.StringIO(), _Fails(), _Lists()
    with Tracked(_Plain({}, out), {"mlflow": fails, "wandb": lists}) as emit:
        for event in EVENTS:
            emit(event)
        emit.conclude({}, {}, succeeded=True)
    assert fails.calls == ["jpeg-10/full/loss", "jpeg-10/full/loss", "close False"]
    assert lists.calls[-3:] == ["brightness-0.4_jpeg-30/partial/mIoU", "describe", "close True"]
    notices = [line for line in out.getvalue().splitlines() if "tracking" in line]
    assert len(notices) == 1
    assert "mlflow failed and gets nothing more from this job, which continues (the server is gone)" in notices[0]


def test_a_job_that_ends_by_an_error_is_a_failed_run() -> None:
    lists = _Lists()
    emit = Tracked(_Plain({}, io.StringIO()), {"wandb": lists})
    emit.conclude({}, {}, succeeded=True)
    with pytest.raises(ZeroDivisionError), emit:
        raise ZeroDivisionError
    assert lists.calls[-1] == "close False"


def test_a_tracker_that_cannot_be_opened_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--track is 'tensorbored': expected tensorboard, mlflow, wandb, or one of them"):
        track("tensorbored")
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(
        UserError, match="--track mlflow needs the package mlflow, which is not installed: install the extra mlflow"
    ):
        track("mlflow")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the tracker cannot be opened") as caught:
        track(f"tensorboard:{tmp_path / 'file'}")
    assert "\n" not in str(caught.value)


def test_trackers_that_were_opened_before_one_that_cannot_be_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _Fails()
    monkeypatch.setitem(tracking._KINDS, "wandb", lambda *_: first)
    with pytest.raises(UserError, match="--track is 'tensorbored'"):
        tracked(_Plain({}, io.StringIO()), ["wandb", "tensorbored"], "split-tiny", {})
    assert first.calls == ["close False"]


def test_a_job_hands_its_scores_and_release_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("tensorboardX")
    result = LevelResult("jpeg-10", original=40.0, adaptor=48.0, digest=DIGEST, bytes=9, floats=2)
    outcome = Outcome(DIGEST, (result,), {"jpeg-20": "the loss became nan"}, (ROW,), "partial")
    monkeypatch.setattr(early_checks, "check_split", lambda config: None)
    monkeypatch.setattr(pipeline, "split", lambda config, emit: [emit(event) for event in EVENTS] and outcome)
    options = ["--name", "tiny", "--store", str(tmp_path / "secret"), "--levels", "jpeg-10", "jpeg-20", "--recipe.epochs", "2"]
    assert run_split([*options, "--json", "--track", f"tensorboard:{tmp_path / 'runs'}"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines[:-1]] == ["progress", "finished", "reused"]  # a line for each epoch
    curves, texts = tensorboard(tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("split-tiny-")
    scores = {name: points[0][1] for name, points in curves.items() if name.startswith("scores/")}
    assert scores == {f"scores/jpeg-10/{name}": value for name, value in (("original", 40.0), ("full", 50.0), ("adaptor", 48.0))}
    assert "recipe.epochs: 2\n" in texts["options"]
    assert "secret" not in texts["options"]  # an address may hold credentials
    assert (texts["release"], texts["tag"], texts["state"]) == (f"tiny@{DIGEST}", "partial", "failed")
    assert texts["failed/jpeg-20"] == "the loss became nan"


def test_what_trains_nothing_has_nothing_to_track(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_gc(["--store", str(tmp_path), "--track", "wandb"]) == 2
    assert "only split, evaluate and sweep have something to track" in capsys.readouterr().err
