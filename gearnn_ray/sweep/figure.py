"""The figure of a sweep: accuracy over memory, with the Pareto front, its knee and the recommended budget."""

from collections.abc import Sequence

from gearnn_ray.reporting.summary import figure_png, new_figure
from gearnn_ray.sweep.findings import Point, knee, pareto_front, recommended

_MARKERS = "osv^D<>p"


def sweep_figure(points: Sequence[Point], within: float, metric: str, model_bytes: int, title: str) -> bytes:
    """PNG: mean score over the adaptors' memory, a line per importance function; incomplete points are left out."""
    figure = new_figure((7.5, 4.6))
    axis = figure.subplots()
    complete = [point for point in points if point.complete]
    levels = max((len(point.results) for point in complete), default=0)
    for importance, marker in zip(dict.fromkeys(point.importance for point in complete), _MARKERS * 2, strict=False):
        own = sorted((point for point in complete if point.importance == importance), key=lambda point: point.bytes)
        axis.plot(
            [p.bytes / 1e6 for p in own], [p.score for p in own], marker=marker, linewidth=1, markersize=5, label=importance,
        )  # fmt: skip
        for point in own:
            axis.annotate(point.budget, (point.bytes / 1e6, point.score), textcoords="offset points", xytext=(4, -11), fontsize=7)
    front = pareto_front(complete)
    if front:
        axis.step(
            [p.bytes / 1e6 for p in front], [p.score for p in front], where="post", color="black", linewidth=0.9,
            linestyle=":", label="Pareto front",
        )  # fmt: skip
        axis.axhline(front[-1].score - within, color="grey", linewidth=0.8, linestyle="--")
        axis.text(
            0, front[-1].score - within, f" best − {within:g}", fontsize=7, ha="left", va="bottom", color="grey",
            transform=axis.get_yaxis_transform(),
        )  # fmt: skip
    for marked, name, size in ((knee(front), "knee", 11), (recommended(complete, within), "recommended", 15)):
        if marked is not None:
            axis.plot(
                marked.bytes / 1e6, marked.score, marker="o", markersize=size, markerfacecolor="none",
                markeredgecolor="black", linestyle="--" if name == "knee" else "", label=name,
                markeredgewidth=0.8 if name == "knee" else 1.6, linewidth=0,
            )  # fmt: skip
    originals = {r.level: r.original for point in complete for r in point.results}
    fulls = {r.level: r.full for point in complete for r in point.results if r.full is not None}
    beside = [
        f"{name} {sum(scores.values()) / len(scores):.1f}"
        for name, scores in (("original", originals), ("full fine-tunes", fulls))
        if scores
    ]
    axis.set_title(", ".join(beside), loc="left", fontsize=9)
    axis.set_xlabel(f"adaptors of {levels} level{'s' if levels != 1 else ''}, MB (the base has {model_bytes / 1e6:.3g})")
    axis.set_ylabel(f"mean {metric}, percent")
    axis.grid(alpha=0.3)
    if complete:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure_png(figure)
