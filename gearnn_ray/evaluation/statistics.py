"""How far apart two methods are: mIoU of per-image confusion counts, and paired bootstrap intervals over the images.

Each resample draws as many images as there are, with replacement, and the same ones for every method, level and seed:
what makes an image hard for all methods cancels in a difference. A score is computed from a resample's summed counts,
as it is from all images. So an interval says what other images like these would show. Of other training seeds it says
nothing. It is a little narrow where a class occurs in few images, and too narrow where images resemble each other, as
neighbouring frames of one video do.

Shapes: counts_NKK int64 [image, label, prediction] pixels; draws_RN how often a resample holds an image.
Scores in percent, differences in percentage points.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Scores = NDArray[np.float64]

INTERVAL = (2.5, 97.5)
"""Percentiles between which 95% of the resamples lie."""

PUBLISHED: dict[str, float] = {"original": 18.12, "stability": 4.84}
"""Method to GearNN's average gain over it in mIoU points: abstract of Xie & Kim 2020, Cityscapes, the paper's distortions."""


def mean_iou_of(counts_KK: Counts) -> Scores:
    """mIoU in percent of counts [..., K, K] as [...]: `tasks.segmentation.mean_iou` of each."""
    return _mean_iou(*_overlap(counts_KK))


def differences(
    cells: Mapping[tuple[str, str], Sequence[Counts]], against: str = "gearnn", resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of tables.DIFFERENCES: each method minus `against`, at every level that both have.

    cells: (method, level) to counts_NKK of each seed, all of the same images in the same order; else ValueError.
    """
    scores = _scores(cells, resamples, seed)
    rows = []
    for (method, level), own_R in scores.items():
        if method == against or (against, level) not in scores:
            continue
        value, low, high = _with_interval(own_R - scores[against, level])
        rows.append(
            {
                "method": method,
                "level": level,
                "value": value,
                "low": low,
                "high": high,
                "seeds": len(cells[method, level]),
            }
        )
    return rows


def averages(
    cells: Mapping[tuple[str, str], Sequence[Counts]],
    axes: Mapping[str, Sequence[str]],
    against: str = "gearnn",
    published: Mapping[str, float] = PUBLISHED,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of tables.AVERAGES: `against` minus each method, per axis, every level that both have with equal weight.

    cells as in `differences`; axes: axis to its levels. A resample holds the same images at all levels, so that the interval
    is that of the average itself.
    """
    scores = _scores(cells, resamples, seed)
    rows = []
    for axis, levels in axes.items():
        for method in dict.fromkeys(method for method, _ in cells if method != against):
            both = [level for level in levels if (method, level) in scores and (against, level) in scores]
            if not both:
                continue
            own_R = np.mean([scores[method, level] for level in both], axis=0)
            reference_R = np.mean([scores[against, level] for level in both], axis=0)
            difference, low, high = _with_interval(reference_R - own_R)
            rows.append(
                {
                    "axis": axis,
                    "method": method,
                    "levels": len(both),
                    "average": float(own_R[0]),
                    "gearnn": float(reference_R[0]),
                    "difference": difference,
                    "low": low,
                    "high": high,
                    "published": published.get(method),
                }
            )
    return rows


def verdict(low: float, high: float) -> Literal["wins", "ties", "loses"]:
    """What the interval of GearNN minus a method (as in tables.AVERAGES) says of GearNN; a tie where it holds 0."""
    if low > 0:
        return "wins"
    return "loses" if high < 0 else "ties"


def _overlap(counts_KK: Counts) -> tuple[Counts, Counts]:
    """Intersection and union of label and prediction, in pixels, per class: [..., K] each. Both add up over images."""
    intersection_K = np.diagonal(counts_KK, axis1=-2, axis2=-1)
    return intersection_K, counts_KK.sum(-1) + counts_KK.sum(-2) - intersection_K


def _mean_iou(intersection_K: NDArray[Any], union_K: NDArray[Any]) -> Scores:
    """Percent, over the classes that occur; 0 where none does. [..., K] pixels to [...]."""
    present_K = union_K > 0
    iou_K = intersection_K / np.where(present_K, union_K, 1)
    return np.asarray(100 * iou_K.sum(-1) / np.maximum(present_K.sum(-1), 1), dtype=np.float64)


def _scores(
    cells: Mapping[tuple[str, str], Sequence[Counts]], resamples: int, seed: int
) -> dict[tuple[str, str], Scores]:
    """Each cell's [1 + resamples] scores, mean over its seeds: of the images as they are, then of every resample."""
    if not cells:
        return {}
    first = next(iter(cells))
    labels_NK = cells[first][0].sum(-1)
    images = len(labels_NK)
    drawn_RN = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    # float64 for a fast product of matrices; pixels are exact in it up to 2^53
    draws_RN = np.vstack([np.ones(images), drawn_RN])
    scores = {}
    for cell, seeds in cells.items():
        # labels do not depend on method or level: where they differ, images would be paired with other images
        if not all(np.array_equal(counts_NKK.sum(-1), labels_NK) for counts_NKK in seeds):
            raise ValueError(
                f"the labels of {' at '.join(cell)} are not those of {' at '.join(first)}: "
                "expected the same images in the same order for every method, level and seed"
            )
        overlaps = [_overlap(counts_NKK) for counts_NKK in seeds]
        each_SR = np.stack([_mean_iou(draws_RN @ inside_NK, draws_RN @ union_NK) for inside_NK, union_NK in overlaps])
        scores[cell] = each_SR.mean(0)
    return scores


def _with_interval(differences_R: Scores) -> tuple[float, float, float]:
    """The difference on the images as they are (the first), and the interval of the others."""
    low, high = np.percentile(differences_R[1:], INTERVAL)
    return float(differences_R[0]), float(low), float(high)
