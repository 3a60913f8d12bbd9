"""Eq. (1): how much a level's full fine-tune changed each layer, and the rounding error of storage formats. In float64."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from gearnn_ray.adaptors.storage_formats import applies, restored, stored_bytes
from gearnn_ray.models.layers import Layer
from gearnn_ray.training.gradients import Gradients

CHANGED = 2e-4
"""A weight counts as changed if its absolute change exceeds this (the paper's Fig. 5)."""


@dataclass(frozen=True)
class Change:
    """Sums over a set of floats p that changed to p + Δ. `a + b` is the change of both sets together. sum_abs: Σ|Δ|. sum_sq: ΣΔ².
    weight_sq: Σp². first_order: Σ g·Δ, the predicted change of the loss whose mean gradient is g. fisher: Σ F·Δ², where F is the
    diagonal of the empirical Fisher information. The last two are None if any of the floats was measured without gradients.
    """

    numel: int
    sum_abs: float
    sum_sq: float
    weight_sq: float
    first_order: float | None
    fisher: float | None

    def __add__(self, other: "Change") -> "Change":
        return Change(
            numel=self.numel + other.numel,
            sum_abs=self.sum_abs + other.sum_abs,
            sum_sq=self.sum_sq + other.sum_sq,
            weight_sq=self.weight_sq + other.weight_sq,
            first_order=_sum(self.first_order, other.first_order),
            fisher=_sum(self.fisher, other.fisher),
        )


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


@dataclass(frozen=True)
class Sensitivity:
    """The change of one layer, p -> f_q(p), by the full fine-tune of level q. mean_abs_change: v_i^q = mean |p - f_q(p)| (Eq. 1).
    l2_change: ||p - f_q(p)||_2. l2_weight: ||p||_2. share_above_2e_4: share of the weights with |p - f_q(p)| > 2e-4.
    first_order_change, fisher_change: as in `Change`.
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
    first_order_change: float | None = None
    fisher_change: float | None = None

    @property
    def change(self) -> Change:
        """The sums that this row was computed from, up to rounding. `sum_abs / numel` equals `mean_abs_change` exactly."""
        return Change(
            numel=self.numel,
            sum_abs=self.mean_abs_change * self.numel,
            sum_sq=self.l2_change**2,
            weight_sq=self.l2_weight**2,
            first_order=self.first_order_change,
            fisher=self.fisher_change,
        )


@dataclass(frozen=True)
class StoredVariant:
    """One layer in one storage format: its bytes in a store, without headers, and the rounding error Δ - Δ̂."""

    layer: str
    storage_format: str
    bytes: int
    error: Change


def sensitivity(layers: Sequence[Layer], before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[Sensitivity]:
    """Eq. (1): the rows of `measure` against the base, without gradients."""
    return measure(layers, before, after, None, ())[0]


def measure(
    layers: Sequence[Layer],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    gradients: Gradients | None,
    storage_formats: Sequence[str],
    control: Mapping[str, Tensor] | None = None,
) -> tuple[list[Sensitivity], list[StoredVariant]]:
    """One row per layer, in order, and one stored variant per layer and storage format that applies to all its tensors; none for
    float32, which has no rounding error. before, after: states on the CPU. gradients: of the loss at `before`. With a control
    state, Δ is `after` minus the control instead of `before`; a storage format always rounds the difference to `before`. Raises
    KeyError for a missing tensor and ValueError for shapes that differ.
    """
    rows, stored_variants = [], list[StoredVariant]()
    for layer in layers:
        shapes = [before[name].shape for name in layer.tensors]
        for name, shape in zip(layer.tensors, shapes, strict=True):
            if after[name].shape != shape:
                raise ValueError(f"{name} changed its shape from {list(shape)} to {list(after[name].shape)}")
        p, q = _flat(layer, before), _flat(layer, after)
        g, f = (None, None) if gradients is None else (_flat(layer, gradients.mean), _flat(layer, gradients.square))
        delta = q - (p if control is None else _flat(layer, control))
        rows.append(_row(layer, _change(p, delta, g, f), delta.abs()))
        for storage_format in storage_formats:
            if storage_format == "float32" or not all(applies(storage_format, shape) for shape in shapes):
                continue
            if storage_format == "int8" and layer.kind == "norm_statistics":
                continue  # rounding can set a small variance to 0, which a mean error does not show
            changed = {name: after[name] for name in layer.tensors}
            rounded = _flat(layer, restored(before, changed, dict.fromkeys(layer.tensors, storage_format)))
            size, error = stored_bytes(storage_format, shapes), _change(p, q - rounded, g, f)
            stored_variants.append(StoredVariant(layer.name, storage_format, size, error))
    return rows, stored_variants


def _flat(layer: Layer, state: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([state[name].detach().reshape(-1).double() for name in layer.tensors])


def _change(p: Tensor, delta: Tensor, g: Tensor | None, f: Tensor | None) -> Change:
    return Change(
        numel=p.numel(),
        sum_abs=float(delta.abs().sum()),
        sum_sq=float(delta.square().sum()),
        weight_sq=float(p.square().sum()),
        first_order=None if g is None else float((g * delta).sum()),
        fisher=None if f is None else float((f * delta.square()).sum()),
    )


def _row(layer: Layer, change: Change, moved: Tensor) -> Sensitivity:
    count = max(1, change.numel)  # the mean over no floats is 0
    return Sensitivity(
        layer=layer.name,
        kind=layer.kind,
        index=layer.index,
        numel=layer.numel,
        mean_abs_change=change.sum_abs / count,
        max_abs_change=float(moved.max()) if moved.numel() else 0.0,
        l2_change=math.sqrt(change.sum_sq),
        l2_weight=math.sqrt(change.weight_sq),
        share_above_2e_4=float((moved > CHANGED).sum()) / count,
        first_order_change=change.first_order,
        fisher_change=change.fisher,
    )


def table_row(level: str, row: Sensitivity) -> dict[str, object]:
    """A row of the table `tables.SENSITIVITY`."""
    return {
        "level": level,
        **asdict(row),
        "sum_abs_change": row.change.sum_abs,
        "relative_change": row.l2_change / row.l2_weight if row.l2_weight else 0.0,
    }


def share_of_weights_changed(rows: Sequence[Sensitivity]) -> tuple[float, float]:
    """Two readings of the paper's Fig. 5, as shares of the network's floats: those in layers whose mean change exceeds 2e-4, and
    those whose own change does.
    """
    total = sum(row.numel for row in rows)
    if not total:
        return 0.0, 0.0
    by_layer = sum(row.numel for row in rows if row.mean_abs_change > CHANGED)
    by_weight = sum(row.share_above_2e_4 * row.numel for row in rows)
    return by_layer / total, by_weight / total
