"""Which layers of a network get an adaptor: Eq. (2) of GearNN and its relatives, solved to proven optimality.

`knapsack` is one level's problem: `select` over layers, `choose` where each comes in several ways. `coupled` is all
levels' at once, where they share memory, layers or adaptors. `integers` keeps both exact. They work on plain numbers
and know nothing of networks, tensors, files or Ray.
"""

from gearnn_ray.offline.selection.coupled import Joint, few_adaptors, few_layers
from gearnn_ray.offline.selection.knapsack import Choice, Selection, choose, select

__all__ = [
    "Choice",
    "Joint",
    "Selection",
    "choose",
    "few_adaptors",
    "few_layers",
    "select",
]
