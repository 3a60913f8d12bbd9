"""Layers as Eq. (1) and (2) see them, what freezing means, and adaptors cut out of a network."""

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from gearnn_ray.adaptors import ComplementChangedError, put_adaptor, take_adaptor
from gearnn_ray.layers import (
    layers_of,
    model_size,
    network_state,
    same_bits,
    set_trainable,
    set_training_mode,
    tensors_of,
)
from gearnn_ray.models import build_model


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


def test_frozen_batch_norm_of_torchvision() -> None:
    layers = {layer.name: layer.kind for layer in layers_of(FrozenBatchNorm2d(4))}
    assert layers == {"weight": "norm_weight", "bias": "norm_bias", "running_stats": "norm_statistics"}


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
