"""How methods are named, described, grouped and ordered in a report."""

from collections.abc import Iterable, Sequence

import numpy as np

from gearnn_ray.evaluation.baselines import TITLES
from gearnn_ray.evaluation.records import AccuracyRow, AverageRow, BytesRow, TuningRow

METHODS: dict[str, str] = {
    "original": "the network as it was trained, at every level",
    "original-scaled": "the same network; frames of another size are scaled to that of its training images first, without a byte",
    "switching": "a full fine-tune per level; the whole network of each level is stored",
    "mixed": "one network, fine-tuned on images of all levels",
    "stability": "one network, fine-tuned so that noise on a clean image changes its output little (Zheng et al. 2016)",
    "gearnn": "per level, the layers that Eq. (2) selects within M, fine-tuned with all others frozen",
    "gearnn-released": "the adaptors of the release, made with the release's own learning rate",
    "clean-tuned": "the control: one network, fine-tuned for as many epochs on undistorted images",
    "bn-statistics": "per level, the statistics of every batch normalisation re-estimated without labels (Li et al. 2016)",
    "bn-tuned": "per level, every batch normalisation fine-tuned",
    "first-block": "per level, the layers nearest to the input fine-tuned, as many as fit into M (Lee et al. 2023)",
    "auto-rgn": "per level, the layers with the largest relative gradients within M, each at its own rate (Lee et al. 2023)",
    "random": "per level, layers drawn at random within M; each seed is a draw",
    "gearnn-nearest": "at an untrained level, the adaptor of the nearest trained level",
    "gearnn-interpolated": "at an untrained level, a linear mixture of the two neighbours' adaptors",
    "gearnn-entropy": "at an untrained level, each image's own mixture of them, by both networks' entropies (Oh et al. 2025)",
}
"""A short description of each method."""

GROUPS: dict[str, tuple[str, ...]] = {
    "few numbers per level": ("bn-statistics", "bn-tuned", "first-block", "auto-rgn", "random"),
    "whole networks": ("original", "original-scaled", "switching", "mixed", "stability", "clean-tuned"),
    "other adaptors of GearNN": ("gearnn-released", "gearnn-nearest", "gearnn-interpolated", "gearnn-entropy"),
}
"""What GearNN is compared with, by memory cost."""


def title_of(method: str) -> str:
    """The method's title."""
    return TITLES.get(method, method)


def in_order(methods: Iterable[str]) -> list[str]:
    """Each method once, in the order of tables."""
    found = set(methods)
    return sorted(found, key=[*TITLES, *sorted(found - TITLES.keys())].index)


def methods_of(rows: Sequence[AccuracyRow] | Sequence[AverageRow] | Sequence[BytesRow] | Sequence[TuningRow]) -> list[str]:
    """The methods in these rows, each once, in the order of tables."""
    return in_order(row["method"] for row in rows)


def grouped(methods: Sequence[str]) -> dict[str, list[str]]:
    """Methods by GROUPS, without empty groups; those in no group come last."""
    known = {method for members in GROUPS.values() for method in members}
    groups = {title: [m for m in members if m in methods] for title, members in GROUPS.items()}
    groups["others"] = [method for method in methods if method not in known]
    return {title: members for title, members in groups.items() if members}


def seeds_of(rows: Iterable[AccuracyRow]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """(method, level) to mean and standard deviation over seeds, percent; the latter is None for a single seed."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["method"], row["level"]), []).append(row["value"])
    return {cell: (float(np.mean(each)), float(np.std(each, ddof=1)) if len(each) > 1 else None) for cell, each in values.items()}


def several_seeds(rows: Iterable[AccuracyRow]) -> bool:
    """Whether any method has more than one seed at a level."""
    return any(spread is not None for _, spread in seeds_of(rows).values())
