"""`jobs/adapt.py` on a real Ray: what it computes, writes, reuses and refuses."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gearnn_ray import Store
from gearnn_ray.cli.main import run_adapt
from gearnn_ray.knobs.methods import METHODS, STEERED
from tests.nets import TRUST
from tests.served import publish
from tests.streams import encoded, moving
from tests.tiny import start_job

SEGMENTS, LENGTH = 3, 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with a release, a film, and a folder of frames with labels."""
    publish(Store(str(tmp_path / "store")), "video", level_names=("h264-crf36", "h264-40x32"))
    frames = moving(SEGMENTS * LENGTH, 64, 80)
    (tmp_path / "film.mp4").write_bytes(encoded(frames, container="mp4", crf=5))
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    for part in ("frames", "labels"):
        (tmp_path / part).mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number:03d}.png")
        Image.fromarray((frame[..., 0] // 86).astype("uint8")).save(tmp_path / "labels" / f"{number:03d}.png")
    return tmp_path


def told(folder: Path, *sources: str, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "store": folder / "store", "release": "video", "trust": TRUST[0], "length": LENGTH, "knobs": ["crf=18,36", "rate=1,2"],
    } | changes  # fmt: skip
    line = [str(folder / source) for source in sources or ("film.mp4",)]
    for name, value in options.items():
        line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Exit code, result and events."""
    capsys.readouterr()
    code = run_adapt([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    lines = [json.loads(line) for line in out.splitlines()]
    return code, lines[-1], lines[:-1]


@pytest.mark.usefixtures("ray_cluster")
def test_every_method_on_every_source_and_what_is_there_is_not_computed_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result, lines = run(told(folder, "film.mp4", "frames", name="two"), capsys)
    assert (code, result["failed"]) == (0, {})
    assert {each["source"] for each in result["found"]} == {"film", "frames"}
    assert {each["method"] for each in result["found"]} == {f"{name}{end}" for name in METHODS for end in ("", "+gearnn")}
    assert [(line["event"], line["level"]) for line in lines if line["event"] == "finished"] in (
        [("finished", "film"), ("finished", "frames")], [("finished", "frames"), ("finished", "film")],
    )  # fmt: skip
    store = Store(str(folder / "store"))
    table = store.get_table("tables/two/adapt.parquet")
    columns = {"source", "method", "segment", "bytes", "accuracy", "forward_equivalents", "encodes", "crf", "rate"}
    assert columns <= set(table.column_names)
    assert set(table["segment"].to_pylist()) == set(range(SEGMENTS))
    assert result["report"] == "reports/two/adapt.html"
    assert len(result["figures"]) == 6
    for path in (result["report"], *result["figures"]):
        assert (folder / "store" / path).stat().st_size > 1000

    code, again, lines = run(told(folder, "film.mp4", "frames", name="two"), capsys)
    assert code == 0
    assert {line["event"] for line in lines if line["stage"] == "segments"} == {"started", "progress", "reused"}
    assert again == result


@pytest.mark.usefixtures("ray_cluster", "no_figures")
def test_labels_are_what_accuracy_is_judged_against(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = run(told(folder, "frames", labels=folder / "labels"), capsys)
    assert code == 0
    table = Store(str(folder / "store")).get_table("tables/video/adapt.parquet").to_pylist()
    best = [row["accuracy"] for row in table if row["method"] == "fixed" and row["run"] == 0]
    assert all(accuracy < 90 for accuracy in best), "a network that learned nothing"


@pytest.mark.usefixtures("ray_cluster", "no_figures")
def test_a_goal_stands_in_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, _ = run(told(folder, ceiling=20_000), capsys)
    assert code == 0
    assert {each["method"] for each in result["held"]} == {f"{name}{end}" for name in STEERED for end in ("", "+gearnn")}
    assert all(each["kilobits"] > 0 for each in result["held"])
    table = Store(str(folder / "store")).get_table("tables/video/adapt.parquet").to_pylist()
    assert {row["goal"] for row in table if row["method"] == "pixel-change"} == {"trade", "ceiling"}


@pytest.mark.timeout(300)
def test_a_killed_job_goes_on_where_it_was(
    folder: Path, ray_cluster: Mapping[str, str], no_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = told(folder, "frames")
    process = start_job(arguments, "adapt.py", **ray_cluster)
    assert process.stdout is not None
    for line in process.stdout:
        if '"progress"' in line:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    stages = folder / "store" / "stages"
    # a record that is used again is made young; one that is measured again has other seconds in it
    kept = {path.name: path.read_bytes() for path in stages.glob("*.json")}
    assert kept
    code, result, _ = run(arguments, capsys)
    assert (code, result["failed"]) == (0, {})
    assert {name: (stages / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize(
    ("sources", "changes", "sentence"),
    [
        ([], {"knobs": ["crf=18,36", "zoom=1,2"]}, "there is no knob 'zoom'"),
        ([], {"knobs": ["crf=18"]}, "the knob crf has 1 value, expected two at least"),
        ([], {"knobs": ["crf=18,99"]}, "the knob crf cannot be set to '99'"),
        ([], {"knobs": ["crf=18,36", "regions=0,4"]}, "the knob regions is not compared here"),
        (
            [],
            {"knobs": ["crf=" + ",".join(map(str, range(20))), "rate=" + ",".join(map(str, range(1, 15)))]},
            "the knobs have 280 configurations together, expected at most 200",
        ),
        ([], {"length": 500}, "film.mp4 has fewer than the 500 frames of a segment"),
        (["none.mp4"], {}, "none.mp4 does not exist"),
        (["noise.mp4"], {}, "is no video that can be read"),
        ([], {"release": "other"}, "No release other:latest"),
        ([], {"release": "centre-video"}, "make it with jobs/split.py --preset video"),
        ([], {"trust": "elsewhere"}, "tests.nets"),
        ([], {"classes": ["zebra"]}, "has no class 'zebra': expected some of road, car, sky"),
        ([], {"classes": ["car"]}, "classes are given for a segmentation"),
        ([], {"labels": "labels"}, "labels belong to a folder of frames"),
        ([], {"ceiling": 1000, "floor": 50}, "ceiling and floor are both given"),
        (["film.mp4", "film.mp4"], {}, "is given twice"),
        ([], {"seeds": 3}, "seeds is 3, which is for generated clips, and a source is given"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_before_anything_is_computed(
    folder: Path, capsys: pytest.CaptureFixture[str], sources: list[str], changes: dict[str, Any], sentence: str
) -> None:
    before = sorted((folder / "store").rglob("*"))
    assert run_adapt(told(folder, *sources, **changes)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
    assert sorted((folder / "store").rglob("*")) == before


def test_a_release_of_other_images_needs_a_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_adapt(told(folder)[1:]) == 2
    assert "was not trained on generated scenes" in capsys.readouterr().err
