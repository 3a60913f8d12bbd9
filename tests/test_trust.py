"""A network that a release names by import path: nothing is imported unless the operator trusts its module."""

import sys
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch

from gearnn_ray.cli.main import run_evaluate, run_sweep
from gearnn_ray.config.command_line import parse_command_line
from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.models.registry import build_model, build_released_model
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.serving.export import export_level
from gearnn_ray.store.releases import Release, Store
from tests import served

NETWORK = """
import pathlib
pathlib.Path(__file__).with_suffix(".imported").touch()
from tests.nets import small
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """A package `my_package` that can be imported; called, the modules of it that were."""
    folder = tmp_path / "code" / "my_package"
    (folder / "deep").mkdir(parents=True)
    for name in ("__init__", "nets", "nets_evil", "deep/__init__", "deep/nets"):
        (folder / f"{name}.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path / "code")
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, name)
    return lambda: {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.imported")}


def forged(folder: Path, network: str) -> Release:
    """A release in the store `folder` whose manifest names this network, every digest in it being right."""
    store = Store(folder)
    served.publish(store)
    content = store.pull("tiny").content
    forgery = content.model_copy(update={"model": content.model.model_copy(update={"name": network})})
    store.publish(forgery, {})
    return store.pull("tiny")


def serve(release: Release, folder: Path, trust: Collection[str]) -> None:
    bundles = pytest.importorskip("gearnn_ray.service.bundles", reason="the extra `serve` is not installed")
    bundles.check_bundles(ServeConfig(store=str(folder), bundles=("tiny",), trust=tuple(trust)))


DOORS: dict[str, Callable[[Release, Path, Collection[str]], object]] = {
    "AdaptiveModel": lambda release, folder, trust: AdaptiveModel(release, trust=trust),
    "AdaptiveModel.pull": lambda release, folder, trust: AdaptiveModel.pull(str(folder), "tiny", trust=trust),
    "export_level": lambda release, folder, trust: export_level(release, "jpeg-10", folder / "level.pt2", (16, 16), trust),
    "service": serve,
}

FORGED = ("os:abort", "http.server:test", "my_package.nets:small")


@pytest.mark.parametrize("network", FORGED)
@pytest.mark.parametrize("door", DOORS)
def test_nothing_is_imported_for_a_forged_manifest(
    network: str, door: str, tmp_path: Path, modules: Callable[[], set[str]]
) -> None:
    release, module = forged(tmp_path / "store", network), network.partition(":")[0]
    for trust in ((), ("my_package.deep", "my_package.ne", "torch")):
        with pytest.raises(UserError, match=f"names the network '{network}'") as caught:
            DOORS[door](release, tmp_path / "store", trust)
        said = str(caught.value)
        assert "only built-in networks load by themselves" in said
        assert f'trust=("{module}",) in Python or --trust {module} on the command line' in said
        assert "\n" not in said
    assert modules() == set()


@pytest.mark.parametrize("job", [run_evaluate, run_sweep])
def test_a_job_refuses_a_forged_manifest_before_a_ray_starts(
    job: Callable[[list[str]], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    forged(tmp_path / "store", "os:abort")
    assert job(["--store", str(tmp_path / "store"), "--release", "tiny", "--trust", "my_package"]) == 2
    assert "names the network 'os:abort'" in capsys.readouterr().err


@pytest.mark.parametrize("trust", ["my_package.nets", "my_package"])
@pytest.mark.parametrize("door", ["AdaptiveModel", "AdaptiveModel.pull", "service"])
def test_a_trusted_module_is_imported(door: str, trust: str, tmp_path: Path, modules: Callable[[], set[str]]) -> None:
    release = forged(tmp_path / "store", "my_package.nets:small")
    DOORS[door](release, tmp_path / "store", (trust,))
    assert modules() == (set() if door == "service" else {"__init__", "nets"})  # the service's replicas import it
    if door == "AdaptiveModel":
        model = AdaptiveModel(release, trust=(trust,))
        assert model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["jpeg-10"]).shape[-2:] == (16, 16)


def test_trust_ends_where_the_name_of_the_module_does(modules: Callable[[], set[str]]) -> None:
    for network in ("my_package.nets_evil:small", "my_package:small", "my_package.deep.nets:small"):
        with pytest.raises(UserError, match="load by themselves"):
            build_released_model(network, 3, ("my_package.nets",))
    with pytest.raises(UserError, match="load by themselves"):
        build_released_model("m:small", 3, "my_package.nets")  # one module, not its letters
    assert modules() == set()
    build_released_model("my_package.deep.nets:small", 3, "my_package.deep")
    assert modules() == {"__init__", "deep/__init__", "deep/nets"}


def test_a_built_in_network_and_the_users_own_word_need_no_trust(modules: Callable[[], set[str]]) -> None:
    build_released_model("drn_d_22", 3)
    build_model("my_package.nets_evil:small", 3)
    assert modules() == {"__init__", "nets_evil"}


def test_trust_on_the_command_line() -> None:
    config, _ = parse_command_line(ServeConfig, ["--trust", "my_package.nets", "other"], "A job.")
    assert config.trust == ("my_package.nets", "other")
