"""Tables: one tensor at every level. And the selection: which row of each table each sample of a batch uses.

Row 0 of a table is the base's tensor. Each level that changes the tensor adds a row: base plus adaptor, bit for bit. A row in a
storage format other than float32 (`adaptors/storage_formats.py`) is held as it is stored and restored when it is used; restored
rows of at most one level are kept, and merged rows of a few mixtures of two levels. Switching levels writes indices and copies no
weight. Knows nothing about modules, releases or level names: a level is a number, and level 0 is the base.

Legend: n samples of a batch, L levels, M maps (distinct assignments of rows to levels), R rows.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gearnn_ray.adaptors.storage_formats import added, difference_of
from gearnn_ray.models.layers import same_bits

_MIXTURES = 4  # whose merged rows are kept: several calm streams' together, each at most two adaptors as float32
_LAYOUTS = 32  # numbers of samples for which `Vectors` remembers where the values lie
_CAPACITY = 64  # samples; the index grows with the first batch that is larger


@dataclass(frozen=True)
class Mixture:
    """The network of one sample: (1 - weight) × level + weight × neighbour, tensor by tensor; 0 <= weight < 1."""

    level: int
    neighbour: int = 0
    weight: float = 0.0


class _Host:
    """The host's view of the batch; a plain object, because setting a Module's attributes takes microseconds."""

    __slots__ = (
        "_rows", "gathered", "held", "holds", "images", "indices", "lists", "merged", "mixed", "mixtures", "regions", "restored",
        "unwritten",
    )  # fmt: skip

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices  # the buffer `rows` of the Selection
        self.rows = None
        self.mixed = False  # whether this batch has more mixtures than `merged` keeps: then `rows` does not tell them
        self.mixtures: list[Mixture] = []
        self.merged: OrderedDict[Mixture, dict[Table, Tensor]] = OrderedDict()  # the least recently used one first
        self.unwritten: Tensor | None = None  # [M, 1]: the rows that are still to be written to `indices`
        self.held: int | None = None  # the level whose restored tensors are kept in `restored`
        self.restored: dict[Table, Tensor] = {}
        self.holds = False  # whether all samples of this batch use the level `held`
        self.regions: int | None = None  # how many samples there are while they are regions of images
        self.images: NDArray[np.int64] | None = None  # `rows` of the images, while samples are regions

    @property
    def rows(self) -> NDArray[np.int64] | None:
        """[M, n], or [M, 1] if all samples use one level; None: unknown. -1 - k: what `mixtures[k]` merges."""
        return self._rows

    @rows.setter
    def rows(self, rows: NDArray[np.int64] | None) -> None:
        self._rows = rows
        self.lists: list[list[int]] | None = None  # what `on_host` gives for each map
        self.gathered: Tensor | None = None  # what `vectors` has gathered for this batch


class Selection(nn.Module):
    """The levels of the current batch, shared by all tables of one model.

    On the device: `rows` int64 [M, capacity] and, if levels can be mixed, `neighbours` [M, capacity] and `weights` [capacity].
    On the host, for eager execution only: the rows of every map, so that a batch of one level needs no gather.
    A compiled graph reads only the tensors on the device, so one graph serves all levels.
    """

    rows: Tensor
    neighbours: Tensor
    weights: Tensor
    maps: Tensor

    @torch.inference_mode(False)  # a tensor made in inference mode could not be written outside it
    def __init__(self, maps: Sequence[tuple[int, ...]], mixes: bool, device: torch.device) -> None:
        """maps: for each map, the row of every level. mixes: whether a sample may mix two levels."""
        super().__init__()
        self.mixes = mixes
        self._maps_ML = np.array(maps, np.int64).reshape(len(maps), -1)
        self.register_buffer("maps", torch.from_numpy(self._maps_ML).to(device), persistent=False)
        self.register_buffer("rows", torch.zeros_like(self.maps[:, :1]), persistent=False)
        self.host = _Host(self.rows)
        self._grow(_CAPACITY)
        self.vectors: Vectors | None = None
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
        """Use this level for every sample, until the next call. Sets two pointers; a compiled graph also needs `write`."""
        host = self.host
        host.unwritten, host.rows = self._columns[level]
        host.mixed = False
        host.holds = level == host.held

    def hold(self, level: int | None) -> None:
        """Keep the restored tensors of this level, and drop those of the level before. None: keep none."""
        host = self.host
        if level != host.held:
            host.held, host.restored, host.holds = level, {}, False

    def write(self) -> None:
        """Write the rows of the last `set_all` to the device, where a compiled graph reads them."""
        host = self.host
        if host.unwritten is not None:
            host.indices.copy_(host.unwritten)
            host.unwritten = None
            if self.mixes:
                self.weights.zero_()

    def set_each(self, mixtures: Sequence[Mixture]) -> None:
        """Use mixtures[i] for sample i. Raises ValueError for a mixture of two levels unless `mixes`."""
        n = len(mixtures)
        if not self.mixes and any(mixture.weight for mixture in mixtures):
            raise ValueError("this model cannot mix levels: it was made without interpolation")
        self.reserve(n)
        rows_Mn = self._maps_ML[:, [mixture.level for mixture in mixtures]]
        self.rows[:, :n].copy_(torch.from_numpy(rows_Mn))
        self.host.rows, self.host.mixed = rows_Mn, False
        self.host.unwritten, self.host.holds = None, False
        if self.mixes:
            others_Mn = self._maps_ML[:, [mixture.neighbour for mixture in mixtures]]
            self.neighbours[:, :n].copy_(torch.from_numpy(others_Mn))
            self.weights[:n].copy_(torch.tensor([mixture.weight for mixture in mixtures]))
            self._keep([mixture for mixture in dict.fromkeys(mixtures) if mixture.weight])
            if not self.host.mixed:
                numbers = {mixture: -1 - k for k, mixture in enumerate(self.host.mixtures)}
                merged_n = np.array([numbers.get(mixture, 0) for mixture in mixtures])
                self.host.rows = np.where((merged_n < 0) & (rows_Mn != others_Mn), merged_n, rows_Mn)

    def _keep(self, mixtures: list[Mixture]) -> None:
        """Make room for the merged rows of a batch's mixtures, unless they are too many."""
        host = self.host
        host.mixed = len(mixtures) > _MIXTURES
        host.mixtures = [] if host.mixed else mixtures
        for mixture in host.mixtures:
            host.merged[mixture] = host.merged.pop(mixture, {})
        while len(host.merged) > _MIXTURES:
            host.merged.popitem(last=False)

    def kept(self) -> list[Tensor]:
        """The tensors that are held beside the tables: restored and merged rows."""
        return [tensor for rows in (self.host.restored, *self.host.merged.values()) for tensor in rows.values()]

    def set_index(self, levels_n: Tensor) -> None:
        """Use level levels_n[i] for sample i. Reads nothing on the host, so a compiled graph can contain this call."""
        self.rows[:, : levels_n.shape[0]] = self.maps[:, levels_n]
        self.host.rows, self.host.mixed, self.host.unwritten = None, False, None
        if self.mixes:
            self.weights.zero_()

    def spread(self, counts: Sequence[int]) -> None:
        """Let samples be regions until `collect`: the first counts[0] of image 0, and so on. In eager execution only."""
        host = self.host
        if host.regions is None:
            host.images = host.rows
        host.regions, rows_Mn = sum(counts), host.images
        if rows_Mn is not None and rows_Mn.shape[1] > 1:
            host.rows = rows_Mn[:, np.repeat(np.arange(len(counts)), counts)]
            self.reserve(host.regions)
            self.rows[:, : host.regions].copy_(torch.from_numpy(host.rows))

    def collect(self) -> None:
        """Let samples be images again."""
        host = self.host
        if host.regions is None:
            return
        host.rows, host.regions = host.images, None
        if host.rows is not None and host.rows.shape[1] > 1:
            self.rows[:, : host.rows.shape[1]].copy_(torch.from_numpy(host.rows))

    def forget(self) -> None:
        """Hide the levels from the host: modules then compute as they do in a compiled graph."""
        self.write()
        self.host.rows = None

    def samples(self) -> int | None:
        """The number of samples, or None if the host does not know it or all samples use one level."""
        if torch.compiler.is_compiling() or self.host.rows is None or self.host.rows.shape[1] == 1:
            return None
        return int(self.host.rows.shape[1])

    def row(self, map_index: int, level: int) -> int:
        """The row that a level uses."""
        return int(self._maps_ML[map_index, level])

    def on_host(self, map_index: int) -> list[int] | None:
        """Rows of the samples ([row] if all use the same), or None if the graph must not depend on them."""
        if torch.compiler.is_compiling() or self.host.rows is None or self.host.mixed:
            return None
        if self.host.lists is None:
            # without regions any row will do
            self.host.lists = [rows[:1] if len(set(rows)) == 1 else rows or [0] for rows in self.host.rows.tolist()]
        return self.host.lists[map_index]

    def gathered(self, n: int) -> Tensor | None:
        """What `vectors` gathers for the batch of n images, once for all tables; None if every table must gather by itself."""
        if self.vectors is None or torch.compiler.is_compiling() or self.host.regions is not None:
            return None
        if self.host.gathered is None:
            with torch.inference_mode(False):  # a pass with gradients may use it too
                self.host.gathered = self.vectors.gather(self.rows[:, :n])
        return self.host.gathered


class Table(nn.Module):
    """One tensor at every level: `values` [R, *shape], with the base's tensor in row 0."""

    values: Tensor

    def __init__(self, values: Tensor, map_index: int, selection: Selection) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.map_index = map_index
        self.selection = selection
        self.offset: int | None = None  # in `Vectors`, for tables that are part of them

    def __len__(self) -> int:
        """R."""
        return len(self.values)

    def rows(self) -> list[int] | None:
        """The row of each sample ([row] if all use the same), or None if the host does not know them."""
        return self.selection.on_host(self.map_index)

    def row(self, row: int) -> Tensor:
        """[*shape]: the tensor in one row, or what a mixture of this batch merges (`_Host.rows`)."""
        return self._own_row(row) if row >= 0 else self._merged(self.selection.host.mixtures[-1 - row])

    def _own_row(self, row: int) -> Tensor:
        return self.values[row]

    def _merged(self, mixture: Mixture) -> Tensor:
        merged = self.selection.host.merged[mixture]
        if self not in merged:
            own, other = (self.selection.row(self.map_index, level) for level in (mixture.level, mixture.neighbour))
            with torch.inference_mode(False):  # what is kept may later be part of a pass with gradients
                merged[self] = torch.lerp(self._own_row(own), self._own_row(other), mixture.weight)
        return merged[self]

    def take(self, rows_n: Tensor) -> Tensor:
        """[n, *shape]: the tensors in these rows."""
        return self.values[rows_n]

    def gather(self, n: int) -> Tensor:
        """[n, *shape]: the tensor of each sample."""
        selection = self.selection
        if self.offset is not None and (gathered := selection.gathered(n)) is not None:
            width = self.values.shape[1]
            return gathered[self.offset * n : (self.offset + width) * n].view(n, width)
        values = self.take(selection.rows[self.map_index, :n])
        if not selection.mixes:
            return values
        others = self.take(selection.neighbours[self.map_index, :n])
        weights = selection.weights[:n].view(n, *(1 for _ in values.shape[1:]))
        return torch.lerp(values, others, weights)


class Vectors:
    """The tables of vectors, such as those of batch normalisations, side by side in memory: one gather takes the rows of a batch
    from all of them, where a gather for each of a hundred tables would cost as much as a small convolution.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        """tables: of vectors stored as float32, on one device. Their values become views of one tensor."""
        self._flat = torch.cat([table.values.reshape(-1) for table in tables])
        sizes = [table.values.numel() for table in tables]
        for table, own in zip(tables, torch.split(self._flat, sizes), strict=True):
            table.values = own.view(table.values.shape)
        widths = [table.values.shape[1] for table in tables]
        offsets = np.cumsum([0, *widths[:-1]])
        for table, offset in zip(tables, offsets.tolist(), strict=True):
            table.offset = offset
        self._tables = [
            (start, width, table.map_index)
            for start, width, table in zip(np.cumsum([0, *sizes[:-1]]).tolist(), widths, tables, strict=True)
        ]
        self._layouts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def gather(self, rows_Mn: Tensor) -> Tensor:
        """One after the other for every table: its rows for the n samples [n, width]."""
        n = rows_Mn.shape[1]
        if (layout := self._layouts.get(n)) is None:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[n] = self._layout(n)
        first, width, place = layout
        return self._flat[torch.addcmul(first, width, rows_Mn.reshape(-1)[place])]

    def _layout(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each value that `gather` gives: its place in row 0 of its table, the width of a row, and its sample in rows_Mn."""
        first, width, place = [], [], []
        for start, channels, map_index in self._tables:
            first.append(np.tile(np.arange(start, start + channels), n))
            width.append(np.full(n * channels, channels))
            place.append(np.repeat(np.arange(map_index * n, (map_index + 1) * n), channels))
        made = [torch.from_numpy(np.concatenate(each)).to(self._flat.device) for each in (first, width, place)]
        return made[0], made[1], made[2]


class _StoredRows(nn.Module):
    """The k rows of a table that share a storage format; every part of the format is stacked to [k, *shape of the part]."""

    def __init__(self, name: str, storage_format: str, parts: Mapping[str, Tensor], base: Tensor) -> None:
        super().__init__()
        self.name, self.storage_format, self.shape = name, storage_format, base.shape
        for part, tensor in parts.items():
            self.register_buffer(f"stored_{part}", tensor)
        self._parts = tuple(parts)
        self.count = len(next(iter(parts.values())))
        # A plain sum gives the right bits unless the base has a -0.0 or a variance would fall below 0, which is rare.
        differences = (self._differences(place) for place in range(self.count))
        self.is_sum = all(same_bits(base + each, added(name, base, each)) for each in differences)

    def _differences(self, at: int | Tensor) -> Tensor:
        return difference_of(self.storage_format, {part: getattr(self, f"stored_{part}")[at] for part in self._parts}, self.shape)

    def restore(self, base: Tensor, at: int | Tensor) -> Tensor:
        """Row `at` [*shape], or rows at [n] as [n, *shape], with the bits of `storage_formats.decode`.

        `base` must broadcast to that shape.
        """
        difference = self._differences(at)
        return base + difference if self.is_sum else added(self.name, base, difference)


class CompressedTable(Table):
    """A table with stored rows: the rows of `values` come first, then those of each storage format in turn."""

    def __init__(
        self, values: Tensor, stored_variants: Mapping[str, Mapping[str, Tensor]], name: str, map_index: int, selection: Selection
    ) -> None:
        """stored_variants: by storage format, the stacked parts of its rows. name: of the tensor in the base's state dict."""
        super().__init__(values, map_index, selection)
        self.stored_variants = nn.ModuleList(
            _StoredRows(name, storage_format, parts, values[0]) for storage_format, parts in stored_variants.items()
        )

    def __len__(self) -> int:
        return len(self.values) + sum(rows.count for rows in self._groups())

    def _groups(self) -> Iterator[_StoredRows]:
        return iter(self.stored_variants)  # type: ignore[arg-type]

    def _own_row(self, row: int) -> Tensor:
        values, host = self.values, self.selection.host
        if row < len(values):
            return values[row]
        if not host.holds:
            return self._restored(row)
        if self not in host.restored:
            with torch.inference_mode(False):  # what is kept may later be part of a pass with gradients
                host.restored[self] = self._restored(row)
        return host.restored[self]

    def _restored(self, row: int) -> Tensor:
        row -= len(self.values)
        for rows in self._groups():
            if row < rows.count:
                return rows.restore(self.values[0], row)
            row -= rows.count
        raise IndexError(f"the table has {len(self)} rows, row {len(self) + row} was asked for")

    def take(self, rows_n: Tensor) -> Tensor:
        base, start = self.values[:1], len(self.values)
        taken = self.values[rows_n.clamp(max=start - 1)]
        for rows in self._groups():
            here = rows_n >= start  # rows of later formats are overwritten by these
            restored = rows.restore(base, (rows_n - start).clamp(0, rows.count - 1))
            taken = torch.where(here.view(-1, *(1 for _ in base.shape[1:])), restored, taken)
            start += rows.count
        return taken
