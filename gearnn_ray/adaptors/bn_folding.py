"""A batch normalisation's running statistics, folded into its weight and bias: two tensors say what four did.

As it is used, y = γ·(x - μ)/√(σ² + ε) + β is affine in x. With the base's μ₀ and σ₀² it is the same for

    γ' = γ·√(σ₀² + ε)/√(σ² + ε)        β' = β + γ·(μ₀ - μ)/√(σ² + ε)

so that an adaptor need not hold statistics, and what moved is compared in one unit. Knows nothing of levels or stores.
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
    """By the layer that their statistics are: batch normalisations with all four tensors, none of them another's too."""
    tensors = {layer.name: layer.tensors for layer in layers_of(model)}
    found = dict[str, Foldable]()
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or not module.affine or module.running_mean is None:
            continue
        weight, bias, mean, variance = (
            f"{path}.{leaf}" if path else leaf for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        own = {weight: (weight,), bias: (bias,), statistics_of(path): (mean, variance)}
        if all(tensors.get(layer) == names for layer, names in own.items()):
            found[statistics_of(path)] = Foldable(weight, bias, mean, variance, module.eps)
    return found


def fold(
    normalisations: Collection[Foldable], base: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`state` with the base's statistics in these normalisations, and the weights and biases that make up for it.

    In evaluation mode it is the same network, to rounding. Computed in float64 by single operations, so that everyone gets the
    same bits.
    """
    folded = dict(state)
    for each in normalisations:
        scale = (base[each.variance].double() + each.eps).sqrt() / (state[each.variance].double() + each.eps).sqrt()
        weight, bias = state[each.weight], state[each.bias]
        shift = (base[each.mean].double() - state[each.mean].double()) / (
            state[each.variance].double() + each.eps
        ).sqrt()
        folded[each.weight] = (weight.double() * scale).to(weight.dtype)
        folded[each.bias] = (bias.double() + weight.double() * shift).to(bias.dtype)
        folded[each.mean], folded[each.variance] = base[each.mean], base[each.variance]
    return folded
