"""One tensor at every level, and which of its rows each sample of a batch uses.

A table holds a tensor of the base in row 0 and, below, one row for every level that changes it: base plus adaptors, to
the byte. Switching a level writes indices and copies no weight. Knows nothing of modules, releases or level names:
a level is a number, 0 the base.

Legend: n samples of a batch, L levels, M maps (distinct ways in which the tables give rows to levels), R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_CAPACITY = 64  # samples; a larger batch makes the index grow once


@dataclass(frozen=True)
class Mixture:
    """The network of one sample: (1 - weight) × level + weight × neighbour, tensor by tensor; 0 <= weight < 1."""

    level: int
    neighbour: int = 0
    weight: float = 0.0


class _Host:
    """What the host knows of the batch; a plain object, because a Module's attributes take microseconds to set."""

    __slots__ = ("indices", "mixed", "rows", "unwritten")

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices  # the buffer `rows` of the Selection
        self.rows: NDArray[np.int64] | None = None  # [M, n] or, where all samples agree, [M, 1]; None: not known
        self.mixed = False  # whether a sample of this batch stands between two levels
        self.unwritten: Tensor | None = None  # [M, 1]: what `indices` is to hold, where it does not yet


class Selection(nn.Module):
    """The levels of the batch that runs now, shared by all tables of one model.

    On the device: `rows` int64 [M, capacity], and where levels are mixed `neighbours` like it and `weights` [capacity].
    On the host, for eager execution only: the rows of every map, so that a batch of one level needs no gather at all.
    A compiled graph reads the device's tensors alone: it is the same whatever the levels are.
    """

    rows: Tensor
    neighbours: Tensor
    weights: Tensor
    maps: Tensor

    @torch.inference_mode(False)  # what is made inside it cannot be written outside
    def __init__(self, maps: Sequence[tuple[int, ...]], mixes: bool, device: torch.device) -> None:
        """maps: per map, the row of every level. mixes: whether a sample may stand between two levels."""
        super().__init__()
        self.mixes = mixes
        self._maps_ML = np.array(maps, np.int64).reshape(len(maps), -1)
        self.register_buffer("maps", torch.from_numpy(self._maps_ML).to(device), persistent=False)
        self.register_buffer("rows", torch.zeros_like(self.maps[:, :1]), persistent=False)
        self.host = _Host(self.rows)
        self._grow(_CAPACITY)
        levels = range(self._maps_ML.shape[1])
        self._columns = [(self.maps[:, [level]].contiguous(), self._maps_ML[:, [level]]) for level in levels]

    @torch.inference_mode(False)
    def _grow(self, capacity: int) -> None:
        self.rows = self.rows[:, :1].repeat(1, capacity)
        if self.mixes:
            self.register_buffer("neighbours", torch.zeros_like(self.rows), persistent=False)
            self.register_buffer("weights", torch.zeros(capacity, device=self.rows.device), persistent=False)
        self.host.indices = self.rows

    def reserve(self, n: int) -> None:
        """Make room for batches of n samples."""
        if n > self.rows.shape[1]:
            self._grow(max(n, 2 * self.rows.shape[1]))

    def set_all(self, level: int) -> None:
        """Every sample, of this batch and later ones, uses this level. Two pointers; `write` follows where it is needed."""
        host = self.host
        host.unwritten, host.rows = self._columns[level]
        host.mixed = False

    def write(self) -> None:
        """Let the device know of the last `set_all`, as a compiled graph must: one write of indices."""
        host = self.host
        if host.unwritten is not None:
            host.indices.copy_(host.unwritten)
            host.unwritten = None
            if self.mixes:
                self.weights.zero_()

    def set_each(self, mixtures: Sequence[Mixture]) -> None:
        """Sample i uses mixtures[i]."""
        n = len(mixtures)
        if not self.mixes and any(mixture.weight for mixture in mixtures):
            raise ValueError("this model does not mix levels: it was made without interpolation")
        self.reserve(n)
        rows_Mn = self._maps_ML[:, [mixture.level for mixture in mixtures]]
        self.rows[:, :n].copy_(torch.from_numpy(rows_Mn))
        self.host.rows, self.host.mixed = rows_Mn, any(mixture.weight for mixture in mixtures)
        self.host.unwritten = None
        if self.mixes:
            rows_Mn = self._maps_ML[:, [mixture.neighbour for mixture in mixtures]]
            self.neighbours[:, :n].copy_(torch.from_numpy(rows_Mn))
            self.weights[:n].copy_(torch.tensor([mixture.weight for mixture in mixtures]))

    def set_index(self, levels_n: Tensor) -> None:
        """Sample i uses level levels_n[i]; nothing is read on the host, so that this can stand in a compiled graph."""
        self.rows[:, : levels_n.shape[0]] = self.maps[:, levels_n]
        self.host.rows, self.host.mixed, self.host.unwritten = None, False, None
        if self.mixes:
            self.weights.zero_()

    def forget(self) -> None:
        """Let the host know nothing of the levels: modules then run as they do in a compiled graph."""
        self.write()
        self.host.rows = None

    def samples(self) -> int | None:
        """How many samples the batch has, if the host knows and they may differ."""
        if torch.compiler.is_compiling() or self.host.rows is None or self.host.rows.shape[1] == 1:
            return None
        return int(self.host.rows.shape[1])

    def on_host(self, map_index: int) -> list[int] | None:
        """Rows of the samples ([row] where all agree), or None where the graph must not depend on them."""
        if torch.compiler.is_compiling() or self.host.rows is None or self.host.mixed:
            return None
        rows = self.host.rows[map_index]
        first = int(rows[0])
        return [first] if (rows == first).all() else rows.tolist()


class Table(nn.Module):
    """One tensor at every level: `values` [R, *shape], row 0 the base's."""

    values: Tensor

    def __init__(self, values: Tensor, map_index: int, selection: Selection) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.map_index = map_index
        self.selection = selection

    def rows(self) -> list[int] | None:
        """Which row each sample uses, if the host may know; [row] where all use the same."""
        return self.selection.on_host(self.map_index)

    def gather(self, n: int) -> Tensor:
        """[n, *shape]: each sample's own."""
        selection = self.selection
        values = self.values[selection.rows[self.map_index, :n]]
        if not selection.mixes:
            return values
        others = self.values[selection.neighbours[self.map_index, :n]]
        weights = selection.weights[:n].view(n, *(1 for _ in values.shape[1:]))
        return torch.lerp(values, others, weights)
