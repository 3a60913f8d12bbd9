"""Networks whose heads see regions instead of images (R-CNNs): every region uses the level of its image.

Features are pooled per region by torchvision's MultiScaleRoIAlign, which is told how many regions each image has. From there to
the end of the module that pools, the samples of the `Selection` are regions. Both places are wrapped in modules, because hooks
would be bound to the network that they were made on, and networks are copied (`AdaptiveModel.share`).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gearnn_ray.serving.batch import Selection

_POOL = "MultiScaleRoIAlign"  # by name, because importing torchvision's operators takes a while


def has_regions(network: nn.Module) -> bool:
    """Whether some module of the network pools features of regions."""
    return any(type(module).__name__ == _POOL for module in network.modules())


def with_regions(network: nn.Module, selection: Selection) -> nn.Module:
    """The network itself, with every module that pools regions, and the pools in it, wrapped."""
    pools = [path for path, module in network.named_modules() if type(module).__name__ == _POOL]
    for path in pools:
        parent, _, leaf = path.rpartition(".")
        setattr(network.get_submodule(parent), leaf, _Pool(network.get_submodule(path), selection))
    for path in dict.fromkeys(pool.rpartition(".")[0] for pool in pools):
        parent, _, leaf = path.rpartition(".")
        setattr(network.get_submodule(parent), leaf, _Heads(network.get_submodule(path), selection))
    return network


class _Pool(nn.Module):
    """Behind it, samples are the regions of these boxes: a tensor [R_i, 4] for each image."""

    def __init__(self, pool: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.pool, self.selection = pool, selection

    def forward(self, features: Any, boxes: Sequence[Tensor], *more: Any) -> Any:
        pooled = self.pool(features, boxes, *more)
        self.selection.spread([len(each) for each in boxes])
        return pooled


class _Heads(nn.Module):
    """Behind it, samples are images again."""

    def __init__(self, heads: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.heads, self.selection = heads, selection

    def forward(self, *inputs: Any, **named: Any) -> Any:
        try:
            return self.heads(*inputs, **named)
        finally:
            self.selection.collect()
