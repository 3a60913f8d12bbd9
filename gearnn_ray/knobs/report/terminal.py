"""What the adapt job prints at its end: tables of 80 columns, because a log has no more."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gearnn_ray.config.adapt import AdaptConfig
from gearnn_ray.knobs.findings import AVERAGE_HEADS, SUFFIX, Found, average_rows
from gearnn_ray.knobs.outcome import ADAPTED
from gearnn_ray.knobs.reaction import KINDS, reaction_rows

if TYPE_CHECKING:
    from gearnn_ray.knobs.pipeline import Outcome

_NOTHING = "-"
_ADAPTED = SUFFIX[ADAPTED]


def show(console: Console, config: AdaptConfig, outcome: "Outcome") -> None:
    """Print a table for each source and network, of the goal that the command gives, and of reactions."""
    for source in dict.fromkeys(each.source for each in outcome.found):
        _title(
            console,
            f"{source}: bandwidth where {outcome.metric} is at most {config.within:g} points below that of the best values",
        )
        own = [each for each in outcome.found if each.source == source]
        for adapted in (False, True):
            console.print("\nover the adaptive network (+gearnn)" if adapted else "over the original network", highlight=False)
            part = [each for each in own if each.method.endswith(_ADAPTED) == adapted]
            console.print(_comparison(part, outcome.metric), highlight=False)
    if outcome.averages:
        _title(console, f"mean ± standard deviation over {config.seeds} clips")
        console.print(_table(("method",), AVERAGE_HEADS, average_rows(outcome.averages, _NOTHING)), highlight=False)
    if outcome.held:
        goal = f"a floor of {config.floor:g}%" if config.ceiling is None else f"a ceiling of {config.ceiling / 1000:g} kbit/s"
        _title(console, f"Controllers with {goal}")
        rows = [
            [each.source, each.method, _number(each.kilobits, ",.1f"), _number(each.accuracy, ".1f")] for each in outcome.held
        ]
        console.print(_table(("source", "method"), ("kbit/s", outcome.metric), rows), highlight=False)
    if outcome.reactions:
        _title(console, "Segments until within 1 point of the new best, and after how many changes")
        console.print(_table(("method",), KINDS.values(), reaction_rows(outcome.reactions, _NOTHING)), highlight=False)
    for remark in outcome.remarks:
        console.print(f"\n{remark}", highlight=False, markup=False)


def _title(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", highlight=False, markup=False)


def _comparison(found: Sequence[Found], metric: str) -> Table:
    """A line per method."""
    rows = [
        [
            each.method.removesuffix(_ADAPTED),
            _number(each.kilobits, ",.1f"),
            _number(each.accuracy, ".1f"),
            _number(each.to_fixed, "+.0f", "%"),
            _number(each.to_profiling, "+.0f", "%"),
            _number(each.of_oracle, ".0f", "%"),
            _number(each.forwards, ".1f"),
            _number(each.encodes, ".1f"),
            _number(each.overhead, ".0f", "%"),
        ]
        for each in found
    ]
    further = ("to best\nfixed", "to pro-\nfiling", "of\noracle", "for-\nwards", "en-\ncodes", "gra-\ndient")
    return _table(("method",), ("kbit/s", metric, *further), rows)


def _table(names: Iterable[str], numbers: Iterable[str], rows: Iterable[Sequence[str]]) -> Table:
    """names, numbers: heads of columns to the left and to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heads, side in ((names, "left"), (numbers, "right")):
        for head in heads:
            table.add_column(head, justify="left" if side == "left" else "right", vertical="bottom", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | None, form: str, unit: str = "") -> str:
    return _NOTHING if value is None else f"{value:{form}}{unit}"
