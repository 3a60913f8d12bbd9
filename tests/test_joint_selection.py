"""Joint selection: the problems against every possible choice."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearnn_ray.config.recipe import PAPERS, Coupling, Criterion
from gearnn_ray.core.errors import UserError
from gearnn_ray.models.layers import Alternatives
from gearnn_ray.offline.importance import IMPORTANCE
from gearnn_ray.offline.joint_selection import LevelMeasurement, joint_selection, select_layers
from gearnn_ray.offline.selection import LayerSelection, select
from gearnn_ray.offline.sensitivity import Change, Sensitivity, StoredVariant

LAYERS = ("conv", "norm", "head")
TENSORS: Alternatives = tuple(((name,),) for name in LAYERS)
MODULES: Alternatives = ((("norm",), ("conv", "norm")), (("head",),))
LEVELS = ("jpeg-10", "jpeg-20", "brightness-0.4")
PLAIN, ROUNDED = ("float32",), ("float32", "int8")


def measured(seed: int, storage_formats: tuple[str, ...] = PLAIN) -> dict[str, LevelMeasurement]:
    """Levels of three layers with random changes, and the rounding error of int8 for each."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, len(LAYERS))
    levels = {}
    for level in LEVELS[: 2 if len(storage_formats) > 1 else 3]:
        rows, stored_variants = [], []
        for index, name in enumerate(LAYERS):
            n, moved = int(sizes[index]), float(rng.choice([0.0, 1.0, 2.0, 3.0])) * float(rng.uniform(0.5, 1))
            rows.append(Sensitivity(name, "conv_weight", index, n, moved, moved, moved * math.sqrt(n), 1.0, 0.0))
            if "int8" in storage_formats:
                lost = moved * float(rng.uniform(0, 0.9))
                stored_variants.append(StoredVariant(name, "int8", n + 4, Change(n, lost * n, lost**2 * n, 1.0, None, None)))
        levels[level] = LevelMeasurement(tuple(rows), tuple(stored_variants))
    return levels


def ways(alternatives: Alternatives, storage_formats: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Every choice of layers and storage formats for a level."""
    groups = [
        [
            {},
            *(
                dict(zip(names, each, strict=True))
                for names in group
                for each in itertools.product(storage_formats, repeat=len(names))
            ),
        ]
        for group in alternatives
    ]
    for picked in itertools.product(*groups):
        yield {layer: storage_format for each in picked for layer, storage_format in each.items()}


def worth(level: LevelMeasurement, chosen: Mapping[str, str], alternatives: Alternatives, value: str) -> tuple[float, int]:
    """Value and bytes of a level's choice, group by group, as the documentation defines them."""
    rows, stored_variants = {r.layer: r for r in level.rows}, {c.layer: c for c in level.stored_variants}
    total, size = 0.0, 0
    for group in alternatives:
        names = max((n for n in group if set(n) <= chosen.keys()), key=len, default=())
        if not names:
            continue
        change = math.fsum(rows[n].change.sum_abs for n in names)
        lost = math.fsum(stored_variants[n].error.sum_abs for n in names if chosen[n] == "int8")
        count = sum(rows[n].numel for n in names) if value == "mean-abs" else 1
        total += max(0.0, change / count - lost / count)
        size += sum(stored_variants[n].bytes if chosen[n] == "int8" else 4 * rows[n].numel for n in names)
    return total, size


def formats(selection: LayerSelection) -> dict[str, str]:
    return {layer: selection.storage_formats.get(layer, "float32") for layer in selection.layers}


def picked(found: Mapping[str, LayerSelection]) -> dict[str, dict[str, str]]:
    return {level: formats(selection) for level, selection in found.items()}


PROBLEMS = [(TENSORS, PLAIN), (TENSORS, ROUNDED), (MODULES, ROUNDED)]


@pytest.mark.parametrize(("alternatives", "storage_formats"), PROBLEMS)
@pytest.mark.parametrize("problem", ["one-memory", "shared-layers"])
@pytest.mark.parametrize("value", ["mean-abs", "sum-abs"])
def test_no_other_choice_is_better(
    problem: str, value: str, alternatives: Alternatives, storage_formats: tuple[str, ...]
) -> None:
    for seed in range(6):
        levels = measured(seed, storage_formats)
        often = dict(zip(levels, (3.0, 1.0, 0.5), strict=False))
        budget = 6 + 2 * seed
        granularity = "tensor" if alternatives is TENSORS else "module"
        criterion = Criterion(importance=value, storage_formats=storage_formats, granularity=granularity)  # type: ignore[arg-type]
        coupling = Coupling(problem=problem, frequencies=often)  # type: ignore[arg-type]
        choices = [
            {
                w: worth(level, dict(w), alternatives, value)
                for way in ways(alternatives, storage_formats)
                for w in [tuple(way.items())]
            }
            for level in levels.values()
        ]
        best = 0.0
        for each in itertools.product(*choices) if problem == "one-memory" else zip(*choices, strict=True):
            known_ = [choice[w] for choice, w in zip(choices, each, strict=True)]
            if (sum(size for _, size in known_) if problem == "one-memory" else known_[0][1]) <= 4 * budget:
                best = max(best, math.fsum(f * v for f, (v, _) in zip(often.values(), known_, strict=True)))
        if not best:
            with pytest.raises(UserError, match=r"no layer of the levels has a positive value|the smallest option"):
                joint_selection(
                    levels, alternatives, Criterion(importance="l2", storage_formats=storage_formats), coupling, budget
                )
            continue
        found = joint_selection(levels, alternatives, criterion, coupling, budget)
        own = {level: worth(levels[level], each, alternatives, value) for level, each in picked(found).items()}
        assert math.fsum(often[level] * v for level, (v, _) in own.items()) == pytest.approx(best, rel=1e-9)
        assert all(s.objective == pytest.approx(best, rel=1e-9) for s in found.values())
        assert {s.status for s in found.values()} == {"OPTIMAL"}
        assert [s.used for s in found.values()] == [math.ceil(size / 4) for _, size in own.values()]
        if problem == "shared-layers":
            assert len({str(each) for each in picked(found).values()}) == 1


@pytest.mark.parametrize(("alternatives", "storage_formats"), PROBLEMS)
@pytest.mark.parametrize("value", ["mean-abs", "sum-abs"])
def test_no_other_choice_is_better_for_one_level(
    value: str, alternatives: Alternatives, storage_formats: tuple[str, ...]
) -> None:
    granularity = "tensor" if alternatives is TENSORS else "module"
    criterion = Criterion(importance=value, storage_formats=storage_formats, granularity=granularity)  # type: ignore[arg-type]
    for seed in range(6):
        level, budget = measured(seed, storage_formats)["jpeg-10"], 2 + 2 * seed
        choices = (worth(level, way, alternatives, value) for way in ways(alternatives, storage_formats))
        best = max(total for total, size in choices if size <= 4 * budget)
        if criterion != PAPERS and not best:
            with pytest.raises(UserError, match=r"no layer of jpeg-10 has a positive value|the smallest option"):
                select_layers(level.rows, level.stored_variants, alternatives, criterion, budget, "jpeg-10")
            continue
        found = select_layers(level.rows, level.stored_variants, alternatives, criterion, budget, "jpeg-10")
        total, size = worth(level, formats(found), alternatives, value)
        assert total == pytest.approx(best, rel=1e-9)
        assert found.objective == pytest.approx(best, rel=1e-9)
        assert found.bound >= found.objective
        assert (found.status, found.used) == ("OPTIMAL", math.ceil(size / 4))
        assert list(found.layers) == [name for name in LAYERS if name in found.layers]


def test_only_the_papers_criterion_allows_an_empty_selection() -> None:
    still = [replace(row, mean_abs_change=0.0) for row in measured(1)["jpeg-10"].rows]
    assert select_layers(still, (), TENSORS, PAPERS, 100, "jpeg-10").layers == ()
    moved = measured(1)["jpeg-10"].rows
    assert select_layers(moved, (), TENSORS, PAPERS, 0, "jpeg-10") == LayerSelection(
        layers=(), storage_formats={}, objective=0.0, bound=0.0, status="OPTIMAL", used=0
    )
    other = Criterion(importance="sum-abs")
    with pytest.raises(UserError, match="no layer of jpeg-10 has a positive value by sum-abs against base as float32: choose"):
        select_layers(still, (), TENSORS, other, 100, "jpeg-10")
    with pytest.raises(UserError, match="a budget of 0 bytes is too small for jpeg-10: the smallest option by tensor as float"):
        select_layers(moved, (), TENSORS, other, 0, "jpeg-10")


def test_an_option_that_no_level_would_take_alone_can_be_best_for_all() -> None:
    """Two storage formats in a module, which are dominated at each level by itself."""

    def level(errors: Mapping[str, float]) -> LevelMeasurement:
        rows = [Sensitivity(n, "conv_weight", i, 8, 1.0, 1.0, 1.0, 1.0, 0.0) for i, n in enumerate(errors)]
        stored_variants = [StoredVariant(n, "int8", 12, Change(8, e, e, 1.0, None, None)) for n, e in errors.items()]
        return LevelMeasurement(tuple(rows), tuple(stored_variants))

    # 44 bytes hold one int8 and one float32; at jpeg-20 alone int8 for both is as good in 24
    levels = {"jpeg-10": level({"a": 4, "b": 0.0}), "jpeg-20": level({"a": 0.0, "b": 3})}
    module: Alternatives = ((("a", "b"),),)
    criterion = Criterion(importance="sum-abs", storage_formats=ROUNDED, granularity="module")
    found = joint_selection(levels, module, criterion, Coupling(problem="shared-layers"), 11)
    assert picked(found) == {level: {"a": "float32", "b": "int8"} for level in levels}
    assert found["jpeg-10"].objective == 16 + 16 - 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.lists(st.floats(0, 9), min_size=3, max_size=3))
def test_tensors_in_float32_are_plain_knapsacks(seed: int, budget: int, often: list[float]) -> None:
    levels = measured(seed)
    values = [[IMPORTANCE["l2"](row.change) for row in level.rows] for level in levels.values()]
    sizes = [row.numel for row in levels["jpeg-10"].rows]
    if sum(often) == 0 or min(sizes) > budget:
        return
    frequencies = dict(zip(LEVELS, often, strict=True))
    plain = {
        "one-memory": select(np.multiply(values, np.transpose([often])).ravel(), sizes * 3, budget),
        "shared-layers": select(np.dot(often, values), sizes, budget),
    }
    for problem, knapsack in plain.items():
        if not knapsack.objective:
            continue  # this criterion refuses an empty selection
        coupling = Coupling(problem=problem, frequencies=frequencies)  # type: ignore[arg-type]
        found = joint_selection(levels, TENSORS, Criterion(importance="l2"), coupling, budget)
        for level, selection in found.items():
            assert selection.objective == pytest.approx(knapsack.objective)
            assert selection.bound >= selection.objective
            assert selection.used == sum(r.numel for r in levels[level].rows if r.layer in selection.layers)


def test_a_level_of_frequency_0_gets_an_empty_adaptor_and_a_budget_too_small_for_any_option_is_refused() -> None:
    levels = measured(1)
    coupling = Coupling(problem="one-memory", frequencies={"jpeg-20": 0.0})
    found = joint_selection(levels, TENSORS, Criterion(), coupling, 100)
    assert (found["jpeg-20"].layers, found["jpeg-20"].used) == ((), 0)
    assert found["jpeg-10"].layers
    still = {
        name: LevelMeasurement(tuple(replace(row, mean_abs_change=0.0) for row in level.rows)) for name, level in levels.items()
    }
    for problem in ("one-memory", "shared-layers"):
        empty = joint_selection(still, TENSORS, Criterion(), Coupling(problem=problem), 100)  # type: ignore[arg-type]
        assert all(s.layers == () for s in empty.values())
    criterion = Criterion(storage_formats=("int8",))
    with pytest.raises(UserError, match="a budget of 4 bytes is too small for the levels: the smallest option by tensor as int8"):
        joint_selection(measured(1, ROUNDED), TENSORS, criterion, Coupling(problem="one-memory"), 1)
