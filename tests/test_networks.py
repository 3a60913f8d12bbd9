"""Segmentation networks of any origin: forms of answers, padding, the trial before training, and installed libraries."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from gearnn_ray.cli.early_checks import check_split
from gearnn_ray.config.command_line import parse_command_line
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.split import ModelConfig, SplitConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.models.layers import network_state
from gearnn_ray.models.libraries import resolved
from gearnn_ray.models.light_maskrcnn import _Conv
from gearnn_ray.models.names import check_released_name
from gearnn_ray.models.registry import build_model
from gearnn_ray.models.segmenter import logits_of, padded
from gearnn_ray.models.weights import load_weights, read_weights
from gearnn_ray.offline.base import check_network, network_of
from gearnn_ray.offline.network_check import try_segmenter
from gearnn_ray.serving.kinds import kind_of
from gearnn_ray.tasks import task_by_name
from tests.conftest import NORMALISATION
from tests.nets import Small, too_deep

K = 3
IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "form",
    [
        lambda y: y,
        lambda y: {"out": y, "aux": y + 1},
        lambda y: {"loss": None, "logits": y},
        lambda y: {"sem_seg": y},
        lambda y: SimpleNamespace(logits=y),
        lambda y: (y, y + 1),
        lambda y: [{"out": y}, y + 1],
    ],
)
def test_logits_are_found_in_every_form(form: Callable[[Tensor], Any]) -> None:
    y = torch.randn(2, K, 4, 5)
    assert logits_of(form(y)) is y


@pytest.mark.parametrize(("raw", "found"), [({"masks": 1}, "a dict with masks"), (None, "a NoneType"), ((), "a tuple")])
def test_other_forms_are_named(raw: Any, found: str) -> None:
    with pytest.raises(UserError, match=f"the network returned {found}: expected logits"):
        logits_of(raw)


class _Quarter(nn.Module):
    """Logits at a quarter of the size of images whose sides must be multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, K, 4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        assert not any(side % 4 for side in x.shape[-2:])
        return {"out": self.conv(x)}


def test_a_padded_network_takes_images_of_any_size_and_answers_at_that_size() -> None:
    plain = _Quarter()
    network, names = padded(_Quarter(), 4), plain.state_dict().keys()
    network.load_state_dict(plain.state_dict())
    assert network.state_dict().keys() == names
    fitting, x = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 7, 10)
    expected = F.interpolate(plain(fitting)["out"], size=(8, 12), mode="bilinear")
    assert torch.equal(network(fitting), expected)
    bordered = torch.cat([x, x[..., -1:], x[..., -1:]], -1)
    bordered = torch.cat([bordered, bordered[..., -1:, :]], -2)
    assert torch.equal(network(x), network(bordered)[..., :7, :10])


class _Faulty(Small):
    """Wrong in one way."""

    def __init__(self, fault: str) -> None:
        super().__init__(K + (fault == "classes"))
        self.fault = fault
        if fault == "statistics":
            self.bn1 = nn.BatchNorm2d(8, track_running_stats=False)
        if fault == "pooled":
            self.bn3 = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        if self.fault == "one" and len(x) > 1:
            raise ValueError("one at a time")
        y = super().forward(x)
        if self.fault == "pooled":
            return y + self.bn3(x.mean((2, 3), keepdim=True))
        faults: dict[str, Callable[[], Any]] = {
            "classifier": lambda: y.mean((2, 3)),
            "mask": lambda: y.argmax(1),
            "turned": lambda: F.interpolate(y, size=(y.shape[3], 2 * y.shape[2])).mT,
            "nothing": lambda: None,
        }
        return faults.get(self.fault, lambda: y)()


@pytest.mark.parametrize(
    ("fault", "batch_size", "found"),
    [
        ("classifier", 2, r"faulty classifies whole images \(its answer is \[1, 3\]\)"),
        ("mask", 2, r"answers 1 images with int64 \[1, 48, 64\]: expected logits \[1, 3, h, w\]"),
        ("classes", 2, r"has 4 classes and the data 3: build it with as many"),
        ("turned", 2, r"answers an image of 64x48 with logits of .*exchanged"),
        ("nothing", 2, r"is no network for segmentation: the network returned a NoneType"),
        ("one", 2, r"takes one image, but not two \(ValueError: one at a time\)"),
        ("statistics", 2, r"depends on what else is in its batch"),
        ("pooled", 1, r"fails in training mode on a batch of 1 crops .*give --recipe.batch-size 2 or more"),
    ],
)
def test_each_fault_of_a_network_is_one_sentence(fault: str, batch_size: int, found: str) -> None:
    recipe = Recipe(crop=32, batch_size=batch_size)
    with pytest.raises(UserError, match=found):
        try_segmenter("faulty", _Faulty(fault), K, NORMALISATION, task_by_name("segmentation"), IMAGE, recipe)


def test_the_trial_leaves_the_weights_and_says_which_padding_helps() -> None:
    task, network = task_by_name("segmentation"), Small(K)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    try_segmenter("small", network, K, NORMALISATION, task, IMAGE, Recipe(crop=32))
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(UserError, match=r"fails on a validation image of 64x48 .* or give --model.pad-to 64"):
        try_segmenter("deep", too_deep(K), K, NORMALISATION, task, IMAGE, Recipe(crop=32))
    try_segmenter("deep", padded(too_deep(K), 64), K, NORMALISATION, task, IMAGE, Recipe(crop=32))


def test_padding_is_part_of_a_network_and_of_its_keys() -> None:
    data = open_dataset("scenes", train=1, val=1)
    model = ModelConfig(name="tests.nets:too_deep", pad_to=64)
    network = network_of(model, data.num_classes, "segmentation")
    check_network(network, None, None, data)
    assert network.inputs()["pad_to"] == 64
    assert "pad_to" not in network_of(ModelConfig(name="tests.nets:small"), 3, "segmentation").inputs()
    with pytest.raises(UserError, match=r"model.pad_to is given and detectors take images of any size"):
        parse_command_line(SplitConfig, ["--task", "detection", "--model.pad-to", "32"], "")


# ── installed libraries ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "arguments", "pad_to"),
    [
        ("torchvision:lraspp_mobilenet_v3_large", {}, None),
        ("timm:resnet10t", {}, None),
        ("timm:tf_mobilenetv3_small_minimal_100", {}, None),
        ("timm:vit_tiny_patch16_224", {"img_size": 64, "depth": 3}, None),
        ("smp:unet", {"encoder_name": "resnet18"}, 32),
    ],
)
def test_networks_of_installed_libraries(name: str, arguments: Mapping[str, Any], pad_to: int | None) -> None:
    library = {"timm": "timm", "smp": "segmentation_models_pytorch"}.get(name.partition(":")[0], "torchvision")
    pytest.importorskip(library, reason=f"{library} is an optional library")
    image = IMAGE if pad_to else np.resize(IMAGE, (64, 64, 3))
    network = build_model(name, K, arguments, pad_to)
    try_segmenter(name, network, K, NORMALISATION, task_by_name("segmentation"), image, Recipe(crop=64))


def test_a_folder_of_transformers_is_built_and_loaded_and_needs_no_folder_afterwards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an optional library")
    sizes = {"hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    original = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=K, **sizes)).eval()
    original.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}')
    # whoever saved it may have done so in half precision, and with another version
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "float16", "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = network_of(ModelConfig(name=f"hf:{tmp_path}"), K, "segmentation")
    assert "transformers_version" not in found.arguments["config"]
    assert {tensor.dtype for tensor in network_state(found.build()).values()} == {torch.float32}
    assert (found.name, found.normalisation.mean) == ("hf:segformer", (0.5, 0.5, 0.5))
    assert str(tmp_path) not in found.arguments["config"]
    weights = read_weights(tmp_path)
    network = found.build().eval()
    load_weights(network, weights, "w")
    x = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        assert torch.equal(logits_of(network(x)), original(x).logits)
    for damage, sentence in (
        ({"decode_head.classifier.weight": torch.zeros(9, 8, 1, 1)}, "'decode_head.classifier.weight' .* has the shape"),
        ({"stranger": torch.zeros(1)}, "has 'stranger'"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_weights(network, read_weights(tmp_path).__class__({**weights.state, **damage}), "w")
    with pytest.raises(UserError, match="download it first with `hf download nobody/nothing`"):
        resolved("hf:nobody/nothing", {})


@pytest.mark.parametrize(
    ("name", "arguments", "found"),
    [
        ("torchvision:resnet18", {}, "torchvision has no segmentation network 'resnet18': expected one of deeplabv3"),
        ("torchvision:fcn_resnet50", {"weights_backbone": "DEFAULT"}, "expected only aux_loss"),
        ("timm:hf-hub:somebody/network", {}, "timm has no network"),
        ("timm:resnet18", {"checkpoint_path": "/tmp/evil.pt"}, "'checkpoint_path', which the job sets itself"),
        ("smp:unet9", {}, "segmentation_models_pytorch has no 'unet9'"),
        ("smp:unet", {"encoder_weights": "imagenet"}, "'encoder_weights', which the job sets itself"),
        ("smp:", {}, "names none of the library's"),
    ],
)
def test_what_a_library_does_not_have_or_would_fetch(name: str, arguments: Mapping[str, Any], found: str) -> None:
    for prefix, library in (("timm", "timm"), ("smp", "segmentation_models_pytorch")):
        if name.startswith(prefix):
            pytest.importorskip(library, reason=f"{library} is an optional library")
    with pytest.raises(UserError, match=found):
        build_model(name, K, arguments)


def test_a_missing_library_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("gearnn_ray.config.catalogue.LIBRARIES", {"timm": "no_such_timm"})
    monkeypatch.setattr("gearnn_ray.models.libraries.LIBRARIES", {"timm": "no_such_timm"})
    monkeypatch.setattr("gearnn_ray.cli.early_checks.LIBRARIES", {"timm": "no_such_timm"})
    monkeypatch.setenv("RAY_ADDRESS", "local")
    sentence = r"'timm:resnet18' needs no_such_timm, which is not installed: install gearnn-ray\[timm\]"
    with pytest.raises(UserError, match=sentence):
        check_split(SplitConfig(store=str(tmp_path), model={"name": "timm:resnet18"}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=sentence):
        build_model("timm:resnet18", K)


def test_a_release_may_name_torchvisions_networks_and_others_only_with_trust() -> None:
    check_released_name("torchvision:fcn_resnet50", ())
    for name, library in (
        ("timm:resnet18", "timm"),
        ("smp:unet", "segmentation_models_pytorch"),
        ("hf:segformer", "transformers"),
    ):
        prefix = name.partition(":")[0]
        with pytest.raises(UserError, match=f"if you trust the code of {library}, give .*--trust {prefix}"):
            check_released_name(name, ("torchvision",))
        check_released_name(name, (prefix,))


# ── variants of torch's layers ───────────────────────────────────────────────────────────────────────────────────────


class _Scaled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_variants_of_layers_are_known_by_what_they_compute() -> None:
    assert kind_of(LayerNorm2d(8)).__name__ == "AdaptiveLayerNorm2d"
    assert kind_of(_Conv(3, 8, 3, 2, bias=False)).__name__ == "AdaptiveConvSame"
    assert kind_of(_Scaled(8)).__name__ == "PerLevel"
    timm = pytest.importorskip("timm", reason="timm is an optional library")
    layers = timm.layers
    for module, kind in (
        (layers.BatchNormAct2d(8), "AdaptiveBatchNormAct"),
        (layers.BatchNormAct2d(8, act_layer=nn.SiLU), "AdaptiveBatchNormAct"),
        (layers.FrozenBatchNormAct2d(8), "AdaptiveBatchNormAct"),
        (layers.GroupNormAct(8, 2), "AdaptiveGroupNormAct"),
        (layers.LayerNormAct2d(8), "AdaptiveLayerNorm2d"),
        (layers.LayerNorm(8), "AdaptiveLayerNormAct"),
        (layers.Conv2dSame(4, 8, 3, 2), "AdaptiveConvSame"),
        (layers.ScaledStdConv2d(4, 8, 3), "PerLevel"),
    ):
        assert kind_of(module).__name__ == kind, module
