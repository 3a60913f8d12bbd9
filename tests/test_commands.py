"""The program `gearnn`: from a wheel in an environment of its own, and as the jobs behave that it stands for."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from gearnn_ray.cli import commands, main
from gearnn_ray.cli.commands import COMMANDS
from gearnn_ray.store.releases import Store
from tests import served
from tests.conftest import ROOT
from tests.test_signatures import write_keys

Program = Callable[..., "subprocess.CompletedProcess[str]"]
Here = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment with the wheel. It sees the dependencies of this one, but not this package:
    a folder in a .pth file is searched, while .pth files in that folder, such as that of an editable installation, are not read.
    """
    installer = os.environ.get("UV") or shutil.which("uv")
    if installer is None:
        pytest.skip("uv is not installed")
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    install = [installer, "pip", "install", "--offline", "--no-deps", "--python", str(programs / "python"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=100)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return programs


@pytest.fixture
def gearnn(environment: Path, tmp_path: Path) -> Program:
    """Runs the installed program in an empty folder."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [str(environment / "gearnn"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=200)

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs a command in this process, in an empty folder: its exit code and what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gearnn", *arguments])
        return (commands.main(), *capsys.readouterr())

    return run


def test_the_wheel_has_every_file_of_the_package_and_says_that_it_is_typed(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("gearnn_ray/")}
    written = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gearnn_ray").rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }
    assert packed == written
    assert "gearnn_ray/py.typed" in packed


def test_installed_it_helps_within_a_moment_and_runs_the_installed_package(gearnn: Program, environment: Path) -> None:
    start = time.monotonic()
    done = gearnn("--help")
    assert time.monotonic() - start < 5  # 0.1 s on a quiet machine: nothing heavy is imported
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in COMMANDS)
    assert gearnn("--version").stdout.startswith("gearnn_ray ")

    options = gearnn("split", "--help")
    assert options.returncode == 0, options.stderr
    assert options.stdout.startswith("usage: gearnn split ")
    assert "--recipe.epochs" in options.stdout

    where = subprocess.run(
        [environment / "python", "-c", "import gearnn_ray; print(gearnn_ray.__file__)"], cwd="/", capture_output=True, text=True
    )
    assert where.stdout.startswith(str(environment.parent))


def test_installed_it_refuses_in_one_sentence(gearnn: Program) -> None:
    for arguments in (["splti"], ["split", "--levels", "jpeg-101"], ["serve", "--bundles", "tiny"], ["watch", "--speed", "3"]):
        done = gearnn(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_installed_it_publishes_what_is_signed_and_nothing_else(gearnn: Program, tmp_path: Path) -> None:
    digest = served.publish(Store(tmp_path / "artifacts"), tags=("stable",))
    _, public = write_keys(tmp_path)
    refused = gearnn("push", "tiny:stable", "other", "--require-signature", str(public))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert not (tmp_path / "other").exists()

    assert gearnn("sign", "tiny:stable").returncode == 0
    pushed = gearnn("push", "tiny:stable", "other", "--require-signature", str(public))
    assert pushed.returncode == 0, pushed.stderr
    assert "3 levels" in pushed.stdout
    assert Store(tmp_path / "other").tags("tiny") == {"stable": digest}


def test_a_release_is_copied_with_its_signatures_and_its_tag(here: Here, tmp_path: Path) -> None:
    store, other = Store(tmp_path / "artifacts"), Store(tmp_path / "other")
    digest = served.publish(store, tags=("stable",))
    private, public = write_keys(tmp_path)
    store.sign("tiny", private)
    assert here("push", "tiny:stable", "other")[0] == 0
    assert other.tags("tiny") == {"stable": digest}
    assert other.pull("tiny:stable", str(public)).levels == ("clean", *served.LEVELS)

    code, out, _ = here("pull", f"tiny@{digest}", "other", "--store", "third", "--json")
    assert (code, json.loads(out)["release"]) == (0, f"tiny@{digest}")
    third = Store(tmp_path / "third")
    assert third.names() == []  # a digest names no tag
    assert third.pull(f"tiny@{digest}", str(public)).digest == digest


def test_a_damaged_release_is_not_copied(here: Here, tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    served.publish(store)
    blob = store.manifest("tiny")[1].base.digest.removeprefix("sha256:")
    (tmp_path / "artifacts/blobs/sha256" / blob).write_bytes(b"other bytes")
    code, out, error = here("push", "tiny", "other")
    assert (code, out) == (2, "")
    assert blob in error
    assert Store(tmp_path / "other").names() == []


def test_a_level_is_exported(here: Here, tmp_path: Path) -> None:
    served.publish(Store(tmp_path / "artifacts"))
    code, out, _ = here("export", "tiny", "jpeg-10", "level.safetensors")
    assert (code, out.count("\n")) == (0, 1)
    assert (tmp_path / "level.safetensors").stat().st_size > 1000


def test_a_network_may_lie_in_the_working_directory(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_nets.py").write_text("")
    job = SimpleNamespace(run_split=lambda arguments: 0 if find_spec("my_own_nets") else 1)
    monkeypatch.setattr(commands, "import_module", lambda name: job)
    assert here("split")[0] == 0


def test_every_job_is_a_command_and_every_command_has_its_function() -> None:
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert jobs <= COMMANDS.keys()
    for name in COMMANDS:
        assert callable(getattr(main, f"run_{name}")), name


@pytest.mark.parametrize("arguments", [["pull", "tiny"], ["push"], ["export", "tiny", "jpeg-10"], ["sign", "--key", "nowhere"]])
def test_what_is_missing_is_named(arguments: list[str], here: Here) -> None:
    code, out, error = here(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ([], "usage: gearnn COMMAND"), (["splti"], "did you mean split?"), (["evalute"], "did you mean evaluate?"),
        (["xyz"], "gearnn --help lists the commands"),
    ],
)  # fmt: skip
def test_without_a_command_and_with_a_wrong_one_it_says_which_there_are(arguments: list[str], answer: str, here: Here) -> None:
    code, out, error = here(*arguments)
    assert (code, out) == (2, "")
    assert answer in error


def test_ctrl_c_while_modules_are_imported_is_one_sentence(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "import_module", interrupted)
    assert here("split") == (130, "", "error: interrupted; run the same command again to continue\n")
