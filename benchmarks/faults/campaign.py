"""A campaign: lines of seeded runs, each a fault at a random moment, and the table of what they saw. Knows no fault itself."""

import atexit
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What one run saw. None: this line cannot see it.

    hit: False where the fault came to nothing, because the job had ended before.
    equal: the digests are those of an undisturbed run.
    torn, lost: objects that are there but not whole; that are gone although their writer was told that they were written.
    repeated: epochs computed once more. recovery: seconds from the fault to the state before it.
    silent: wrong results that nothing said. figures: what else the line measures. note: what was seen, for silent errors.
    """

    hit: bool = True
    equal: bool | None = None
    torn: int = 0
    lost: int = 0
    repeated: float | None = None
    recovery: float | None = None
    silent: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Line:
    """name: on the command line, and of its file of outcomes. fault: its title in the table. runs: of the whole campaign.

    run: one run, with a generator of its own and an empty folder; an exception is a failed run. Several take turns.
    """

    name: str
    fault: str
    runs: int
    run: Callable[[random.Random, Path], Outcome] | Sequence[Callable[[random.Random, Path], Outcome]]


def lasting_folder(name: str) -> Path:
    """An empty folder for what the runs of this process have in common, which goes when the process does."""
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Run:
    index: int
    seconds: float
    outcome: Outcome | None  # None: failed, as `error` says
    error: str = ""


def run_once(line: Line, seed: int, index: int) -> Run:
    """Run number `index` of a line: the same (seed, line, index) draws the same moments."""
    start = time.monotonic()
    work = line.run if callable(line.run) else line.run[index % len(line.run)]
    with tempfile.TemporaryDirectory(prefix=f"chaos-{line.name}-", ignore_cleanup_errors=True) as folder:
        try:
            outcome, error = work(random.Random(f"{seed}/{line.name}/{index}"), Path(folder)), ""
        except Exception as raised:  # the campaign goes on; the table and the exit code say it
            outcome, error = None, f"{type(raised).__name__}: {raised}"
    return Run(index, round(time.monotonic() - start, 3), outcome, error)


def finished(file: Path) -> list[Run]:
    """The runs that a file of outcomes holds; a last line that was cut off is none."""
    runs = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            entry = json.loads(text)
        except json.JSONDecodeError:
            continue
        outcome = entry["outcome"]
        runs.append(Run(**entry | {"outcome": outcome and Outcome(**outcome)}))
    return runs


def campaign(lines: Iterable[Line], seed: int, runs: int | None, state: Path) -> Iterator[tuple[Line, Run]]:
    """Make the runs that are not in the folder `state` yet, `runs` of each line at most, and note each there when it is done."""
    state.mkdir(parents=True, exist_ok=True)
    for line in lines:
        file = state / f"{line.name}.jsonl"
        there = {run.index for run in finished(file)}
        for index in range(line.runs if runs is None else min(runs, line.runs)):
            if index not in there:
                run = run_once(line, seed, index)
                with file.open("a") as out:
                    # after a line that was cut off, a new one begins
                    out.write(("" if file.stat().st_size == 0 else "\n") + json.dumps(asdict(run)))
                yield line, run


def _of(values: list[float]) -> str:
    if not values:
        return ""
    median, most = f"{statistics.median(values):.2g}", f"{max(values):.2g}"
    return median if median == most else f"{median}, at most {most}"


def table(lines: Iterable[Line], state: Path) -> str:
    """What the folder `state` holds, as a table in Markdown: a row per line that has runs."""
    head = (
        "fault",
        "runs",
        "hit",
        "equal digests",
        "torn or lost",
        "epochs repeated",
        "seconds to recover",
        "silent errors",
        "failed runs",
    )
    rows = [head, ("---",) * len(head)]
    more: list[str] = []
    for line in lines:
        runs = finished(state / f"{line.name}.jsonl")
        if not runs:
            continue
        seen = [run.outcome for run in runs if run.outcome]
        equal = [outcome.equal for outcome in seen if outcome.equal is not None]
        rows.append(
            (
                line.fault,
                f"{len(runs)} of {line.runs}",
                str(sum(outcome.hit for outcome in seen)),
                f"{sum(equal)} of {len(equal)}" if equal else "",
                str(sum(outcome.torn + outcome.lost for outcome in seen)),
                _of([outcome.repeated for outcome in seen if outcome.repeated is not None]),
                _of([outcome.recovery for outcome in seen if outcome.recovery is not None]),
                str(sum(outcome.silent for outcome in seen)),
                str(len(runs) - len(seen)),
            )
        )
        figures: dict[str, list[float]] = {}
        for outcome in seen:
            for name, value in outcome.figures.items():
                figures.setdefault(name, []).append(value)
        more += [f"- {line.fault}: {name} {_of(values)}" for name, values in figures.items()]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n\n".join((text, "\n".join(more))) if more else text


def sound(runs: Iterable[Run]) -> bool:
    """No run failed, and none saw a digest that differs, a torn or lost object or a silent error."""
    return all(
        run.outcome and run.outcome.equal is not False and not (run.outcome.torn or run.outcome.lost or run.outcome.silent)
        for run in runs
    )
