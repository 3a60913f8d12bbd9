"""`jobs/serve.py` as a user starts it: a real process with a Ray of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import psutil
import pytest

from gearnn_ray.cli.main import run_serve
from gearnn_ray.config.command_line import parse_command_line
from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.store.releases import Store
from tests import served
from tests.conftest import ROOT

pytest.importorskip("ray.serve", reason="the extra `serve` is not installed")
from gearnn_ray.service import deployment as service

PINNED = "tiny@sha256:" + "0" * 64


def parse(*arguments: str) -> ServeConfig:
    return parse_command_line(ServeConfig, arguments, "A job.")[0]


def test_a_configuration_reads_back_and_references_are_normalised(tmp_path: Path) -> None:
    config = parse("--bundles", "tiny", "tiny:v2", PINNED, "--cameras", "north", "90", "--limits.megapixels", "2")
    assert config.bundles == ("tiny:latest", "tiny:v2", PINNED)
    assert config.cameras == {"north": 90.0}
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    assert parse("--config", str(file)) == config
    assert parse().host == "127.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--bundles", "../x"], "'../x' is no bundle"),
        (["--bundles", "tiny@sha256:0"], "no bundle"),
        (["--bundles", "tiny", "tiny:latest"], "given twice"),
        (["--bundles"], "no bundle is given"),
        (["--cameras", "north", "300"], "the mean luma of camera north is 300"),
        (["--num-gpus", "1.5"], "1.5 GPUs cannot be reserved"),
        (["--max-batch", "0"], r"max_batch is '?0"),
        (["--port", "70000"], r"port is '?70000"),
        (["--untrained", "best"], "best"),
        (["--allowed-hosts", "https://a.example"], "expected a name in lower case"),
    ],
)
def test_an_invalid_command_line_gives_one_sentence(arguments: list[str], found: str) -> None:
    with pytest.raises(UserError, match=found) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["no store", "no tag", "a corrupt blob", "a forged network"])
def test_a_bundle_that_cannot_be_served_is_one_sentence_and_no_ray_is_started(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    store, bundle, sentence = tmp_path / "store", "tiny", "No release tiny"
    if damage != "no store":
        served.publish(Store(store), network_name="os:abort" if damage == "a forged network" else "tests.nets:small")
    if damage == "a forged network":
        sentence = "'os:abort'"
    if damage == "no tag":
        bundle = "tiny:v2"
    if damage == "a corrupt blob":
        blob = next((store / "blobs/sha256").iterdir())
        blob.write_bytes(b"x" + blob.read_bytes()[1:])
        sentence = blob.name
    assert run_serve(["--store", str(store), "--bundles", bundle, "--trust", "tests.nets"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert sentence in said.err


def test_a_port_in_use_and_too_few_cpus_are_one_sentence_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} cannot be used \(Address already in use\): free it"):
            service._check_port(ServeConfig(port=port))
    monkeypatch.setattr(service, "_cluster_resources", lambda: {"CPU": 2.0})
    service._check_resources(ServeConfig(replicas=2, num_gpus=0))
    with pytest.raises(UserError, match=r"3 × 1 CPU are needed and this machine has 2: lower replicas or num_cpus"):
        service._check_resources(ServeConfig(replicas=3, num_gpus=0))


@pytest.mark.ray
def test_it_serves_prints_its_address_and_ends_on_sigterm_with_all_its_processes(tmp_path: Path) -> None:
    digest = served.publish(Store(tmp_path / "store"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    job = subprocess.Popen(
        [
            sys.executable, str(ROOT / "jobs/serve.py"), "--store", str(tmp_path / "store"), "--bundles", "tiny",
            "--trust", "tests", "--port", str(port), "--cache", str(tmp_path / "copies"),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    watchdog = threading.Timer(120, job.kill)
    watchdog.start()
    try:
        assert job.stdout is not None
        said = [next(job.stdout, "") for _ in range(5)]
        url = f"http://127.0.0.1:{port}/"
        assert said[0] == f"serving tiny:latest ({digest[:19]}…) with 3 levels on {url} (page)\n"
        assert said[-1] == "Ctrl-C ends it\n"

        frame = served.jpeg(served.picture(), 10)
        request = urllib.request.Request(f"{url}predict", frame)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.headers["x-gearnn-level"] == "jpeg-10"
            assert answer.headers["x-gearnn-release"] == f"tiny@{digest}"
        with urllib.request.urlopen(url, timeout=60) as page:
            assert page.headers["content-type"].startswith("text/html")

        its = psutil.Process(job.pid).children(recursive=True)
        listening = {c.laddr.ip for p in its for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}

        job.send_signal(signal.SIGTERM)
        out, errors = job.communicate(timeout=60)
        assert job.returncode == 0, errors
        assert (out, errors) == ("", "")
        _, alive = psutil.wait_procs(its, timeout=10)
        assert not alive
    finally:
        watchdog.cancel()
        job.kill()
