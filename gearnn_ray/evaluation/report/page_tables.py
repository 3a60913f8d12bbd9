"""The tables of a report: rows of the evaluation's tables as captions, heads and cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gearnn_ray.evaluation.records import AverageRow, BytesRow, DifferenceRow, MemoryRow, TuningRow
from gearnn_ray.evaluation.report.content import Evaluation, at_levels, axis_title, capital, interval, responses, signed
from gearnn_ray.evaluation.report.figures import byte_levels
from gearnn_ray.evaluation.report.methods import grouped, in_order, methods_of, seeds_of, several_seeds, title_of
from gearnn_ray.evaluation.statistics import verdict

RowT = TypeVar("RowT", AverageRow, MemoryRow)


@dataclass(frozen=True)
class Cell:
    """mark: CSS classes. word: a marked word before the text."""

    text: str
    mark: str = ""
    word: str = ""


@dataclass(frozen=True)
class Table:
    """Heads, and rows in titled groups; a group without a title has no heading. The first column names the row."""

    caption: str
    heads: Sequence[str]
    groups: Mapping[str, Sequence[Sequence[Cell]]]


def _in_method_order(rows: Sequence[RowT]) -> list[RowT]:
    order = in_order(row["method"] for row in rows)
    return sorted(rows, key=lambda row: order.index(row["method"]))


def verdicts(e: Evaluation) -> Table | None:
    """Method × axis: whether GearNN wins, ties or loses, and by how much."""
    if not e.averages:
        return None
    rows = {(row["method"], row["axis"]): row for row in e.averages}
    axes = list(dict.fromkeys(row["axis"] for row in e.averages))
    stored = {m: max(r["floats"] for r in e.accuracy if r["method"] == m) for m in methods_of(e.accuracy)}

    def cell(row: AverageRow | None) -> Cell:
        if row is None:
            return Cell("")
        word = verdict(row["low"], row["high"])
        return Cell(f"{signed(row['difference'])} {interval(row)}", word, word)

    def line(method: str) -> list[Cell]:
        floats = f"{stored[method]:,}" if method in stored else ""
        return [Cell(title_of(method)), Cell(floats), *(cell(rows.get((method, axis))) for axis in axes)]

    return Table(
        "GearNN minus the method in percentage points, average over the axis's levels [95% interval].",
        ("against", "floats per level", *map(axis_title, axes)),
        {capital(group): [line(method) for method in methods] for group, methods in grouped(methods_of(e.averages)).items()},
    )


def accuracy(e: Evaluation, axis: str) -> Table:
    """Level × method; the best of a level is bold, and significant differences to GearNN are marked."""
    rows = at_levels(e.accuracy, e.axes[axis])
    cells = seeds_of(rows)
    methods = in_order(method for method, _ in cells)
    against = {(row["method"], row["level"]): row for row in e.differences}

    def line(level: str) -> list[Cell]:
        here = {method: cells[method, level] for method in methods if (method, level) in cells}
        best = max(round(mean, 1) for mean, _ in here.values())
        line = [Cell(level)]
        for method in methods:
            if method not in here:
                line.append(Cell(""))
                continue
            mean, spread = here[method]
            text = f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"
            mark = "best" if round(mean, 1) == best else ""
            if (method, level) in against:
                # a difference is the method minus GearNN, an average the reverse
                word = verdict(against[method, level]["low"], against[method, level]["high"])
                mark += {"wins": " above", "loses": " below", "ties": ""}[word]
            line.append(Cell(text, mark.strip()))
        return line

    caption = f"{e.metric} in percent on the validation images"
    caption += ", mean ± standard deviation over seeds" if several_seeds(rows) else ""
    caption += ". Bold: the best of the level"
    caption += "; ▲ ▼: above or below GearNN, the 95% interval without 0." if against else "."
    shown = [level for level in e.axes[axis] if any((method, level) in cells for method in methods)]
    return Table(caption, ("level", *map(title_of, methods)), {"": [line(level) for level in shown]})


def differences(e: Evaluation, axis: str) -> Table:
    """Level × method: the difference to GearNN with its interval."""
    rows = {(row["method"], row["level"]): row for row in at_levels(e.differences, e.axes[axis])}
    methods = in_order(method for method, _ in rows)

    def cell(row: DifferenceRow | None) -> Cell:
        return Cell("" if row is None else f"{signed(row['value'])} {interval(row)}")

    shown = [level for level in e.axes[axis] if any((method, level) in rows for method in methods)]
    return Table(
        "The method minus GearNN, percentage points [95% interval of a paired bootstrap over the images].",
        ("level", *map(title_of, methods)),
        {"": [[Cell(level), *(cell(rows.get((method, level))) for method in methods)] for level in shown]},
    )


def averages(e: Evaluation) -> Table | None:
    """Axis and method: averages over the levels, their difference, and the paper's figure."""
    if not e.averages:
        return None
    groups: dict[str, list[list[Cell]]] = {}
    for row in _in_method_order(e.averages):
        groups.setdefault(row["axis"], []).append(
            [
                Cell(title_of(row["method"])),
                Cell(str(row["levels"])),
                Cell(f"{row['average']:.1f}"),
                Cell(f"{row['gearnn']:.1f}"),
                Cell(signed(row["difference"]), "strong"),
                Cell(interval(row)),
                Cell("" if row["published"] is None else signed(row["published"])),
            ]
        )
    return Table(
        f"Averages of {e.metric} in percent over the levels that both have, each level with equal weight; differences in points.",
        ("method", "levels", "average", "GearNN", "GearNN − method", "95% interval", "the paper"),
        {capital(axis_title(axis)): groups[axis] for axis in dict.fromkeys((*e.axes, *groups)) if axis in groups},
    )


def table_1(e: Evaluation) -> Table | None:
    """The paper's Table 1."""
    rows = {(r["levels"], r["method"]): r for r in e.memory if r["kind"] == "budget"}
    if not rows:
        return None
    methods = in_order(method for _, method in rows)

    def line(count: int) -> list[Cell]:
        cells = (f"{rows[count, m]['floats']:,}" if (count, m) in rows else "" for m in methods)
        return [Cell(str(count)), *map(Cell, cells)]

    return Table(
        "Floats in memory for |Q| levels, the undistorted one among them: N for the original, |Q|·N for DNN switching, "
        "N + (|Q| − 1)·M for GearNN.",
        ("|Q|", *map(title_of, methods)),
        {"": [line(count) for count in sorted({levels for levels, _ in rows})]},
    )


def held(e: Evaluation) -> Table | None:
    """What the methods of this evaluation hold in memory."""
    rows = [row for row in e.memory if row["kind"] == "actual"]
    if not rows:
        return None

    def line(r: MemoryRow) -> list[Cell]:
        texts = (title_of(r["method"]), str(r["levels"]), f"{r['floats']:,}", f"{r['of_network']:.3f}")
        return [*map(Cell, texts)]

    return Table(
        "Floats that the methods hold in memory, including the base network.",
        ("method", "|Q|", "floats", "× network"),
        {"": [line(row) for row in _in_method_order(rows)]},
    )


def per_byte(e: Evaluation) -> Table | None:
    """Level and method: the score by floats."""
    if not e.bytes:
        return None
    order = in_order(methods_of(e.bytes))

    def line(row: BytesRow) -> list[Cell]:
        budget = "" if row["budget"] is None else f"{row['budget']:,}"
        return [*map(Cell, (title_of(row["method"]), budget, f"{row['floats']:,}", f"{row['value']:.1f}"))]

    rows = sorted(e.bytes, key=lambda row: (row["floats"], order.index(row["method"])))
    return Table(
        f"{e.metric} in percent, mean over seeds, by the floats stored for the level.",
        ("method", "budget M", "floats", e.metric),
        {level: [line(row) for row in rows if row["level"] == level] for level in byte_levels(e.bytes)},
    )


def rates(e: Evaluation) -> Table | None:
    """Method × learning rate: the scores on held-back training images, by which learning rates were chosen."""
    groups: dict[str, dict[str, dict[float, TuningRow]]] = {}
    for row in e.tuning:
        if row["alpha"] is None:  # else it belongs to stability training's grid
            groups.setdefault(row["level"], {}).setdefault(row["method"], {})[row["learning_rate"]] = row
    tried = sorted({rate for methods in groups.values() for at in methods.values() for rate in at})
    if not tried:
        return None
    return Table(
        f"{e.metric} in percent on training images held back from these fine-tunes, by learning rate; ✓ chosen.",
        ("method", *(f"{rate:g}" for rate in tried)),
        {
            level: [
                [Cell(title_of(method)), *(_tried(methods[method].get(rate)) for rate in tried)] for method in in_order(methods)
            ]
            for level, methods in groups.items()
        },
    )


def stability(e: Evaluation) -> Table | None:
    """Level × (α, σ), with the average over the levels that decided the choice; None if there was only one setting."""
    grid = {
        (r["level"], (r["alpha"], r["sigma"])): r
        for r in e.tuning
        if r["method"] == "stability" and r["alpha"] is not None and r["sigma"] is not None
    }
    settings = sorted({setting for _, setting in grid})
    if len(settings) < 2:
        return None
    levels = list(dict.fromkeys(level for level, _ in grid))
    whole = [level for level in levels if all((level, setting) in grid for setting in settings)]
    groups = {"": [[Cell(level), *(_tried(grid.get((level, s))) for s in settings)] for level in levels]}
    if len(whole) > 1:
        means = [sum(grid[level, s]["value"] or 0.0 for level in whole) / len(whole) for s in settings]
        groups[f"{len(whole)} levels with equal weight"] = [[Cell("average"), *(Cell(f"{mean:.1f}") for mean in means)]]
    return Table(
        f"{e.metric} in percent by the weight α of the loss's second term and the noise σ (pixels in [0, 1]); ✓ chosen.",
        ("level", *(f"α {alpha:g}, σ {sigma:g}" for alpha, sigma in settings)),
        groups,
    )


def _tried(row: TuningRow | None) -> Cell:
    if row is None:
        return Cell("")
    return Cell("diverged" if row["value"] is None else f"{row['value']:.1f}", "chosen" if row["chosen"] else "")


def shares(e: Evaluation) -> Table | None:
    """Level: the share of the network that the full fine-tune changed."""
    if not e.shares:
        return None
    lines = [(r["level"], f"{100 * r['by_layer']:.2f}%", f"{100 * r['by_weight']:.2f}%") for r in e.shares]
    return Table(
        "Share of the network that the full fine-tune changed by more than 2e-4: by the mean of each layer, and by weight.",
        ("level", "by layer", "by weight"),
        {"": [[*map(Cell, line)] for line in lines]},
    )


def frequency(e: Evaluation) -> Table | None:
    """Level: the high-frequency share of each network's response, and how similar both fine-tunes change it."""
    if not e.frequency:
        return None
    networks = ("original", "switching", "gearnn")
    lines = [
        (
            r.level,
            *(f"{100 * r.shares[n]:.1f}%" if n in r.shares else "" for n in networks),
            "" if r.similarity is None else f"{r.similarity:.2f}",
        )
        for r in responses(e)
    ]
    return Table(
        "Share of the whole response at high frequencies (vertical + horizontal at least 8), and the cosine similarity between "
        "the changes of the map by the full fine-tune and by the adaptor.",
        ("level", "original", "full fine-tune", "adaptor", "similarity"),
        {"": [[*map(Cell, line)] for line in lines]},
    )
