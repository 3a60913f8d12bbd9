"""The baselines' images, losses and layers, against plain reference implementations."""

import itertools
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.evaluation import baselines
from gearnn_ray.models.layers import layers_of, network_state, same_bits
from gearnn_ray.models.registry import build_model
from gearnn_ray.tasks.base import Batch, Forward, Image, LossTerm, loss_of, score
from gearnn_ray.training import sgd
from gearnn_ray.training.batch_norm import reestimate_statistics
from gearnn_ray.training.predict import Predictor, collect_evidence
from gearnn_ray.training.sampling import Mixture, training_batches
from gearnn_ray.training.trainer import fine_tune
from tests.conftest import NORMALISATION, SEGMENTATION

Pictures = tuple[list[Image], list[Image]]
RECIPE = Recipe(epochs=2, learning_rate=0.1, batch_size=4, crop=24, precision="float32")
examples = settings(max_examples=40, deadline=None)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("tests.nets:small", num_classes=3)


# ── titles ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_method_has_a_title() -> None:
    assert set(baselines.CONSTANT) < baselines.TITLES.keys()
    assert len(set(baselines.TITLES.values())) == len(baselines.TITLES)


# ── which loss ───────────────────────────────────────────────────────────────────────────────────────────────────


class Recorder:
    """A linear network of its own per pixel, after a strong non-linearity; remembers what went through it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
        self.inputs: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach().clone())
        return torch.einsum("kc,bchw->bkhw", self.weight, torch.sin(x.double() / 25))


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (4, 3, 10, 12), generator=generator, dtype=torch.uint8)
    y = torch.randint(0, 3, (4, 10, 12), generator=generator)
    y[:, :2] = 255
    return Batch(x, y)


def stability(alpha: float, sigma: float, network: Forward, batch: Batch, seed: Sequence[int] = (1, 2)) -> Tensor:
    return loss_of(baselines.stability_loss(SEGMENTATION, alpha, sigma)(network, batch, seed))


def cross_entropy(batch: Batch) -> Tensor:
    return F.cross_entropy(Recorder()(batch.images).float(), batch.targets, ignore_index=255)


def divergence(p_logits: Tensor, q_logits: Tensor) -> float:
    """KL(p || q), a mean over pixels, one after the other."""
    total, pixels = 0.0, 0
    for b, h, w in itertools.product(*map(range, (p_logits.shape[0], *p_logits.shape[2:]))):
        p, q = ([math.exp(v) for v in logits[b, :, h, w].tolist()] for logits in (p_logits, q_logits))
        p, q = ([v / sum(each) for v in each] for each in (p, q))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        pixels += 1
    return total / pixels


def test_without_alpha_stability_is_cross_entropy(batch: Batch) -> None:
    torch.testing.assert_close(stability(0.0, 0.1, Recorder(), batch), cross_entropy(batch))


def test_without_a_perturbation_nothing_diverges(batch: Batch) -> None:
    loss = stability(1000.0, 1e-7, Recorder(), batch)
    torch.testing.assert_close(loss, cross_entropy(batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.04, 0.1])
def test_the_perturbation_is_gaussian_of_that_width_and_drawn_from_the_seed(batch: Batch, sigma: float) -> None:
    def noise(seed: Sequence[int]) -> NDArray[np.float64]:
        network = Recorder()
        stability(1.0, sigma, network, batch, seed)
        (both,) = network.inputs  # one batch: a normalisation sees clean and perturbed images alike
        clean, perturbed = both.chunk(2)
        assert torch.equal(clean, batch.images.float())
        return (perturbed.double() - clean.double()).numpy() / 255

    drawn = noise((1, 2, 3, 0))
    assert drawn.std() == pytest.approx(sigma, rel=0.06)
    assert drawn.mean() == pytest.approx(0, abs=sigma / 10)
    assert np.mean(np.abs(drawn) < sigma) == pytest.approx(0.683, abs=0.05)
    assert np.array_equal(drawn, noise((1, 2, 3, 0)))
    for other in [(2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)]:
        assert not np.array_equal(drawn, noise(other))


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_stability_against_a_plain_implementation(batch: Batch, alpha: float) -> None:
    network = Recorder()
    loss = stability(alpha, 0.1, network, batch)
    other = Recorder()
    clean, perturbed = other(network.inputs[0]).chunk(2)
    kl = divergence(clean, perturbed)
    assert abs(kl - divergence(perturbed, clean)) > 1e-3 * kl  # or the direction would not be tested
    entropy = F.cross_entropy(clean, batch.targets, ignore_index=255)
    assert float(loss.detach()) == pytest.approx(float(entropy.detach()) + alpha * kl, rel=1e-5)
    # the gradient goes through both copies
    expected = (
        entropy
        + alpha * F.kl_div(F.log_softmax(perturbed, 1), F.log_softmax(clean, 1), reduction="none", log_target=True).sum(1).mean()
    )
    ours, theirs = torch.autograd.grad(loss, network.weight)[0], torch.autograd.grad(expected, other.weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ── which layers ─────────────────────────────────────────────────────────────────────────────────────────────────


def numel(model: nn.Module, names: Sequence[str]) -> int:
    sizes = {layer.name: layer.numel for layer in layers_of(model)}
    return sum(sizes[name] for name in names)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Convolutions and normalisations of random widths, some parameters frozen by the network itself."""
    parts: list[nn.Module] = []
    width = draw(st.integers(1, 4))
    for _ in range(draw(st.integers(1, 4))):
        other = draw(st.integers(1, 6))
        parts.append(nn.Conv2d(width, other, draw(st.integers(1, 3)), bias=draw(st.booleans())))
        width = other
        kind = draw(st.sampled_from(["batch", "group", "no statistics", "none"]))
        if kind == "group":
            parts.append(nn.GroupNorm(1, width))
        elif kind != "none":
            parts.append(nn.BatchNorm2d(width, track_running_stats=kind == "batch"))
    network = nn.Sequential(*parts)
    for parameter in network.parameters():
        parameter.requires_grad_(draw(st.integers(0, 3)) > 0)
    return network


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@examples
@given(networks(), st.integers(0, 200), st.integers(0, 50))
def test_layers_under_a_budget(model: nn.Module, budget: int, draw: int) -> None:
    order = [layer.name for layer in layers_of(model) if layer.name not in frozen(model)]
    first, random = baselines.first_layers(model, budget), baselines.random_layers(model, budget, draw)
    assert list(first) == order[: len(first)]
    assert numel(model, first) <= budget
    assert len(first) == len(order) or numel(model, order[: len(first) + 1]) > budget
    assert list(random) == [name for name in order if name in random]
    room = budget - numel(model, random)
    assert room >= 0
    assert all(numel(model, [name]) > room for name in order if name not in random)
    assert random == baselines.random_layers(model, budget, draw)


def test_a_budget_may_be_used_to_the_last_float(model: nn.Module) -> None:
    assert baselines.first_layers(model, 215) == ()
    assert baselines.first_layers(model, 216) == ("conv1.weight",)
    assert baselines.first_layers(model, 224) == ("conv1.weight", "bn1.weight")


def test_a_normalisation_frozen_for_good_is_not_movable(pictures: Pictures) -> None:
    # its buffers are no layers that training can move
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), FrozenBatchNorm2d(3))
    assert baselines.statistics_layers(model) == ()
    assert baselines.norm_layers(model) == ()
    assert baselines.first_layers(model, 10**6) == ("0.weight", "0.bias")
    assert rgn(model, pictures).keys() == {"0.weight", "0.bias"}


def test_draws_differ_and_reach_every_layer(model: nn.Module) -> None:
    drawn = [baselines.random_layers(model, 300, draw) for draw in range(40)]
    assert len(set(drawn)) > 5
    movable = {layer.name for layer in layers_of(model)} - {"up.weight", "conv2.weight"}  # frozen; too large
    assert set(itertools.chain.from_iterable(drawn)) == movable


def test_normalisations_of_the_small_network(model: nn.Module) -> None:
    assert baselines.statistics_layers(model) == ("bn1.running_stats", "bn2.running_stats")
    assert baselines.norm_layers(model) == (
        "bn1.weight", "bn1.bias", "bn1.running_stats", "bn2.weight", "bn2.bias", "bn2.running_stats",
    )  # fmt: skip
    model.get_parameter("bn1.weight").requires_grad_(False)
    assert "bn1.weight" not in baselines.norm_layers(model)


@examples
@given(networks())
def test_normalisations_are_all_that_is_a_normalisation(model: nn.Module) -> None:
    norms = {path for path, module in model.named_modules() if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm))}
    tracked = {path for path in norms if getattr(model.get_submodule(path), "track_running_stats", False)}
    assert set(baselines.statistics_layers(model)) == {f"{path}.running_stats" for path in tracked}
    affine = {f"{path}.{leaf}" for path in norms for leaf in ("weight", "bias")} - frozen(model)
    assert set(baselines.norm_layers(model)) == affine | {f"{path}.running_stats" for path in tracked}


def rgn(model: nn.Module, pictures: Pictures, seed: int = 5) -> dict[str, float]:
    return baselines.relative_gradients(SEGMENTATION, model, *pictures, NORMALISATION, 4, 24, seed, "float32")


def test_relative_gradients_against_autograd_by_hand(model: nn.Module, pictures: Pictures) -> None:
    for norm in ("bn1", "bn2"):  # statistics that are not a batch's own
        model.get_buffer(f"{norm}.running_mean").normal_()
    before = network_state(model)
    found = rgn(model, pictures)
    assert all(same_bits(before[name], tensor) for name, tensor in network_state(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == parameters.keys()
    sums = dict.fromkeys(parameters, 0.0)
    model.eval()
    batches = list(training_batches(SEGMENTATION, *pictures, 4, (24, 24), (5, 0)))
    assert len(batches) == 3
    for batch in batches:
        loss = F.cross_entropy(model(NORMALISATION(batch.images)), batch.targets, ignore_index=255)
        for (name, parameter), gradient in zip(
            parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            sums[name] += float(gradient.norm() / parameter.detach().norm()) if parameter.any() else 0.0
    assert found == pytest.approx({name: total / 3 for name, total in sums.items()}, rel=1e-4)
    assert found["bn1.bias"] == 0.0  # initialised to zero, and no number can be had by dividing by it
    assert rgn(model, pictures, seed=6) != found


def test_auto_rgn_against_every_choice(model: nn.Module) -> None:
    layers = {layer.name: layer for layer in layers_of(model) if layer.kind not in ("norm_statistics", "buffer")}
    del layers["up.weight"]
    rng = np.random.default_rng(2)
    for budget in (0, 2, 23, 30, 80, 300, 620, 2000):
        values = dict(zip(layers, rng.random(len(layers)).tolist(), strict=True))
        values["head.bias"] = 0.0
        cost = {name: layer.numel + (16 if layer.kind == "norm_weight" else 0) for name, layer in layers.items()}
        subsets = itertools.chain.from_iterable(itertools.combinations(layers, k) for k in range(len(layers) + 1))
        best = max(sum(values[n] for n in s) for s in subsets if sum(cost[n] for n in s) <= budget)
        chosen, rates = baselines.auto_rgn(model, budget, values)
        assert numel(model, chosen) <= budget
        assert sum(values.get(name, 0.0) for name in chosen) == pytest.approx(best)
        # a weight's statistics come along, and nothing else's do
        for norm in ("bn1", "bn2"):
            assert (f"{norm}.running_stats" in chosen) == (f"{norm}.weight" in chosen)
        assert "up.weight" not in chosen
        assert "head.bias" not in chosen
        assert list(chosen) == [layer.name for layer in layers_of(model) if layer.name in chosen]
        trained = {name for name in chosen if not name.endswith("running_stats")}
        top = max((values[name] for name in trained), default=1.0)
        assert rates == pytest.approx({name: values[name] / top for name in trained})
        assert all(0 < rate <= 1 for rate in rates.values())


def test_auto_rgn_without_a_gradient_chooses_nothing(model: nn.Module) -> None:
    assert baselines.auto_rgn(model, 10**6, {"conv1.weight": 0.0, "head.bias": 0.0}) == ((), {})


# ── without training ─────────────────────────────────────────────────────────────────────────────────────────────


def batch_of(images: Iterable[Image]) -> Tensor:
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)


def test_statistics_are_the_mean_over_batches_of_each_batchs_own(model: nn.Module, pictures: Pictures) -> None:
    batches = [batch_of(pictures[0][:3]), batch_of(image[:16, :24] for image in pictures[0][3:8])]
    norm_1, norm_2 = model.get_submodule("bn1"), model.get_submodule("bn2")
    assert isinstance(norm_1, nn.BatchNorm2d)
    assert isinstance(norm_2, nn.BatchNorm2d)
    norm_1.momentum, norm_2.momentum = 0.3, None
    model.get_buffer("bn1.running_mean").fill_(17.0)
    with torch.no_grad():
        norm_1.weight.uniform_(0.5, 2.0)
        norm_1.bias.normal_()
    before = network_state(model)

    sums: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for batch in batches:
            x = NORMALISATION(batch)
            y = model.conv1(x)  # type: ignore[operator]
            inner = F.relu(F.batch_norm(y, None, None, norm_1.weight, norm_1.bias, training=True))
            z = model.conv2(inner)  # type: ignore[operator]
            sums.append((y.mean((0, 2, 3)), y.var((0, 2, 3)), z.mean((0, 2, 3)), z.var((0, 2, 3))))
    expected = [torch.stack(each).mean(0) for each in zip(*sums, strict=True)]

    reestimate_statistics(model, [Batch(images, None) for images in batches], NORMALISATION, "float32")
    found = [norm_1.running_mean, norm_1.running_var, norm_2.running_mean, norm_2.running_var]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    after = network_state(model)
    assert all(same_bits(before[name], after[name]) for name in before if "running" not in name)
    assert (norm_1.momentum, norm_2.momentum) == (0.3, None)
    assert not any(module.training for module in model.modules())


def test_what_the_statistics_were_before_does_not_matter(model: nn.Module, pictures: Pictures) -> None:
    reestimate_statistics(model, [Batch(batch_of(pictures[0]), None)], NORMALISATION, "float32")
    once = network_state(model)
    reestimate_statistics(model, [Batch(batch_of(pictures[0]), None)], NORMALISATION, "float32")
    assert all(same_bits(once[name], tensor) for name, tensor in network_state(model).items())


# ── what fine-tuning takes from a method ─────────────────────────────────────────────────────────────────────────


def tuned(model: nn.Module, images: Sequence[Image], labels: Sequence[Image], **options: object) -> dict[str, Tensor]:
    options = {"chosen": None, "seed": 7, "recipe": RECIPE} | options
    recipe = options.pop("recipe")
    start = network_state(model)
    fine_tune(SEGMENTATION, model, images, labels, recipe, NORMALISATION, "float32", **options)  # type: ignore[arg-type]
    result = network_state(model)
    model.load_state_dict(start)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != "up.weight")
    return result


WEIGHTS = ("conv1.weight", "bn1.weight", "bn1.bias", "head.weight", "head.bias")


def test_a_factor_of_0_moves_nothing(model: nn.Module, pictures: Pictures) -> None:
    before = network_state(model)
    still = tuned(model, *pictures, chosen=WEIGHTS, rates=dict.fromkeys(WEIGHTS, 0.0))
    assert all(same_bits(before[name], tensor) for name, tensor in still.items())
    partly = tuned(model, *pictures, chosen=WEIGHTS, rates={"conv1.weight": 0.0})
    moved = {name for name, tensor in partly.items() if not same_bits(before[name], tensor)}
    assert moved == {*WEIGHTS} - {"conv1.weight"}


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_factor_is_one_on_the_learning_rate(model: nn.Module, pictures: Pictures, schedule: str) -> None:
    recipe = RECIPE.model_copy(update={"schedule": schedule})
    halved = tuned(model, *pictures, recipe=recipe, rates={n: 0.5 for n, _ in model.named_parameters()})
    slower = tuned(model, *pictures, recipe=recipe.model_copy(update={"learning_rate": 0.05}))
    assert all(same_bits(slower[name], tensor) for name, tensor in halved.items())


def test_factors_are_by_name(model: nn.Module, pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[int, float]] = []
    real = sgd.sgd

    def spy(parameters: list[Tensor], *arguments: object, lr: float, **options: object) -> None:
        seen.append({id(parameter): lr for parameter in parameters})
        real(parameters, *arguments, lr=lr, **options)

    monkeypatch.setattr(sgd, "sgd", spy)
    tuned(model, *pictures, chosen=WEIGHTS, rates={"bn1.bias": 0.25, "head.bias": 0.5, "conv1.weight": 0.25})
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    factors = {"bn1.bias": 0.25, "head.bias": 0.5, "conv1.weight": 0.25, "bn1.weight": 1.0, "head.weight": 1.0}
    steps = [dict(ChainMap(*groups)) for groups in zip(*[iter(seen)] * 3, strict=True)]  # a call for each of the three factors
    for number, rates in enumerate(steps):
        expected = {name: 0.1 * (1 - number / 6) * factor for name, factor in factors.items()}
        assert {name_of[key]: rate for key, rate in rates.items()} == pytest.approx(expected)
    assert len(steps) == 6


def test_the_loss_is_what_is_minimised(model: nn.Module, pictures: Pictures) -> None:
    model.eval()
    calls: list[SimpleNamespace] = []

    def loss(forward: Forward, batch: Batch, seed: Sequence[int]) -> dict[str, LossTerm]:
        logits = forward(batch.images)
        assert batch.images.dtype == torch.uint8
        calls.append(SimpleNamespace(seed=tuple(seed), logits=logits.detach()))
        first = logits[:, 0]
        return {"first": LossTerm(first.sum(), torch.tensor(first.numel()))}

    recipe = RECIPE.model_copy(update={"weight_decay": 0.0})
    before = network_state(model)
    with torch.no_grad():
        batch = next(iter(training_batches(SEGMENTATION, *pictures, 4, (24, 24), (7, 0))))
        expected = model(NORMALISATION(batch.images))
    after = tuned(model, *pictures, recipe=recipe, chosen=("head.bias",), loss=loss)
    assert [call.seed for call in calls] == [(7, epoch, index, 0) for epoch in range(2) for index in range(3)]
    torch.testing.assert_close(calls[0].logits, expected)
    fallen = before["head.bias"] - after["head.bias"]
    assert fallen[0] > 0.1  # up.weight is 1: its gradient is 1 at every step
    assert torch.equal(fallen[1:], torch.zeros(2))


def test_without_a_loss_or_rates_it_is_the_plain_fine_tune(model: nn.Module, pictures: Pictures) -> None:
    plain = tuned(model, *pictures)
    named = tuned(model, *pictures, loss=lambda forward, batch, _: SEGMENTATION.losses(forward, batch), rates={})
    assert all(same_bits(plain[name], tensor) for name, tensor in named.items())


def test_a_fine_tune_on_a_mixture_learns_every_level(model: nn.Module, pictures: Pictures) -> None:
    images, labels = pictures
    darker = [image // 3 for image in images]
    smaller = [np.ascontiguousarray(image[::2, ::2]) for image in images]
    mixture = Mixture([images, darker, smaller], RECIPE.crop)
    recipe = RECIPE.model_copy(update={"epochs": 12})
    reports: list[int] = []
    run: Callable[[], dict[str, Tensor]] = lambda: tuned(  # noqa: E731
        model, mixture, labels, recipe=recipe, progress=lambda p: reports.append(p.step)
    )
    first, second = run(), run()
    assert all(same_bits(first[name], tensor) for name, tensor in second.items())
    assert reports[-1] == 36
    model.load_state_dict(first)
    model.eval()
    for level in mixture.levels:
        predictor = Predictor(model, NORMALISATION)
        (evidence,) = collect_evidence(SEGMENTATION, model, [predictor], level, labels, 3)
        assert score(SEGMENTATION, evidence) > 55
