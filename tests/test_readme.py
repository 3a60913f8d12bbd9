"""What the README says is true: its commands are those that CI runs, its Python runs, its files exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gearnn_ray import Store, build_model, model_size
from gearnn_ray.models.layers import network_state
from tests.conftest import ROOT
from tests.manifests import level_entry, manifest_of

README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_test_command() -> None:
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.S)
    assert commands[0] == "python3 -m pip install uv && uv run jobs/split.py"
    assert commands[1] == "python3 -m pip install uv && uv run tests/check.py"
    assert commands[1] in (ROOT / ".ci/run").read_text()


def test_pulling_a_bundle_in_five_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build_model("drn_d_22", num_classes=9)
    base = network_state(model)
    adaptor = {"seg.bias": base["seg.bias"] + 1}
    store = Store(tmp_path / "artifacts")
    blobs = store.put_state(base), store.put_state(adaptor)
    levels = {level: level_entry(blobs[1], 9, ["seg.bias"]) for level in ("jpeg-10", "jpeg-80")}
    small = {"height": 64, "width": 64, "luma": 100.0, "luma_spread": 0.3}  # the size at which a load compares outputs
    store.publish(manifest_of("drn22-scenes-jpeg", "drn_d_22", 9, blobs[0], levels, small, floats=model_size(model)), {})
    monkeypatch.chdir(tmp_path)
    serving, pulling = re.findall(r"```python\n(.*?)```", README, re.S)
    served: dict[str, object] = {"images": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)}
    exec(serving, served)
    assert isinstance(served["logits"], torch.Tensor)
    assert served["logits"].shape == (2, 9, 64, 64)
    names: dict[str, object] = {}
    exec(pulling, names)
    pulled = names["model"]
    assert isinstance(pulled, torch.nn.Module)
    assert torch.equal(pulled.state_dict()["seg.bias"], adaptor["seg.bias"])
    assert torch.equal(pulled.state_dict()["seg.weight"], base["seg.weight"])


def test_every_file_it_names_is_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).is_file(), f"{page.name} names {link}"


def test_a_job_without_options_is_the_one_it_describes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from gearnn_ray.config.split import SplitConfig as C; print(C().name, C().store, C().data.kind)"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.split() == ["drn22-scenes-jpeg", "artifacts", "scenes"]
