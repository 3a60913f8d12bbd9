"""From a command line to an exit code: read the configuration, run the job, show the result."""

import json
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from gearnn_ray.config.command_line import ConfigT, JobOptions, parse_command_line
from gearnn_ray.config.schema import EvaluateConfig, ServeConfig, SplitConfig, SweepConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.level import parse_level
from gearnn_ray.reporting.progress import reporter, split_plan
from gearnn_ray.reporting.summary import accuracy_figure, print_summary, share_of_gap_closed, weight_change_figure
from gearnn_ray.store.releases import Store

if TYPE_CHECKING:
    from gearnn_ray.evaluation.findings import Outcome as Evaluated
    from gearnn_ray.offline.pipeline import Outcome
    from gearnn_ray.serving.service import Serving
    from gearnn_ray.sweep.findings import Point
    from gearnn_ray.sweep.pipeline import Outcome as Swept

_DESCRIPTION = (
    "Split a network into one base and a tiny adaptor per distortion level, and publish them (GearNN, CVPR 2020)."
)
_EVALUATE_DESCRIPTION = (
    "Judge every method at every level of a release on the same images: how much accuracy for how many bytes."
)
_SWEEP_DESCRIPTION = (
    "Try several budgets M on a release's levels, and recommend the smallest that is nearly as good as the best."
)
_SERVE_DESCRIPTION = "Serve releases over HTTP: one base, every level, each frame with the network of its own level."


def run_split(arguments: Sequence[str]) -> int:
    """`jobs/split.py`: 0 every level is published, 1 a level failed, 2 what it was told is wrong."""

    def run(config: SplitConfig, options: JobOptions) -> bool:
        from gearnn_ray.offline import pipeline

        with reporter(split_plan(config.levels, config.selection.against == "clean"), options.json_lines) as emit:
            outcome = pipeline.split(config, emit)
        _show(config, outcome, options.json_lines)
        return not outcome.failed

    return _run(SplitConfig, arguments, _DESCRIPTION, run)


def run_evaluate(arguments: Sequence[str]) -> int:
    """`jobs/evaluate.py`: 0 everything is judged, 1 something failed, 2 what it was told is wrong."""

    def run(config: EvaluateConfig, options: JobOptions) -> bool:
        from gearnn_ray.evaluation import pipeline

        with reporter({}, options.json_lines) as emit:
            outcome = pipeline.evaluate(config, emit, shlex.join(["jobs/evaluate.py", *arguments]))
        _show_evaluation(config, outcome, options.json_lines)
        return not outcome.failed

    return _run(EvaluateConfig, arguments, _EVALUATE_DESCRIPTION, run)


def run_sweep(arguments: Sequence[str]) -> int:
    """`jobs/sweep.py`: 0 every budget is judged at every level, 1 something failed, 2 what it was told is wrong."""

    def run(config: SweepConfig, options: JobOptions) -> bool:
        from gearnn_ray.sweep import pipeline

        with reporter({}, options.json_lines) as emit:
            outcome = pipeline.sweep(config, emit)
        _show_sweep(config, outcome, options.json_lines)
        return not outcome.failed

    return _run(SweepConfig, arguments, _SWEEP_DESCRIPTION, run)


def _run(
    kind: type[ConfigT], arguments: Sequence[str], description: str, run: Callable[[ConfigT, JobOptions], bool]
) -> int:
    """A job's exit code. `run` does it and says whether nothing failed; it imports Ray, which takes seconds, only then."""
    try:
        config, options = parse_command_line(kind, arguments, description)
        config = config.model_copy(update={"store": resolve_store(config.store)})  # type: ignore[attr-defined]
        return 0 if run(config, options) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to go on from here", file=sys.stderr)
        return 130


def run_serve(arguments: Sequence[str]) -> int:
    """`jobs/serve.py`: serves until Ctrl-C or SIGTERM, then 0; 1 its Serve was ended, 2 what it was told is wrong."""
    try:
        config, options = parse_command_line(ServeConfig, arguments, _SERVE_DESCRIPTION)
        config = config.model_copy(update={"store": resolve_store(config.store)})
        try:
            from gearnn_ray.serving import service
        except ModuleNotFoundError as error:
            raise UserError(
                f"{error.name} is not installed: install the extra `serve` (uv sync --extra serve)"
            ) from error

        with service.serving(config) as serving:
            _announce(serving, options.json_lines)
            service.wait_until_gone()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # SIGTERM too
        return 0
    print("error: Ray Serve was ended by someone else", file=sys.stderr)
    return 1


def _announce(serving: "Serving", json_lines: bool) -> None:
    if json_lines:
        print(json.dumps({"event": "serving", **asdict(serving)}), flush=True)
        return
    for ref, about in serving.bundles.items():
        digest, levels = about["digest"], about["levels"]
        print(f"serving {ref} ({digest[:19]}…) with {len(levels)} levels on {serving.url} (page)")
    print(f"try it:   curl --data-binary @frame.jpg {serving.url}predict -o classes.png")
    print(f"health:   {serving.url}health\nmetrics:  {' '.join(serving.metrics)}\nCtrl-C ends it", flush=True)


def resolve_store(uri: str) -> str:
    """A relative local path in a submitted job is taken from the home folder: Ray deletes the job's own folder later."""
    in_ray_package = "working_dir_files" in Path.cwd().parts
    if "://" in uri or Path(uri).expanduser().is_absolute() or not in_ray_package:
        return os.path.expanduser(uri)
    return str(Path.home() / "gearnn_ray" / uri)


def _show(config: SplitConfig, outcome: "Outcome", json_lines: bool) -> None:
    store = Store(config.store)
    pictures = _pictures(config, outcome)
    for path, png in pictures.items():
        store.put_figure(path, png)
    if json_lines:
        rows = [
            {**row, "gap_closed": share_of_gap_closed(row["original"], row["full"], row["adaptor"])}
            for row in outcome.summary
        ]
        result = {
            "event": "result", "release": outcome.release, "name": config.name, "store": store.uri,
            "summary": rows, "failed": dict(outcome.failed), "figures": list(pictures),
        }  # fmt: skip
        print(json.dumps(result), flush=True)
        return
    console = Console(soft_wrap=True) if not sys.stdout.isatty() else Console()
    if outcome.summary:
        console.print()
        print_summary(outcome.summary, console)
        if config.selection.is_joint:
            held = {result.digest: result.bytes for result in outcome.results if result.digest}
            console.print(
                f"chosen together ({config.selection.problem}): {sum(held.values()):,} bytes in {len(held)} adaptors",
                highlight=False,
            )
        if shares := [result.share_changed for result in outcome.results if result.full is not None]:
            lie, moved = (f"{min(part):.1%} to {max(part):.1%}" for part in zip(*shares, strict=True))
            console.print(
                f"the full fine-tunes moved {moved} of the weights by more than 2e-4;\n"
                f"{lie} lie in layers whose mean change is more",
                highlight=False,
            )
    for level, reason in outcome.failed.items():
        console.print(f"\n{level} failed: {reason}", style="bold red", highlight=False, markup=False)
    if outcome.release is None:
        console.print("\nno level succeeded, so nothing was published", highlight=False)
        return
    python = "uv run python" if "UV" in os.environ else "python"
    example = next((r.level for r in outcome.results if r.digest), outcome.results[0].level)
    console.print(
        f"\nbundle:   {config.name}:latest ({outcome.release[:19]}…) in {store.uri}\n"
        f"pull it:  {python} -c \"import gearnn_ray; r = gearnn_ray.Store({store.uri!r}).pull({config.name + ':latest'!r}); "
        f"print({{**r.base_state(), **r.adaptor_state({example!r})}}.keys())\""
        + "".join(f"\npicture:  {store.uri}/{path}" for path in pictures),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _pictures(config: SplitConfig, outcome: "Outcome") -> dict[str, bytes]:
    """What there is to see of a release, by path in the store."""
    trained = [r for r in outcome.results if not parse_level(r.level).is_clean]
    if not trained:
        return {}
    change = weight_change_figure(
        {r.level: r.sensitivity for r in trained},
        {r.level: r.layers for r in trained},
        f"{config.name}: weight change per layer",
    )
    accuracy = accuracy_figure(outcome.summary, f"{config.name}: accuracy over distortion")
    folder = f"figures/{config.name}"
    return {f"{folder}/accuracy.png": accuracy, f"{folder}/weight_change.png": change}


def _show_evaluation(config: EvaluateConfig, outcome: "Evaluated", json_lines: bool) -> None:
    store = Store(config.store).uri
    if json_lines:
        result = {"event": "result", "release": config.release, "store": store, **asdict(outcome)}
        print(json.dumps(result), flush=True)
        return
    console = Console(soft_wrap=True) if not sys.stdout.isatty() else Console()
    if outcome.accuracy:
        metric = outcome.accuracy[0]["metric"]
        console.print(f"\n{metric} in percent on the validation images, mean over seeds", style="bold", highlight=False)
        for number, part in enumerate(_accuracy_tables(outcome.accuracy, console.width)):
            if number:
                console.print()
            console.print(part, highlight=False)
    if outcome.averages:
        console.print("\nGearNN's adaptors on the average of each axis", style="bold", highlight=False)
        console.print(_verdict_table(outcome.averages), highlight=False)
    for unit, reason in outcome.failed.items():
        console.print(f"\n{unit} failed: {reason}", style="bold red", highlight=False, markup=False)
    places = [("report", outcome.report), *(("table", path) for path in outcome.tables)]
    places += [("figure", path) for path in outcome.figures]
    console.print()
    for what, path in places:
        console.print(f"{what + ':':<8}{store}/{path}", highlight=False, markup=False, soft_wrap=True)


def _show_sweep(config: SweepConfig, outcome: "Swept", json_lines: bool) -> None:
    store, name = Store(config.store).uri, config.release.partition("@")[0].partition(":")[0]
    if json_lines:
        points = [
            {
                "budget": point.budget, "floats": point.floats, "value": point.value, "bytes": point.bytes,
                "complete": point.complete, "score": point.score if point.results else None,
                "levels": {result.level: result.adaptor for result in point.results},
            }
            for point in outcome.points
        ]  # fmt: skip
        result = {"event": "result", "store": store, **asdict(outcome), "points": points}
        print(json.dumps(result), flush=True)
        return
    console = Console(soft_wrap=True) if not sys.stdout.isatty() else Console()
    if any(point.results for point in outcome.points):
        console.print("\nmIoU in percent on the validation images, with adaptors", style="bold", highlight=False)
        console.print(_sweep_table(outcome.points), highlight=False)
    console.print(f"\n{outcome.sentence}", highlight=False, markup=False)
    for what, reason in outcome.failed.items():
        console.print(f"\n{what} failed: {reason}", style="bold red", highlight=False, markup=False)
    bundle = outcome.release and f"{name}:recommended ({outcome.release[:19]}…) in {store}"
    figure, table = (path and f"{store}/{path}" for path in (outcome.figure, outcome.table))
    console.print()
    for what, place in (("bundle", bundle), ("table", table), ("figure", figure)):
        if place:
            console.print(f"{what + ':':<8}{place}", highlight=False, markup=False, soft_wrap=True)


def _sweep_table(points: Sequence["Point"]) -> Table:
    """A line per budget and value function."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    levels = list(dict.fromkeys(result.level for point in points for result in point.results))
    several = len({point.value for point in points}) > 1
    for head in ("M", *(["value"] if several else []), "floats", "bytes", *levels, "mean"):
        table.add_column(head, justify="left" if head in ("M", "value") else "right", no_wrap=True)
    for point in points:
        scores = {result.level: result.adaptor for result in point.results}
        cells = [f"{score:.1f}" if (score := scores.get(level)) is not None else "-" for level in levels]
        mean = f"{point.score:.2f}" if point.complete else "-"
        about = [point.budget, *([point.value] if several else []), f"{point.floats:,}", f"{point.bytes:,}"]
        table.add_row(*about, *cells, mean)
    return table


def _accuracy_tables(rows: Sequence[Mapping[str, Any]], width: int) -> Iterator[Table]:
    """Level × method, side by side as far as `width` characters go, then below. rows: of tables.ACCURACY."""
    from gearnn_ray.evaluation.baselines import TITLES

    values = defaultdict[tuple[str, str], list[float]](list)
    for row in rows:
        values[row["level"], row["method"]].append(row["value"])
    levels = dict.fromkeys(row["level"] for row in rows)
    methods = [method for method in TITLES if any(row["method"] == method for row in rows)]
    while methods:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("level", no_wrap=True)
        room = width - max(map(len, levels))
        shown: list[str] = []
        while methods and (not shown or room >= _column_width(methods[0])):
            room -= _column_width(methods[0])
            shown.append(methods.pop(0))
            table.add_column(shown[-1].replace("-", "\n"), justify="right", vertical="bottom", no_wrap=True)
        for level in levels:
            cells = (values.get((level, method)) for method in shown)
            table.add_row(level, *("-" if cell is None else f"{fmean(cell):.1f}" for cell in cells))
        yield table


def _column_width(method: str) -> int:
    """Characters: a word per line in the head, two between columns."""
    return 2 + max(len("100.0"), *map(len, method.split("-")))


def _verdict_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line per axis and rival. rows: of tables.AVERAGES."""
    from gearnn_ray.evaluation.statistics import verdict

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("axis", "levels", "GearNN", "against", "by points", "95% interval"):
        table.add_column(head, justify="right" if head in ("levels", "by points") else "left", no_wrap=True)
    for row in rows:
        if row["method"] == "gearnn":
            continue
        table.add_row(
            row["axis"],
            str(row["levels"]),
            verdict(row["low"], row["high"]),
            row["method"],
            f"{row['difference']:+.2f}",
            f"{row['low']:+.2f} to {row['high']:+.2f}",
        )
    return table
