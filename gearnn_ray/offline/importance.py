"""Importance of a layer's change, and the options of a selection; from the numbers of `sensitivity.measure`, without tensors."""

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from gearnn_ray.models.layers import Alternatives
from gearnn_ray.offline.sensitivity import Change, Sensitivity, StoredVariant

FLOAT_BYTES = 4
FOLDED = "folded"
"""Stands in place of a storage format for normalisation statistics that take no bytes, because their change is folded into
the normalisation's weight and bias (`gearnn_ray.adaptors.bn_folding`)."""


def _measured(total: float | None) -> float:
    if total is None:
        raise ValueError("the change was measured without gradients, which this importance needs: measure it with them")
    return total


IMPORTANCE: dict[str, Callable[[Change], float]] = {
    "mean-abs": lambda c: c.sum_abs / c.numel if c.numel else 0.0,
    "sum-abs": lambda c: c.sum_abs,
    "l2": lambda c: math.sqrt(c.sum_sq),
    "relative": lambda c: math.sqrt(c.sum_sq) / math.sqrt(c.weight_sq) if c.weight_sq else 0.0,
    "first-order": lambda c: abs(_measured(c.first_order)),
    "fisher": lambda c: _measured(c.fisher),
}
"""Importance functions by name. Each maps a change Δ to a number ≥ 0, and a change of no floats to 0. mean-abs is Eq. (1).
relative is the Auto-RGN of Lee et al. (ICLR 2023), applied to changes. first-order: |Σ g·Δ|, the predicted change of the loss.
fisher: Σ F·Δ², twice the predicted increase of the loss if the change is undone near an optimum. The last two raise ValueError
if the change was measured without gradients."""


@dataclass(frozen=True)
class Option:
    """Layers of one group and their storage formats. value: importance. bytes: what a store holds for these layers."""

    value: float
    bytes: int
    storage_formats: dict[str, str]


Groups = tuple[tuple[Option, ...], ...]
"""At most one option of each group is chosen."""


def selection_options(
    rows: Sequence[Sensitivity],
    stored_variants: Sequence[StoredVariant],
    alternatives: Alternatives,
    importance: str,
    storage_formats: Sequence[str],
) -> Groups:
    """The options of each group of alternatives, in ascending order of both bytes and value; a group may be empty.

    In an option the weights and biases of normalisations share one storage format; every other layer has one of its own, among
    those that it has a stored variant for. A layer with a "folded" variant is always folded. An option's value,
    max(0, I(Δ) - I(Δ - Δ̂)), is the importance of the change minus that of the rounding error, each over all floats of the
    layers. Options of value 0 and those that another option of the group dominates are dropped. With alternatives by tensor,
    formats ("float32",) and mean-abs this is Eq. (2) with sizes of 4·N_i bytes. Raises ValueError for an unknown importance and
    KeyError for a layer without a row.
    """
    if importance not in IMPORTANCE:
        raise ValueError(f"importance {importance!r} is unknown: expected one of {', '.join(IMPORTANCE)}")
    by_layer = {row.layer: row for row in rows}
    variants = variants_by_layer(rows, stored_variants)
    return tuple(
        _efficient(
            [
                option
                for names in group
                for option in options_of([by_layer[n] for n in names], variants, importance, storage_formats)
            ]
        )
        for group in alternatives
    )


def variants_by_layer(
    rows: Sequence[Sensitivity], stored_variants: Sequence[StoredVariant]
) -> dict[tuple[str, str], StoredVariant]:
    """The stored variants by (layer, storage format), with float32, which has no rounding error, for every row."""
    variants = {}
    for row in rows:
        zero = None if row.first_order_change is None else 0.0
        error = replace(row.change, sum_abs=0.0, sum_sq=0.0, first_order=zero, fisher=zero)
        variants[row.layer, "float32"] = StoredVariant(row.layer, "float32", FLOAT_BYTES * row.numel, error)
    return variants | {(each.layer, each.storage_format): each for each in stored_variants}


def options_of(
    rows: Sequence[Sensitivity],
    variants: Mapping[tuple[str, str], StoredVariant],
    importance: str,
    storage_formats: Sequence[str],
) -> list[Option]:
    """One alternative in every combination of storage formats. rows: of its layers."""
    measure = IMPORTANCE[importance]
    whole = measure(reduce(operator.add, (row.change for row in rows)))
    parts: dict[str, list[str]] = {}
    for row in rows:
        parts.setdefault("" if row.kind in ("norm_weight", "norm_bias") else row.layer, []).append(row.layer)
    formats_of_parts = [
        [FOLDED]
        if (part[0], FOLDED) in variants
        else [each for each in storage_formats if all((name, each) in variants for name in part)]
        for part in parts.values()
    ]
    options = []
    for combination in itertools.product(*formats_of_parts):
        format_of = {name: each for part, each in zip(parts.values(), combination, strict=True) for name in part}
        chosen = {row.layer: format_of[row.layer] for row in rows}
        stored = [variants[item] for item in chosen.items()]
        lost = measure(reduce(operator.add, (each.error for each in stored)))
        options.append(Option(max(0.0, whole - lost), sum(each.bytes for each in stored), chosen))
    return options


def _efficient(options: Sequence[Option]) -> tuple[Option, ...]:
    """The options that no other option of the group equals or beats in both bytes and value; of equals the first."""
    kept, best = list[Option](), 0.0
    for option in sorted(options, key=lambda o: (o.bytes, -o.value)):
        if option.value > best:
            kept.append(option)
            best = option.value
    return tuple(kept)
