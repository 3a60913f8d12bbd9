"""A batch normalisation without statistics of its own is the same function, by torch's forward pass; and which are folded."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from gearnn_ray.adaptors.bn_folding import Foldable, fold, foldable
from gearnn_ray.models.layers import layers_of, network_state, same_bits, tensors_of
from gearnn_ray.models.registry import build_model

State = dict[str, Tensor]


def moved(state: State, seed: int) -> State:
    """Every number of the network somewhere else; of the variances every third is 0."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in state.items():
        change = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        made[name] = change.square() if "running_var" in name else tensor + 0.1 * change
        if "running_var" in name:
            made[name][seed % 3 :: 3] = 0
    return made


def logits(model: nn.Module, state: State, x: Tensor) -> Tensor:
    model.load_state_dict(state)
    with torch.no_grad():
        result: Tensor = model.eval()(x)
    return result


# ── the same function ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("network", "folded"), [("tests.nets:small", 2), ("tests.zoo:zoo", 2), ("drn_d_22", 25)])
def test_a_folded_network_is_the_same_function(network: str, folded: int) -> None:
    torch.manual_seed(0)
    model = build_model(network, 3).double()
    base = moved(network_state(model), 1)
    state = moved(base, 2)
    normalisations = foldable(model)
    assert len(normalisations) == folded
    found = fold(normalisations.values(), base, state)

    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    want = logits(model, state, x)
    assert not torch.allclose(logits(model, base, x), want, rtol=0.1)
    torch.testing.assert_close(logits(model, found, x), want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))

    # the statistics are the base's, bit for bit, and nothing else than their normalisations is touched
    assert list(found) == list(state)
    statistics = tensors_of(layers_of(model), normalisations)
    assert len(statistics) == 2 * folded
    assert all(same_bits(found[name], base[name]) for name in statistics)
    own = {name for each in normalisations.values() for name in (each.weight, each.bias)} | set(statistics)
    assert all(found[name] is state[name] for name in state.keys() - own)
    assert all(not same_bits(found[name], state[name]) for name in own)
    # what is folded stays so, and the base is so already
    again = fold(normalisations.values(), base, found)
    assert all(same_bits(again[name], found[name]) for name in found)
    itself = fold(normalisations.values(), base, base)
    assert all(same_bits(itself[name], base[name]) for name in base)


numbers = st.floats(-1e3, 1e3).map(lambda v: v if abs(v) > 1e-30 else 0.0)
variances = st.one_of(st.just(0.0), st.floats(1e-12, 1e6))
four = st.tuples(numbers, numbers, numbers, variances)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(four, four), min_size=1, max_size=4),
    st.sampled_from([1e-5, 1e-3, 1.0]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_whatever_the_numbers_are(
    channels: list[tuple[tuple[float, ...], tuple[float, ...]]], eps: float, dtype: torch.dtype
) -> None:
    names = ("weight", "bias", "running_mean", "running_var")
    base, state = (
        {name: torch.tensor([channel[side][i] for channel in channels], dtype=dtype) for i, name in enumerate(names)}
        for side in (0, 1)
    )
    kept = {name: tensor.clone() for name, tensor in state.items()}
    each = Foldable(*names, eps)
    found = fold([each], base, state)
    assert all(same_bits(state[name], kept[name]) for name in names), "what it was given is left alone"
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {n: (t.dtype, t.shape) for n, t in state.items()}

    def output(each: State) -> Tensor:
        weight, bias, mean, var = (each[name].double() for name in names)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    x = torch.tensor([[-100.0], [0.0], [1.0], [30.0]], dtype=torch.float64).repeat(1, len(channels))
    # what the folded tensors are rounded by, on the scale of what they are made of
    (weight, bias, mean, var), old = ([side[name].double() for name in names] for side in (state, base))
    root = (var + eps).sqrt()
    scale = weight.abs() * (x.abs() + mean.abs() + 2 * old[2].abs()) / root + bias.abs()
    assert bool(((output(found) - output(state)).abs() <= 4 * torch.finfo(dtype).eps * scale + 1e-30).all())
    again, itself = fold([each], base, found), fold([each], base, base)
    # a bias of -0.0 may become 0.0
    assert all(torch.equal(again[name], found[name]) and torch.equal(itself[name], base[name]) for name in names)


def test_only_the_named_ones_are_folded() -> None:
    model = build_model("tests.nets:small", 3)
    base = network_state(model)
    state = moved(base, 3)
    both = foldable(model)
    one = fold([both["bn2.running_stats"]], base, state)
    changed = {name for name in state if not same_bits(one[name], state[name])}
    assert changed == {"bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var"}
    assert fold([], base, state) == state
    whole, other = fold(both.values(), base, state), fold([both["bn1.running_stats"]], base, one)
    assert all(same_bits(whole[name], other[name]) for name in state)


# ── which are folded ─────────────────────────────────────────────────────────────────────────────────────────────


def test_all_batch_normalisations_with_their_own_names_and_eps() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.BatchNorm1d(3), "b": nn.Sequential(nn.BatchNorm2d(4, eps=1e-3)), "c": nn.BatchNorm3d(2),
            "d": nn.SyncBatchNorm(2, momentum=None),
        }
    )  # fmt: skip
    paths = {"a": 1e-5, "b.0": 1e-3, "c": 1e-5, "d": 1e-5}
    leaves = ("weight", "bias", "running_mean", "running_var")
    assert foldable(model) == {
        f"{path}.running_stats": Foldable(*(f"{path}.{leaf}" for leaf in leaves), eps) for path, eps in paths.items()
    }
    assert foldable(nn.BatchNorm2d(3)) == {"running_stats": Foldable(*leaves, 1e-5)}
    assert foldable(model).keys() < {layer.name for layer in layers_of(model)}


def one_under_two_names() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    return nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})


def shares(leaf: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        setattr(second, leaf, getattr(first, leaf))
        return nn.Sequential(first, nn.ReLU(), second)

    return make


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(3, affine=False),
        lambda: nn.BatchNorm2d(3, track_running_stats=False),
        lambda: nn.LayerNorm(3),
        lambda: nn.GroupNorm(1, 3),
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        lambda: FrozenBatchNorm2d(3),
        one_under_two_names,
        shares("weight"),
        shares("bias"),
    ],
)
def test_what_is_not_all_its_own_is_left_as_it_is(make: Callable[[], nn.Module]) -> None:
    assert foldable(nn.Sequential(nn.Conv2d(3, 3, 1), make())) == {}


def test_one_that_shares_nothing_is_folded_beside_those_that_do() -> None:
    model = nn.Sequential(shares("weight")(), nn.BatchNorm2d(3), one_under_two_names())
    assert set(foldable(model)) == {"1.running_stats"}
