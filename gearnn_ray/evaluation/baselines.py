"""The methods that are compared with GearNN: which layers each one trains, on what, with which loss.

Pure functions over networks, images and tensors. Knows nothing of Ray, the store, or how often what is made.

- mixed training: one network for all levels, every image of a batch at a random one (§5 of the paper)
- stability training: Zheng et al., "Improving the Robustness of Deep Neural Networks via Stability Training", CVPR 2016
- AdaBN: Li et al., "Revisiting Batch Normalization for Practical Domain Adaptation", 2016
- surgical first block, Auto-RGN: Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", ICLR 2023
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from gearnn_ray.levels.level import Brightness, H264Size, parse_level
from gearnn_ray.models.layers import Layer, layers_of, statistics_of
from gearnn_ray.offline.selection import select
from gearnn_ray.tasks import segmentation
from gearnn_ray.tasks.segmentation import Image, Normalisation
from gearnn_ray.training.trainer import Forward, Objective, autocast, resolve_precision

TITLES: dict[str, str] = {
    "original": "original",
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
}
"""Method to what a reader calls it, in the order of tables."""

CONSTANT = ("original", "mixed", "stability", "clean-tuned")
"""Methods with one set of weights for all levels; the others have one per level, and the base itself at `clean`."""

_UNDISTORTED_END = ("h264-size", "brightness")
"""Axes on which the undistorted images are a level too: the largest size, and a factor of 1."""


def axes_of(levels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Levels by axis, each sorted by value; `clean` belongs to frame size and brightness, and has its own axis without those."""
    axes: dict[str, list[str]] = {}
    for name in levels:
        axes.setdefault(parse_level(name).family, []).append(name)
    clean = axes.pop("clean", [])
    ends = [members for axis, members in axes.items() if axis in _UNDISTORTED_END and "brightness-1.0" not in members]
    for members in ends:
        members += clean
    if clean and not ends:
        axes["clean"] = clean
    return {axis: tuple(sorted(members, key=partial(_place, axis=axis))) for axis, members in axes.items()}


def _place(level: str, axis: str) -> float:
    parsed = parse_level(level)
    if parsed.is_clean:
        return 1.0 if axis == "brightness" else math.inf
    return 0.0 if parsed.value is None else parsed.value


# ── which images ─────────────────────────────────────────────────────────────────────────────────────────────────


def held_back(count: int) -> int:
    """How many training images, the last ones in order, are not trained on while learning rates are chosen: a fifth."""
    return max(1, count // 5)


def reestimate_statistics(
    model: nn.Module, batches: Iterable[Tensor], normalisation: Normalisation, precision: str
) -> None:
    """Batch normalisations' running statistics become the mean over these batches' own.

    batches: uint8 [B, 3, H, W], as in training: weights go with the statistics of such crops, and whole frames have others.
    Weights stay as they are. Leaves the network in evaluation mode.
    """
    device = next(model.parameters()).device
    precision = resolve_precision(precision, device)
    model.to(memory_format=torch.channels_last)
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    for batch in batches:
        x = normalisation(batch.to(device)).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), autocast(precision, device):
            segmentation.logits_of(model, x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


# ── which loss ───────────────────────────────────────────────────────────────────────────────────────────────────


def stability_objective(alpha: float, sigma: float) -> Objective:
    """Zheng et al. 2016: cross-entropy on the clean image + alpha · KL(clean || perturbed), a mean over pixels.

    sigma: standard deviation of the Gaussian perturbation, in units where a pixel's range is [0, 1]. Both copies go through
    the network as one batch, so that a batch normalisation sees clean and perturbed images alike.
    """

    def objective(forward: Forward, x_BCHW: Tensor, y_BHW: Tensor, seed: Sequence[int]) -> Tensor:
        noise = np.random.default_rng([*seed, 3]).standard_normal(x_BCHW.shape, dtype=np.float32)
        perturbed = x_BCHW.float() + 255 * sigma * torch.from_numpy(noise).to(x_BCHW.device)
        clean, other = forward(torch.cat([x_BCHW.float(), perturbed])).chunk(2)
        log_p, log_q = F.log_softmax(clean, 1), F.log_softmax(other, 1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(1).mean()
        return segmentation.loss_of(clean, y_BHW) + alpha * divergence

    return objective


# ── which layers ─────────────────────────────────────────────────────────────────────────────────────────────────


def movable_layers(model: nn.Module) -> tuple[Layer, ...]:
    """Layers that training can move: parameters the network itself has not frozen, and running statistics."""
    movable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for path, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            movable |= {f"{path}.{name}".lstrip(".") for name in ("running_mean", "running_var")}
    return tuple(layer for layer in layers_of(model) if layer.numel and movable.issuperset(layer.tensors))


def statistics_layers(model: nn.Module) -> tuple[str, ...]:
    """Running mean and variance of every batch normalisation (AdaBN's share of the network)."""
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
    """Layers in a random order, each taken that still fits into M; in state-dict order. A pure function of `draw`."""
    layers, room, chosen = movable_layers(model), budget, set()
    for index in np.random.default_rng([draw, 4]).permutation(len(layers)):
        if layers[index].numel <= room:
            room -= layers[index].numel
            chosen.add(int(index))
    return tuple(layers[index].name for index in sorted(chosen))


def relative_gradients(
    model: nn.Module,
    images: Sequence[Image],
    labels: Sequence[Image],
    normalisation: Normalisation,
    batch_size: int,
    crop: int,
    seed: int,
    precision: str,
) -> dict[str, float]:
    """Lee et al.'s RGN by layer: ||gradient|| / ||weight|| of the loss, a mean over one epoch's batches.

    The network is as the base is used, in evaluation mode. Layers without a gradient (running statistics) are left out; one
    whose weights are all zero gets 0.
    """
    device = next(model.parameters()).device
    precision = resolve_precision(precision, device)
    layers = [layer for layer in movable_layers(model) if layer.kind != "norm_statistics"]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    model.to(memory_format=torch.channels_last)
    model.eval()
    sums, batches = dict.fromkeys((layer.name for layer in layers), 0.0), 0
    sides = segmentation.crop_size(images, crop)
    for x, y in segmentation.training_batches(images, labels, batch_size, sides, (seed, 0)):
        model.zero_grad(set_to_none=True)
        x = normalisation(x.to(device)).contiguous(memory_format=torch.channels_last)
        with autocast(precision, device):
            logits = segmentation.logits_of(model, x)
        segmentation.loss_of(logits, y.to(device)).backward()  # type: ignore[no-untyped-call]
        for layer in layers:
            parameter = parameters[layer.tensors[0]]
            weight = float(parameter.detach().double().norm())
            gradient = 0.0 if parameter.grad is None else float(parameter.grad.double().norm())
            sums[layer.name] += gradient / weight if weight else 0.0
        batches += 1
    model.zero_grad(set_to_none=True)
    return {name: total / max(1, batches) for name, total in sums.items()}


def auto_rgn(model: nn.Module, budget: int, rgn: Mapping[str, float]) -> tuple[tuple[str, ...], dict[str, float]]:
    """Auto-RGN under M: the layers of the largest sum of RGN (the knapsack of Eq. (2)), and the learning rate's factors.

    Factors are RGN / the largest RGN chosen, by parameter name. A batch normalisation's statistics have no
    gradient of their own: they come with its weight, and are paid for.
    """
    layers = {layer.name: layer for layer in movable_layers(model)}
    companions = {
        name: statistics_of(name.rpartition(".")[0]) for name, layer in layers.items() if layer.kind == "norm_weight"
    }
    candidates = [layers[name] for name in rgn]
    extra = {name: layers[other].numel for name, other in companions.items() if other in layers}
    sizes = [layer.numel + extra.get(layer.name, 0) for layer in candidates]
    chosen = {candidates[i].name for i in select([rgn[layer.name] for layer in candidates], sizes, budget).chosen}
    chosen |= {companions[name] for name in chosen if name in extra}
    top = max((value for layer, value in rgn.items() if layer in chosen), default=0.0) or 1.0
    rates = {name: rgn[layer] / top for layer in rgn if layer in chosen for name in layers[layer].tensors}
    return tuple(name for name in layers if name in chosen), rates


# ── between levels ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Neighbours:
    """The trained levels on both sides of an untrained one, and the upper one's share of a linear mixture, 0 to 1."""

    lower: str
    upper: str
    share: float

    @property
    def nearest(self) -> str:
        """The nearer one; the lower one where both are as near."""
        return self.upper if self.share > 0.5 else self.lower


def neighbours(level: str, trained: Sequence[str]) -> Neighbours | None:
    """The trained levels next to `level` on its axis; None where it does not lie between two.

    Shares are those that serving mixes by: linear in JPEG quality and CRF, in the logarithms of brightness and frame area.
    """
    family = parse_level(level).family
    axis = [name for name in trained if parse_level(name).family == family and name != level]
    points = sorted((at, name) for name in axis if (at := _coordinate(name)) is not None)
    target = _coordinate(level)
    if target is None:
        return None
    for (low, lower), (high, upper) in itertools.pairwise(points):
        if low < target < high:
            return Neighbours(lower, upper, (target - low) / (high - low))
    return None


def _coordinate(level: str) -> float | None:
    """Where a level stands on its axis, None where it has no single place."""
    parsed = parse_level(level)
    if isinstance(parsed, H264Size):
        return math.log(parsed.width * parsed.height)
    if isinstance(parsed, Brightness):
        return math.log(parsed.factor)
    return parsed.value


def interpolated(
    base: Mapping[str, Tensor], lower: Mapping[str, Tensor], upper: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Two adaptors mixed linearly, `share` of the upper; a tensor missing in one comes from the base."""
    names = [name for name in base if name in lower or name in upper]
    return {name: torch.lerp(lower.get(name, base[name]), upper.get(name, base[name]), share) for name in names}
