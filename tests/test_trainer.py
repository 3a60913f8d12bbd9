"""One function fine-tunes: what moves, what must not, and that a killed one goes on to the same bits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from gearnn_ray.adaptors.adaptor import take_adaptor
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.core.errors import TrainingFailedError
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.models.layers import network_state, same_bits
from gearnn_ray.models.registry import build_model
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import Image, score
from gearnn_ray.training import trainer
from gearnn_ray.training.precision import fastest_precision
from gearnn_ray.training.predict import Predictor, collect_evidence
from gearnn_ray.training.sgd import Sgd
from gearnn_ray.training.trainer import Progress, fine_tune
from tests.conftest import NORMALISATION, SEGMENTATION

RECIPE = Recipe(epochs=3, learning_rate=0.1, batch_size=4, crop=24)


class Memory:
    """A checkpoint that remembers each save, and can be told to die after one."""

    def __init__(self, data: bytes | None = None, die_after: int = 10**9) -> None:
        self.data, self.saves, self.die_after = data, 0, die_after

    def load(self) -> bytes | None:
        return self.data

    def save(self, data: bytes) -> None:
        self.data, self.saves = data, self.saves + 1
        if self.saves >= self.die_after:
            raise KeyboardInterrupt


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("tests.nets:small", num_classes=3)


def tune(model: nn.Module, pictures: tuple[list[Image], list[Image]], **options: object) -> dict[str, Tensor]:
    options = {"chosen": None, "seed": 7, "recipe": RECIPE, "precision": "float32"} | options
    recipe, precision = options.pop("recipe"), options.pop("precision")
    fine_tune(SEGMENTATION, model, *pictures, recipe, NORMALISATION, precision, **options)  # type: ignore[arg-type]
    return network_state(model)


def miou(model: nn.Module, pictures: tuple[list[Image], list[Image]]) -> float:
    predictor = Predictor(model, NORMALISATION)
    return score(SEGMENTATION, collect_evidence(SEGMENTATION, model, [predictor], *pictures, 3)[0])


def test_it_learns(model: nn.Module, pictures: tuple[list[Image], list[Image]]) -> None:
    before = miou(model, pictures)
    tune(model, pictures, recipe=RECIPE.model_copy(update={"epochs": 12}))
    assert miou(model, pictures) > max(60.0, before + 20)


@pytest.mark.parametrize("chosen", [("conv1.weight", "bn2.running_stats"), ("bn1.weight", "bn1.bias"), ("head.bias",)])
def test_only_the_chosen_layers_move(
    model: nn.Module, pictures: tuple[list[Image], list[Image]], chosen: tuple[str, ...]
) -> None:
    base = network_state(model)
    tuned = tune(model, pictures, chosen=chosen)
    adaptor = take_adaptor(model, base, chosen)  # refuses when anything else moved
    assert all(not same_bits(base[name], tuned[name]) for name in adaptor)


def test_statistics_alone_are_re_estimated_without_a_gradient(
    model: nn.Module, pictures: tuple[list[Image], list[Image]]
) -> None:
    base = network_state(model)
    tune(model, pictures, chosen=("bn1.running_stats",))
    assert take_adaptor(model, base, ("bn1.running_stats",)).keys() == {"bn1.running_mean", "bn1.running_var"}
    assert not same_bits(base["bn1.running_mean"], network_state(model)["bn1.running_mean"])


@pytest.mark.parametrize("chosen", [None, ("conv1.weight", "bn2.running_stats", "head.bias")])
@pytest.mark.parametrize(("epochs_before", "averaged"), [(1, 0), (2, 0), (1, 1), (2, 0.5)])
def test_resumed_ends_with_the_same_bits(
    model: nn.Module,
    pictures: tuple[list[Image], list[Image]],
    chosen: tuple[str, ...] | None,
    epochs_before: int,
    averaged: float,
) -> None:
    recipe = RECIPE.model_copy(update={"averaged": averaged})
    start = network_state(model)
    undisturbed = tune(model, pictures, recipe=recipe, chosen=chosen)
    model.load_state_dict(start)
    dying = Memory(die_after=epochs_before)
    with pytest.raises(KeyboardInterrupt):
        tune(model, pictures, recipe=recipe, chosen=chosen, checkpoint=dying)
    other = build_model("tests.nets:small", num_classes=3)
    other.load_state_dict(start)
    outcome = fine_tune(
        SEGMENTATION, other, *pictures, recipe, NORMALISATION, "float32", chosen=chosen, seed=7,
        checkpoint=Memory(dying.data),
    )  # fmt: skip
    assert outcome.epochs_run == RECIPE.epochs - epochs_before
    assert all(same_bits(undisturbed[name], tensor) for name, tensor in network_state(other).items())


@pytest.mark.parametrize(("averaged", "steps"), [(1.0, 9), (0.5, 4), (0.1, 1)])
def test_the_last_steps_weights_are_averaged(
    model: nn.Module, pictures: tuple[list[Image], list[Image]], averaged: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    real = Sgd.step

    def step(self: Sgd, learning_rate: float) -> None:
        real(self, learning_rate)
        seen.append(model.get_parameter("conv1.weight").detach().double().clone())

    monkeypatch.setattr(Sgd, "step", step)
    tuned = tune(model, pictures, recipe=RECIPE.model_copy(update={"averaged": averaged}), chosen=("conv1.weight",))
    torch.testing.assert_close(tuned["conv1.weight"].double(), torch.stack(seen[-steps:]).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epochs", [0.1, 1.0, 1.67, 3.0, 9.0])
def test_stopped_early_it_is_the_same_fine_tune_so_far(
    model: nn.Module, pictures: tuple[list[Image], list[Image]], epochs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, seen = network_state(model), list[Tensor]()
    real = Sgd.step

    def step(self: Sgd, learning_rate: float) -> None:
        real(self, learning_rate)
        seen.append(model.get_parameter("conv1.weight").detach().clone())

    monkeypatch.setattr(Sgd, "step", step)
    tune(model, pictures)
    whole = list(seen)
    model.load_state_dict(start)
    seen.clear()
    reports: list[Progress] = []
    tuned = tune(model, pictures, stop_after=epochs, progress=reports.append)
    steps = min(9, max(1, round(3 * epochs)))
    assert len(seen) == steps == reports[-1].step == reports[-1].steps
    assert same_bits(tuned["conv1.weight"], whole[steps - 1])


def test_a_torn_checkpoint_begins_again(model: nn.Module, pictures: tuple[list[Image], list[Image]]) -> None:
    start = network_state(model)
    undisturbed = tune(model, pictures)
    for junk in (b"", b"\x00" * 100, b"\xff" * 7):
        model.load_state_dict(start)
        again = tune(model, pictures, checkpoint=Memory(junk))
        assert all(same_bits(undisturbed[name], tensor) for name, tensor in again.items())


def test_the_seed_decides(model: nn.Module, pictures: tuple[list[Image], list[Image]]) -> None:
    start = network_state(model)
    first = tune(model, pictures, seed=1)
    model.load_state_dict(start)
    second = tune(model, pictures, seed=2)
    assert not same_bits(first["conv1.weight"], second["conv1.weight"])


def test_learning_rate_falls_to_zero_or_stays(
    model: nn.Module, pictures: tuple[list[Image], list[Image]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    real = Sgd.step

    def step(self: Sgd, learning_rate: float) -> None:
        seen.append(learning_rate)
        real(self, learning_rate)

    monkeypatch.setattr(Sgd, "step", step)
    tune(model, pictures)
    assert seen == pytest.approx([0.1 * (1 - i / 9) for i in range(9)])
    seen.clear()
    tune(model, pictures, recipe=RECIPE.model_copy(update={"schedule": "constant"}))
    assert seen == [0.1] * 9


def test_a_loss_that_is_not_finite_fails(model: nn.Module, pictures: tuple[list[Image], list[Image]]) -> None:
    with pytest.raises(TrainingFailedError, match="try a learning rate below 1e\\+20"):
        tune(model, pictures, recipe=RECIPE.model_copy(update={"learning_rate": 1e20}))


def test_weights_that_are_not_finite_fail(model: nn.Module, pictures: tuple[list[Image], list[Image]]) -> None:
    """A parameter the loss does not depend on can go astray without the loss noticing."""
    model.register_buffer("unused", torch.tensor([float("inf")]))
    with pytest.raises(TrainingFailedError, match="unused holds values that are not finite"):
        tune(model, pictures)


def test_it_reports_its_progress(model: nn.Module, pictures: tuple[list[Image], list[Image]]) -> None:
    reports: list[Progress] = []
    tune(model, pictures, seed=0, progress=reports.append)
    assert [r.step for r in reports][-1] == reports[0].steps == 9
    assert {r.epoch for r in reports} == {0, 1, 2}
    assert all(0 < r.loss < 10 for r in reports)


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "expected"),
    [(True, True, "bfloat16"), (False, True, "bfloat16"), (True, False, "bfloat16"), (False, False, "float32")],
)
def test_the_fastest_precision_is_bfloat16_where_the_cpu_multiplies_in_it(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert fastest_precision(torch.device("cpu")) == expected


def test_bfloat16_learns_the_same_thing(model: nn.Module, pictures: tuple[list[Image], list[Image]]) -> None:
    start = network_state(model)
    in_float32 = tune(model, pictures)
    model.load_state_dict(start)
    in_bfloat16 = tune(model, pictures, precision="bfloat16")
    moved = (in_float32["conv1.weight"] - start["conv1.weight"]).norm()
    assert (in_float32["conv1.weight"] - in_bfloat16["conv1.weight"]).norm() < 0.3 * moved
    assert in_bfloat16["conv1.weight"].dtype == torch.float32


# ── networks with dropout, unused parameters, auxiliary heads ────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["with_dropout", "with_auxiliary_head"])
def test_networks_that_draw_numbers_or_leave_weights_unused_resume_to_the_same_bits(
    name: str, pictures: tuple[list[Image], list[Image]]
) -> None:
    """An auxiliary head that no loss reaches has no momentum; dropout draws from torch's generator, seeded for every step."""
    torch.manual_seed(0)
    model = build_model(f"tests.nets:{name}", num_classes=3)
    start = network_state(model)
    undisturbed = tune(model, pictures)
    model.load_state_dict(start)
    torch.manual_seed(99)  # what was drawn before does not matter
    assert all(same_bits(undisturbed[n], tensor) for n, tensor in tune(model, pictures).items())
    model.load_state_dict(start)
    dying = Memory(die_after=2)
    with pytest.raises(KeyboardInterrupt):
        tune(model, pictures, checkpoint=dying)
    model.load_state_dict(start)
    torch.manual_seed(5)
    resumed = tune(model, pictures, checkpoint=Memory(dying.data))
    assert all(same_bits(undisturbed[n], tensor) for n, tensor in resumed.items())
    if name == "with_auxiliary_head":
        assert same_bits(resumed["auxiliary.weight"], start["auxiliary.weight"])
    else:
        model.load_state_dict(start)
        other = tune(model, pictures, seed=8)
        assert not same_bits(other["conv1.weight"], undisturbed["conv1.weight"])


# ── several workers ──────────────────────────────────────────────────────────────────────────────────────────────


CHOSEN = ("conv1.weight", "head.weight", "head.bias")


NETWORKS = ("tests.nets:small", "tests.nets:with_auxiliary_head")


def tune_detector(checkpoint: Memory | None = None) -> dict[str, Tensor]:
    """A detector on four scenes, of which one has no object at all."""
    data = open_dataset("scenes", task="detection", train=4, val=1, height=48, width=64)
    images, targets = ([part(index) for index in range(4)] for part in (data.train.image, data.train.target))
    nothing = np.zeros(len(targets[0]), np.bool_)
    targets[0] = replace(
        targets[0], boxes=targets[0].boxes[nothing], labels=targets[0].labels[nothing], areas=targets[0].areas[nothing],
        crowd=targets[0].crowd[nothing], rles=(),
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model("tests.nets:tiny_detector", num_classes=2)
    recipe = Recipe(epochs=3, learning_rate=0.01, batch_size=4, crop=64)
    fine_tune(
        task_by_name("detection"), model, images, targets, recipe, NORMALISATION, "float32", chosen=CHOSEN, seed=2,
        checkpoint=checkpoint,
    )  # fmt: skip
    return network_state(model)


def _undisturbed(_: int, rank: int, folder: Path, pictures: tuple[list[Image], list[Image]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    try:
        for name in NETWORKS:
            torch.manual_seed(0)
            model = build_model(name, num_classes=3)
            torch.save(tune(model, pictures, chosen=CHOSEN, checkpoint=Memory()), folder / f"{name}-{rank}.pt")
        torch.save(tune_detector(Memory()), folder / f"detector-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_workers_share_each_batch_and_agree_with_one(tmp_path: Path, pictures: tuple[list[Image], list[Image]]) -> None:
    """The loss is a sum over the labelled pixels of all workers: it does not matter that one image has far fewer of them."""
    images, labels = pictures
    labels = [label.copy() for label in labels]
    for label in labels[::3]:
        label[4:] = 255
    # this process is one of the two: another would have to import torch first
    other = mp.spawn(_undisturbed, (1, tmp_path, (images, labels)), join=False)
    _undisturbed(0, 0, tmp_path, (images, labels))
    assert other.join()
    for name in NETWORKS:
        torch.manual_seed(0)
        alone = tune(build_model(name, num_classes=3), (images, labels), chosen=CHOSEN)
        zero, one = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        for tensor_name, tensor in alone.items():
            assert same_bits(zero[tensor_name], one[tensor_name])
            torch.testing.assert_close(zero[tensor_name], tensor, rtol=1e-3, atol=1e-5)
    detector, zero = tune_detector(), torch.load(tmp_path / "detector-0.pt")
    torch.manual_seed(0)
    start = network_state(build_model("tests.nets:tiny_detector", num_classes=2))
    assert not torch.allclose(detector["head.weight"], start["head.weight"], atol=1e-3)
    for tensor_name, tensor in detector.items():
        torch.testing.assert_close(zero[tensor_name], tensor, rtol=1e-3, atol=1e-5)


def test_the_learning_rate_rises_before_it_falls() -> None:
    recipe = Recipe(learning_rate=1.0, warm_up=3)
    assert [trainer._learning_rate(recipe, step, 10) for step in range(5)] == pytest.approx([0.25, 0.45, 0.6, 0.7, 0.6])
    constant = recipe.model_copy(update={"schedule": "constant"})
    assert [trainer._learning_rate(constant, step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_long_gradient_is_scaled_down(pictures: tuple[list[Image], list[Image]]) -> None:
    """One step of plain SGD moves the trained weights by at most learning rate · clip, along the whole gradient."""

    def moved(clip: float | None) -> Tensor:
        torch.manual_seed(0)
        model = build_model("tests.nets:small", num_classes=3)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        recipe = Recipe(epochs=1, batch_size=12, learning_rate=0.5, momentum=0, weight_decay=0, crop=24, clip=clip)
        fine_tune(SEGMENTATION, model, *pictures, recipe, NORMALISATION, "float32", chosen=None, seed=1)
        return torch.cat([(parameter - before[name]).flatten() for name, parameter in model.named_parameters()])

    free, held = moved(None), moved(0.01)
    assert float(free.norm()) > 0.005 * 1.1
    assert float(held.norm()) == pytest.approx(0.005, rel=1e-4)
    assert torch.allclose(held / held.norm(), free / free.norm(), atol=1e-4)
