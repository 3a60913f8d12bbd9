"""One function fine-tunes: what moves, what must not, and that a killed one goes on to the same bits."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from gearnn_ray.adaptors.adaptor import take_adaptor
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.core.errors import TrainingFailedError
from gearnn_ray.models.layers import network_state, same_bits
from gearnn_ray.models.registry import build_model
from gearnn_ray.tasks.segmentation import Image
from gearnn_ray.training.trainer import Progress, evaluate, fine_tune, resolve_precision
from tests.conftest import NORMALISATION

RECIPE = Recipe(epochs=3, learning_rate=0.1, batch_size=4, crop=24, precision="float32")


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
    options = {"chosen": None, "seed": 7, "recipe": RECIPE} | options
    recipe = options.pop("recipe")
    fine_tune(model, *pictures, recipe, NORMALISATION, **options)  # type: ignore[arg-type]
    return network_state(model)


def test_it_learns(model: nn.Module, pictures: tuple[list[Image], list[Image]]) -> None:
    before = evaluate(model, *pictures, NORMALISATION, "float32")
    tune(model, pictures, recipe=RECIPE.model_copy(update={"epochs": 12}))
    assert evaluate(model, *pictures, NORMALISATION, "float32") > max(60.0, before + 20)


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
        other, *pictures, recipe, NORMALISATION, chosen=chosen, seed=7, checkpoint=Memory(dying.data)
    )  # fmt: skip
    assert outcome.epochs_run == RECIPE.epochs - epochs_before
    assert all(same_bits(undisturbed[name], tensor) for name, tensor in network_state(other).items())


@pytest.mark.parametrize(("averaged", "steps"), [(1.0, 9), (0.5, 4), (0.1, 1)])
def test_the_last_steps_weights_are_averaged(
    model: nn.Module,
    pictures: tuple[list[Image], list[Image]],
    averaged: float,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    real = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *arguments: object) -> object:
        result = real(self, *arguments)  # type: ignore[arg-type]
        seen.append(model.get_parameter("conv1.weight").detach().double().clone())
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    tuned = tune(model, pictures, recipe=RECIPE.model_copy(update={"averaged": averaged}), chosen=("conv1.weight",))
    torch.testing.assert_close(tuned["conv1.weight"].double(), torch.stack(seen[-steps:]).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epochs", [0.1, 1.0, 1.67, 3.0, 9.0])
def test_stopped_early_it_is_the_same_fine_tune_so_far(
    model: nn.Module, pictures: tuple[list[Image], list[Image]], epochs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, seen = network_state(model), list[Tensor]()
    real = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *arguments: object) -> object:
        result = real(self, *arguments)  # type: ignore[arg-type]
        seen.append(model.get_parameter("conv1.weight").detach().clone())
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    tune(model, pictures)
    whole = list(seen)
    model.load_state_dict(start)
    seen.clear()
    reports: list[Progress] = []
    tuned = tune(model, pictures, stop_after=epochs, progress=reports.append)
    steps = min(9, max(1, round(3 * epochs)))
    assert len(seen) == steps == reports[-1].step == reports[-1].steps
    assert same_bits(tuned["conv1.weight"], whole[steps - 1])


def test_what_a_recipe_gained_later_changes_no_key_until_it_is_used() -> None:
    before = {
        "epochs": 4, "learning_rate": 0.01, "schedule": "linear", "batch_size": 8, "crop": 208, "momentum": 0.9,
        "weight_decay": 1e-4, "precision": "auto",
    }  # fmt: skip
    assert Recipe().inputs() == before
    assert Recipe(averaged=0.5).inputs() == before | {"averaged": 0.5}


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
    real = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *arguments: object) -> object:
        seen.append(self.param_groups[0]["lr"])
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.SGD, "step", step)
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
    fine_tune(model, *pictures, RECIPE, NORMALISATION, chosen=None, seed=0, progress=reports.append)
    assert [r.step for r in reports][-1] == reports[0].steps == 9
    assert {r.epoch for r in reports} == {0, 1, 2}
    assert all(0 < r.loss < 10 for r in reports)


def test_precision_is_what_was_asked_or_what_the_processor_gains_from() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("float32", cpu) == "float32"
    assert resolve_precision("bfloat16", cpu) == "bfloat16"
    expected = "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"
    assert resolve_precision("auto", cpu) == expected


def test_bfloat16_learns_the_same_thing(model: nn.Module, pictures: tuple[list[Image], list[Image]]) -> None:
    start = network_state(model)
    in_float32 = tune(model, pictures)
    model.load_state_dict(start)
    in_bfloat16 = tune(model, pictures, recipe=RECIPE.model_copy(update={"precision": "bfloat16"}))
    moved = (in_float32["conv1.weight"] - start["conv1.weight"]).norm()
    assert (in_float32["conv1.weight"] - in_bfloat16["conv1.weight"]).norm() < 0.3 * moved
    assert in_bfloat16["conv1.weight"].dtype == torch.float32


def _one_of_two(rank: int, address: str, out: str, pictures: tuple[list[Image], list[Image]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = build_model("tests.nets:small", num_classes=3)
    state = tune(model, pictures, chosen=("conv1.weight", "head.weight", "head.bias"))
    torch.save(state, f"{out}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_share_each_batch_and_agree_with_one(
    tmp_path: Path, model: nn.Module, pictures: tuple[list[Image], list[Image]]
) -> None:
    """With statistics frozen and equally many labelled pixels, the mean of two halves' gradients is the whole batch's."""
    images, labels = pictures
    labels = [label % 3 for label in labels]
    mp.spawn(_one_of_two, (str(tmp_path / "meet"), str(tmp_path / "state"), (images, labels)), nprocs=2)
    alone = tune(model, (images, labels), chosen=("conv1.weight", "head.weight", "head.bias"))
    zero, one = (torch.load(tmp_path / f"state-{rank}.pt") for rank in (0, 1))
    for name, tensor in alone.items():
        assert same_bits(zero[name], one[name])
        torch.testing.assert_close(zero[name], tensor, rtol=1e-3, atol=1e-5)
