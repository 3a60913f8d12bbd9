"""FastestDet, as an example of a single-stage detector of your own: the network, the decoder and the training loss.

    --model.name examples.fastestdet:fastestdet --model.weights fastestdet_coco.pth --model.mean 0 0 0 --model.std 1 1 1

Network, decoder and loss follow FastestDet (https://github.com/dog-qiuqiu/FastestDet, BSD-3-Clause, (c) 2022 xuehao.ma); the code
is written afresh. State-dict names equal the published ones, so published weights load unchanged. The backbone is ShuffleNetV2
(Ma et al., ECCV 2018). The input is RGB in [0, 1], hence the mean of 0 and the standard deviation of 1 above.

Letters of shapes: B images, K classes, h and w positions (22 x 22 of a 352 x 352 image), P = h * w, D detections, G objects, N
pairs of an object and a position.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from gearnn_ray.models.detector import Found, SingleStageDetector, Target, Terms
from gearnn_ray.models.lesson import class_divergence, yes_no_divergence

_CHANNELS = (24, 48, 96, 192)  # of the first convolution and of stages 2 to 4
_BLOCKS = (4, 8, 4)  # in stages 2 to 4
_MOST = 100  # detections of one image
_LEAST_SCORE = 0.001
_OVERLAP = 0.45  # intersection over union from which on the lower of two detections of one class is dropped
_POWERS = (0.6, 0.4)  # of objectness and of the class probability in a score
_WEIGHTS = {"boxes": 8.0, "objectness": 16.0, "classes": 1.0}  # of the loss's terms
_SHARES = (0.25, 0.75)  # of an image's objectness loss: positions with an object, and without
_TIE = 1e-6  # by how much rounding may put the mean of equal numbers above them


def _convolution(inputs: int, outputs: int, size: int = 1, stride: int = 1, relu: bool = True) -> list[nn.Module]:
    """1x1, or depthwise where `size` is larger; with batch normalisation."""
    groups = 1 if size == 1 else inputs
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    parts = [conv, nn.BatchNorm2d(outputs)]
    return [*parts, nn.ReLU(inplace=True)] if relu else parts


class _Block(nn.Module):
    """A ShuffleNetV2 block with this many output channels. With stride 1 half of the channels pass unchanged beside the
    convolutions of the others; with stride 2 all input channels, half as many, go through both branches.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        inputs = channels // 2
        self.branch_main = nn.Sequential(
            *_convolution(inputs, inputs), *_convolution(inputs, inputs, 3, stride, relu=False), *_convolution(inputs, inputs)
        )
        self.branch_proj: nn.Sequential | None = None
        if stride == 2:
            self.branch_proj = nn.Sequential(*_convolution(inputs, inputs, 3, 2, relu=False), *_convolution(inputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.branch_proj is None:
            # every second channel: the shuffle after the block before, which FastestDet does by permuting batch and channels
            return torch.cat((x[:, 0::2], self.branch_main(x[:, 1::2])), 1)
        return torch.cat((self.branch_proj(x), self.branch_main(x)), 1)


class _Backbone(nn.Module):
    """Maps images to features at 1/8, 1/16 and 1/32 of their size. Sides are multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(3, _CHANNELS[0], 3, 2, padding=1, bias=False)
        self.first_conv = nn.Sequential(first, nn.BatchNorm2d(_CHANNELS[0]), nn.ReLU(inplace=True))
        self.stage2, self.stage3, self.stage4 = (
            nn.Sequential(*(_Block(channels, 2 if i == 0 else 1) for i in range(blocks)))
            for channels, blocks in zip(_CHANNELS[1:], _BLOCKS, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        eighth = self.stage2(F.max_pool2d(self.first_conv(x), 3, 2, padding=1))
        sixteenth = self.stage3(eighth)
        return eighth, sixteenth, self.stage4(sixteenth)


class _Conv1x1(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Sequential(*_convolution(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv1x1(x)
        return y


class _Pyramid(nn.Module):
    """Context of three sizes: one, two and three depthwise 5x5 convolutions side by side, and a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.Conv1x1 = _Conv1x1(inputs, outputs)
        self.S1, self.S2, self.S3 = (
            nn.Sequential(*(part for _ in range(depth) for part in _convolution(outputs, outputs, 5))) for depth in (1, 2, 3)
        )
        self.output = nn.Sequential(*_convolution(3 * outputs, outputs, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv1x1(x)
        y = self.output(torch.cat((self.S1(x), self.S2(x), self.S3(x)), 1))
        return F.relu(x + y, inplace=True)


class _Branch(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv5x5 = nn.Sequential(*_convolution(inputs, inputs, 5), *_convolution(inputs, outputs, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv5x5(x)
        return y


class _Head(nn.Module):
    """Features to logits [B, 1 + 4 + K, h, w]: objectness, box, classes."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.conv1x1 = _Conv1x1(inputs, inputs)
        self.obj_layers = _Branch(inputs, 1)
        self.reg_layers = _Branch(inputs, 4)
        self.cls_layers = _Branch(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1x1(x)
        return torch.cat((self.obj_layers(x), self.reg_layers(x), self.cls_layers(x)), 1)


class FastestDet(SingleStageDetector):
    """Maps RGB images in [0, 1] to logits [B, 1 + 4 + K, h, w] at 1/16 of their size. Position (row, column) stands for the point
    (16 * column, 16 * row) of the image: the centre of its box lies up to one position away from it (tanh), and the box is at
    most as large as the image (sigmoid).

    The published network ends with the sigmoid of objectness and the softmax of classes. Here `decode` and `losses` apply them,
    in float32 whatever the network's precision.
    """

    input_size = (352, 352)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = _Backbone()
        self.SPP = _Pyramid(sum(_CHANNELS[1:]), _CHANNELS[2])
        self.detect_head = _Head(_CHANNELS[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def raw(self, x_BCHW: Tensor) -> Tensor:
        eighth, sixteenth, thirty_second = self.backbone(x_BCHW.flip(1))  # the network was trained on BGR
        smaller, larger = F.avg_pool2d(eighth, 3, 2, padding=1), F.interpolate(thirty_second, scale_factor=2, mode="nearest")
        logits: Tensor = self.detect_head(self.SPP(torch.cat((smaller, sixteenth, larger), 1)))
        return logits

    def decode(self, raw: Tensor, height: int, width: int) -> Found:
        """The `_MOST` highest scores after non-maximum suppression within each class. A position gives its best class only. Boxes
        may leave the image, as published.
        """
        objectness, box, classes = _parts(raw)
        best_BP, label_BP = classes.flatten(2).log_softmax(1).max(1)
        score_BP = _scores(objectness.flatten(1), best_BP)
        boxes_BP4 = _boxes(box, height, width)
        chosen = [_best(*one) for one in zip(boxes_BP4.detach(), score_BP.detach(), label_BP, strict=True)]
        position_BD = torch.stack([F.pad(own, (0, _MOST - len(own)), value=-1) for own in chosen])
        there_BD, position_BD = position_BD >= 0, position_BD.clamp(min=0)
        return {
            "boxes": boxes_BP4.gather(1, position_BD[..., None].expand(-1, -1, 4)) * there_BD[..., None],
            "scores": score_BP.gather(1, position_BD) * there_BD,
            "labels": label_BP.gather(1, position_BD) * there_BD,
        }

    def candidates(self, raw: Tensor) -> Tensor:
        """Every position with every class."""
        objectness, _, classes = _parts(raw)
        return _scores(objectness.flatten(2), classes.flatten(2).log_softmax(1)).transpose(1, 2)

    def losses(self, raw: Tensor, targets: Sequence[Target], height: int, width: int) -> Terms:
        """The published loss: 8 * boxes + 16 * objectness + classes, each a mean.

        An object is paired with the up to four positions around its centre. Pairs whose SIoU is below the mean of all pairs in
        the batch are dropped. Boxes are judged by 1 - SIoU and classes by the negative log-likelihood, both per pair; objectness
        at every position by the smooth L1 distance from the SIoU of its pair, or from 0, where a quarter of the weight goes to
        the pairs of an image. Positions whose point lies in a crowd region are left out unless they have an object.

        It differs from the published loss in three points. Without objects, or with a single pair, which is not above its own
        mean, the published one is not a number. The SIoU that objectness aims at passes no gradient here. A position of several
        objects aims at the largest SIoU instead of any.
        """
        objectness, box, classes = _parts(raw)
        h, w = objectness.shape[-2:]
        image, position, truth_N4, label = _pairs(targets, h, w, height, width)
        quality_N = _siou(_boxes(box, height, width)[image, position], truth_N4)
        kept = quality_N > quality_N.mean() - _TIE
        image, position, label, quality_N = image[kept], position[kept], label[kept], quality_N[kept]
        log_probability = classes.flatten(2).log_softmax(1)[image, :, position]
        likelihood_N = log_probability.gather(1, label[:, None]).squeeze(1)
        objectness_BP = objectness.flatten(1).sigmoid()
        crowded_BP = _crowded(targets, h, w, height, width)
        wanted_BP, factor_BP, counted = _objectness(quality_N.detach(), image, position, crowded_BP)
        distance_BP = F.smooth_l1_loss(objectness_BP, wanted_BP, reduction="none")
        pairs = torch.tensor(len(image), device=raw.device)
        return {
            "boxes": (_WEIGHTS["boxes"] * (1 - quality_N).sum(), pairs),
            "objectness": (_WEIGHTS["objectness"] * (factor_BP * distance_BP).sum(), counted),
            "classes": (_WEIGHTS["classes"] * -likelihood_N.sum(), pairs),
        }

    def imitation(self, raw: Tensor, taught: Tensor, temperature: float, height: int, width: int) -> Terms:
        """The published loss with the teacher's answers in place of objects: boxes and classes at every position, weighted by the
        teacher's objectness there, and the divergence of objectness, each per unit of that objectness.
        """
        (objectness, box, classes), (their_objectness, their_box, their_classes) = _parts(raw), _parts(taught)
        sure_BP = their_objectness.flatten(1).sigmoid()
        both = (_boxes(each, height, width).flatten(0, 1) for each in (box, their_box))
        quality_BP = _siou(*both).view_as(sure_BP)
        divergence_BP = class_divergence(their_classes, classes, 1, temperature).flatten(1)
        unlike = yes_no_divergence(their_objectness, objectness, temperature)
        return {
            "boxes": (_WEIGHTS["boxes"] * (sure_BP * (1 - quality_BP)).sum(), sure_BP.sum()),
            "objectness": (unlike.sum(), sure_BP.sum()),
            "classes": (_WEIGHTS["classes"] * (sure_BP * divergence_BP).sum(), sure_BP.sum()),
        }


def _parts(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits [B, 1, h, w], [B, 4, h, w] and [B, K, h, w] of objectness, boxes and classes in float32."""
    logits = raw.float()
    return logits[:, :1], logits[:, 1:5], logits[:, 5:]


def _scores(objectness: Tensor, log_probability: Tensor) -> Tensor:
    """Scores of places, from the logits of their objectness and the logarithms of their class probabilities."""
    # powers as multiples of logarithms: their gradient stays finite where a probability rounds to 0
    return (_POWERS[0] * F.logsigmoid(objectness) + _POWERS[1] * log_probability).exp()


def _boxes(box: Tensor, height: int, width: int) -> Tensor:
    """Logits [B, 4, h, w] to left, top, right and bottom in pixels [B, P, 4]; they may leave the image."""
    h, w = box.shape[-2:]
    row, column = torch.meshgrid(*(torch.arange(side, device=box.device) for side in (h, w)), indexing="ij")
    x, y, wide, high = box.unbind(1)
    x, y = (x.tanh() + column) * (width / w), (y.tanh() + row) * (height / h)
    wide, high = wide.sigmoid() * (width / 2), high.sigmoid() * (height / 2)
    return torch.stack([x - wide, y - high, x + wide, y + high], -1).flatten(1, 2)


def _best(boxes_P4: Tensor, score_P: Tensor, label_P: Tensor) -> Tensor:
    """The positions [up to D] of one image's detections, highest scores first."""
    candidates = (score_P > _LEAST_SCORE).nonzero().squeeze(1)
    kept: Tensor = batched_nms(boxes_P4[candidates], score_P[candidates], label_P[candidates], _OVERLAP)
    return candidates[kept[:_MOST]]


def _pairs(targets: Sequence[Target], h: int, w: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every object with the positions at the four corners around its centre, those outside the grid left out: image [N], position
    [N] from 0 to P - 1, box [N, 4], label [N].
    """
    boxes, labels = (torch.cat([target[name] for target in targets]) for name in ("boxes", "labels"))
    images = torch.cat([torch.full_like(target["labels"], index) for index, target in enumerate(targets)])
    column, row = ((boxes[:, :2] + boxes[:, 2:]) / 2 * boxes.new_tensor([w / width, h / height])).long().unbind(1)
    columns_G4 = column[:, None] + torch.tensor([0, 1, 0, 1], device=boxes.device)
    rows_G4 = row[:, None] + torch.tensor([0, 0, 1, 1], device=boxes.device)
    inside = (columns_G4 < w) & (rows_G4 < h)
    own = inside.nonzero()[:, 0]
    return images[own], (rows_G4 * w + columns_G4)[inside], boxes[own], labels[own]


def _crowded(targets: Sequence[Target], h: int, w: int, height: int, width: int) -> Tensor:
    """Whether each position's point lies in a crowd region [B, P]."""
    device = targets[0]["crowd"].device
    x_w, y_h = (torch.arange(n, device=device) * (side / n) for n, side in ((w, width), (h, height)))
    crowded = []
    for target in targets:
        left, top, right, bottom = target["crowd"][..., None].unbind(1)
        across, down = (left <= x_w) & (x_w <= right), (top <= y_h) & (y_h <= bottom)
        crowded.append((down[:, :, None] & across[:, None, :]).any(0).flatten())
    return torch.stack(crowded)


def _objectness(quality_N: Tensor, image: Tensor, position: Tensor, crowded_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Objectness to aim at [B, P], the factor of each position's loss [B, P], and how many positions count."""
    B, P = crowded_BP.shape
    place = image * P + position
    wanted_BP = quality_N.new_zeros(B * P).scatter_reduce(0, place, quality_N, "amax", include_self=False).view(B, P)
    positive = torch.zeros_like(crowded_BP).flatten().index_fill(0, place, True).view(B, P)
    counted = positive | ~crowded_BP
    # published: 0.25 * P / n at each of the n pairs of an image, so that these weigh as much as a quarter of all positions
    each_B1 = _SHARES[0] * counted.sum(1, keepdim=True) / image.bincount(minlength=B)[:, None].clamp(min=1)
    return wanted_BP, torch.where(positive, each_B1, _SHARES[1] * counted), counted.sum()


def _siou(a_N4: Tensor, b_N4: Tensor) -> Tensor:
    """SIoU [N] of pairs of boxes (Gevorgyan, "SIoU Loss: More Powerful Learning for Bounding Box Regression", 2022): their IoU
    less half of a distance between their centres and half of a difference of their sides. 1 for equal boxes; may be negative.
    """
    tiny = 1e-7
    a_size, b_size = a_N4[:, 2:] - a_N4[:, :2], b_N4[:, 2:] - b_N4[:, :2]
    inside = (torch.minimum(a_N4[:, 2:], b_N4[:, 2:]) - torch.maximum(a_N4[:, :2], b_N4[:, :2])).clamp(min=0).prod(1)
    around = (torch.maximum(a_N4[:, 2:], b_N4[:, 2:]) - torch.minimum(a_N4[:, :2], b_N4[:, :2])).clamp(min=tiny)
    iou = inside / (a_size.prod(1) + b_size.prod(1) - inside).clamp(min=tiny)
    apart = (b_N4[:, :2] + b_N4[:, 2:] - a_N4[:, :2] - a_N4[:, 2:]) / 2
    # sin(2α) of the angle α of the line between the centres; unlike the paper's arcsin it has a gradient where they meet
    angle = 2 * apart.prod(1).abs() / (apart.square().sum(1) + tiny)
    distance = (1 - torch.exp((angle[:, None] - 2) * (apart / around).square())).sum(1)
    unlike = (a_size - b_size).abs() / torch.maximum(a_size, b_size).clamp(min=tiny)
    shape = (1 - torch.exp(-unlike)).pow(4).sum(1)
    quality: Tensor = iou - (distance + shape) / 2
    return quality


def fastestdet(num_classes: int) -> SingleStageDetector:
    """FastestDet: 252,868 floats with 80 classes."""
    return FastestDet(num_classes)
