"""Modules whose tensors differ between the samples of a batch: convolutions, normalisations, linear layers, and any other.

An adaptive module replaces a module that some level changes, and computes for every sample what that module computes with the
sample's own tensors. A module without an adaptive form of its own runs once per level (`PerLevel`). If all samples use one
level, torch's plain kernels run. Knows nothing about releases or level names.

Legend: n samples, C channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from gearnn_ray.core.errors import UserError
from gearnn_ray.serving import convolution
from gearnn_ray.serving.batch import Table


class NeedsParentError(Exception):
    """The module at `path` cannot be adapted alone, only together with the module that contains it."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Adaptive(nn.Module):
    """A module, and a table for each of its tensors that some level changes.

    tables: by state-dict name within the module. The module keeps its settings and the tensors that no level changes.
    """

    def __init__(self, module: nn.Module, tables: Mapping[str, Table], path: str) -> None:
        super().__init__()
        self.module = module
        self.path = path
        self._leaves = tuple(tables)
        self._selection = next(iter(tables.values())).selection
        for leaf, table in tables.items():
            self.add_module(f"table_{leaf.replace('.', '__')}", table)
        self.check_batch: int | None = None  # in the dry run: the size that the first dimension must have

    def table(self, leaf: str) -> Table | None:
        """The table of the tensor `leaf`, or None if no level changes it."""
        return self._modules.get(f"table_{leaf}")  # type: ignore[return-value]

    def values(self, leaf: str, n: int) -> tuple[Tensor | None, bool]:
        """The tensor `leaf` for n samples, and whether it has one value per sample ([n, *shape]) or one for all.

        It has one for all if no level changes it, or if the host knows that all samples use the same row.
        """
        table = self.table(leaf)
        if table is None:
            return getattr(self.module, leaf, None), False
        if (rows := table.rows()) is not None and len(rows) == 1:
            return table.row(rows[0]), False
        return table.gather(n), True

    def check(self, x: Any) -> None:
        """Raise NeedsParentError in the dry run, and UserError later, unless the first dimension is the batch."""
        if self.check_batch is not None:
            regions = self._selection.host.regions
            if not isinstance(x, Tensor) or x.shape[:1] != (self.check_batch if regions is None else regions,):
                raise NeedsParentError(self.path)
            return
        samples = self._selection.samples()
        if samples is not None and x.shape[0] != samples:
            raise UserError(
                f"the module {self.path} got {x.shape[0]} rows for {samples} images, because the network folds images of "
                "this size into its batch: give all images of a call one level, or the size of the training images"
            )

    def __getattr__(self, name: str) -> Any:
        """A setting of the module (`stride`, `in_features`, …).

        Raises NeedsParentError for its weights and methods: code that uses them directly does not know about levels.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = super().__getattr__("module")
            value = getattr(module, name)
            computes = isinstance(value, nn.Module) or getattr(value, "__self__", None) is module
            if computes or name in self.__dict__.get("_leaves", ()):
                raise NeedsParentError(self.path) from None
            return value


def _over_pixels(values: Tensor, x: Tensor) -> Tensor:
    """[n, C] or [C] against x [n, C, *size]."""
    return values[(..., *(None for _ in x.shape[2:]))]


class AdaptiveBatchNorm(Adaptive):
    """Batch normalisation in evaluation mode, and its frozen variants: a scale and a shift per channel and sample."""

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        n = x.shape[0]
        found = [self.values(leaf, n) for leaf in ("running_mean", "running_var", "weight", "bias")]
        eps: float = self.module.eps  # type: ignore[assignment]
        if not any(per_sample for _, per_sample in found):
            mean, var, weight, bias = (tensor for tensor, _ in found)
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        rows = [t if t is None or each else t.expand(n, *t.shape) for t, each in found]
        mean, var, weight, bias = rows
        assert mean is not None
        assert var is not None
        if not torch.compiler.is_compiling() and x.is_contiguous():
            # Only a compiler fuses the chain below. Here the channels of all samples become those of one image, so that
            # one call of torch's kernel computes them.
            mean, var, weight, bias = (None if t is None else t.reshape(-1) for t in rows)
            side_by_side = x.view(1, -1, *x.shape[2:])
            return F.batch_norm(side_by_side, mean, var, weight, bias, False, 0.0, eps).view(x.shape)
        scale = torch.rsqrt(var + eps)
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        return x * _over_pixels(scale, x) + _over_pixels(shift, x)


class AdaptiveConv(Adaptive):
    """A convolution of any dimension, transposed or not. `convolution.METHODS` has its methods."""

    eager_method = compiled_method = "grouped"
    seen: torch.Size | None = None  # the input's shape in the dry run

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.check_batch is not None:
            self.seen = x.shape
        n = x.shape[0]
        conv: Any = self.module
        bias, bias_each = self.values("bias", n)
        table = self.table("weight")
        rows = None if table is None else table.rows()
        if table is None or (rows is not None and len(rows) == 1):
            weight = conv.weight if table is None or rows is None else table.row(rows[0])
            y = convolution.plain(x, conv, weight, None if bias_each else bias)
            return y if not bias_each or bias is None else y + _over_pixels(bias, y)
        if rows is not None and (self.eager_method == convolution.BY_ROW or self._selection.host.regions is not None):
            # of regions there are hundreds: a weight for each would take gigabytes
            y = convolution.by_row(x, conv, table, rows)
        else:
            name = self.compiled_method if rows is None else self.eager_method
            y = convolution.METHODS[name](x, conv, table.gather(n))
        return y if bias is None else y + _over_pixels(bias, y)


class AdaptiveLinear(Adaptive):
    """A linear layer on [n, …, features]."""

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        n = x.shape[0]
        table = self.table("weight")
        rows = None if table is None or self._selection.host.regions is None else table.rows()
        bias, bias_each = self.values("bias", n)
        if table is not None and rows is not None and len(rows) > 1:
            # of regions there are hundreds: a weight for each would take gigabytes
            y = by_row(x, table, rows)
            return y if bias is None else y + bias
        weight, weight_each = self.values("weight", n)
        assert weight is not None
        if not weight_each and not bias_each:
            return F.linear(x, weight, bias)
        if weight_each:
            y = torch.bmm(x.reshape(n, -1, x.shape[-1]), weight.mT).reshape(*x.shape[:-1], weight.shape[1])
        else:
            y = F.linear(x, weight)
        if bias is None:
            return y
        return y + (bias.view(n, *(1 for _ in y.shape[2:]), -1) if bias_each and y.dim() > 2 else bias)


def by_row(x: Tensor, weights: Table, rows: Sequence[int]) -> Tensor:
    """A linear layer [n, features], once per distinct row, over the samples that use it. rows: one per sample."""
    of_each = torch.tensor(rows, device=x.device)
    y = x.new_empty(len(x), weights.row(rows[0]).shape[0])
    for row in dict.fromkeys(rows):
        samples = (of_each == row).nonzero()[:, 0]
        y[samples] = F.linear(x[samples], weights.row(row))
    return y


class AdaptiveLayerNorm(Adaptive):
    """Layer normalisation on [n, …, *normalized_shape]."""

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        n = x.shape[0]
        shape, eps = self.module.normalized_shape, self.module.eps
        (weight, weight_each), (bias, bias_each) = (self.values(leaf, n) for leaf in ("weight", "bias"))
        if not weight_each and not bias_each:
            return F.layer_norm(x, shape, weight, bias, eps)  # type: ignore[arg-type]
        if x.dim() == len(shape):  # type: ignore[arg-type]
            raise NeedsParentError(self.path)  # the input has no dimension for the batch
        y = F.layer_norm(x, shape, None, None, eps)  # type: ignore[arg-type]
        between = (1,) * (x.dim() - 1 - len(shape))  # type: ignore[arg-type]
        if weight is not None:
            y = y * (weight.view(n, *between, *weight.shape[1:]) if weight_each else weight)
        if bias is not None:
            y = y + (bias.view(n, *between, *bias.shape[1:]) if bias_each else bias)
        return y


class AdaptiveGroupNorm(Adaptive):
    """Group normalisation on [n, C, *size]."""

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        n = x.shape[0]
        groups, eps = self.module.num_groups, self.module.eps
        (weight, weight_each), (bias, bias_each) = (self.values(leaf, n) for leaf in ("weight", "bias"))
        if not weight_each and not bias_each:
            return F.group_norm(x, groups, weight, bias, eps)  # type: ignore[arg-type]
        y = F.group_norm(x, groups, None, None, eps)  # type: ignore[arg-type]
        y = y if weight is None else y * _over_pixels(weight, x)
        return y if bias is None else y + _over_pixels(bias, x)


class PerLevel(Adaptive):
    """Any other module: it runs once per level, over the samples that use the level.

    It runs once per sample if the graph must not depend on the levels. Each tensor that it takes or returns must either have the
    batch as its first dimension, or be the same for all samples; or it returns a list with a dict for each sample, as detectors
    do that find other numbers of objects in each image.
    """

    _batched: tuple[int, ...] = ()  # positions of the inputs whose first dimension was the batch in the dry run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        first = next((leaf for leaf in flat if isinstance(leaf, Tensor)), None)
        self.check(first)
        assert first is not None
        n = first.shape[0]
        if self.check_batch is not None:
            self._batched = tuple(i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.shape[:1] == (n,))
        groups = self._groups(n)
        outputs = []
        for samples, state in groups:
            one = len(groups) == 1
            part = [leaf if one or i not in self._batched else leaf[samples] for i, leaf in enumerate(flat)]
            part_args, part_kwargs = pytree.tree_unflatten(part, spec)
            outputs.append(functional_call(self.module, state, part_args, part_kwargs))
        if len(groups) == 1:
            return outputs[0]
        sizes = [len(samples) for samples, _ in groups]
        order = [sample for samples, _ in groups for sample in samples]
        if all(_is_list_of_samples(output, size) for output, size in zip(outputs, sizes, strict=True)):
            in_place = dict(zip(order, (sample for output in outputs for sample in output), strict=True))
            return [in_place[i] for i in range(n)]
        places = torch.argsort(torch.tensor(order, device=first.device))

        def join(*parts: Any) -> Any:
            if parts[0] is None or isinstance(parts[0], (bool, int, float, str)):
                return parts[0]
            if not all(isinstance(p, Tensor) and p.shape[:1] in ((1,), (k,)) for p, k in zip(parts, sizes, strict=True)):
                raise NeedsParentError(self.path)  # the output does not have one row per sample
            # a part with one row is the same for all samples of its level
            return torch.cat([p.expand(k, *p.shape[1:]) for p, k in zip(parts, sizes, strict=True)])[places]

        return pytree.tree_map(join, outputs[0], *outputs[1:])

    def _groups(self, n: int) -> list[tuple[list[int], dict[str, Tensor]]]:
        """Samples that share all tensors, and these tensors. Tied tensors get the same object."""
        tables = {leaf: self._table_of(leaf) for leaf in self._leaves}
        rows_of = {table: table.rows() for table in tables.values()}
        if any(rows is None for rows in rows_of.values()):
            each = {table: table.gather(n).unbind() for table in rows_of}
            return [([i], {leaf: each[table][i] for leaf, table in tables.items()}) for i in range(n)]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in range(n):
            rows = tuple(r[i] if len(r) > 1 else r[0] for r in rows_of.values() if r is not None)
            groups.setdefault(rows, []).append(i)
        made = []
        for rows, samples in groups.items():
            picked = {table: table.row(row) for table, row in zip(rows_of, rows, strict=True)}
            made.append((samples, {leaf: picked[table] for leaf, table in tables.items()}))
        return made

    def _table_of(self, leaf: str) -> Table:
        table = self._modules[f"table_{leaf.replace('.', '__')}"]
        assert isinstance(table, Table)
        return table


def _is_list_of_samples(output: Any, n: int) -> bool:
    """Whether this is a list of n dicts. (A list of tensors is rather one of feature maps, with the batch inside each.)"""
    return isinstance(output, list) and len(output) == n and all(isinstance(each, dict) for each in output)
