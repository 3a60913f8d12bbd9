"""A job's progress: live bars on a terminal, one plain line per event in a log, JSON lines for machines."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from gearnn_ray.core.events import Event
from gearnn_ray.levels.level import parse_level

Plan = Mapping[tuple[str, str], float]
"""The stages that a job will run: (level, stage) to its part of the time, in any unit. The parts of a level sum to above 0."""

TITLES: dict[str, str] = {
    "images": "images",
    "base": "base training",
    "original": "evaluating the original",
    "full": "full fine-tune",
    "measure": "measuring the change",
    "selection": "selection",
    "partial": "partial fine-tune",
}
# shares of one level's time, measured on CamVid; they only decide the estimate of the remaining time
_SHARES: dict[str, float] = {"original": 0.05, "full": 0.65, "selection": 0.0, "partial": 0.3}


def split_plan(levels: Sequence[str], control: bool = False, trials: Sequence[str] = ()) -> Plan:
    """The stages of the split job. At `clean` only the original is evaluated, and with `control` a full fine-tune is run.
    trials: names of further partial fine-tunes.
    """
    shares = _SHARES | dict.fromkeys(trials, _SHARES["partial"])
    plan = {
        (level, stage): part
        for level in levels
        for stage, part in shares.items()
        if stage == "original" or not parse_level(level).is_clean
    }
    return plan | ({("clean", "full"): _SHARES["full"]} if control else {})


@dataclass
class Estimate:
    """How much of a job is done and how long the rest will take, from its events. Times in seconds of any steady clock."""

    plan: Plan
    _done: dict[tuple[str, str], float] = field(default_factory=dict)
    _reused: set[tuple[str, str]] = field(default_factory=set)
    _begun: float | None = None
    _stage_began: dict[str, float] = field(default_factory=dict)

    def expect(self, plan: Plan) -> None:
        self.plan = {**self.plan, **plan}

    def plans(self, event: Event) -> bool:
        """Whether the event's stage is in the plan; stages that prepare the planned ones are not."""
        return (event.level, event.stage) in self.plan

    def see(self, event: Event, now: float) -> None:
        place = (event.level, event.stage)
        self._stage_began.setdefault(event.stage, now)
        if self.plans(event) and event.kind != "reused" and self._begun is None:
            self._begun = now
        if event.kind == "reused":
            self._reused.add(place)
            self._done[place] = 1.0
        elif event.kind == "finished":
            self._done[place] = 1.0
        elif event.kind == "progress" and event.steps:
            self._done[place] = event.step / event.steps

    def share(self, level: str) -> float:
        """How much of a level is done, 0 to 1."""
        parts = {place: part for place, part in self.plan.items() if place[0] == level}
        return sum(part * self._done.get(place, 0.0) for place, part in parts.items()) / sum(parts.values())

    def remaining(self, event: Event, now: float) -> float | None:
        """Remaining seconds: of the whole plan if the event's stage is in it, else of that stage. None while unknown."""
        if not self.plans(event):
            done = self._done.get((event.level, event.stage), 0.0)
            return (now - self._stage_began[event.stage]) * (1 - done) / done if done > 0 else None
        if self._begun is None:
            return None
        new = {place: part for place, part in self.plan.items() if place not in self._reused}
        done = sum(part * self._done.get(place, 0.0) for place, part in new.items())
        return (now - self._begun) * (sum(new.values()) - done) / done if done > 0 else None


class Reporter(Protocol):
    """Receives a job's events."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
    def __call__(self, event: Event) -> None: ...

    def expect(self, plan: Plan) -> None:
        """Add stages to the plan."""


class _Plain:
    """One line per event: enough to follow a job in its log, without a line per step."""

    def __init__(self, plan: Plan, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._estimate, self._out, self._clock = Estimate(plan), out, clock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()

    def expect(self, plan: Plan) -> None:
        self._estimate.expect(plan)

    def __call__(self, event: Event) -> None:
        if event.kind == "notice":
            self.write(event, None)
            return
        now = self._clock()
        self._estimate.see(event, now)
        if event.kind == "progress" and not _worth_a_line(event):
            return
        self.write(event, self._estimate.remaining(event, now))

    def write(self, event: Event, remaining: float | None) -> None:
        line = f"{time.strftime('%H:%M:%S', time.localtime(event.time))}  {_place(event)}: {describe(event)}"
        if remaining is not None and remaining >= 1:
            line += f"; {'' if self._estimate.plans(event) else 'this stage '}about {duration(remaining)} left"
        print(line, file=self._out, flush=True)


class _JsonLines(_Plain):
    """One JSON object per event."""

    def write(self, event: Event, remaining: float | None) -> None:
        row = {"event": event.kind, **asdict(event), "remaining_seconds": remaining}
        del row["kind"]
        print(json.dumps(row), file=self._out, flush=True)


class _LiveBars:
    """A bar for each level with the stage that it is in, one for the stages before them, and one for all levels."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._estimate = Estimate({})
        self._bars = Bars(
            TextColumn("{task.fields[name]}", justify="right"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.description}"),
            console=console,
        )
        self._first = self._bars.add_task("", name="images", total=1.0)
        self._tasks: dict[str, TaskID] = {}
        self._all = self._bars.add_task("", name="all", total=1.0)
        self.expect(plan)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def expect(self, plan: Plan) -> None:
        self._estimate.expect(plan)
        self._bars.remove_task(self._all)
        for level in dict.fromkeys(level for level, _ in plan if level not in self._tasks):
            name = "all levels" if level == "all" else level
            self._tasks[level] = self._bars.add_task("waiting", name=name, total=1.0, start=False)
        self._all = self._bars.add_task("", name="all", total=1.0)  # removed and added, so that it stays the last line

    def __call__(self, event: Event) -> None:
        if event.kind == "notice":
            self._bars.console.print(f"{_place(event)}: {event.note}", highlight=False, markup=False)  # above the bars, for good
            return
        now = time.monotonic()
        self._estimate.see(event, now)
        remaining = self._estimate.remaining(event, now)
        left = f"about {duration(remaining)} left" if remaining is not None and remaining >= 1 else ""
        if self._estimate.plans(event):
            share = self._estimate.share(event.level)
            text = f"done{_score(event, 1)}" if share == 1 and event.score is not None else (
                f"{_title(event)}, {describe(event)}"
            )  # fmt: skip
            self._bars.update(self._tasks[event.level], completed=share, description=text)
            overall = sum(self._estimate.share(level) for level in self._tasks) / len(self._tasks)
            self._bars.update(self._all, completed=overall, description=left)
        else:
            done = 1.0 if event.kind in ("finished", "reused") else event.step / max(1, event.steps)
            self._bars.update(self._first, name=_place(event), completed=done, description=f"{describe(event)} {left}")


def reporter(plan: Plan, json_lines: bool) -> Reporter:
    """The reporter for standard output: JSON lines if asked for, bars on a terminal, plain lines otherwise."""
    out = sys.stdout
    if json_lines:
        return _JsonLines(plan, out)
    if out.isatty():
        return _LiveBars(plan, Console(file=out))
    return _Plain(plan, out)


def describe(event: Event) -> str:
    """An event in words, without its stage and time."""
    if event.kind == "notice":
        return event.note
    note = f" ({event.note})" if event.note else ""
    if event.kind == "started":
        return f"started{note}"
    if event.kind == "reused":
        return f"already in the store{_score(event)}{note}"
    if event.kind == "finished":
        return f"done{_score(event)}" + (f" after {duration(event.seconds)}" if event.seconds >= 1 else "") + note
    if not event.epochs:
        return f"{event.step} of {event.steps}{note}"
    loss = f", loss {event.loss:.3f}" if event.loss is not None else ""
    return f"epoch {event.epoch} of {event.epochs}{loss}{note}"


def duration(seconds: float) -> str:
    """12 s, 3 min or 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _score(event: Event, decimals: int = 2) -> str:
    return "" if event.score is None else f", {event.metric or 'score'} {event.score:.{decimals}f}"


def _title(event: Event) -> str:
    return TITLES.get(event.stage, event.stage)


def _place(event: Event) -> str:
    return _title(event) if event.level == "all" or event.stage == "base" else f"{event.level} {_title(event)}"


def _worth_a_line(event: Event) -> bool:
    """Whether a progress event ends an epoch, or a quarter of a stage without epochs; a log skips the others."""
    parts = event.epochs or min(4, event.steps)
    return event.step * parts // event.steps > (event.step - 1) * parts // event.steps
