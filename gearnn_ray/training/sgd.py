"""Stochastic gradient descent with momentum and weight decay, as the function that `torch.optim.SGD` calls.

The class imports torch's compiler at its first step: five seconds in each worker process, for code that nothing here compiles.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from gearnn_ray.config.recipe import BaseRecipe


class Sgd:
    """One step at a time. momentum: a buffer per parameter name, zero until a loss reaches the parameter.

    Args:
        trainable: parameters with their names.
        rates: multiples of the learning rate by parameter name, 1 for all others.
    """

    def __init__(self, trainable: Sequence[tuple[str, nn.Parameter]], recipe: BaseRecipe, rates: Mapping[str, float]) -> None:
        self._recipe = recipe
        self._parameters = dict(trainable)
        self._names_by_rate: dict[float, list[str]] = {}
        for name in self._parameters:
            self._names_by_rate.setdefault(rates.get(name, 1.0), []).append(name)
        self.momentum: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in trainable}

    def zero_grad(self) -> None:
        """Drop the gradients. Call it right before `backward`, whose gradients then take the same memory."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every parameter that has a gradient."""
        for rate, names in self._names_by_rate.items():
            moved = {name: gradient for name in names if (gradient := self._parameters[name].grad) is not None}
            parameters: list[Tensor] = [self._parameters[name] for name in moved]
            buffers: list[Tensor | None] = [self.momentum[name] for name in moved]
            sgd(
                parameters, list(moved.values()), buffers, fused=True, lr=learning_rate * rate, momentum=self._recipe.momentum,
                weight_decay=self._recipe.weight_decay, dampening=0, nesterov=False, maximize=False,
            )  # fmt: skip
