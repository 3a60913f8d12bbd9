"""Results of a split job: one row per level, the table that is printed, and the figures of the release."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from gearnn_ray.data.dataset import AGREEMENT
from gearnn_ray.levels.axes import AXIS_TITLES, short_name
from gearnn_ray.levels.level import parse_level

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANINGFUL_GAP = 1.0
"""In percentage points: the share that an adaptor closes of a smaller gap is noise divided by noise, and is not shown."""


NETWORKS = ("original", "full", "adaptor")


@dataclass(frozen=True)
class SummaryRow:
    """A row of `tables.SUMMARY`, with further metrics that are shown beside the first: by name and network (original, full,
    adaptor). Scores in percent.
    """

    level: str
    metric: str
    original: float
    full: float | None
    adaptor: float
    adaptor_floats: int
    budget_floats: int
    model_floats: int
    seconds_full: float
    seconds_partial: float
    others: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    @property
    def gap_closed(self) -> float | None:
        """How much of the full fine-tune's gain the adaptor reaches, in percent; None if that gain is below one point."""
        if self.full is None or self.full - self.original < MEANINGFUL_GAP:
            return None
        return 100 * (self.adaptor - self.original) / (self.full - self.original)


@dataclass(frozen=True)
class LayerChange:
    """The mean |weight change| of one layer (Eq. 1). index: its place in the state dict. selected: whether the adaptor has it."""

    layer: str
    kind: str
    index: int
    mean_abs_change: float
    selected: bool


def print_summary(rows: Sequence[SummaryRow], console: Console) -> None:
    """Print the table of scores and sizes, one line per level, and one for each further metric."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    heads = ("level", "original", "full", "adaptor", "gap closed", "floats", "of network")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.level,
            f"{row.original:.1f}",
            _percent(row.full),
            f"{row.adaptor:.1f}",
            "-" if row.gap_closed is None else f"{row.gap_closed:.0f}%",
            f"{row.adaptor_floats:,}",
            f"{100 * row.adaptor_floats / row.model_floats:.3f}%",
        )
    console.print(f"{rows[0].metric} in percent on the validation images", style="bold", highlight=False)
    if rows[0].metric.startswith(AGREEMENT):
        console.print("agreement: with the base's own answers to the undistorted images, because there are no labels")
    console.print("original: the base; full: the base fully fine-tuned; adaptor: base + adaptor", highlight=False)
    console.print(table, highlight=False)
    if any(row.gap_closed is None for row in rows):
        console.print("The gap closed is not shown (-) where the full fine-tune gains less than a point.", highlight=False)
    for metric in rows[0].others:
        further = Table("level", box=None, pad_edge=False, header_style="bold")
        for network in NETWORKS:
            further.add_column(network, justify="right")
        for row in rows:
            further.add_row(row.level, *(_percent(row.others[metric].get(network)) for network in NETWORKS))
        console.print(f"\n{metric} in percent", style="bold", highlight=False)
        console.print(further, highlight=False)


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{score:.1f}"


def weight_change_figure(levels: Mapping[str, Sequence[LayerChange]], title: str) -> bytes:
    """PNG: mean |weight change| of every layer (Eq. 1), logarithmic, a panel per level, selected layers filled (Fig. 5)."""
    from matplotlib.lines import Line2D

    figure = new_figure((12, 1.2 + 1.5 * len(levels)))
    axes = figure.subplots(len(levels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    markers = {
        "conv_weight": ("o", "convolution"), "norm_weight": ("^", "norm weight"), "norm_bias": ("v", "norm bias"),
        "norm_statistics": ("s", "norm statistics"), "bias": ("D", "bias"),
    }  # fmt: skip
    changed = {level: [row for row in rows if row.mean_abs_change > 0] for level, rows in levels.items()}
    for axis, (level, rows) in zip(axes, changed.items(), strict=True):
        for kind, selected in dict.fromkeys((row.kind, row.selected) for row in rows):
            marker, _ = markers.get(kind, ("x", kind))
            points = [(r.index, r.mean_abs_change) for r in rows if (r.kind, r.selected) == (kind, selected)]
            x, y = np.array(points).T
            axis.scatter(
                x, y, marker=marker, s=22, edgecolor="black", linewidth=0.7, zorder=3 if selected else 2,
                facecolor="black" if selected else "white",
            )  # fmt: skip
        axis.set_yscale("log")
        axis.axhline(2e-4, color="grey", linewidth=0.8, linestyle="--")
        axis.set_title(level, loc="left", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[-1].set_xlabel("layer, in state-dict order (filled: selected for the adaptor; dashed: 2e-4)")
    figure.supylabel("mean |weight change|, Eq. (1)")
    figure.suptitle(title)
    kinds = dict.fromkeys(row.kind for rows in changed.values() for row in rows)
    handles = [
        Line2D([], [], linestyle="", marker=marker, markerfacecolor="white", markeredgecolor="black", label=label)
        for marker, label in (markers.get(kind, ("x", kind)) for kind in kinds)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)), frameon=False)
    return figure_png(figure)


def accuracy_figure(rows: Sequence[SummaryRow], title: str) -> bytes:
    """PNG: score over distortion level for original, full fine-tune and adaptor, a panel per level family (Figs. 10, 13). A line
    shows the undistorted score. Combinations have no common axis and stand side by side.
    """
    panels: dict[str, list[tuple[float, SummaryRow]]] = {}
    undistorted: float | None = None
    for row in rows:
        level = parse_level(row.level)
        if level.is_clean:
            undistorted = row.original
            continue
        panel = panels.setdefault(level.family, [])
        panel.append((float(len(panel)) if level.value is None else float(level.value), row))
    figure = new_figure((1 + 4.5 * max(1, len(panels)), 4.2))
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axis, (family, points) in zip(axes, panels.items(), strict=False):
        points.sort(key=lambda point: point[0])
        x = [value for value, _ in points]
        for column, label, style in (
            ("original", "original", {"linestyle": ":", "marker": "s", "color": "black"}),
            ("full", "full fine-tune", {"linestyle": "--", "marker": "^", "color": "tab:orange"}),
            ("adaptor", "base + adaptor", {"linestyle": "-", "marker": "o", "color": "tab:blue"}),
        ):
            axis.plot(x, [getattr(row, column) for _, row in points], label=label, markersize=5, **style)
        if undistorted is not None:
            axis.axhline(undistorted, color="grey", linewidth=0.8, label="original, undistorted")
        axis.set_xlabel(AXIS_TITLES.get(family, family))
        if family in ("h264-size", "combination"):
            names = [short_name(parse_level(row.level)) for _, row in points]
            axis.set_xticks(x, names, rotation=20, fontsize=7)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{rows[0].metric}, percent")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure_png(figure)


def new_figure(size: tuple[float, float]) -> "Figure":
    """An empty figure that needs no display. size: width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_png(figure: "Figure", dpi: int = 110) -> bytes:
    """The figure as PNG, without the version of matplotlib, so that equal figures have equal bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()
