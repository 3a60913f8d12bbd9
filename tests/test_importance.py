"""Importance functions, and the options of a selection against a plain enumeration."""

import itertools
import math
from dataclasses import astuple
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearnn_ray.config.recipe import Criterion
from gearnn_ray.models.layers import alternatives_of, layers_of, network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.importance import FOLDED, IMPORTANCE, Option, selection_options
from gearnn_ray.offline.selection import select
from gearnn_ray.offline.sensitivity import Change, Sensitivity, StoredVariant, measure, sensitivity

examples = settings(max_examples=60, deadline=None)

# ── importance ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_importance_by_definition() -> None:
    change = Change(numel=4, sum_abs=2.0, sum_sq=9.0, weight_sq=36.0, first_order=-0.25, fisher=0.5)
    assert {name: value(change) for name, value in IMPORTANCE.items()} == {
        "mean-abs": 0.5, "sum-abs": 2.0, "l2": 3.0, "relative": 0.5, "first-order": 0.25, "fisher": 0.5,
    }  # fmt: skip


def test_a_change_of_no_floats_has_no_importance() -> None:
    assert {value(Change(0, 0.0, 0.0, 0.0, 0.0, 0.0)) for value in IMPORTANCE.values()} == {0.0}
    assert IMPORTANCE["relative"](Change(2, 1.0, 1.0, 0.0, None, None)) == 0.0


def test_importance_that_needs_gradients_refuses_a_change_measured_without_them() -> None:
    bare = Change(4, 2.0, 9.0, 36.0, None, None)
    for name, value in IMPORTANCE.items():
        if Criterion.model_validate({"importance": name}).needs_gradients:
            with pytest.raises(ValueError, match="measured without gradients, which this importance needs"):
                value(bare)
        else:
            assert value(bare) > 0
    needing = [name for name in IMPORTANCE if Criterion.model_validate({"importance": name}).needs_gradients]
    assert needing == ["first-order", "fisher"]
    with pytest.raises(ValueError, match="importance 'magic' is unknown: expected one of mean-abs, sum-abs"):
        selection_options([], [], (), "magic", ("float32",))


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────────


def row(layer: str, kind: str, numel: int, moved: float) -> Sensitivity:
    """A layer whose floats are all 2 and changed by `moved`; g is 1/2 and F is 3."""
    root = math.sqrt(numel)
    return Sensitivity(
        layer, kind, 0, numel, moved, moved, moved * root, 2 * root, 1.0, 0.5 * moved * numel, 3 * moved**2 * numel
    )


def variant(layer: str, storage_format: str, numel: int, bytes_: int, lost: float) -> StoredVariant:
    """Every float is restored with an error of `lost`."""
    change = Change(numel, lost * numel, lost**2 * numel, 4.0 * numel, 0.5 * lost * numel, 3 * lost**2 * numel)
    return StoredVariant(layer, storage_format, bytes_, change)


def test_eq_2_is_the_plain_case() -> None:
    torch.manual_seed(0)
    model = build_model("tests.nets:small", num_classes=3)
    before = network_state(model)
    after = {name: t + 10 ** -(2 + torch.rand(1)) * torch.randn(t.shape) for name, t in before.items()}
    after["bn1.bias"] = before["bn1.bias"]
    rows = sensitivity(layers_of(model), before, after)
    groups = selection_options(rows, [], alternatives_of(model, "tensor"), "mean-abs", ("float32",))
    assert groups == tuple(
        (Option(r.mean_abs_change, 4 * r.numel, {r.layer: "float32"}),) if r.mean_abs_change else () for r in rows
    )
    budget = sum(r.numel for r in rows) // 3
    chosen = select([r.mean_abs_change for r in rows], [r.numel for r in rows], budget).chosen
    worth, size = zip(*((g[0].value, g[0].bytes) if g else (0.0, 0) for g in groups), strict=True)
    assert select(worth, size, 4 * budget).chosen == chosen


def test_a_convolution_with_its_normalisation() -> None:
    norms = [("n.weight", "norm_weight"), ("n.bias", "norm_bias"), ("n.running_stats", "norm_statistics")]
    rows = [row("c.weight", "conv_weight", 64, 1.0), *(row(name, kind, 4, 4.0) for name, kind in norms)]
    variants = [variant("c.weight", "int8", 64, 68, 0.25), variant("c.weight", "bfloat16", 64, 40, 0.5)]
    variants += [variant(name, "int8", 4, 8, 1.0) for name, _ in norms[:2]]
    norm = tuple(name for name, _ in norms)
    (group,) = selection_options(
        rows, variants, ((norm, ("c.weight", *norm)),), "sum-abs", ("float32", "int8", "bfloat16", "float8")
    )
    alone = {**dict.fromkeys(norm, "int8"), "n.running_stats": "float32"}
    assert group == (
        Option(40.0, 32, alone),
        Option(48.0, 48, dict.fromkeys(norm, "float32")),
        Option(72.0, 72, {"c.weight": "bfloat16", **alone}),
        Option(80.0, 88, {"c.weight": "bfloat16", **dict.fromkeys(norm, "float32")}),
        Option(88.0, 100, {"c.weight": "int8", **alone}),
        Option(96.0, 116, {"c.weight": "int8", **dict.fromkeys(norm, "float32")}),
        Option(104.0, 288, {"c.weight": "float32", **alone}),
        Option(112.0, 304, {"c.weight": "float32", **dict.fromkeys(norm, "float32")}),
    )


NOTHING = Change(0, 0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("value", list(IMPORTANCE))
def test_folded_statistics_are_one_option_that_takes_no_bytes(value: str) -> None:
    """Only weight and bias of a folded normalisation are stored: a mean or a ratio is over their floats alone."""
    norms = [("n.weight", "norm_weight", 4), ("n.bias", "norm_bias", 4), ("n.running_stats", "norm_statistics", 0)]
    rows = [row("c.weight", "conv_weight", 64, 1.0), *(row(name, kind, numel, 4.0) for name, kind, numel in norms)]
    variants = [variant("c.weight", "int8", 64, 68, 0.25), *(variant(name, "int8", 4, 8, 1.0) for name, _, _ in norms[:2])]
    # bfloat16 is not offered, because the statistics are folded
    variants += [variant("n.running_stats", "bfloat16", 0, 16, 0.0), StoredVariant("n.running_stats", FOLDED, 0, NOTHING)]
    names = tuple(name for name, _, _ in norms)
    alternatives = ((names, ("c.weight", *names)),)
    for storage_formats in (("float32",), ("float32", "int8", "bfloat16")):
        (group,) = selection_options(rows, variants, alternatives, value, storage_formats)
        alone = [option for option in group if "c.weight" not in option.storage_formats]
        plain = [(option.bytes, option.storage_formats) for option in alone if option.storage_formats["n.weight"] == "float32"]
        assert plain == [(32, {**dict.fromkeys(names, "float32"), "n.running_stats": FOLDED})]
        # eight floats of 2 that moved by 4, with g = 1/2 and F = 3
        want = {
            "mean-abs": 4.0, "sum-abs": 32.0, "l2": math.sqrt(128), "relative": 2.0, "first-order": 16.0, "fisher": 384.0,
        }  # fmt: skip
        assert alone[-1].value == pytest.approx(want[value])
        assert {option.storage_formats["n.running_stats"] for option in group} == {FOLDED}
    assert {option.storage_formats["n.weight"] for option in alone} == {"float32", "int8"}


def test_a_mean_is_over_all_floats_of_an_alternative() -> None:
    """A layer without rounding error dilutes the other layer's error as it dilutes its change."""
    rows = [row("weight", "linear_weight", 30, 1.0), row("bias", "bias", 10, 1.0)]
    groups = selection_options(
        rows, [variant("weight", "int8", 30, 34, 0.4)], ((("weight", "bias"),),), "mean-abs", ("float32", "int8")
    )
    assert [(option.bytes, option.value) for option in groups[0]] == [(74, pytest.approx(0.7)), (160, 1.0)]
    assert groups[0][0].storage_formats == {"weight": "int8", "bias": "float32"}


def test_a_layer_without_an_applicable_storage_format_is_no_option() -> None:
    rows = [row("weight", "linear_weight", 30, 1.0), row("bias", "bias", 1, 1.0)]
    variants = [variant("weight", "int8", 30, 34, 0.1)]
    groups = selection_options(rows, variants, ((("weight",),), (("bias",),), (("weight", "bias"),)), "l2", ("int8",))
    assert [len(group) for group in groups] == [1, 0, 0]
    with pytest.raises(KeyError, match="alien"):
        selection_options(rows, variants, ((("alien",),),), "l2", ("int8",))


def test_a_format_whose_rounding_error_exceeds_the_change_is_no_option() -> None:
    rows, variants = [row("w", "conv_weight", 8, 1.0)], [variant("w", "int8", 8, 12, 1.5)]
    assert selection_options(rows, variants, ((("w",),),), "fisher", ("int8",)) == ((),)


KINDS = ("conv_weight", "bias", "norm_weight", "norm_bias", "norm_statistics")
FORMATS = ("float32", "bfloat16", "int8")


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[Sensitivity], list[StoredVariant], tuple[tuple[tuple[str, ...], ...], ...]]:
    """Up to five layers, some of them folded, storage formats for the others, and one group of alternatives."""
    names = [f"l{i}" for i in range(draw(st.integers(1, 5)))]
    rows = [row(name, draw(st.sampled_from(KINDS)), draw(st.integers(0, 6)), draw(st.integers(0, 4)) / 4) for name in names]
    variants = [
        variant(r.layer, storage_format, r.numel, draw(st.integers(0, 12)), draw(st.integers(0, 4)) / 8)
        for r in rows
        for storage_format in FORMATS[1:]
        if draw(st.booleans())
    ]
    variants += [StoredVariant(r.layer, FOLDED, 0, NOTHING) for r in rows if r.kind == "norm_statistics" and draw(st.booleans())]
    alternatives = st.lists(st.sampled_from(names), min_size=1, unique=True).map(lambda a: tuple(sorted(a)))
    return rows, variants, (tuple(draw(st.lists(alternatives, min_size=1, max_size=3))),)


@given(instances(), st.sampled_from(list(IMPORTANCE)), st.lists(st.sampled_from(FORMATS), unique=True))
@examples
def test_options_are_the_best_of_all_combinations(instance: object, value: str, storage_formats: list[str]) -> None:
    rows, variants, alternatives = instance  # type: ignore[misc]
    (group,) = selection_options(rows, variants, alternatives, value, storage_formats)
    kinds = {r.layer: r.kind for r in rows}
    change = {r.layer: r.change for r in rows}
    errors = {(c.layer, c.storage_format): c for c in variants}
    errors |= {
        (r.layer, "float32"): StoredVariant(r.layer, "float32", 4 * r.numel, Change(r.numel, 0, 0, 4 * r.numel, 0, 0))
        for r in rows
    }
    every: list[Option] = []
    for names in alternatives[0]:
        for combination in itertools.product(*([FOLDED] if (name, FOLDED) in errors else storage_formats for name in names)):
            taken = dict(zip(names, combination, strict=True))
            of_norms = {storage_format for name, storage_format in taken.items() if kinds[name] in ("norm_weight", "norm_bias")}
            if len(of_norms) > 1 or not all(item in errors for item in taken.items()):
                continue
            columns = [zip(*(astuple(c) for c in cs), strict=True) for cs in (
                [change[n] for n in names], [errors[item].error for item in taken.items()]
            )]  # fmt: skip
            whole, lost = (Change(*(sum(column) for column in one)) for one in columns)  # type: ignore[arg-type]
            gain = IMPORTANCE[value](whole) - IMPORTANCE[value](lost)
            every.append(Option(gain, sum(errors[item].bytes for item in taken.items()), taken))
    # every option is one of the combinations, and options with more bytes have a higher value
    for option in group:
        assert any(o.storage_formats == option.storage_formats and o.bytes == option.bytes and near(o, option) for o in every)
        assert option.value > 0
    assert all(a.bytes < b.bytes and a.value < b.value for a, b in itertools.pairwise(group))
    # every other combination has no value, or is dominated by an option
    for other in every:
        assert other.value <= 1e-12 or any(o.bytes <= other.bytes and (o.value >= other.value or near(o, other)) for o in group)


def near(a: Option, b: Option) -> bool:
    return math.isclose(a.value, b.value, rel_tol=1e-9, abs_tol=1e-12)


def test_of_equal_options_the_first_is_kept() -> None:
    rows = [row("a", "bias", 4, 1.0), row("b", "bias", 4, 1.0)]
    variants = [variant(name, storage_format, 4, 8, 0.5) for name in "ab" for storage_format in ("int8", "bfloat16")]
    (group,) = selection_options(rows, variants, ((("a",), ("b",)),), "sum-abs", ("bfloat16", "int8"))
    assert group == (Option(2.0, 8, {"a": "bfloat16"}),)


def test_the_options_of_a_measured_network() -> None:
    """Modules of a network in three storage formats: float32, without rounding error, has each group's best value."""
    torch.manual_seed(0)
    model = build_model("tests.nets:small", num_classes=3)
    before = network_state(model)
    after = {name: t + 1e-2 * torch.rand(t.shape) for name, t in before.items()}
    storage_formats = ("float32", "bfloat16", "int8")
    rows, variants = measure(layers_of(model), before, after, None, storage_formats)
    alternatives = alternatives_of(model, "module")
    groups = selection_options(rows, variants, alternatives, "l2", storage_formats)
    changes = {r.layer: r.change for r in rows}
    for group, options in zip(alternatives, groups, strict=True):
        best = options[-1]
        assert tuple(best.storage_formats) == group[-1]
        assert best.bytes == 4 * sum(changes[name].numel for name in group[-1])
        assert best.value**2 == pytest.approx(float(sum(Fraction(changes[name].sum_sq) for name in group[-1])))
        assert set(options[0].storage_formats.values()) != {"float32"}  # the smallest
