"""What a job shows at its end: a table a person understands, and the picture of per-layer weight change."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gearnn_ray.levels.level import parse_level

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANINGFUL_GAP = 1.0
"""Percent points: a share of a smaller gap is noise divided by noise, and not shown."""


def share_of_gap_closed(original: float, full: float | None, adaptor: float | None) -> float | None:
    """How much of what the full fine-tune gains the adaptor gains too, in percent; None where the gap is below a point."""
    if full is None or adaptor is None or full - original < MEANINGFUL_GAP:
        return None
    return 100 * (adaptor - original) / (full - original)


def print_summary(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One line per level."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    metric = rows[0]["metric"]
    heads = ("level", "original", "full", "adaptor", "gap closed", "floats", "of network")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        closed = share_of_gap_closed(row["original"], row["full"], row["adaptor"])
        table.add_row(
            row["level"],
            f"{row['original']:.1f}",
            "-" if row["full"] is None else f"{row['full']:.1f}",
            f"{row['adaptor']:.1f}",
            "-" if closed is None else f"{closed:.0f}%",
            f"{row['adaptor_floats']:,}",
            f"{100 * row['adaptor_floats'] / row['model_floats']:.3f}%",
        )
    console.print(f"{metric} in percent on the validation images", style="bold", highlight=False)
    console.print(
        "original: the base; full: its full fine-tune; adaptor: base + adaptor",
        highlight=False,
    )
    console.print(table, highlight=False)
    if any(share_of_gap_closed(r["original"], r["full"], r["adaptor"]) is None for r in rows):
        console.print("gap closed is left out (-) where the full fine-tune gains less than a point", highlight=False)


def weight_change_figure(
    levels: Mapping[str, Sequence[Mapping[str, Any]]], chosen: Mapping[str, Sequence[str]], title: str
) -> bytes:
    """PNG: mean |weight change| of every layer (Eq. 1) per level on a logarithmic axis, the chosen ones filled (Fig. 5).

    levels: sensitivity rows per level; chosen: layer names per level.
    """
    from matplotlib.lines import Line2D

    figure = new_figure((12, 1.2 + 1.5 * len(levels)))
    axes = figure.subplots(len(levels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    markers = {
        "conv_weight": ("o", "convolution"), "norm_weight": ("^", "norm weight"), "norm_bias": ("v", "norm bias"),
        "norm_statistics": ("s", "norm statistics"), "bias": ("D", "bias"),
    }  # fmt: skip
    for axis, (level, rows) in zip(axes, levels.items(), strict=True):
        inside = set(chosen.get(level, ()))
        for kind in dict.fromkeys(row["kind"] for row in rows):
            marker, _ = markers.get(kind, ("x", kind))
            for selected in (False, True):
                points = [
                    (r["index"], r["mean_abs_change"])
                    for r in rows
                    if r["kind"] == kind and (r["layer"] in inside) == selected and r["mean_abs_change"] > 0
                ]
                if points:
                    x, y = np.array(points).T
                    style = {"facecolor": "black"} if selected else {"facecolor": "white"}
                    axis.scatter(
                        x, y, marker=marker, s=22, edgecolor="black", linewidth=0.7, zorder=3 if selected else 2,
                        **style,
                    )  # fmt: skip
        axis.set_yscale("log")
        axis.axhline(2e-4, color="grey", linewidth=0.8, linestyle="--")
        axis.set_title(level, loc="left", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[-1].set_xlabel("layer, in state-dict order (filled: chosen for the adaptor; dashed: 2e-4)")
    figure.supylabel("mean |weight change|, Eq. (1)")
    figure.suptitle(title)
    kinds = dict.fromkeys(row["kind"] for rows in levels.values() for row in rows if row["mean_abs_change"] > 0)
    handles = [
        Line2D([], [], linestyle="", marker=marker, markerfacecolor="white", markeredgecolor="black", label=label)
        for marker, label in (markers.get(kind, ("x", kind)) for kind in kinds)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)), frameon=False)
    return figure_png(figure)


_AXES = {
    "jpeg": "JPEG quality",
    "brightness": "brightness factor",
    "h264-size": "frame width in pixels (H.264)",
    "h264-crf": "H.264 CRF",
}


def accuracy_figure(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """PNG: score over distortion level for original, full fine-tune and adaptor, a panel per kind of level (Figs. 10, 13).

    rows: summary rows. The undistorted score is a line across; combinations, which have no axis, stand side by side.
    """
    panels: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    undistorted: float | None = None
    for row in rows:
        level = parse_level(row["level"])
        if level.is_clean:
            undistorted = row["original"]
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
            axis.plot(x, [row[column] for _, row in points], label=label, markersize=5, **style)
        if undistorted is not None:
            axis.axhline(undistorted, color="grey", linewidth=0.8, label="original, undistorted")
        axis.set_xlabel(_AXES.get(family, "combination"))
        if family not in _AXES:
            axis.set_xticks(x, [row["level"] for _, row in points], rotation=20, fontsize=7)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{rows[0]['metric']}, percent")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure_png(figure)


def new_figure(size: tuple[float, float]) -> "Figure":
    """An empty figure, `size` in inches, that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_png(figure: "Figure", dpi: int = 110) -> bytes:
    """PNG without a version in it: the same picture, the same bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()
