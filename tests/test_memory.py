"""Numbers in memory: the published columns of Table 1 to the last digit, and what is really held."""

import pytest

from gearnn_ray import build_model, model_size
from gearnn_ray.config.budget import budget_floats
from gearnn_ray.evaluation.memory import memory_rows, table_1
from gearnn_ray.store import tables

DRN_D_22 = (
    15_907_139, 15_938_953, 15_970_767, 16_002_581, 16_034_395,
    16_066_209, 16_098_023, 16_129_837, 16_161_651, 16_193_465,
)  # fmt: skip
DRN_D_38 = (
    26_022_723, 26_074_768, 26_126_813, 26_178_858, 26_230_903,
    26_282_948, 26_334_993, 26_387_038, 26_439_083, 26_491_128,
)  # fmt: skip


@pytest.mark.parametrize(("network", "budget", "published"), [("drn_d_22", 31_814, DRN_D_22), ("drn_d_38", 52_045, DRN_D_38)])
def test_table_1_is_the_papers_to_the_last_digit(network: str, budget: int, published: tuple[int, ...]) -> None:
    floats = model_size(build_model(network, num_classes=19))
    assert budget_floats("0.2%", floats) == budget
    rows = table_1(floats, budget_floats("0.2%", floats))
    assert [row["levels"] for row in rows] == list(range(1, 11))
    assert tuple(row["gearnn"] for row in rows) == published
    assert {row["original"] for row in rows} == {published[0]}
    assert [row["switching"] for row in rows] == [published[0] * count for count in range(1, 11)]


def test_rows_hold_the_formula_for_ten_levels_and_what_is_really_held() -> None:
    rows = memory_rows("net", 1000, 7, {"gearnn": [6, 5, 7], "switching": [1000, 1000], "bn-statistics": []})
    assert tables.table(tables.MEMORY, rows).num_rows == 33
    assert all(row.keys() == set(tables.MEMORY.names) for row in rows)
    budget = {(row["method"], row["levels"]): row["floats"] for row in rows if row["kind"] == "budget"}
    assert len(budget) == 30
    assert budget["original", 10] == budget["gearnn", 1] == budget["switching", 1] == 1000
    assert (budget["gearnn", 10], budget["switching", 10]) == (1063, 10_000)
    actual = {row["method"]: row for row in rows if row["kind"] == "actual"}
    # three adapted levels and the undistorted one
    assert (actual["gearnn"]["levels"], actual["gearnn"]["floats"]) == (4, 1018)
    assert (actual["switching"]["levels"], actual["switching"]["floats"]) == (3, 3000)
    assert (actual["bn-statistics"]["levels"], actual["bn-statistics"]["floats"]) == (1, 1000)
    assert actual["gearnn"]["of_network"] == 1.018
    assert {row["network"] for row in rows} == {"net"}
