"""Linear interpolation between the adaptors of two levels, for a level that has no adaptor of its own."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["interpolated"]


def interpolated(
    base: Mapping[str, Tensor], lower: Mapping[str, Tensor], upper: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Return (1 - share) · lower + share · upper. A tensor that only one adaptor has is mixed with the base's."""
    names = [name for name in base if name in lower or name in upper]
    return {name: torch.lerp(lower.get(name, base[name]), upper.get(name, base[name]), share) for name in names}
