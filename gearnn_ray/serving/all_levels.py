"""The network of a release as one graph over images and their levels, for other runtimes (`export.py`).

What is adapted row by row stays so: normalisations and linear layers gather the rows of a batch from their tables. A convolution
with weights of its own for each image has no operation in ONNX; it, and every module without an adaptive form, runs once for each
of its distinct rows over the whole batch, and each image keeps the result of its own. So the graph depends neither on the number
of images nor on their levels.

Legend: n images, L levels, M maps (distinct assignments of rows to levels).
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from gearnn_ray.core.errors import UserError
from gearnn_ray.serving.assembly import assemble
from gearnn_ray.serving.batch import Selection, Table
from gearnn_ray.serving.modules import Adaptive, AdaptiveBatchNorm, AdaptiveGroupNorm, AdaptiveLayerNorm, AdaptiveLinear
from gearnn_ray.serving.regions import has_regions
from gearnn_ray.store.releases import Release

_GATHERING = (AdaptiveBatchNorm, AdaptiveGroupNorm, AdaptiveLayerNorm, AdaptiveLinear)


class AllLevels(nn.Module):
    """From images [n, 3, H, W] as the network takes them, and for each the position of its level, int64 [n], to its output."""

    maps: Tensor

    def __init__(self, release: Release, levels: tuple[str, ...], trust: Collection[str]) -> None:
        """levels: the first is the base. Raises UserError as `assemble` does, and for a network that sees regions of images."""
        super().__init__()
        network, selection = assemble(release, levels, torch.device("cpu"), False, trust)
        if has_regions(network):
            raise UserError(
                f"the network of {release.name} sees regions of its images, whose number depends on the image: export one level"
            )
        self.register_buffer("maps", selection.maps.clone())
        self._rows = _Rows(selection)
        self.network = _in_a_graph(network, self._rows)

    def forward(self, images: Tensor, level: Tensor) -> Any:
        self._rows.rows, self._rows.levels = self.maps[:, level], level
        return self.network(images)


class _Rows:
    """Stands in for a `Selection` while a graph is made: the rows of each image are tensors of the graph, unknown to the host."""

    mixes = False
    rows: Tensor
    levels: Tensor

    def __init__(self, selection: Selection) -> None:
        self.host = selection.host
        self.row = selection.row
        self.count = selection.maps.shape[1]
        selection.hold(None)

    def on_host(self, map_index: int) -> None:
        """The graph must not depend on the rows."""

    def gathered(self, n: int) -> None:
        """Every table gathers by itself."""

    def samples(self) -> None:
        """Unknown."""


class _EveryRow(nn.Module):
    """A module that runs once for each of its distinct rows; each image keeps the result of its own."""

    variant_of: Tensor

    def __init__(self, adaptive: Adaptive, rows: _Rows) -> None:
        super().__init__()
        self.module = adaptive.module
        self._rows = rows
        found = {leaf: adaptive.get_submodule(f"table_{leaf.replace('.', '__')}") for leaf in adaptive._leaves}
        self._tables = {leaf: table for leaf, table in found.items() if isinstance(table, Table)}
        self.held = nn.ModuleList(self._tables.values())
        combinations = [tuple(rows.row(table.map_index, level) for table in self._tables.values()) for level in range(rows.count)]
        self._variants = list(dict.fromkeys(combinations))
        self.register_buffer("variant_of", torch.tensor([self._variants.index(each) for each in combinations]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        results = []
        for variant in self._variants:
            state = {name: table.row(row) for (name, table), row in zip(self._tables.items(), variant, strict=True)}
            results.append(functional_call(self.module, state, args, kwargs))
        chosen_n = self.variant_of[self._rows.levels]

        def pick(*of_each: Any) -> Any:
            found = of_each[0]
            if not isinstance(found, Tensor):
                return found
            for number, other in enumerate(of_each[1:], 1):
                found = torch.where((chosen_n == number).view(-1, *(1 for _ in other.shape[1:])), other, found)
            return found

        return pytree.tree_map(pick, results[0], *results[1:])


def _in_a_graph(network: nn.Module, rows: _Rows) -> nn.Module:
    """The adaptive network with its modules as a graph needs them. It can no longer run outside one."""
    if isinstance(network, Adaptive) and not isinstance(network, _GATHERING):
        network = _EveryRow(network, rows)
    for module in network.modules():
        if isinstance(module, Table):
            del module.selection
            module.selection = rows  # type: ignore[assignment]
        elif isinstance(module, _GATHERING):
            del module._selection
            module._selection = rows  # type: ignore[assignment]
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Adaptive) and not isinstance(child, _GATHERING):
                setattr(module, name, _EveryRow(child, rows))
    return network
