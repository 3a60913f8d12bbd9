"""The methods that GearNN is compared with: which layers each of them trains, and with which loss.

Functions of networks, images and tensors. Knows nothing of Ray, the store, or how often a method is trained.

- mixed training: one network for all levels, every image of a batch at a random level (§5 of the paper)
- stability training: Zheng et al., "Improving the Robustness of Deep Neural Networks via Stability Training", CVPR 2016
- AdaBN: Li et al., "Revisiting Batch Normalization for Practical Domain Adaptation", 2016
- surgical first block, Auto-RGN: Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", ICLR 2023
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from gearnn_ray.models.layers import Layer, layers_of, statistics_of
from gearnn_ray.offline.selection import select
from gearnn_ray.tasks.base import Batch, Forward, Image, LossTerm, Task, loss_of
from gearnn_ray.training.predict import Normalisation, Predictor, for_inference
from gearnn_ray.training.sampling import crop_size, training_batches
from gearnn_ray.training.teacher import Teacher, teaching
from gearnn_ray.training.trainer import Loss

TITLES: dict[str, str] = {
    "original": "original",
    "original-scaled": "original at training size",
    "switching": "DNN switching",
    "mixed": "mixed training",
    "stability": "stability training",
    "gearnn": "GearNN adaptors",
    "gearnn-released": "GearNN, as released",
    "clean-tuned": "original, fine-tuned on clean",
    "bn-statistics": "BatchNorm re-estimated (AdaBN)",
    "bn-tuned": "BatchNorm fine-tuned",
    "first-block": "surgical first block",
    "auto-rgn": "Auto-RGN",
    "random": "random layers",
    "gearnn-nearest": "nearest adaptor",
    "gearnn-interpolated": "interpolated adaptors",
    "gearnn-entropy": "adaptors mixed by entropy",
}
"""The title of each method in tables and figures, in their order."""

CONSTANT = ("original", "original-scaled", "mixed", "stability", "clean-tuned")
"""Methods with one set of weights for all levels. The others have one per level, and are the base itself at `clean`."""


def tuning_images(count: int) -> int:
    """The number of training images, the last ones in order, that are held back while learning rates are chosen: a fifth."""
    return max(1, count // 5)


def stability_loss(task: Task, alpha: float, sigma: float) -> Loss:
    """The loss of stability training (Zheng et al. 2016): the task's, plus `alpha` times the distance to noisy images' answers.

    sigma: standard deviation of the Gaussian perturbation, in units where a pixel's range is [0, 1].
    """

    def loss(forward: Forward, batch: Batch, seed: Sequence[int]) -> dict[str, LossTerm]:
        noise = np.random.default_rng([*seed, 3]).standard_normal(batch.images.shape, dtype=np.float32)
        perturbed_BCHW = batch.images.float() + 255 * sigma * torch.from_numpy(noise).to(batch.images.device)
        return task.stability_losses(forward, batch, perturbed_BCHW, alpha)

    return loss


def movable_layers(model: nn.Module) -> tuple[Layer, ...]:
    """Layers that training can change: parameters that the network itself has not frozen, and running statistics."""
    movable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for path, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            movable |= {f"{path}.{name}".lstrip(".") for name in ("running_mean", "running_var")}
    return tuple(layer for layer in layers_of(model) if layer.numel and movable.issuperset(layer.tensors))


def statistics_layers(model: nn.Module) -> tuple[str, ...]:
    """Running mean and variance of every batch normalisation: the layers that AdaBN changes."""
    paths = {path for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    statistics = [layer.name for layer in movable_layers(model) if layer.kind == "norm_statistics"]
    return tuple(name for name in statistics if name.rpartition(".")[0] in paths)


def norm_layers(model: nn.Module) -> tuple[str, ...]:
    """Weights, biases and running statistics of every normalisation."""
    return tuple(layer.name for layer in movable_layers(model) if layer.kind.startswith("norm_"))


def first_layers(model: nn.Module, budget: int) -> tuple[str, ...]:
    """The layers nearest to the input, in order, up to the first that does not fit into M (Lee et al.'s first block)."""
    sums = itertools.accumulate(layer.numel for layer in movable_layers(model))
    return tuple(layer.name for layer, total in zip(movable_layers(model), sums, strict=True) if total <= budget)


def random_layers(model: nn.Module, budget: int, draw: int) -> tuple[str, ...]:
    """Layers taken in a random order wherever they still fit into M; in state-dict order. A pure function of `draw`."""
    layers, room, chosen = movable_layers(model), budget, set()
    for index in np.random.default_rng([draw, 4]).permutation(len(layers)):
        if layers[index].numel <= room:
            room -= layers[index].numel
            chosen.add(int(index))
    return tuple(layers[index].name for index in sorted(chosen))


def relative_gradients(
    task: Task,
    model: nn.Module,
    images: Sequence[Image],
    targets: Sequence[Any],
    normalisation: Normalisation,
    batch_size: int,
    crop: int,
    seed: int,
    precision: str,
    teacher: Teacher | None = None,
) -> dict[str, float]:
    """Lee et al.'s RGN by layer: ||gradient|| / ||weight|| of the loss, the mean over one epoch's batches.

    The network is in evaluation mode, as the base is used. Layers without a gradient (running statistics) are left out; a
    layer whose weights are all zero gets 0.
    """
    device = next(for_inference(model).parameters()).device
    forward = Predictor(model, normalisation, precision)
    layers = [layer for layer in movable_layers(model) if layer.kind != "norm_statistics"]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sums, batches = dict.fromkeys((layer.name for layer in layers), 0.0), 0
    teach, undistorted = teaching(teacher), None if teacher is None else teacher.images
    sides = crop_size(task, images, crop)
    for batch in training_batches(task, images, targets, batch_size, sides, (seed, 0), undistorted=undistorted):
        model.zero_grad(set_to_none=True)
        loss_of(task.losses(forward, teach(batch.to(device)))).backward()  # type: ignore[no-untyped-call]
        for layer in layers:
            parameter = parameters[layer.tensors[0]]
            weight = float(parameter.detach().double().norm())
            gradient = 0.0 if parameter.grad is None else float(parameter.grad.double().norm())
            sums[layer.name] += gradient / weight if weight else 0.0
        batches += 1
    model.zero_grad(set_to_none=True)
    return {name: total / max(1, batches) for name, total in sums.items()}


def auto_rgn(model: nn.Module, budget: int, rgn: Mapping[str, float]) -> tuple[tuple[str, ...], dict[str, float]]:
    """Auto-RGN under M: the layers with the largest sum of RGN (the knapsack of Eq. (2)), and multiples of the learning rate.

    The multiples are RGN / the largest RGN selected, by parameter name. A batch normalisation's statistics have no gradient:
    they are selected and counted together with its weight.
    """
    layers = {layer.name: layer for layer in movable_layers(model)}
    companions = {name: statistics_of(name.rpartition(".")[0]) for name, layer in layers.items() if layer.kind == "norm_weight"}
    candidates = [layers[name] for name in rgn]
    extra = {name: layers[other].numel for name, other in companions.items() if other in layers}
    sizes = [layer.numel + extra.get(layer.name, 0) for layer in candidates]
    chosen = {candidates[i].name for i in select([rgn[layer.name] for layer in candidates], sizes, budget).chosen}
    chosen |= {companions[name] for name in chosen if name in extra}
    top = max((value for layer, value in rgn.items() if layer in chosen), default=0.0) or 1.0
    rates = {name: rgn[layer] / top for layer in rgn if layer in chosen for name in layers[layer].tensors}
    return tuple(name for name in layers if name in chosen), rates
