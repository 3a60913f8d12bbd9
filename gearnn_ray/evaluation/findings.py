"""What an evaluation found, as plain values, and what is published of it: tables, figures, the report. Knows nothing of Ray."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

import pyarrow as pa

from gearnn_ray.evaluation import memory
from gearnn_ray.evaluation.baselines import CONSTANT, TITLES
from gearnn_ray.evaluation.notes import notes
from gearnn_ray.evaluation.plan import Plan
from gearnn_ray.evaluation.records import (
    AccuracyRow,
    AverageRow,
    BytesRow,
    ChangeRow,
    DifferenceRow,
    Evaluated,
    FrequencyResult,
    FrequencyRow,
    MainWeights,
    Picture,
    ShareRow,
    Source,
    TuningRow,
    Weights,
)
from gearnn_ray.evaluation.report.content import Evaluation
from gearnn_ray.evaluation.report.page import figures_of, render
from gearnn_ray.levels.axes import axes_of
from gearnn_ray.levels.level import parse_level
from gearnn_ray.offline.sensitivity import share_of_weights_changed
from gearnn_ray.store import tables
from gearnn_ray.store.releases import Store

_SCHEMAS: dict[str, pa.Schema] = {
    "accuracy": tables.ACCURACY,
    "differences": tables.DIFFERENCES,
    "averages": tables.AVERAGES,
    "memory": tables.MEMORY,
    "tuning": tables.TUNING,
    "bytes": tables.BYTES,
    "changes": tables.CHANGES,
    "shares": tables.SHARES,
    "frequency": tables.FREQUENCY,
}
_FILES = {"changes": "weight_changes", "shares": "changed_shares"}  # names of tables that differ from their rows'


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found. Paths are in the store. failed: label of a task to the reason."""

    accuracy: tuple[AccuracyRow, ...]
    averages: tuple[AverageRow, ...]
    report: str
    tables: tuple[str, ...]
    figures: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One set of weights evaluated at one level. alpha, sigma: of stability training. budget: where GearNN has a further one.
    neighbour: the adaptor that the weights are mixed with, image by image.
    """

    method: str
    level: str
    seed: int
    weights: Weights
    alpha: float | None = None
    sigma: float | None = None
    budget: int | None = None
    neighbour: Weights | None = None

    @property
    def source(self) -> Source:
        """What is evaluated."""
        return self.weights.digest if self.neighbour is None else (self.weights.digest, self.neighbour.digest)


@dataclass
class Found:
    """All that was measured. rates: learning rate by method. mains: by level and seed. frequency: by level and network."""

    rates: dict[str, float] = field(default_factory=dict)
    tuning: list[TuningRow] = field(default_factory=list)
    mains: dict[tuple[str, int], MainWeights] = field(default_factory=dict)
    cells: list[tuple[Cell, Evaluated]] = field(default_factory=list)
    stability: tuple[float, float] | None = None
    differences: list[DifferenceRow] = field(default_factory=list)
    averages: list[AverageRow] = field(default_factory=list)
    frequency: dict[tuple[str, str], FrequencyResult] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    tuning_level: str = ""
    failed: dict[str, str] = field(default_factory=dict)

    def put_in_order(self, levels: Sequence[str]) -> None:
        """Sort the cells, because tasks end in any order."""
        order = list(TITLES)

        def place(each: tuple[Cell, Evaluated]) -> tuple[float, ...]:
            cell, _ = each
            setting = (cell.budget or 0, cell.alpha or 0, cell.sigma or 0)
            return (order.index(cell.method), levels.index(cell.level), cell.seed, *setting)

        self.cells.sort(key=place)

    def choose_stability(self) -> None:
        """Choose the best setting of stability's grid by its average over the levels; the others stay in the tuning table."""
        tried = [
            (cell, (cell.alpha, cell.sigma), evaluated)
            for cell, evaluated in self.cells
            if cell.alpha is not None and cell.sigma is not None
        ]
        if not tried:
            return
        scores: dict[tuple[float, float], list[float]] = {}
        for _, setting, evaluated in tried:
            scores.setdefault(setting, []).append(evaluated.score)
        self.stability = best = max(sorted(scores), key=lambda setting: sum(scores[setting]) / len(scores[setting]))
        self.tuning += [
            {
                "method": cell.method, "level": cell.level, "learning_rate": self.rates[cell.method], "alpha": alpha,
                "sigma": sigma, "value": evaluated.score, "chosen": (alpha, sigma) == best,
            }
            for cell, (alpha, sigma), evaluated in tried
        ]  # fmt: skip
        self.cells = [each for each in self.cells if each[0].alpha is None or (each[0].alpha, each[0].sigma) == best]

    def evaluated(self) -> dict[tuple[str, str], list[Evaluated]]:
        """Every method's results at every level, one per seed, under the release's own budget.

        At the undistorted level only GearNN and networks of their own: all other methods are the base, and equal by definition.
        """
        found: dict[tuple[str, str], list[Evaluated]] = {}
        others = {"gearnn", *CONSTANT} - {"original"}
        for cell, result in self.cells:
            if cell.budget is None and (cell.method in others or not parse_level(cell.level).is_clean):
                found.setdefault((cell.method, cell.level), []).append(result)
        return found

    def worst_levels(self, seed: int) -> list[str]:
        """Distorted levels with results of both the original and GearNN, the original's worst first."""
        found = self.evaluated()
        there = [level for method, level in found if method == "gearnn" and (level, seed) in self.mains]
        return sorted(there, key=lambda level: found["original", level][0].score)

    def pair(self, level: str, seed: int) -> tuple[Evaluated, Evaluated]:
        """The original's and GearNN's results at a level."""
        results = {(cell.method, cell.seed): result for cell, result in self.cells if cell.level == level and cell.budget is None}
        return results["original", seed], results["gearnn", seed]


def publish(store: Store, plan: Plan, found: Found, command: str) -> Outcome:
    """Put tables, figures and the report into the store."""
    spec, release = plan.spec, plan.release
    whole = [(cell, evaluated) for cell, evaluated in found.cells if cell.budget is None]
    mains = {level: main for level in plan.levels if (main := found.mains.get((level, spec.seed))) is not None}
    methods = dict.fromkeys(cell.method for cell, _ in whole)
    networks = [method for method in CONSTANT if method in methods and method != "original-scaled"]  # which is the original
    clips = len(set(spec.data.val.clips))
    evaluation = Evaluation(
        name=release.name,
        release=release.digest,
        command=command,
        data=f"{spec.data.name}, {len(spec.data.val)} validation images of {clips} clip{'s' if clips > 1 else ''}",
        network=spec.network.name,
        task=spec.network.task,
        metric=spec.task.metrics[0],
        model_floats=release.facts.floats,
        budget_floats=spec.budget,
        seed=spec.seed,
        axes=axes_of(plan.levels),
        accuracy=_accuracy(plan, whole),
        differences=found.differences,
        averages=found.averages,
        memory=memory.memory_rows(spec.network.name, release.facts.floats, spec.budget, _held(whole), networks),
        tuning=found.tuning,
        bytes=_bytes(plan, found),
        changes=_changes(mains),
        shares=_shares(mains),
        frequency=list(_frequency(found)),
        pictures=found.pictures,
        notes=list(notes(plan, found.rates, found.tuning_level, found.stability, methods)),
        failed=found.failed,
    )
    paths = {name: f"tables/{release.name}/{_FILES.get(name, name)}.parquet" for name in _SCHEMAS}
    for name, schema in _SCHEMAS.items():
        rows = getattr(evaluation, name)
        store.put_table(paths[name], tables.table(schema, [*rows, *_others(plan, whole)] if name == "accuracy" else rows))
    figures = figures_of(evaluation)
    pictures = {name: f"figures/{release.name}/evaluation/{name}" for name in figures}
    for name, png in figures.items():
        store.put_figure(pictures[name], png)
    report = f"reports/{release.name}/evaluation.html"
    store.put_report(report, render(evaluation, figures))
    return Outcome(
        accuracy=tuple(evaluation.accuracy),
        averages=tuple(found.averages),
        report=report,
        tables=tuple(paths.values()),
        figures=tuple(pictures.values()),
        failed=found.failed,
    )


def _accuracy(plan: Plan, whole: Sequence[tuple[Cell, Evaluated]]) -> list[AccuracyRow]:
    metric, digest = plan.spec.task.metrics[0], plan.release.digest
    return [
        {
            "method": cell.method, "level": cell.level, "metric": metric, "value": evaluated.score, "seed": cell.seed,
            "floats": cell.weights.floats, "release": digest,
        }
        for cell, evaluated in whole
    ]  # fmt: skip


def _others(plan: Plan, whole: Sequence[tuple[Cell, Evaluated]]) -> list[AccuracyRow]:
    """Rows of the task's other metrics, which stand in the table alone."""
    rows: list[AccuracyRow] = []
    for row, (_, evaluated) in zip(_accuracy(plan, whole), whole, strict=True):
        rows += [{**row, "metric": metric, "value": value} for metric, value in evaluated.others.items()]
    return rows


def _held(whole: Sequence[tuple[Cell, Evaluated]]) -> dict[str, list[int]]:
    """Floats that each method with weights per level holds, by level: one of several seeds or draws, equal weights once."""
    held: dict[str, dict[str, int]] = {}
    counted = set[tuple[str, str | None]]()
    for cell, _ in whole:
        if cell.method in CONSTANT or cell.method.startswith("gearnn-") or parse_level(cell.level).is_clean:
            continue
        levels, weights = held.setdefault(cell.method, {}), (cell.method, cell.weights.digest)
        if cell.level not in levels:
            levels[cell.level] = 0 if weights in counted else cell.weights.floats
            counted.add(weights)
    return {method: list(floats.values()) for method, floats in held.items()}


def _bytes(plan: Plan, found: Found) -> list[BytesRow]:
    """Every method as a point, and GearNN as a curve, at the levels where GearNN has several budgets."""
    points: dict[tuple[str, str, int | None], list[tuple[int, float]]] = {}
    for cell, evaluated in found.cells:
        if cell.level in (plan.config.budget_levels or (found.tuning_level,)):
            budget = (cell.budget or plan.spec.budget) if cell.method == "gearnn" else None
            points.setdefault((cell.method, cell.level, budget), []).append((cell.weights.floats, evaluated.score))
    return [
        {
            "method": method, "level": level, "budget": budget,
            "floats": round(sum(floats for floats, _ in each) / len(each)),
            "value": sum(score for _, score in each) / len(each),
        }
        for (method, level, budget), each in points.items()
    ]  # fmt: skip


def _changes(mains: Mapping[str, MainWeights]) -> list[ChangeRow]:
    return [
        cast(ChangeRow, {"level": level, **asdict(row), "selected": row.layer in main.layers})
        for level, main in mains.items()
        for row in main.sensitivity
    ]


def _shares(mains: Mapping[str, MainWeights]) -> list[ShareRow]:
    shares = {level: share_of_weights_changed(main.sensitivity) for level, main in mains.items()}
    return [{"level": level, "by_layer": layer, "by_weight": weight} for level, (layer, weight) in shares.items()]


def _frequency(found: Found) -> Iterator[FrequencyRow]:
    order = list(TITLES)
    for level, network in sorted(found.frequency, key=lambda place: (place[0], order.index(place[1]))):
        for v, row in enumerate(found.frequency[level, network].response):
            for h, magnitude in enumerate(row):
                yield {"network": network, "level": level, "vertical": v, "horizontal": h, "magnitude": magnitude}
