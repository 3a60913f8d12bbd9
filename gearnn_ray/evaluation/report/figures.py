"""The figures of an evaluation's report: rows of its tables to PNG bytes. The same rows give the same bytes.

Figures are readable without colour: methods differ by marker and line, signs are printed, magnitudes are grey.
"""

import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from gearnn_ray.evaluation.baselines import CONSTANT
from gearnn_ray.evaluation.records import AccuracyRow, AverageRow, BytesRow, ChangeRow, FrequencyRow
from gearnn_ray.evaluation.report.methods import GROUPS, in_order, seeds_of, title_of
from gearnn_ray.levels.axes import AXIS_TITLES, short_name
from gearnn_ray.levels.level import parse_level
from gearnn_ray.reporting.summary import LayerChange, new_figure, weight_change_figure

Style = dict[str, Any]
"""Keyword arguments of matplotlib."""

WIDTH = 10.0  # inches: the page's text width
_TEXT: Any = {"font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8.5, "axes.linewidth": 0.7, "xtick.labelsize": 8.5}
_TEXT |= {"ytick.labelsize": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
plain_style = matplotlib.rc_context(_TEXT)

# colours by Okabe & Ito, which most colour-blind readers can distinguish
_STYLES: dict[str, Style] = {
    "original": {"color": "#444444", "marker": "s", "linestyle": ":"},
    "original-scaled": {"color": "#000000", "marker": "*", "linestyle": (0, (3, 1))},
    "switching": {"color": "#d55e00", "marker": "^", "linestyle": "--"},
    "mixed": {"color": "#0072b2", "marker": "v", "linestyle": "-."},
    "stability": {"color": "#b0508c", "marker": "D", "linestyle": (0, (1, 1))},
    "clean-tuned": {"color": "#8a8a8a", "marker": "x", "linestyle": (0, (5, 3))},
    "gearnn": {"color": "#276b58", "marker": "o", "linestyle": "-", "linewidth": 2.2, "zorder": 5},
    "bn-statistics": {"color": "#56b4e9", "marker": "P", "linestyle": ":"},
    "bn-tuned": {"color": "#0072b2", "marker": "s", "linestyle": "--"},
    "first-block": {"color": "#c98500", "marker": "^", "linestyle": "-."},
    "auto-rgn": {"color": "#b0508c", "marker": "v", "linestyle": (0, (5, 3))},
    "random": {"color": "#777777", "marker": "X", "linestyle": (0, (1, 1))},
    "gearnn-released": {"color": "#222222", "marker": "D", "linestyle": "-."},
    "gearnn-nearest": {"color": "#d55e00", "marker": "<", "linestyle": ":"},
    "gearnn-interpolated": {"color": "#0072b2", "marker": ">", "linestyle": "--"},
    "gearnn-entropy": {"color": "#b0508c", "marker": "d", "linestyle": (0, (5, 3))},
}


def spread_evenly(items: Sequence[str], most: int = 4) -> list[str]:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)]


@plain_style
def accuracy_over_level(axis: str, levels: Sequence[str], rows: Sequence[AccuracyRow], metric: str) -> bytes:
    """Score over the levels of one axis, a line per method, bars of one standard deviation over seeds (Figs. 10, 13).

    A panel per group of methods, GearNN in each; levels are drawn at equal distances.
    """
    cells = seeds_of([row for row in rows if row["level"] in levels])
    evaluated = {method for method, _ in cells}
    panels = {title: [m for m in members if m in evaluated] for title, members in GROUPS.items()}
    panels = {title: members for title, members in panels.items() if members} or {"GearNN alone": []}
    figure = empty_figure(4.6)
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (title, members) in zip(drawn, panels.items(), strict=True):
        methods = [m for m in ("gearnn", *members) if m in evaluated]
        for index, method in enumerate(methods):
            points = [(x, *cells[method, level]) for x, level in enumerate(levels) if (method, level) in cells]
            x = np.array([point[0] for point in points]) + 0.04 * (index - (len(methods) - 1) / 2)
            spread = [point[2] or 0.0 for point in points]
            bars: Style = {"yerr": spread, "elinewidth": 0.9, "capsize": 2} if any(spread) else {}
            panel.errorbar(x, [point[1] for point in points], label=title_of(method), **_style(method), **bars)
        panel.set_title(f"against {title}" if members else title)
        below = -0.3 if _level_ticks(panel, levels) else -0.17
        panel.set_xlabel(AXIS_TITLES.get(axis, axis))
        panel.grid(axis="y", alpha=0.25)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, below), frameon=False, handlelength=3.2)
    drawn[0].set_ylabel(f"{metric}, percent")
    return png_of(figure)


@plain_style
def averages_bars(rows: Sequence[AverageRow]) -> bytes:
    """GearNN minus each method, average over an axis's levels, with its 95% interval; a diamond is the paper's figure.

    In percentage points; the scale is linear up to 1 point and logarithmic beyond.
    """
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    present = in_order([row["method"] for row in rows])
    place = {method: index for index, method in enumerate(reversed(present))}
    figure = empty_figure(1.5 + 0.27 * len(present))
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    reach = max(1.0, *(max(abs(row["low"]), abs(row["high"]), row["published"] or 0) for row in rows))
    ticks = [tick for tick in (1, 3, 10, 30, 100) if tick <= reach * 1.2]
    below = min(0.0, *(row["low"] for row in rows))
    for panel, axis in zip(panels, axes, strict=True):
        panel.axvline(0, color="black", linewidth=0.8)
        for row in rows:
            if row["axis"] != axis:
                continue
            y, style = place[row["method"]], _style(row["method"])
            panel.plot([row["low"], row["high"]], [y, y], color=style["color"], linewidth=1.6, solid_capstyle="butt")
            panel.plot(row["difference"], y, marker=style["marker"], color=style["color"], markersize=5.5)
            if row["published"] is not None:
                panel.plot(row["published"], y, marker="d", color="black", fillstyle="none", markersize=8)
        panel.set_xscale("symlog", linthresh=1, linscale=0.7)
        shown = [-tick for tick in reversed(ticks) if -tick >= below * 1.2] + [0, *ticks]
        panel.set_xticks(shown, [f"{tick:+d}".replace("-", "−") if tick else "0" for tick in shown])
        panel.set_xticks([], minor=True)
        panel.set_xlim(min(-1.0, below * 1.3), reach * 1.3)
        panel.set_ylim(-0.6, len(present) - 0.4)
        panel.set_title(AXIS_TITLES.get(axis, axis))
        panel.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(list(place.values()), [title_of(method) for method in place])
    figure.supxlabel("GearNN minus the method, percentage points (right of 0: GearNN is better)", fontsize=9)
    return png_of(figure)


def byte_levels(rows: Sequence[BytesRow]) -> list[str]:
    """The levels at which GearNN was evaluated under several budgets; four of all levels if there is one budget."""
    levels = list(dict.fromkeys(row["level"] for row in rows))
    budgets = {level: {r["budget"] for r in rows if r["level"] == level and r["method"] == "gearnn"} for level in levels}
    return [level for level in levels if len(budgets[level]) > 1] or spread_evenly(levels)


@plain_style
def accuracy_per_byte(rows: Sequence[BytesRow], metric: str) -> bytes:
    """Score over the floats stored for a level, a panel per level of `byte_levels`.

    A method is a point, GearNN's budgets are a curve, and a network for all levels is a horizontal line.
    """
    levels = byte_levels(rows)
    columns = min(2, len(levels))
    lines = math.ceil(len(levels) / columns)
    figure = empty_figure(0.9 + 3.1 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels[len(levels) :]:
        panel.set_visible(False)
    for panel, level in zip(panels, levels, strict=False):
        for method in in_order([row["method"] for row in rows if row["level"] == level]):
            points = sorted((r["floats"], r["value"]) for r in rows if r["level"] == level and r["method"] == method)
            style = _style(method)
            if method in CONSTANT:
                panel.axhline(points[-1][1], color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
                continue
            x, y = zip(*points, strict=True)
            panel.plot(x, y, **(style if len(points) > 1 else style | {"linestyle": ""}))
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda floats, _: _count(floats)))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(level)
        panel.set_ylabel(f"{metric}, percent")
        panel.set_xlabel("floats stored for the level (4 bytes each), logarithmic")
        panel.grid(alpha=0.25)
    shown = in_order([row["method"] for row in rows if row["level"] in levels])
    free = {method for method in shown if method in CONSTANT}
    counted = Counter((row["method"], row["level"]) for row in rows)
    curves = {method for method, level in counted if counted[method, level] > 1}
    handles = [Line2D([], [], label=title_of(m), **_legend_style(m, m in curves, m in free)) for m in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return png_of(figure)


def weight_changes(rows: Sequence[ChangeRow], levels: Sequence[str]) -> bytes:
    """Per-layer weight change at these levels, the adaptors' layers filled (Fig. 5)."""
    changes = {
        level: [
            LayerChange(row["layer"], row["kind"], row["index"], row["mean_abs_change"], row["selected"])
            for row in rows
            if row["level"] == level
        ]
        for level in levels
    }
    return weight_change_figure(changes, "")


def maps_of(rows: Sequence[FrequencyRow]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Level to network to magnitudes [8, 8] = [vertical, horizontal]."""
    maps: dict[str, dict[str, NDArray[np.float64]]] = {}
    for row in rows:
        here = maps.setdefault(row["level"], {}).setdefault(row["network"], np.zeros((8, 8)))
        here[row["vertical"], row["horizontal"]] = row["magnitude"]
    return maps


@plain_style
def frequency_maps(rows: Sequence[FrequencyRow]) -> bytes:
    """Maps [8, 8] of each network per level on one grey logarithmic scale, and the change by both fine-tunes in percent.

    Figs. 3, 4, 6 and 7 of the paper.
    """
    maps = maps_of(rows)
    networks = [n for n in ("original", "switching", "gearnn") if any(n in here for here in maps.values())]
    changed = [n for n in networks if n != "original"] if "original" in networks else []
    magnitudes = np.array([row["magnitude"] for row in rows])
    positive = magnitudes[magnitudes > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    grey = LogNorm(low, max(high, low * 1.01))
    changes = {
        (level, n): np.log2(np.maximum(here[n], low) / np.maximum(here["original"], low))
        for level, here in maps.items()
        for n in changed
        if n in here and "original" in here
    }
    reach = max([0.1, *(float(np.abs(change).max()) for change in changes.values())])
    diverging = TwoSlopeNorm(0, -reach, reach)
    columns = len(networks) + len(changed)
    figure = empty_figure(0.9 + 2.15 * len(maps))
    panels = figure.subplots(len(maps), columns, squeeze=False)
    for line, (level, here) in zip(panels, maps.items(), strict=True):
        for panel in line:
            panel.set_visible(False)
        for panel, network in zip(line, networks, strict=False):
            if network in here:
                _map(panel, np.maximum(here[network], low), grey, "Greys", _NETWORKS[network])
        for panel, network in zip(line[len(networks) :], changed, strict=True):
            if (level, network) in changes:
                percent = 100 * (2.0 ** changes[level, network] - 1)
                _map(panel, changes[level, network], diverging, "PuOr", f"{_NETWORKS[network]}, change", percent)
        next(p for p in line if p.get_visible()).set_ylabel(f"{level}\nvertical frequency")
    for panel in panels[-1]:
        panel.set_xlabel("horizontal frequency")
    bars = [(ScalarMappable(grey, "Greys"), panels[:, : len(networks)], "mean |d loss / d DCT coefficient|, logarithmic")]
    if changed:
        bars.append(
            (ScalarMappable(diverging, "PuOr"), panels[:, len(networks) :], "change against the original, percent (logarithmic)")
        )
    for shade, under, label in bars:
        bar = figure.colorbar(shade, ax=under, location="bottom", shrink=0.7, aspect=40, pad=0.03)
        bar.set_label(label, fontsize=8.5)
        bar.ax.minorticks_off()
        if shade.norm is diverging:
            ticks = np.array([-reach, -reach / 2, 0, reach / 2, reach])
            bar.set_ticks(list(ticks), labels=[_percent(p) for p in 100 * (2.0**ticks - 1)])
    return png_of(figure)


_NETWORKS = {"original": "original", "switching": "full fine-tune", "gearnn": "adaptor"}


def _style(method: str) -> Style:
    plain = {"color": "black", "marker": ".", "linestyle": "-"}
    return {"markersize": 5, "linewidth": 1.3} | _STYLES.get(method, plain)


def _legend_style(method: str, curve: bool, free: bool) -> Style:
    style = _style(method)
    return style | ({"marker": ""} if free else {}) | ({} if curve or free else {"linestyle": ""})


def _level_ticks(panel: Axes, levels: Sequence[str]) -> bool:
    """Label at most eight levels. Returns whether the labels are long and therefore rotated."""
    labels = [short_name(parse_level(level)) for level in levels]
    step = math.ceil(len(levels) / 8)
    long = max(map(len, labels), default=0) > 5
    turned: Style = {"rotation": 30, "ha": "right", "rotation_mode": "anchor", "fontsize": 7.5} if long else {}
    panel.set_xticks(range(0, len(levels), step), labels[::step], **turned)
    return long


def _map(
    panel: Axes,
    values: NDArray[np.float64],
    norm: Normalize,
    colours: str,
    title: str,
    printed: NDArray[np.float64] | None = None,
) -> None:
    """One 8×8 map [vertical, horizontal]. printed: percentages to print in the cells."""
    panel.set_visible(True)
    shown = panel.imshow(values, cmap=colours, norm=norm)
    panel.set_title(title)
    panel.set_xticks(range(0, 8, 7))
    panel.set_yticks(range(0, 8, 7))
    panel.spines[:].set_visible(False)
    if printed is None:
        return
    for (vertical, horizontal), percent in np.ndenumerate(printed):
        red, green, blue, _ = shown.cmap(float(norm(values[vertical, horizontal])))
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
        panel.text(horizontal, vertical, _percent(percent), ha="center", va="center", fontsize=5.2, color=ink)


def _percent(value: float) -> str:
    return f"{value:+.0f}".replace("-", "−") if round(value) else "0"


def _count(floats: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if floats >= unit:
            return f"{floats / unit:g}{name}"
    return f"{floats:g}"


def empty_figure(height: float) -> Figure:
    """A figure as wide as the page's text, `height` in inches."""
    return new_figure((WIDTH, height))


def png_of(figure: Figure, dpi: int = 150) -> bytes:
    """PNG without a version in it: the same figure gives the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.05, metadata={"Software": None})
    return out.getvalue()
