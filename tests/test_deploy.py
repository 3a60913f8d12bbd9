"""What is in deploy/: manifests for KubeRay and the image of their pods. They are read, because no Kubernetes is at hand."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from gearnn_ray.config.command_line import parse_command_line
from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.store.releases import Store
from tests import served
from tests.conftest import ROOT
from tests.kuberay import schema_of
from tests.nets import TRUST

DEPLOY = ROOT / "deploy"
KINDS = {"raycluster": "RayCluster", "rayjob": "RayJob", "rayservice": "RayService"}
Manifest = dict[str, Any]


def manifest(name: str) -> Manifest:
    found: Manifest = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())
    return found


def accounts() -> dict[str, Manifest]:
    return {each["metadata"]["name"]: each for each in yaml.safe_load_all((DEPLOY / "accounts.yaml").read_text())}


def cluster_of(found: Manifest) -> Manifest:
    spec = found["spec"]
    cluster: Manifest = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return cluster


def pods(found: Manifest) -> Iterator[Manifest]:
    """The pods of a manifest: the head, the workers, and what submits a job."""
    cluster = cluster_of(found)
    yield cluster["headGroupSpec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in cluster["workerGroupSpecs"])
    if "submitterPodTemplate" in found["spec"]:
        yield found["spec"]["submitterPodTemplate"]["spec"]


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * 2 ** {"Ki": 10, "Mi": 20, "Gi": 30}[unit]


@pytest.fixture(params=KINDS)
def found(request: pytest.FixtureRequest) -> Manifest:
    return manifest(request.param)


def test_every_manifest_is_one_that_the_operator_takes(found: Manifest) -> None:
    jsonschema.validate(found, schema_of(found["kind"]))
    assert found["kind"] in KINDS.values()


def test_the_schema_is_awake() -> None:
    wrong = manifest("raycluster")
    wrong["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="readynessProbe"):
        jsonschema.validate(wrong, schema_of("RayCluster"))


def test_a_cluster_is_the_same_in_every_manifest() -> None:
    """What differs is named here, so that no other difference slips in."""
    job, alone, service = (cluster_of(manifest(name)) for name in ("rayjob", "raycluster", "rayservice"))
    assert job == alone
    assert {**service, "workerGroupSpecs": 0, "headGroupSpec": 0} == {
        "rayVersion": job["rayVersion"], "authOptions": job["authOptions"], "workerGroupSpecs": 0, "headGroupSpec": 0,
    }  # fmt: skip


def test_ray_is_the_version_tested_here_and_asks_for_the_token_of_a_secret(found: Manifest) -> None:
    cluster = cluster_of(found)
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token", "secretName": "gearnn-ray-token"}
    assert not re.search("stringData|RAY_AUTH_TOKEN", "".join(path.read_text() for path in DEPLOY.rglob("*.*")))


def test_no_container_is_root_or_can_become_it(found: Manifest) -> None:
    for pod in pods(found):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for node in [*pods(found)][:2]:
        assert node["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
        mounts = {mount["mountPath"] for mount in node["containers"][0]["volumeMounts"]}
        assert mounts == {"/tmp", "/home/gearnn", "/dev/shm"}  # what is written to
        assert {mount["name"] for mount in node["containers"][0]["volumeMounts"]} == {v["name"] for v in node["volumes"]}


def test_every_container_has_limits_and_its_volumes_fit_into_them(found: Manifest) -> None:
    for pod in pods(found):
        for container in pod["containers"]:
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert {"cpu", "memory"} <= limits.keys() == requests.keys()
            volumes = {volume["name"]: volume["emptyDir"] for volume in pod.get("volumes", ())}
            on_disk = sum(bytes_of(each["sizeLimit"]) for each in volumes.values() if "medium" not in each)
            if volumes:
                assert on_disk <= bytes_of(limits["ephemeral-storage"])
                assert bytes_of(volumes["shm"]["sizeLimit"]) < bytes_of(limits["memory"]) / 2
    cluster = cluster_of(found)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert int(group["rayStartParams"]["object-store-memory"]) < 2**30  # the volume at /dev/shm


def test_every_node_has_probes_that_need_no_token(found: Manifest) -> None:
    public = {"/api/local_raylet_healthz", "/api/gcs_healthz", "/-/healthz"}  # in Ray's dashboard, agent and Serve's proxy
    for node in [*pods(found)][:2]:
        (container,) = node["containers"]
        for probe in ("livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["path"] in public
        # a node that answers slowly is taken out of service long before it is killed
        alive = container["livenessProbe"]
        assert alive["periodSeconds"] * alive["failureThreshold"] >= 120


def test_the_head_trains_nothing_and_workers_are_nobody_in_kubernetes(found: Manifest) -> None:
    head, worker = [*pods(found)][:2]
    assert cluster_of(found)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert (head["serviceAccountName"], worker["serviceAccountName"]) == ("gearnn-head", "gearnn-worker")
    assert worker["automountServiceAccountToken"] is False
    assert accounts().keys() == {"gearnn-head", "gearnn-worker"}
    assert accounts()["gearnn-worker"]["automountServiceAccountToken"] is False
    roles = [each["metadata"]["annotations"]["eks.amazonaws.com/role-arn"] for each in accounts().values()]
    assert len(set(roles)) == 2


def test_the_job_is_a_command_that_the_split_job_takes() -> None:
    program, job, *options = shlex.split(manifest("rayjob")["spec"]["entrypoint"])
    assert (program, job) == ("gearnn", "split")
    config, _ = parse_command_line(SplitConfig, options, "A job.")
    assert config.store.startswith("s3://")  # a folder of the head would be gone with it
    assert manifest("rayjob")["spec"]["shutdownAfterJobFinishes"] is True


def application() -> Manifest:
    schema = pytest.importorskip("ray.serve.schema", reason="the extra `serve` is not installed")
    config = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    schema.ServeDeploySchema.model_validate(config)
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
    (found,) = config["applications"]
    return dict(found)


def built(arguments: Mapping[str, object], path: str = "gearnn_ray.service.app:build") -> Any:
    """The deployment that Serve makes of an import path and its arguments, in its own way."""
    api = pytest.importorskip("ray.serve._private.api", reason="the extra `serve` is not installed")
    from ray._common.utils import import_attr

    found = api.call_user_app_builder_with_args_if_necessary(import_attr(path), dict(arguments))
    return found._bound_deployment


def config_of(deployment: Any) -> ServeConfig:
    config: ServeConfig = deployment.init_args[0]
    return config


def test_the_service_is_built_from_its_manifest() -> None:
    told = application()
    deployment = built(told["args"], told["import_path"])
    config = config_of(deployment)
    assert config.store.startswith("s3://")
    assert (config.device, config.num_gpus) == ("cpu", 0)
    assert deployment.num_replicas == config.replicas == 2
    service = manifest("rayservice")["metadata"]["name"] + "-serve-svc"  # as the operator names it
    assert service in config.allowed_hosts
    (worker,) = cluster_of(manifest("rayservice"))["workerGroupSpecs"]
    cpus = int(worker["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert config.replicas * config.num_cpus <= worker["replicas"] * cpus


def test_arguments_are_those_of_the_serve_job_and_as_words_too() -> None:
    config = config_of(built({"bundles": "tiny,tiny:v2", "port": "8001", "num_gpus": "1", "require_signature": "ab" * 32}))
    assert (config.bundles, config.port, config.device) == (("tiny:latest", "tiny:v2"), 8001, "cuda")
    assert config.require_signature == "ab" * 32
    assert config_of(built({}, "gearnn_ray.service.app:build")).bundles == ServeConfig().bundles
    with pytest.raises(ValueError, match="speed"):
        built({"speed": 3})
    with pytest.raises(UserError, match="cameras"):
        built({"watch": ["gate=rtsp://10.0.0.7/stream"]})
    with pytest.raises(UserError, match="cannot be read"):
        built({"require_signature": "nowhere.pub"})


def test_serve_build_writes_a_configuration(tmp_path: Path) -> None:
    scripts = pytest.importorskip("ray.serve.scripts", reason="the extra `serve` is not installed")
    from click.testing import CliRunner

    out = tmp_path / "service.yaml"
    done = CliRunner().invoke(scripts.cli, ["build", "gearnn_ray.service.app:app", "-o", str(out)])
    assert done.exit_code == 0, done.output
    (found,) = yaml.safe_load(out.read_text())["applications"]
    assert found["deployments"][0]["name"] == "gearnn"


def test_the_application_serves_without_the_serve_job(ray_cluster: Mapping[str, str], tmp_path: Path) -> None:
    serve = pytest.importorskip("ray.serve", reason="the extra `serve` is not installed")
    from ray.serve.config import HTTPOptions, ProxyLocation

    from gearnn_ray.service.app import Arguments, build
    from tests.test_service import free_port

    served.publish(Store(tmp_path / "store"))
    port = free_port()
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host="127.0.0.1", port=port))
    try:
        told = {"store": str(tmp_path / "store"), "bundles": ["tiny"], "trust": TRUST, "cache": str(tmp_path / "cache")}
        serve.run(build(Arguments.model_validate(told)), name="gearnn", route_prefix="/")
        health = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60))
        assert health["status"] == "ok"
        frame = urllib.request.Request(f"http://127.0.0.1:{port}/predict", served.jpeg(served.picture(), 10))
        assert urllib.request.urlopen(frame, timeout=60).headers["x-gearnn-level"] == "jpeg-10"
    finally:
        serve.shutdown()


# the image


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, without comments, continued lines as one."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = (line.strip() for line in text.splitlines())
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")]


def told(instruction: str) -> list[str]:
    return [rest for word, rest in instructions() if word == instruction]


def shipped() -> list[str]:
    """Every path of the repository that the image is built from."""
    return [path for line in told("COPY") if "--from" not in line for path in shlex.split(line)[:-1]]


def test_the_image_has_two_stages_on_one_pinned_base_and_ends_as_nobody() -> None:
    arguments = dict(each.split("=") for each in told("ARG"))
    bases = [re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], line.partition(" ")[0]) for line in told("FROM")]
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", bases[0])  # a patch version and a release of Debian
    last = max(index for index, (word, _) in enumerate(instructions()) if word == "FROM")
    users = [rest for word, rest in instructions()[last:] if word == "USER"]
    assert users == ["1000:1000"]  # a number: Kubernetes cannot tell whether a name is root
    assert manifest("raycluster")["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] == 1000


def test_the_image_installs_pinned_packages_only_and_torch_for_cpus_by_default() -> None:
    assert "TORCH_BACKEND=cpu" in told("ARG")
    for command in told("RUN"):
        assert not re.search(r"curl|wget|\bsudo\b|apt-get", command)
        for package in re.findall(r"\bpip install .*?(?=&&|$)", command):
            assert re.search(r"\w==\d", package) or "--constraint deploy/constraints.txt" in package, command
    assert not told("ADD")


def test_the_image_is_built_from_what_the_package_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        "pyproject.toml", "deploy/constraints.txt", project["project"]["readme"], *project["project"]["license-files"],
        *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],
    }  # fmt: skip
    assert set(shipped()) == needed
    assert all((ROOT / path).exists() for path in needed)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert ignored[ignored.index("*") :] == ["*", *(line for line in ignored if line[0] == "!"), "**/__pycache__"]
    assert {line[1:] for line in ignored if line[0] == "!"} == needed


def test_constraints_pin_every_package_that_is_installed_and_agree_with_the_tests() -> None:
    lines = [line for line in (DEPLOY / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pins = dict(re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", line).groups() for line in lines)  # type: ignore[union-attr]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tested = dict(pin.split("==") for pin in project["tool"]["uv"]["constraint-dependencies"])
    direct = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["serve"]]
    names = {re.match("[A-Za-z0-9-]+", each)[0].lower() for each in direct}  # type: ignore[index]
    assert names <= pins.keys()
    assert {name: pins[name] for name in tested.keys() & pins.keys()} == {n: tested[n] for n in tested.keys() & pins.keys()}
    assert pins["ray"] == ray.__version__


def _builder() -> bool:
    done = shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, timeout=60)
    return bool(done) and done.returncode == 0  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_image_builds_and_runs() -> None:
    if not _builder():
        pytest.skip("no builder of images runs here")
    build = ["docker", "build", "-q", "-f", "deploy/Dockerfile", "-t", "gearnn-ray:tests", "."]
    subprocess.run(build, cwd=ROOT, check=True)
    run = [
        "docker",
        "run",
        "--rm",
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--tmpfs",
        "/home/gearnn",
        "gearnn-ray:tests",
        "gearnn",
        "doctor",
    ]
    done = subprocess.run(run, capture_output=True, text=True)
    assert "ray 2.60.0" in done.stdout
