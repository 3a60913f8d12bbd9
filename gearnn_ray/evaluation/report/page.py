"""The report of an evaluation: plain values in, one self-contained HTML page out.

`figures_of` draws and `render` writes. Tables and sentences are made here and in `page_tables`; report.html lays them out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gearnn_ray.evaluation.records import AverageRow
from gearnn_ray.evaluation.report import figures as draw
from gearnn_ray.evaluation.report import page_tables
from gearnn_ray.evaluation.report.content import Evaluation, at_levels, axis_title, capital, listed, responses
from gearnn_ray.evaluation.report.methods import GROUPS, METHODS, in_order, methods_of, several_seeds, title_of
from gearnn_ray.evaluation.report.pictures import RENDERERS
from gearnn_ray.evaluation.statistics import verdict
from gearnn_ray.levels.level import parse_level
from gearnn_ray.reporting.page import image_address, page_template

TURNED = 0.01
"""A network turned away from high frequencies if their share of the response fell by at least this much."""

ALIKE = 0.9
"""Two changes of the frequency response are called alike from this cosine similarity."""


@dataclass(frozen=True)
class _Plot:
    """A figure that is still to be drawn, and its caption."""

    caption: str
    png: Callable[[], bytes]


def figures_of(evaluation: Evaluation) -> dict[str, bytes]:
    """File name to PNG of every figure that there are rows for."""
    return {name: plot.png() for name, plot in _plots(evaluation).items()}


def render(evaluation: Evaluation, figures: Mapping[str, bytes]) -> str:
    """The report as one HTML page without scripts or requests; `figures` are those of `figures_of`."""
    e = evaluation
    return page_template(Path(__file__).with_name("report.html")).render(
        e=e,
        share=f"{100 * e.budget_floats / e.model_floats:.2f}%" if e.model_floats else "",
        counted=_counted(e),
        methods=[(title_of(m), METHODS.get(m, ""), m in GROUPS["few numbers per level"]) for m in methods_of(e.accuracy)],
        axis_titles={axis: axis_title(axis) for axis in e.axes},
        verdicts=page_tables.verdicts(e),
        findings=[_finding(e, axis) for axis in e.axes if any(row["axis"] == axis for row in e.averages)],
        accuracy={axis: page_tables.accuracy(e, axis) for axis in e.axes if at_levels(e.accuracy, e.axes[axis])},
        differences={axis: page_tables.differences(e, axis) for axis in e.axes if at_levels(e.differences, e.axes[axis])},
        averages=page_tables.averages(e),
        table_1=page_tables.table_1(e),
        held=page_tables.held(e),
        bytes=page_tables.per_byte(e),
        rates=page_tables.rates(e),
        stability=page_tables.stability(e),
        edge=_edge(e),
        shares=page_tables.shares(e),
        frequency=page_tables.frequency(e),
        claims=_claims(e),
        figures={name: (plot.caption, image_address(figures[name])) for name, plot in _plots(e).items() if name in figures},
    )


def _plots(e: Evaluation) -> dict[str, _Plot]:
    """Every figure that there are rows for, by file name, in the page's order."""
    plots: dict[str, _Plot] = {}
    for axis, levels in e.axes.items():
        if rows := at_levels(e.accuracy, levels):
            caption = f"{e.metric} over {axis_title(axis)}. Each panel has its own scale"
            caption += "; bars are one standard deviation over seeds." if several_seeds(rows) else "."
            png = partial(draw.accuracy_over_level, axis, levels, rows, e.metric)
            plots[f"accuracy_{axis}.png"] = _Plot(caption, png)
    if e.averages:
        caption = "GearNN minus each method, average over the axis's levels, with 95% intervals; linear up to one point, "
        caption += "logarithmic beyond."
        if any(row["published"] is not None for row in e.averages):
            caption += " Open diamonds: the paper's figure."
        plots["averages.png"] = _Plot(caption, partial(draw.averages_bars, e.averages))
    if e.bytes:
        caption = f"{e.metric} over the floats stored for the level. A curve is one method under several budgets; "
        caption += "a horizontal line is one network for all levels."
        plots["accuracy_per_byte.png"] = _Plot(caption, partial(draw.accuracy_per_byte, e.bytes, e.metric))
    for axis, levels in e.axes.items():
        changed = {row["level"] for row in e.changes}
        if shown := draw.spread_evenly([level for level in levels if level in changed]):
            caption = f"Weight change of each layer in the full fine-tune, {axis_title(axis)}: {', '.join(shown)}. "
            caption += "Filled: selected for the adaptor. Dashed: 2e-4."
            plots[f"weight_changes_{axis}.png"] = _Plot(caption, partial(draw.weight_changes, e.changes, shown))
    if e.frequency:
        caption = "Gradient of the loss with respect to the DCT coefficients of 8×8 blocks: mean magnitude per frequency, and "
        caption += "the change by each fine-tune in percent of the original. The upper left corner is the block's mean."
        plots["frequency.png"] = _Plot(caption, partial(draw.frequency_maps, e.frequency))
    for index, p in enumerate(e.pictures, 1):
        caption = f"{p.sample} at {p.level}. This image's {e.metric}: original {p.scores[0]:.1f}%, adaptor {p.scores[1]:.1f}%."
        plots[f"picture_{index}.png"] = _Plot(caption, partial(RENDERERS[e.task], p))
    return plots


@dataclass(frozen=True)
class _Finding:
    """One axis in words. against: verdict to the titles of the methods. baselines: the comparison at equal memory."""

    axis: str
    against: Mapping[str, Sequence[str]]
    baselines: str


def _finding(e: Evaluation, axis: str) -> _Finding:
    order = in_order(methods_of(e.averages))
    rows = sorted((r for r in e.averages if r["axis"] == axis), key=lambda row: order.index(row["method"]))
    against: dict[str, list[AverageRow]] = {"wins": [], "ties": [], "loses": []}
    for row in rows:
        against[verdict(row["low"], row["high"])].append(row)
    few = GROUPS["few numbers per level"]
    stored = {row["method"]: row["floats"] for row in e.accuracy if not parse_level(row["level"]).is_clean}
    baselines = [row for row in rows if row["method"] in few and stored.get(row["method"], 0) <= e.budget_floats]
    better = [row for row in against["loses"] if row in baselines]
    if not baselines:
        sentence = "No method that stores as little was evaluated here."
    elif not better:
        sentence = "No method that stores as little is better."
    else:
        named = listed(f"{title_of(r['method'])} (by {-r['difference']:.2f} points)" for r in better)
        sentence = f"With as few numbers per level, {named} {'is' if len(better) == 1 else 'are'} better than GearNN."
    titles = {word: [title_of(r["method"]) for r in each] for word, each in against.items() if each}
    return _Finding(axis_title(axis), titles, sentence)


def _edge(e: Evaluation) -> str:
    """The methods whose learning rate is the lowest or highest that was tried."""
    tried = {m: sorted({r["learning_rate"] for r in e.tuning if r["method"] == m}) for m in methods_of(e.tuning)}
    ends = {m: (rates[0], rates[-1]) for m, rates in tried.items() if len(rates) > 1}
    at_end = [r["method"] for r in e.tuning if r["chosen"] and r["learning_rate"] in ends.get(r["method"], ())]
    if not at_end:
        return ""
    return f"Chosen at an end of the grid, so that a better rate may lie beyond it: {'; '.join(map(title_of, in_order(at_end)))}."


def _claims(e: Evaluation) -> list[str]:
    """Whether these results support the paper's two claims about frequencies."""
    if not e.frequency:
        return []
    found, claims = responses(e), []
    for network, who in (("switching", "the full fine-tune"), ("gearnn", "the adaptor")):
        shares = {r.level: (r.shares["original"], r.shares[network]) for r in found if {"original", network} <= r.shares.keys()}
        if shares:
            turned = {level: before - after >= TURNED for level, (before, after) in shares.items()}
            moves = listed(f"{100 * before:.1f}% to {100 * after:.1f}% ({q})" for q, (before, after) in shares.items())
            answer = _where(turned, f"{who} turns away from high frequencies", f"{who} does not turn away from high frequencies")
            claims.append(f"{answer}: their share of the response goes from {moves}.")
    alike = {r.level: r.similarity for r in found if r.similarity is not None}
    if alike:
        answer = _where(
            {level: value >= ALIKE for level, value in alike.items()},
            f"full fine-tune and adaptor change the response alike (cosine similarity at least {ALIKE})",
            f"full fine-tune and adaptor do not change the response alike (cosine similarity below {ALIKE})",
        )
        claims.append(f"{answer}: {listed(f'{value:.2f} ({level})' for level, value in alike.items())}.")
    return claims


def _where(holds: Mapping[str, bool], yes: str, no: str) -> str:
    """At which levels something holds, and at which not."""
    places = {text: [level for level, each in holds.items() if each == word] for text, word in ((yes, True), (no, False))}
    return capital("; ".join(f"at {listed(levels)} {text}" for text, levels in places.items() if levels))


def _counted(e: Evaluation) -> str:
    levels, methods = len({row["level"] for row in e.accuracy}), len(methods_of(e.accuracy))
    return f"{methods} {'method' if methods == 1 else 'methods'} at {levels} {'level' if levels == 1 else 'levels'}"
