"""A full Mask R-CNN R50 through the split job: published-like weights in, adaptors out, killed and continued.

Slow: 44 million floats, two levels, four images. `uv run tests/check.py -m slow`
"""

import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from gearnn_ray import AdaptiveModel, Store
from gearnn_ray.models.layers import model_size, network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.training.predict import Normalisation
from tests import tiny
from tests.running_jobs import Job, descendants, wait_until_gone

NAME, SIZES = "maskrcnn_resnet50_fpn", {"min_size": 160, "max_size": 214}
LEVELS = ["jpeg-10", "brightness-0.2"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def write_weights(path: Path) -> None:
    """Random weights whose batch normalisations normalise, as trained ones do."""
    torch.manual_seed(0)
    model = build_model(NAME, 2, SIZES).eval()
    norms = [module for module in model.modules() if hasattr(module, "running_mean")]
    for norm in norms:
        norm.momentum, norm.training = None, True  # type: ignore[assignment]
    with torch.no_grad():
        model(Normalisation((0.5,) * 3, (0.25,) * 3)(torch.randint(0, 255, (2, 3, 120, 160))))
    torch.save(network_state(model), path)


def told(folder: Path, store: str) -> list[str]:
    options: dict[str, Any] = {
        "name": "r50", "store": folder / store, "levels": LEVELS, "budget": "0.4%", "data.kind": "scenes", "data.path": None,
        "data.num-classes": None, "data.scenes.train": 4, "data.scenes.val": 2, "data.scenes.height": 120,
        "data.scenes.width": 160,
        "model.name": NAME, "model.weights": folder / "r50.pt", "model.mean": [0.5] * 3, "model.std": [0.25] * 3,
        "recipe.epochs": 1, "recipe.batch-size": 2, "recipe.crop": 160, "recipe.learning-rate": 0.001, "recipe.clip": 5,
    }  # fmt: skip
    arguments = ["--model.arguments", *(str(part) for pair in SIZES.items() for part in pair)]
    return [*tiny.options(folder, **options), *arguments]


def test_it_is_split_killed_and_continued_to_the_same_digests(tmp_path: Path) -> None:
    floats = model_size(build_model(NAME, 1))
    assert (floats, floats * 4 // 1000) == (44_028_635, 176_114)
    write_weights(tmp_path / "r50.pt")
    whole = Job(tiny.start_job(told(tmp_path, "whole")))
    assert whole.end(900) == 0, whole.errors
    killed = Job(tiny.start_job(told(tmp_path, "killed")))
    killed.wait_for(lambda lines: any(e["event"] == "finished" and e["stage"] == "full" for e in lines), 600)
    workers, others = descendants(killed.process.pid)
    killed.process.send_signal(signal.SIGKILL)
    killed.end(60)
    wait_until_gone(workers, others)
    again = Job(tiny.start_job(told(tmp_path, "killed")))
    assert again.end(900) == 0, again.errors
    assert any(e["event"] == "reused" and e["stage"] == "full" for e in again.lines)
    assert tiny.blobs(tmp_path / "killed") == tiny.blobs(tmp_path / "whole")

    release = Store(str(tmp_path / "whole")).pull("r50")
    assert all(0 < entry.floats <= (release.content.budget.floats or 0) for entry in release.content.levels.values())
    rows = pq.read_table(tmp_path / "whole" / "tables" / "r50" / "scores.parquet").to_pylist()
    assert {"mask AP", "mask AP50", "AP50"} <= {row["metric"] for row in rows}
    found = AdaptiveModel(release)(torch.randint(0, 255, (2, 3, 120, 160), dtype=torch.uint8), levels=LEVELS)
    assert all(each["masks"].shape == (len(each["scores"]), 120, 160) for each in found)
