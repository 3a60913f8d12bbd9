"""Every port of a Ray that a job starts is on loopback, and no port answers a request without the Ray's token.

The jobs are real processes, in an environment that switches both guards off where it can (the split job: in one that sets
nothing). The test sends to each port the requests of Ray's own clients, and a pickle that creates a file where it is loaded.
Training waits at a gate meanwhile.
"""

import contextlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from torch import Tensor, nn

from gearnn_ray.cli.main import run_evaluate, run_sweep
from gearnn_ray.core.errors import UserError
from gearnn_ray.store.releases import Store
from tests import served, tiny
from tests.conftest import ROOT
from tests.nets import Small

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

KNOWN = "known-to-everybody"  # a token
# variables that would switch the guards off; a Ray that a job starts must not depend on them
OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": KNOWN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
QUIET = dict.fromkeys(OPEN, "")  # none of them is set

# requests that Ray's processes send to each other, one or more for each kind of process; the empty message is valid in each
REQUESTS = [
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo", "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetSystemConfig", "/ray.rpc.NodeManagerService/GetWorkerPIDs",
    "/ray.rpc.CoreWorkerService/NumPendingTasks", "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/HealthCheck", "/ray.rpc.ReporterService/GetTraceback",
]  # fmt: skip

DRIVER = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="error")
@ray.remote(num_cpus=0)
def mark(path):
    open(path, "w").close()
ray.get(mark.remote(sys.argv[2]), timeout=60)
"""


# ── the jobs ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Held(Small):
    """Waits before each training step while the gate exists."""

    def forward(self, x: Tensor) -> Tensor:
        while torch.is_grad_enabled() and Path(os.environ["GEARNN_TEST_GATE"]).exists():
            time.sleep(0.05)
        return super().forward(x)


def held(num_classes: int) -> nn.Module:
    return _Held(num_classes)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doors")
    tiny.write_folder(folder / "data")
    tiny.write_weights(folder / "weights.safetensors")
    (folder / "home").mkdir()
    return folder


@dataclass
class Job:
    process: "subprocess.Popen[str]"
    gate: Path

    def wait_for(self, seen: Callable[[dict[str, Any]], bool]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and seen(json.loads(line)):
                return
        pytest.fail(f"the job ended first: {self.process.stderr and self.process.stderr.read()}")


@contextlib.contextmanager
def running(job: str, arguments: list[str], work: Path, environment: dict[str, str]) -> Iterator[Job]:
    """A job whose training waits at the gate. It and all that it started are ended with the context."""
    gate = work / "gate"
    gate.touch()
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(work / "home"), "GEARNN_TEST_GATE": str(gate)}
    variables = {name: value for name, value in (variables | environment).items() if value or name not in environment}
    variables.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / job), *arguments, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=variables,
    )  # fmt: skip
    watchdog = threading.Timer(350, process.kill)
    watchdog.start()
    its: list[psutil.Process] = []
    try:
        yield Job(process, gate)
    finally:
        gate.unlink(missing_ok=True)
        with contextlib.suppress(psutil.Error):
            its = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        watchdog.cancel()
        for each in (*its, process):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                each.kill()
        process.communicate()


# ── a client without the token ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Listener:
    """A socket that listens, and the process that it belongs to."""

    ip: str
    port: int
    process: str

    @property
    def is_loopback(self) -> bool:
        ip = ip_address(self.ip)
        return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def listeners_of(pid: int) -> list[Listener]:
    """Every port on which a process or one of its descendants listens."""
    found = []
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            name = next((name for name in ("gcs_server", "raylet") if f"/{name} " in line), line[:60])
            listening = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            found += [Listener(c.laddr.ip, c.laddr.port, name) for c in listening]
    return found


class _Mark:
    """Creates an empty file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.path),)


def send_requests(listener: Listener, marks: Path) -> list[str]:
    """Send a port its clients' requests, without a token and with another one. Returns the requests that it answered."""
    granted = []
    for token, metadata in (("none", ()), ("known", (("authorization", f"Bearer {KNOWN}"),))):
        mark = pickle.dumps(_Mark(marks / f"{listener.port}-{token}"))
        # ray.serve.ASGIRequest: field 1 is the pickled metadata, 2 the pickled arguments
        length = bytes([len(mark) & 127 | 128, len(mark) >> 7])
        request = b"\x0a" + length + mark + b"\x12" + length + mark
        with grpc.insecure_channel(f"127.0.0.1:{listener.port}") as channel:
            unpickled = [(f"/ray.serve.ASGIService/{way}", request) for way in ("HandleRequest", "HandleRequestStreaming")]
            for method, body in [*unpickled, *((request, b"") for request in REQUESTS)]:
                try:
                    if method.endswith("Streaming"):
                        list(channel.unary_stream(method)(body, timeout=5, metadata=metadata))
                    else:
                        channel.unary_unary(method)(body, timeout=5, metadata=metadata)
                    granted.append(f"{method} at {listener}")
                except grpc.RpcError as error:
                    if error.code() == grpc.StatusCode.UNAVAILABLE:
                        break  # speaks no gRPC
                    if error.code() not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED):
                        granted.append(f"{method} at {listener}: {error.code()}")
    for raw in (mark, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(mark), mark)):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", listener.port), 2) as connection:
            connection.sendall(raw)
            connection.settimeout(0.3)
            connection.recv(4096)
    return granted


def join(gcs: Listener, mark: Path) -> "subprocess.Popen[bytes]":
    """A Ray driver that tries to run a task on this cluster, with another token than the cluster's."""
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": KNOWN, "RAY_NUM_REDIS_GET_RETRIES": "2"}
    host = "127.0.0.1"
    if gcs.is_loopback:
        own["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # or it would look for this machine's other address
    else:
        host = socket.gethostbyname(socket.gethostname())
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, f"{host}:{gcs.port}", str(mark)], env={**os.environ, **own},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def assert_closed(pid: int, work: Path, marks: Path) -> None:
    """No port beyond loopback, no answer and no execution without the token, no token in the home folder."""
    marks.mkdir()
    listeners = listeners_of(pid)
    assert {"gcs_server", "raylet"} <= {listener.process for listener in listeners}
    driver = join(next(listener for listener in listeners if listener.process == "gcs_server"), marks / "driver")
    granted = [grant for listener in listeners for grant in send_requests(listener, marks)]
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(60)
    driver.kill()
    driver.wait()
    problems = [f"listens on every address: {listener}" for listener in listeners if not listener.is_loopback]
    problems += [f"was executed: {mark.name}" for mark in marks.iterdir()]
    problems += [f"was answered: {grant}" for grant in granted]
    problems += [f"a token lies in {path}" for path in (work / "home").glob(".ray/*")]
    assert not problems, "\n".join(problems)


# ── the tests ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_service(work: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    served.publish(Store(store))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    arguments = ["--store", str(store), "--bundles", "tiny", "--trust", "tests", "--port", port]
    with running("serve.py", arguments, work, OPEN) as job:
        job.wait_for(lambda event: event["event"] == "serving")
        assert_closed(job.process.pid, work, tmp_path / "marks")


@pytest.fixture(scope="module")
def released(work: Path) -> Path:
    """A store with a release of a split job whose ports were tested while it ran."""
    arguments = tiny.options(
        work, levels=["jpeg-10"], **{"model.name": "tests.test_doors:held", "recipe.epochs": 1, "store": work / "released"}
    )
    with running("split.py", arguments, work, QUIET) as job:
        job.wait_for(lambda event: event["event"] == "started" and event["stage"] == "full")
        assert_closed(job.process.pid, work, work / "marks")
        job.gate.unlink()
        assert job.process.stdout is not None
        assert '"event": "result"' in job.process.stdout.read()
        assert job.process.wait(60) == 0
    return work / "released"


def test_a_split_job(released: Path) -> None:
    assert Store(released).pull("tiny").levels == ("jpeg-10",)


@pytest.mark.parametrize("run", [run_sweep, run_evaluate])
def test_the_other_jobs_start_no_ray_but_a_guarded_one(
    run: Callable[[list[str]], int], released: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def guarded(**_: Any) -> Any:
        raise UserError("the guarded Ray was asked for")

    monkeypatch.setattr("gearnn_ray.ray_jobs.cluster.local_ray", guarded)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert run(["--store", str(released), "--release", "tiny", "--trust", "tests"]) == 2
    assert capsys.readouterr().err == "error: the guarded Ray was asked for\n"


@pytest.mark.slow  # a minute; their Ray is started by the function that starts the split job's
@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("sweep.py", ["--budgets", "60%"]),
        ("evaluate.py", ["--methods", "bn-tuned", "--levels", "jpeg-10", "--baseline-levels", "jpeg-10", "--budgets", "60%"]),
    ],
)
def test_the_other_jobs(job: str, arguments: list[str], released: Path, work: Path, tmp_path: Path) -> None:
    shutil.copytree(released, tmp_path / "store")
    options = [
        "--store",
        str(tmp_path / "store"),
        "--release",
        "tiny",
        "--trust",
        "tests",
        "--data.cache",
        str(work / "cache"),
        *arguments,
    ]
    with running(job, options, work, OPEN) as process:
        process.wait_for(lambda event: event["event"] == "started" and event["stage"] != "images")
        assert_closed(process.process.pid, work, tmp_path / "marks")
