"""The loss's gradients at the base, against autograd through a normalisation written out in float64, and finite differences."""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearnn_ray.core.errors import TrainingFailedError
from gearnn_ray.data.dataset import IGNORED
from gearnn_ray.models.layers import layers_of, network_state, same_bits
from gearnn_ray.models.registry import build_model
from gearnn_ray.tasks.base import Image
from gearnn_ray.training.gradients import Gradients, gradients
from gearnn_ray.training.sampling import training_batches
from tests.conftest import NORMALISATION, SEGMENTATION

Pictures = tuple[list[Image], list[Image]]


def network(name: str) -> nn.Module:
    """With statistics and normalisation weights that are nobody's defaults."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.2, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.5)
                nn.init.normal_(module.bias)
    return model


def taken(model: nn.Module, pictures: Pictures, seed: int = 5) -> Gradients:
    return gradients(SEGMENTATION, model, *pictures, NORMALISATION, "float32", 24, seed)


def batches(pictures: Pictures) -> list[tuple[Tensor, Tensor]]:
    """The pass of seed 5, images normalised in float64."""
    drawn = training_batches(SEGMENTATION, *pictures, 1, (24, 24), (5, 0))
    return [(NORMALISATION(batch.images).double(), batch.targets) for batch in drawn]


def loss_at(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss in float64, to which the task's own is rounded."""
    logits = F.interpolate(model(x), size=y.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, y, ignore_index=IGNORED)


def written_out(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, *_: object) -> Tensor:
    shape = (-1, *[1] * (x.dim() - 2))
    y = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
    return y if weight is None or bias is None else y * weight.view(shape) + bias.view(shape)


def by_autograd(model: nn.Module, pictures: Pictures) -> list[dict[str, Tensor]]:
    """Every image's gradient, of every floating-point tensor that matters; F.batch_norm must be `written_out`."""
    copy = deepcopy(model).double().eval()
    state = copy.state_dict(keep_vars=True)
    tensors = {name: t.requires_grad_() for name, t in state.items() if t.is_floating_point()}
    losses = [loss_at(copy, x, y) for x, y in batches(pictures)]
    found = [torch.autograd.grad(loss, list(tensors.values()), allow_unused=True) for loss in losses]
    return [{n: torch.zeros(()) if g is None else g for n, g in zip(tensors, one, strict=True)} for one in found]


@pytest.mark.parametrize("name", ["tests.nets:small", "tests.zoo:zoo"])
def test_against_autograd_through_a_normalisation_written_out(
    name: str, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = pictures[0][:4], pictures[1][:4]
    model = network(name)
    found = taken(model, pictures)
    monkeypatch.setattr(F, "batch_norm", written_out)
    each = by_autograd(model, pictures)
    names = [tensor for layer in layers_of(model) for tensor in layer.tensors]
    assert list(found.mean) == list(found.square) == names
    for tensor in names:
        g, f = found.mean[tensor], found.square[tensor]
        assert g.shape == f.shape == model.state_dict()[tensor].shape
        assert g.dtype == f.dtype == torch.float32
        if tensor.startswith(("up.", "frozen.")) and not model.state_dict(keep_vars=True)[tensor].requires_grad:
            assert not g.any()
            assert not f.any()
            continue
        mean = sum(one[tensor] for one in each) / 4
        square = sum(one[tensor].square() for one in each) / 4
        scale = float(square.max().sqrt())
        torch.testing.assert_close(g.double(), mean, rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(f.double(), square, rtol=2e-3, atol=1e-4 * scale**2)
    statistics = [n for n in names if "running" in n and not n.startswith("frozen.")]
    assert len(statistics) >= 4
    assert all(found.mean[n].any() and found.square[n].any() for n in statistics)


def test_the_loss_changes_as_predicted(pictures: Pictures) -> None:
    """Along random directions of each kind, by finite differences in float64, through torch's own kernels."""
    model = network("tests.nets:small")
    found = taken(model, pictures)
    copy = deepcopy(model).double().eval()
    given = batches(pictures)

    def loss() -> float:
        with torch.no_grad():
            return float(np.mean([float(loss_at(copy, x, y)) for x, y in given]))

    generator = torch.Generator().manual_seed(1)
    state = copy.state_dict()
    for names in (["conv1.weight"], ["bn1.running_mean"], ["bn1.running_var"], ["bn2.weight", "bn2.running_var"]):
        steps = {n: torch.randn(state[n].shape, generator=generator, dtype=torch.float64) * 1e-5 for n in names}
        predicted = sum(float((found.mean[n].double() * step).sum()) for n, step in steps.items())
        losses = []
        for sign in (1, -2):
            for n, step in steps.items():
                state[n].add_(step, alpha=sign)
            losses.append(loss())
        for n, step in steps.items():
            state[n].add_(step)
        assert (losses[0] - losses[1]) / 2 == pytest.approx(predicted, rel=1e-3)


def test_everything_is_left_as_found(pictures: Pictures) -> None:
    model = network("tests.zoo:zoo")
    model.train()
    model.bn.eval()
    model.bn.weight.requires_grad_(False)
    model.head.bias.grad = kept = torch.ones(3)
    before = network_state(model)

    def modes() -> Sequence[object]:
        parameters = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
        return [*((name, m.training) for name, m in model.named_modules()), *parameters]

    expected = modes()
    found = taken(model, pictures)
    assert modes() == expected
    assert model.head.bias.grad is kept
    assert bool((kept == 1).all())
    assert model.plain_bn.weight is None
    assert model.plain_bn.bias is None
    assert all(same_bits(before[name], tensor) for name, tensor in network_state(model).items())
    again = taken(model, pictures)  # nothing hangs on to the parameters
    assert all(same_bits(tensor, again.mean[name]) for name, tensor in found.mean.items())
    assert any(not same_bits(tensor, taken(model, pictures, 6).mean[name]) for name, tensor in found.mean.items())


def test_frozen_weights_have_none_but_their_statistics_do(pictures: Pictures) -> None:
    model = network("tests.nets:small")
    free = taken(model, pictures)
    model.bn1.weight.requires_grad_(False)
    model.bn1.bias.requires_grad_(False)
    found = taken(model, pictures)
    for name in ("bn1.weight", "bn1.bias", "up.weight"):
        assert not found.mean[name].any()
        assert not found.square[name].any()
    for name in ("bn1.running_mean", "bn1.running_var", "conv1.weight"):
        torch.testing.assert_close(found.mean[name], free.mean[name])


def test_what_a_weight_of_zero_hides_has_none(pictures: Pictures) -> None:
    model = network("tests.nets:small")
    with torch.no_grad():
        model.bn1.weight[2] = 0
        model.bn1.bias[2] = 1  # the ReLU behind it lets it pass
    found = taken(model, pictures)
    for name in ("bn1.running_mean", "bn1.running_var"):
        assert found.mean[name][2] == found.square[name][2] == 0
        assert found.mean[name][3] != 0
    assert found.mean["bn1.weight"][2] != 0


def test_a_tied_tensor_is_counted_once(pictures: Pictures) -> None:
    model = network("tests.zoo:tied_names")
    found = taken(model, pictures)
    assert found.mean["middle.backbone.0.weight"].any()
    assert found.mean["middle.layer.weight"].shape == (8, 8, 3, 3)
    assert not found.mean["middle.layer.weight"].any()


def test_a_loss_that_is_not_finite_is_refused(pictures: Pictures) -> None:
    model = network("tests.nets:small")
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(TrainingFailedError, match=r"the loss's gradient in .* not finite: try float32"):
        taken(model, pictures)
    assert all(parameter.grad is None for parameter in model.parameters())
