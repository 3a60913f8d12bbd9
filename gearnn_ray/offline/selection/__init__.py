"""Which layers get an adaptor: Eq. (2) of GearNN, a knapsack problem solved to proven optimality. Imports no torch, no Ray."""

from gearnn_ray.offline.selection.knapsack import select
from gearnn_ray.offline.selection.result import LayerSelection, Selection

__all__ = ["LayerSelection", "Selection", "select"]
