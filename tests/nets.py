"""A small network of the user's own, as an import path reaches it: `tests.nets:small`."""

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearnn_ray.models.detector import SingleStageDetector, Target, Terms

TRUST = ("tests", "torchvision")
"""modules whose networks the releases of the tests may name"""


class Small(nn.Module):
    """Conv, BatchNorm, a residual 1x1, a head with bias, and a frozen upsampler: one layer of every kind that matters."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, num_classes, 1)
        self.up = nn.ConvTranspose2d(num_classes, num_classes, 2, 2, groups=num_classes, bias=False)
        nn.init.ones_(self.up.weight)
        self.up.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)) + y)
        return self.up(self.head(y))[..., : x.shape[-2], : x.shape[-1]]


def small(num_classes: int) -> nn.Module:
    return Small(num_classes)


class _Stuck(Small):
    """Never ends with a picture of one colour."""

    def forward(self, x: Tensor) -> Tensor:
        while x.amin() == x.amax() != 0:
            time.sleep(1)
        return super().forward(x)


def stuck(num_classes: int) -> nn.Module:
    return _Stuck(num_classes)


class _Slow(Small):
    """Each training step takes 40 ms more, without the processor."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            time.sleep(0.04)
        return super().forward(x)


def slow(num_classes: int) -> nn.Module:
    return _Slow(num_classes)


class _WithDropout(Small):
    """Draws from torch's generator in training."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.dropout(F.relu(self.bn2(self.conv2(y)) + y), 0.3, self.training)
        return self.up(self.head(y))[..., : x.shape[-2], : x.shape[-1]]


def with_dropout(num_classes: int) -> nn.Module:
    return _WithDropout(num_classes)


class _WithAuxiliaryHead(Small):
    """A second head that the loss does not use, as torchvision's segmentation networks have one."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.auxiliary = nn.Conv2d(8, num_classes, 1)


def with_auxiliary_head(num_classes: int) -> nn.Module:
    return _WithAuxiliaryHead(num_classes)


def no_module(num_classes: int) -> str:
    return "not a network"


def broken(num_classes: int) -> nn.Module:
    raise RuntimeError("out of paper")


class _AfraidOfTheDark(Small):
    """Its logits are NaN on dark images: a level at which a fine-tune cannot succeed."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > -1.0 else super().forward(x) * float("nan")


def afraid_of_the_dark(num_classes: int) -> nn.Module:
    return _AfraidOfTheDark(num_classes)


class _AfraidOfTheLight(Small):
    """Its logits are NaN on images that are not dark: the undistorted ones are not to be had."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() < -0.5 else super().forward(x) * float("nan")


def afraid_of_the_light(num_classes: int) -> nn.Module:
    return _AfraidOfTheLight(num_classes)


class _TinyDetector(SingleStageDetector):
    """One box at each of 8 x 10 positions, of frames of any size."""

    input_size = (32, 40)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, num_classes + 4, 3, padding=1)

    def raw(self, x_BCHW: Tensor) -> Tensor:
        return self.head(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x_BCHW)))))))

    def _boxes(self, raw: Tensor) -> Tensor:
        """[B, h, w, 4]"""
        rows, columns = (torch.arange(side) + 0.5 for side in raw.shape[-2:])
        middle = 4 * torch.stack([columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))], -1)
        sides = 4 * raw[:, -4:].float().exp().permute(0, 2, 3, 1)
        return torch.cat([middle - sides[..., :2], middle + sides[..., 2:]], -1)

    def decode(self, raw: Tensor, height: int, width: int) -> dict[str, Tensor]:
        scores, labels = raw[:, :-4].float().sigmoid().max(1)
        return {"boxes": self._boxes(raw).flatten(1, 2), "scores": scores.flatten(1), "labels": labels.flatten(1)}

    def losses(self, raw: Tensor, targets: Sequence[Target], height: int, width: int) -> Terms:
        logits, boxes = raw[:, :-4].float(), self._boxes(raw)
        wanted, distance, count = torch.zeros_like(logits), logits.new_zeros(()), 0
        for index, target in enumerate(targets):
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                column, row = (int(side) for side in ((box[:2] + box[2:]) / 8).clamp(max=torch.tensor([9, 7])))
                wanted[index, label, row, column] = 1
                distance = distance + (boxes[index, row, column] - box).abs().sum() / 40
                count += 1
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        return {"classes": (entropy, torch.tensor(count)), "boxes": (distance, torch.tensor(count))}


def tiny_detector(num_classes: int) -> nn.Module:
    return _TinyDetector(num_classes)


def frozen(num_classes: int) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d  # imports torch's compiler

    model = _TinyDetector(num_classes)
    model.bn1 = FrozenBatchNorm2d(8)
    return model


class _RawDetector(_TinyDetector):
    """Returns its raw tensors: somebody forgot the decoder."""

    def forward(self, images: Tensor, targets: Sequence[Target] | None = None) -> Tensor:
        return self.raw(images)


def raw_detector(num_classes: int) -> nn.Module:
    return _RawDetector(num_classes)


class _TooDeep(Small):
    """Takes only images with sides of whole multiples of 64."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.interpolate(F.avg_pool2d(x, 64), scale_factor=64)[:, :1]


def too_deep(num_classes: int) -> nn.Module:
    return _TooDeep(num_classes)
