"""The adapt job on a Ray cluster: the outcomes of every segment of every stream are one task each, then every method is replayed.

    sources ─► segments of pristine frames ─► outcomes at every configuration, a task per segment ─► methods ─► table, page

The driver reads the sources, so that a file need only be where the job is started. What survives a killed task or driver are the
outcomes in the store.
"""

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from gearnn_ray.config.adapt import AdaptConfig
from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.knobs.controller import Ceiling, Floor, Goal
from gearnn_ray.knobs.encoding import encode
from gearnn_ray.knobs.findings import Average, Found, Held, Replayed, at_equal_accuracy, averages_of, replayed, rows_of, with_goal
from gearnn_ray.knobs.knob import Knob, knobs_of, settings_of
from gearnn_ray.knobs.methods import Table, configurations_of
from gearnn_ray.knobs.outcome import NETWORKS, Judge, Outcomes, outcomes
from gearnn_ray.knobs.reaction import Reaction, reactions
from gearnn_ray.knobs.regions import Regions
from gearnn_ray.knobs.report.page import Page, figures_of, render
from gearnn_ray.knobs.settings import Settings
from gearnn_ray.knobs.streams import Segment, Stream, folder_stream, generated_stream, stretches_of, video_stream
from gearnn_ray.ray_jobs.run_tasks import TaskRunner, job_tasks
from gearnn_ray.reporting.progress import Reporter
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.store import tables
from gearnn_ray.store.leases import HeldLease, lease_key, run_leased
from gearnn_ray.store.manifest import Manifest
from gearnn_ray.store.patience import patient
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks import task_by_name

MOST_CONFIGURATIONS = 200
"""Of the knobs together: each is computed in every segment."""
_STAGE = "segments"


@dataclass(frozen=True)
class Outcome:
    """What the job found. Paths are in the store. failed: label of a task to the reason."""

    found: tuple[Found, ...]
    averages: tuple[Average, ...]
    held: tuple[Held, ...]
    reactions: tuple[Reaction, ...]
    remarks: tuple[str, ...]
    metric: str
    report: str | None
    table: str | None
    figures: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A checked configuration."""

    config: AdaptConfig
    manifest: Manifest
    digest: str
    knobs: tuple[Knob, ...]
    streams: tuple[Stream, ...]
    classes: tuple[int, ...]

    @property
    def metric(self) -> str:
        return task_by_name(self.manifest.model.task).metrics[0]

    @property
    def goal(self) -> Goal | None:
        """That controllers are given beside their prices."""
        if self.config.floor is not None:
            return Floor(self.config.floor)
        return None if self.config.ceiling is None else Ceiling(self.config.ceiling)

    @property
    def settings(self) -> tuple[Settings, ...]:
        return tuple(settings_of(self.knobs, values) for values in configurations_of(self.knobs))


def plan_of(config: AdaptConfig, store: Store) -> Plan:
    """Check everything that can be checked without a cluster. Raises UserError."""
    digest, manifest = store.manifest(config.release)
    knobs = knobs_of(config.knobs)
    if regions := next((knob for knob in knobs if isinstance(knob, Regions)), None):
        raise UserError(
            f"the knob {regions.name} is not compared here: its tiles follow from a camera's own past, so leave it out"
        )
    count = len(configurations_of(knobs))
    if count > MOST_CONFIGURATIONS:
        raise UserError(
            f"the knobs have {count} configurations together, expected at most {MOST_CONFIGURATIONS}, because each is computed "
            "in every segment: leave values out"
        )
    names = manifest.model.class_names
    if unknown := next((name for name in config.classes if name not in names), None):
        raise UserError(f"{config.release} has no class {unknown!r}: expected some of {', '.join(names)}")
    classes = tuple(names.index(name) for name in config.classes)
    if classes:
        task_by_name(manifest.model.task).of_classes({}, classes)
    plan = Plan(config, manifest, digest, knobs, tuple(_streams(config, manifest)), classes)
    for stream in plan.streams:
        first = next(stream.segments()).frames[:1]
        for settings in plan.settings:
            encode(first, settings)
    store.check_writable()
    return plan


def _streams(config: AdaptConfig, manifest: Manifest) -> list[Stream]:
    if not config.source:
        return [generated_stream(manifest, config.length, seed) for seed in range(config.seeds)]
    labels = None if config.labels is None else Path(config.labels)
    if labels is not None and manifest.model.task != "segmentation":
        raise UserError(f"labels are images of class ids, and {config.release} is for {manifest.model.task}: leave them out")
    streams = []
    for source in config.source:
        if Path(source).is_dir():
            classes = manifest.model.num_classes
            streams.append(folder_stream(Path(source), labels, config.rate, config.length, classes))
        elif labels is not None:
            raise UserError(f"labels belong to a folder of frames, and {source} is none: leave them out, or give the folder")
        else:
            streams.append(video_stream(source, config.rate, config.length))
    names = [stream.name for stream in streams]
    # files of one name in different folders
    return [
        replace(stream, name=f"{stream.name}-{number}") if names.count(stream.name) > 1 else stream
        for number, stream in enumerate(streams)
    ]


def adapt(config: AdaptConfig, emit: Reporter, command: str) -> Outcome:
    """Run the job. Raises UserError before anything is computed or written when the configuration is invalid."""
    store = Store(patient(config.store))
    plan = plan_of(config, store)
    key = lease_key("adapt", config.model_dump(mode="json", exclude={"store"}))
    return run_leased(store.uri, key, emit, lambda lease: _adapt(config, store, plan, lease, emit, command))


def _adapt(config: AdaptConfig, store: Store, plan: Plan, lease: HeldLease, emit: Reporter, command: str) -> Outcome:
    with job_tasks(ResourcesConfig(**config.resources.model_dump()), emit, lease.check) as tasks:
        judge = Judge(
            store=store.uri,
            release=f"{plan.manifest.name}@{plan.digest}",
            digest=plan.digest,
            trust=config.trust,
            device="cuda" if config.resources.gpus else "cpu",
            threads=tasks.threads,
            classes=plan.classes,
            specifications=config.knobs,
            settings=plan.settings,
        )
        emit.expect({(stream.name, _STAGE): 1.0 for stream in plan.streams})
        watched = [_Watched(stream, config.segments, judge, tasks, emit) for stream in plan.streams]
        tasks.settle()
    sources = [_replayed(plan, each) for each in watched if each.found]
    lease.confirm()
    return publish(store, plan, sources, command, dict(tasks.failed))


class _Watched:
    """The outcomes of one stream's segments, each a task. found: of `NETWORKS`, by the segment's number."""

    def __init__(self, stream: Stream, most: int | None, judge: Judge, tasks: TaskRunner, emit: Emit) -> None:
        self.stream, self._emit = stream, emit
        self.found: dict[int, tuple[Outcomes, ...]] = {}
        self._ended = self._reused = self.count = 0
        self.seconds, self._started = 0.0, time.perf_counter()
        shared, segments = tasks.share(judge), itertools.islice(stream.segments(), most)
        emit(Event("started", _STAGE, stream.name))
        for number, segment in enumerate(segments):
            self.count, self.seconds = number + 1, segment.seconds
            # the object store spills to disk what does not fit into memory
            then = partial(self._note, number)
            tasks.start(f"{stream.name} segment {number}", _outcomes, shared, tasks.share(segment), then=then)

    def _note(self, number: int, result: tuple[tuple[Outcomes, ...], bool] | None) -> None:
        self._ended += 1
        if result is not None:
            self.found[number], reused = result
            self._reused += reused
        if self._ended < self.count:
            self._emit(Event("progress", _STAGE, self.stream.name, self._ended, self.count))
        elif self._reused == self.count:
            self._emit(Event("reused", _STAGE, self.stream.name, self.count, self.count))
        else:
            seconds = time.perf_counter() - self._started
            note = f"{self._reused} of {self.count} were in the store" if self._reused else ""
            self._emit(Event("finished", _STAGE, self.stream.name, self.count, self.count, seconds=seconds, note=note))


def _outcomes(judge: Judge, segment: Segment, emit: Emit) -> tuple[tuple[Outcomes, ...], bool]:
    """Of one segment, and whether they were in the store."""
    del emit  # the driver tells how many segments are done
    events: list[Event] = []
    found = outcomes(judge, segment, _model(judge.store, judge.release, judge.device, judge.trust), events.append)
    return found, all(event.kind == "reused" for event in events)


@functools.lru_cache(maxsize=1)
def _model(store: str, release: str, device: str, trust: tuple[str, ...]) -> AdaptiveModel:
    """A worker computes many segments, one after the other."""
    return AdaptiveModel.pull(store, release, device, trust=trust)


def _replayed(plan: Plan, watched: _Watched) -> Replayed:
    segments = [watched.found[number] for number in sorted(watched.found)]
    by_network = {network: [each[place] for each in segments] for place, network in enumerate(NETWORKS)}
    made = {network: Table.of(plan.knobs, plan.config.length, watched.seconds, found) for network, found in by_network.items()}
    length, is_whole = plan.config.length, len(segments) == watched.count  # else segments do not have their own numbers
    stretches = stretches_of(watched.stream.changes, length, len(segments)) if watched.stream.changes and is_whole else ()
    return replayed(watched.stream.name, made, by_network, watched.stream.has_labels, plan.goal, stretches)


def publish(store: Store, plan: Plan, sources: Sequence[Replayed], command: str, failed: Mapping[str, str]) -> Outcome:
    """Put table, figures and the page into the store."""
    if not sources:
        return Outcome((), (), (), (), (), plan.metric, None, None, (), failed)
    config, name = plan.config, plan.config.name or plan.manifest.name
    found = [each for source in sources for each in at_equal_accuracy(source, config.within)]
    averages = averages_of(found) if config.seeds > 1 else []
    reacted = reactions(sources, config.within)
    table = f"tables/{name}/adapt.parquet"
    schema = tables.adapt_schema({knob.name: knob.values for knob in plan.knobs})
    goal = None if plan.goal is None else "floor" if config.ceiling is None else "ceiling"
    store.put_table(table, tables.table(schema, rows_of(sources, goal)))
    page = Page(
        name, plan.manifest.name, plan.digest, command, plan.metric, config.knobs, config.length, config.within, config.classes,
        sources, found, averages, reacted, failed,
    )  # fmt: skip
    figures = figures_of(page)
    for file, png in figures.items():
        store.put_figure(f"figures/{name}/adapt/{file}", png)
    report = f"reports/{name}/adapt.html"
    store.put_report(report, render(page, figures))
    remarks = tuple(f"{source.name}: {remark}." for source in sources for remark in source.remarks())
    return Outcome(
        found=tuple(found),
        averages=tuple(averages),
        held=tuple(each for source in sources for each in with_goal(source)),
        reactions=tuple(reacted),
        remarks=remarks,
        metric=plan.metric,
        report=report,
        table=table,
        figures=tuple(f"figures/{name}/adapt/{file}" for file in figures),
        failed=failed,
    )
