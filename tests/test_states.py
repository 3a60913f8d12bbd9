"""State dicts as safetensors: equal states have equal bytes, and reading copies nothing, as the format's own library has it."""

import json
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from gearnn_ray.core.errors import CorruptStoreError
from gearnn_ray.store.blobs import digest_of
from gearnn_ray.store.states import decode_state, encode_state
from tests.stores import base_state, equal

STATE = {
    "weight": torch.arange(24.0).reshape(2, 3, 4),
    "half": torch.ones(3, dtype=torch.float16),
    "bfloat": torch.ones(5, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "none": torch.empty(0, 4),
}


def with_header(header: object, elements: bytes = bytes(16)) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + elements


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        (left[n].dtype, left[n].shape) == (right[n].dtype, right[n].shape)
        and torch.equal(left[n].flatten().view(torch.uint8), right[n].flatten().view(torch.uint8))
        for n in left
    )


def test_writable_memory_is_read_without_a_copy() -> None:
    memory = np.frombuffer(bytearray(encode_state(STATE)), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of memory that torch must not write
        state = decode_state(memory.data)
    assert same(state, STATE)
    within = range(memory.ctypes.data, memory.ctypes.data + memory.size)
    assert all(tensor.data_ptr() in within for tensor in state.values() if tensor.numel())
    # each has a storage of its own size: whoever counts or saves one counts no other
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())
    del memory
    assert same(state, STATE)
    state["weight"].zero_()
    assert same({**state, "weight": STATE["weight"]}, STATE)


def test_bytes_stay_as_they_were() -> None:
    data = encode_state(STATE)
    before = bytes(bytearray(data))
    decode_state(data)["weight"].zero_()
    assert data == before


DATA = encode_state(STATE, {"level": "jpeg-10"})
HEADER = 8 + int.from_bytes(DATA[:8], "little")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER + 8), st.integers(0, 255)), max_size=3), st.integers(-20, 20))
def test_a_damaged_header_is_read_as_the_library_reads_it_or_refused(changes: list[tuple[int, int]], length: int) -> None:
    damaged = bytearray(DATA)
    for position, value in changes:
        damaged[position] = value
    data = bytes(damaged[: len(DATA) + min(length, 0)]) + bytes(max(length, 0))
    try:
        expected = safetensors.torch.load(data)
    except (SafetensorError, KeyError):
        # Python reads JSON a little wider: a name given twice, blanks before the brace
        with suppress(CorruptStoreError):
            decode_state(data)
    else:
        assert same(decode_state(data), expected)


@given(st.binary(max_size=64))
@example(b"\xff" * 16)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for each in (data, len(data).to_bytes(8, "little") + data):
        with suppress(CorruptStoreError):
            decode_state(each)


@pytest.mark.parametrize(
    "header",
    [
        [], "text", 3, {"a": 1}, {"a": {}}, {"a": entry("F7")}, {"a": entry(["F32"])}, {"a": entry(shape=[5])},
        {"a": entry(shape=[-1, -4])}, {"a": entry(shape=[4.0])}, {"a": entry(shape="ab")}, {"a": entry(shape=[10**30])},
        {"a": entry(offsets=[0])}, {"a": entry(offsets=[16, 0])}, {"a": entry(offsets=[-16, 0])}, {"a": entry(offsets=None)},
        {"a": entry(shape=[3], offsets=[0, 12])}, {"a": entry(shape=[3], offsets=[4, 16])},
        {"a": entry(), "b": entry()}, {"a": entry(shape=[-4], offsets=[0, -16])}, {"a": entry(shape=[0, -1], offsets=[0, 0])},
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(header: object) -> None:
    data = with_header(header)
    with pytest.raises(CorruptStoreError, match="does not hold safetensors"):
        decode_state(data)
    with pytest.raises((SafetensorError, KeyError)):
        safetensors.torch.load(data)


# ── the bytes of a state dict ────────────────────────────────────────────────────────────────────────────────────

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64])
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
states = st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), st.tuples(dtypes, shapes))
metadata = st.none() | st.dictionaries(st.text(max_size=4).filter(str.isidentifier), st.integers() | st.text(max_size=4))


@settings(max_examples=60, deadline=None)
@given(states, metadata, st.randoms(use_true_random=False))
def test_equal_states_have_equal_bytes(spec: Any, meta: Any, random: Any) -> None:
    state = {name: (torch.rand(shape) * 100).to(dtype) for name, (dtype, shape) in spec.items()}
    data = encode_state(state, meta)
    names, keys = list(state), list(meta or ())
    random.shuffle(names)
    random.shuffle(keys)

    assert equal(decode_state(data), state)
    assert list(decode_state(data)) == sorted(state)
    shuffled = None if meta is None else {key: meta[key] for key in keys}
    assert encode_state({name: state[name] for name in names}, shuffled) == data


def test_many_metadata_keys_are_byte_stable() -> None:
    # written as safetensors metadata of their own they come in another order nearly every time
    meta = {f"key-{i}": i for i in range(20)}
    assert len({encode_state({}, meta) for _ in range(10)}) == 1
    assert encode_state({}, meta) != encode_state({}, {**meta, "key-0": 1})


def test_strides_and_shared_memory_do_not_show() -> None:
    dense = torch.arange(120.0).reshape(2, 3, 4, 5)
    strided = dense.to(memory_format=torch.channels_last)
    assert encode_state({"a": strided, "b": strided}) == encode_state({"a": dense, "b": dense.clone()})


@pytest.mark.parametrize("damage", [b"", b"no safetensors at all", encode_state(base_state())[:-1]])
def test_what_is_no_safetensors_is_refused_by_its_digest(damage: bytes) -> None:
    with pytest.raises(CorruptStoreError, match=digest_of(damage)):
        decode_state(damage)
