"""Dilated residual networks DRN-D-22 and DRN-D-38 with the segmentation head (Yu, Koltun, Funkhouser, CVPR 2017). State-dict
names equal those of the published segmentation checkpoints (`base.3.0.conv1.weight`), so these load unchanged.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 8
_CHANNELS = (16, 32, 64, 128, 256, 512, 512, 512)
_NARROW = (8, 8, 16, 40, 80, 160, 160, 160)
# number of convolutions (stages 1, 2, 7, 8) or residual blocks (stages 3 to 6) per stage; stage 0 is one 7x7 convolution
_DEPTHS = {"drn_d_22": (1, 1, 2, 2, 2, 2, 1, 1), "drn_d_38": (1, 1, 3, 4, 6, 3, 1, 1)}


def _conv3x3(inputs: int, outputs: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)


def _convolutions(inputs: int, outputs: int, count: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    parts: list[nn.Module] = []
    for i in range(count):
        parts += [_conv3x3(inputs, outputs, stride if i == 0 else 1, dilation), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        inputs = outputs
    return nn.Sequential(*parts)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride, dilation)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs, 1, dilation)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(y + shortcut, inplace=True)


def _blocks(inputs: int, outputs: int, count: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, dilation)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, dilation) for _ in range(count - 1)))


def bilinear_kernel(size: int) -> Tensor:
    """[size, size] weights of a transposed convolution that interpolates bilinearly (DRN's `fill_up_weights`)."""
    half = math.ceil(size / 2)
    centre = (2 * half - 1 - half % 2) / (2.0 * half)
    line = 1 - (torch.arange(size, dtype=torch.float64) / half - centre).abs()
    return torch.outer(line, line).float()


class DRNSeg(nn.Module):
    """Maps x_BCHW (normalised float) to logits_BKHW, K = `num_classes`. The bilinear upsampler is never trained."""

    def __init__(self, depths: tuple[int, ...], num_classes: int, channels: tuple[int, ...] = _CHANNELS) -> None:
        super().__init__()
        c = channels
        self.base = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, c[0], 7, padding=3, bias=False), nn.BatchNorm2d(c[0]), nn.ReLU(inplace=True)),
            _convolutions(c[0], c[0], depths[0]),
            _convolutions(c[0], c[1], depths[1], stride=2),
            _blocks(c[1], c[2], depths[2], stride=2),
            _blocks(c[2], c[3], depths[3], stride=2),
            # from here on dilation replaces striding: the output stays at 1/8 of the input size
            _blocks(c[3], c[4], depths[4], dilation=2),
            _blocks(c[4], c[5], depths[5], dilation=4),
            _convolutions(c[5], c[6], depths[6], dilation=2),
            _convolutions(c[6], c[7], depths[7]),
        )
        self.seg = nn.Conv2d(c[7], num_classes, 1)
        self.up = nn.ConvTranspose2d(
            num_classes, num_classes, 2 * STRIDE, STRIDE, padding=STRIDE // 2, groups=num_classes, bias=False
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan))
        # smaller than in DRN's own initialisation: a base that is trained from scratch starts from small logits
        nn.init.normal_(self.seg.weight, 0.0, 0.01)
        assert self.seg.bias is not None
        nn.init.zeros_(self.seg.bias)
        with torch.no_grad():
            self.up.weight.copy_(bilinear_kernel(2 * STRIDE).expand_as(self.up.weight))
        self.up.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.up(self.seg(self.base(x)))
        # strided stages round a side up to a multiple of 8; logit (0, 0) belongs to pixel (0, 0)
        cropped: Tensor = logits[..., : x.shape[-2], : x.shape[-1]]
        return cropped


def drn_d_22(num_classes: int) -> DRNSeg:
    """DRN-D-22 for segmentation: 15,907,139 floats with 19 classes."""
    return DRNSeg(_DEPTHS["drn_d_22"], num_classes)


def drn_d_22_narrow(num_classes: int) -> DRNSeg:
    """DRN-D-22 with a third of the channels, for a first try on a few cores: 1,560,139 floats with 19 classes."""
    return DRNSeg(_DEPTHS["drn_d_22"], num_classes, _NARROW)


def drn_d_38(num_classes: int) -> DRNSeg:
    """DRN-D-38 for segmentation: 26,022,723 floats with 19 classes."""
    return DRNSeg(_DEPTHS["drn_d_38"], num_classes)
