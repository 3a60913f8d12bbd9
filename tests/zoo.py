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


# ── networks that use their modules in ways which cannot be seen from outside ────────────────────────────────────


class Patches(nn.Module):
    """Patches of 8 pixels in, `middle` over them, classes out."""

    def __init__(self, num_classes: int, middle: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.middle = middle
        self.head = nn.Conv2d(WIDTH, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)))


class Encoder(nn.Module):
    """torch's fast path reads the weights of its attention's projection."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).mT).mT.reshape(x.shape)


class Position(nn.Module):
    """Not called, but asked by its parent for a method."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.rand(1, WIDTH, 1, 1))

    def features(self, x: Tensor) -> Tensor:
        return x + self.position


class AsksForFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Position()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.features(x)


class Standardised(nn.Conv2d):
    """A convolution that changes its weights before it uses them."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Twice(nn.Module):
    """One module under two names, inside one with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH, 1, 1))
        self.one = nn.Conv2d(WIDTH, WIDTH, 1)
        self.other = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x) * self.gain)


class Constant(nn.Module):
    """What it gives is the same for all samples of a level."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.rand(1, WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.values


class AddsConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.constant = Constant()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.constant(x)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Hooked(nn.Module):
    """Takes what a hook has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.kept: dict[str, Tensor] = {}
        self.gate.register_forward_hook(lambda module, given, output, kept=self.kept: kept.__setitem__("it", output))

    def forward(self, x: Tensor) -> Tensor:
        self.gate(x)
        return x + self.kept["it"]


class TiedNames(nn.Module):
    """A wrapper that names a part of its backbone again."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH))
        self.layer = self.backbone[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone[1](self.layer(x))


class Windows(nn.Module):
    """Windows of 4 × 4 pixels folded into the batch, one at small sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = F.pad(x, (0, -w % 4, 0, -h % 4))
        rows, columns = y.shape[2] // 4, y.shape[3] // 4
        z = y.view(n, c, rows, 4, columns, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        z = self.linear(z).view(n, rows, columns, 4, 4, c).permute(0, 5, 1, 3, 2, 4)
        return z.reshape(y.shape)[..., :h, :w]


def encoder(num_classes: int) -> nn.Module:
    return Patches(num_classes, Encoder())


def asks_for_features(num_classes: int) -> nn.Module:
    return Patches(num_classes, AsksForFeatures())


def standardised(num_classes: int) -> nn.Module:
    return Patches(num_classes, Standardised(WIDTH, WIDTH, 3, padding=1))


def twice(num_classes: int) -> nn.Module:
    return Patches(num_classes, Twice())


def adds_constant(num_classes: int) -> nn.Module:
    return Patches(num_classes, AddsConstant())


def hooked(num_classes: int) -> nn.Module:
    return Patches(num_classes, Hooked())


def tied_names(num_classes: int) -> nn.Module:
    return Patches(num_classes, TiedNames())


def windows(num_classes: int) -> nn.Module:
    return Patches(num_classes, Windows())


class Dispatches(nn.Module):
    """Looks at the type of its part: seen from outside, nothing is amiss."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if isinstance(self.part, nn.Conv2d) else x


def dispatches(num_classes: int) -> nn.Module:
    return Patches(num_classes, Dispatches())
