"""Semantic segmentation: training batches, the loss, and mIoU from one confusion matrix over whole images.

Recipe of DRN (Yu et al. 2017): random crop, horizontal flip, label 255 ignored. Knows nothing of levels or layers.

Shapes: x_BCHW uint8 or float images, y_BHW int64 class ids, hist_KK [label, prediction] pixel counts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

IGNORED = 255
METRIC = "mIoU"

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Normalisation:
    """Per-channel (RGB) mean and standard deviation of pixel values in units of [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to normalised float32."""
        mean = torch.tensor(self.mean, device=x_BCHW.device).mul_(255).view(1, 3, 1, 1)
        scale = torch.tensor(self.std, device=x_BCHW.device).mul_(255).reciprocal_().view(1, 3, 1, 1)
        return (x_BCHW.float() - mean) * scale


def resize_label(label: Image, height: int, width: int) -> Image:
    """[H, W] class ids at another size, by nearest neighbour (pixel centres)."""
    if label.shape == (height, width):
        return label
    rows = ((np.arange(height) + 0.5) * label.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * label.shape[1] / width).astype(np.int64)
    resized: Image = label[rows[:, None], columns]
    return resized


def crop_size(images: Sequence[Image], crop: int) -> tuple[int, int]:
    """Height and width of the training crop: `crop`, or less where the smallest image is smaller."""
    shapes = getattr(images, "shapes", None) or [image.shape for image in images]
    return min(crop, *(s[0] for s in shapes)), min(crop, *(s[1] for s in shapes))


def training_batches(
    images: Sequence[Image],
    labels: Sequence[Image],
    batch_size: int,
    crop: tuple[int, int],
    seed: Sequence[int],
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: every image once in random order, cropped and flipped; an incomplete last batch is left out.

    Yields x_BCHW uint8 and y_BHW int64. A pure function of `seed`; worker `rank` gets its share of each batch,
    augmented as it would be alone. A set smaller than one batch makes one batch.
    """
    rng = np.random.default_rng(list(seed))
    height, width = crop
    order = rng.permutation(len(images))
    draws = rng.random((len(images), 3))
    for start in range(0, steps_per_epoch(len(images), batch_size) * batch_size, batch_size):
        x, y = [], []
        for position in range(start + rank, min(start + batch_size, len(order)), world_size):
            index, (top_u, left_u, flip_u) = order[position], draws[position]
            image = images[index]
            label = resize_label(labels[index], image.shape[0], image.shape[1])
            top = int(top_u * (image.shape[0] - height + 1))
            left = int(left_u * (image.shape[1] - width + 1))
            window = (slice(top, top + height), slice(left, left + width))
            image, label = image[window], label[window]
            if flip_u < 0.5:
                image, label = image[:, ::-1], label[:, ::-1]
            x.append(image)
            y.append(label)
        x_BHWC = torch.from_numpy(np.stack(x))
        yield x_BHWC.permute(0, 3, 1, 2), torch.from_numpy(np.stack(y)).long()


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches of an epoch, at least one."""
    return max(1, images // batch_size)


def logits_of(model: Callable[[Tensor], Any], x_BCHW: Tensor) -> Tensor:
    """float32 logits_BKhw; torchvision's segmentation networks return theirs in a dict under "out"."""
    output = model(x_BCHW)
    if isinstance(output, dict):
        output = output["out"]
    return output.float()  # type: ignore[no-any-return]


def loss_of(logits_BKhw: Tensor, y_BHW: Tensor) -> Tensor:
    """Cross-entropy, mean over pixels with a label; 0 where there is none (not NaN). Logits are resized to the label."""
    if logits_BKhw.shape[-2:] != y_BHW.shape[-2:]:
        logits_BKhw = F.interpolate(logits_BKhw, size=y_BHW.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits_BKhw, y_BHW, ignore_index=IGNORED, reduction="sum")
    return total / (y_BHW != IGNORED).sum().clamp(min=1)


def confusion(logits_1Khw: Tensor, label: Image) -> Tensor:
    """hist_KK (int64) of one image: the logits are resized to the label's size, then judged pixel by pixel."""
    classes = logits_1Khw.shape[1]
    y = torch.from_numpy(label.astype(np.int64)).to(logits_1Khw.device)
    if logits_1Khw.shape[-2:] != y.shape:
        logits_1Khw = F.interpolate(logits_1Khw, size=y.shape, mode="bilinear", align_corners=False)
    prediction = logits_1Khw[0].argmax(0)
    valid = y != IGNORED
    cells = y[valid] * classes + prediction[valid]
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes)


def mean_iou(hist_KK: Tensor) -> float:
    """Mean intersection over union in percent, over the classes that occur in labels or predictions."""
    hist = hist_KK.double()
    union = hist.sum(0) + hist.sum(1) - hist.diag()
    present = union > 0
    if not present.any():
        return 0.0
    return float(100 * (hist.diag()[present] / union[present]).mean())
