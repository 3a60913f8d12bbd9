"""The layers of a network, as Eq. (1) and (2) use them. A layer is one floating-point tensor of the state dict (a weight and its
bias are two, as in Fig. 5), but running mean and variance are one, because a forward pass in training mode updates both.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

_COUNTER = "num_batches_tracked"

Granularity = Literal["tensor", "module"]  # the unit of selection: a single layer, or a module with all its layers
# Groups of alternatives. An alternative is a tuple of layer names; at most one alternative of a group is selected.
Alternatives = tuple[tuple[tuple[str, ...], ...], ...]


@dataclass(frozen=True)
class Layer:
    """One selectable unit: its state-dict name (`<module>.running_stats` for running statistics), its position in state-dict
    order, the state-dict names of its tensors and its number of floats. `kind` is `conv_weight`, `linear_weight`, `norm_weight`,
    `norm_bias`, `norm_statistics`, `bias`, `parameter` or `buffer`.
    """

    name: str
    kind: str
    index: int
    tensors: tuple[str, ...]
    numel: int


def _is_norm(module: nn.Module) -> bool:
    """A normalisation of torch, or a frozen batch normalisation (torchvision's holds its four tensors as buffers)."""
    return isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm)) or "BatchNorm" in type(module).__name__


def _kind(module: nn.Module, leaf: str, is_parameter: bool) -> str:
    if _is_norm(module):
        if leaf in ("weight", "bias"):
            return f"norm_{leaf}"
        if leaf.startswith("running_"):
            return "norm_statistics"
    if not is_parameter:
        return "buffer"
    if leaf == "bias":
        return "bias"
    if leaf == "weight" and isinstance(module, nn.modules.conv._ConvNd):
        return "conv_weight"
    if leaf == "weight" and isinstance(module, nn.Linear):
        return "linear_weight"
    return "parameter"


def statistics_of(path: str) -> str:
    """The name of the layer of running statistics that the batch normalisation at this module path has."""
    return f"{path}.running_stats" if path else "running_stats"


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    """All layers in state-dict order. Tied tensors are one layer with the first of their names. Integer tensors are no layers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    groups: dict[tuple[str, int], tuple[str, str, list[str]]] = {}  # key: identity of a tensor, or of a module for its statistics
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        path, _, leaf = name.rpartition(".")
        module = modules.get(path, model)
        kind = _kind(module, leaf, name in parameters)
        if kind == "norm_statistics":
            unit = statistics_of(path)
            groups.setdefault(("statistics", id(module)), (unit, kind, []))[2].append(name)
        else:
            groups.setdefault(("tensor", id(tensor)), (name, kind, []))[2].append(name)
    return tuple(
        Layer(name, kind, index, tuple(tensors), sum(state[t].numel() for t in tensors))
        for index, (name, kind, tensors) in enumerate(groups.values())
    )


def alternatives_of(model: nn.Module, granularity: Granularity) -> Alternatives:
    """Which layers are selected together, in state-dict order. `tensor`: every layer alone. `module`: all layers of a module,
    except that a convolution and the batch normalisation registered next with as many features (the order in `forward` is
    unknown) form one group with two alternatives: the normalisation alone, or both. Raises ValueError for another granularity.
    """
    layers = layers_of(model)
    if granularity == "tensor":
        return tuple(((layer.name,),) for layer in layers)
    if granularity != "module":
        raise ValueError(f"the granularity is {granularity!r}, expected 'tensor' or 'module': give one of these")
    modules = dict(model.named_modules(remove_duplicate=False))
    # a module whose tensors are all tied to another's has no layers, but still separates its neighbours
    state = model.state_dict()
    owned: dict[str, tuple[str, ...]] = {name.rpartition(".")[0]: () for name in state if state[name].is_floating_point()}
    for layer in layers:
        owned[layer.name.rpartition(".")[0]] += (layer.name,)
    groups: list[tuple[tuple[str, ...], ...]] = []
    paths = list(owned)
    while paths:
        path = paths.pop(0)
        norm = owned[paths[0]] if paths else ()
        if owned[path] and norm and _normalised_by(modules.get(path, model), modules.get(paths[0], model)):
            groups.append((norm, owned[path] + norm))
            paths.pop(0)
        elif owned[path]:
            groups.append((owned[path],))
    return tuple(groups)


def _normalised_by(module: nn.Module, other: nn.Module) -> bool:
    """Whether `module` is a convolution and `other` may be its batch normalisation."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    is_batch_norm = isinstance(other, _BatchNorm) or "BatchNorm" in type(other).__name__
    return is_batch_norm and all(t.shape == (module.out_channels,) for t in other.state_dict().values() if t.ndim)


def model_size(model: nn.Module) -> int:
    """Number of floats in the state dict, with running statistics, without `num_batches_tracked` (the paper's Table 1)."""
    return sum(layer.numel for layer in layers_of(model))


def network_state(model: nn.Module) -> dict[str, Tensor]:
    """Contiguous CPU copies of the state dict without `num_batches_tracked`, which even a strict `load_state_dict` fills in."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith(_COUNTER)
    }


def tensors_of(layers: Collection[Layer], chosen: Collection[str]) -> tuple[str, ...]:
    """State-dict names of the tensors of the chosen layers, in state-dict order."""
    return tuple(t for layer in layers if layer.name in chosen for t in layer.tensors)


def frozen_norms(model: nn.Module) -> list[str]:
    """Paths of batch normalisations that training cannot move, because their weights are buffers (torchvision's frozen ones)."""
    norms = [(path, module) for path, module in model.named_modules() if "BatchNorm" in type(module).__name__]
    return [
        path for path, norm in norms if not isinstance(norm, _NormBase) and "weight" in dict(norm.named_buffers(recurse=False))
    ]


def set_trainable(model: nn.Module, chosen: Collection[str] | None) -> list[tuple[str, nn.Parameter]]:
    """Freeze every layer outside `chosen` (None: freeze nothing) and set the modes as `set_training_mode` does. A parameter that
    the network itself has frozen (DRN's upsampler) stays frozen. Returns the trainable parameters by name, in state-dict order.
    """
    layers = layers_of(model)
    allowed = None if chosen is None else set(tensors_of(layers, chosen))
    trainable: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if allowed is not None and name not in allowed:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            trainable.append((name, parameter))
    set_training_mode(model, chosen)
    return trainable


def set_training_mode(model: nn.Module, chosen: Collection[str] | None) -> None:
    """`model.train()`, except that batch normalisations whose statistics are not in `chosen` are in evaluation mode."""
    model.train()
    if chosen is None:
        return
    for path, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats and statistics_of(path) not in chosen:
            module.eval()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits (a NaN equals itself, -0.0 does not equal 0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
