"""The split job as users start it: as a process, and with `ray job submit` on a running cluster."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from gearnn_ray.cli.main import resolve_store, run_split
from gearnn_ray.store.releases import Store
from tests import tiny
from tests.conftest import ROOT

# Importable only from the shipped folder; requires that gearnn_ray was imported from there too.
SHIPPED_NETS = """
from pathlib import Path
import gearnn_ray
from tests_nets import small

assert "working_dir_files" in Path(gearnn_ray.__file__).parts, gearnn_ray.__file__
"""


# environment of the cluster, and of those who submit jobs to it: a token, and loopback only
GUARDED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def _free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The dashboard of a cluster that is started as on a head node, with its own ports and folder."""
    scripts = Path(sys.executable).parent
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path has room for 107 characters
    gcs, dashboard, agent, metrics, client = _free_ports(5)
    head = subprocess.Popen(
        [
            str(scripts / "ray"), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats",
            f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        env={**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "RAY_TMPDIR": folder, **GUARDED},
    )  # fmt: skip
    while head.poll() is None and not _listens(int(dashboard)):
        time.sleep(0.2)
    yield f"http://127.0.0.1:{dashboard}"
    head.terminate()
    head.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


def submit(address: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", address, "--working-dir", "."]
    for _ in range(30):
        done = subprocess.run(
            [*command, "--", "jobs/split.py", *arguments],
            cwd=folder, capture_output=True, text=True, timeout=200, env={**os.environ, **GUARDED},
        )  # fmt: skip
        output = done.stdout + done.stderr
        if "No available agent" not in output and "Failed to connect" not in output:
            break
        time.sleep(2)  # the head is still starting
    return done


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A working directory with the package, which is not installed."""
    folder = tmp_path / "shipped"
    for name in ("gearnn_ray", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests/nets.py", folder / "tests_nets.py")
    (folder / "shipped_nets.py").write_text(SHIPPED_NETS)
    return folder


def test_submitted_to_a_cluster_with_only_the_working_directory(address: str, shipped: Path, tmp_path: Path) -> None:
    tiny.write_folder(tmp_path / "data")
    tiny.write_weights(tmp_path / "weights.safetensors")
    options = {
        "name": "tiny", "store": str(tmp_path / "store"), "levels": ["jpeg-10"], "budget": "20%",
        "data": {"kind": "folder", "path": str(tmp_path / "data"), "num_classes": 3, "cache": str(tmp_path / "cache")},
        "model": {"name": "shipped_nets:small", "weights": str(tmp_path / "weights.safetensors")},
        "recipe": {"epochs": 1, "batch_size": 4, "crop": 24, "precision": "float32"},
    }  # fmt: skip
    (shipped / "my.yaml").write_text(yaml.safe_dump(options))
    done = submit(address, shipped, "--config", "my.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "jpeg-10 partial fine-tune: epoch 1 of 1" in done.stdout
    assert "bundle:   tiny:latest" in done.stdout
    assert Store(tmp_path / "store").pull("tiny").levels == ("jpeg-10",)

    wrong = submit(address, shipped, "--config", "my.yaml", "--levels", "jpeg-0")
    assert wrong.returncode == 1  # the client's code for a job that did not exit 0
    assert "error: " in wrong.stdout
    assert "jpeg-0" in wrong.stdout
    assert "Traceback" not in wrong.stdout


def test_a_submitted_job_keeps_its_store_outside_the_folder_that_ray_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    assert resolve_store("artifacts") == str(Path.home() / "gearnn_ray" / "artifacts")
    assert resolve_store("/data/artifacts") == "/data/artifacts"
    assert resolve_store("s3://bucket/artifacts") == "s3://bucket/artifacts"
    monkeypatch.chdir(tmp_path)
    assert resolve_store("artifacts") == "artifacts"


def test_as_a_process_it_prints_a_table_where_the_bundle_is_and_how_to_pull_it(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    tiny.write_folder(tmp_path / "data")
    tiny.write_weights(tmp_path / "weights.safetensors")
    command = [sys.executable, str(ROOT / "jobs/split.py"), *tiny.options(tmp_path, levels=["jpeg-10", "clean"])]
    environment = {**os.environ, **ray_cluster}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    pull = next(line for line in done.stdout.splitlines() if line.startswith("pull it:"))
    shell = pull.removeprefix("pull it:").replace("python ", f"{sys.executable} ", 1)
    pulled = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert pulled.returncode == 0, pulled.stderr
    assert "conv1.weight" in pulled.stdout
    picture = next(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("picture:"))
    assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_an_invalid_command_line_is_one_sentence_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    job = [sys.executable, str(ROOT / "jobs/split.py")]
    done = subprocess.run([*job, "--levels", "jpeg-101"], capture_output=True, text=True, timeout=60)
    results = [(done.returncode, done.stdout, done.stderr)]
    for arguments in (["--config", "nowhere.yaml"], ["--speed", "3"]):
        results.append((run_split(arguments), *capsys.readouterr()))
    for code, out, err in results:
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
