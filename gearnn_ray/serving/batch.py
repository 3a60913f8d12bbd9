"""One tensor at every level, and which of its rows each sample of a batch uses.

A table holds a tensor of the base in row 0 and, below, one row for every level that changes it: base plus adaptors, to
the byte. Rows that are stored under a code (`codes.py`) are held as they are stored and restored when they are used; those
of one level, at most, stay restored. Switching a level writes indices and copies no weight. Knows nothing of modules, releases
or level names: a level is a number, 0 the base.

Legend: n samples of a batch, L levels, M maps (distinct ways in which the tables give rows to levels), R rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gearnn_ray.adaptors.storage_formats import added, difference_of
from gearnn_ray.models.layers import same_bits

_CAPACITY = 64  # samples; a larger batch makes the index grow once


@dataclass(frozen=True)
class Mixture:
    """The network of one sample: (1 - weight) × level + weight × neighbour, tensor by tensor; 0 <= weight < 1."""

    level: int
    neighbour: int = 0
    weight: float = 0.0


class _Host:
    """What the host knows of the batch; a plain object, because a Module's attributes take microseconds to set."""

    __slots__ = ("held", "holds", "indices", "mixed", "restored", "rows", "unwritten")

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices  # the buffer `rows` of the Selection
        self.rows: NDArray[np.int64] | None = None  # [M, n] or, where all samples agree, [M, 1]; None: not known
        self.mixed = False  # whether a sample of this batch stands between two levels
        self.unwritten: Tensor | None = None  # [M, 1]: what `indices` is to hold, where it does not yet
        self.held: int | None = None  # the level whose tensors are kept once they are restored, and these
        self.restored: dict[Table, Tensor] = {}
        self.holds = False  # whether all samples of this batch use it


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
        host.holds = level == host.held

    def hold(self, level: int | None) -> None:
        """Keep what coded tables restore of this level, so that each `set_all` to it finds it, and let another's go.

        None: keep nothing.
        """
        host = self.host
        if level != host.held:
            host.held, host.restored, host.holds = level, {}, False

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
        self.host.unwritten, self.host.holds = None, False
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

    def row(self, map_index: int, level: int) -> int:
        """The row that a level uses."""
        return int(self._maps_ML[map_index, level])

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

    def __len__(self) -> int:
        """R."""
        return len(self.values)

    def rows(self) -> list[int] | None:
        """Which row each sample uses, if the host may know; [row] where all use the same."""
        return self.selection.on_host(self.map_index)

    def row(self, row: int) -> Tensor:
        """[*shape]: the tensor in one row."""
        return self.values[row]

    def take(self, rows_n: Tensor) -> Tensor:
        """[n, *shape]: the tensors in these rows."""
        return self.values[rows_n]

    def gather(self, n: int) -> Tensor:
        """[n, *shape]: each sample's own."""
        selection = self.selection
        values = self.take(selection.rows[self.map_index, :n])
        if not selection.mixes:
            return values
        others = self.take(selection.neighbours[self.map_index, :n])
        weights = selection.weights[:n].view(n, *(1 for _ in values.shape[1:]))
        return torch.lerp(values, others, weights)


class _Coded(nn.Module):
    """Rows of a table that are stored under one code: each of its parts [k, *shape of one], for k rows."""

    def __init__(self, name: str, storage_format: str, parts: Mapping[str, Tensor], base: Tensor) -> None:
        super().__init__()
        self.name, self.storage_format, self.shape = name, storage_format, base.shape
        for part, tensor in parts.items():
            self.register_buffer(f"stored_{part}", tensor)
        self._parts = tuple(parts)
        self.count = len(next(iter(parts.values())))
        # Nearly always a sum alone gives the right bits: where the base has no -0.0 and no variance falls below 0.
        differences = (self._differences(place) for place in range(self.count))
        self.is_sum = all(same_bits(base + each, added(name, base, each)) for each in differences)

    def _differences(self, at: int | Tensor) -> Tensor:
        return difference_of(
            self.storage_format, {part: getattr(self, f"stored_{part}")[at] for part in self._parts}, self.shape
        )

    def restore(self, base: Tensor, at: int | Tensor) -> Tensor:
        """[*shape], or [n, *shape] at places [n]: what `codes.decode` gives, bit for bit. base: broadcasts to that."""
        difference = self._differences(at)
        return base + difference if self.is_sum else added(self.name, base, difference)


class CompressedTable(Table):
    """A table whose last rows are coded: after those of `values` come those of each code in turn."""

    def __init__(
        self,
        values: Tensor,
        stored_variants: Mapping[str, Mapping[str, Tensor]],
        name: str,
        map_index: int,
        selection: Selection,
    ) -> None:
        """coded: per code, the parts of its rows (`codes.difference_of`), stacked. name: in the base's state dict."""
        super().__init__(values, map_index, selection)
        self.stored_variants = nn.ModuleList(
            _Coded(name, storage_format, parts, values[0]) for storage_format, parts in stored_variants.items()
        )

    def __len__(self) -> int:
        return len(self.values) + sum(rows.count for rows in self._groups())

    def _groups(self) -> Iterator[_Coded]:
        return iter(self.stored_variants)  # type: ignore[arg-type]

    def row(self, row: int) -> Tensor:
        values, host = self.values, self.selection.host
        if row < len(values):
            return values[row]
        if not host.holds:
            return self._restored(row)
        if self not in host.restored:
            host.restored[self] = self._restored(row)
        return host.restored[self]

    def _restored(self, row: int) -> Tensor:
        row -= len(self.values)
        for rows in self._groups():
            if row < rows.count:
                return rows.restore(self.values[0], row)
            row -= rows.count
        raise IndexError("no level has this row")

    def take(self, rows_n: Tensor) -> Tensor:
        base, start = self.values[:1], len(self.values)
        taken = self.values[rows_n.clamp(max=start - 1)]
        for rows in self._groups():
            here = rows_n >= start  # or further on, which comes next
            restored = rows.restore(base, (rows_n - start).clamp(0, rows.count - 1))
            taken = torch.where(here.view(-1, *(1 for _ in base.shape[1:])), restored, taken)
            start += rows.count
        return taken
