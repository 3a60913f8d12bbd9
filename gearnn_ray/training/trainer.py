"""One function fine-tunes: all layers (step 1 of Algorithm 1), or only the chosen ones with the rest frozen (step 4).

The result is a pure function of the start weights, the images, the recipe and the seed: an epoch draws its order and crops
from (seed, epoch) alone and a checkpoint after each epoch holds weights, momentum and epoch, so that a killed fine-tune
that goes on ends with the same bits. Knows nothing of Ray or the store; under `torch.distributed` it shares each batch.
"""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.core.errors import TrainingFailedError
from gearnn_ray.models.layers import set_trainable, set_training_mode
from gearnn_ray.tasks import segmentation
from gearnn_ray.tasks.segmentation import Image, Normalisation

_SECONDS_BETWEEN_REPORTS = 1.0


@dataclass(frozen=True)
class Progress:
    """A report from inside a fine-tune: `step` of `steps` over all epochs, `epoch` counted from 0, mean loss since the last."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float


class Checkpoint(Protocol):
    """Where the state of an unfinished fine-tune is kept. `load` gives None where there is none, or only a torn one."""

    def load(self) -> bytes | None: ...
    def save(self, data: bytes) -> None: ...


class BatchSource(Protocol):
    """One epoch of training batches, x_BCHW uint8 and y_BHW; `segmentation.training_batches` is one."""

    def __call__(
        self,
        images: Any,
        labels: Sequence[Image],
        batch_size: int,
        crop: tuple[int, int],
        seed: Sequence[int],
        rank: int,
        world_size: int,
    ) -> Iterator[tuple[Tensor, Tensor]]: ...


Forward = Callable[[Tensor], Tensor]
"""x_BCHW of pixel values, 0 to 255, to float32 logits: normalisation and precision are taken care of."""
Objective = Callable[[Forward, Tensor, Tensor, Sequence[int]], Tensor]
"""forward, x_BCHW uint8, y_BHW and a seed of this step's own to the loss."""


def cross_entropy(forward: Forward, x_BCHW: Tensor, y_BHW: Tensor, seed: Sequence[int]) -> Tensor:
    """The loss of a plain fine-tune."""
    return segmentation.loss_of(forward(x_BCHW), y_BHW)


@dataclass(frozen=True)
class Outcome:
    """What a fine-tune took: `seconds` of this process's own work, `epochs_run` of them here, the rest from a checkpoint."""

    seconds: float
    epochs_run: int
    precision: str


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` to `bfloat16` or `float32` by what `device` gains from; anything else as it is."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float32"
    # emulated or AVX-512 bfloat16 is slower than float32 for these convolutions; AMX is several times as fast
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """torch's autocast for a resolved precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def prepare_process(threads: int) -> None:
    """Settings of a worker process that results and speed rest on: threads, denormals, deterministic kernels."""
    torch.set_num_threads(max(1, threads))
    torch.set_flush_denormal(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def fine_tune(
    model: nn.Module,
    images: Sequence[Image],
    labels: Sequence[Image],
    recipe: Recipe,
    normalisation: Normalisation,
    *,
    chosen: Collection[str] | None,
    seed: int,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    batches: BatchSource = segmentation.training_batches,
    objective: Objective = cross_entropy,
    rates: Mapping[str, float] | None = None,
    stop_after: float | None = None,
) -> Outcome:
    """Fine-tune `model` in place on the device it is on: all layers (`chosen` None) or only the named ones.

    images: uint8 [H, W, 3], or what else `batches` takes; labels: uint8 [H', W'], resized to the image where the level
    changed its size. rates: multiples of the learning rate by parameter name, 1 for all others.
    stop_after: epochs, a fraction too, after which to stop short of the recipe's, whose schedule stays as it is.
    Raises TrainingFailedError when loss or weights stop being finite.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    precision = resolve_precision(recipe.precision, device)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.to(memory_format=torch.channels_last)
    trainable = set_trainable(model, chosen)
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable:
        by_rate.setdefault((rates or {}).get(name, 1.0), []).append(parameter)
    optimizer = (
        torch.optim.SGD(
            [{"params": group, "rate": rate} for rate, group in by_rate.items()],
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        if trainable
        else None  # only running statistics are chosen: a forward pass is all the training there is
    )
    crop = segmentation.crop_size(images, recipe.crop)
    steps_per_epoch = segmentation.steps_per_epoch(len(images), recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    last = steps if stop_after is None else min(steps, max(1, round(stop_after * steps_per_epoch)))
    average = _Average(trainable, last, recipe.averaged)
    first_epoch = _restore(checkpoint, model, trainable, optimizer, average)
    network = DistributedDataParallel(model) if world_size > 1 and trainable else model

    def forward(x: Tensor) -> Tensor:
        x = normalisation(x).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(optimizer is not None), autocast(precision, device):
            return segmentation.logits_of(network, x)

    epochs = math.ceil(last / steps_per_epoch)
    for epoch in range(first_epoch, epochs):
        set_training_mode(model, chosen)
        loss_sum, losses, reported = torch.zeros((), device=device), 0, time.perf_counter()
        drawn = batches(images, labels, recipe.batch_size, crop, (seed, epoch), rank, world_size)
        for index, (x, y) in enumerate(itertools.islice(drawn, last - epoch * steps_per_epoch)):
            step = epoch * steps_per_epoch + index
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            loss = objective(forward, x, y, (seed, epoch, index, rank))
            if optimizer is not None:
                _set_learning_rate(optimizer, recipe, step, steps)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                average.add(step)
            loss_sum += loss.detach()
            losses += 1
            if time.perf_counter() - reported > _SECONDS_BETWEEN_REPORTS or step + 1 in (
                last,
                (epoch + 1) * steps_per_epoch,
            ):
                mean = _finite(float(loss_sum) / losses, recipe, epoch)
                progress(Progress(epoch, recipe.epochs, step + 1, last, mean))
                loss_sum, losses, reported = torch.zeros((), device=device), 0, time.perf_counter()
        _check_weights(model, recipe, epoch)
        if checkpoint is not None and rank == 0 and (epoch + 1) * steps_per_epoch < last:
            checkpoint.save(_snapshot(model, trainable, optimizer, average, epoch + 1, chosen is None))
    average.put()
    return Outcome(time.perf_counter() - started, epochs - first_epoch, precision)


def evaluate(
    model: nn.Module,
    images: Sequence[Image],
    labels: Sequence[Image],
    normalisation: Normalisation,
    precision: str,
) -> float:
    """mIoU in percent of `model` (put into evaluation mode) over whole images, from one confusion matrix."""
    device = next(model.parameters()).device
    precision = resolve_precision(precision, device)
    model.to(memory_format=torch.channels_last)
    model.eval()
    hist: Tensor | None = None
    for image, label in zip(images, labels, strict=True):
        x = torch.from_numpy(image[None].copy()).to(device).permute(0, 3, 1, 2)
        x = normalisation(x).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), autocast(precision, device):
            logits = segmentation.logits_of(model, x)
        counts = segmentation.confusion(logits, label)
        hist = counts if hist is None else hist + counts
    return 0.0 if hist is None else segmentation.mean_iou(hist)


class _Average:
    """The mean of the trained weights over the last `share` of all steps (Polyak averaging), kept beside them in float32."""

    def __init__(self, trainable: Sequence[tuple[str, nn.Parameter]], steps: int, share: float) -> None:
        self._first = steps - round(share * steps)
        self._parameters = {name: parameter.detach() for name, parameter in trainable} if self._first < steps else {}
        self.mean = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}

    def add(self, step: int) -> None:
        if self.mean and step >= self._first:
            share = 1 / (step - self._first + 1)
            torch._foreach_lerp_(list(self.mean.values()), list(self._parameters.values()), share)

    def put(self) -> None:
        """The mean becomes the weights."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.mean[name])


def _set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, steps: int) -> None:
    scale = 1 - step / steps if recipe.schedule == "linear" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * scale * group["rate"]


def _finite(loss: float, recipe: Recipe, epoch: int) -> float:
    if not math.isfinite(loss):
        raise TrainingFailedError(
            f"the loss became {loss} in epoch {epoch + 1} of {recipe.epochs}: "
            f"try a learning rate below {recipe.learning_rate:g} or float32"
        )
    return loss


def _check_weights(model: nn.Module, recipe: Recipe, epoch: int) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TrainingFailedError(
                f"{name} holds values that are not finite after epoch {epoch + 1} of {recipe.epochs}: "
                f"try a learning rate below {recipe.learning_rate:g} or float32"
            )


def _snapshot(
    model: nn.Module,
    trainable: list[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer | None,
    average: _Average,
    next_epoch: int,
    everything: bool,
) -> bytes:
    """Weights, momentum and average after an epoch; a partial fine-tune's holds only what it may change."""
    moving = {name for name, _ in trainable} | {name for name, _ in model.named_buffers()}
    state = model.state_dict()
    tensors = {f"model.{n}": t for n, t in state.items() if everything or n in moving}
    if optimizer is not None:
        for name, parameter in trainable:
            tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    tensors |= {f"average.{name}": mean for name, mean in average.mean.items()}
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return safetensors.torch.save(contiguous, {"state": json.dumps({"next_epoch": next_epoch})})


def _restore(
    checkpoint: Checkpoint | None,
    model: nn.Module,
    trainable: list[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer | None,
    average: _Average,
) -> int:
    """Go on from a checkpoint if there is a readable one; returns the epoch to begin with."""
    data = checkpoint.load() if checkpoint is not None else None
    if data is None:
        return 0
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        next_epoch = int(json.loads(header["__metadata__"]["state"])["next_epoch"])
    except (SafetensorError, KeyError, ValueError):
        return 0  # not one of ours: begin again rather than fail
    model.load_state_dict(
        {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}, strict=False
    )
    if optimizer is not None:
        for name, parameter in trainable:
            momentum = tensors[f"momentum.{name}"].to(parameter.device)
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
    for name, mean in average.mean.items():
        mean.copy_(tensors[f"average.{name}"])
    return next_epoch
