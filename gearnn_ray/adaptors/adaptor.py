"""Adaptors A_q: what differs between the base and the network of a level. Take one out of a network, put one in.

`{**base, **adaptor}` is the network of that level, bit for bit. Knows nothing of how either came about.
"""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from gearnn_ray.models.layers import layers_of, network_state, same_bits, tensors_of


class ComplementChangedError(Exception):
    """A tensor outside the chosen layers is not bit-identical to the base: this adaptor must not be published."""


def take_adaptor(model: nn.Module, base: Mapping[str, Tensor], chosen: Collection[str]) -> dict[str, Tensor]:
    """The tensors of the `chosen` layers (names as in `layers_of`) of `model`, with state-dict names.

    Raises ComplementChangedError when anything else differs from `base` in a single bit, and KeyError for a chosen
    layer the network does not have.
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
    """Make `model` the network of a level. Raises KeyError or RuntimeError (torch's) when names or shapes do not fit."""
    foreign = sorted(adaptor.keys() - base.keys())
    if foreign:
        raise KeyError(f"the adaptor's tensor {foreign[0]!r} is not in the base")
    model.load_state_dict({**base, **adaptor}, strict=True)
