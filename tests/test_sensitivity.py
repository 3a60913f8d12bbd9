"""Eq. (1) against plain float64 arithmetic."""

import numpy as np
import pytest
import torch

from gearnn_ray.layers import layers_of, network_state
from gearnn_ray.models import build_model
from gearnn_ray.offline.sensitivity import sensitivity, share_of_weights_changed


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
