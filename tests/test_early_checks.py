"""Invalid configurations that can be recognised without a cluster are refused before Ray is even imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from gearnn_ray.cli import early_checks
from gearnn_ray.config.command_line import parse_command_line
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.ray_jobs.local_ray import address_to_join
from gearnn_ray.store.releases import Store
from tests import served, tiny
from tests.conftest import ROOT

# runs commands in one process, in which importing Ray ends the process; prints [exit code, standard error] of each
_WITHOUT_RAY = """
import contextlib, io, json, os, sys, time

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name == "ray":
            print("Ray was imported", flush=True)
            os._exit(9)

sys.meta_path.insert(0, NoRay())
from gearnn_ray.cli import main
for job, arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()) as out:
        code = getattr(main, job)(arguments)
    print(json.dumps([code, out.getvalue(), error.getvalue()]), flush=True)
print(json.dumps("torch" in sys.modules))
"""


def refusals(*commands: tuple[str, list[str]]) -> tuple[list[str], bool]:
    """The sentence with which each command is refused, and whether torch was imported. The process has no cluster."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_RAY, json.dumps(commands)], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
    )  # fmt: skip
    *results, torch_was_imported = map(json.loads, done.stdout.splitlines())
    sentences = []
    for code, out, error in results:
        assert (code, out) == (2, "")
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        sentences.append(error)
    assert len(sentences) == len(commands)
    return sentences, torch_was_imported


def test_a_split_is_refused_before_ray_and_torch_are_imported(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path / "data")
    weights = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({}, weights)
    (tmp_path / "torn.safetensors").write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "weights.onnx").touch()
    (tmp_path / "half/train/images").mkdir(parents=True)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"data.path": tmp_path / "nowhere"}, "nowhere does not exist"),
        ({"data.path": tmp_path / "half"}, "half"),
        ({"data.kind": "camvid", "data.num-classes": None}, "trainannot is not a folder"),
        ({"model.name": "resnet"}, "there is no network 'resnet'"),
        ({"model.name": "nowhere.nets:small"}, "is in the module nowhere.nets, which Python does not find"),
        ({"model.name": "tests.nowhere:small"}, "is in the module tests.nowhere, which Python does not find"),
        ({"model.weights": tmp_path / "none.pt"}, "there is no weights file"),
        ({"model.weights": tmp_path / "weights.onnx"}, "ends in '.onnx': expected a .safetensors"),
        ({"model.weights": tmp_path / "torn.safetensors"}, "is not a readable safetensors file"),
        ({"levels": ["clean"]}, "levels has only clean, where nothing is adapted"),
    ]
    sentences, torch_was_imported = refusals(*(("run_split", tiny.options(tmp_path, **each)) for each, _ in wrong))
    for sentence, (_, expected) in zip(sentences, wrong, strict=True):
        assert expected in sentence
    assert not torch_was_imported


def test_a_store_that_does_not_fit_is_refused_before_ray_and_torch_are_imported(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path / "data")
    safetensors.numpy.save_file({}, tmp_path / "weights.safetensors")
    store = str(tmp_path / "store")
    served.publish(Store(store))
    (tmp_path / "file").touch()
    wrong: list[tuple[str, list[str], str]] = [
        ("run_split", tiny.options(tmp_path, store=tmp_path / "file/store"), "file"),
        ("run_evaluate", ["--store", store, "--release", "other"], "other:latest"),
        ("run_evaluate", ["--store", store, "--release", "tiny"], "--trust tests.nets"),
        ("run_sweep", ["--store", store, "--release", "tiny:v2"], "tiny:v2"),
        ("run_sweep", ["--store", store, "--release", "tiny", "--trust", "tests.nets"], "does not record how it was made"),
        ("run_serve", ["--store", str(tmp_path / "none"), "--bundles", "tiny"], "tiny:latest"),
        ("run_serve", ["--store", store, "--bundles", "tiny"], "--trust tests.nets"),
    ]
    sentences, torch_was_imported = refusals(*((job, arguments) for job, arguments, _ in wrong))
    for sentence, (*_, expected) in zip(sentences, wrong, strict=True):
        assert expected in sentence
    assert not torch_was_imported


def test_what_another_cluster_may_have_is_left_to_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = parse_command_line(SplitConfig, tiny.options(tmp_path, **{"model.name": "nowhere:net"}), "")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for address, own in (("local", True), ("", True), ("10.0.0.1:6379", False)):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert early_checks.starts_own_cluster() == (address_to_join() is None) == own
    early_checks.check_split(config)
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match="nowhere, which Python does not find"):
        early_checks.check_split(config)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:6379")  # as `ray start` leaves it
    assert address_to_join() is not None
    early_checks.check_split(config)


def test_a_module_is_found_where_workers_find_it_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").touch()
    for name in ("my_nets.py", "my_package/nets.py"):
        (tmp_path / name).write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    for network in ("drn_d_22", "my_nets:net", "my_package.nets:net", "torchvision.models.segmentation:fcn_resnet50"):
        early_checks._check_module(network)
    for network in ("my_package.other:net", "my_nets.inner:net"):
        with pytest.raises(UserError, match="which Python does not find"):
            early_checks._check_module(network)
