"""A tiny street of one's own on disk, a network that learns it in seconds, and what a job is told to split it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.models.layers import network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.base import publish_given_base
from gearnn_ray.offline.job_spec import JobSpec, Network
from gearnn_ray.offline.records import Execution
from gearnn_ray.tasks.base import score
from gearnn_ray.training.predict import Predictor, collect_evidence
from tests.conftest import NORMALISATION, ROOT

CLASSES = 3


def write_folder(root: Path, train: int = 12, val: int = 6) -> Path:
    """train/ and val/ with images/ and labels/, in the true format of `data.kind folder`."""
    rng = np.random.default_rng(3)
    for part, count in (("train", train), ("val", val)):
        (root / part / "images").mkdir(parents=True)
        (root / part / "labels").mkdir()
        for index in range(count):
            label = np.kron(rng.integers(0, CLASSES, (4, 5)), np.ones((8, 8))).astype(np.uint8)
            colours = np.array([[190, 70, 70], [70, 190, 70], [70, 70, 190]])
            image = np.clip(colours[label] + rng.integers(-50, 50, (32, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / part / "images" / f"{index:03d}.png")
            Image.fromarray(label).save(root / part / "labels" / f"{index:03d}.png")
    return root


def write_weights(path: Path) -> Path:
    """The small network's weights from a seeded initialisation, in half precision as published ones may be."""
    torch.manual_seed(0)
    state = network_state(build_model("tests.nets:small", CLASSES))
    safetensors.torch.save_file({name: tensor.half() for name, tensor in state.items()}, path)
    return path


def job_spec(folder: Path, **changes: Any) -> JobSpec:
    """A job over `write_folder` in folder/data and `write_weights`, whose base lies in its store (by default folder/store)."""
    told: dict[str, Any] = {
        "store": str(folder / "store"),
        "network": Network("tests.nets:small", CLASSES, NORMALISATION),
    } | changes
    base = publish_given_base(told["store"], told["network"], str(folder / "weights.safetensors")).digest
    defaults = {
        "cache": str(folder / "cache"),
        "data": open_dataset("folder", str(folder / "data"), num_classes=CLASSES),
        "base": base,
        "seed": 4,
        "execution": Execution("cpu", "float32", 1),
    }
    return JobSpec(**defaults | told)


def options(folder: Path, **changes: Any) -> list[str]:
    """Command line of a job over `write_folder` and `write_weights` that takes seconds."""
    told: dict[str, Any] = {
        "name": "tiny",
        "store": folder / "store",
        "levels": ["jpeg-10", "brightness-0.4"],
        "budget": "20%",
        "data.kind": "folder",
        "data.path": folder / "data",
        "data.num-classes": CLASSES,
        "data.cache": folder / "cache",
        "model.name": "tests.nets:small",
        "model.weights": folder / "weights.safetensors",
        "recipe.epochs": 3,
        "recipe.batch-size": 4,
        "recipe.crop": 24,
        "recipe.learning-rate": 0.05,
        "recipe.precision": "float32",
    } | changes
    line: list[str] = []
    for name, value in told.items():
        if value is not None:
            line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


SPLIT_FIGURES = "gearnn_ray.offline.pipeline.figures_of"
OTHER_FIGURES = (
    "gearnn_ray.evaluation.findings.figures_of",
    "gearnn_ray.sweep.pipeline.sweep_figure",
    "gearnn_ray.knobs.pipeline.figures_of",
)


@contextmanager
def without_figures(*places: str) -> Iterator[None]:
    """Jobs of this process draw no figures, which takes longer than all else they do in tests. places: of the functions that draw
    them, by default of all jobs, whose modules take a second to import.
    """
    with pytest.MonkeyPatch.context() as patch:
        for place in places or (SPLIT_FIGURES, *OTHER_FIGURES):
            patch.setattr(place, (lambda *_: b"") if place.endswith("sweep_figure") else (lambda *_: {}))
        yield


def start_job(arguments: list[str], job: str = "split.py", **environment: str) -> "subprocess.Popen[str]":
    """A job as a real process with JSON lines on its standard output."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / job), *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def events(output: str) -> list[dict[str, Any]]:
    """The JSON lines of a job."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def epochs_run(lines: list[dict[str, Any]]) -> int:
    """Epochs of all fine-tunes that were finished in these events."""
    return sum(e["event"] == "progress" and e["epochs"] > 0 and e["step"] * e["epochs"] % e["steps"] == 0 for e in lines)


def blobs(store: Path) -> set[str]:
    """Every blob of a local store with weights: equal sets mean equal digests, hence equal bits. Tables hold seconds too."""
    paths = (path for path in (store / "blobs" / "sha256").iterdir() if not path.name.startswith("."))
    return {path.name for path in paths if not path.read_bytes().startswith((b"PAR1", b"\x89PNG"))}


def score_of(spec: JobSpec, state: Mapping[str, Tensor], level: str) -> float:
    """mIoU in percent of a network with these tensors on a level's validation images."""
    model = spec.network.build()
    model.load_state_dict(dict(state))
    predictor = Predictor(model, spec.network.normalisation, spec.execution.precision)
    return score(spec.task, collect_evidence(spec.task, model, [predictor], *spec.validation_data(level), CLASSES)[0])
