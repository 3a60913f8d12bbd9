"""Detection through the jobs, on a YOLO tree whose images have different sizes and a network by import path."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gearnn_ray import AdaptiveModel, Store
from gearnn_ray.cli.main import run_evaluate, run_split, run_sweep
from gearnn_ray.config.command_line import parse_command_line
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.models.layers import network_state, same_bits
from gearnn_ray.models.registry import build_model
from gearnn_ray.tasks import task_by_name
from gearnn_ray.training.trainer import Progress, fine_tune
from tests import tiny
from tests.conftest import NORMALISATION
from tests.nets import TRUST

TASK = task_by_name("detection")
SIZES = ((32, 40), (40, 32), (48, 48))


def write_yolo(root: Path, train: int = 12, val: int = 6) -> Path:
    """One bright rectangle of one of two colours in each image; every fifth training image is empty."""
    rng = np.random.default_rng(5)
    for part, count in (("train", train), ("val", val)):
        (root / "images" / part).mkdir(parents=True)
        (root / "labels" / part).mkdir(parents=True)
        for index in range(count):
            height, width = SIZES[index % 3]
            pixels = rng.integers(40, 80, (height, width, 3)).astype(np.uint8)
            lines = ""
            if index % 5 != 4:
                label, (high, wide) = int(rng.integers(2)), rng.integers(10, 20, 2)
                top, left = rng.integers(0, height - high), rng.integers(0, width - wide)
                pixels[top : top + high, left : left + wide, label] = 220
                x, y = (left + wide / 2) / width, (top + high / 2) / height
                lines = f"{label} {x} {y} {wide / width} {high / height}\n"
            Image.fromarray(pixels).save(root / "images" / part / f"{index}.png")
            (root / "labels" / part / f"{index}.txt").write_text(lines)
    (root / "data.yaml").write_text("names: [red, green]\n")
    return root


def told(folder: Path, **changes: Any) -> list[str]:
    own = {
        "data.kind": "yolo", "data.path": folder / "data", "data.num-classes": None, "model.name": "tests.nets:tiny_detector",
        "model.weights": None, "base-recipe.epochs": 30, "base-recipe.learning-rate": 0.05, "base-recipe.batch-size": 4,
        "base-recipe.precision": "float32",
    }  # fmt: skip
    return tiny.options(folder, **{**own, **changes})


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Path:
    folder = tmp_path_factory.mktemp("detection")
    write_yolo(folder / "data")
    with tiny.without_figures():
        assert run_split([*told(folder), "--json"]) == 0
    return folder


def test_a_release_has_every_metric_of_every_level(released: Path) -> None:
    store = Store(str(released / "store"))
    manifest = store.pull("tiny").content
    assert manifest.model.task == "detection"
    assert manifest.model.class_names == ("red", "green")
    summary = pq.read_table(released / "store" / "tables" / "tiny" / "summary.parquet").to_pylist()
    assert {row["metric"] for row in summary} == {"AP"}
    assert max(row["full"] for row in summary) > 5
    rows = pq.read_table(released / "store" / "tables" / "tiny" / "scores.parquet").to_pylist()
    assert {row["metric"] for row in rows} == {"AP50", "AP75", "AP small", "AP medium", "AP large", "AR"}
    assert {(row["level"], row["network"]) for row in rows} == {
        (level, network) for level in ("jpeg-10", "brightness-0.4") for network in ("original", "full", "adaptor")
    }
    entry = manifest.levels["jpeg-10"].scores
    assert entry.others["AP50"]["original"] >= (entry.original or 0)


def test_a_served_batch_of_mixed_levels_equals_each_image_alone(released: Path) -> None:
    model = AdaptiveModel.pull(str(released / "store"), "tiny", trust=TRUST)
    data = open_dataset("yolo", str(released / "data"), "detection")
    images = torch.from_numpy(np.stack([data.val.image(index) for index in (0, 3)])).permute(0, 3, 1, 2)
    mixed = model(images, levels=["jpeg-10", "brightness-0.4"])
    for found, image, level in zip(mixed, images, ("jpeg-10", "brightness-0.4"), strict=True):
        (alone,) = model(image[None], levels=[level])
        assert TASK.close([found], [alone])


def test_a_release_is_evaluated_and_swept(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = [
        "--store",
        str(released / "store"),
        "--release",
        "tiny",
        "--trust",
        "tests",
        "--data.cache",
        str(released / "cache"),
    ]
    few = ["--budgets", "40%", "--methods", "mixed", "stability", "bn-statistics", "auto-rgn"]
    capsys.readouterr()
    assert run_evaluate([*shared, "--draws", "1", "--levels", "brightness-0.4", *few, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["failed"] == {}
    methods = {row["method"] for row in result["accuracy"]}
    # stability training has no definition for detection, and the report says so
    assert methods == {"original", "gearnn", "switching", "mixed", "bn-statistics", "auto-rgn"}
    table = pq.read_table(released / "store" / "tables" / "tiny" / "accuracy.parquet").to_pylist()
    assert {row["metric"] for row in table} >= {"AP", "AP50", "AR"}
    report = (released / "store" / result["report"]).read_text()
    assert "Stability training is left out" in report
    assert run_sweep([*shared, "--budgets", "40%", "--levels", "brightness-0.4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model.name": "drn_d_22"}, "the task is detection and the network drn_d_22 is for segmentation"),
        ({"task": "segmentation"}, "data of kind yolo has no targets for segmentation: use scenes or camvid"),
        ({"model.name": "centre_detector", "model.arguments": ["min_size", "64"]}, "centre_detector has no argument 'min_size'"),
        ({"model.weights": "a.pt", "model.start": "b.pt"}, "model.start and model.weights are both given"),
        ({"model.name": "light_maskrcnn"}, "light_maskrcnn does not learn from random weights"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_a_sentence(
    tmp_path: Path, options: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yolo(tmp_path / "data", 3, 3)
    assert run_split(told(tmp_path, **options)) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("raw_detector", "the network returned a Tensor: expected boxes, scores and labels of each image"),
        ("small", "the network returned a Tensor: expected boxes, scores and labels of each image"),
        ("frozen", "has 1 frozen batch normalisations, the first at bn1, which no fine-tune can move"),
    ],
)
def test_a_network_that_is_no_detector_is_refused_before_anything_is_trained(
    released: Path, tmp_path: Path, name: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"model.name": f"tests.nets:{name}", "data.path": released / "data", "data.cache": released / "cache"}
    assert run_split(told(tmp_path, **changes)) == 2
    assert sentence in capsys.readouterr().err
    assert not list((tmp_path / "store").rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "task", "network"),
    [
        ([], "segmentation", "drn_d_22_narrow"),
        (["--task", "detection"], "detection", "centre_detector"),
        (["--task=detection", "--model.name", "m:f"], "detection", "m:f"),
        (["--data.kind", "coco", "--data.path", "x"], "detection", "centre_detector"),
        (
            ["--model.name", "maskrcnn_resnet50_fpn", "--data.kind", "penn-fudan", "--data.path", "x"],
            "detection",
            "maskrcnn_resnet50_fpn",
        ),
        (["--model.name", "fcos_resnet50_fpn"], "detection", "fcos_resnet50_fpn"),
        (["--data.kind", "camvid"], "segmentation", "drn_d_22"),
    ],
)
def test_the_task_follows_from_data_or_network(arguments: list[str], task: str, network: str) -> None:
    config, _ = parse_command_line(SplitConfig, arguments, "A job.")
    assert (config.task, config.model.name) == (task, network)
    assert (config.recipe.crop == 1333) == (task == "detection")


def test_a_file_may_name_the_task_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("task: detection\nrecipe: {epochs: 2}\n")
    config, _ = parse_command_line(SplitConfig, ["--config", str(tmp_path / "c.yaml")], "A job.")
    assert (config.task, config.recipe.epochs, config.recipe.crop, config.budget) == ("detection", 2, 1333, "0.4%")
    other, _ = parse_command_line(SplitConfig, ["--config", str(tmp_path / "c.yaml"), "--task", "segmentation"], "A job.")
    assert (other.task, other.model.name, other.recipe.crop) == ("segmentation", "drn_d_22_narrow", 208)


class _InterruptedError(Exception):
    """A worker that died."""


class _Memory:
    """A checkpoint in memory."""

    data: bytes | None = None

    def load(self) -> bytes | None:
        return self.data

    def save(self, data: bytes) -> None:
        self.data = data


@pytest.mark.parametrize("name", ["tests.nets:tiny_detector", "light_maskrcnn"])
def test_a_fine_tune_that_was_interrupted_ends_with_the_same_bits(name: str) -> None:
    """Also where regions are drawn at random, as R-CNNs do."""
    data = open_dataset("scenes", None, "detection", train=4, val=1, height=48, width=64)
    images, targets = ([part(index) for index in range(4)] for part in (data.train.image, data.train.target))
    recipe = Recipe(epochs=2, learning_rate=0.001, batch_size=2, crop=64)
    arguments = {"min_size": 48} if name == "light_maskrcnn" else {}

    def run(checkpoint: _Memory, stop: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = build_model(name, 2, arguments)

        def progress(report: Progress) -> None:
            if stop and report.epoch == 1:
                raise _InterruptedError

        fine_tune(
            TASK,
            model,
            images,
            targets,
            recipe,
            NORMALISATION,
            "float32",
            chosen=None,
            seed=3,
            checkpoint=checkpoint,
            progress=progress,
        )
        return network_state(model)

    whole, left = run(_Memory(), False), _Memory()
    with pytest.raises(_InterruptedError):
        run(left, True)
    assert left.data is not None
    torch.rand(7)  # another process's generator stands elsewhere
    continued = run(left, False)
    assert all(same_bits(tensor, continued[name]) for name, tensor in whole.items())


def test_a_detector_without_equal_images_says_so(tmp_path: Path) -> None:
    data = open_dataset("yolo", str(write_yolo(tmp_path / "d")), "detection")
    images, targets = ([part(index) for index in range(4)] for part in (data.train.image, data.train.target))
    model, recipe = build_model("centre_detector", 2), Recipe(epochs=1, batch_size=4, crop=100)
    with pytest.raises(UserError, match="a batch has images of different sizes"):
        fine_tune(TASK, model, images, targets, recipe, NORMALISATION, "float32", chosen=None, seed=0)
