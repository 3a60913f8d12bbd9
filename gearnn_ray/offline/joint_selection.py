"""The problems of all levels together: from what was measured of each level to the layers of each.

    one-memory, shared-layers   at most one option of each group: `selection.choose`, over `values.problem`'s options
    few-layers, few-adaptors    tensors as float32: `selection.coupled`

A level counts as often as it occurs. Names and numbers; knows nothing of networks, files or Ray.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gearnn_ray.config.recipe import PAPERS, Coupling, Criterion
from gearnn_ray.core.errors import UserError
from gearnn_ray.models.layers import Alternatives
from gearnn_ray.offline.importance import (
    FLOAT_BYTES,
    VALUES,
    Groups,
    Option,
    as_float32,
    layers_and_formats,
    options_of,
    problem,
)
from gearnn_ray.offline.selection import Choice, Joint, choose, few_adaptors, few_layers
from gearnn_ray.offline.sensitivity import Sensitivity, StoredVariant

_PARTS = 60  # of the most frequent level, in which others are counted: halves, thirds, quarters and fifths are whole


@dataclass(frozen=True)
class Measured:
    """What a level's full fine-tune says of the layers. The same layers in the same order for all levels."""

    rows: Sequence[Sensitivity]
    stored_variants: Sequence[StoredVariant] = ()


def joint_selection(
    levels: Mapping[str, Measured], alternatives: Alternatives, criterion: Criterion, coupling: Coupling, budget: int
) -> dict[str, dict[str, Any]]:
    """Every level's "layers", their "codes" where not float32, and "used" in floats.

    budget: M in floats, of each adaptor; in one-memory of all together. "objective", "bound" and "status" are of the whole
    problem, the same for all. Levels that share an adaptor have "shared_by": these levels, each with its share of the images
    that the adaptor is trained on, in whole numbers. Raises UserError where nothing can be stored in the budget.
    """
    often = [coupling.frequencies.get(level, 1.0) for level in levels]
    if coupling.problem in ("few-layers", "few-adaptors"):
        return _few(levels, often, criterion, coupling, budget)
    if coupling.problem == "one-memory":
        groups = {
            level: problem(
                each.rows, each.stored_variants, alternatives, criterion.importance, criterion.storage_formats
            )
            for level, each in levels.items()
        }
        weighted = [
            tuple(replace(option, value=f * option.value) for option in group)
            for f, own in zip(often, groups.values(), strict=True)
            for group in own
        ]
        found = choose_options(tuple(weighted), "the levels'", criterion, budget)
        picked = iter(found.picked)
        chosen = {level: layers_and_formats(own, [next(picked) for _ in own]) for level, own in groups.items()}
    else:
        shared = _shared_options(levels, often, alternatives, criterion)
        found = choose_options(shared, "the levels'", criterion, budget)
        chosen = dict.fromkeys(levels, layers_and_formats(shared, found.picked))
    return {level: _selection(levels[level], chosen[level], found) for level in levels}


def in_turn(shares: Mapping[str, int]) -> list[str]:
    """Each level as often as its share, spread evenly."""
    turns = [((turn + 0.5) / share, level) for level, share in shares.items() for turn in range(share)]
    return [level for _, level in sorted(turns)]


def _few(
    levels: Mapping[str, Measured], often: Sequence[float], criterion: Criterion, coupling: Coupling, budget: int
) -> dict[str, dict[str, Any]]:
    """At most so many different layers, or adaptors."""
    worth, rows = VALUES[criterion.importance], next(iter(levels.values())).rows
    values = [[worth(row.change) for row in each.rows] for each in levels.values()]
    sizes = [row.numel for row in rows]
    if coupling.distinct is not None:
        found = few_layers(values, sizes, budget, coupling.distinct, often)
    else:
        assert coupling.adaptors is not None
        found = few_adaptors(values, sizes, budget, coupling.adaptors, often)
    selections = {}
    for (level, each), chosen, adaptor in zip(levels.items(), found.chosen, found.adaptor_of, strict=True):
        selections[level] = _selection(each, {rows[i].layer: "float32" for i in chosen}, found)
        group = {name: f for name, f, a in zip(levels, often, found.adaptor_of, strict=True) if a == adaptor}
        # an empty adaptor is every level's own
        if chosen and len(group) > 1:
            selections[level]["shared_by"] = dict(zip(group, _shares(list(group.values())), strict=True))
    return selections


def _shares(frequencies: Sequence[float]) -> list[int]:
    """Small whole numbers in the same proportions, nearly; what occurs at all is not left out."""
    parts = [max(1, round(_PARTS * f / max(frequencies))) if f else 0 for f in frequencies]
    return [part // math.gcd(*parts) for part in parts]


def _shared_options(
    levels: Mapping[str, Measured], often: Sequence[float], alternatives: Alternatives, criterion: Criterion
) -> Groups:
    """Options that all levels take alike, worth what they are to all; the best may be one that no level would take alone."""
    rows = [{row.layer: row for row in each.rows} for each in levels.values()]
    held = [
        {(c.layer, c.storage_format): c for c in (*map(as_float32, each.rows), *each.stored_variants)}
        for each in levels.values()
    ]

    def options(names: Sequence[str]) -> Iterator[Option]:
        own = (
            options_of([r[n] for n in names], h, criterion.importance, criterion.storage_formats)
            for r, h in zip(rows, held, strict=True)
        )
        for alike in zip(*own, strict=True):
            value = math.fsum(f * option.value for f, option in zip(often, alike, strict=True))
            if value:
                yield Option(value, alike[0].bytes, alike[0].storage_formats)

    return tuple(tuple(option for names in group for option in options(names)) for group in alternatives)


def choose_options(groups: Groups, whose: str, criterion: Criterion, budget: int) -> Choice:
    """`choose` among a criterion's options, budget in floats. Raises UserError where not even the smallest fits."""
    smallest = min((option.bytes for group in groups for option in group), default=None)
    # by Eq. (1) and (2) an adaptor is empty where nothing moved
    if criterion != PAPERS if smallest is None else smallest > FLOAT_BYTES * budget:
        if smallest is None:
            raise UserError(
                f"no layer is worth anything to {whose} adaptor by {criterion.importance} against {criterion.against} as "
                f"{', '.join(criterion.storage_formats)}: choose another value or other codes"
            )
        raise UserError(
            f"{FLOAT_BYTES * budget} bytes hold none of {whose} choices by {criterion.granularity} as "
            f"{', '.join(criterion.storage_formats)}: the smallest choice takes {smallest}, so give more bytes or other codes"
        )
    values, sizes = ([[getattr(o, what) for o in group] for group in groups] for what in ("value", "bytes"))
    return choose(values, sizes, FLOAT_BYTES * budget)


def _selection(level: Measured, chosen: Mapping[str, str], found: Choice | Joint) -> dict[str, Any]:
    """What a level's record says. chosen: layer to code."""
    stored_variants = {(each.layer, each.storage_format): each.bytes for each in level.stored_variants}
    stored = sum(
        stored_variants.get((row.layer, chosen[row.layer]), FLOAT_BYTES * row.numel)
        for row in level.rows
        if row.layer in chosen
    )
    return {
        "layers": [row.layer for row in level.rows if row.layer in chosen],
        "storage_formats": {
            layer: storage_format for layer, storage_format in chosen.items() if storage_format != "float32"
        },
        "objective": found.objective,
        "bound": found.bound,
        "status": found.status,
        "used": math.ceil(stored / FLOAT_BYTES),
    }
