"""The page of a comparison: what was found in, one self-contained HTML page out. page.html lays it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gearnn_ray.evaluation.report.content import capital
from gearnn_ray.knobs.findings import AVERAGE_HEADS, Average, Found, Replayed, at_equal_accuracy, average_rows, with_goal
from gearnn_ray.knobs.methods import METHODS, STEERED
from gearnn_ray.knobs.outcome import ADAPTED, NETWORKS, ORIGINAL
from gearnn_ray.knobs.reaction import KINDS, Reaction, reaction_rows
from gearnn_ray.knobs.report import figures as draw
from gearnn_ray.reporting.page import image_address, page_template

DROPS = (0.5, 1.0, 2.0, 5.0)
"""Points below the accuracy of the best values at which the table of drops compares methods."""


@dataclass(frozen=True)
class Page:
    """Everything that a page shows. release, digest: of the network. failed: label of a task to the reason."""

    name: str
    release: str
    digest: str
    command: str
    metric: str
    knobs: Sequence[str]
    length: int
    within: float
    classes: Sequence[str]
    sources: Sequence[Replayed]
    found: Sequence[Found]
    averages: Sequence[Average]
    reactions: Sequence[Reaction]
    failed: Mapping[str, str]


ABOUT = {
    "oneadapt": "One backward pass for each segment, on its last frame; loss Σ |S · e| of the magnitude of the gradient and the "
    "error of the pixels, each knob one notch cheaper.",
    "oneadapt-signed": "The same with the chain rule, -⟨g, e⟩.",
    "pixel-change": "The same controller without a network: the mean of |e|.",
    "psnr": "The same controller with the peak signal-to-noise ratio.",
    "ssim": "The same controller with the structural similarity.",
    "random": "The same controller with a random loss.",
    "fixed": "Every configuration for the whole video: the static frontier.",
    "profiling": "Chameleon-like: the server tries knob after knob on a segment that was sent with the best values.",
    "offline-profile": "AWStream-like: the best configurations of the first quarter of the video, by the network's own answers.",
    "oracle": "Knows the accuracy of every configuration in every segment.",
}


def figures_of(page: Page) -> dict[str, bytes]:
    """File name to PNG."""
    made = {}
    for source in page.sources:
        made[f"{source.name}-accuracy.png"] = draw.accuracy_over_bandwidth(source, page.metric, page.within)
        made[f"{source.name}-knobs.png"] = draw.knobs_over_time(source, page.metric, page.within)
        made[f"{source.name}-overhead.png"] = draw.overhead(source, page.within)
    return made


def render(page: Page, figures: Mapping[str, bytes]) -> str:
    """The page; `figures` are those of `figures_of`."""
    return page_template(Path(__file__).with_name("page.html")).render(
        p=page,
        methods=[(draw.TITLES[method], ABOUT[method]) for method in METHODS],
        sources=[
            {
                "name": source.name,
                "best": f"{source.best_accuracy:.1f}",
                "facts": _facts(source),
                "sentences": _sentences(page, source),
                "tables": {draw.NETWORK_TITLES[network]: _table(page, source, network) for network in NETWORKS},
                "held": [
                    [each.method, _kilobits(each.kilobits), "–" if each.accuracy is None else f"{each.accuracy:.1f}"]
                    for each in with_goal(source)
                ],
                "drops": _drops(source),
                "figures": {
                    kind: image_address(figures[file])
                    for kind in ("accuracy", "knobs", "overhead")
                    if (file := f"{source.name}-{kind}.png") in figures
                },
            }
            for source in page.sources
        ],
        drop_heads=[f"{drop:g} points" for drop in DROPS],
        average_heads=AVERAGE_HEADS,
        averages=average_rows(page.averages, "–"),
        reaction_heads=list(KINDS.values()),
        reactions=reaction_rows(page.reactions, "–"),
    )


def _facts(source: Replayed) -> str:
    table = source.tables[ORIGINAL]
    judged = "labels" if source.has_labels else "the original network's answers to the frames before they were encoded"
    forward, gradient, encoding = source.seconds[ORIGINAL]
    return (
        f"{table.segments} segments of {table.seconds:g} s, judged against {judged}. The network's answers to a segment took "
        f"{forward:.2f} s, a gradient {gradient:.2f} s, an encoding {encoding:.2f} s (medians)"
    )


def _of(page: Page, source: Replayed, method: str) -> Found:
    return next(each for each in page.found if each.source == source.name and each.method == method)


def _sentences(page: Page, source: Replayed) -> list[str]:
    """What the figures say about the questions that the comparison is for."""
    own, said = _of(page, source, "oneadapt"), [f"{capital(remark)}." for remark in source.remarks()]
    if own.kilobits is None:
        said.append("OneAdapt over the original network does not reach this accuracy.")
    else:
        against = [
            f"{_signed(value)}% against {what}"
            for value, what in ((own.to_fixed, "the best fixed configuration"), (own.to_profiling, "profiling"))
            if value is not None
        ]
        said.append(f"OneAdapt needs {_kilobits(own.kilobits)} kbit/s" + (": " + ", ".join(against) if against else "") + ".")
    rivals = {each: _of(page, source, each).kilobits for each in STEERED if each != "oneadapt"}
    better = [draw.TITLES[each] for each, kilobits in rivals.items() if kilobits and own.kilobits and kilobits < own.kilobits]
    if own.kilobits is not None:
        with_less = f"the same controller needs less with {', '.join(better)}" if better else "no other loss steers it with less"
        said.append(f"Of what can steer the controller, {with_less}.")
    loop = _of(page, source, "oneadapt+gearnn")
    if source.is_adapted and loop.kilobits is not None and own.kilobits is not None:
        said.append(
            f"Over the adaptive network it needs {_signed(100 * (loop.kilobits / own.kilobits - 1))}% of bandwidth again."
        )
    elif source.is_adapted and loop.kilobits is None:
        said.append("Over the adaptive network it does not reach this accuracy.")
    return said


def _table(page: Page, source: Replayed, network: str) -> list[list[str]]:
    ending = "" if network == ORIGINAL else f"+{ADAPTED}"
    rows = []
    for method in METHODS:
        each = _of(page, source, method + ending)
        rows.append(
            [
                draw.TITLES[method],
                _kilobits(each.kilobits),
                "–" if each.accuracy is None else f"{each.accuracy:.1f}",
                *("–" if value is None else f"{_signed(value)}%" for value in (each.to_fixed, each.to_profiling)),
                "–" if each.of_oracle is None else f"{_signed(each.of_oracle).removeprefix('+')}%",
                *("–" if value is None else f"{value:.1f}" for value in (each.forwards, each.encodes)),
                "–" if each.overhead is None else f"{each.overhead:.0f}%",
            ]
        )
    return rows


def _drops(source: Replayed) -> list[list[str]]:
    """The bandwidth of each method over both networks at several accuracies."""
    columns = [{each.method: each.kilobits for each in at_equal_accuracy(source, drop)} for drop in DROPS]
    return [[method, *(_kilobits(column[method]) for column in columns)] for method in columns[0]]


def _kilobits(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _signed(value: float) -> str:
    return f"{value:+.0f}".replace("-", "−") if round(value) else "0"
