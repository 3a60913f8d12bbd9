"""Eq. (1): how far each layer moved in the full fine-tune of a level. Pure arithmetic over two states, in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gearnn_ray.layers import Layer

CHANGED = 2e-4
"""A weight counts as changed beyond this (the paper's Fig. 5)."""


@dataclass(frozen=True)
class Sensitivity:
    """What the full fine-tune of a level did to one layer p -> f_q(p).

    mean_abs_change: v_i^q = mean |p - f_q(p)| (Eq. 1); max_abs_change; l2_change: ||p - f_q(p)||_2;
    l2_weight: ||p||_2; share_above_2e_4: share of the layer's weights with |p - f_q(p)| > 2e-4.
    """

    layer: str
    kind: str
    index: int
    numel: int
    mean_abs_change: float
    max_abs_change: float
    l2_change: float
    l2_weight: float
    share_above_2e_4: float


def sensitivity(
    layers: Sequence[Layer], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> list[Sensitivity]:
    """One row per layer, in order. Raises KeyError for a missing tensor and ValueError for shapes that differ."""
    return [_of_layer(layer, before, after) for layer in layers]


def _of_layer(layer: Layer, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Sensitivity:
    for name in layer.tensors:
        if before[name].shape != after[name].shape:
            raise ValueError(f"{name} changed its shape from {list(before[name].shape)} to {list(after[name].shape)}")
    p = torch.cat([before[name].detach().reshape(-1).double() for name in layer.tensors])
    change = (torch.cat([after[name].detach().reshape(-1).double() for name in layer.tensors]) - p).abs()
    if not layer.numel:
        return Sensitivity(layer.name, layer.kind, layer.index, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
    return Sensitivity(
        layer=layer.name,
        kind=layer.kind,
        index=layer.index,
        numel=layer.numel,
        mean_abs_change=float(change.sum() / layer.numel),
        max_abs_change=float(change.max()),
        l2_change=float(change.square().sum().sqrt()),
        l2_weight=float(p.square().sum().sqrt()),
        share_above_2e_4=float((change > CHANGED).sum()) / layer.numel,
    )


def share_of_weights_changed(rows: Sequence[Sensitivity]) -> tuple[float, float]:
    """The paper's Fig. 5 fact in two readings, as shares of all the network's floats.

    First: floats that lie in layers whose mean change exceeds 2e-4. Second: floats that themselves moved by more.
    """
    total = sum(row.numel for row in rows)
    if not total:
        return 0.0, 0.0
    by_layer = sum(row.numel for row in rows if row.mean_abs_change > CHANGED)
    by_weight = sum(row.share_above_2e_4 * row.numel for row in rows)
    return by_layer / total, by_weight / total
