"""Layers as Eq. (1) and (2) see them, what freezing means, and adaptors cut out of a network."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from gearnn_ray.adaptors.adaptor import ComplementChangedError, put_adaptor, take_adaptor
from gearnn_ray.models.layers import (
    alternatives_of,
    layers_of,
    model_size,
    network_state,
    same_bits,
    set_trainable,
    set_training_mode,
    tensors_of,
)
from gearnn_ray.models.registry import build_model


def test_weight_and_bias_are_two_layers_and_running_statistics_one() -> None:
    layers = {layer.name: layer for layer in layers_of(build_model("tests.nets:small", num_classes=3))}
    assert list(layers) == [
        "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_stats",
        "conv2.weight", "bn2.weight", "bn2.bias", "bn2.running_stats", "head.weight", "head.bias", "up.weight",
    ]  # fmt: skip
    assert layers["bn1.running_stats"].tensors == ("bn1.running_mean", "bn1.running_var")
    assert layers["bn1.running_stats"].numel == 16
    assert layers["bn1.running_stats"].kind == "norm_statistics"
    assert [layer.index for layer in layers.values()] == list(range(11))
    assert layers["head.bias"].kind == "bias"
    assert layers["conv1.weight"].kind == "conv_weight"


def test_every_float_is_in_exactly_one_layer() -> None:
    model = build_model("drn_d_22", num_classes=19)
    names = [t for layer in layers_of(model) for t in layer.tensors]
    assert sorted(names) == sorted(network_state(model))
    assert model_size(model) == sum(t.numel() for t in network_state(model).values())


def test_tied_tensors_are_one_layer_and_integers_none() -> None:
    model = nn.Module()
    model.a = nn.Linear(4, 4, bias=False)
    model.b = nn.Linear(4, 4, bias=False)
    model.b.weight = model.a.weight
    model.register_buffer("positions", torch.arange(5))
    model.norm = nn.LayerNorm(4)
    layers = {layer.name: layer for layer in layers_of(model)}
    assert layers["a.weight"].tensors == ("a.weight", "b.weight")
    assert set(layers) == {"a.weight", "norm.weight", "norm.bias"}
    assert layers["norm.weight"].kind == "norm_weight"


def test_a_normalisation_under_two_names_has_its_statistics_once() -> None:
    model = nn.Module()
    model.a = nn.BatchNorm2d(4)
    model.b = model.a
    assert [(layer.name, layer.kind) for layer in layers_of(model)] == [
        ("a.weight", "norm_weight"), ("a.bias", "norm_bias"), ("a.running_stats", "norm_statistics"),
    ]  # fmt: skip
    assert layers_of(model)[2].tensors == ("a.running_mean", "a.running_var", "b.running_mean", "b.running_var")


def test_frozen_batch_norm_of_torchvision() -> None:
    layers = {layer.name: layer.kind for layer in layers_of(FrozenBatchNorm2d(4))}
    assert layers == {"weight": "norm_weight", "bias": "norm_bias", "running_stats": "norm_statistics"}


def test_alternatives_of_tensors_are_the_layers() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    assert alternatives_of(model, "tensor") == tuple(((layer.name,),) for layer in layers_of(model))
    with pytest.raises(ValueError, match="the granularity is 'block', expected 'tensor' or 'module'"):
        alternatives_of(model, "block")  # type: ignore[arg-type]


def test_alternatives_of_modules() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    norms = [tuple(f"bn{i}.{leaf}" for leaf in ("weight", "bias", "running_stats")) for i in (1, 2)]
    assert alternatives_of(model, "module") == (
        (norms[0], ("conv1.weight", *norms[0])),
        (norms[1], ("conv2.weight", *norms[1])),
        (("head.weight", "head.bias"),),
        (("up.weight",),),
    )


@pytest.mark.parametrize(
    "name", ["drn_d_22", "resnet18", "mobilenet_v2", "mobilenet_v3_small", "tests.zoo:zoo", "tests.zoo:tied_names"]
)
def test_every_layer_is_in_one_group_of_modules_and_in_order(name: str) -> None:
    vision = getattr(torchvision.models, name, None)
    model = vision(weights=None) if vision else build_model(name, num_classes=19)
    groups = alternatives_of(model, "module")
    # the last alternative of a group holds all the others
    assert sorted(n for group in groups for n in group[-1]) == sorted(layer.name for layer in layers_of(model))
    index = {layer.name: layer.index for layer in layers_of(model)}
    assert [index[n] for group in groups for n in group[-1]] == list(range(len(index)))
    kinds = {layer.name: layer.kind for layer in layers_of(model)}
    pairs = [group for group in groups if len(group) == 2]
    for norm, both in pairs:
        assert {kinds[n] for n in norm} == {"norm_weight", "norm_bias", "norm_statistics"}
        assert both[len(both) - len(norm) :] == norm
        assert {kinds[n] for n in both[: len(both) - len(norm)]} <= {"conv_weight", "bias"}
    if not name.startswith("tests."):  # there every batch normalisation stands behind its convolution
        assert len(pairs) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_what_stands_behind_a_convolution_is_not_always_its_normalisation() -> None:
    tied = nn.Conv2d(4, 4, 1, bias=False)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(3),  # of something else: as many features as nobody's
        nn.Conv2d(4, 4, 1, bias=False), nn.GroupNorm(2, 4),
        nn.Linear(4, 4), nn.BatchNorm2d(4, affine=False),
        tied, nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, track_running_stats=False),
        nn.ConvTranspose2d(4, 2, 1), FrozenBatchNorm2d(2),
    )  # fmt: skip
    model[7].weight = tied.weight
    assert alternatives_of(model, "module") == (
        (("0.weight", "0.bias"),),
        (("1.weight", "1.bias", "1.running_stats"),),
        (("2.weight",),),
        (("3.weight", "3.bias"),),
        (("4.weight", "4.bias"),),
        (("5.running_stats",),),
        (("6.weight",),),  # the tied convolution, whose second name stands before the normalisation
        (("8.weight", "8.bias"),),
        (("10.weight", "10.bias", "10.running_stats"), ("9.weight", "9.bias", "10.weight", "10.bias", "10.running_stats")),
    )


def test_frozen_means_frozen() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    before = network_state(model)
    chosen = ("bn1.running_stats", "bn2.weight")
    assert [name for name, _ in set_trainable(model, chosen)] == ["bn2.weight"]
    assert model.bn1.training
    assert not model.bn2.training
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    after = network_state(model)
    moved = {name for name in before if not same_bits(before[name], after[name])}
    assert moved == {"bn1.running_mean", "bn1.running_var"}
    assert model.conv1.weight.grad is None
    model.eval()
    set_training_mode(model, None)
    assert model.bn2.training


def test_what_the_network_froze_itself_stays_frozen() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    assert "up.weight" not in [name for name, _ in set_trainable(model, None)]


def test_same_bits_sees_what_equality_does_not() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())
    assert not same_bits(zero, zero.reshape(1, 1))


def test_base_and_adaptor_make_the_network_bit_for_bit() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    base = network_state(model)
    chosen = ("bn1.weight", "bn2.running_stats", "head.bias")
    with torch.no_grad():
        for name in tensors_of(layers_of(model), chosen):
            model.state_dict()[name].add_(0.5)
    adaptor = take_adaptor(model, base, chosen)
    assert list(adaptor) == ["bn1.weight", "bn2.running_mean", "bn2.running_var", "head.bias"]
    other = build_model("tests.nets:small", num_classes=3)
    put_adaptor(other, base, adaptor)
    assert all(same_bits(t, network_state(model)[n]) for n, t in network_state(other).items())


def test_an_adaptor_whose_complement_moved_is_refused() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    base = network_state(model)
    with torch.no_grad():
        weight = model.conv2.weight.view(-1).view(torch.int32)
        weight[17] ^= 1  # the least significant bit of one float
    with pytest.raises(ComplementChangedError, match=r"conv2\.weight lies outside"):
        take_adaptor(model, base, ("bn1.weight",))
    assert take_adaptor(model, base, ("conv2.weight",)).keys() == {"conv2.weight"}
    with pytest.raises(KeyError, match="conv7"):
        take_adaptor(model, base, ("conv7.weight",))
    with pytest.raises(KeyError, match="alien"):
        put_adaptor(model, base, {"alien": torch.zeros(1)})
