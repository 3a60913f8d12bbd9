"""Convolutions with one weight per sample: several exact methods, and a measurement that finds the fastest for a shape.

Knows nothing about levels: the weights are one tensor per sample, or rows of a table.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearnn_ray.serving.batch import Table

_REPEATS = 2
_HOPELESS = 1.5  # a method this many times slower than the fastest in its first run is not measured again

Conv = nn.modules.conv._ConvNd
_FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


def is_supported(module: nn.Module) -> bool:
    """Whether this is one of torch's convolutions, and its forward pass is not overridden."""
    own = type(module)
    return any(
        own.forward is kind.forward
        and getattr(own, "_conv_forward", None) is getattr(kind, "_conv_forward", None)  # as in weight standardisation
        for kind in _FUNCTIONS
    )


def padded_same(x: Tensor, conv: Any) -> Tensor:
    """x [n, C, H, W] with TensorFlow's SAME padding for `conv`: as many outputs as input / stride, rounded up, where of an odd
    number of pixels one more is at the bottom and the right.
    """
    pads: list[int] = []
    for side, kernel, stride, step in zip(x.shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True):
        missing = max((-(-side // stride) - 1) * stride + (kernel - 1) * step + 1 - side, 0)
        pads = [missing // 2, missing - missing // 2, *pads]
    return F.pad(x, pads) if any(pads) else x


def plain(x: Tensor, conv: Conv, weight: Tensor, bias: Tensor | None, samples: int = 1) -> Tensor:
    """Apply `conv` with other weights. samples: number of independent samples side by side in the channels."""
    function = next(f for kind, f in _FUNCTIONS.items() if isinstance(conv, kind))
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = (0,) * len(conv.kernel_size)
    groups = conv.groups * samples
    if conv.transposed:
        return function(x, weight, bias, conv.stride, padding, conv.output_padding, groups, conv.dilation)
    return function(x, weight, bias, conv.stride, padding, conv.dilation, groups)


def grouped(x: Tensor, conv: Conv, weight: Tensor) -> Tensor:
    """One convolution over n × C channels, with one group (or `conv.groups` groups) per sample."""
    n = x.shape[0]
    y = plain(x.reshape(1, -1, *x.shape[2:]), conv, weight.flatten(0, 1), None, samples=n)
    return y.reshape(n, -1, *y.shape[2:])


def one_by_one(x: Tensor, conv: Conv, weight: Tensor) -> Tensor:
    """A batched matrix product over the pixels, for 1 × 1 kernels."""
    for d, step in enumerate(conv.stride):
        x = x[(slice(None),) * (2 + d) + (slice(None, None, step),)]
    y = torch.bmm(weight.flatten(2), x.flatten(2))
    return y.reshape(*y.shape[:2], *x.shape[2:])


def sample_by_sample(x: Tensor, conv: Conv, weight: Tensor) -> Tensor:
    """n convolutions of one sample each."""
    return torch.cat([plain(x[i : i + 1], conv, weight[i], None) for i in range(x.shape[0])])


METHODS = {f.__name__: f for f in (grouped, one_by_one, sample_by_sample)}
"""Methods whose graph does not depend on the levels, by name."""
BY_ROW = "by_row"
"""Name of the method `by_row`, which needs the rows on the host and therefore runs only in eager execution."""


def by_row(x: Tensor, conv: Conv, weights: Table, rows: Sequence[int]) -> Tensor:
    """One convolution per distinct row, over the samples that use it. rows: one per sample."""
    samples: dict[int, list[int]] = {}
    for sample, row in enumerate(rows):
        samples.setdefault(row, []).append(sample)
    parts = [plain(x[members], conv, weights.row(row), None) for row, members in samples.items()]
    order = [member for members in samples.values() for member in members]
    y = parts[0].new_empty(x.shape[0], *parts[0].shape[1:])
    start = 0
    for part in parts:
        y[order[start : start + len(part)]] = part
        start += len(part)
    return y


def methods_for(conv: Conv) -> tuple[str, ...]:
    """The names of the `METHODS` that are exact for this convolution."""
    names = ["grouped", "sample_by_sample"]
    one_pixel = all(k == 1 for k in conv.kernel_size) and not any(conv.padding) and not isinstance(conv.padding, str)
    if one_pixel and not conv.transposed and conv.groups == 1:
        names.append("one_by_one")
    return tuple(names)


def fastest(conv: Conv, weights: Table, shape: torch.Size) -> tuple[str, str]:
    """The fastest method in eager execution, and the fastest in `METHODS` for a compiled graph.

    Measured on random input [n, C, *size] = `shape`, with the rows assigned to the samples in turn, on the device of the weights.
    """
    device = conv.weight.device
    x = torch.randn(shape, device=device)
    rows = [i % len(weights) for i in range(shape[0])]
    index = torch.tensor(rows, device=device)

    def run(name: str, x: Tensor) -> Tensor:
        return by_row(x, conv, weights, rows) if name == BY_ROW else METHODS[name](x, conv, weights.take(index))

    # A compiler uses channels-last tensors, so a method that needs another layout must include the conversion.
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    y = x.contiguous(memory_format=last)
    names = methods_for(conv)
    eager = _fastest({name: lambda name=name: run(name, x) for name in (*names, BY_ROW)}, x.device)  # type: ignore[misc]
    compiled = _fastest(
        {name: lambda name=name: run(name, y).contiguous(memory_format=last) for name in names},  # type: ignore[misc]
        x.device,
    )
    return eager, compiled


def _fastest(runs: Mapping[str, Callable[[], Tensor]], device: torch.device) -> str:
    with torch.no_grad():
        for run in runs.values():  # the first run chooses kernels and fills caches
            run()
        best = {name: _time(run, device) for name, run in runs.items()}
        near = [name for name in runs if best[name] < _HOPELESS * min(best.values())]
        for name in near * _REPEATS:
            best[name] = min(best[name], _time(runs[name], device))
    return min(best, key=best.__getitem__)


def _time(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
