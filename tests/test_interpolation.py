"""Interpolated adaptors against the mixture written out."""

import pytest
import torch

from gearnn_ray.adaptors.interpolation import interpolated
from gearnn_ray.models.layers import same_bits


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_interpolated_adaptors(share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    base, lower, upper = ({name: torch.randn(2, 3, generator=generator) for name in names} for names in ("abcd", "ba", "cb"))
    mixed = interpolated(base, lower, upper, share)
    assert list(mixed) == ["a", "b", "c"]  # in the base's order, and nothing that neither adapts
    for name, tensor in mixed.items():
        one, other = lower.get(name, base[name]), upper.get(name, base[name])
        torch.testing.assert_close(tensor, (1 - share) * one + share * other)
        if share in (0.0, 1.0):
            assert same_bits(tensor, other if share else one)
    assert interpolated(base, {}, {}, share) == {}
