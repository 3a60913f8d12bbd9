"""Step 3 of Algorithm 1, from what was measured to the layers of adaptors: `select_layers` for one level, `joint_selection` for
all levels in one problem. Works on names and numbers; knows nothing of networks, files or Ray.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gearnn_ray.config.recipe import PAPERS, Coupling, Criterion
from gearnn_ray.core.errors import UserError
from gearnn_ray.models.layers import Alternatives
from gearnn_ray.offline.importance import FLOAT_BYTES, Groups, Option, options_of, selection_options, variants_by_layer
from gearnn_ray.offline.selection import LayerSelection, Selection, select
from gearnn_ray.offline.sensitivity import Sensitivity, StoredVariant


class BudgetTooSmallError(UserError):
    """Not even the smallest option fits the budget."""


@dataclass(frozen=True)
class LevelMeasurement:
    """What a level's full fine-tune did to the layers. All levels have the same layers, in the same order."""

    rows: tuple[Sensitivity, ...]
    stored_variants: tuple[StoredVariant, ...] = ()


def select_layers(
    rows: Sequence[Sensitivity],
    stored_variants: Sequence[StoredVariant],
    alternatives: Alternatives,
    criterion: Criterion,
    budget: int,
    level: str,
) -> LayerSelection:
    """The layers of one level's adaptor under a budget of M floats. level: its name, for error messages. With the paper's
    criterion this is Eq. (2), and may select nothing. Any other raises UserError if no option has a positive value, and
    BudgetTooSmallError if the smallest does not fit.
    """
    if criterion == PAPERS:
        solution = select([row.mean_abs_change for row in rows], [row.numel for row in rows], budget)
        papers = [rows[i] for i in solution.chosen]
        chosen = [Option(r.mean_abs_change, FLOAT_BYTES * r.numel, {r.layer: "float32"}) for r in papers]
    else:
        groups = selection_options(rows, stored_variants, alternatives, criterion.importance, criterion.storage_formats)
        solution, choice = _choose(groups, level, criterion, budget)
        chosen = list(choice.values())
    return _layer_selection(solution, chosen, rows)


def joint_selection(
    levels: Mapping[str, LevelMeasurement], alternatives: Alternatives, criterion: Criterion, coupling: Coupling, budget: int
) -> dict[str, LayerSelection]:
    """The layers of every level's adaptor, from one problem that maximises Σ_q f_q Σ_{i ∈ S_q} v_i^q. budget: M in floats, of all
    adaptors together in one-memory, of each adaptor in shared-layers. f_q is 1 for a level that `coupling.frequencies` does not
    name; a level of frequency 0 may get an empty adaptor. Objective, bound and status are those of the whole problem. Raises
    UserError as `select_layers` does.
    """
    frequencies = [coupling.frequencies.get(level, 1.0) for level in levels]
    if coupling.problem == "one-memory":
        groups = tuple(
            tuple(replace(option, value=f * option.value) for option in group)
            for f, each in zip(frequencies, levels.values(), strict=True)
            for group in selection_options(
                each.rows, each.stored_variants, alternatives, criterion.importance, criterion.storage_formats
            )
        )
    else:
        groups = _shared_options(levels, frequencies, alternatives, criterion)
    solution, choice = _choose(groups, "the levels", criterion, budget)
    count = len(alternatives)
    selections = {}
    for number, (level, each) in enumerate(levels.items()):
        chosen = [option for group, option in choice.items() if coupling.problem != "one-memory" or group // count == number]
        selections[level] = _layer_selection(solution, chosen, each.rows)
    return selections


def _shared_options(
    levels: Mapping[str, LevelMeasurement], frequencies: Sequence[float], alternatives: Alternatives, criterion: Criterion
) -> Groups:
    """Options that all levels share, valued by the weighted sum: one that is dominated at each level may have the best sum."""
    rows = [{row.layer: row for row in each.rows} for each in levels.values()]
    variants = [variants_by_layer(each.rows, each.stored_variants) for each in levels.values()]

    def options(names: Sequence[str]) -> Iterator[Option]:
        of_levels = (
            options_of([r[n] for n in names], v, criterion.importance, criterion.storage_formats)
            for r, v in zip(rows, variants, strict=True)
        )
        for alike in zip(*of_levels, strict=True):
            value = math.fsum(f * option.value for f, option in zip(frequencies, alike, strict=True))
            if value:
                yield replace(alike[0], value=value)

    return tuple(tuple(option for names in group for option in options(names)) for group in alternatives)


def _choose(groups: Groups, whose: str, criterion: Criterion, budget: int) -> tuple[Selection, dict[int, Option]]:
    """The solution, and the chosen option by its group's index. budget: in floats. Raises UserError as `select_layers` does."""
    options = [(number, option) for number, group in enumerate(groups) for option in group]
    limit = FLOAT_BYTES * budget
    smallest = min((option.bytes for _, option in options), default=None)
    formats = ", ".join(criterion.storage_formats)
    if smallest is None and criterion != PAPERS:
        raise UserError(
            f"no layer of {whose} has a positive value by {criterion.importance} against {criterion.against} as {formats}: "
            f"choose another selection.importance or other selection.storage_formats"
        )
    if smallest is not None and smallest > limit:
        raise BudgetTooSmallError(
            f"a budget of {limit} bytes is too small for {whose}: the smallest option by {criterion.granularity} as {formats} "
            f"takes {smallest} bytes; give a larger budget or other selection.storage_formats"
        )
    values, sizes = [option.value for _, option in options], [option.bytes for _, option in options]
    solution = select(values, sizes, limit, [number for number, _ in options])
    return solution, dict(options[i] for i in solution.chosen)


def _layer_selection(solution: Selection, chosen: Sequence[Option], rows: Sequence[Sensitivity]) -> LayerSelection:
    formats = {layer: each for option in chosen for layer, each in option.storage_formats.items()}
    return LayerSelection(
        layers=tuple(row.layer for row in rows if row.layer in formats),
        storage_formats={layer: each for layer, each in formats.items() if each != "float32"},
        objective=solution.objective,
        bound=solution.bound,
        status=solution.status,
        used=math.ceil(sum(option.bytes for option in chosen) / FLOAT_BYTES),
    )
