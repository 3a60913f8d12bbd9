"""`jobs/watch.py`: a video through the adaptive network, as a generator and as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import gearnn_ray.video
from gearnn_ray import AdaptiveModel, Store, UserError
from gearnn_ray.config.watch import WatchConfig
from gearnn_ray.data.scenes import CLASS_NAMES
from gearnn_ray.video.generated import Clip, Shot
from gearnn_ray.video.watching import Seen, watched
from tests.conftest import ROOT
from tests.nets import TRUST
from tests.served import publish
from tests.streams import Camera, access_units, encoded, moving, transport_stream

LEVELS = ("h264-crf36", "h264-40x32", "brightness-0.2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    publish(Store(str(folder)), "video", level_names=LEVELS)
    publish(Store(str(folder)), "scenes", level_names=LEVELS, class_names=CLASS_NAMES)
    publish(Store(str(folder)), "stills")
    return folder


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shots: good, at half the size, and strongly compressed."""
    path = tmp_path_factory.mktemp("films") / "abr.ts"
    shots = [moving(6, 64, 80), moving(6, 32, 40)]
    path.write_bytes(transport_stream(shots, crf=12) + encoded(moving(6, 64, 80), container="mpegts", start=12, crf=36))
    os.utime(path, (0, 0))
    return path


def options(store: Path, release: str = "video", **more: Any) -> dict[str, Any]:
    return {"store": str(store), "release": release, "trust": list(TRUST), **more}


def test_every_frame_has_a_line_with_its_own_level(store: Path, film: Path) -> None:
    lines = list(gearnn_ray.video.watch(str(film), **options(store)))
    assert [line["frame"] for line in lines] == list(range(18))
    assert [line["level"] for line in lines] == ["clean"] * 6 + ["h264-40x32"] * 6 + ["h264-crf36"] * 6
    assert [(line["width"], line["height"]) for line in lines[5:7]] == [(80, 64), (40, 32)]
    assert {line["stream"] for line in lines} == {"abr"}
    json.dumps(lines, allow_nan=False)


def test_the_answers_are_the_models_own(store: Path, film: Path) -> None:
    model = AdaptiveModel.pull(str(store), "video", trust=TRUST)
    lines = list(gearnn_ray.video.watch(str(film), **options(store, compare=True)))
    with av.open(str(film)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for frame, line in zip(frames, lines, strict=True):
        image = torch.from_numpy(frame).permute(2, 0, 1)[None]
        for level, described in ((line["level"], line), ("clean", line["original"])):
            classes = model(image, levels=[level]).argmax(1).flatten()
            shares = torch.bincount(classes, minlength=3) / len(classes)
            found = {each["category_id"]: each["share"] for each in described["classes"]}  # type: ignore[index]
            # the conversion of colours differs in its last bits
            assert np.allclose([found.get(k, 0.0) for k in range(3)], shares, atol=0.03)


def test_the_picture_has_as_many_frames_and_both_answers(store: Path, film: Path, tmp_path: Path) -> None:
    single, both = tmp_path / "single.mp4", tmp_path / "both.mp4"
    for path, compare in ((single, False), (both, True)):
        list(gearnn_ray.video.watch(str(film), **options(store, mp4=str(path), compare=compare)))
    sizes = []
    for path in (single, both):
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
            assert len(frames) == 18
            sizes.append((frames[0].height, frames[0].width))
    assert sizes[0] == (384, 480)
    assert sizes[1] == (384, 964)


def test_the_generated_clip_is_scored_against_its_labels(store: Path) -> None:
    seen = Seen()
    lines = watched(WatchConfig(**options(store, "scenes", compare=True)), seen)
    first = [next(lines) for _ in range(30)]
    lines.close()
    assert first[0]["level"] == "clean"
    assert first[-1]["score"].keys() == {"adapted", "original"}  # type: ignore[attr-defined]
    assert seen.scores["adapted"] == seen.scores["original"] > 0
    assert seen.metric == "mIoU"


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_labels_of_the_clip_are_those_of_its_pictures(task: str) -> None:
    clip = Clip(task, 96, 128, shots=(Shot(), Shot(scale=0.5), Shot(light=0.2)), shot_frames=4)
    frames = list(clip.frames())
    assert [frame.pixels.shape[:2] for frame in frames] == [(96, 128)] * 4 + [(48, 64)] * 4 + [(96, 128)] * 4
    assert len(clip) == len(frames)
    first, last = clip.target(0), clip.target(3)
    if task == "segmentation":
        assert np.array_equal(first[:, 6:], last[:, :-6]), "the camera pans by two pixels a frame"
        sky = first == 0
        assert frames[0].pixels[sky].mean() > frames[0].pixels[~sky].mean()
    else:
        assert first.size == (96, 128)
        assert len(first)


def test_the_clip_has_the_same_frames_every_time() -> None:
    clips = [Clip(shots=(Shot(crf=36),), shot_frames=3) for _ in range(2)]
    assert clips[0].stream == clips[1].stream


def test_a_release_of_stills_says_that_video_does_not_show_its_levels(store: Path, film: Path) -> None:
    seen = Seen()
    list(watched(WatchConfig(**options(store, "stills", source=str(film))), seen))
    assert len(seen.remarks) == 1
    assert "only levels of JPEG quality" in seen.remarks[0]


def test_without_a_source_the_release_must_know_generated_streets(store: Path) -> None:
    with pytest.raises(UserError, match="give a video"):
        next(gearnn_ray.video.watch(**options(store)))


def test_a_source_that_gives_nothing_overwrites_no_file(store: Path, tmp_path: Path) -> None:
    film, lines, picture = (tmp_path / name for name in ("film.ts", "film.ndjson", "film.mp4"))
    for path in (film, lines, picture):
        path.write_text("before")
    os.utime(film, (0, 0))
    with pytest.raises(UserError):
        list(gearnn_ray.video.watch(str(film), **options(store, ndjson=str(lines), mp4=str(picture))))
    assert lines.read_text() == picture.read_text() == "before"


# ---- as a process


def job(store: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "jobs/watch.py"),
        *arguments,
        "--store",
        str(store),
        "--release",
        "video",
        "--trust",
        *TRUST,
    ]


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


def test_as_a_process_it_writes_lines_and_a_picture(store: Path, film: Path, tmp_path: Path) -> None:
    lines, picture = tmp_path / "film.ndjson", tmp_path / "film.mp4"
    done = run(job(store, str(film), "--ndjson", str(lines), "--mp4", str(picture), "--compare"))
    assert done.returncode == 0, done.stderr
    assert len(lines.read_text().splitlines()) == 18
    assert "18 frames" in done.stdout
    assert str(picture) in done.stdout


def test_a_camera_is_watched_until_the_job_is_ended(store: Path, tmp_path: Path) -> None:
    lines, picture = tmp_path / "camera.ndjson", tmp_path / "camera.mp4"
    with Camera(access_units(moving(200, 64, 80)), seconds_per_frame=0.03) as camera:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = job(store, camera.url, "--ndjson", str(lines), "--mp4", str(picture), "--stream", "gate")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and (not lines.exists() or lines.read_text().count("\n") < 5):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {line["stream"] for line in written} == {"gate"}
    with av.open(str(picture)) as container:
        assert len(list(container.decode(video=0))) == len(written)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/nowhere/film.mp4"], "does not exist"),
        (["rtsp://127.0.0.1:9/camera"], "cannot be opened"),
        (["--ndjson", "/nowhere/lines"], "folder /nowhere does not exist"),
        (["--slow", "sometimes"], "slow"),
        (["--store", "/nowhere/store"], "/nowhere/store"),
        (["a.mp4", "b.mp4"], "b.mp4"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    store: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from gearnn_ray.cli.main import run_watch

    where = [] if "--store" in arguments else ["--store", str(store)]
    code = run_watch([*arguments, *where, "--release", "video", "--trust", *TRUST])
    said = capsys.readouterr().err
    assert code == 2
    assert says in said
    assert len(said.strip().splitlines()) == 1
