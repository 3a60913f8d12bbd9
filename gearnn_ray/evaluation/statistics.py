"""How far apart two methods are: paired bootstrap intervals over the validation images, of a task's first metric.

Each resample draws as many images as there are, with replacement, and the same images for every method, level and seed: what
makes an image hard for all methods cancels in a difference. The score of a resample is the metric of all its images together.
The intervals describe other images like these; they do not include the spread over training seeds. They are slightly too
narrow where a class occurs in few images, and too narrow where images resemble each other, as the frames of one video do.

Shapes: weights_RN how often resample R holds image N. Scores are percentages, differences are in percentage points.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gearnn_ray.evaluation.records import AverageRow, DifferenceRow
from gearnn_ray.tasks.base import Task

Cells = Mapping[tuple[str, str], Sequence[Mapping[str, Tensor]]]
"""(method, level) to the task's evidence [N, ...] of each seed, all of the same images in the same order."""

Scores = NDArray[np.float64]

INTERVAL = (2.5, 97.5)
"""Percentiles between which 95% of the resamples lie."""

PUBLISHED: dict[str, dict[str, float]] = {"mIoU": {"original": 18.12, "stability": 4.84}}
"""Metric and method to GearNN's average gain over the method in points, on Cityscapes (abstract of Xie & Kim 2020)."""


def compare(
    task: Task, cells: Cells, axes: Mapping[str, Sequence[str]], against: str = "gearnn", resamples: int = 1000, seed: int = 0
) -> tuple[list[DifferenceRow], list[AverageRow]]:
    """Each method against GearNN: at every level (`differences`), and on the average of each axis (`averages`). axes: axis to its
    levels. Raises ValueError if the images of two cells differ.
    """
    scores = _scores(task, cells, resamples, seed)
    return _differences(cells, scores, against), _averages(task, cells, scores, axes, against)


def differences(task: Task, cells: Cells, against: str = "gearnn", resamples: int = 1000, seed: int = 0) -> list[DifferenceRow]:
    """Each method minus `against`, at every level that both have. Raises ValueError if the images of two cells differ."""
    return _differences(cells, _scores(task, cells, resamples, seed), against)


def _differences(cells: Cells, scores: Mapping[tuple[str, str], Scores], against: str) -> list[DifferenceRow]:
    rows: list[DifferenceRow] = []
    for (method, level), own_R in scores.items():
        if method == against or (against, level) not in scores:
            continue
        value, low, high = _with_interval(own_R - scores[against, level])
        seeds = len(cells[method, level])
        rows.append({"method": method, "level": level, "value": value, "low": low, "high": high, "seeds": seeds})
    return rows


def averages(
    task: Task, cells: Cells, axes: Mapping[str, Sequence[str]], against: str = "gearnn", resamples: int = 1000, seed: int = 0
) -> list[AverageRow]:
    """`against` minus each method per axis, the mean over the levels that both have. Raises ValueError like `differences`.

    axes: axis to its levels. A resample holds the same images at all levels, so that the interval is that of the mean itself.
    """
    return _averages(task, cells, _scores(task, cells, resamples, seed), axes, against)


def _averages(
    task: Task, cells: Cells, scores: Mapping[tuple[str, str], Scores], axes: Mapping[str, Sequence[str]], against: str
) -> list[AverageRow]:
    published = PUBLISHED.get(task.metrics[0], {})
    rows: list[AverageRow] = []
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
                    "axis": axis, "method": method, "levels": len(both), "average": float(own_R[0]),
                    "gearnn": float(reference_R[0]), "difference": difference, "low": low, "high": high,
                    "published": published.get(method),
                }
            )  # fmt: skip
    return rows


def verdict(low: float, high: float) -> Literal["wins", "ties", "loses"]:
    """GearNN's verdict from the interval of GearNN minus a method (as in tables.AVERAGES); a tie if it contains 0."""
    if low > 0:
        return "wins"
    return "loses" if high < 0 else "ties"


def _scores(task: Task, cells: Cells, resamples: int, seed: int) -> dict[tuple[str, str], Scores]:
    """Each cell's [1 + resamples] scores, the mean over its seeds: of all images, then of every resample."""
    if not cells:
        return {}
    first = next(iter(cells))
    targets_N = task.target_summary(cells[first][0])
    images = len(targets_N)
    drawn_RN = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    weights_RN = np.vstack([np.ones(images), drawn_RN])
    scores = {}
    for cell, seeds in cells.items():
        # targets do not depend on method or level: if they differ, images would be paired with other images
        if not all(np.array_equal(task.target_summary(evidence), targets_N) for evidence in seeds):
            raise ValueError(
                f"the labels of {' at '.join(cell)} are not those of {' at '.join(first)}: "
                "expected the same images in the same order for every method, level and seed"
            )
        scores[cell] = np.stack([task.first_metric(evidence, weights_RN) for evidence in seeds]).mean(0)
    return scores


def _with_interval(differences_R: Scores) -> tuple[float, float, float]:
    """The difference over all images (the first), and the interval of the others."""
    low, high = np.percentile(differences_R[1:], INTERVAL)
    return float(differences_R[0]), float(low), float(high)
