"""Folds the running statistics of a batch normalisation into its weight and bias: an adaptor then stores two tensors, not four.

In evaluation mode y = γ·(x - μ)/√(σ² + ε) + β is affine in x. With the base's statistics μ₀ and σ₀² it is the same function for
γ' = γ·√(σ₀² + ε)/√(σ² + ε) and β' = β + γ·(μ₀ - μ)/√(σ² + ε). Changes of all four tensors are then in the units of γ and β.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gearnn_ray.models.layers import layers_of, statistics_of


@dataclass(frozen=True)
class Foldable:
    """The state-dict names of a batch normalisation's γ, β, μ and σ², and its ε."""

    weight: str
    bias: str
    mean: str
    variance: str
    eps: float


def foldable(model: nn.Module) -> dict[str, Foldable]:
    """The batch normalisations with four tensors that no other module shares, by the name of their statistics' layer."""
    tensors = {layer.name: layer.tensors for layer in layers_of(model)}
    normalisations = dict[str, Foldable]()
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or not module.affine or module.running_mean is None:
            continue
        weight, bias, mean, variance = (
            f"{path}.{leaf}" if path else leaf for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        own = {weight: (weight,), bias: (bias,), statistics_of(path): (mean, variance)}
        if all(tensors.get(layer) == names for layer, names in own.items()):
            normalisations[statistics_of(path)] = Foldable(weight, bias, mean, variance, module.eps)
    return normalisations


def fold(normalisations: Collection[Foldable], base: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the base's statistics in these normalisations, and with weights and biases that compensate for them: in
    evaluation mode the network computes the same, up to rounding. Float64 in single operations gives every machine the same bits.
    """
    folded = dict(state)
    for each in normalisations:
        deviation = (state[each.variance].double() + each.eps).sqrt()
        scale = (base[each.variance].double() + each.eps).sqrt() / deviation
        shift = (base[each.mean].double() - state[each.mean].double()) / deviation
        weight, bias = state[each.weight], state[each.bias]
        folded[each.weight] = (weight.double() * scale).to(weight.dtype)
        folded[each.bias] = (bias.double() + weight.double() * shift).to(bias.dtype)
        folded[each.mean], folded[each.variance] = base[each.mean], base[each.variance]
    return folded
