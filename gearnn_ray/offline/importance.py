"""What a layer's change is worth, and the choice between layers, modules and codes that follows from it.

Works on the numbers of `sensitivity.measure`: knows nothing of tensors, levels, the solver or files.
"""

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
"""In place of a code: a normalisation's statistics, whose change its weight and bias hold (`gearnn_ray.adaptors.bn_folding`)."""


def _taken(sum_: float | None) -> float:
    if sum_ is None:
        raise ValueError("the change was measured without gradients, which this value needs: measure it with them")
    return sum_


VALUES: dict[str, Callable[[Change], float]] = {
    "mean-abs": lambda c: c.sum_abs / c.numel if c.numel else 0.0,
    "sum-abs": lambda c: c.sum_abs,
    "l2": lambda c: math.sqrt(c.sum_sq),
    "relative": lambda c: math.sqrt(c.sum_sq) / math.sqrt(c.weight_sq) if c.weight_sq else 0.0,
    "first-order": lambda c: abs(_taken(c.first_order)),
    "fisher": lambda c: _taken(c.fisher),
}
"""Name to the value of a change: a number ≥ 0, and 0 for no floats. They raise ValueError for gradients that were not taken.

- mean-abs: mean |Δ| (Eq. 1)
- sum-abs: Σ|Δ|
- l2: |Δ|₂
- relative: |Δ|₂/|w|₂, Lee et al.'s Auto-RGN (ICLR 2023) put on changes; 0 where the weights are all zero
- first-order: |Σ g·Δ|, the predicted change of the loss
- fisher: Σ F·Δ², twice the predicted loss of undoing the change near an optimum
"""


def needs_gradients(name: str) -> bool:
    """Whether a value is of the loss's gradients too."""
    return name in ("first-order", "fisher")


@dataclass(frozen=True)
class Option:
    """One way to take a group of alternatives: its layers, each with its code; value in the unit of the value, bytes stored."""

    value: float
    bytes: int
    storage_formats: dict[str, str]


Groups = tuple[tuple[Option, ...], ...]
"""At most one option of each group is taken."""


def problem(
    rows: Sequence[Sensitivity],
    stored_variants: Sequence[StoredVariant],
    alternatives: Alternatives,
    value: str,
    storage_formats: Sequence[str],
) -> Groups:
    """The options of each group of alternatives, ascending in bytes and in value; a group may have none.

    An option is an alternative whose normalisation weights and biases share one of `codes` and whose every other layer has
    one of its own; a code that does not apply to a layer, or is not among `coded`, is none of that layer's, and a layer that is
    there as folded has no other way. An option is worth its
    layers' change less what the codes lose of it, both as of all its floats together: max(0, value(Δ) - value(Δ - Δ̂)). Options
    worth nothing are left out, and so are those that another of the group makes pointless, being no larger and worth as much.

    With the layers of `tensor`, codes ("float32",) and mean-abs this is Eq. (2), its sizes 4·N_i bytes.
    Raises ValueError for an unknown value, KeyError for a layer without a row.
    """
    if value not in VALUES:
        raise ValueError(f"there is no value {value!r}: give one of {', '.join(VALUES)}")
    by_layer = {row.layer: row for row in rows}
    held = {(one.layer, one.storage_format): one for one in (*map(as_float32, rows), *stored_variants)}
    return tuple(
        _efficient(
            [
                option
                for names in group
                for option in options_of([by_layer[n] for n in names], held, value, storage_formats)
            ]
        )
        for group in alternatives
    )


def as_float32(row: Sensitivity) -> StoredVariant:
    """float32 loses nothing of its layer's floats."""
    zero = None if row.first_order_change is None else 0.0
    error = replace(row.change, sum_abs=0.0, sum_sq=0.0, first_order=zero, fisher=zero)
    return StoredVariant(row.layer, "float32", FLOAT_BYTES * row.numel, error)


def options_of(
    rows: Sequence[Sensitivity],
    held: Mapping[tuple[str, str], StoredVariant],
    value: str,
    storage_formats: Sequence[str],
) -> list[Option]:
    """An alternative under every combination of codes."""
    worth = VALUES[value]
    whole = worth(reduce(operator.add, (row.change for row in rows)))
    # layers that share a code: a normalisation's weight and bias; any other is by itself
    parts: dict[str, list[str]] = {}
    for row in rows:
        parts.setdefault("" if row.kind in ("norm_weight", "norm_bias") else row.layer, []).append(row.layer)
    ways = [
        # what is folded into others takes no bytes and loses nothing
        [FOLDED]
        if (part[0], FOLDED) in held
        else [storage_format for storage_format in storage_formats if all((n, storage_format) in held for n in part)]
        for part in parts.values()
    ]
    options = []
    for combination in itertools.product(*ways):
        code_of = {
            name: storage_format
            for part, storage_format in zip(parts.values(), combination, strict=True)
            for name in part
        }
        chosen = {row.layer: code_of[row.layer] for row in rows}
        stored = [held[item] for item in chosen.items()]
        lost = worth(reduce(operator.add, (one.error for one in stored)))
        options.append(Option(max(0.0, whole - lost), sum(one.bytes for one in stored), chosen))
    return options


def _efficient(options: Sequence[Option]) -> tuple[Option, ...]:
    """Those that no other option of the group equals or beats in both bytes and value; of equals the first."""
    kept, best = list[Option](), 0.0
    for option in sorted(options, key=lambda o: (o.bytes, -o.value)):
        if option.value > best:
            kept.append(option)
            best = option.value
    return tuple(kept)


def layers_and_formats(groups: Groups, picked: Sequence[int]) -> dict[str, str]:
    """Layer to code of the options picked, in layer order. picked: per group the option's index, -1 for none."""
    chosen = [group[index] for group, index in zip(groups, picked, strict=True) if index >= 0]
    return {layer: storage_format for option in chosen for layer, storage_format in option.storage_formats.items()}
