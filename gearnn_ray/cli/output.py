"""What a job prints at its end: tables and sentences for people, or one JSON object for machines."""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from gearnn_ray.config.adapt import AdaptConfig
from gearnn_ray.config.release_jobs import EvaluateConfig, SweepConfig
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.config.upkeep import GcConfig
from gearnn_ray.config.watch import WatchConfig
from gearnn_ray.reporting.summary import print_summary
from gearnn_ray.store.releases import Store

if TYPE_CHECKING:
    from gearnn_ray.cli.diagnosis import Finding
    from gearnn_ray.evaluation.findings import Outcome as Evaluated
    from gearnn_ray.knobs.camera import Filmed
    from gearnn_ray.knobs.pipeline import Outcome as Adapted
    from gearnn_ray.offline.pipeline import Outcome
    from gearnn_ray.service.deployment import Serving
    from gearnn_ray.sweep.findings import Point
    from gearnn_ray.sweep.pipeline import Outcome as Swept
    from gearnn_ray.video.watching import Seen

_SECONDS_BETWEEN_LINES = 5.0


def show_split(config: SplitConfig, outcome: "Outcome", json_lines: bool) -> None:
    """Print the summary of a release, and where everything is."""
    store = Store(config.store)
    if json_lines:
        rows = [{**asdict(row), "gap_closed": row.gap_closed} for row in outcome.summary]
        _print_json(
            release=outcome.release, tag=outcome.tag, name=config.name, store=store.uri, summary=rows,
            failed=dict(outcome.failed), figures=list(outcome.figures),
        )  # fmt: skip
        return
    console = _console()
    if outcome.summary:
        console.print()
        print_summary(outcome.summary, console)
        for line in _remarks(config, outcome):
            console.print(line, highlight=False)
    _print_failures(console, outcome.failed)
    if outcome.release is None:
        console.print("\nNo level succeeded, so nothing was published.", highlight=False)
        return
    if outcome.tag != "latest":
        console.print(
            f"\nLevels are missing, so the release has the tag {outcome.tag} and {config.name}:latest stays as it was. To finish "
            "it, run the same command again: it computes only what is missing.",
            highlight=False,
        )
    python = "uv run python" if "UV" in os.environ else "python"
    release = f"{config.name}:{outcome.tag}"
    example = next((r.level for r in outcome.results if r.digest), outcome.results[0].level)
    pull = (
        f'{python} -c "import gearnn_ray; r = gearnn_ray.Store({store.uri!r}).pull({release!r}); '
        f'print({{**r.base_state(), **r.adaptor_state({example!r})}}.keys())"'
    )
    places = [("bundle", f"{release} ({outcome.release[:19]}…) in {store.uri}"), ("pull it", pull)]
    _print_places(console, [*places, *(("picture", f"{store.uri}/{path}") for path in outcome.figures)])


def _remarks(config: SplitConfig, outcome: "Outcome") -> Iterator[str]:
    """Sentences below the table of levels."""
    if config.selection.is_joint:
        sizes = {result.digest: result.bytes for result in outcome.results if result.digest}
        yield (
            f"One problem ({config.selection.problem}) selected the layers of all levels: {len(sizes)} adaptors, "
            f"{sum(sizes.values()):,} bytes together."
        )
    if shares := [result.share_changed for result in outcome.results if result.full is not None]:
        by_layer, by_weight = (f"{100 * min(each):.1f} to {max(each):.1%}" for each in zip(*shares, strict=True))
        yield f"Full fine-tuning changed {by_weight} of the weights by more than 2e-4."
        yield f"Layers whose average change exceeds 2e-4 hold {by_layer} of the weights."


def show_evaluation(config: EvaluateConfig, outcome: "Evaluated", json_lines: bool) -> None:
    """Print the tables of an evaluation, and where its report is."""
    store = Store(config.store).uri
    if json_lines:
        _print_json(release=config.release, store=store, **asdict(outcome))
        return
    console = _console()
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
    _print_failures(console, outcome.failed)
    places = [("report", outcome.report), *(("table", path) for path in outcome.tables)]
    places += [("figure", path) for path in outcome.figures]
    _print_places(console, [(what, f"{store}/{path}") for what, path in places])


def _accuracy_tables(rows: Sequence[Mapping[str, Any]], width: int) -> Iterator[Table]:
    """Levels by methods, in as many tables as `width` characters need. rows: of tables.ACCURACY."""
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
    """In characters: the heading has one word per line, and columns are two characters apart."""
    return 2 + max(len("100.0"), *map(len, method.split("-")))


def _verdict_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line per axis and baseline. rows: of tables.AVERAGES."""
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


def show_sweep(config: SweepConfig, outcome: "Swept", json_lines: bool) -> None:
    """Print a sweep's table, its recommendation, and where both are."""
    store, name = Store(config.store).uri, config.release.partition("@")[0].partition(":")[0]
    if json_lines:
        points = [
            {
                "budget": point.budget, "floats": point.floats, "value": point.importance, "bytes": point.bytes,
                "complete": point.complete, "score": point.score if point.results else None,
                "levels": {result.level: result.adaptor for result in point.results},
            }
            for point in outcome.points
        ]  # fmt: skip
        _print_json(store=store, **asdict(outcome) | {"points": points})
        return
    console = _console()
    if any(point.results for point in outcome.points):
        console.print("\nScores with adaptors, in percent on the validation images", style="bold", highlight=False)
        console.print(_sweep_table(outcome.points), highlight=False)
    console.print(f"\n{outcome.sentence}", highlight=False, markup=False)
    _print_failures(console, outcome.failed)
    bundle = outcome.release and f"{name}:recommended ({outcome.release[:19]}…) in {store}"
    figure, table = (path and f"{store}/{path}" for path in (outcome.figure, outcome.table))
    places = (("bundle", bundle), ("table", table), ("figure", figure))
    _print_places(console, [(what, place) for what, place in places if place])


def _sweep_table(points: Sequence["Point"]) -> Table:
    """A line per budget and importance measure."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    levels = list(dict.fromkeys(result.level for point in points for result in point.results))
    several = len({point.importance for point in points}) > 1
    for head in ("M", *(["importance"] if several else []), "floats", "bytes", *levels, "mean"):
        table.add_column(head, justify="left" if head in ("M", "importance") else "right", no_wrap=True)
    for point in points:
        scores = {result.level: result.adaptor for result in point.results}
        cells = [f"{score:.1f}" if (score := scores.get(level)) is not None else "-" for level in levels]
        mean = f"{point.score:.2f}" if point.complete else "-"
        about = [point.budget, *([point.importance] if several else []), f"{point.floats:,}", f"{point.bytes:,}"]
        table.add_row(*about, *cells, mean)
    return table


def show_adapt(config: AdaptConfig, outcome: "Adapted", json_lines: bool) -> None:
    """Print a comparison's tables, and where its page is."""
    store = Store(config.store).uri
    if json_lines:
        _print_json(release=config.release, store=store, **asdict(outcome))
        return
    from gearnn_ray.knobs.report.terminal import show  # imports torch

    console = _console()
    show(console, config, outcome)
    _print_failures(console, outcome.failed)
    places = [("page", outcome.report), ("table", outcome.table), *(("figure", path) for path in outcome.figures)]
    _print_places(console, [(what, f"{store}/{path}") for what, path in places if path])


def show_serving(serving: "Serving", json_lines: bool) -> None:
    """Print what is served at which URL."""
    if json_lines:
        _print_json("serving", **asdict(serving))
        return
    for ref, bundle in serving.bundles.items():
        digest, levels = bundle.digest or "", bundle.levels
        print(f"serving {ref} ({digest[:19]}…) with {len(levels)} levels on {serving.url} (page)")
    print(f"try it:   curl --data-binary @frame.jpg {serving.url}predict -o classes.png")
    print(f"health:   {serving.url}health\nmetrics:  {' '.join(serving.metrics)}\nCtrl-C ends it", flush=True)


def show_lines(lines: Iterable[Mapping[str, object]], seen: "Seen", json_lines: bool) -> None:
    """Print every line as JSON; or, for people, every few seconds what is being seen."""
    shown = time.monotonic()
    for line in lines:
        if json_lines:
            _print_json("frame", **line)
        elif time.monotonic() - shown > _SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            lost = f", {seen.dropped} dropped" * bool(seen.dropped) + f", {seen.lost} lost" * bool(seen.lost)
            rate = seen.frames / max(seen.seconds, 1e-9)
            print(f"{seen.frames} frames, {rate:.1f} a second{lost}; now {line['found']} with {line['level']}", flush=True)


def show_page(address: str, json_lines: bool) -> None:
    """Print where a stream can be looked at."""
    if json_lines:
        _print_json("page", address=address)
    else:
        print(f"page: {address}", flush=True)


def show_watch(config: WatchConfig, seen: "Seen", problem: str | None, json_lines: bool) -> None:
    """Print what was seen in a video, and where it is written."""
    if json_lines:
        _print_json(**asdict(seen), problem=problem, ndjson=config.ndjson, mp4=config.mp4)
        return
    console = _console()
    rate = seen.frames / max(seen.seconds, 1e-9)
    console.print(
        f"\n{seen.frames} frames in {seen.seconds:.1f} s ({rate:.1f} a second), {seen.dropped} dropped, "
        f"{seen.lost} packets lost; the level changed {seen.changes} times",
        highlight=False,
    )
    if seen.frames:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for head in ("level", "frames", *(f"{method} {seen.metric}" for method in seen.scores)):
            table.add_column(head, justify="left" if head == "level" else "right", no_wrap=True)
        for level, frames in sorted(seen.levels.items(), key=lambda item: -item[1]):
            table.add_row(level, str(frames), *(f"{score:.1f}" for score in seen.level_scores.get(level, {}).values()))
        if seen.scores:
            table.add_row("all", str(seen.frames), *(f"{score:.1f}" for score in seen.scores.values()), style="bold")
        console.print(table, highlight=False)
    for remark in seen.remarks:
        console.print(remark, highlight=False, markup=False)
    if problem:
        console.print(f"\nthe source failed: {problem}", style="bold red", highlight=False, markup=False)
    _print_places(console, [(what, place) for what, place in (("lines", config.ndjson), ("video", config.mp4)) if place])


def show_camera_lines(lines: Iterable[Mapping[str, object]], json_lines: bool) -> None:
    """Print a line for each segment."""
    for line in lines:
        if json_lines:
            _print_json("segment" if "segment" in line else "news", **line)
        else:
            print(_camera_line(line), flush=True)


def _camera_line(line: Mapping[str, Any]) -> str:
    """One line about a camera, as a sentence."""
    problem = f": {line['problem']}" if line.get("problem") else ""
    if line["state"] == "away":
        return f"the service is away, next attempt in {line['again_in']:g} s; the knobs stay{problem}"
    if line["state"] == "source":
        return f"the source is away{problem}" if problem else "the source is back"
    dropped = f", {line['dropped']} dropped" * bool(line["dropped"])
    if line["state"] == "dropped":
        return f"segment {line['segment']} was dropped{dropped}"
    knobs = " ".join(f"{name}={value}" for name, value in line["knobs"].items())
    sent = f"{line['sent']} of {line['frames']} frames, {line['bytes']:,} bytes"
    level = f" at {line['level']}" if line.get("level") else ""
    return f"segment {line['segment']}  {knobs}  {sent}, {line['state']} in {line['seconds']:.2f} s{level}{dropped}{problem}"


def show_camera(filmed: "Filmed", problem: str | None, json_lines: bool) -> None:
    """Print what has become of a camera's segments."""
    if json_lines:
        _print_json(**asdict(filmed), problem=problem)
        return
    rate = f" at {8 * filmed.bytes / filmed.seconds / 1000:.1f} kbit/s" if filmed.seconds else ""
    print(f"\n{filmed.segments} segments: {filmed.answered} answered{rate}, {filmed.refused} refused, {filmed.dropped} dropped")
    if problem:
        print(f"the source failed: {problem}")


def show_copied(ref: str, release: str, store: Store, json_lines: bool) -> None:
    """Print which release is now in a store."""
    content, signers = store.manifest(release)[1], store.signers(release)
    size = sum(blob.bytes for blob in content.blobs)
    if json_lines:
        _print_json(release=release, store=store.uri, levels=list(content.levels), bytes=size, signed_by=signers)
        return
    signed = f", signed by {' and '.join(f'{key[:12]}…' for key in signers)}" if signers else ""
    digest = release.partition("@")[2]
    print(f"{ref} ({digest[:19]}…) is in {store.uri}: {len(content.levels)} levels, {size:,} bytes{signed}")


def show_exported(release: str, level: str, path: Path, json_lines: bool) -> None:
    """Print where a level was written."""
    if json_lines:
        _print_json(release=release, level=level, file=str(path), bytes=path.stat().st_size)
    else:
        print(f"{level} of {release[: release.index(':') + 13]}… is in {path} ({path.stat().st_size:,} bytes)")


def show_signed(ref: str, public: str, json_lines: bool) -> None:
    """Print with which option a release can be required to be signed."""
    if json_lines:
        _print_json(release=ref, signed_by=public)
    else:
        print(f"{ref} is signed. Whoever pulls it can require this: --require-signature {public}")


def show_findings(findings: Sequence["Finding"], json_lines: bool) -> None:
    """Print a line for each finding, and how many are wrong."""
    wrong = sum(finding.state == "wrong" for finding in findings)
    if json_lines:
        _print_json(wrong=wrong, findings=[asdict(finding) for finding in findings])
        return
    for finding in findings:
        print(f"{finding.state:<6}{finding.what + ':':<13}{finding.sentence}")
    print(f"\n{('Nothing is', 'One thing is')[wrong] if wrong < 2 else f'{wrong} things are'} wrong.")


def show_gc(config: GcConfig, files: Sequence[str], images: Sequence[str], json_lines: bool) -> None:
    """Print what goes from the store and from the cache, a line each."""
    if json_lines:
        _print_json(deleted=config.delete, files=list(files), images=list(images))
        return
    for line in (*files, *images):
        print(line)
    count = f"{len(files):,} files of the store {config.store} and {len(images):,} entries of the cache {config.data.cache}"
    print(f"{count} were deleted." if config.delete else f"{count} would be deleted: --delete deletes them.")
    if config.store.startswith("s3://"):
        print("Unfinished uploads are not listed: end them with a lifecycle rule of the bucket (AbortIncompleteMultipartUpload).")


def show_problems(store: Store, found: Sequence[str], json_lines: bool) -> None:
    """Print a sentence for each thing that is wrong with a store."""
    if json_lines:
        _print_json(store=store.uri, problems=list(found))
        return
    for sentence in found:
        print(sentence)
    print(f"{('Nothing is', 'One thing is')[len(found)] if len(found) < 2 else f'{len(found)} things are'} wrong in {store.uri}.")


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(soft_wrap=True)


def _print_json(event: str = "result", **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def _print_failures(console: Console, failed: Mapping[str, str]) -> None:
    for what, reason in failed.items():
        console.print(f"\n{what} failed: {reason}", style="bold red", highlight=False, markup=False)


def _print_places(console: Console, places: Iterable[tuple[str, str]]) -> None:
    console.print()
    for what, place in places:
        console.print(f"{what + ':':<9} {place}", highlight=False, markup=False, soft_wrap=True)
