"""Footage: which frames of unlabelled recordings are used, and a release made from them without a label."""

import json
import pickle
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from gearnn_ray import Store
from gearnn_ray.cli import early_checks
from gearnn_ray.cli.main import run_evaluate, run_split
from gearnn_ray.config.command_line import parse_command_line
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.data.footage import Footage, Look
from gearnn_ray.data.video_files import shots_of
from tests import tiny

Pixels = NDArray[np.uint8]
RATE = 10  # frames a second of the written videos


def scene(seed: int, shift: int = 0, height: int = 48, width: int = 64) -> Pixels:
    """Sharp blocks of colour that lie elsewhere with another seed, and move with `shift`."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8 + 8, 3)).astype(np.uint8)
    large = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    return np.ascontiguousarray(large[:, shift : shift + width])


def write_video(path: Path, frames: Sequence[Pixels]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "1", "preset": "ultrafast"})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_images(folder: Path, images: Sequence[Pixels]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def opened(root: Path, task: str = "segmentation", **options: Any) -> Footage:
    data = open_dataset("footage", str(root), task, **{"num_classes": 3, **options})
    assert isinstance(data, Footage)
    return data


def still(seconds: int, seed: int = 1) -> list[Pixels]:
    """A video in which every second shows something else."""
    return [scene(seed + second) for second in range(seconds) for _ in range(RATE)]


# ── which frames are used ────────────────────────────────────────────────────────────────────────────────────────


def test_videos_and_folders_of_images_are_clips_and_every_fifth_validates(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", still(2, ord(name)))
    write_images(tmp_path / "d", [scene(50), scene(51)])
    write_images(tmp_path / "e" / "f", [scene(60)])
    write_images(tmp_path / "g", [scene(70), scene(71, width=48)])  # photographs: of two sizes
    data = opened(tmp_path)
    assert (data.name, data.labelled, data.class_names) == ("footage", False, ("class 0", "class 1", "class 2"))
    # seven clips: the last one and the fifth before it
    assert data.val.ids == ("b/000000", "b/000010", "g/001")
    assert data.train.clips == ("a", "a", "c", "c", "d", "d", "e/f", "g/000")
    assert data.train.ids[:2] == ("a/000000", "a/000010")
    assert data.remark == "8 frames of 5 clips to train on, 3 frames of 2 clips to validate; left out: none"


@pytest.mark.parametrize(("rate", "numbers"), [(1, (0, 10, 20)), (0.5, (0, 20)), (2, (0, 5, 10, 15, 20, 25)), (1000, range(30))])
def test_frames_are_taken_at_the_rate(tmp_path: Path, rate: float, numbers: Sequence[int]) -> None:
    write_video(tmp_path / "a.mp4", [scene(1, shift=number) for number in range(30)])
    write_video(tmp_path / "b.mp4", still(1))
    assert opened(tmp_path, rate=rate).train.ids == tuple(f"a/{number:06d}" for number in numbers)


def test_black_blurred_and_repeated_frames_are_left_out_and_counted(tmp_path: Path) -> None:
    large = scene(1, height=240, width=320)
    soft = np.asarray(Image.fromarray(large).filter(ImageFilter.GaussianBlur(8)))
    other, dark = scene(2, height=240, width=320), scene(3, height=240, width=320) // 12
    write_images(tmp_path / "a", [large, large, soft, np.zeros_like(large), dark, other, other + (other < 255), large])
    write_images(tmp_path / "b", [large])
    data = opened(tmp_path)
    assert data.train.ids == ("a/000", "a/005", "a/007")
    assert data.remark.endswith("left out: 2 black, 1 blurred, 2 nearly the same as the one before")


def test_a_night_is_not_black_and_a_faint_picture_not_blurred() -> None:
    night = scene(1, height=240, width=320) // 5
    fog = (scene(1, height=240, width=320) * 0.1 + 150).astype(np.uint8)
    assert [Look.at(pixels).refused(None) for pixels in (night, fog)] == [None, None]


def test_motion_along_one_axis_is_a_blur() -> None:
    streaks = np.repeat(np.random.default_rng(0).integers(0, 256, (240, 1, 3)).astype(np.uint8), 320, 1)
    assert Look.at(streaks).refused(None) == "blurred"


def test_something_small_that_moves_is_seen() -> None:
    before = scene(1, height=240, width=320)
    after = before.copy()
    after[100:120, 100:120] ^= 0x60
    noise = np.clip(before.astype(int) + np.random.default_rng(1).integers(-6, 7, before.shape), 0, 255).astype(np.uint8)
    assert Look.at(after).refused(Look.at(before)) is None
    assert Look.at(noise).refused(Look.at(before)) == "nearly the same as the one before"


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos and a folder of images."""
    root = tmp_path_factory.mktemp("footage")
    write_video(root / "a.mp4", [scene(1, shift=number) for number in range(40)])
    write_video(root / "b.mp4", still(4, 20))
    write_images(root / "c", [scene(50 + index) for index in range(4)])
    return root


def test_a_frame_is_the_same_in_whatever_order_it_is_read(folder: Path) -> None:
    split = opened(folder, rate=5).train
    in_order = [split.image(index) for index in range(len(split))]
    again = pickle.loads(pickle.dumps(split))
    for index in (3, 3, 0, len(split) - 1, 1, 7, 2):
        np.testing.assert_array_equal(again.image(index), in_order[index])
    for number in (0, 2, 4):  # what was written, but for 4:2:0
        assert np.abs(in_order[number].astype(int) - scene(1, shift=2 * number)).mean() < 12


def test_reading_in_order_decodes_a_video_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, paths = opened(folder, rate=5).train, []
    _ = split.choice
    monkeypatch.setattr("gearnn_ray.data.footage.shots_of", lambda path: paths.append(path.name) or shots_of(path))
    for index in range(len(split)):
        split.image(index)
    assert paths == ["a.mp4", "b.mp4"]


def test_targets_say_nothing(folder: Path) -> None:
    label = opened(folder).val.target(0)
    assert (label.shape, np.unique(label).tolist()) == ((48, 64), [255])
    objects = opened(folder, "detection").val.target(0)
    assert (len(objects), objects.size) == (0, (48, 64))


def test_the_digest_follows_frames_and_bytes_not_paths(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    first = opened(folder).train.digest
    assert opened(moved).train.digest == first
    assert opened(moved, rate=5).train.digest != first
    write_video(moved / "a.mp4", [scene(2, shift=number) for number in range(40)])
    assert opened(moved).train.digest != first
    assert opened(moved).val.digest == opened(folder).val.digest


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────


def test_footage_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither videos nor images"):
        opened(tmp_path / "empty")
    write_video(tmp_path / "single" / "walk.mp4", still(2))
    with pytest.raises(UserError, match=r"single clip, walk, .* add a second recording, or cut this one"):
        opened(tmp_path / "single")
    write_images(tmp_path / "night" / "a", [np.zeros((48, 64, 3), np.uint8)] * 2)
    write_images(tmp_path / "night" / "b", [scene(1)])
    with pytest.raises(UserError, match=r"train footage \(a\) has no frame that can be used \(2 black\)"):
        _ = opened(tmp_path / "night").train.digest
    with pytest.raises(UserError, match="neither num_classes nor a file"):
        opened(folder, num_classes=None)


@pytest.mark.parametrize("name", ["z.mp4", "z.png"])
def test_a_damaged_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(folder, tmp_path / "damaged")
    (root / name).write_bytes(b"not a picture" * 100)
    with pytest.raises(UserError, match=f"{name} is no (video|image)"):
        _ = opened(root).val.digest


def test_a_video_that_ends_in_the_middle_has_the_frames_before(folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(folder, tmp_path / "cut")
    with av.open(str(root / "a.mp4")) as source, av.open(str(root / "a.ts"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    (root / "a.mp4").unlink()
    whole = (root / "a.ts").read_bytes()
    (root / "a.ts").write_bytes(whole[: len(whole) // 2])
    frames = [frame for frame in opened(root, rate=5).train.ids if frame.startswith("a/")]
    assert 2 <= len(frames) < 20


def told(*arguments: str) -> SplitConfig:
    return parse_command_line(SplitConfig, arguments, "")[0]


def test_the_base_is_the_teacher_of_footage() -> None:
    assert told().recipe.objective == "labels"
    config = told("--data.kind", "footage", "--data.path", "walks", "--data.footage.rate", "2", "--recipe.temperature", "2")
    assert (config.recipe.objective, config.recipe.temperature, config.recipe.epochs) == ("teacher", 2, 4)
    assert config.resolved_data_options() == {"num_classes": None, "rate": 2}
    with pytest.raises(UserError, match=r"recipe.objective is both and footage has no labels: give teacher"):
        told("--data.kind", "footage", "--recipe.objective", "both")
    with pytest.raises(UserError, match=r"without labels to train a base on: give the base with model.weights"):
        early_checks.check_split(config)


# ── a release ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a job over footage, and its events."""
    root = tmp_path_factory.mktemp("job")
    tiny.write_weights(root / "weights.safetensors")
    write_video(root / "data" / "a.mp4", still(6))
    write_images(root / "data" / "b", [scene(50 + index) for index in range(3)])
    with tiny.without_figures(), pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("sys.stdout.write", lines.append)
        code = run_split([*options(root), "--json"])
    assert code == 0
    return root, tiny.events("".join(lines))


def options(root: Path, **changes: Any) -> list[str]:
    return tiny.options(root, **{"data.kind": "footage", "recipe.epochs": 2, **changes})


@pytest.mark.timeout(300)
def test_a_release_from_footage_names_what_its_scores_are(released: tuple[Path, list[dict[str, Any]]]) -> None:
    root, events = released
    (note,) = (event["note"] for event in events if event.get("stage") == "footage")
    assert note == "6 frames of 1 clip to train on, 3 frames of 1 clip to validate; left out: none"
    assert {event["metric"] for event in events if event.get("score") is not None} == {"agreement mIoU"}
    summary = pq.read_table(root / "store" / "tables" / "tiny" / "summary.parquet").to_pylist()
    assert {row["metric"] for row in summary} == {"agreement mIoU"}
    manifest = Store(str(root / "store")).pull("tiny").content
    assert manifest.levels["jpeg-10"].scores.metric == "agreement mIoU"
    assert (manifest.model.task, manifest.recipe["objective"]) == ("segmentation", "teacher")


@pytest.mark.timeout(300)
def test_it_is_evaluated_as_the_agreement_too(
    released: tuple[Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str], no_figures: None
) -> None:
    root, _ = released
    few = [
        "--levels",
        "clean",
        "brightness-0.4",
        "--methods",
        "bn-statistics",
        "stability",
        "mixed",
        "auto-rgn",
        "--budgets",
        "40%",
    ]
    shared = ["--store", str(root / "store"), "--release", "tiny", "--trust", "tests", "--data.cache", str(root / "cache")]
    assert run_evaluate([*shared, *few, "--stability.sigmas", "0.04", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["failed"] == {}
    assert {row["metric"] for row in result["accuracy"]} == {"agreement mIoU"}
    perfect = [row["value"] for row in result["accuracy"] if (row["method"], row["level"]) == ("original", "clean")]
    assert perfect == [100.0]
    assert "there are no labels" in (root / "store" / result["report"]).read_text()
