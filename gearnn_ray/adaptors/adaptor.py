"""Adaptors A_q: the tensors in which a level's network, `{**base, **adaptor}` bit for bit, differs from the base."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from gearnn_ray.models.layers import layers_of, network_state, same_bits, tensors_of


class ComplementChangedError(Exception):
    """A tensor outside the selected layers is not bit-identical to the base: this adaptor must not be published."""


def take_adaptor(model: nn.Module, base: Mapping[str, Tensor], chosen: Collection[str]) -> dict[str, Tensor]:
    """The tensors of the `chosen` layers (names as in `layers_of`) of `model`, by state-dict name. Raises KeyError for an unknown
    layer, ComplementChangedError if a tensor of another layer differs from `base` in a single bit.
    """
    layers = layers_of(model)
    unknown = sorted(set(chosen) - {layer.name for layer in layers})
    if unknown:
        raise KeyError(f"the network has no layer {unknown[0]!r}")
    inside = tensors_of(layers, chosen)
    state = network_state(model)
    if state.keys() != base.keys():
        raise ComplementChangedError("the network and its base do not hold the same tensors")
    for name, tensor in state.items():
        if name not in inside and not same_bits(tensor, base[name]):
            raise ComplementChangedError(f"{name} lies outside the selected layers but differs from the base")
    return {name: state[name] for name in inside}


def put_adaptor(model: nn.Module, base: Mapping[str, Tensor], adaptor: Mapping[str, Tensor]) -> None:
    """Make `model` the network of a level. Raises KeyError or torch's RuntimeError when names or shapes do not fit."""
    foreign = sorted(adaptor.keys() - base.keys())
    if foreign:
        raise KeyError(f"the adaptor's tensor {foreign[0]!r} is not in the base")
    model.load_state_dict({**base, **adaptor}, strict=True)
