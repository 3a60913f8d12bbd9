"""The Pareto front of a sweep's points, its knee, the recommendation, rows and sentence."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearnn_ray.offline.level_run import LevelResult
from gearnn_ray.offline.selection import LayerSelection
from gearnn_ray.store import tables
from gearnn_ray.sweep.figure import sweep_figure
from gearnn_ray.sweep.findings import Point, knee, pareto_front, recommended, rows_of, sentence


def point(size: int, score: float, complete: bool = True, budget: str = "", importance: str = "mean-abs") -> Point:
    """Two levels whose mean is `score` and whose bytes add up to `size`."""
    levels = [("jpeg-10", score - 1, size // 2), ("jpeg-20", score + 1, size - size // 2)]
    chosen = LayerSelection(layers=("a",), storage_formats={}, used=1, objective=1.0, bound=1.0, status="OPTIMAL")
    results = [LevelResult(n, 40.0, full=60.0, adaptor=s, digest=n, bytes=b, selection=chosen) for n, s, b in levels]
    return Point(budget or f"{size}B", size // 4, importance, tuple(results), complete)


def test_an_adaptor_that_levels_share_is_counted_once() -> None:
    own = point(10, 50.0)
    shared = tuple(replace(result, digest="one", bytes=7) for result in own.results)
    assert (own.bytes, replace(own, results=shared).bytes) == (10, 7)


sizes_and_scores = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20), st.booleans()), max_size=8)


@given(sizes_and_scores)
def test_the_front_is_what_no_other_beats(drawn: list[tuple[int, int, bool]]) -> None:
    points = [point(*each) for each in drawn]
    front = pareto_front(points)
    done = [p for p in points if p.complete]

    def beaten(p: Point) -> bool:
        return any((o.bytes <= p.bytes and o.score >= p.score) and (o.bytes < p.bytes or o.score > p.score) for o in done)

    assert {(p.bytes, p.score) for p in front} == {(p.bytes, p.score) for p in done if not beaten(p)}
    assert [p.bytes for p in front] == sorted({p.bytes for p in front})


@given(sizes_and_scores, st.sampled_from([0.0, 0.5, 3.0]))
def test_the_recommended_is_the_smallest_near_the_best(drawn: list[tuple[int, int, bool]], within: float) -> None:
    points = [point(*each) for each in drawn]
    done = [p for p in points if p.complete]
    found = recommended(points, within)
    if not done:
        assert found is None
        assert sentence(points, within, "mIoU") == "No budget was evaluated at every level, so none is recommended."
        return
    near = [p for p in done if p.score >= max(p.score for p in done) - within]
    assert found is not None
    assert found.bytes == min(p.bytes for p in near)
    assert found.score == max(p.score for p in near if p.bytes == found.bytes)
    assert sum(row["recommended"] for row in rows_of(points, "mIoU", 1000, within)) == 2


def test_the_knee_is_where_more_memory_begins_to_give_little() -> None:
    front = [point(10, 40.0), point(20, 50.0), point(60, 52.0), point(110, 54.0)]
    assert knee(front) is front[1]
    assert knee(front[:2]) is None
    straight = [point(10, 40.0), point(20, 41.0), point(30, 42.0)]
    assert knee(straight) is None
    sagging = [point(10, 40.0), point(20, 40.1), point(30, 50.0)]
    assert knee(sagging) is None


def test_one_sentence_says_what_and_against_what() -> None:
    points = [point(100, 48.0, budget="0.05%"), point(400, 49.8, budget="0.2%"), point(2000, 50.0, budget="1%")]
    assert sentence(points, 0.5, "mIoU") == (
        "Recommended: 0.2% (49.8 mIoU, 0.4 kB). It is the smallest within 0.5 points of the most accurate budget tried, "
        "1% (50.0 mIoU, 2.0 kB)."
    )
    assert sentence(points, 0, "AP") == ("Recommended: 1% (50.0 AP, 2.0 kB). It is also the most accurate budget tried.")
    other = point(300, 49.9, budget="0.2%", importance="fisher")
    assert sentence([*points, other], 0.5, "mIoU").startswith("Recommended: 0.2% by fisher (49.9 mIoU, 0.3 kB).")
    large = point(1_137_432, 60.2, budget="1%")
    assert sentence([large], 0.5, "mIoU").startswith("Recommended: 1% (60.2 mIoU, 1.14 MB).")


def test_rows_are_those_of_the_table_unfinished_ones_included() -> None:
    lost = Point("1%", 500, "mean-abs", (), complete=False)
    stopped = point(200, 45.0, complete=False)
    points = [point(100, 48.0), stopped, lost]
    rows = rows_of(points, "mIoU", 1000, 0.5)
    assert tables.table(tables.SWEEP, rows).num_rows == 4
    assert [row["pareto"] for row in rows] == [True, True, False, False]
    assert [row["mean"] for row in rows] == [48.0, 48.0, 45.0, 45.0]
    assert math.isnan(lost.score)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_figure_is_the_same_bytes_again(count: int) -> None:
    points = [point(100 * (i + 1), 48 + i, importance=("mean-abs", "l2")[i % 2]) for i in range(count)]
    png = sweep_figure(points, 0.5, "mIoU", 10**6, "title")
    assert png.startswith(b"\x89PNG")
    assert png == sweep_figure(points, 0.5, "mIoU", 10**6, "title")
