"""Gradients of a level's loss at the base, for the importance functions first-order and fisher. Knows nothing of selection."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gearnn_ray.core.errors import TrainingFailedError
from gearnn_ray.models.layers import layers_of
from gearnn_ray.tasks.base import Image, Task, loss_of
from gearnn_ray.training.predict import Normalisation, Predictor
from gearnn_ray.training.sampling import crop_size, training_batches
from gearnn_ray.training.teacher import Teacher, teaching


@dataclass(frozen=True)
class Gradients:
    """Of the loss, by state-dict name, float32 on the CPU, each of its tensor's shape. mean: g, the mean of the images'
    gradients. square: F, the mean of their squares, which is the diagonal of the empirical Fisher information.
    """

    mean: dict[str, Tensor]
    square: dict[str, Tensor]


def gradients(
    task: Task,
    model: nn.Module,
    images: Sequence[Image],
    targets: Sequence[Any],
    normalisation: Normalisation,
    precision: str,
    crop: int,
    seed: int,
    teacher: Teacher | None = None,
) -> Gradients:
    """g and F of `model` in evaluation mode, over one pass of the images, one at a time, each cropped as in training.

    Every tensor of a layer has an entry. Zero are: what the network itself has frozen, buffers that training does not move, and
    all but the first name of a tied tensor, whose one gradient would count twice otherwise. torch has no gradient for running
    statistics. In evaluation mode y = γ·(x - μ)/√(σ² + ε) + β, so for one image dL/dμ = -γ/√(σ² + ε)·dL/dβ and
    dL/dσ² = -γ/(2(σ² + ε))·dL/dγ: zero where γ is. A normalisation without γ or β is lent a constant one; where two share theirs,
    each has the statistics' gradients of both together.

    Two float32 copies of the network are held. Weights, modes, gradients and what is frozen are left as found. Raises
    TrainingFailedError when a gradient is not finite.
    """
    device = next(model.parameters()).device
    forward = Predictor(model, normalisation, precision)
    model.to(memory_format=torch.channels_last)
    modes = {module: module.training for module in model.modules()}
    found = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    lent: list[tuple[nn.Module, str]] = []
    handles = []
    # a tensor's gradient is a constant factor times that of the parameter it is listed under
    sources: dict[Tensor, list[tuple[str, Tensor | float]]] = {
        parameter: [(name, 1.0)] for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    try:
        model.eval()
        for path, module in model.named_modules():
            if not isinstance(module, _NormBase) or module.running_mean is None or module.running_var is None:
                continue
            for leaf, value in (("weight", 1.0), ("bias", 0.0)):
                if getattr(module, leaf) is None:
                    setattr(module, leaf, nn.Parameter(torch.full_like(module.running_mean, value)))
                    lent.append((module, leaf))
            weight, variance = module.weight.detach(), module.running_var + module.eps
            prefix = f"{path}." if path else ""
            sources.setdefault(module.bias, []).append((f"{prefix}running_mean", -weight * variance.rsqrt()))
            sources.setdefault(module.weight, []).append((f"{prefix}running_var", -weight / (2 * variance)))
        state = model.state_dict()
        moved = [name for listed in sources.values() for name, _ in listed]
        mean, square = ({name: torch.zeros(state[name].shape, device=device) for name in moved} for _ in range(2))

        def take(parameter: Tensor) -> None:
            """Add one image's gradient and free it, so that no third copy of the network is ever held."""
            gradient = parameter.grad
            assert gradient is not None
            for name, factor in sources[parameter]:
                one = gradient * factor
                mean[name].add_(one, alpha=1 / len(images))
                square[name].addcmul_(one, one, value=1 / len(images))
            parameter.grad = None

        for parameter in sources:
            parameter.requires_grad_(True)
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
        sides, undistorted = crop_size(task, images, crop), None if teacher is None else teacher.images
        teach = teaching(teacher)
        for batch in training_batches(task, images, targets, 1, sides, (seed, 0), undistorted=undistorted):
            loss_of(task.losses(forward, teach(batch.to(device)))).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        for module, leaf in lent:
            setattr(module, leaf, None)
        for parameter, (trainable, gradient) in found.items():
            parameter.requires_grad_(trainable)
            parameter.grad = gradient
        for module, training in modes.items():
            module.training = training
    return Gradients(*(_of_every_tensor(model, taken) for taken in (mean, square)))


def _of_every_tensor(model: nn.Module, taken: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the order of layers, with zeros (which take no memory) for what was not taken."""
    state = model.state_dict()
    for name, tensor in taken.items():
        if not torch.isfinite(tensor).all():
            raise TrainingFailedError(
                f"the loss's gradient in {name} holds values that are not finite: try float32, or a value that needs no gradients"
            )
    names = [name for layer in layers_of(model) for name in layer.tensors]
    zero = torch.zeros(())
    return {name: taken[name].cpu() if name in taken else zero.expand(state[name].shape) for name in names}
