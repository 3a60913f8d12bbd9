"""Steps of `Sgd` have the bits of `torch.optim.SGD`, without the import of torch's compiler."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.models.layers import same_bits
from gearnn_ray.training.sgd import Sgd
from tests.conftest import ROOT


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_steps_have_the_bits_of_torchs_class(momentum: float, weight_decay: float, layout: torch.memory_format) -> None:
    recipe = Recipe(momentum=momentum, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(5, 7, 3, 3, generator=generator).to(memory_format=layout) for name in "abcd"}
    ours = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    theirs = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    optimizer = Sgd(list(ours.items()), recipe, {"b": 0.25, "d": 0.25})
    groups = [{"params": [theirs[name] for name in names], "rate": rate} for names, rate in (("ac", 1.0), ("bd", 0.25))]
    expected = torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=True)
    for step in range(5):
        for name in "abc":  # no loss reaches d
            gradient = torch.randn(5, 7, 3, 3, generator=generator)
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        for group in expected.param_groups:
            group["lr"] = 0.1 / (step + 1) * group["rate"]
        optimizer.step(0.1 / (step + 1))
        expected.step()
        assert all(same_bits(ours[name].detach(), theirs[name].detach()) for name in start)
    assert same_bits(ours["d"].detach(), start["d"])


def test_a_parameter_that_a_loss_reaches_late_is_moved() -> None:
    early, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Sgd([("early", early), ("late", late)], Recipe(weight_decay=0, momentum=0.5), {})
    for parameters in ([early], [early, late], [early, late]):
        for parameter in parameters:
            parameter.grad = torch.ones(3)
        optimizer.step(0.25)
    assert late.tolist() == [1 - 0.25 * (1 + 1.5)] * 3
    assert early.tolist() == [1 - 0.25 * (1 + 1.5 + 1.75)] * 3


def test_a_worker_that_trains_does_not_import_torchs_compiler() -> None:
    script = """
import sys, numpy
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline import level_run
from gearnn_ray.tasks import task_by_name
from gearnn_ray.training.predict import Normalisation
from gearnn_ray.training.trainer import fine_tune
images, labels = [numpy.zeros((32, 32, 3), numpy.uint8)] * 2, [numpy.zeros((32, 32), numpy.uint8)] * 2
scale, model = Normalisation((0.4,) * 3, (0.3,) * 3), build_model("tests.nets:small", num_classes=3)
recipe = Recipe(epochs=1, batch_size=2, crop=32)
fine_tune(task_by_name("segmentation"), model, images, labels, recipe, scale, "bfloat16", chosen=None, seed=0)
print([name for name in ("torch._dynamo", "torchvision") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
