"""DRN against its published sizes and names; weights files in the true formats, and everything wrong with one."""

import json
import pickle
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from gearnn_ray.config.command_line import parse_command_line
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Event
from gearnn_ray.data.dataset import Split, open_dataset
from gearnn_ray.data.objects import Objects
from gearnn_ray.models import light_maskrcnn
from gearnn_ray.models.drn import bilinear_kernel
from gearnn_ray.models.layers import layers_of, model_size, network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.models.weights import WeightsFile, digest_of_weights, load_weights, read_weights, start_from
from gearnn_ray.offline.base import check_network, train_base
from gearnn_ray.offline.job_spec import Network
from gearnn_ray.offline.records import Execution
from tests.conftest import NORMALISATION, ROOT


@pytest.mark.parametrize(
    ("name", "floats", "parameters"), [("drn_d_22", 15_907_139, 15_895_363), ("drn_d_38", 26_022_723, 26_003_523)]
)
def test_model_size_is_the_papers(name: str, floats: int, parameters: int) -> None:
    model = build_model(name, num_classes=19)
    assert model_size(model) == floats
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.up.weight.numel() == 4864
    assert not model.up.weight.requires_grad


def test_state_dict_names_are_the_published_ones() -> None:
    names = network_state(build_model("drn_d_22", num_classes=19)).keys()
    for name in (
        "base.0.0.weight", "base.0.1.running_mean", "base.1.0.weight", "base.2.1.bias", "base.3.0.conv1.weight",
        "base.3.0.downsample.0.weight", "base.3.0.downsample.1.running_var", "base.6.1.bn2.bias", "base.7.0.weight",
        "base.8.1.weight", "seg.weight", "seg.bias", "up.weight",
    ):  # fmt: skip
        assert name in names
    assert len(names) == 128  # 103 layers, 25 of them two running statistics
    deeper = network_state(build_model("drn_d_38", num_classes=19)).keys()
    assert {"base.4.3.bn2.weight", "base.5.5.conv1.weight", "base.6.2.conv2.weight"} <= deeper


def test_drn_keeps_the_size_and_dilates_instead_of_striding() -> None:
    model = build_model("drn_d_22", num_classes=5).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 5, 64, 96)
        assert model(torch.zeros(1, 3, 50, 61)).shape == (1, 5, 50, 61)
        assert model.base(torch.zeros(1, 3, 64, 96)).shape == (1, 512, 8, 12)
    assert model.base[5][0].conv1.dilation == (2, 2)
    assert model.base[6][0].conv1.dilation == model.base[6][1].conv2.dilation == (4, 4)
    assert model.base[7][0].dilation == (2, 2)
    assert model.base[8][0].dilation == (1, 1)


def test_upsampler_interpolates_bilinearly() -> None:
    kernel = bilinear_kernel(16)
    assert torch.allclose(kernel[0, 0], torch.tensor(1 / 16 * 1 / 16))
    model = build_model("drn_d_22", num_classes=1)
    constant = model.up(torch.ones(1, 1, 6, 6))[0, 0, 8:-8, 8:-8]
    assert torch.allclose(constant, torch.ones_like(constant))


def _checkpoint(tmp_path: Path, form: str) -> Path:
    state = network_state(build_model("tests.nets:small", num_classes=3))
    if form == "safetensors":
        safetensors.torch.save_file({k: v.half() for k, v in state.items()}, path := tmp_path / "w.safetensors")
        return path
    content: object = state
    if form == "module":
        content = {f"module.{k}": v for k, v in state.items()}
    if form == "wrapped":
        content = {"epoch": 3, "state_dict": state}
    if form == "compiled":
        content = {f"_orig_mod.module.{k}": v for k, v in state.items()}
    if form == "lightning":
        content = {"state_dict": {"criterion.weight": torch.ones(3), **{f"model.{k}": v for k, v in state.items()}}}
    if form == "training":
        optimizer = torch.optim.AdamW(build_model("tests.nets:small", num_classes=3).parameters())
        about = {"args": Namespace(path=Path("runs")), "best": np.float64(1.5), "optimizer": optimizer.state_dict()}
        content = {**about, "model": state}
    if form == "parts":
        for number, (name, tensor) in enumerate(state.items()):
            safetensors.torch.save_file({name: tensor}, tmp_path / f"model-{number}.safetensors")
        index = {"weight_map": {name: f"model-{number}.safetensors" for number, name in enumerate(state)}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path  # a folder, as transformers writes it
    torch.save(content, path := tmp_path / ("w.ckpt" if form == "lightning" else "w.pt"))
    return path


@pytest.mark.parametrize("form", ["safetensors", "plain", "module", "wrapped", "compiled", "lightning", "training", "parts"])
def test_weights_load_from_every_true_format(tmp_path: Path, form: str) -> None:
    path = _checkpoint(tmp_path, form)
    model = build_model("tests.nets:small", num_classes=3)
    weights = read_weights(path)
    load_weights(model, weights, "w")
    prefix = "model." if form == "lightning" else ""
    for name, tensor in network_state(model).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights.state[f"{prefix}{name}"].float())
    fresh = build_model("tests.nets:small", num_classes=3)
    assert start_from(fresh, weights, "w") == sum(tensor.numel() > 1 for tensor in network_state(model).values())


def test_a_checkpoint_with_the_network_twice_is_refused_by_its_prefixes() -> None:
    state = network_state(build_model("tests.nets:small", num_classes=3))
    twice = {f"{prefix}{name}": tensor for prefix in ("ema_model.", "model.") for name, tensor in state.items()}
    with pytest.raises(UserError, match=r"all weights of the network 2 times, behind ema_model\. and model\."):
        load_weights(build_model("tests.nets:small", num_classes=3), WeightsFile(twice), "w")


def test_torchvisions_auxiliary_head_is_left_out_where_the_network_has_none() -> None:
    name = "torchvision:deeplabv3_mobilenet_v3_large"
    published = build_model(name, 3, {"aux_loss": True}).state_dict()
    assert any(tensor.startswith("aux_classifier.") for tensor in published)
    load_weights(build_model(name, 3), WeightsFile(published), "w")
    load_weights(build_model(name, 3, {"aux_loss": True}), WeightsFile(published), "w")


def test_the_digest_of_weights_in_parts_is_that_of_all_of_them(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, "parts")
    before = digest_of_weights(folder)
    assert before == digest_of_weights(folder / "model.safetensors.index.json")
    safetensors.torch.save_file({"head.bias": torch.ones(3)}, folder / "model-0.safetensors")
    assert digest_of_weights(folder) != before


def test_counters_may_be_there_or_not() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    assert "bn1.num_batches_tracked" in model.state_dict()
    assert "bn1.num_batches_tracked" not in network_state(model)
    model.load_state_dict(network_state(model), strict=True)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("evil_was_here"),))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("missing", "lacks 'conv1.weight'"),
        ("extra", "has 'conv9.weight'"),
        ("shape", r"'head.weight' .* has the shape \[4, 8, 1, 1\]: expected \[3, 8, 1, 1\]"),
        ("nan", "'head.weight' .* not finite"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, damage: str, found: str) -> None:
    model = build_model("tests.nets:small", num_classes=3)
    before = network_state(model)
    state = {k: v + 1 for k, v in before.items()}
    if damage == "missing":
        del state["conv1.weight"]
    elif damage == "extra":
        state["conv9.weight"] = torch.zeros(1)
    elif damage == "shape":
        state["head.weight"] = torch.zeros(4, 8, 1, 1)
    else:
        state["head.weight"][0] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=found):
        load_weights(model, read_weights(tmp_path / "w.safetensors"), "w.safetensors")
    assert all(torch.equal(before[k], v) for k, v in network_state(model).items())


def test_a_pickle_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": _Evil()}))
    torch.save({"state": _Evil()}, tmp_path / "v.pt")
    for name in ("w.pt", "v.pt"):
        with pytest.raises(UserError, match="not opened"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "evil_was_here").exists()


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("w.safetensors", b"\xff" * 40, "not a readable safetensors"),
        ("w.safetensors", b"", "not a readable safetensors"),
        ("w.pt", b"junk", "not opened"),
        ("w.bin", b"junk", "not opened"),
        ("w.onnx", b"junk", "ends in '.onnx'"),
        ("w.safetensors.index.json", b"{}", "lists no parts"),
        ("w.safetensors.index.json", b'{"weight_map": {"a": "w.safetensors.index.json"}}', "another list of parts"),
        ("w.safetensors.index.json", b'{"weight_map": {"a": "1.safetensors"}}', "1.safetensors, which is not beside it"),
        ("w.safetensors.index.json", b'{"weight_map": {"a": "../part-1.safetensors"}}', "which is not beside it"),
        ("missing.pt", None, "there is no weights file"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | None, found: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=found):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("drn_d_99", "there is no network"),
        ("os.system", "there is no network"),
        ("no.such.module:f", "cannot be imported"),
        ("tests.nets:nothing", "cannot be imported"),
        ("tests.nets:no_module", "returned a str"),
        ("tests.nets:broken", "RuntimeError: out of paper"),
    ],
)
def test_unknown_networks(name: str, found: str) -> None:
    with pytest.raises(UserError, match=found):
        build_model(name, num_classes=3)


def test_a_network_of_torchvision() -> None:
    model = build_model("torchvision.models.segmentation:lraspp_mobilenet_v3_large", num_classes=4)
    assert isinstance(model, nn.Module)
    kinds = {layer.kind for layer in layers_of(model)}
    assert {"conv_weight", "norm_weight", "norm_bias", "norm_statistics", "bias"} <= kinds


@pytest.mark.skipif(
    not (ROOT.parent / "shared/weights/drn_d_22_camvid.safetensors").is_file(), reason="the shared weights are not here"
)
def test_the_shared_checkpoint_loads_unchanged() -> None:
    model = build_model("drn_d_22", num_classes=11)
    weights = read_weights(ROOT.parent / "shared/weights/drn_d_22_camvid.safetensors")
    load_weights(model, weights, "shared")
    assert weights.about["mean"] == [0.41, 0.42, 0.43]


def test_training_starts_from_the_part_of_a_network_that_a_file_has(tmp_path: Path) -> None:
    """A file of a backbone, one of a network with other classes; and one of something else."""
    whole, other = build_model("light_maskrcnn", num_classes=2), build_model("light_maskrcnn", num_classes=5)
    body = {name.removeprefix("backbone.body."): t for name, t in whole.state_dict().items() if name.startswith("backbone.body.")}
    classifier = {"_fc.weight": torch.zeros(10, 4), "_fc.bias": torch.zeros(10)}
    assert start_from(other, WeightsFile(body | classifier), "lite0.pth") == sum(t.numel() > 1 for t in body.values())
    assert torch.equal(
        other.state_dict()["backbone.body._conv_stem.weight"], whole.state_dict()["backbone.body._conv_stem.weight"]
    )
    fresh = build_model("light_maskrcnn", num_classes=5)
    before = fresh.state_dict()["roi_heads.box_predictor.cls_score.weight"].clone()
    start_from(fresh, WeightsFile(whole.state_dict()), "two.pth")
    after = fresh.state_dict()
    assert torch.equal(after["roi_heads.box_predictor.cls_score.weight"], before)  # six outputs, not three
    assert torch.equal(after["rpn.head.bbox_pred.weight"], whole.state_dict()["rpn.head.bbox_pred.weight"])
    with pytest.raises(UserError, match=r"0 of the 2 tensors in the weights file x\.pth fit this network or a part of it"):
        start_from(other, WeightsFile(classifier), "x.pth")
    stranger = {f"layer{index}.weight": torch.zeros(7, index + 1) for index in range(3)}
    few = {"_conv_stem.weight": body["_conv_stem.weight"], "_bn0.weight": body["_bn0.weight"]}
    with pytest.raises(UserError, match="2 of the 5 tensors"):
        start_from(other, WeightsFile(few | stranger), "x.pth")
    with pytest.raises(
        UserError, match=r"'backbone\.body\._conv_stem\.weight' in the weights file x\.pth holds values that are not"
    ):
        start_from(other, WeightsFile({"_conv_stem.weight": torch.full((32, 3, 3, 3), torch.nan)}), "x.pth")


def test_penn_fudans_experiment_is_a_configuration() -> None:
    yaml = str(ROOT / "docs/results/penn_fudan.yaml")
    config, _ = parse_command_line(SplitConfig, ["--config", yaml, "--data.path", "x", "--model.start", "lite0.pth"], "")
    assert (config.task, config.model.name, config.base_recipe.warm_up, len(config.levels)) == (
        "detection",
        "light_maskrcnn",
        30,
        14,
    )
    plain, _ = parse_command_line(
        SplitConfig,
        ["--model.name", "maskrcnn_resnet50_fpn", "--data.kind", "penn-fudan", "--data.path", "x", "--budget", "0.4%"],
        "",
    )
    assert (plain.task, plain.budget) == ("detection", "0.4%")


def test_a_network_is_tried_on_an_image_before_anything_is_trained() -> None:
    data = open_dataset("scenes", train=1, val=1)
    network = Network("tests.nets:too_deep", data.num_classes, NORMALISATION)
    with pytest.raises(UserError, match=r"too_deep fails on a validation image of 128x96 \(RuntimeError: .*segmentation"):
        check_network(network, None, None, data)
    detection = open_dataset("scenes", task="detection", train=1, val=1)
    masks = Network("light_maskrcnn", 2, NORMALISATION, "detection")
    assert check_network(masks, None, None, detection).floats == model_size(masks.build())
    boxes = replace(detection, val=_WithoutMasks(detection.val))
    with pytest.raises(UserError, match="Mask R-CNN trains on masks and the data set has only boxes"):
        check_network(masks, None, None, boxes)


class _WithoutMasks:
    """A split with boxes alone."""

    def __init__(self, split: Split) -> None:
        self._split, self.ids, self.image = split, split.ids, split.image

    def target(self, index: int) -> Objects:
        return replace(self._split.target(index), rles=None)


def test_convolutions_of_the_light_mask_rcnn_pad_as_tensorflow_does() -> None:
    """SAME: as many outputs as input / stride, rounded up; an odd pixel of padding goes to the bottom and the right."""
    x = torch.randn(1, 2, 8, 9)
    for kernel, stride, pads in ((3, 2, (1, 1, 0, 1)), (5, 2, (2, 2, 1, 2)), (3, 1, (1, 1, 1, 1)), (1, 1, (0, 0, 0, 0))):
        conv = light_maskrcnn._Conv(2, 4, kernel, stride, bias=False)
        expected = F.conv2d(F.pad(x, pads), conv.weight, None, stride)
        assert expected.shape[-2:] == (-(-8 // stride), -(-9 // stride))
        assert torch.equal(conv(x), expected)


def test_a_base_is_trained_anew_from_another_start_or_with_other_arguments(tmp_path: Path) -> None:
    data = open_dataset("scenes", train=2, val=1, height=48, width=48)
    network, recipe = Network("tests.nets:small", data.num_classes, NORMALISATION), Recipe(epochs=1, batch_size=2, crop=32)
    start = tmp_path / "start.pt"
    torch.save(network_state(network.build()), start)
    events: list[Event] = []

    def train(start: Path | None) -> str:
        told = (str(tmp_path / "store"), str(tmp_path / "cache"), network, start and str(start), data, recipe, 0)
        return train_base(*told, Execution("cpu", "float32", 1), events.append).digest

    plain = train(None)
    assert train(start) != plain
    assert [event.kind for event in events if event.kind != "progress"] == ["started", "finished"] * 2
    events.clear()
    assert train(None) == plain
    assert events[0].kind == "reused"
    key = Network("m:f", 2, NORMALISATION).inputs()
    assert "arguments" not in key  # the keys of networks without any stay what they were
    assert Network("m:f", 2, NORMALISATION, arguments={"min_size": 64}).inputs() != key
