"""Eq. (1), and sums over layers and of rounding errors, against plain float64 arithmetic."""

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from gearnn_ray.adaptors.storage_formats import applies, restored, stored_bytes
from gearnn_ray.models.layers import Layer, layers_of, network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.sensitivity import (
    Change,
    Sensitivity,
    StoredVariant,
    measure,
    sensitivity,
    share_of_weights_changed,
    table_row,
)
from gearnn_ray.store import tables
from gearnn_ray.training.gradients import Gradients


def test_rows_equal_the_definition() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    layers, before = layers_of(model), network_state(model)
    generator = torch.Generator().manual_seed(0)
    after = {name: t + 1e-3 * torch.randn(t.shape, generator=generator) for name, t in before.items()}
    rows = sensitivity(layers, before, after)
    assert [row.layer for row in rows] == [layer.name for layer in layers]
    for layer, row in zip(layers, rows, strict=True):
        p = np.concatenate([before[t].numpy().astype(np.float64).ravel() for t in layer.tensors])
        q = np.concatenate([after[t].numpy().astype(np.float64).ravel() for t in layer.tensors])
        assert row.mean_abs_change == pytest.approx(np.abs(p - q).mean(), rel=1e-12)
        assert row.max_abs_change == pytest.approx(np.abs(p - q).max(), rel=1e-12)
        assert row.l2_change == pytest.approx(np.linalg.norm(p - q), rel=1e-12)
        assert row.l2_weight == pytest.approx(np.linalg.norm(p), rel=1e-12)
        assert row.share_above_2e_4 == (np.abs(p - q) > 2e-4).mean()
        assert row.numel == p.size


def test_with_a_control_changes_are_measured_against_it_and_rounding_errors_are_not() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    layers, before = layers_of(model), network_state(model)
    generator = torch.Generator().manual_seed(0)

    def noise(size: float) -> dict[str, Tensor]:
        return {name: size * torch.randn(t.shape, generator=generator) for name, t in before.items()}

    alike, own = noise(1e-2), noise(1e-3)
    own["conv1.weight"].zero_()
    control = {name: before[name] + alike[name] for name in before}
    after = {name: control[name] + own[name] for name in before}
    taken = Gradients({n: t.double() for n, t in noise(1.0).items()}, {n: t.double() ** 2 for n, t in noise(1.0).items()})
    storage_formats = ("float32", "bfloat16", "int8")
    rows, stored_variants = measure(layers, before, after, taken, storage_formats, control)
    _, plain = measure(layers, before, after, taken, storage_formats)
    assert stored_variants == plain, "a storage format rounds the difference to the base"
    for layer, row in zip(layers, rows, strict=True):
        p, q, c, g, f = (
            np.concatenate([state[t].numpy().astype(np.float64).ravel() for t in layer.tensors])
            for state in (before, after, control, taken.mean, taken.square)
        )
        delta = q - c
        assert row.mean_abs_change == pytest.approx(np.abs(delta).mean(), rel=1e-12)
        assert row.max_abs_change == pytest.approx(np.abs(delta).max(), rel=1e-12)
        assert row.l2_change == pytest.approx(np.linalg.norm(delta), rel=1e-12)
        assert row.l2_weight == pytest.approx(np.linalg.norm(p), rel=1e-12)
        assert row.first_order_change == pytest.approx((g * delta).sum(), rel=1e-9)
        assert row.fisher_change == pytest.approx((f * delta**2).sum(), rel=1e-9)
    moved = {row.layer: row.mean_abs_change for row in rows}
    assert moved["conv1.weight"] == 0
    assert {name for name, value in moved.items() if value} == {layer.name for layer in layers} - {"conv1.weight"}
    # with the base as control this is Eq. (1)
    assert measure(layers, before, after, None, (), before)[0] == sensitivity(layers, before, after)
    with pytest.raises(KeyError, match=r"head\.bias"):
        measure(layers, before, after, None, (), {name: t for name, t in control.items() if name != "head.bias"})


def test_tiny_changes_of_large_weights_are_not_lost() -> None:
    """The mean of 10 million changes of one float32 step: summed in float32 it would be off by percents."""
    model = torch.nn.Linear(3000, 3000, bias=False)
    before = {"weight": torch.full((3000, 3000), 1.0)}
    step = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)) - 1
    (row,) = sensitivity(layers_of(model), before, {"weight": before["weight"] + step})
    assert row.mean_abs_change == pytest.approx(float(step), rel=1e-13)


def test_an_untouched_network_has_no_sensitivity() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    rows = sensitivity(layers_of(model), network_state(model), network_state(model))
    assert all(r.mean_abs_change == r.max_abs_change == r.l2_change == r.share_above_2e_4 == 0 for r in rows)
    assert share_of_weights_changed(rows) == (0.0, 0.0)


def test_share_of_weights_changed_in_both_readings() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    before = network_state(model)
    after = {k: v.clone() for k, v in before.items()}
    after["head.bias"] += 1.0  # 3 floats, the whole layer
    after["conv2.weight"][0, 0, 0, 0] += 0.01  # 1 of 576: the mean stays below 2e-4
    rows = sensitivity(layers_of(model), before, after)
    total = sum(r.numel for r in rows)
    assert share_of_weights_changed(rows) == pytest.approx((3 / total, 4 / total))


def test_shapes_that_differ_are_refused() -> None:
    model = build_model("tests.nets:small", num_classes=3)
    after = network_state(model) | {"head.bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"head.bias changed its shape from \[3\] to \[4\]"):
        sensitivity(layers_of(model), network_state(model), after)


# ── sums ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def moved(seed: int, size: float = 1e-2) -> tuple[tuple[Layer, ...], dict[str, Tensor], dict[str, Tensor], Gradients]:
    """Layers, a base, what it became, and gradients of some loss."""
    torch.manual_seed(seed)
    model = build_model("tests.nets:small", num_classes=3)
    before = network_state(model)
    drawn = [{name: torch.randn(t.shape) for name, t in before.items()} for _ in range(3)]
    after = {name: t + size * drawn[0][name] for name, t in before.items()}
    after["bn1.running_var"] = before["bn1.running_var"] * 1.01
    return layers_of(model), before, after, Gradients(drawn[1], {name: t.square() for name, t in drawn[2].items()})


def flat(layers: Sequence[Layer], *states: Mapping[str, Tensor]) -> list[NDArray[np.float64]]:
    names = [name for layer in layers for name in layer.tensors]
    return [np.concatenate([state[n].numpy().astype(np.float64).ravel() for n in names]) for state in states]


def close(found: Change, p: Any, delta: Any, g: Any, f: Any) -> None:
    assert found.numel == p.size
    assert found.sum_abs == pytest.approx(np.abs(delta).sum(), rel=1e-12)
    assert found.sum_sq == pytest.approx(delta @ delta, rel=1e-12)
    assert found.weight_sq == pytest.approx(p @ p, rel=1e-12)
    assert found.first_order == pytest.approx(g @ delta, rel=1e-9, abs=1e-12)
    assert found.fisher == pytest.approx(f @ delta**2, rel=1e-12)


@given(st.integers(0, 10), st.sets(st.integers(0, 10)))
@settings(max_examples=30, deadline=None)
def test_the_change_of_several_layers_is_the_sum_of_theirs(seed: int, members: set[int]) -> None:
    layers, before, after, given_ = moved(seed)
    rows, _ = measure(layers, before, after, given_, ())
    some = sorted(members | {seed})
    p, q, g, f = flat([layers[i] for i in some], before, after, given_.mean, given_.square)
    close(reduce(operator.add, (rows[i].change for i in some)), p, q - p, g, f)


def test_without_gradients_there_is_no_sum_of_them() -> None:
    layers, before, after, given_ = moved(0)
    with_, without = (measure(layers, before, after, taken, ())[0] for taken in (given_, None))
    assert without == sensitivity(layers, before, after)
    assert [replace(row, first_order_change=None, fisher_change=None) for row in with_] == without
    both = with_[0].change + without[1].change
    assert both.first_order is both.fisher is None
    assert both.sum_abs == with_[0].change.sum_abs + with_[1].change.sum_abs


@given(st.just(0.0) | st.floats(1e-200, 1e30), st.integers(1, 10**7))
def test_the_mean_of_the_sum_is_the_mean_to_the_bit(total: float, numel: int) -> None:
    row = Sensitivity("a", "bias", 0, numel, total / numel, 0.0, 0.0, 0.0, 0.0)
    assert row.change.sum_abs / numel == row.mean_abs_change
    assert row.change.sum_abs == pytest.approx(total, rel=1e-15)


def test_a_layer_of_no_floats_did_not_move() -> None:
    model = torch.nn.ParameterDict({"a": torch.zeros(0, 2), "b": torch.ones(2)})
    (row, _), stored_variants = measure(layers_of(model), network_state(model), network_state(model), None, ("bfloat16",))
    assert row.change == Change(0, 0.0, 0.0, 0.0, None, None)
    assert [one.layer for one in stored_variants] == ["b"]


# ── records and tables ───────────────────────────────────────────────────────────────────────────────────────────


def test_records_without_sums_of_gradients_are_read_too() -> None:
    layers, before, after, given_ = moved(0)
    rows, stored_variants = measure(layers, before, after, given_, ("int8",))
    assert [Sensitivity(**json.loads(json.dumps(asdict(row)))) for row in rows] == rows
    read = TypeAdapter(list[StoredVariant]).validate_python
    assert read(json.loads(json.dumps([asdict(one) for one in stored_variants]))) == stored_variants
    old = {k: v for k, v in asdict(rows[0]).items() if k not in ("first_order_change", "fisher_change")}
    assert Sensitivity(**old).change.fisher is None


def test_rows_of_the_table() -> None:
    layers, before, after, given_ = moved(0)
    before["bn1.bias"].zero_()
    rows, _ = measure(layers, before, after, given_, ())
    made = tables.table(tables.SENSITIVITY, [table_row("jpeg-10", row) for row in rows]).to_pylist()
    for layer, row in zip(layers, made, strict=True):
        p, q, g, f = flat([layer], before, after, given_.mean, given_.square)
        assert (row["level"], row["layer"]) == ("jpeg-10", layer.name)
        assert row["sum_abs_change"] == pytest.approx(np.abs(q - p).sum())
        expected = np.linalg.norm(q - p) / np.linalg.norm(p) if p.any() else 0.0
        assert row["relative_change"] == pytest.approx(expected)
        assert row["first_order_change"] == pytest.approx(g @ (q - p), rel=1e-9, abs=1e-12)
        assert row["fisher_change"] == pytest.approx(f @ (q - p) ** 2)
    old = {k: v for k, v in asdict(rows[0]).items() if k not in ("first_order_change", "fisher_change")}
    (row,) = tables.table(tables.SENSITIVITY, [table_row("jpeg-10", Sensitivity(**old))]).to_pylist()
    assert row["first_order_change"] is row["fisher_change"] is None
    assert row["relative_change"] == made[0]["relative_change"]


# ── storage formats ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_rounding_error_of_each_storage_format() -> None:
    layers, before, after, given_ = moved(0)
    storage_formats = ("float32", "bfloat16", "int8")
    _, stored_variants = measure(layers, before, after, given_, storage_formats)
    shapes = {layer.name: [before[n].shape for n in layer.tensors] for layer in layers}
    assert [(one.layer, one.storage_format) for one in stored_variants] == [
        (layer.name, storage_format)
        for layer in layers
        for storage_format in storage_formats[1:]
        if all(applies(storage_format, s) for s in shapes[layer.name])
        and (layer.kind, storage_format) != ("norm_statistics", "int8")
    ]
    by_name = {layer.name: layer for layer in layers}
    for one in stored_variants:
        layer = by_name[one.layer]
        p, q, g, f = flat([layer], before, after, given_.mean, given_.square)
        back = restored(before, {n: after[n] for n in layer.tensors}, dict.fromkeys(layer.tensors, one.storage_format))
        (held,) = flat([layer], back)
        close(one.error, p, q - held, g, f)
        assert one.bytes == stored_bytes(one.storage_format, shapes[one.layer]) < 4 * layer.numel
        assert 0 < one.error.sum_abs < np.abs(q - p).sum()
