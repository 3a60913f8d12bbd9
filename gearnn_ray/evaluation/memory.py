"""How many numbers a method holds in memory for |Q| distortion levels: Table 1 of the paper, and what a release holds.

One of the |Q| levels is undistorted and served by the network itself: there are |Q| - 1 adaptors.
"""

from collections.abc import Mapping, Sequence

from gearnn_ray.evaluation.records import MemoryRow


def table_1(floats: int, budget: int, levels: Sequence[int] = range(1, 11)) -> list[dict[str, int]]:
    """A row per |Q|: levels, and the floats of the original, of DNN switching (|Q| networks) and of GearNN.

    floats: N, of the network. budget: M, of one adaptor. GearNN holds N + (|Q| - 1)·M (Table 1).
    """
    return [
        {"levels": count, "original": floats, "switching": count * floats, "gearnn": floats + (count - 1) * budget}
        for count in levels
    ]


def memory_rows(
    network: str, model_floats: int, budget: int, actual: Mapping[str, Sequence[int]], constant: Sequence[str] = ()
) -> list[MemoryRow]:
    """Table 1 for one to ten levels, then what the methods actually hold.

    actual: method to the floats of each adapted level, without the base network; |Q| also counts the undistorted level.
    constant: methods that hold one network; they are listed with the largest |Q| of the other methods.
    """

    def row(method: str, levels: int, floats: int, kind: str) -> MemoryRow:
        share = floats / model_floats
        return {
            "network": network, "method": method, "levels": levels, "floats": floats, "of_network": share, "kind": kind,
        }  # fmt: skip

    by_formula = [
        row(method, line["levels"], line[method], "budget")
        for method in ("original", "switching", "gearnn")
        for line in table_1(model_floats, budget)
    ]
    most = max((len(floats) + 1 for floats in actual.values()), default=1)
    return [
        *by_formula,
        *(row(method, most, model_floats, "actual") for method in constant),
        *(row(method, len(floats) + 1, model_floats + sum(floats), "actual") for method, floats in actual.items()),
    ]
