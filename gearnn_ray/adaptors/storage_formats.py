"""Storage formats of an adaptor's tensors: the tensor itself, or a smaller difference from the base's tensor.

    format      stored under                    the difference
    float32     name                            none: the tensor itself, in its own type
    bfloat16    name..bfloat16                  rounded to bfloat16
    int8        name..int8, name..scale         int8 · scale, with one scale per output channel

The channels are the first dimension; a tensor with fewer than two dimensions is one channel. A restored tensor is base +
difference in float32. Single elementwise IEEE operations (no matrix product, no fused multiply-add) give every machine the same
bits. Where the difference is 0, the bits are those of the base.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

# Between a tensor's name and its part. No name contains it: torch forbids empty names and dots in names of modules and tensors.
_SEPARATOR = ".."
_PARTS = {"float32": ("",), "bfloat16": ("bfloat16",), "int8": ("int8", "scale")}
_FORMATS = {parts: storage_format for storage_format, parts in _PARTS.items()}


def check_format(name: str) -> str:
    """Return the name of a storage format: float32, bfloat16 or int8. Raises ValueError for any other name."""
    if name not in _PARTS:
        raise ValueError(f"{name!r} is not a storage format: expected float32, bfloat16 or int8")
    return name


def applies(storage_format: str, shape: Sequence[int]) -> bool:
    """Whether the format is float32 or makes a tensor of this shape smaller. Raises ValueError for an unknown format."""
    return storage_format == "float32" or stored_bytes(storage_format, [shape]) < stored_bytes("float32", [shape])


def stored_bytes(storage_format: str, shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of stored float32 tensors of these shapes, without names and header. Raises ValueError for an unknown format."""
    return sum(
        math.prod(size) * dtype.itemsize
        for shape in shapes
        for size, dtype in _layout(check_format(storage_format), shape, torch.float32).values()
    )


def encode(base: Mapping[str, Tensor], changed: Mapping[str, Tensor], storage_formats: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors to store for `changed`, each in its format (default float32). Raises ValueError for a format that does not
    apply, for a tensor that does not fit the base, and where a difference or a restored tensor is not finite.
    """
    if foreign := sorted(storage_formats.keys() - changed.keys()):
        raise ValueError(f"{foreign[0]!r} has a storage format but no change: give formats for changed tensors only")
    stored: dict[str, Tensor] = {}
    for name, tensor in changed.items():
        storage_format = check_format(storage_formats.get(name, "float32"))
        before, after = _base_tensor(base, name), tensor.detach()
        _check_fits(name, after, tuple(before.shape), before.dtype)
        if storage_format == "float32":
            stored[name] = after
            continue
        if not applies(storage_format, before.shape):
            raise ValueError(f"{storage_format} does not apply to a tensor {list(before.shape)}: store it as float32")
        difference = (after.double() - before.double()).float()
        parts = _split(storage_format, _finite(f"the change of {name!r}", difference))
        _restore(name, before, storage_format, parts)
        stored |= {_key(name, part): value for part, value in parts.items()}
    return stored


def decode(base: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The restored tensors of what `encode` returned. A restored `running_var` is at least 0, because rounding could make it
    negative and its root NaN. Raises ValueError for a tensor that does not fit the base, is incomplete, or is not finite.
    """
    state: dict[str, Tensor] = {}
    for name, (storage_format, parts) in parts_of(stored).items():
        before = _base_tensor(base, name)
        for part, (shape, dtype) in _layout(storage_format, before.shape, before.dtype).items():
            _check_fits(_key(name, part), parts[part], shape, dtype)
        state[name] = parts[""] if storage_format == "float32" else _restore(name, before, storage_format, parts)
    return state


def restored(base: Mapping[str, Tensor], changed: Mapping[str, Tensor], storage_formats: Mapping[str, str]) -> dict[str, Tensor]:
    """`changed` after being stored in these formats and restored. Raises ValueError as `encode` does."""
    return decode(base, encode(base, changed, storage_formats))


def difference_of(storage_format: str, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The difference [*shape] in float32 from its parts in any other format. Parts may be stacked in leading dimensions."""
    if storage_format == "bfloat16":
        return parts["bfloat16"].float()
    steps, scale = parts["int8"], parts["scale"]
    return (steps * scale.reshape(*scale.shape, *(1,) * (len(shape) - 1))).reshape(steps.shape)


def added(name: str, before: Tensor, difference: Tensor) -> Tensor:
    """The tensor `name` [*shape] of the base plus differences [..., *shape], in the base's type. It may not be finite."""
    after = before + difference
    if name.rpartition(".")[2] == "running_var":
        after = after.clamp(min=0)
    # -0.0 + 0.0 would be 0.0: without a change, this bit stays too
    return torch.where(difference == 0, before, after.to(before.dtype))


def parts_of(stored: Mapping[str, Tensor]) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Storage format and parts of every tensor, by its name in the base; float32 has one part, "". Raises as `formats_of`."""
    return {
        name: (storage_format, {part: stored[_key(name, part)] for part in _PARTS[storage_format]})
        for name, storage_format in formats_of(stored).items()
    }


def formats_of(stored: Mapping[str, Tensor]) -> dict[str, str]:
    """The storage format of every tensor, by its name in the base. Raises ValueError for parts that form no format."""
    found: dict[str, tuple[str, ...]] = {}
    for key in sorted(stored):
        name, _, part = key.rpartition(_SEPARATOR)
        if key != _key(name, part):
            name, part = key, ""
        found[name] = (*found.get(name, ()), part)
    for name, parts in found.items():
        if parts not in _FORMATS:
            raise ValueError(f"{name!r} is stored as {', '.join(map(repr, parts))}: expected the parts of one storage format")
    return {name: _FORMATS[parts] for name, parts in found.items()}


def _key(name: str, part: str) -> str:
    return f"{name}{_SEPARATOR}{part}" if part else name


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """m and rest: the rows are output channels. A tensor with fewer than two dimensions has one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _layout(storage_format: str, shape: Sequence[int], own: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every stored part of a tensor with this shape and its `own` type."""
    if storage_format == "float32":
        return {"": (tuple(shape), own)}
    if storage_format == "bfloat16":
        return {"bfloat16": (tuple(shape), torch.bfloat16)}
    return {"int8": (tuple(shape), torch.int8), "scale": ((_matrix(shape)[0],), torch.float32)}


def _split(storage_format: str, difference: Tensor) -> dict[str, Tensor]:
    if storage_format == "bfloat16":
        return {"bfloat16": difference.bfloat16()}
    rows = difference.double().reshape(_matrix(difference.shape))
    scale = (rows.abs().amax(1) / 127).float()
    steps = (rows / scale.double()[:, None]).nan_to_num(0, 0, 0)  # a scale of 0 restores the base
    return {"int8": steps.round().clamp(-127, 127).to(torch.int8).reshape(difference.shape), "scale": scale}


def _restore(name: str, before: Tensor, storage_format: str, parts: Mapping[str, Tensor]) -> Tensor:
    """base + difference, in the base's type. Raises ValueError for an integer type and for a sum that is not finite."""
    if not before.is_floating_point():
        raise ValueError(f"{name!r} is of {before.dtype}: expected a floating-point type for {storage_format}")
    after = added(name, before, difference_of(storage_format, parts, before.shape))
    return _finite(f"{name!r}, restored from {storage_format},", after)


def _base_tensor(base: Mapping[str, Tensor], name: str) -> Tensor:
    if _SEPARATOR in name:
        raise ValueError(f"{name!r} holds {_SEPARATOR!r}, which separates the parts of stored tensors: rename it")
    if name not in base:
        raise ValueError(f"{name!r} is changed but not in the base: give the base that it was made from")
    return base[name].detach()


def _check_fits(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
        raise ValueError(f"{name!r} is {list(tensor.shape)} of {tensor.dtype}: expected {list(shape)} of {dtype}")


def _finite(what: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinity: expected finite numbers")
    return tensor
