"""Differences and their intervals against plain loops; the effect of pairing; the coverage of the intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gearnn_ray.evaluation import statistics
from gearnn_ray.evaluation.records import AverageRow, DifferenceRow
from gearnn_ray.evaluation.statistics import PUBLISHED, verdict
from gearnn_ray.store import tables
from tests.conftest import SEGMENTATION

Counts = NDArray[np.int64]
Cells = Mapping[tuple[str, str], Sequence[Counts]]


def evidence(cells: Cells) -> dict[tuple[str, str], list[dict[str, torch.Tensor]]]:
    """The counts as the task's evidence."""
    return {place: [{"counts": torch.from_numpy(counts.astype(np.int32))} for counts in seeds] for place, seeds in cells.items()}


def differences(cells: Cells, **options: Any) -> list[DifferenceRow]:
    return statistics.differences(SEGMENTATION, evidence(cells), **options)


def averages(cells: Cells, axes: Mapping[str, Sequence[str]], **options: Any) -> list[AverageRow]:
    return statistics.averages(SEGMENTATION, evidence(cells), axes, **options)


def mean_iou(counts_KK: Any) -> float:
    """mIoU in percent over the classes that occur, one class after the other."""
    values = []
    for k in range(len(counts_KK)):
        inside = int(counts_KK[k][k])
        union = int(counts_KK[k].sum()) + int(counts_KK[:, k].sum()) - inside
        if union:
            values.append(100 * inside / union)
    return sum(values) / len(values) if values else 0.0


def score(counts_NKK: Counts) -> float:
    """mIoU of all images together."""
    return mean_iou(counts_NKK.sum(0))


def evaluated(labels_NK: Counts, right_N: Any, rng: np.random.Generator) -> Counts:
    """Counts of a network that classifies this share of each image's pixels correctly, and guesses the rest."""
    images, classes = labels_NK.shape
    counts = np.zeros((images, classes, classes), np.int64)
    for image, right in enumerate(np.broadcast_to(right_N, images)):
        for label, pixels in enumerate(labels_NK[image]):
            chances = np.full(classes, (1 - right) / classes)
            chances[label] += right
            counts[image, label] = rng.multinomial(pixels, chances)
    return counts


def some_cells() -> Cells:
    """Seven images of three classes, the last class in one image only; as many seeds as a method may have."""
    rng = np.random.default_rng(3)
    labels_NK = rng.integers(20, 60, (7, 3))
    labels_NK[1:, 2] = 0
    cells = {}
    for shift, level in enumerate(("jpeg-10", "jpeg-50", "clean")):
        for method, right, seeds in (("original", 0.5, 1), ("gearnn", 0.6, 2), ("switching", 0.7, 3)):
            cells[method, level] = [evaluated(labels_NK, right + shift / 10, rng) for _ in range(seeds)]
    # nobody guesses the class where it does not occur, so that it is absent from many a resample
    for counts in (counts for seeds in cells.values() for counts in seeds):
        counts[:, :, 1] += counts[:, :, 2] * (labels_NK[:, 2] == 0)[:, None]
        counts[1:, :, 2] = 0
    return cells


def resampled(cells: Cells, method: str, level: str, resamples: int, seed: int) -> list[float]:
    """Mean over seeds of the mIoU of each resample, image by image."""
    images = len(cells[method, level][0])
    draws = np.random.default_rng(seed).multinomial(images, [1 / images] * images, size=resamples)
    values = []
    for draw in draws:
        of_seeds = []
        for counts in cells[method, level]:
            total = torch.zeros(3, 3, dtype=torch.int64)
            for image, times in enumerate(draw):
                for _ in range(times):
                    total += torch.from_numpy(counts[image])
            of_seeds.append(mean_iou(total))
        values.append(sum(of_seeds) / len(of_seeds))
    return values


def whole(cells: Cells, method: str, level: str) -> float:
    return float(np.mean([mean_iou(counts.sum(0)) for counts in cells[method, level]]))


def test_differences_are_those_of_a_plain_loop() -> None:
    cells = some_cells()
    draws = np.random.default_rng(5).multinomial(7, [1 / 7] * 7, size=40)
    assert 0 < (draws[:, 0] == 0).sum() < 40, "some resamples lack the rare class"
    rows = differences(cells, resamples=40, seed=5)
    assert [(row["method"], row["level"], row["seeds"]) for row in rows] == [
        (method, level, seeds)
        for level in ("jpeg-10", "jpeg-50", "clean")
        for method, seeds in (("original", 1), ("switching", 3))
    ]
    for row in rows:
        method, level = row["method"], row["level"]
        gaps = np.subtract(resampled(cells, method, level, 40, 5), resampled(cells, "gearnn", level, 40, 5))
        assert row["value"] == pytest.approx(whole(cells, method, level) - whole(cells, "gearnn", level), abs=1e-10)
        assert (row["low"], row["high"]) == pytest.approx(tuple(np.percentile(gaps, (2.5, 97.5))), abs=1e-10)
        assert row["low"] < row["high"]


def test_averages_are_those_of_a_plain_loop() -> None:
    cells = some_cells()
    levels = ("jpeg-10", "jpeg-50")
    rows = averages(cells, {"jpeg": levels, "brightness": ("clean",)}, resamples=40, seed=5)
    assert [(row["axis"], row["method"], row["levels"]) for row in rows] == [
        (axis, method, count) for axis, count in (("jpeg", 2), ("brightness", 1)) for method in ("original", "switching")
    ]
    for row in rows[:2]:
        method = row["method"]
        mine, theirs = (
            np.mean([resampled(cells, each, level, 40, 5) for level in levels], axis=0) for each in ("gearnn", method)
        )
        assert row["average"] == pytest.approx(np.mean([whole(cells, method, level) for level in levels]), abs=1e-10)
        assert row["gearnn"] == pytest.approx(np.mean([whole(cells, "gearnn", level) for level in levels]), abs=1e-10)
        assert row["difference"] == pytest.approx(row["gearnn"] - row["average"], abs=1e-10)
        assert (row["low"], row["high"]) == pytest.approx(tuple(np.percentile(mine - theirs, (2.5, 97.5))), abs=1e-10)
    assert [row["published"] for row in rows] == [18.12, None, 18.12, None]
    assert PUBLISHED == {"mIoU": {"original": 18.12, "stability": 4.84}}


def test_an_average_counts_the_levels_that_both_have_once_each() -> None:
    cells = {cell: seeds for cell, seeds in some_cells().items() if cell not in {("original", "jpeg-50"), ("gearnn", "clean")}}
    rows = averages(cells, {"jpeg": ("jpeg-10", "jpeg-50", "jpeg-90"), "brightness": ("clean",)}, resamples=9)
    assert [(row["axis"], row["method"], row["levels"]) for row in rows] == [("jpeg", "original", 1), ("jpeg", "switching", 2)]
    assert rows[0]["gearnn"] == pytest.approx(whole(cells, "gearnn", "jpeg-10"))
    of_levels = {(row["method"], row["level"]): row for row in differences(cells, resamples=9)}
    assert of_levels.keys() == {("original", "jpeg-10"), ("switching", "jpeg-10"), ("switching", "jpeg-50")}
    alone = of_levels["original", "jpeg-10"]
    assert (rows[0]["difference"], rows[0]["low"], rows[0]["high"]) == pytest.approx(
        (-alone["value"], -alone["high"], -alone["low"])
    )


def test_without_the_method_compared_with_there_is_nothing_to_say() -> None:
    others = {cell: seeds for cell, seeds in some_cells().items() if cell[0] != "gearnn"}
    assert differences(others) == averages(others, {"jpeg": ("jpeg-10",)}) == []
    assert differences({}) == averages({}, {"jpeg": ("jpeg-10",)}) == []


def test_rows_fit_their_tables() -> None:
    cells = some_cells()
    for schema, rows in (
        (tables.DIFFERENCES, differences(cells, resamples=9)),
        (tables.AVERAGES, averages(cells, {"jpeg": ("jpeg-10",)}, resamples=9)),
    ):
        assert all(list(row) == schema.names for row in rows)
        assert tables.table(schema, rows).to_pylist() == rows


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_equal_methods_differ_by_exactly_nothing(seed: int, images: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    counts = evaluated(rng.integers(0, 30, (images, classes)), 0.6, rng)
    cells = {("gearnn", "jpeg-10"): [counts], ("mixed", "jpeg-10"): [counts.copy()]}
    (row,) = differences(cells, resamples=20, seed=seed)
    assert (row["value"], row["low"], row["high"]) == (0, 0, 0)
    (row,) = averages(cells, {"jpeg": ("jpeg-10",)}, resamples=20, seed=seed)
    assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)
    assert verdict(row["low"], row["high"]) == "ties"


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_what_is_hard_for_all_does_not_widen_the_interval(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels_NK = np.full((40, 2), 1000)
    easy_N = rng.uniform(0.1, 0.9, 40)
    cells = {
        ("gearnn", "clean"): [evaluated(labels_NK, easy_N + 0.05, rng)],
        ("mixed", "clean"): [evaluated(labels_NK, easy_N, rng)],
    }
    (row,) = differences(cells, resamples=300, seed=seed)
    paired = row["high"] - row["low"]
    ours, theirs = (
        [score(cells[method, "clean"][0][rng.integers(0, 40, 40)]) for _ in range(300)] for method in ("mixed", "gearnn")
    )
    low, high = np.percentile(np.subtract(ours, theirs), (2.5, 97.5))
    assert paired < (high - low) / 4
    assert row["high"] < 0 < high, "without pairing so clear a difference would be none"


def test_levels_of_an_average_are_paired_too() -> None:
    rng = np.random.default_rng(8)
    labels_NK = np.full((40, 2), 1000)
    gain_N = rng.uniform(-0.3, 0.3, 40)
    levels = [f"jpeg-{quality}" for quality in range(10, 100, 10)]
    cells = {}
    for level in levels:
        cells["mixed", level] = [evaluated(labels_NK, 0.5, rng)]
        cells["gearnn", level] = [evaluated(labels_NK, 0.5 + gain_N, rng)]
    (row,) = averages(cells, {"jpeg": levels})
    alone = np.mean([row["high"] - row["low"] for row in differences(cells)])
    # the same images gain at every level: nine levels say little more than one, not three times as much
    assert row["high"] - row["low"] == pytest.approx(alone, rel=0.1)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_a_comparison_turned_round_is_its_negative_and_others_change_nothing(seed: int) -> None:
    cells = some_cells()
    to_gearnn = {(row["method"], row["level"]): row for row in differences(cells, resamples=30, seed=seed)}
    for back in differences(cells, against="switching", resamples=30, seed=seed):
        if back["method"] == "gearnn":
            row = to_gearnn["switching", back["level"]]
            assert (back["value"], back["low"], back["high"]) == pytest.approx(
                (-row["value"], -row["high"], -row["low"]), abs=1e-9
            )
    fewer = {cell: cells[cell] for cell in (("switching", "clean"), ("gearnn", "clean"))}
    assert differences(fewer, resamples=30, seed=seed) == [to_gearnn["switching", "clean"]]


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    classes, images, trials = 3, 60, 300
    # a population of images that differ in what they show and how hard they are; its own gap is the truth
    labels_NK = rng.integers(0, 400, (2000, classes))
    easy_N = rng.uniform(0.2, 0.9, 2000)
    gearnn, mixed = (evaluated(labels_NK, easy_N + gain, rng) for gain in (rng.normal(0.02, 0.04, 2000).clip(-0.1, 0.1), 0))
    truth = score(mixed) - score(gearnn)
    held = 0
    for trial in range(trials):
        seen = rng.integers(0, 2000, images)
        cells = {("gearnn", "clean"): [gearnn[seen]], ("mixed", "clean"): [mixed[seen]]}
        (row,) = differences(cells, resamples=300, seed=trial)
        held += row["low"] <= truth <= row["high"]
    assert 0.91 <= held / trials <= 0.98


def test_an_own_seed_draws_own_resamples() -> None:
    cells = some_cells()
    assert differences(cells, resamples=30) == differences(cells, resamples=30, seed=0)
    other = differences(cells, resamples=30, seed=1)
    for row, again in zip(differences(cells, resamples=30), other, strict=True):
        assert row["value"] == again["value"]
        assert (row["low"], row["high"]) != (again["low"], again["high"])


def test_other_images_or_another_order_are_refused() -> None:
    cells = dict(some_cells())
    for wrong in (cells["gearnn", "clean"][0][:-1], cells["gearnn", "clean"][0][::-1]):
        broken = {**cells, ("gearnn", "clean"): [cells["gearnn", "clean"][0], wrong]}
        for call in (lambda: differences(broken), lambda: averages(broken, {"brightness": ("clean",)})):  # noqa: B023
            with pytest.raises(ValueError, match="labels of gearnn at clean are not those of original at jpeg-10"):
                call()


def test_no_seed_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        differences({**some_cells(), ("mixed", "clean"): []})


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.1, 2, "wins"), (-2, -0.1, "loses"), (-1, 1, "ties"), (0, 0, "ties"), (0, 1, "ties"), (-1, 0, "ties")],
)
def test_a_verdict_is_of_gearnn(low: float, high: float, word: str) -> None:
    assert verdict(low, high) == word
