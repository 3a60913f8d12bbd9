"""How a tensor's change is stored: as the tensor itself, or as a smaller difference to the base's.

    code        stored under                    the difference
    float32     name                            (the tensor itself, whatever its type)
    bfloat16    name..bfloat16                  as it is, rounded
    int8        name..int8, name..scale         int8 · scale, with one scale per output channel
    rank-R      name..left, name..right         Σ_r left[:, r] · right[r], over R singular directions

The difference is seen as a matrix [m, rest] of the first dimension and all others; a tensor of fewer than two dimensions
is one row. Restored is base + difference in float32, by single elementwise IEEE operations: neither a matrix product, whose
order of sums depends on the machine, nor a fused multiply-add, so that everyone gets the same bits. Where the difference is 0
these are the base's. Knows nothing of levels, training or stores.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

# Between a tensor's name and its part. No name has it: torch lets no module or tensor have an empty name or a dot in it.
_SEPARATOR = ".."
_PARTS = {("",): "float32", ("bfloat16",): "bfloat16", ("int8", "scale"): "int8", ("left", "right"): "rank"}
_NAMES = {code: parts for parts, code in _PARTS.items()}


def check_code(name: str) -> str:
    """The name, if it is one of a code: float32, bfloat16, int8 or rank-R for a whole number R ≥ 1. Raises ValueError."""
    if not re.fullmatch(r"float32|bfloat16|int8|rank-[1-9][0-9]{0,8}", name):
        raise ValueError(f"{name!r} is not a code: expected float32, bfloat16, int8 or rank-R, such as rank-4")
    return name


def applies(code: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is smaller under a code than as float32, which itself always applies.

    Rank codes are so for R < m · rest / (m + rest) alone: never with fewer than two dimensions, nor for R ≥ min(m, rest).
    Raises ValueError for what is no code.
    """
    return code == "float32" or stored_bytes(code, [shape]) < stored_bytes("float32", [shape])


def is_rank(code: str) -> bool:
    """Whether a code stores factors, which a fine-tune can train themselves."""
    return _rank(check_code(code)) > 0


def stored_bytes(code: str, shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of what is stored of float32 tensors of these shapes, without names and file header. Raises ValueError."""
    return sum(
        math.prod(size) * dtype.itemsize
        for shape in shapes
        for size, dtype in _layout(check_code(code), shape, torch.float32).values()
    )


def encode(base: Mapping[str, Tensor], changed: Mapping[str, Tensor], codes: Mapping[str, str]) -> dict[str, Tensor]:
    """What is stored of `changed`, tensors of the base's names, shapes and types, each under its code (default float32).

    Under float32 a tensor is stored as it is. Raises ValueError for a code that does not apply, for a tensor that does not fit
    the base, and where a difference or what comes back of it is not finite.
    """
    if foreign := sorted(codes.keys() - changed.keys()):
        raise ValueError(f"{foreign[0]!r} has a code but no change: give codes for changed tensors only")
    stored: dict[str, Tensor] = {}
    for name, tensor in changed.items():
        code = check_code(codes.get(name, "float32"))
        before, after = _tensor(base, name), tensor.detach()
        _check_fits(name, after, tuple(before.shape), before.dtype)
        if code == "float32":
            stored[name] = after
            continue
        _check_applies(code, before.shape)
        difference = (after.double() - before.double()).float()
        parts = _parts(code, _finite(f"the change of {name!r}", difference))
        _restore(name, before, code, parts)
        stored |= {_key(name, part): each for part, each in parts.items()}
    return stored


def encode_factors(name: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """What is stored of a change that is left [m, R] · right [R, rest] already, both float32. Raises ValueError."""
    _check_name(name)
    if left.dim() != 2 or right.dim() != 2 or not 0 < left.shape[1] == right.shape[0]:
        raise ValueError(
            f"factors {list(left.shape)} and {list(right.shape)} of {name!r}: expected [m, R] and [R, rest]"
        )
    stored = {_key(name, "left"): left.detach(), _key(name, "right"): right.detach()}
    for key, factor in stored.items():
        _check_fits(key, factor, tuple(factor.shape), torch.float32)
        _finite(repr(key), factor)
    return stored


def factors(code: str, difference: Tensor) -> tuple[Tensor, Tensor]:
    """The R largest singular directions of a difference [m, …], as float32: left [m, R] and right [R, rest].

    Singular values are split evenly between them: no factor leaves the range of float32 where the difference does not, and
    training moves both alike. The largest entry of a direction's shorter vector is positive. Raises ValueError unless `code`
    is a rank that applies, and for NaN or infinity.
    """
    rank = _rank(check_code(code))
    if not rank:
        raise ValueError(f"{code} has no factors: expected rank-R")
    _check_applies(code, difference.shape)
    matrix = _finite("the difference", difference).detach().double().reshape(_matrix(difference.shape))
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # The shorter side's Gram matrix is a fraction of an SVD's work. What squaring loses in float64, singular values below 1e-8
    # of the largest, float32 would not show.
    short = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:].flip(1)
    short = short * short.gather(0, short.abs().argmax(0, keepdim=True)).sign()
    long = short.T @ wide
    root = long.norm(dim=1).sqrt()
    short, long = short * root, long / root.clamp(min=torch.finfo(root.dtype).tiny)[:, None]
    left, right = (short, long) if wide is matrix else (long.T, short.T)
    return left.float().contiguous(), right.float().contiguous()


def decode(base: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The restored tensors of what `encode` or `encode_factors` made: names, shapes and types are the base's.

    A restored `running_var` is at least 0: rounding could take a small variance below, and its root would be NaN. Raises
    ValueError for anything that does not fit the base, is incomplete or not finite.
    """
    state: dict[str, Tensor] = {}
    for name, (code, parts) in parts_of(stored).items():
        before = _tensor(base, name)
        for part, (shape, dtype) in _layout(code, before.shape, before.dtype).items():
            _check_fits(_key(name, part), parts[part], shape, dtype)
        state[name] = parts[""] if code == "float32" else _restore(name, before, code, parts)
    return state


def restored(base: Mapping[str, Tensor], changed: Mapping[str, Tensor], codes: Mapping[str, str]) -> dict[str, Tensor]:
    """What comes back of `changed` after it was stored under `codes`. Raises ValueError as `encode` does."""
    return decode(base, encode(base, changed, codes))


def difference_of(code: str, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The difference [*shape] that parts (as in the table above, of any code but float32) stand for, in float32.

    Parts may be those of many tensors [*shape], side by side in leading dimensions: so are the differences then.
    """
    if code == "bfloat16":
        return parts["bfloat16"].float()
    if code == "int8":
        steps, scale = parts["int8"], parts["scale"]
        return (steps * scale.reshape(*scale.shape, *(1,) * (len(shape) - 1))).reshape(steps.shape)
    left, right = parts["left"], parts["right"]
    difference = left[..., :1] * right[..., :1, :]
    for r in range(1, left.shape[-1]):
        difference = difference + left[..., r : r + 1] * right[..., r : r + 1, :]
    return difference.reshape(*left.shape[:-2], *shape)


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
        name: (code, {part: stored[_key(name, part)] for part in _NAMES[code.partition("-")[0]]})
        for name, code in codes_of(stored).items()
    }


def codes_of(stored: Mapping[str, Tensor]) -> dict[str, str]:
    """The code of every tensor, by its name in the base. Raises ValueError for parts that make no code."""
    found: dict[str, list[str]] = {}
    for key in sorted(stored):
        name, _, part = key.rpartition(_SEPARATOR)
        if key != _key(name, part):
            name, part = key, ""
        found.setdefault(name, []).append(part)
    return {name: _code_of(name, tuple(parts), stored) for name, parts in found.items()}


def _code_of(name: str, parts: tuple[str, ...], stored: Mapping[str, Tensor]) -> str:
    code = _PARTS.get(parts)
    if code == "rank":
        left = stored[_key(name, "left")]
        code = f"rank-{left.shape[1]}" if left.dim() == 2 and left.shape[1] else None
    if code is None:
        raise ValueError(f"{name!r} is stored as {', '.join(map(repr, parts))}: expected the parts of one code")
    return code


def _key(name: str, part: str) -> str:
    return f"{name}{_SEPARATOR}{part}" if part else name


def _rank(code: str) -> int:
    """R of rank-R, 0 of other codes."""
    return int(code.removeprefix("rank-")) if code.startswith("rank-") else 0


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """m and rest: rows are output channels, of which a tensor of fewer than two dimensions has none of its own."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _layout(code: str, shape: Sequence[int], own: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every part that a tensor of this shape, and a type of its own, is stored in."""
    m, rest = _matrix(shape)
    if code == "float32":
        return {"": (tuple(shape), own)}
    if code == "bfloat16":
        return {"bfloat16": (tuple(shape), torch.bfloat16)}
    if code == "int8":
        return {"int8": (tuple(shape), torch.int8), "scale": ((m,), torch.float32)}
    rank = _rank(code)
    return {"left": ((m, rank), torch.float32), "right": ((rank, rest), torch.float32)}


def _parts(code: str, difference: Tensor) -> dict[str, Tensor]:
    """A difference in the parts of `_layout`."""
    if code == "bfloat16":
        return {"bfloat16": difference.bfloat16()}
    if code == "int8":
        rows = difference.double().reshape(_matrix(difference.shape))
        scale = (rows.abs().amax(1) / 127).float()
        steps = (rows / scale.double()[:, None]).nan_to_num(0, 0, 0)  # a scale of 0 restores the base
        return {"int8": steps.round().clamp(-127, 127).to(torch.int8).reshape(difference.shape), "scale": scale}
    left, right = factors(code, difference)
    return {"left": left, "right": right}


def _restore(name: str, before: Tensor, code: str, parts: Mapping[str, Tensor]) -> Tensor:
    """base + difference, in the base's type. Raises ValueError for integers, and unless all of it is finite."""
    if not before.is_floating_point():
        raise ValueError(f"{name!r} is of {before.dtype}: expected a floating-point type for {code}")
    after = added(name, before, difference_of(code, parts, before.shape))
    return _finite(f"{name!r}, restored from {code},", after)


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


def _check_applies(code: str, shape: Sequence[int]) -> None:
    if not applies(code, shape):
        raise ValueError(f"{code} does not apply to a tensor {list(shape)}: store it as float32")


def _finite(what: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinity: expected finite numbers")
    return tensor
