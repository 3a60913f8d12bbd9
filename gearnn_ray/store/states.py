"""State dicts as stable bytes: safetensors whose bytes depend on names, values and metadata alone."""

import json
import math
import reprlib
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor

from gearnn_ray.core.errors import CorruptStoreError
from gearnn_ray.store.blobs import canonical_json, check_json, digest_of
from gearnn_ray.store.files import one_line


def encode_state(state: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None) -> bytes:
    """A state dict as safetensors. Equal content gives equal bytes, whatever its order, strides or device. The metadata is
    canonical JSON under one key, because safetensors writes several keys in random order.
    """
    # Copies, because safetensors refuses tensors that share memory (tied weights).
    dense = {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in state.items()}
    header = None if metadata is None else {"gearnn_ray": canonical_json(dict(metadata)).decode()}
    return safetensors.torch.save(dense, header)


def decode_state(data: bytes | memoryview) -> dict[str, Tensor]:
    """The state dict that `encode_state` wrote, sorted by name. The tensors are views of writable memory, which they keep alive,
    or of a copy of read-only bytes; `safetensors.torch.load` would copy each one. Raises CorruptStoreError if it is not
    safetensors.
    """
    writable = isinstance(data, memoryview) and not data.readonly
    try:
        state = _tensor_views(data if isinstance(data, memoryview) and writable else memoryview(bytearray(data)))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CorruptStoreError(f"{digest_of(data)} does not hold safetensors: {one_line(error)}.") from error
    return dict(sorted(state.items()))


_HEADER_BYTES = 4 * 2**20  # of more than ten thousand tensors; parsing takes ten times the memory
_MOST_DIMENSIONS = 64  # PyTorch's own limit

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def _tensor_views(memory: memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views of it: the header's length in 8 bytes, JSON header, elements without gaps."""
    elements = end = 8 + int.from_bytes(memory[:8], "little")
    if elements > _HEADER_BYTES:
        raise ValueError(f"its header has {elements - 8:,} bytes, expected at most {_HEADER_BYTES:,}")
    text = bytes(memory[8:elements])
    check_json(text)
    header = json.loads(text.decode())
    header.pop("__metadata__", None)
    places = list[tuple[str, torch.dtype, list[int], int, int]]()  # name, type, shape, count of elements, offset
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = math.prod(shape[:_MOST_DIMENSIONS])
        if len(shape) > _MOST_DIMENSIONS or elements + first != end or last < first or last - first != count * dtype.itemsize:
            found = f"{reprlib.repr(name)} of shape {reprlib.repr(shape)}"
            raise ValueError(f"{found} cannot lie in the bytes from {reprlib.repr(first)} to {reprlib.repr(last)}")
        places.append((name, dtype, shape, count, end))
        end = elements + last
    if end != len(memory):
        raise ValueError(f"the tensors end at byte {end} of {len(memory)}")
    state = dict[str, Tensor]()
    for name, dtype, shape, count, offset in places:  # all fit: a tensor takes 50 times as long to make as to check
        # torch.frombuffer refuses a count of 0.
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)
        state[name] = flat.reshape(shape)
    return state
