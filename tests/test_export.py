"""The network of one level as files for other runtimes: each file is loaded again and gives the level's own outputs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from gearnn_ray import Store, UserError
from gearnn_ray.models.layers import network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.models.weights import read_weights
from gearnn_ray.serving.export import export_level, export_levels
from gearnn_ray.store.releases import Release
from tests.manifests import level_entry, manifest_of
from tests.nets import TRUST

CLASSES = 3
SIZE = (32, 40)
ADAPTED = {
    "tests.nets:small": ("bn1.weight", "conv2.weight"),
    "drn_d_22": ("base.0.1.weight", "seg.bias"),
    "tests.test_export:one_size": ("prior", "conv2.weight"),
}


def publish(
    folder: Path,
    network: str = "tests.nets:small",
    reference: dict[str, Any] | None = None,
    levels: tuple[str, ...] = ("jpeg-10",),
) -> Release:
    """A release whose levels' outputs differ clearly from those of the base and of each other; the second has fewer tensors."""
    torch.manual_seed(0)
    model = build_model(network, CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    state = network_state(model)
    store, entries = Store(folder), {}
    for number, level in enumerate(levels):
        names = ADAPTED.get(network, ADAPTED["tests.nets:small"])[number:]
        adaptor = {name: state[name] * (1.5 + number) + 0.1 for name in names}
        entries[level] = level_entry(store.put_state(adaptor), sum(t.numel() for t in adaptor.values()), sorted(adaptor))
    base = store.put_state(state)
    manifest = manifest_of(
        "tiny", network, CLASSES, base, entries, reference, class_names=["road", "tree", "sky"],
        normalisation={"mean": [0.4, 0.4, 0.4], "std": [0.3, 0.3, 0.3]},
    )  # fmt: skip
    store.publish(manifest, {})
    return store.pull("tiny")


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return publish(tmp_path / "store")


def expected(release: Release, level: str, images: Tensor) -> Tensor:
    model = build_model(release.content.model.name, CLASSES)
    model.load_state_dict({**release.base_state(), **({} if level == "clean" else release.adaptor_state(level))})
    with torch.no_grad():
        return model.eval()(images)


def of_each(release: Release, levels: list[str], images: Tensor) -> Tensor:
    """What each image's own network gives."""
    return torch.cat([expected(release, level, image[None]) for level, image in zip(levels, images, strict=True)])


def run_pt2(path: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    extra = {"gearnn_ray": ""}
    return torch.export.load(path, extra_files=extra).module(), json.loads(extra["gearnn_ray"])


def run_onnx(path: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["images"]
    about = json.loads(session.get_modelmeta().custom_metadata_map["gearnn_ray"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), about


@pytest.mark.parametrize("level", ["jpeg-10", "clean"])
def test_a_plain_state_dict(release: Release, tmp_path: Path, level: str) -> None:
    path = export_level(release, level, tmp_path / "level.safetensors")
    images = torch.randn(2, 3, *SIZE)
    model = build_model("tests.nets:small", CLASSES)
    model.load_state_dict(safetensors.torch.load_file(path))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), expected(release, level, images))
    # the normalisation comes along, so that the file is a base like any other
    about = read_weights(path).about
    assert (about["mean"], about["std"], about["level"]) == ([0.4] * 3, [0.3] * 3, level)
    assert about["release"] == f"tiny@{release.digest}"


@pytest.mark.parametrize(("network", "run"), [("tests.nets:small", run_pt2), ("drn_d_22", run_onnx)])
def test_a_graph_gives_the_outputs_of_the_levels_own_network(
    tmp_path: Path, network: str, run: Callable[[Path], tuple[Callable[[Tensor], Tensor], dict[str, Any]]]
) -> None:
    release = publish(tmp_path / "store", network)
    suffix = {run_pt2: ".pt2", run_onnx: ".onnx"}[run]
    exported, about = run(export_level(release, "jpeg-10", tmp_path / f"level{suffix}", SIZE, TRUST))
    # any batch, and sizes that are not a multiple of the stride
    for shape in ((1, 3, *SIZE), (3, 3, *SIZE), (2, 3, 50, 67)):
        images = torch.randn(shape)
        own = expected(release, "jpeg-10", images)
        with torch.no_grad():
            logits = exported(images)
        assert logits.shape == own.shape
        torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, expected(release, "clean", images), rtol=1e-2)
    assert (about["class_names"], about["mean"]) == (["road", "tree", "sky"], [0.4] * 3)


def test_one_file_has_all_levels_and_takes_them_mixed(tmp_path: Path) -> None:
    release = publish(tmp_path / "store", levels=("jpeg-10", "jpeg-30"))
    path = export_levels(release, tmp_path / "all.onnx", SIZE, TRUST)
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["images", "level"]
    about = json.loads(session.get_modelmeta().custom_metadata_map["gearnn_ray"])
    assert about["levels"] == ["clean", "jpeg-10", "jpeg-30"]
    for number, size in ((1, SIZE), (7, SIZE), (3, (50, 67))):
        level, images = (torch.arange(number) + number) % 3, torch.randn(number, 3, *size)
        (logits,) = session.run(["logits"], {"images": images.numpy(), "level": level.numpy()})
        own = of_each(release, [about["levels"][each] for each in level], images)
        torch.testing.assert_close(torch.from_numpy(logits), own, rtol=1e-4, atol=1e-4)
        others = of_each(release, [about["levels"][each - 1] for each in level], images)
        assert not torch.allclose(own, others, rtol=1e-2)


def test_a_network_that_runs_as_a_whole_is_one_file_too(tmp_path: Path) -> None:
    reference = {"height": 32, "width": 40, "luma": 90.0, "luma_spread": 0.2}
    release = publish(tmp_path / "store", "tests.test_export:one_size", reference, ("jpeg-10", "jpeg-30"))
    run, about = run_pt2(export_levels(release, tmp_path / "all.pt2", SIZE, TRUST))
    for level in (torch.tensor([2, 0, 1, 0]), torch.tensor([1])):
        images = torch.randn(len(level), 3, *SIZE)
        own = of_each(release, [about["levels"][each] for each in level], images)
        torch.testing.assert_close(run(images, level), own)  # type: ignore[call-arg]


def test_all_levels_in_one_file_have_limits_that_are_said(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"ends in '\.safetensors': expected one of \.pt2, \.onnx"):
        export_levels(release, tmp_path / "all.safetensors", SIZE, TRUST)
    monkeypatch.setattr("gearnn_ray.serving.all_levels.has_regions", lambda _: True)
    with pytest.raises(UserError, match="sees regions of its images, whose number depends on the image: export one level"):
        export_levels(release, tmp_path / "all.pt2", SIZE, TRUST)


def test_a_network_of_one_size_is_written_for_that_size(tmp_path: Path) -> None:
    release = publish(
        tmp_path / "store", "tests.test_export:one_size", {"height": 32, "width": 40, "luma": 90.0, "luma_spread": 0.2}
    )
    run, _ = run_pt2(export_level(release, "jpeg-10", tmp_path / "level.pt2", trust=TRUST))
    images = torch.randn(5, 3, *SIZE)
    torch.testing.assert_close(run(images), expected(release, "jpeg-10", images))
    with pytest.raises(UserError, match=r"cannot be written as \.pt2 for 64x48 images"):
        export_level(release, "jpeg-10", tmp_path / "level.pt2", (48, 64), TRUST)


def test_a_network_that_puts_its_logits_in_a_dict(tmp_path: Path) -> None:
    release = publish(tmp_path / "store", "tests.test_export:in_a_dict")
    images = torch.randn(2, 3, *SIZE)
    run, _ = run_pt2(export_level(release, "jpeg-10", tmp_path / "level.pt2", SIZE, TRUST))
    torch.testing.assert_close(run(images), expected(release, "jpeg-10", images)["out"])


def test_a_network_that_counts_its_images_takes_any_number(tmp_path: Path) -> None:
    release = publish(tmp_path / "store", "tests.test_export:counts_images")
    run, _ = run_pt2(export_level(release, "jpeg-10", tmp_path / "level.pt2", SIZE, TRUST))
    for batch in (1, 5):
        images = torch.randn(batch, 3, *SIZE)
        torch.testing.assert_close(run(images), expected(release, "jpeg-10", images))


def test_an_export_that_fails_gives_one_sentence(release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(sentence: str, release: Release, level: str, path: Path, size: tuple[int, int] | None = SIZE) -> None:
        with pytest.raises(UserError, match=sentence) as caught:
            export_level(release, level, path, size, TRUST)
        assert "\n" not in str(caught.value)
        assert not path.exists()

    refused("no level 'jpeg-11'", release, "jpeg-11", tmp_path / "level.pt2")
    refused("ends in '.pt'", release, "jpeg-10", tmp_path / "level.pt")
    refused("ends in 'nothing'", release, "jpeg-10", tmp_path / "level")
    refused("cannot be written", release, "jpeg-10", tmp_path / "nowhere" / "level.safetensors")
    refused("give image_size", release, "jpeg-10", tmp_path / "level.pt2", None)
    looks = publish(tmp_path / "looks", "tests.nets:afraid_of_the_dark")
    refused("use .safetensors", looks, "jpeg-10", tmp_path / "level.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused("the extra onnx", release, "jpeg-10", tmp_path / "level.onnx")


class _OneSize(nn.Module):
    """Has a number for every pixel."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, module in network.named_children():
            setattr(self, name, module)
        self.network = type(network).forward
        self.prior = nn.Parameter(torch.arange(float(np.prod(SIZE))).reshape(SIZE) / 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self, x) + self.prior


def one_size(num_classes: int) -> nn.Module:
    return _OneSize(build_model("tests.nets:small", num_classes))


class _CountsImages(_OneSize):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.prior[:1, :1].expand(len(x), 1)[..., None, None]


def counts_images(num_classes: int) -> nn.Module:
    return _CountsImages(build_model("tests.nets:small", num_classes))


class _InADict(_OneSize):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": super().forward(x)}


def in_a_dict(num_classes: int) -> nn.Module:
    return _InADict(build_model("tests.nets:small", num_classes))
