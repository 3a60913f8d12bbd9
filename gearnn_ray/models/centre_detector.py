"""A small single-stage detector: a heatmap of object centres (Zhou et al., "Objects as Points", 2019), and at each position the
distances to the four sides of the box (Tian et al., "FCOS", ICCV 2019), at a quarter of the image's size.

Letters of shapes: B images, K classes, h and w positions, D detections.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearnn_ray.models.detector import Found, SingleStageDetector, Target, Terms
from gearnn_ray.models.lesson import yes_no_divergence

STRIDE = 4  # pixels between two positions
_MOST = 100  # detections of one image
_CHANNELS = (24, 48, 96, 128)
_RARE = 0.01  # share of positions that the untrained network takes for a centre
_NARROWEST = 0.9  # standard deviation of the smallest centre's Gaussian, in positions


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(self.first(x))), inplace=True)


class CentreDetector(SingleStageDetector):
    """Maps normalised images to logits [B, K, h, w] of centres and the logarithms [B, 4, h, w] of distances, in positions."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        first, quarter, eighth, sixteenth = _CHANNELS
        self.stem = nn.Sequential(_convolution(3, first, stride=2), _convolution(first, quarter, stride=2), _Residual(quarter))
        self.eighth = nn.Sequential(_convolution(quarter, eighth, stride=2), _Residual(eighth))
        self.sixteenth = nn.Sequential(_convolution(eighth, sixteenth, stride=2), _Residual(sixteenth))
        self.up_sixteenth = _convolution(sixteenth, eighth, 1)
        self.up_eighth = _convolution(eighth, quarter, 1)
        self.merged = _Residual(quarter)
        self.head = _convolution(quarter, quarter)
        self.centres = nn.Conv2d(quarter, num_classes, 1)
        self.distances = nn.Conv2d(quarter, 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for head, bias in ((self.centres, -math.log(1 / _RARE - 1)), (self.distances, 0.0)):
            nn.init.normal_(head.weight, 0.0, 0.01)
            assert head.bias is not None
            nn.init.constant_(head.bias, bias)

    def raw(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Sides of any length: a strided stage rounds up."""
        quarter = self.stem(x_BCHW)
        eighth = self.eighth(quarter)
        eighth = eighth + _upsampled(self.up_sixteenth(self.sixteenth(eighth)), eighth)
        y = self.head(self.merged(quarter + _upsampled(self.up_eighth(eighth), quarter)))
        return self.centres(y), self.distances(y)

    def decode(self, raw: tuple[Tensor, Tensor], height: int, width: int) -> Found:
        """The `_MOST` highest peaks, each of which is the largest among its eight neighbours."""
        heat, logarithms = (part.float() for part in raw)
        K, h, w = heat.shape[1:]
        heat = heat.sigmoid()
        peaks = torch.where(F.max_pool2d(heat, 3, 1, 1) == heat, heat, 0.0).flatten(1)
        scores_BD, places_BD = peaks.topk(min(_MOST, K * h * w), dim=1)
        labels_BD, places_BD = places_BD // (h * w), places_BD % (h * w)
        sides = logarithms.flatten(2).exp().gather(2, places_BD[:, None].expand(-1, 4, -1)).transpose(1, 2)
        centre = torch.stack([places_BD % w, places_BD // w], 2) + 0.5
        boxes = STRIDE * torch.cat([centre - sides[..., :2], centre + sides[..., 2:]], 2)
        limits = boxes.new_tensor([width, height, width, height])
        return {"boxes": torch.minimum(boxes.clamp(min=0), limits), "scores": scores_BD, "labels": labels_BD}

    def candidates(self, raw: tuple[Tensor, Tensor]) -> Tensor:
        """Every cell of the heatmap."""
        return raw[0].float().sigmoid().flatten(2).transpose(1, 2)

    def losses(self, raw: tuple[Tensor, Tensor], targets: Sequence[Target], height: int, width: int) -> Terms:
        """The focal loss of the heatmap (Zhou et al., Eq. 1) and the generalised IoU of boxes (Rezatofighi et al. 2019), both per
        object. Positions inside a crowd region are nobody's centre and no error.
        """
        heat, logarithms = (part.float() for part in raw)
        with torch.no_grad():
            wanted, usable, places = _heatmaps(targets, heat)
        image, _, row, column, boxes_G4 = places
        probability = heat.sigmoid().clamp(1e-4, 1 - 1e-4)
        centre = wanted == 1
        hit = torch.where(centre, (1 - probability) ** 2 * probability.log(), 0.0)
        miss = torch.where(centre, 0.0, (1 - wanted) ** 4 * probability**2 * (1 - probability).log() * usable)
        sides = logarithms[image, :, row, column].exp()
        middle = torch.stack([column, row], 1) + 0.5
        found = STRIDE * torch.cat([middle - sides[:, :2], middle + sides[:, 2:]], 1)
        count = torch.tensor(len(image), device=heat.device)
        return {"centres": (-(hit + miss).sum(), count), "boxes": (_box_distance(found, boxes_G4).sum(), count)}

    def imitation(
        self, raw: tuple[Tensor, Tensor], taught: tuple[Tensor, Tensor], temperature: float, height: int, width: int
    ) -> Terms:
        """The divergence at every cell of the heatmap, and the generalised IoU of the boxes at every position, weighted by the
        teacher's highest score there; both per unit of that score. Where the teacher saw larger images, each position has the
        teacher's surest answer in its area, because a peak is a single cell.
        """
        (heat, logarithms), (their_heat, their_logarithms) = ((part.float() for part in each) for each in (raw, taught))
        size, larger = heat.shape[-2:], their_heat.shape[-2:]
        best_B1hw, place_B1hw = F.adaptive_max_pool2d(their_heat.amax(1, keepdim=True), size, return_indices=True)
        shrunk = heat.new_tensor([size[1] / larger[1], size[0] / larger[0]] * 2)
        theirs = _boxes(their_logarithms).gather(1, place_B1hw.flatten(1)[..., None].expand(-1, -1, 4)) * shrunk
        sure_BP = best_B1hw.sigmoid().flatten(1)
        apart_BP = _box_distance(_boxes(logarithms).flatten(0, 1), theirs.flatten(0, 1)).view_as(sure_BP)
        divergence = yes_no_divergence(F.adaptive_max_pool2d(their_heat, size), heat, temperature)
        return {"centres": (divergence.sum(), sure_BP.sum()), "boxes": ((sure_BP * apart_BP).sum(), sure_BP.sum())}


def _boxes(logarithms: Tensor) -> Tensor:
    """The box of every position [B, h·w, 4] in pixels, from the logarithms of its distances [B, 4, h, w]."""
    h, w = logarithms.shape[-2:]
    row, column = torch.meshgrid(*(torch.arange(side, device=logarithms.device) for side in (h, w)), indexing="ij")
    centre, sides = torch.stack([column, row], -1).flatten(0, 1) + 0.5, logarithms.flatten(2).exp().transpose(1, 2)
    return STRIDE * torch.cat([centre - sides[..., :2], centre + sides[..., 2:]], 2)


def _upsampled(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")


Places = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of G objects: image, label, row, column [G], box [G, 4]


def _heatmaps(targets: Sequence[Target], like: Tensor) -> tuple[Tensor, Tensor, Places]:
    """For each image and class a Gaussian around every centre [B, K, h, w]; 1 where a position may count as an error, else 0
    [B, 1, h, w]; and the place of every object. Widths of Gaussians follow the boxes'.
    """
    B, K, h, w = like.shape
    x_w, y_h = (torch.arange(side, device=like.device, dtype=torch.float32) + 0.5 for side in (w, h))
    wanted, usable = like.new_zeros(B, K, h, w), like.new_ones(B, 1, h, w)
    for index, target in enumerate(targets):
        for left, top, right, bottom in (target["crowd"] / STRIDE).tolist():
            inside = (y_h[:, None] > top - 0.5) & (y_h[:, None] < bottom + 0.5) & (x_w > left - 0.5) & (x_w < right + 0.5)
            usable[index, 0][inside] = 0
    image = torch.cat([torch.full_like(t["labels"], i) for i, t in enumerate(targets)])
    label, boxes = (torch.cat([target[name] for target in targets]) for name in ("labels", "boxes"))
    middle, size = (boxes[:, :2] + boxes[:, 2:]) / (2 * STRIDE), (boxes[:, 2:] - boxes[:, :2]) / STRIDE
    column, row = middle[:, 0].long().clamp(0, w - 1), middle[:, 1].long().clamp(0, h - 1)
    spread = (size / 6).clamp(min=_NARROWEST)
    across = torch.exp(-(((x_w - column[:, None] - 0.5) / spread[:, :1]) ** 2) / 2)
    down = torch.exp(-(((y_h - row[:, None] - 0.5) / spread[:, 1:]) ** 2) / 2)
    for each in range(len(image)):
        own = wanted[image[each], label[each]]
        torch.maximum(own, down[each][:, None] * across[each], out=own)
    wanted[image, label, row, column] = 1
    return wanted, usable, (image, label, row, column, boxes)


def _box_distance(a_G4: Tensor, b_G4: Tensor) -> Tensor:
    """1 - generalised IoU of pairs of boxes [G]."""
    inside = (torch.minimum(a_G4[:, 2:], b_G4[:, 2:]) - torch.maximum(a_G4[:, :2], b_G4[:, :2])).clamp(min=0).prod(1)
    around = (torch.maximum(a_G4[:, 2:], b_G4[:, 2:]) - torch.minimum(a_G4[:, :2], b_G4[:, :2])).prod(1).clamp(min=1e-6)
    union = ((a_G4[:, 2:] - a_G4[:, :2]).prod(1) + (b_G4[:, 2:] - b_G4[:, :2]).prod(1) - inside).clamp(min=1e-6)
    distance: Tensor = 2 - inside / union - union / around
    return distance


def centre_detector(num_classes: int) -> CentreDetector:
    """The built-in detector for small images."""
    return CentreDetector(num_classes)
