"""The report of an evaluation: plain values in, one HTML page out that needs nothing else to be read.

`figures_of` draws, `render` writes; what the tables say in words and numbers is worked out here, how it looks is in report.html.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2

from gearnn_ray.evaluation.report import figures as draw
from gearnn_ray.evaluation.report.figures import AXES, GROUPS, Row, in_order, seeds_of, title_of
from gearnn_ray.evaluation.runs import Picture
from gearnn_ray.evaluation.statistics import verdict
from gearnn_ray.levels.level import parse_level

METHODS: dict[str, str] = {
    "original": "the network as it was trained, at every level",
    "switching": "a full fine-tune per level; each level's whole network is stored",
    "mixed": "one network, fine-tuned on all levels mixed",
    "stability": "one network, fine-tuned so that noise on a clean image moves its output little (Zheng et al. 2016)",
    "gearnn": "per level, the layers that Eq. (2) chooses within M, fine-tuned with all others frozen",
    "gearnn-released": "the adaptors as the release holds them, made with the release's own learning rate",
    "clean-tuned": "the control: one network, fine-tuned for as many epochs on undistorted images",
    "bn-statistics": "per level, the statistics of every batch normalisation measured anew without labels (Li et al. 2016)",
    "bn-tuned": "per level, every batch normalisation fine-tuned",
    "first-block": "per level, the layers nearest to the input fine-tuned, as far as M reaches (Lee et al. 2023)",
    "auto-rgn": "per level, the layers of the largest relative gradients within M, each at its own rate (Lee et al. 2023)",
    "random": "per level, layers drawn at random within M; each seed is a draw",
    "gearnn-nearest": "at a level that was never trained, the adaptor of the nearest level that was",
    "gearnn-interpolated": "at a level that was never trained, the two neighbours' adaptors mixed linearly",
}
"""Method to what it is, in a few words."""

TURNED = 0.01
"""Share of the response that high frequencies must lose for a network to have turned away from them."""

ALIKE = 0.9
"""Cosine similarity from which two changes of the frequency response are called alike."""


@dataclass(frozen=True)
class Evaluation:
    """All that the report says. Rows are those of the tables of the same names (gearnn_ray/tables.py); any may be empty."""

    name: str
    release: str
    """manifest digest"""
    command: str
    data: str
    """one line: the data set, and how many validation images"""
    network: str
    metric: str
    model_floats: int
    budget_floats: int
    """M"""
    seed: int
    axes: Mapping[str, Sequence[str]]
    """axis to its levels, sorted"""
    accuracy: Sequence[Row]
    differences: Sequence[Row]
    averages: Sequence[Row]
    memory: Sequence[Row]
    tuning: Sequence[Row]
    bytes: Sequence[Row]
    changes: Sequence[Row]
    shares: Sequence[Row]
    frequency: Sequence[Row]
    pictures: Sequence[Picture]
    notes: Sequence[str]
    """one sentence each: what a method needed that others did not"""
    failed: Mapping[str, str]
    """unit of work to reason"""


@dataclass(frozen=True)
class _Cell:
    text: str
    mark: str = ""
    """CSS classes"""
    word: str = ""
    """what stands before the text and carries the mark"""


@dataclass(frozen=True)
class _Table:
    """Heads, and rows in titled groups (a group without a title has no heading). The first column names the row."""

    caption: str
    heads: Sequence[str]
    groups: Mapping[str, Sequence[Sequence[_Cell]]]


@dataclass(frozen=True)
class _Plot:
    """A figure still to be drawn, and what stands under it."""

    caption: str
    png: Callable[[], bytes]


def figures_of(evaluation: Evaluation) -> dict[str, bytes]:
    """File name to PNG of every figure that the rows allow."""
    return {name: plot.png() for name, plot in _plots(evaluation).items()}


def render(evaluation: Evaluation, figures: Mapping[str, bytes]) -> str:
    """The report as one HTML page without scripts or requests; `figures` as `figures_of` makes them."""
    e = evaluation
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    judged = _methods(e.accuracy)
    return template.render(
        e=e,
        share=f"{100 * e.budget_floats / e.model_floats:.2f}%" if e.model_floats else "",
        counted=_counted(e),
        methods=[(title_of(m), METHODS.get(m, ""), m in GROUPS["few numbers per level"]) for m in judged],
        axis_titles={axis: _axis(axis) for axis in e.axes},
        verdicts=_verdicts(e),
        findings=[_finding(e, axis) for axis in e.axes if any(row["axis"] == axis for row in e.averages)],
        accuracy={axis: _accuracy(e, axis) for axis in e.axes if _at(e.accuracy, e.axes[axis])},
        differences={axis: _differences(e, axis) for axis in e.axes if _at(e.differences, e.axes[axis])},
        averages=_averages(e),
        table_1=_table_1(e),
        held=_held(e),
        bytes=_bytes(e),
        rates=_rates(e),
        stability=_stability(e),
        edge=_edge(e),
        shares=_shares(e),
        frequency=_frequency(e),
        claims=_claims(e),
        figures={
            name: (plot.caption, "data:image/png;base64," + base64.b64encode(figures[name]).decode())
            for name, plot in _plots(e).items()
            if name in figures
        },
    )


def _plots(e: Evaluation) -> dict[str, _Plot]:
    """Every figure that the rows allow, by file name, in the page's order."""
    plots: dict[str, _Plot] = {}
    for axis, levels in e.axes.items():
        if rows := _at(e.accuracy, levels):
            caption = f"{e.metric} over {_axis(axis)}. Panels have scales of their own"
            caption += "; bars are one standard deviation over seeds." if _several(rows) else "."
            png = partial(draw.accuracy_over_level, axis, levels, rows, e.metric)
            plots[f"accuracy_{axis}.png"] = _Plot(caption, png)
    if e.averages:
        caption = (
            "GearNN minus each method, average over the axis's levels, with 95% intervals; linear up to one point, "
        )
        caption += "logarithmic beyond."
        if any(row["published"] is not None for row in e.averages):
            caption += " Open diamonds: the paper's figure."
        plots["averages.png"] = _Plot(caption, partial(draw.averages_bars, e.averages))
    if e.bytes:
        caption = f"{e.metric} over what is stored for the level. A curve is one method under several budgets; "
        caption += "a line across is one network for all levels."
        plots["accuracy_per_byte.png"] = _Plot(caption, partial(draw.accuracy_per_byte, e.bytes, e.metric))
    for axis, levels in e.axes.items():
        changed = {row["level"] for row in e.changes}
        if shown := draw.spread_evenly([level for level in levels if level in changed]):
            caption = f"Weight change of each layer in the full fine-tune, {_axis(axis)}: {', '.join(shown)}. "
            caption += "Filled: chosen for the adaptor. Dashed: 2e-4."
            plots[f"weight_changes_{axis}.png"] = _Plot(caption, partial(draw.weight_changes, e.changes, shown))
    if e.frequency:
        caption = "Gradient of the loss by the DCT coefficients of 8×8 blocks: mean magnitude per frequency, and each "
        caption += "fine-tune's change against the original in percent. The top left corner is the block's mean."
        plots["frequency.png"] = _Plot(caption, partial(draw.frequency_maps, e.frequency))
    for index, p in enumerate(e.pictures, 1):
        caption = f"{p.sample} at {p.level}. This image's {e.metric}: original {p.scores[0]:.1f}%, adaptor {p.scores[1]:.1f}%."
        png = partial(draw.picture, p.image, p.label, p.original, p.adaptor, p.class_names, p.scores)
        plots[f"picture_{index}.png"] = _Plot(caption, png)
    return plots


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _verdicts(e: Evaluation) -> _Table | None:
    """Method × axis: does GearNN win, tie or lose, by how much."""
    if not e.averages:
        return None
    rows = {(row["method"], row["axis"]): row for row in e.averages}
    axes = list(dict.fromkeys(row["axis"] for row in e.averages))
    stored = {m: max(r["floats"] for r in e.accuracy if r["method"] == m) for m in _methods(e.accuracy)}

    def cell(row: Row | None) -> _Cell:
        if row is None:
            return _Cell("")
        word = verdict(row["low"], row["high"])
        return _Cell(f"{_signed(row['difference'])} {_interval(row)}", word, word)

    return _Table(
        "GearNN minus the method in percentage points, average over the axis's levels [95% interval].",
        ("against", "floats per level", *(_axis(axis) for axis in axes)),
        {
            _capital(group): [
                (
                    _Cell(title_of(method)),
                    _Cell(f"{stored[method]:,}" if method in stored else ""),
                    *(cell(rows.get((method, axis))) for axis in axes),
                )
                for method in methods
            ]
            for group, methods in _grouped(_methods(e.averages)).items()
        },
    )


@dataclass(frozen=True)
class _Finding:
    """An axis in words: verdict to the methods it holds against, and how GearNN stands among those that store as little."""

    axis: str
    against: Mapping[str, Sequence[str]]
    baselines: str


def _finding(e: Evaluation, axis: str) -> _Finding:
    order = in_order(_methods(e.averages))
    rows = sorted((r for r in e.averages if r["axis"] == axis), key=lambda row: order.index(row["method"]))
    against: dict[str, list[Row]] = {"wins": [], "ties": [], "loses": []}
    for row in rows:
        against[verdict(row["low"], row["high"])].append(row)
    few = GROUPS["few numbers per level"]
    stored = {row["method"]: row["floats"] for row in e.accuracy if not parse_level(row["level"]).is_clean}
    baselines = [row for row in rows if row["method"] in few and stored.get(row["method"], 0) <= e.budget_floats]
    better = [row for row in against["loses"] if row in baselines]
    if not baselines:
        sentence = "No method that stores as little was judged here."
    elif not better:
        sentence = "No method that stores as little is better."
    else:
        named = _list(f"{title_of(r['method'])} (by {-r['difference']:.2f} points)" for r in better)
        sentence = f"With as few numbers per level, {named} {'is' if len(better) == 1 else 'are'} better than GearNN."
    return _Finding(
        _axis(axis), {word: [title_of(r["method"]) for r in each] for word, each in against.items() if each}, sentence
    )


def _accuracy(e: Evaluation, axis: str) -> _Table:
    """Level × method; the best of a level is bold, and what differs from GearNN beyond chance is marked."""
    cells = seeds_of(_at(e.accuracy, e.axes[axis]))
    methods = in_order([method for method, _ in cells])
    against = {(row["method"], row["level"]): row for row in e.differences}

    def row(level: str) -> list[_Cell]:
        here = {method: cells[method, level] for method in methods if (method, level) in cells}
        best = max(round(mean, 1) for mean, _ in here.values())
        line = [_Cell(level)]
        for method in methods:
            if method not in here:
                line.append(_Cell(""))
                continue
            mean, spread = here[method]
            text = f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"
            mark = "best" if round(mean, 1) == best else ""
            if (method, level) in against:
                # a row of differences is the method minus GearNN: the other way round than an average
                word = verdict(against[method, level]["low"], against[method, level]["high"])
                mark += {"wins": " above", "loses": " below", "ties": ""}[word]
            line.append(_Cell(text, mark.strip()))
        return line

    caption = f"{e.metric} in percent on the validation images"
    caption += ", mean ± standard deviation over seeds" if _several(_at(e.accuracy, e.axes[axis])) else ""
    caption += ". Bold: the best of the level"
    caption += "; ▲ ▼: above or below GearNN, the 95% interval without 0." if against else "."
    shown = [level for level in e.axes[axis] if any((method, level) in cells for method in methods)]
    return _Table(caption, ("level", *map(title_of, methods)), {"": [row(level) for level in shown]})


def _differences(e: Evaluation, axis: str) -> _Table:
    rows = {(row["method"], row["level"]): row for row in _at(e.differences, e.axes[axis])}
    methods = in_order([method for method, _ in rows])

    def cell(row: Row | None) -> _Cell:
        return _Cell("" if row is None else f"{_signed(row['value'])} {_interval(row)}")

    return _Table(
        "The method minus GearNN, percentage points [95% interval of a paired bootstrap over the images].",
        ("level", *map(title_of, methods)),
        {
            "": [
                (_Cell(level), *(cell(rows.get((method, level))) for method in methods))
                for level in e.axes[axis]
                if any((method, level) in rows for method in methods)
            ]
        },
    )


def _averages(e: Evaluation) -> _Table | None:
    if not e.averages:
        return None
    groups: dict[str, list[list[_Cell]]] = {}
    order = in_order(_methods(e.averages))
    for row in sorted(e.averages, key=lambda row: order.index(row["method"])):
        groups.setdefault(row["axis"], []).append(
            [
                _Cell(title_of(row["method"])),
                _Cell(str(row["levels"])),
                _Cell(f"{row['average']:.1f}"),
                _Cell(f"{row['gearnn']:.1f}"),
                _Cell(_signed(row["difference"]), "strong"),
                _Cell(_interval(row)),
                _Cell("" if row["published"] is None else _signed(row["published"])),
            ]
        )
    return _Table(
        f"Averages of {e.metric} in percent over the levels that both have, each level with equal weight; differences in points.",
        ("method", "levels", "average", "GearNN", "GearNN − method", "95% interval", "the paper"),
        {_capital(_axis(axis)): groups[axis] for axis in (*e.axes, *(groups.keys() - e.axes.keys())) if axis in groups},
    )


def _table_1(e: Evaluation) -> _Table | None:
    rows = {(r["levels"], r["method"]): r for r in e.memory if r["kind"] == "budget"}
    methods = in_order([method for _, method in rows])
    counts = sorted({levels for levels, _ in rows})
    if not rows:
        return None
    return _Table(
        "Floats in memory for |Q| levels, the undistorted one among them: N for the original, |Q|·N for DNN switching, "
        "N + (|Q| − 1)·M for GearNN.",
        ("|Q|", *map(title_of, methods)),
        {
            "": [
                [
                    _Cell(str(count)),
                    *(_Cell(f"{rows[count, m]['floats']:,}" if (count, m) in rows else "") for m in methods),
                ]
                for count in counts
            ]
        },
    )


def _held(e: Evaluation) -> _Table | None:
    rows = [row for row in e.memory if row["kind"] == "actual"]
    if not rows:
        return None
    order = in_order(_methods(rows))
    return _Table(
        "Floats that are really held, the network among them.",
        ("method", "|Q|", "floats", "× network"),
        {
            "": [
                [
                    _Cell(title_of(r["method"])),
                    _Cell(str(r["levels"])),
                    _Cell(f"{r['floats']:,}"),
                    _Cell(f"{r['of_network']:.3f}"),
                ]
                for r in sorted(rows, key=lambda row: order.index(row["method"]))
            ]
        },
    )


def _bytes(e: Evaluation) -> _Table | None:
    if not e.bytes:
        return None
    order = in_order(_methods(e.bytes))
    groups: dict[str, list[list[_Cell]]] = {}
    for row in sorted(e.bytes, key=lambda row: (row["floats"], order.index(row["method"]))):
        groups.setdefault(row["level"], []).append(
            [
                _Cell(title_of(row["method"])),
                _Cell("" if row["budget"] is None else f"{row['budget']:,}"),
                _Cell(f"{row['floats']:,}"),
                _Cell(f"{row['value']:.1f}"),
            ]
        )
    return _Table(
        f"{e.metric} in percent, mean over seeds, by the floats stored for the level.",
        ("method", "budget M", "floats", e.metric),
        {level: groups[level] for level in draw.byte_levels(e.bytes)},
    )


def _rates(e: Evaluation) -> _Table | None:
    """Method × learning rate: what was tried on held-back images before anything was judged."""
    groups: dict[str, dict[str, dict[float, Row]]] = {}
    for row in e.tuning:
        if row["alpha"] is None:  # else of stability training's grid
            groups.setdefault(row["level"], {}).setdefault(row["method"], {})[row["learning_rate"]] = row
    rates = sorted({rate for methods in groups.values() for at in methods.values() for rate in at})
    if not rates:
        return None

    def cell(row: Row | None) -> _Cell:
        if row is None:
            return _Cell("")
        return _Cell("diverged" if row["value"] is None else f"{row['value']:.1f}", "chosen" if row["chosen"] else "")

    return _Table(
        f"{e.metric} in percent on training images held back from these fine-tunes, by learning rate; ✓ chosen.",
        ("method", *(f"{rate:g}" for rate in rates)),
        {
            level: [
                [_Cell(title_of(method)), *(cell(methods[method].get(rate)) for rate in rates)]
                for method in in_order(list(methods))
            ]
            for level, methods in groups.items()
        },
    )


def _stability(e: Evaluation) -> _Table | None:
    """Level × (α, σ), with the average over the levels that the choice was made by; None where there was no choice."""
    grid = {
        (r["level"], (r["alpha"], r["sigma"])): r
        for r in e.tuning
        if r["method"] == "stability" and r["alpha"] is not None
    }
    settings = sorted({setting for _, setting in grid})
    if len(settings) < 2:
        return None
    levels = list(dict.fromkeys(level for level, _ in grid))
    whole = [level for level in levels if all((level, setting) in grid for setting in settings)]

    def cell(row: Row | None) -> _Cell:
        return _Cell("") if row is None else _Cell(f"{row['value']:.1f}", "chosen" if row["chosen"] else "")

    groups = {"": [[_Cell(level), *(cell(grid.get((level, s))) for s in settings)] for level in levels]}
    if len(whole) > 1:
        means = [sum(grid[level, s]["value"] for level in whole) / len(whole) for s in settings]
        groups[f"{len(whole)} levels with equal weight"] = [
            [_Cell("average"), *(_Cell(f"{mean:.1f}") for mean in means)]
        ]
    return _Table(
        f"{e.metric} in percent by the weight α of the loss's second term and the noise σ (pixels in [0, 1]); ✓ chosen.",
        ("level", *(f"α {alpha:g}, σ {sigma:g}" for alpha, sigma in settings)),
        groups,
    )


def _edge(e: Evaluation) -> str:
    """Who was given the lowest or the highest rate of several: a better one may lie beyond."""
    tried = {m: sorted({r["learning_rate"] for r in e.tuning if r["method"] == m}) for m in _methods(e.tuning)}
    ends = {m: (rates[0], rates[-1]) for m, rates in tried.items() if len(rates) > 1}
    at_end = [r["method"] for r in e.tuning if r["chosen"] and r["learning_rate"] in ends.get(r["method"], ())]
    if not at_end:
        return ""
    return f"Chosen at an end of the grid, so that a better rate may lie beyond it: {'; '.join(map(title_of, in_order(at_end)))}."


def _shares(e: Evaluation) -> _Table | None:
    if not e.shares:
        return None
    return _Table(
        "Share of the network that the full fine-tune changed by more than 2e-4: layers by their mean, weights one by one.",
        ("level", "by layer", "by weight"),
        {
            "": [
                [_Cell(r["level"]), _Cell(f"{100 * r['by_layer']:.2f}%"), _Cell(f"{100 * r['by_weight']:.2f}%")]
                for r in e.shares
            ]
        },
    )


@dataclass(frozen=True)
class _Response:
    """One level's frequency response in figures: high-frequency share by network (0 to 1), similarity of both changes."""

    level: str
    shares: Mapping[str, float]
    alike: float | None


def _responses(e: Evaluation) -> list[_Response]:
    from gearnn_ray.evaluation.frequency import high_frequency_share, similarity

    responses = []
    for level, maps in draw.maps_of(e.frequency).items():
        alike = None
        if {"original", "switching", "gearnn"} <= maps.keys():
            alike = similarity(maps["switching"] - maps["original"], maps["gearnn"] - maps["original"])
        responses.append(
            _Response(level, {network: high_frequency_share(map_) for network, map_ in maps.items()}, alike)
        )
    return responses


def _frequency(e: Evaluation) -> _Table | None:
    if not e.frequency:
        return None

    def share(response: _Response, network: str) -> _Cell:
        return _Cell(f"{100 * response.shares[network]:.1f}%" if network in response.shares else "")

    return _Table(
        "Share of the whole response at high frequencies (vertical + horizontal at least 8), and the cosine similarity of the "
        "full fine-tune's change of the map to the adaptor's.",
        ("level", "original", "full fine-tune", "adaptor", "similarity"),
        {
            "": [
                [
                    _Cell(r.level),
                    *(share(r, n) for n in ("original", "switching", "gearnn")),
                    _Cell("" if r.alike is None else f"{r.alike:.2f}"),
                ]
                for r in _responses(e)
            ]
        },
    )


def _claims(e: Evaluation) -> list[str]:
    """Whether the paper's two claims about frequencies show in these figures."""
    if not e.frequency:
        return []
    responses = _responses(e)
    claims = []
    for network, who in (("switching", "the full fine-tune"), ("gearnn", "the adaptor")):
        shares = {
            r.level: (r.shares["original"], r.shares[network])
            for r in responses
            if {"original", network} <= r.shares.keys()
        }
        if shares:
            turned = {level: before - after >= TURNED for level, (before, after) in shares.items()}
            moves = _list(f"{100 * before:.1f}% to {100 * after:.1f}% ({q})" for q, (before, after) in shares.items())
            answer = _where(
                turned,
                f"{who} turns away from high frequencies",
                f"{who} does not turn away from high frequencies",
            )
            claims.append(f"{answer}: their share of the response goes from {moves}.")
    alike = {r.level: r.alike for r in responses if r.alike is not None}
    if alike:
        answer = _where(
            {level: value >= ALIKE for level, value in alike.items()},
            f"full fine-tune and adaptor change the response alike (cosine similarity at least {ALIKE})",
            f"full fine-tune and adaptor do not change the response alike (cosine similarity below {ALIKE})",
        )
        claims.append(f"{answer}: {_list(f'{value:.2f} ({level})' for level, value in alike.items())}.")
    return claims


# ── words and numbers ────────────────────────────────────────────────────────────────────────────────────────────


def _methods(rows: Iterable[Row]) -> list[str]:
    return in_order([row["method"] for row in rows])


def _at(rows: Sequence[Row], levels: Sequence[str]) -> list[Row]:
    return [row for row in rows if row["level"] in levels]


def _several(rows: Sequence[Row]) -> bool:
    """Whether a method was judged with more than one seed."""
    return any(spread is not None for _, spread in seeds_of(rows).values())


def _grouped(methods: Sequence[str]) -> dict[str, list[str]]:
    """Methods by GROUPS, empty groups left out; one that no group knows comes last."""
    known = {method for members in GROUPS.values() for method in members}
    groups = {title: [m for m in members if m in methods] for title, members in GROUPS.items()}
    groups["others"] = [method for method in methods if method not in known]
    return {title: members for title, members in groups.items() if members}


def _axis(axis: str) -> str:
    return AXES.get(axis, axis)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _counted(e: Evaluation) -> str:
    levels = {row["level"] for row in e.accuracy}
    methods = len(_methods(e.accuracy))
    return f"{methods} {'method' if methods == 1 else 'methods'} at {len(levels)} {'level' if len(levels) == 1 else 'levels'}"


def _where(holds: Mapping[str, bool], yes: str, no: str) -> str:
    """At which levels something holds, and at which not."""
    places = {
        text: [level for level, each in holds.items() if each == word] for text, word in ((yes, True), (no, False))
    }
    return _capital("; ".join(f"at {_list(levels)} {text}" for text, levels in places.items() if levels))


def _list(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def _signed(value: float) -> str:
    """Two decimals with a sign (U+2212 for minus); what rounds to nothing has none."""
    text = f"{value:+.2f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _interval(row: Row) -> str:
    return f"[{_signed(row['low'])}, {_signed(row['high'])}]"
