"""The results of the selection stage."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Result:
    """How good a solution of a selection problem is. objective: the sum of the chosen values, in float64, correctly rounded.
    bound: an upper bound on the objective of every choice within the budget. status: OPTIMAL if proven optimal (as `select`
    documents); FEASIBLE if a time limit ended the search, and the optimum lies between `objective` and `bound`.
    """

    objective: float
    bound: float
    status: Literal["OPTIMAL", "FEASIBLE"]


@dataclass(frozen=True, kw_only=True)
class Selection(Result):
    """A solution of Eq. (2), or of its multiple-choice form. chosen: indices, ascending. used: the sum of the chosen sizes. core:
    number of groups in the largest problem that CP-SAT had to solve, 0 if it was not needed.
    """

    chosen: tuple[int, ...]
    used: int
    core: int = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class LayerSelection(Result):
    """The layers of one level's adaptor, in the network's order. storage_formats: of the layers that are not stored as float32;
    "folded" for normalisation statistics that are folded into weight and bias. used: what the adaptor stores, in floats (4
    bytes), rounded up. After a joint selection, objective, bound and status describe the problem of all levels.
    """

    layers: tuple[str, ...]
    storage_formats: dict[str, str]
    used: int
