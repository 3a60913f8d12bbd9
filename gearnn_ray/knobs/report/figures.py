"""The figures of a comparison: what was found to PNG bytes. Readable without colour: methods differ by marker and line."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gearnn_ray.evaluation.report.figures import Style, empty_figure, plain_style, png_of
from gearnn_ray.knobs.findings import SUFFIX, Replayed, cheapest
from gearnn_ray.knobs.methods import METHODS, Walk
from gearnn_ray.knobs.outcome import ADAPTED, NETWORKS, ORIGINAL

TITLES: Final = {
    "oneadapt": "OneAdapt, |S·e|", "oneadapt-signed": "OneAdapt, ⟨g, e⟩", "pixel-change": "pixel change", "psnr": "PSNR",
    "ssim": "SSIM", "random": "random", "fixed": "fixed", "profiling": "profiling", "offline-profile": "offline profile",
    "oracle": "oracle",
}  # fmt: skip
NETWORK_TITLES: Final = {ORIGINAL: "original network", ADAPTED: "GearNN's adaptive network"}

_STYLES: dict[str, Style] = {
    "oneadapt": {"color": "#276b58", "marker": "o", "linestyle": "-", "linewidth": 2.2, "zorder": 5},
    "oneadapt-signed": {"color": "#276b58", "marker": "D", "linestyle": ":"},
    "pixel-change": {"color": "#0072b2", "marker": "s", "linestyle": "--"},
    "psnr": {"color": "#56b4e9", "marker": "^", "linestyle": "-."},
    "ssim": {"color": "#b0508c", "marker": "v", "linestyle": (0, (5, 3))},
    "random": {"color": "#8a8a8a", "marker": "x", "linestyle": (0, (1, 1))},
    "fixed": {"color": "#444444", "marker": "s", "linestyle": ":"},
    "profiling": {"color": "#d55e00", "marker": "^", "linestyle": "--"},
    "offline-profile": {"color": "#c98500", "marker": "P", "linestyle": "-."},
    "oracle": {"color": "#000000", "marker": "", "linestyle": "-", "linewidth": 1},
}
_COMPARED: Final = (
    ("by what steers the same controller", ("oneadapt", "oneadapt-signed", "pixel-change", "psnr", "ssim", "random")),
    ("against other methods", ("oneadapt", "fixed", "profiling", "offline-profile", "oracle")),
)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, worth) of which no other costs less and is worth as much, by rising cost."""
    found: list[tuple[float, float]] = []
    for cost, worth in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or worth > found[-1][1]:
            found.append((cost, worth))
    return found


@plain_style
def accuracy_over_bandwidth(source: Replayed, metric: str, within: float) -> bytes:
    """Each method's best runs over both networks; fixed configurations that are not among the best as dots."""
    figure = empty_figure(8.4)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, network in zip(panels, NETWORKS, strict=True):
        table = source.tables[network]
        points = {
            method: [(walk.bandwidth(table) / 1000, walk.accuracy(table)) for walk in _runs(source, network, method)]
            for method in METHODS
        }
        for panel, (title, methods) in zip(row, _COMPARED, strict=True):
            if "fixed" in methods:
                panel.plot(*zip(*points["fixed"], strict=True), marker=".", linestyle="", color="#b5b5b5", markersize=3)
            for method in methods:
                panel.plot(*zip(*front(points[method]), strict=True), label=TITLES[method], markersize=4, **_style(method))
            panel.axhline(source.best_accuracy - within, color="black", linewidth=0.7, linestyle="--")
            panel.set_xscale("log")
            _mark(panel.xaxis)
            panel.grid(alpha=0.25)
            panel.set_title(f"{NETWORK_TITLES[network]}, {title}")
        row[0].set_ylabel(f"{metric}, percent")
    for panel in panels[-1]:
        panel.set_xlabel("kbit/s, logarithmic")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False, handlelength=3.2)
    return png_of(figure)


@plain_style
def knobs_over_time(source: Replayed, metric: str, within: float) -> bytes:
    """The knobs of OneAdapt at equal accuracy, their bandwidth, and the accuracy beside that of the best fixed values."""
    network, run, other = _shown(source, within)
    table = source.tables[network]
    figure = empty_figure(1.6 * (len(table.knobs) + 2))
    panels = figure.subplots(len(table.knobs) + 2, 1, sharex=True)
    time = np.arange(table.segments + 1) * table.seconds

    def step(panel: Axes, values: Any, title: str, method: str) -> None:
        panel.step(time, np.append(values, values[-1]), where="post", label=title, **_line(method))

    both = [(TITLES["oneadapt"], run, "oneadapt"), *([(f"{TITLES['fixed']}, the best", other, "fixed")] if other else [])]
    for panel, knob in zip(panels, table.knobs, strict=False):
        for title, walk, method in both:
            places = [knob.values.index(table.configurations[number][knob.name]) for number in walk.chosen]
            step(panel, places, title, method)
        panel.set_yticks(range(len(knob.values)), [str(value) for value in knob.values])
        panel.invert_yaxis()
        panel.set_ylabel(knob.name)
    for title, walk, method in both:
        chosen = np.arange(len(walk.chosen)), walk.chosen
        step(panels[-2], 8 * table.bytes[chosen] / table.seconds / 1000, title, method)
        step(panels[-1], table.accuracy[chosen], title, method)
    panels[-2].set_yscale("log")
    _mark(panels[-2].yaxis)
    panels[-2].set_ylabel("kbit/s")
    panels[-1].set_ylabel(f"{metric}, %")
    panels[-1].set_xlabel("seconds")
    for panel in panels:
        panel.grid(axis="y", alpha=0.25)
    panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=2, frameon=False)
    panels[0].set_title(NETWORK_TITLES[network])
    return png_of(figure)


@plain_style
def overhead(source: Replayed, within: float) -> bytes:
    """What each method costs the server and the camera beside the bandwidth, at equal accuracy."""
    figure = empty_figure(3.4)
    panels = figure.subplots(1, 2, sharey=True)
    runs = {method: cheapest(source, method, ORIGINAL, source.best_accuracy - within) for method in METHODS}
    shown = [method for method in reversed(METHODS) if runs[method] is not None]
    for place, method in enumerate(shown):
        run = runs[method]
        assert run is not None
        table = source.tables[ORIGINAL]
        sent = float(table.sent[np.arange(table.segments), run.chosen].mean())
        panels[0].barh(place, sent, color="#b9c9c3", edgecolor="black", linewidth=0.6)
        more = float(run.forwards.mean()) - sent
        panels[0].barh(place, more, left=sent, color="#276b58", edgecolor="black", linewidth=0.6, hatch="///")
        panels[1].barh(place, float(run.encodes.mean()), color="#b9c9c3", edgecolor="black", linewidth=0.6)
    panels[0].set_yticks(range(len(shown)), [TITLES[method] for method in shown])
    panels[0].set_xlabel("forward passes a segment (hatched: gradients and profiles)")
    panels[1].set_xlabel("encodings a segment")
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels:
        panel.grid(axis="x", alpha=0.25)
    return png_of(figure)


def _mark(axis: Axis) -> None:
    """Plain numbers 1, 2, 5, 10, … on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _shown(source: Replayed, within: float) -> tuple[str, Walk, Walk | None]:
    """The network, OneAdapt's run and the best fixed one: at equal accuracy, over the first network where there is such a run."""
    least = source.best_accuracy - within
    for network in NETWORKS:
        if run := cheapest(source, "oneadapt", network, least):
            return network, run, cheapest(source, "fixed", network, least)
    table = source.tables[ORIGINAL]
    best = max(_runs(source, ORIGINAL, "oneadapt"), key=lambda walk: walk.accuracy(table))
    return ORIGINAL, best, next(iter(_runs(source, ORIGINAL, "fixed")))


def _runs(source: Replayed, network: str, method: str) -> list[Walk]:
    return [walk for walk in source.walks[network] if walk.method == method + SUFFIX[network]]


def _style(method: str) -> Style:
    return {"linewidth": 1.3} | _STYLES[method]


def _line(method: str) -> Style:
    return {name: value for name, value in _style(method).items() if name != "marker"}
