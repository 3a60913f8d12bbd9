"""Storage formats: a stored tensor is restored to the bit that plain numpy computes, within the format's error, or refused."""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gearnn_ray.adaptors.storage_formats import applies, check_format, decode, encode, formats_of, restored, stored_bytes
from gearnn_ray.models.layers import same_bits
from gearnn_ray.store.states import decode_state, encode_state

COMPRESSED = ("bfloat16", "int8")

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
seeds = st.integers(0, 2**32 - 1)


def drawn(shape: tuple[int, ...], numbers: list[float], seed: int) -> Tensor:
    """A tensor of these numbers in any order, each once at least where there is room for it."""
    random = np.random.default_rng(seed)
    picked = random.permutation(np.resize(np.array(numbers, dtype=np.float32), prod(shape)))
    return torch.from_numpy(picked.reshape(shape))


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_numpy(base: Tensor, stored: dict[str, Tensor]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The restored tensor "w": base + difference, implemented a second time, each product and sum rounded by itself."""
    start = base.numpy()
    rows = start.shape[0] if start.ndim > 1 else 1
    with np.errstate(all="ignore"):
        if "w..bfloat16" in stored:  # the upper half of a float32
            bits = stored["w..bfloat16"].view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << np.uint32(16)
            difference = bits.view(np.float32)
        else:
            scale, steps = stored["w..scale"].numpy(), stored["w..int8"].numpy().astype(np.float32)
            difference = np.stack([steps.reshape(rows, -1)[i] * scale[i] for i in range(rows)])
        difference = difference.reshape(start.shape)
        assert difference.dtype == np.float32
        return np.where(difference == 0, start, start + difference)


# ── names and sizes ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_names_of_formats() -> None:
    for name in ("float32", "bfloat16", "int8"):
        assert check_format(name) == name
    for name in ("", "int4", "INT8", "int8 ", "int8\n", "rank-1", "folded"):
        with pytest.raises(ValueError, match="is not a storage format: expected float32, bfloat16 or int8"):
            check_format(name)


@pytest.mark.parametrize(
    ("storage_format", "shape", "size"),
    [
        ("float32", (512, 512, 3, 3), 4 * 512 * 4608),
        ("bfloat16", (512, 512, 3, 3), 2 * 512 * 4608),
        ("int8", (512, 512, 3, 3), 512 * 4608 + 4 * 512),
        ("int8", (512,), 512 + 4),
        ("bfloat16", (), 2),
    ],
)
def test_sizes(storage_format: str, shape: tuple[int, ...], size: int) -> None:
    assert stored_bytes(storage_format, [shape]) == size
    assert stored_bytes(storage_format, [shape, shape]) == 2 * size
    assert stored_bytes(storage_format, []) == 0
    assert applies(storage_format, shape)


def test_a_format_applies_where_it_is_smaller() -> None:
    for storage_format in COMPRESSED:
        assert not applies(storage_format, (0,))
        assert not applies(storage_format, (4, 0, 3))
    assert not applies("int8", ())
    assert not applies("int8", (1,))
    assert applies("int8", (2,))
    assert not applies("int8", (16, 1))  # a scale for every number
    assert applies("int8", (16, 2))
    assert applies("float32", (0,))
    for call in (lambda: applies("int4", (2,)), lambda: stored_bytes("int4", [(2,)])):
        with pytest.raises(ValueError, match="int4"):
            call()


# ── restored tensors ─────────────────────────────────────────────────────────────────────────────────────────────


# many draws are filtered: a format often does not apply
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(shapes, st.sampled_from(COMPRESSED), st.lists(floats, min_size=1), st.lists(floats, min_size=1), seeds)
@example((4, 3), "int8", [0.0], [1e-45, -3e-45, 0.0], 0)  # steps of the smallest float there is
@example((4, 3), "bfloat16", [-0.0, 0.0], [1e-45, -1e-40], 0)
def test_restored_tensors(shape: tuple[int, ...], storage_format: str, old: list[float], new: list[float], seed: int) -> None:
    assume(applies(storage_format, shape))
    base, changed = {"w": drawn(shape, old, seed)}, {"w": drawn(shape, new, seed + 1)}
    difference = changed["w"].double() - base["w"].double()
    stored, refused = dict[str, Tensor](), ""
    try:
        stored = encode(base, changed, {"w": storage_format})
    except ValueError as error:
        refused = str(error)
    if refused:  # only where an intermediate value exceeds float32
        assert "NaN or infinity" in refused
        assert max(difference.norm(), changed["w"].abs().max()) > 1e38
        return
    back = decode(base, stored)["w"]

    assert formats_of(stored) == {"w": storage_format}
    assert sum(each.nbytes for each in stored.values()) == stored_bytes(storage_format, [shape])
    assert same_bits(back, torch.from_numpy(by_numpy(base["w"], stored)))
    assert same_bits(back, decode(base, decode_state(encode_state(stored)))["w"])
    assert same_bits(back, restored(base, changed, {"w": storage_format})["w"])
    error = (back.double() - changed["w"].double()).abs()
    rounding = back.double().abs() * 2**-23 + 2**-133  # of the sum; of steps near the smallest float
    if storage_format == "bfloat16":
        assert (error <= difference.abs() * 2**-8 + rounding).all()
    elif storage_format == "int8":
        rows = difference.reshape(shape[0] if len(shape) > 1 else 1, -1)
        half = (rows.abs().amax(1, keepdim=True) / 254).expand_as(rows).reshape(shape)
        assert (error <= half * 1.00001 + rounding).all()


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(COMPRESSED), st.lists(floats, min_size=1), seeds)
@example((3, 3), "int8", [-0.0, 0.0], 0)
def test_no_change_is_the_base_to_the_bit(shape: tuple[int, ...], storage_format: str, numbers: list[float], seed: int) -> None:
    assume(applies(storage_format, shape))
    for name in ("w", "running_var"):
        base = {name: drawn(shape, numbers, seed)}
        assert same_bits(restored(base, base, {name: storage_format})[name], base[name])


def test_a_row_without_change_has_the_bits_of_the_base() -> None:
    base, changed = {"w": normal(3, 5)}, {"w": normal(3, 5, seed=1)}
    changed["w"][1] = base["w"][1]
    base["w"][2], changed["w"][2] = 0, 1e-44  # a 127th of it is no float
    stored = encode(base, changed, {"w": "int8"})
    assert stored["w..scale"].gt(0).tolist() == [True, False, False]
    assert not stored["w..int8"][1:].any()
    assert same_bits(decode(base, stored)["w"][1:], base["w"][1:])


def test_one_scale_per_output_channel_and_one_for_a_vector() -> None:
    change = torch.tensor([[1.27, 0.5, -0.01], [-1270.0, 10.0, 4.0]])
    stored = encode({"w": torch.zeros(2, 3)}, {"w": change}, {"w": "int8"})
    assert stored["w..int8"].tolist() == [[127, 50, -1], [-127, 1, 0]]
    assert torch.allclose(stored["w..scale"], torch.tensor([0.01, 10.0]))
    stored = encode({"w": torch.zeros(6)}, {"w": change.reshape(-1)}, {"w": "int8"})
    assert stored["w..int8"].tolist() == [0, 0, 0, -127, 1, 0]
    assert stored["w..scale"].shape == (1,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_restored(dtype: torch.dtype) -> None:
    base = {"w": normal(8, 16).to(dtype)}
    changed = {"w": base["w"] + normal(8, 16, scale=0.01, seed=1).to(dtype)}
    for storage_format in COMPRESSED:
        assert same_bits(restored(base, base, {"w": storage_format})["w"], base["w"])
        back = restored(base, changed, {"w": storage_format})["w"]
        assert back.dtype == dtype
        assert torch.allclose(back, changed["w"], rtol=0.01, atol=0.001)


@pytest.mark.parametrize("storage_format", COMPRESSED)
def test_threads_and_strides_do_not_change_a_bit(storage_format: str) -> None:
    base = {"w": normal(64, 32, 6, 6)}  # large enough to be shared among threads
    changed = {"w": base["w"] + normal(64, 32, 6, 6, scale=0.01, seed=1)}
    stored = encode(base, changed, {"w": storage_format})
    alone = decode(base, stored)["w"]
    try:
        torch.set_num_threads(2)
        assert same_bits(decode(base, stored)["w"], alone)
    finally:
        torch.set_num_threads(1)
    strided = {"w": base["w"].to(memory_format=torch.channels_last)}
    assert same_bits(decode(strided, stored)["w"], alone)
    assert same_bits(alone, torch.from_numpy(by_numpy(base["w"], stored)))


def test_a_variance_never_becomes_negative() -> None:
    base, changed = torch.tensor([1.0, 0.005, 1.005]), torch.tensor([0.0, 0.0005, 1e-6])
    for storage_format in ("bfloat16", "int8"):
        free = restored({"w": base}, {"w": changed}, {"w": storage_format})["w"]
        assert (free < 0).any()
        for name in ("running_var", "layer.bn.running_var"):
            back = restored({name: base}, {name: changed}, {name: storage_format})[name]
            assert same_bits(back, torch.where(free < 0, 0.0, free))


# ── several tensors ──────────────────────────────────────────────────────────────────────────────────────────────


names = st.text(st.sampled_from("a.@/#:-_ ü\0\n"), max_size=6).filter(lambda name: ".." not in name)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(names, st.sampled_from(("float32", *COMPRESSED)), max_size=5), seeds)
@example({"a": "int8", "a.": "int8", ".a": "float32", "": "int8", ".": "bfloat16"}, 0)
def test_every_tensor_has_its_own_format_and_name(storage_formats: dict[str, str], seed: int) -> None:
    base = {name: normal(8, 5, 4, seed=seed) for name in (*storage_formats, "elsewhere")}
    changed = {name: base[name] + normal(8, 5, 4, scale=0.01, seed=7) for name in storage_formats}
    stored_variants = {name: storage_format for name, storage_format in storage_formats.items() if storage_format != "float32"}
    stored = encode(base, changed, stored_variants)
    back = decode(base, decode_state(encode_state(stored)))
    assert formats_of(stored) == storage_formats
    assert sum(each.nbytes for each in stored.values()) == sum(stored_bytes(c, [(8, 5, 4)]) for c in storage_formats.values())
    assert back.keys() == storage_formats.keys()
    for name, storage_format in storage_formats.items():
        alone = restored({"w": base[name]}, {"w": changed[name]}, {"w": storage_format})["w"]
        assert same_bits(back[name], alone)
        assert storage_format != "float32" or same_bits(back[name], changed[name])


def test_float32_stores_the_tensors_themselves() -> None:
    base = {"w": torch.zeros(3), "n": torch.tensor(7), "empty": torch.zeros(0, 4), "": torch.zeros(())}
    changed = {"w": torch.tensor([1.0, -0.0, float("nan")]), "n": torch.tensor(8), "empty": torch.zeros(0, 4)}
    for storage_formats in ({}, dict.fromkeys(changed, "float32")):
        assert encode_state(encode(base, changed, storage_formats)) == encode_state(changed)
    back = restored(base, changed, {})
    assert all(same_bits(back[name], changed[name]) for name in changed)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────

NAN, INF = float("nan"), float("inf")


def one(value: float) -> Tensor:
    tensor = torch.zeros(4, 6)
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize(
    ("base", "changed", "storage_formats", "reason"),
    [
        ({"w": one(0)}, {"w": one(1)}, {"w": "int4"}, "'int4' is not a storage format"),
        ({"w": one(0)}, {"w": one(1)}, {"v": "int8"}, "'v' has a storage format but no change"),
        ({"w": one(0)}, {"v": one(1)}, {}, "'v' is changed but not in the base"),
        ({"w": one(0)}, {"w": one(1)[:2]}, {}, r"'w' is \[2, 6\] of torch.float32: expected \[4, 6\]"),
        ({"w": one(0)}, {"w": one(1).half()}, {"w": "int8"}, "torch.float16: expected .* torch.float32"),
        ({"w": one(0)[:, :1]}, {"w": one(1)[:, :1]}, {"w": "int8"}, r"int8 does not apply to a tensor \[4, 1\]"),
        ({"w": torch.zeros(0)}, {"w": torch.zeros(0)}, {"w": "bfloat16"}, "does not apply"),
        ({"w": one(0).int()}, {"w": one(1).int()}, {"w": "int8"}, "'w' is of torch.int32"),
        ({"a..b": one(0)}, {"a..b": one(1)}, {}, r"'a\.\.b' holds '\.\.'"),
        ({"w": one(0)}, {"w": one(3.4e38)}, {"w": "bfloat16"}, "'w', restored from bfloat16, holds NaN or infinity"),
        ({"w": one(-3e38)}, {"w": one(3e38)}, {"w": "int8"}, "the change of 'w' holds NaN or infinity"),
        *[
            ({"w": one(old)}, {"w": one(new)}, {"w": storage_format}, "the change of 'w' holds NaN or infinity")
            for old, new in ((0, NAN), (0, -INF), (NAN, 0), (INF, 0), (INF, INF))
            for storage_format in COMPRESSED
        ],
    ],
)
def test_encode_refuses(
    base: dict[str, Tensor], changed: dict[str, Tensor], storage_formats: dict[str, str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        encode(base, changed, storage_formats)
    assert "\n" not in str(caught.value)


def damaged() -> Iterator[tuple[str, Callable[[dict[str, Tensor]], Any], str]]:
    """A format, how the parts of "w" in it are damaged, and the message."""
    yield "int8", lambda s: s.pop("w..scale"), "'w' is stored as 'int8': expected the parts of one storage format"
    yield "int8", lambda s: s.pop("w..int8"), "'w' is stored as 'scale'"
    yield "int8", lambda s: s.update({"w": one(0)}), "'w' is stored as '', 'int8', 'scale'"
    yield "int8", lambda s: s.update({"w..bfloat16": one(0).bfloat16()}), "'bfloat16', 'int8', 'scale'"
    yield "int8", lambda s: s.update({"w..int4": one(0)}), "'int4', 'int8', 'scale'"
    yield "int8", lambda s: s.update({"w..int8 scale": one(0)}), "'int8 scale'"
    yield "int8", lambda s: s.update({"w..": one(0)}), r"'w\.\.' holds '\.\.'"
    yield "int8", lambda s: s.update({"v..bfloat16": one(0).bfloat16()}), "'v' is changed but not in the base"
    yield "int8", lambda s: s.update({"v": one(0)}), "'v' is changed but not in the base"
    yield "int8", lambda s: s.update({"w..scale": torch.ones(6)}), r"'w\.\.scale' is \[6\] .*: expected \[4\]"
    yield "int8", lambda s: s.update({"w..scale": torch.ones(4).double()}), "float64: expected .* torch.float32"
    yield "int8", lambda s: s.update({"w..int8": one(0).to(torch.uint8)}), "uint8: expected .* torch.int8"
    yield "int8", lambda s: s.update({"w..int8": s["w..int8"].T}), r"\[6, 4\] .*: expected \[4, 6\]"
    yield "int8", lambda s: s["w..scale"].fill_(NAN), "'w', restored from int8, holds NaN or infinity"
    yield "bfloat16", lambda s: s["w..bfloat16"].fill_(INF), "'w', restored from bfloat16, holds NaN or infinity"
    yield "bfloat16", lambda s: s.update({"w..bfloat16": one(0).half()}), "float16: expected .* torch.bfloat16"
    yield "float32", lambda s: s.update({"w": one(0).half()}), "float16: expected .* torch.float32"


@pytest.mark.parametrize(("storage_format", "damage", "reason"), damaged())
def test_decode_refuses_what_does_not_fit_the_base(storage_format: str, damage: Callable[..., Any], reason: str) -> None:
    base = {"w": one(0.5)}
    stored = encode(base, {"w": one(1)}, {"w": storage_format})
    decode(base, stored)
    damage(stored)
    with pytest.raises(ValueError, match=reason) as caught:
        decode(base, stored)
    assert "\n" not in str(caught.value)


def test_integers_are_refused() -> None:
    stored = encode({"w": one(0)}, {"w": one(1)}, {"w": "bfloat16"})
    with pytest.raises(ValueError, match=r"'w' is of torch\.int64"):
        decode({"w": one(0).long()}, stored)
