"""What an evaluation found, as plain values, and what is published of it: tables, figures, the report. Knows nothing of Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gearnn_ray.config.recipe import PAPERS
from gearnn_ray.config.schema import EvaluateConfig
from gearnn_ray.evaluation import baselines, memory
from gearnn_ray.evaluation.baselines import CONSTANT, TITLES
from gearnn_ray.evaluation.report.page import Evaluation, figures_of, render
from gearnn_ray.evaluation.runs import Judged, Main, Picture, Weights
from gearnn_ray.levels.level import parse_level
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.sensitivity import Sensitivity, share_of_weights_changed
from gearnn_ray.store import tables
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks.segmentation import METRIC


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found. Paths are in the store; `failed`: unit of work to reason."""

    accuracy: tuple[dict[str, Any], ...]
    averages: tuple[dict[str, Any], ...]
    report: str
    tables: tuple[str, ...]
    figures: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One set of weights judged at one level; grid and budget where there are several of a method."""

    method: str
    level: str
    seed: int
    weights: Weights
    alpha: float | None = None
    sigma: float | None = None
    budget: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is evaluated where, checked against the release."""

    name: str
    release: str
    manifest: Mapping[str, Any]
    spec: JobSpec
    """with the release's recipe, budget and seed"""
    model_floats: int
    levels: tuple[str, ...]
    baseline_levels: tuple[str, ...]
    untrained: Mapping[str, baselines.Neighbours]
    budgets: tuple[int, ...]
    """further ones, in floats"""

    def seeds(self, count: int, level: str) -> range:
        """Seeds of the main methods at a level: `count` of them where rivals are judged, else one."""
        return range(self.spec.seed, self.spec.seed + (count if level in self.baseline_levels else 1))


@dataclass
class Found:
    """All that was measured."""

    rates: dict[str, float] = field(default_factory=dict)
    tuning: list[dict[str, Any]] = field(default_factory=list)
    mains: dict[tuple[str, int], Main] = field(default_factory=dict)
    cells: list[tuple[Cell, Judged]] = field(default_factory=list)
    stability: tuple[float, float] | None = None
    differences: list[dict[str, Any]] = field(default_factory=list)
    averages: list[dict[str, Any]] = field(default_factory=list)
    frequency: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tuning_level: str = ""
    failed: dict[str, str] = field(default_factory=dict)

    def put_in_order(self, levels: Sequence[str]) -> None:
        """Tasks end in any order; what is published has one."""
        order = list(TITLES)

        def place(each: tuple[Cell, Judged]) -> tuple[Any, ...]:
            cell, _ = each
            return (
                order.index(cell.method),
                levels.index(cell.level),
                cell.seed,
                cell.budget or 0,
                cell.alpha or 0,
                cell.sigma or 0,
            )

        self.cells.sort(key=place)

    def choose_stability(self) -> None:
        """The best of stability's grid by its average over the levels; the others stay in the table of the grid."""
        tried = [(cell, judged) for cell, judged in self.cells if cell.alpha is not None]
        if not tried:
            return
        scores: dict[Any, list[float]] = {}
        for cell, judged in tried:
            scores.setdefault((cell.alpha, cell.sigma), []).append(judged.score)
        self.stability = best = max(sorted(scores), key=lambda place: sum(scores[place]) / len(scores[place]))
        self.tuning += [
            {
                "method": cell.method, "level": cell.level, "learning_rate": self.rates[cell.method], "alpha": cell.alpha,
                "sigma": cell.sigma, "value": judged.score, "chosen": (cell.alpha, cell.sigma) == best,
            }
            for cell, judged in tried
        ]  # fmt: skip
        self.cells = [each for each in self.cells if each[0].alpha is None or (each[0].alpha, each[0].sigma) == best]

    def judged(self) -> dict[tuple[str, str], list[Judged]]:
        """Every method's results at every level, one per seed, under the release's own budget.

        Undistorted, only networks of their own are there beside GearNN: all others are the base, and equal by definition.
        """
        judged: dict[tuple[str, str], list[Judged]] = {}
        others = {"gearnn", *CONSTANT} - {"original"}
        for cell, result in self.cells:
            if cell.budget is None and (cell.method in others or not parse_level(cell.level).is_clean):
                judged.setdefault((cell.method, cell.level), []).append(result)
        return judged

    def worst_levels(self, seed: int) -> list[str]:
        """Distorted levels that both the original and GearNN were judged at, the original's worst first."""
        judged = self.judged()
        there = [level for method, level in judged if method == "gearnn" and (level, seed) in self.mains]
        return sorted(there, key=lambda level: judged["original", level][0].score)

    def pair(self, level: str, seed: int) -> tuple[Judged, Judged]:
        """The original's and GearNN's results at a level."""
        of = {
            (cell.method, cell.seed): result
            for cell, result in self.cells
            if cell.level == level and cell.budget is None
        }
        return of["original", seed], of["gearnn", seed]


def publish(store: Store, config: EvaluateConfig, plan: Plan, found: Found, command: str) -> Outcome:
    spec = plan.spec
    whole = [(cell, judged) for cell, judged in found.cells if cell.budget is None]
    accuracy = [
        {
            "method": cell.method, "level": cell.level, "metric": METRIC, "value": judged.score, "seed": cell.seed,
            "floats": cell.weights.floats, "release": plan.release,
        }
        for cell, judged in whole
    ]  # fmt: skip
    mains = {level: main for (level, seed), main in found.mains.items() if seed == spec.seed}
    mains = {level: mains[level] for level in plan.levels if level in mains}
    changes = [
        {"level": level, **row, "selected": row["layer"] in main.layers}
        for level, main in mains.items()
        for row in main.sensitivity
    ]
    shares = []
    for level, main in mains.items():
        by_layer, by_weight = share_of_weights_changed([Sensitivity(**row) for row in main.sensitivity])
        shares.append({"level": level, "by_layer": by_layer, "by_weight": by_weight})
    actual: dict[str, dict[str, int]] = {}
    counted = set[tuple[str, str | None]]()
    for cell, _ in whole:
        if (
            cell.method not in CONSTANT
            and not cell.method.startswith("gearnn-")
            and not parse_level(cell.level).is_clean
        ):
            # of several seeds or draws one is held, and what levels share is held once
            own = 0 if (cell.method, cell.weights.digest) in counted else cell.weights.floats
            if cell.level not in actual.setdefault(cell.method, {}):
                actual[cell.method][cell.level] = own
                counted.add((cell.method, cell.weights.digest))
    held = {method: list(floats.values()) for method, floats in actual.items()}
    whole_networks = [method for method in CONSTANT if any(cell.method == method for cell, _ in whole)]
    rows = {
        "accuracy": (tables.ACCURACY, accuracy),
        "differences": (tables.DIFFERENCES, found.differences),
        "averages": (tables.AVERAGES, found.averages),
        "memory": (
            tables.MEMORY,
            memory.memory_rows(spec.network.name, plan.model_floats, spec.budget, held, whole_networks),
        ),
        "tuning": (tables.TUNING, found.tuning),
        "bytes": (tables.BYTES, _bytes(config, plan, found)),
        "weight_changes": (tables.CHANGES, changes),
        "changed_shares": (tables.SHARES, shares),
        "frequency": (tables.FREQUENCY, found.frequency),
    }
    clips = len(set(spec.data.val.clips))
    evaluation = Evaluation(
        name=plan.name,
        release=plan.release,
        command=command,
        data=f"{spec.data.name}, {len(spec.data.val)} validation images of {clips} clip{'s' if clips > 1 else ''}",
        network=spec.network.name,
        metric=METRIC,
        model_floats=plan.model_floats,
        budget_floats=spec.budget,
        seed=spec.seed,
        axes=baselines.axes_of(plan.levels),
        accuracy=accuracy,
        differences=found.differences,
        averages=found.averages,
        memory=rows["memory"][1],
        tuning=found.tuning,
        bytes=rows["bytes"][1],
        changes=changes,
        shares=shares,
        frequency=found.frequency,
        pictures=found.pictures,
        notes=_notes(config, plan, found),
        failed=found.failed,
    )
    paths = {name: f"tables/{plan.name}/{name}.parquet" for name in rows}
    for name, (schema, each) in rows.items():
        store.put_table(paths[name], tables.table(schema, each))
    figures = figures_of(evaluation)
    pictures = {name: f"figures/{plan.name}/evaluation/{name}" for name in figures}
    for name, png in figures.items():
        store.put_figure(pictures[name], png)
    report = f"reports/{plan.name}/evaluation.html"
    store.put_report(report, render(evaluation, figures))
    return Outcome(
        accuracy=tuple(accuracy),
        averages=tuple(found.averages),
        report=report,
        tables=tuple(paths.values()),
        figures=tuple(pictures.values()),
        failed=found.failed,
    )


def _bytes(config: EvaluateConfig, plan: Plan, found: Found) -> list[dict[str, Any]]:
    """Every method as a point at the levels where GearNN has several budgets, GearNN as a curve."""
    points: dict[tuple[str, str, int | None], list[tuple[int, float]]] = {}
    for cell, judged in found.cells:
        if cell.level in (config.budget_levels or (found.tuning_level,)):
            budget = (cell.budget or plan.spec.budget) if cell.method == "gearnn" else None
            points.setdefault((cell.method, cell.level, budget), []).append((cell.weights.floats, judged.score))
    return [
        {
            "method": method, "level": level, "budget": budget,
            "floats": round(sum(floats for floats, _ in each) / len(each)),
            "value": sum(score for _, score in each) / len(each),
        }
        for (method, level, budget), each in points.items()
    ]  # fmt: skip


def _notes(config: EvaluateConfig, plan: Plan, found: Found) -> list[str]:
    """What a reader must know of how each method was made; first what all share."""
    spec, recipe = plan.spec, plan.spec.recipe
    count = len(spec.data.train)
    notes = [
        f"All fine-tunes share the {count} training images, {recipe.epochs} epochs, batches of {recipe.batch_size}, crops of "
        f"{recipe.crop} pixels, SGD with momentum {recipe.momentum:g} and a {recipe.schedule} learning rate.",
    ]
    is_joint = spec.coupling.is_joint
    tuned = {method: rate for method, rate in found.rates.items() if not (is_joint and method == "gearnn")}
    rates = ", ".join(f"{TITLES[method]} {rate:g}" for method, rate in tuned.items())
    if len(config.learning_rates) > 1:
        notes.append(
            f"Each method's learning rate was chosen once, at {found.tuning_level}, on the last {baselines.held_back(count)} "
            f"training images after a fine-tune without them: {rates}. The base has seen those images, and GearNN's layers were "
            "chosen on all; random layers were tuned with their first draw."
        )
    else:
        notes.append(f"One learning rate for all methods, which was not tuned: {found.rates['switching']:g}.")
    if is_joint:
        notes.append(
            f"GearNN's adaptors are the release's own, made at {recipe.learning_rate:g}; its layers were chosen for all "
            f"levels together ({spec.coupling.problem})."
            + (
                " A level's adaptor may have more floats than its part of the one memory, which is what the other methods get."
                if spec.coupling.problem == "one-memory"
                else ""
            )
        )
    if spec.criterion.storage_formats != PAPERS.storage_formats:
        notes.append(
            f"GearNN's layers are stored as {', '.join(spec.criterion.storage_formats)}; floats are of four bytes, so they are "
            "fewer than the numbers restored. Its learning rate is tuned with the same layers as float32."
        )
    if any(cell.method == "gearnn-released" for cell, _ in found.cells):
        notes.append(
            f"The release was made at {recipe.learning_rate:g}. Where its adaptors are not those made here (another learning "
            "rate, several workers per level, another kind of processor), they stand in the tables as "
            f"“{TITLES['gearnn-released']}”."
        )
    asked = set(config.methods)
    if "mixed" in asked:
        notes.append(
            "Mixed training is one network for all levels of all axes, with the steps of one fine-tune; frames of different "
            "sizes cannot share a batch, so a batch is of one size and mixes the levels that have it."
        )
    if "stability" in asked and found.stability is not None:
        alpha, sigma = found.stability
        notes.append(
            f"Stability training puts two copies of every image through the network, at twice the cost; shown is the best of its "
            f"grid by average accuracy on the validation images (α = {alpha:g}, σ = {sigma:g}), which favours it."
            + (" Its learning rate was chosen in the middle of the grid." if len(config.learning_rates) > 1 else "")
        )
    if "bn-statistics" in asked:
        notes.append(
            "AdaBN re-estimates running mean and variance over one epoch's batches of the level's images, cropped as in "
            "training, without their labels."
        )
    if "first-block" in asked:
        notes.append("Surgical first block: the layers nearest to the input, up to the first that does not fit into M.")
    if "auto-rgn" in asked:
        notes.append(
            "Auto-RGN: relative gradients are taken once, at the base; Eq. (2) chooses layers by them under M, and each is "
            "trained at the learning rate times its share of the largest RGN. A batch normalisation's statistics "
            "come with its weight."
        )
    if "random" in asked:
        notes.append(f"Random layers: {config.draws} draws, each layer taken in random order while it fits into M.")
    if plan.untrained:
        notes.append(
            "Interpolated adaptors mix the neighbours' linearly, by JPEG quality or CRF, or by the logarithm of brightness or "
            "frame area, as serving does; where both neighbours are as near, the nearest is the lower one."
        )
    notes.append(
        "Intervals are of a paired bootstrap over validation images; consecutive frames of a clip resemble each other, so they "
        "are too narrow where images come from few clips, and they do not hold the spread over seeds."
    )
    return notes
