"""One network with every kind of module that adaptive serving must cope with: `tests.zoo:zoo`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.ops import FrozenBatchNorm2d

WIDTH = 8


class Scaled(nn.Module):
    """A parameter of its own, and a convolution whose weights it uses by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH, 1, 1))
        self.inner = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.conv2d(x, self.inner.weight, self.inner.bias)


class Attention(nn.Module):
    """Multi-head attention over pixels, whose output projection is used by its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).mT)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.mlp(mixed).mT.reshape(x.shape)


class Pooled(nn.Module):
    """A linear layer and a one-dimensional batch normalisation on [n, features], as in squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.norm(self.linear(x.mean((2, 3)))).sigmoid()[:, :, None, None]


class Swin(nn.Module):
    """Folds windows into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.block = SwinTransformerBlock(WIDTH, 2, [4, 4], [2, 2])

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Zoo(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, 2, 1)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.grouped = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2, padding_mode="reflect", bias=False)
        self.frozen = FrozenBatchNorm2d(WIDTH)
        self.dilated = nn.Conv2d(WIDTH, WIDTH, 3, padding="same", dilation=2)
        self.group_norm = nn.GroupNorm(2, WIDTH)
        self.plain_bn = nn.BatchNorm2d(WIDTH, affine=False)
        self.strided = nn.Conv2d(WIDTH, WIDTH, 1, 2)
        self.scaled = Scaled()
        self.attention = Attention()
        self.pooled = Pooled()
        self.convnext = CNBlock(WIDTH, 0.5, 0.0)
        self.swin = Swin()
        self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 4, 2, 1, groups=4)
        self.head = nn.Conv2d(WIDTH, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.frozen(self.grouped(y)) + y)
        y = self.plain_bn(self.group_norm(self.dilated(y)))
        y = self.scaled(self.strided(y))
        y = y + self.attention(y)
        y = self.swin(self.convnext(self.pooled(y)))
        return self.head(F.relu(self.up(y)))


def zoo(num_classes: int) -> nn.Module:
    return Zoo(num_classes)
