"""One function fine-tunes: all layers (step 1 of Algorithm 1), or only the chosen ones with the rest frozen (step 4).

The result is a pure function of the start weights, the images, the recipe, the seed, the precision and the number of threads:
order and crops are drawn from (seed, epoch), torch's own generator is seeded per (seed, epoch, step, rank), and a fine-tune that
continues from an epoch's checkpoint ends with the same bits. Under `torch.distributed` the workers share each batch.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gearnn_ray.config.recipe import BaseRecipe
from gearnn_ray.core.errors import TrainingFailedError
from gearnn_ray.models.layers import set_trainable, set_training_mode
from gearnn_ray.tasks.base import Batch, Forward, Image, LossTerm, Task, loss_of
from gearnn_ray.training.batch_norm import reestimate_statistics
from gearnn_ray.training.checkpoint import Checkpoint, restore, snapshot
from gearnn_ray.training.predict import Normalisation, Predictor
from gearnn_ray.training.sampling import crop_size, steps_per_epoch, training_batches
from gearnn_ray.training.sgd import Sgd
from gearnn_ray.training.teacher import Teacher, teaching

_SECONDS_BETWEEN_REPORTS = 1.0


@dataclass(frozen=True)
class Progress:
    """A report from inside a fine-tune: `step` of `steps` over all epochs, `epoch` counted from 0, mean loss since the last."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float


Loss = Callable[[Forward, Batch, Sequence[int]], Mapping[str, LossTerm]]
"""forward, batch and a seed of this step's own to the terms of the loss."""


@dataclass(frozen=True)
class Outcome:
    """What a fine-tune took: `seconds` of this process's own work, `epochs_run` of them here, the rest from a checkpoint."""

    seconds: float
    epochs_run: int


def fine_tune(
    task: Task,
    model: nn.Module,
    images: Sequence[Image],
    targets: Sequence[Any],
    recipe: BaseRecipe,
    normalisation: Normalisation,
    precision: str,
    *,
    chosen: Collection[str] | None,
    seed: int,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    loss: Loss | None = None,
    teacher: Teacher | None = None,
    rates: Mapping[str, float] | None = None,
    stop_after: float | None = None,
) -> Outcome:
    """Fine-tune `model` in place on the device it is on: all layers (`chosen` None) or only the named ones.

    images: uint8 [H, W, 3], or a `Mixture` of levels; targets: the task's, one per image. precision: float32 or bfloat16.
    loss: the task's own by default. teacher: gives each batch its lesson; where it is alone, without labels, running statistics
    that may move are first re-estimated on one epoch's batches. rates: multiples of the learning rate by parameter name, 1 for
    all others.
    stop_after: epochs, a fraction too, after which to stop short of the recipe's, whose schedule stays as it is.
    Raises TrainingFailedError when loss or weights stop being finite.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.to(memory_format=torch.channels_last)
    trainable = set_trainable(model, chosen)
    # where only running statistics are chosen, a forward pass is all the training there is
    optimizer = Sgd(trainable, recipe, rates or {}) if trainable else None
    steps_each = steps_per_epoch(len(images), recipe.batch_size)
    steps = recipe.epochs * steps_each
    last = steps if stop_after is None else min(steps, max(1, round(stop_after * steps_each)))
    average = _Average(trainable, last, recipe.averaged)
    momentum = optimizer.momentum if optimizer else {}
    first_epoch = restore(checkpoint, model, momentum, average.mean)
    crop = crop_size(task, images, recipe.crop)
    if teacher is not None and teacher.is_alone and first_epoch == 0:
        whole = training_batches(task, images, targets, recipe.batch_size, crop, (seed, 0))  # on every worker alike
        reestimate_statistics(model, whole, normalisation, precision, chosen)
    # a network may have parameters that a loss does not reach: an auxiliary head, a branch left out in training
    spread = world_size > 1 and bool(trainable)
    network = DistributedDataParallel(model, find_unused_parameters=True) if spread else model
    forward = Predictor(network, normalisation, precision)
    terms_of: Loss = loss or (lambda forward, batch, _: task.losses(forward, batch))
    teach, undistorted = teaching(teacher), None if teacher is None else teacher.images

    epochs = math.ceil(last / steps_each)
    for epoch in range(first_epoch, epochs):
        set_training_mode(model, chosen)
        reports = _Reports(device)
        drawn = training_batches(task, images, targets, recipe.batch_size, crop, (seed, epoch), rank, world_size, undistorted)
        for index, batch in enumerate(itertools.islice(drawn, last - epoch * steps_each)):
            step, own_seed = epoch * steps_each + index, (seed, epoch, index, rank)
            _seed_torch(own_seed)
            with torch.set_grad_enabled(optimizer is not None):
                value = _share_of_loss(terms_of(forward, teach(batch.to(device)), own_seed), world_size)
            if optimizer is not None:
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                if recipe.clip is not None:
                    # after the workers have averaged their gradients, so that all clip alike
                    torch.nn.utils.clip_grad_norm_([parameter for _, parameter in trainable], recipe.clip)
                optimizer.step(_learning_rate(recipe, step, steps))
                average.add(step)
            if reports.is_due(value.detach(), at_end=step + 1 in (last, (epoch + 1) * steps_each)):
                progress(Progress(epoch, recipe.epochs, step + 1, last, _finite(reports.mean(), recipe, epoch)))
        _check_weights(model, recipe, epoch)
        if checkpoint is not None and rank == 0 and (epoch + 1) * steps_each < last:
            checkpoint.save(snapshot(model, momentum, average.mean, epoch + 1, everything=chosen is None))
    average.put()
    return Outcome(time.perf_counter() - started, epochs - first_epoch)


def _share_of_loss(terms: Mapping[str, LossTerm], world_size: int) -> Tensor:
    """The loss with all workers' counts, times their number, because DistributedDataParallel averages gradients over workers."""
    if world_size == 1:
        return loss_of(terms)
    counts = torch.stack([term.count.detach().double() for term in terms.values()])
    dist.all_reduce(counts)
    return loss_of({k: LossTerm(term.sum, n) for (k, term), n in zip(terms.items(), counts, strict=True)}) * world_size


def _seed_torch(seed: Sequence[int]) -> None:
    """torch's generators, for what draws from them in a forward pass: dropout, samplers of proposals."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(tuple(seed)).encode()).digest()[:8], "little") >> 1)


class _Reports:
    """The mean loss since the last report, which is due about once a second and at the end of an epoch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._restart()

    def is_due(self, loss: Tensor, at_end: bool) -> bool:
        """Count one step's loss, and say whether to report now."""
        self._sum += loss
        self._steps += 1
        return at_end or time.perf_counter() - self._since > _SECONDS_BETWEEN_REPORTS

    def mean(self) -> float:
        """The mean loss, counting from here on anew."""
        mean = float(self._sum) / self._steps
        self._restart()
        return mean

    def _restart(self) -> None:
        self._sum, self._steps, self._since = torch.zeros((), device=self._device), 0, time.perf_counter()


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
        for name, parameter in self._parameters.items():
            parameter.copy_(self.mean[name])


def _learning_rate(recipe: BaseRecipe, step: int, steps: int) -> float:
    rising = min(1.0, (step + 1) / (recipe.warm_up + 1))
    return rising * recipe.learning_rate * (1 - step / steps if recipe.schedule == "linear" else 1.0)


def _finite(loss: float, recipe: BaseRecipe, epoch: int) -> float:
    if not math.isfinite(loss):
        raise TrainingFailedError(
            f"the loss became {loss} in epoch {epoch + 1} of {recipe.epochs}: "
            f"try a learning rate below {recipe.learning_rate:g} or float32"
        )
    return loss


def _check_weights(model: nn.Module, recipe: BaseRecipe, epoch: int) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TrainingFailedError(
                f"{name} holds values that are not finite after epoch {epoch + 1} of {recipe.epochs}: "
                f"try a learning rate below {recipe.learning_rate:g} or float32"
            )
