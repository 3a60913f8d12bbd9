"""A network whose weights each image mixes from two levels' adaptors, as `serving.mixing` does without a stream."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from gearnn_ray.adaptors.interpolation import interpolated
from gearnn_ray.models.detector import has_its_own_size
from gearnn_ray.serving.mixing import entropy_share, in_steps, uncertainties
from gearnn_ray.tasks.base import Task
from gearnn_ray.training.predict import with_weights


class MixedByEntropy:
    """Maps one normalised image [1, 3, H, W] to the raw output of its own mixture.

    model: the base on its device, in evaluation mode. base: its state. lower, upper: the tensors that the two levels change.
    """

    def __init__(
        self, task: Task, model: nn.Module, base: Mapping[str, Tensor], lower: Mapping[str, Tensor], upper: Mapping[str, Tensor]
    ) -> None:
        self._task, self._model, self._whole = task, model, has_its_own_size(model)
        device = next(model.parameters()).device
        names = [name for name in base if name in lower or name in upper]
        self._base, self._lower, self._upper = (
            {name: state[name].to(device) for name in names if name in state} for state in (base, lower, upper)
        )
        self._ends = [with_weights(model, state) for state in (self._lower, self._upper)]
        self._merged: dict[float, Callable[..., Any]] = {}

    def __call__(self, x_1CHW: Tensor) -> Any:
        (own,), (other,) = (uncertainties(self._task, network, x_1CHW, self._whole) for network in self._ends)
        share = in_steps(entropy_share(own, other))
        if share not in self._merged:
            self._merged[share] = with_weights(self._model, interpolated(self._base, self._lower, self._upper, share))
        return self._merged[share](x_1CHW)
