"""`cluster.yaml` as Ray's own cluster launcher reads it, without a cloud: what it promises must stay true."""

import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parent.parent
Config = dict[str, Any]


@pytest.fixture
def no_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reach for AWS (its client library) or for any network fails the test."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("cluster.yaml must validate offline")

    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setitem(sys.modules, "botocore", None)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)


@pytest.fixture
def config(no_cloud: None) -> Config:
    """The file as `ray up` uses it: Ray's defaults filled in, its schema and its own checks passed."""
    prepared: Config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(prepared)
    return prepared


def workers(config: Config) -> list[Config]:
    return [node for name, node in config["available_node_types"].items() if name != config["head_node_type"]]


def start_commands(config: Config) -> list[str]:
    """The one command that starts Ray on the head, and the one that does on a worker."""
    commands = [
        [c for c in config[f"{kind}_start_ray_commands"] if re.search(r"\bray start\b", c)] for kind in ("head", "worker")
    ]
    assert [len(c) for c in commands] == [1, 1]
    return [c for (c,) in commands]


def pyproject() -> Config:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_schema_check_is_awake(config: Config) -> None:
    with pytest.raises(Exception, match="setup_comands"):
        validate_config(config | {"setup_comands": []})


def test_head_takes_no_training(config: Config) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    # Left out, Ray would fill in what the machine has.
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0


def test_workers_are_spot_gpus_from_zero(config: Config) -> None:
    assert workers(config)
    for worker in workers(config):
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["resources"]["CPU"] > 0
        assert worker["resources"]["GPU"] > 0
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert config["idle_timeout_minutes"] > 0


def test_every_node_has_a_profile_of_its_own(config: Config) -> None:
    """Without one a worker could not write to S3; with the head's it could launch machines."""
    nodes = config["available_node_types"].values()
    profiles = [node["node_config"]["IamInstanceProfile"]["Name"] for node in nodes]
    assert len(set(profiles)) == len(profiles)


def test_ray_is_pinned_to_the_version_tested_here(config: Config) -> None:
    for kind in ("head", "worker"):
        pins = re.findall(r"\bray\[([\w,]+)\]==([\w.]+)", "\n".join(config[f"{kind}_setup_commands"]))
        assert [version for _, version in pins] == [ray.__version__], kind
        assert {"default", "train", "tune"} <= set(pins[0][0].split(",")), kind
    constraints = pyproject().get("tool", {}).get("uv", {}).get("constraint-dependencies", [])
    for constraint in constraints:
        if re.match(r"ray\b(?!-)", constraint):
            assert constraint.partition("==")[2] == ray.__version__


def test_token_authentication_is_on_everywhere(config: Config) -> None:
    for command in start_commands(config):
        assert re.search(r"\bexport RAY_AUTH_MODE=token;.*\bray start\b", command, re.DOTALL), command
    # Ray looks for the token at this path on every node; the text of it never stands in this file.
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"RAY_AUTH_TOKEN\b|disabled", (ROOT / "cluster.yaml").read_text())


def test_start_commands_join_one_cluster(config: Config) -> None:
    head, worker = start_commands(config)
    assert "--head --port=6379 " in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head  # without it no worker is ever launched
    assert "--dashboard-host=127.0.0.1" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker


def test_package_is_shipped_whole_and_installed(config: Config) -> None:
    project = pyproject()
    needed = {
        "pyproject.toml",
        "deploy/constraints.txt",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],
    }
    home = "~/gearnn-ray"
    mounts = {remote: local for remote, local in config["file_mounts"].items() if remote.startswith(f"{home}/")}
    assert mounts == {f"{home}/{name}": name for name in needed}
    assert all((ROOT / name).exists() for name in needed)
    for kind in ("head", "worker"):
        installs = [c for c in config[f"{kind}_setup_commands"] if re.search(rf"pip install .*\s{home}(\s|$)", c)]
        assert len(installs) == 1, kind
        # uv takes an unchanged version for an unchanged package.
        assert f"--reinstall-package {project['project']['name']}" in installs[0]


def test_every_package_has_one_version_and_no_script_is_fetched_and_run(config: Config) -> None:
    for kind in ("head", "worker"):
        commands = config[f"{kind}_setup_commands"]
        for command in commands:
            assert not re.search(r"curl|wget|\|\s*(ba)?sh\b", command), command
            if re.search(r"\bpip install\b", command):
                assert "--constraint ~/gearnn-ray/deploy/constraints.txt" in command or re.search(r" uv==\d[\d.]*$", command), (
                    command
                )
        (python,) = re.findall(r"uv venv .*--python (\S+)", "\n".join(commands))
        assert re.fullmatch(r"3\.11\.\d+", python)
    image = (ROOT / "deploy/Dockerfile").read_text()
    uv, python = re.search(r"uv==(\S+)", "\n".join(commands)), re.search(r"--python (3\S+)", "\n".join(commands))
    assert uv
    assert python
    assert f"uv=={uv[1]}\n" in image
    assert f"PYTHON_VERSION={python[1]}\n" in image


def test_the_credentials_of_a_machine_need_imds_v2_and_ec2_takes_every_option() -> None:
    session = pytest.importorskip("botocore.session", reason="no library of AWS is installed").get_session()
    from botocore.validate import ParamValidator

    run = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node["node_config"]}, run)
        assert not report.has_errors(), report.generate_report()


@pytest.mark.skipif(shutil.which("bash") is None, reason="the nodes' shell is not installed here")
def test_commands_parse_as_shell(config: Config) -> None:
    commands = [c for key, value in config.items() if key.endswith("_commands") for c in value]
    assert len(commands) > 8
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
