"""Which adaptive class a module gets, and the classes of variants of torch's layers, such as timm's.

A variant is known by what it computes, whatever library it is from: on random images and with random weights exactly what torch's
function computes with them, with a layout, a padding or an activation around it. What is not known runs once per level.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gearnn_ray.serving import convolution
from gearnn_ray.serving.modules import (
    Adaptive,
    AdaptiveBatchNorm,
    AdaptiveConv,
    AdaptiveGroupNorm,
    AdaptiveLayerNorm,
    AdaptiveLinear,
    PerLevel,
)

_BEHIND = ("drop", "act")  # children that timm's normalisations apply to their result


def _then_act(module: nn.Module, y: Tensor) -> Tensor:
    for name in _BEHIND:
        y = getattr(module, name)(y) if hasattr(module, name) else y
    return y


class AdaptiveBatchNormAct(AdaptiveBatchNorm):
    """Batch normalisation and an activation (timm's `BatchNormAct2d`)."""

    def forward(self, x: Tensor) -> Tensor:
        return _then_act(self.module, super().forward(x))


class AdaptiveGroupNormAct(AdaptiveGroupNorm):
    """Group normalisation and perhaps an activation (timm's `GroupNormAct`)."""

    def forward(self, x: Tensor) -> Tensor:
        return _then_act(self.module, super().forward(x))


class AdaptiveLayerNormAct(AdaptiveLayerNorm):
    """Layer normalisation over the last dimension, and perhaps an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return _then_act(self.module, super().forward(x))


class AdaptiveLayerNorm2d(AdaptiveLayerNorm):
    """Layer normalisation over the channels of [n, C, H, W], and perhaps an activation (ConvNeXt's `LayerNorm2d`)."""

    def forward(self, x: Tensor) -> Tensor:
        return _then_act(self.module, super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class AdaptiveConvSame(AdaptiveConv):
    """A convolution with TensorFlow's SAME padding (timm's `Conv2dSame`)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(convolution.padded_same(x, self.module))


def kind_of(module: nn.Module) -> type[Adaptive]:
    """The adaptive class for a module: a specific one for common layers and their variants, `PerLevel` for all others."""
    forward = type(module).forward
    if module._forward_hooks or module._forward_pre_hooks:
        return PerLevel
    if next(module.children(), None) is not None:
        return _variant_of(module) or PerLevel
    if convolution.is_supported(module):
        return AdaptiveConv
    if _is_batch_norm(module):
        return AdaptiveBatchNorm
    usual = {nn.Linear.forward: AdaptiveLinear, nn.LayerNorm.forward: AdaptiveLayerNorm, nn.GroupNorm.forward: AdaptiveGroupNorm}
    return usual.get(forward) or _variant_of(module) or PerLevel


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether this is a batch normalisation with running statistics, or a frozen variant of one, such as torchvision's.

    Without running statistics the result for a sample depends on the rest of the batch.
    """
    if isinstance(module, _BatchNorm):
        forwards = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        return module.running_mean is not None and type(module).forward in forwards
    tensors = {name for name, _ in module.named_buffers(recurse=False)} | {
        name for name, _ in module.named_parameters(recurse=False)
    }
    return (
        type(module).__name__.startswith("FrozenBatchNorm")
        and {"running_mean", "running_var"} <= tensors
        and hasattr(module, "eps")
    )


def _variant_of(module: nn.Module) -> type[Adaptive] | None:
    """The adaptive class of a variant of one of torch's layers; None for anything else."""
    children = dict(module.named_children())
    if not children.keys() <= {*_BEHIND} or any(child.state_dict() for child in children.values()):
        return None
    found = ((adaptive, plain) for needed, adaptive, plain in _VARIANTS if all(hasattr(module, name) for name in needed))
    return next((adaptive for adaptive, plain in found if _computes(module, plain)), None)


def _plain_batch_norm(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)


def _plain_group_norm(m: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, m.num_groups, m.weight, m.bias, m.eps)


def _plain_layer_norm(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, m.normalized_shape, m.weight, m.bias, m.eps)


def _plain_layer_norm_2d(m: Any, x: Tensor) -> Tensor:
    return _plain_layer_norm(m, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _plain_same(m: Any, x: Tensor) -> Tensor:
    return convolution.plain(convolution.padded_same(x, m), m, m.weight, m.bias)


_SIDES = (9, 11)  # of the random images: odd and unequal, so that every padding and layout shows
_VARIANTS: tuple[tuple[tuple[str, ...], type[Adaptive], Callable[[Any, Tensor], Tensor]], ...] = (
    (("running_mean", "running_var", "eps"), AdaptiveBatchNormAct, _plain_batch_norm),
    (("num_groups", "eps"), AdaptiveGroupNormAct, _plain_group_norm),
    (("normalized_shape", "eps"), AdaptiveLayerNorm2d, _plain_layer_norm_2d),
    (("normalized_shape", "eps"), AdaptiveLayerNormAct, _plain_layer_norm),
    (("kernel_size", "stride", "dilation", "groups"), AdaptiveConvSame, _plain_same),
)
"""The attributes that a variant must have, its adaptive class, and what it computes before the activation."""


def _computes(module: nn.Module, plain: Callable[[Any, Tensor], Tensor]) -> bool:
    """Whether the module gives what `plain` and the activation behind it give, with random weights."""
    probe: Any = copy.deepcopy(module).to("cpu", torch.float32).eval()
    random = torch.Generator().manual_seed(0)
    tensors = probe.state_dict()
    probe.load_state_dict(
        {n: torch.rand(t.shape, generator=random) for n, t in tensors.items() if t.is_floating_point()}, strict=False
    )
    channels = getattr(probe, "in_channels", max((len(t) for t in tensors.values() if t.dim() == 1), default=0))
    last = plain is _plain_layer_norm
    x = torch.randn(2, *((*_SIDES, channels) if last else (channels, *_SIDES)), generator=random)
    try:
        with torch.no_grad():
            found, expected = probe(x), _then_act(probe, plain(probe, x))
    except Exception:  # a module for another kind of input, or with other meanings of these names
        return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
