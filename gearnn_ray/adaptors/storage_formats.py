"""How a tensor's change is stored: as the tensor itself, or as a smaller difference to the base's.

    code        stored under                    the difference
    float32     name                            (the tensor itself, whatever its type)
    bfloat16    name..bfloat16                  as it is, rounded
    int8        name..int8, name..scale         int8 · scale, with one scale per output channel

The difference is seen as a matrix [m, rest] of the first dimension and all others; a tensor of fewer than two dimensions
is one row. Restored is base + difference in float32, by single elementwise IEEE operations: neither a matrix product, whose
order of sums depends on the machine, nor a fused multiply-add, so that everyone gets the same bits. Where the difference is 0
these are the base's. Knows nothing of levels, training or stores.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

# Between a tensor's name and its part. No name has it: torch lets no module or tensor have an empty name or a dot in it.
_SEPARATOR = ".."
_PARTS = {("",): "float32", ("bfloat16",): "bfloat16", ("int8", "scale"): "int8"}
_NAMES = {storage_format: parts for parts, storage_format in _PARTS.items()}


def check_format(name: str) -> str:
    """The name, if it is one of a code: float32, bfloat16 or int8. Raises ValueError."""
    if name not in _NAMES:
        raise ValueError(f"{name!r} is not a code: expected float32, bfloat16 or int8")
    return name


def applies(storage_format: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is smaller under a code than as float32, which itself always applies.

    Raises ValueError for what is no code.
    """
    return storage_format == "float32" or stored_bytes(storage_format, [shape]) < stored_bytes("float32", [shape])


def stored_bytes(storage_format: str, shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of what is stored of float32 tensors of these shapes, without names and file header. Raises ValueError."""
    return sum(
        math.prod(size) * dtype.itemsize
        for shape in shapes
        for size, dtype in _layout(check_format(storage_format), shape, torch.float32).values()
    )


def encode(
    base: Mapping[str, Tensor], changed: Mapping[str, Tensor], storage_formats: Mapping[str, str]
) -> dict[str, Tensor]:
    """What is stored of `changed`, tensors of the base's names, shapes and types, each under its code (default float32).

    Under float32 a tensor is stored as it is. Raises ValueError for a code that does not apply, for a tensor that does not fit
    the base, and where a difference or what comes back of it is not finite.
    """
    if foreign := sorted(storage_formats.keys() - changed.keys()):
        raise ValueError(f"{foreign[0]!r} has a code but no change: give codes for changed tensors only")
    stored: dict[str, Tensor] = {}
    for name, tensor in changed.items():
        storage_format = check_format(storage_formats.get(name, "float32"))
        before, after = _tensor(base, name), tensor.detach()
        _check_fits(name, after, tuple(before.shape), before.dtype)
        if storage_format == "float32":
            stored[name] = after
            continue
        _check_applies(storage_format, before.shape)
        difference = (after.double() - before.double()).float()
        parts = _parts(storage_format, _finite(f"the change of {name!r}", difference))
        _restore(name, before, storage_format, parts)
        stored |= {_key(name, part): each for part, each in parts.items()}
    return stored


def decode(base: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The restored tensors of what `encode` made: names, shapes and types are the base's.

    A restored `running_var` is at least 0: rounding could take a small variance below, and its root would be NaN. Raises
    ValueError for anything that does not fit the base, is incomplete or not finite.
    """
    state: dict[str, Tensor] = {}
    for name, (storage_format, parts) in parts_of(stored).items():
        before = _tensor(base, name)
        for part, (shape, dtype) in _layout(storage_format, before.shape, before.dtype).items():
            _check_fits(_key(name, part), parts[part], shape, dtype)
        state[name] = parts[""] if storage_format == "float32" else _restore(name, before, storage_format, parts)
    return state


def restored(
    base: Mapping[str, Tensor], changed: Mapping[str, Tensor], storage_formats: Mapping[str, str]
) -> dict[str, Tensor]:
    """What comes back of `changed` after it was stored under `codes`. Raises ValueError as `encode` does."""
    return decode(base, encode(base, changed, storage_formats))


def difference_of(storage_format: str, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The difference [*shape] that parts (as in the table above, of any code but float32) stand for, in float32.

    Parts may be those of many tensors [*shape], side by side in leading dimensions: so are the differences then.
    """
    if storage_format == "bfloat16":
        return parts["bfloat16"].float()
    steps, scale = parts["int8"], parts["scale"]
    return (steps * scale.reshape(*scale.shape, *(1,) * (len(shape) - 1))).reshape(steps.shape)


def added(name: str, before: Tensor, difference: Tensor) -> Tensor:
    """What the tensor `name` [*shape] of the base becomes by differences [..., *shape], in its type; finite or not."""
    after = before + difference
    if name.rpartition(".")[2] == "running_var":
        after = after.clamp(min=0)
    # -0.0 + 0.0 would be 0.0: no change keeps even that bit
    return torch.where(difference == 0, before, after.to(before.dtype))


def parts_of(stored: Mapping[str, Tensor]) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """The code and the parts of every tensor, by its name in the base; "" is float32's only part. Raises as `codes_of`."""
    return {
        name: (storage_format, {part: stored[_key(name, part)] for part in _NAMES[storage_format]})
        for name, storage_format in formats_of(stored).items()
    }


def formats_of(stored: Mapping[str, Tensor]) -> dict[str, str]:
    """The code of every tensor, by its name in the base. Raises ValueError for parts that make no code."""
    found: dict[str, list[str]] = {}
    for key in sorted(stored):
        name, _, part = key.rpartition(_SEPARATOR)
        if key != _key(name, part):
            name, part = key, ""
        found.setdefault(name, []).append(part)
    for name, parts in found.items():
        if tuple(parts) not in _PARTS:
            raise ValueError(f"{name!r} is stored as {', '.join(map(repr, parts))}: expected the parts of one code")
    return {name: _PARTS[tuple(parts)] for name, parts in found.items()}


def _key(name: str, part: str) -> str:
    return f"{name}{_SEPARATOR}{part}" if part else name


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """m and rest: rows are output channels, of which a tensor of fewer than two dimensions has none of its own."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _layout(
    storage_format: str, shape: Sequence[int], own: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every part that a tensor of this shape, and a type of its own, is stored in."""
    if storage_format == "float32":
        return {"": (tuple(shape), own)}
    if storage_format == "bfloat16":
        return {"bfloat16": (tuple(shape), torch.bfloat16)}
    return {"int8": (tuple(shape), torch.int8), "scale": ((_matrix(shape)[0],), torch.float32)}


def _parts(storage_format: str, difference: Tensor) -> dict[str, Tensor]:
    """A difference in the parts of `_layout`."""
    if storage_format == "bfloat16":
        return {"bfloat16": difference.bfloat16()}
    rows = difference.double().reshape(_matrix(difference.shape))
    scale = (rows.abs().amax(1) / 127).float()
    steps = (rows / scale.double()[:, None]).nan_to_num(0, 0, 0)  # a scale of 0 restores the base
    return {"int8": steps.round().clamp(-127, 127).to(torch.int8).reshape(difference.shape), "scale": scale}


def _restore(name: str, before: Tensor, storage_format: str, parts: Mapping[str, Tensor]) -> Tensor:
    """base + difference, in the base's type. Raises ValueError for integers, and unless all of it is finite."""
    if not before.is_floating_point():
        raise ValueError(f"{name!r} is of {before.dtype}: expected a floating-point type for {storage_format}")
    after = added(name, before, difference_of(storage_format, parts, before.shape))
    return _finite(f"{name!r}, restored from {storage_format},", after)


def _tensor(base: Mapping[str, Tensor], name: str) -> Tensor:
    _check_name(name)
    if name not in base:
        raise ValueError(f"{name!r} is changed but not in the base: give the base it was made of")
    return base[name].detach()


def _check_name(name: str) -> None:
    if _SEPARATOR in name:
        raise ValueError(f"{name!r} holds {_SEPARATOR!r}, which parts of a coded tensor are named with: rename it")


def _check_fits(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
        raise ValueError(f"{name!r} is {list(tensor.shape)} of {tensor.dtype}: expected {list(shape)} of {dtype}")


def _check_applies(storage_format: str, shape: Sequence[int]) -> None:
    if not applies(storage_format, shape):
        raise ValueError(f"{storage_format} does not apply to a tensor {list(shape)}: store it as float32")


def _finite(what: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinity: expected finite numbers")
    return tensor
