"""Accuracy per byte: every variant of selection and recipe, and baselines of equal size, under every budget and seed.

    uv run benchmarks/budget.py docs/results/budget.yaml --data CAMVID --store artifacts --out budget.parquet

The study names a release, levels, budgets with their number of seeds, variants, and baselines. A variant has `selection`,
`recipe` and `sensitivity_epochs` where they differ from the release's; `neighbours` names, for each level, another level whose
adaptor its own one starts from, in the same layers. A baseline is a method of an evaluation with its learning rate. Every
fine-tune is one task on Ray. Results in the store are reused, so that the same command continues after a crash. Prints scores
(mean ± standard deviation over seeds), and the overlap of each variant's layers with the first variant's (Jaccard index).
"""

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from gearnn_ray.adaptors.adaptor import put_adaptor
from gearnn_ray.adaptors.storage_formats import decode
from gearnn_ray.config.budget import budget_floats
from gearnn_ray.config.recipe import Criterion
from gearnn_ray.config.release_jobs import ReleaseDataConfig, SweepConfig
from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.core.events import Emit
from gearnn_ray.evaluation.measurements import evaluate_weights
from gearnn_ray.evaluation.records import TuningResult
from gearnn_ray.evaluation.runs import WeightsSpec, make_weights
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.level_run import LevelRun, fine_tune_fully, measure_level, run_level
from gearnn_ray.offline.pipeline import prepare_images
from gearnn_ray.offline.release_context import open_release_context
from gearnn_ray.ray_jobs.board import discard
from gearnn_ray.ray_jobs.run_tasks import TaskRunner, job_tasks
from gearnn_ray.reporting.summary import figure_png, new_figure
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks.base import score
from gearnn_ray.training.predict import Predictor, collect_evidence
from gearnn_ray.training.trainer import fine_tune


@dataclass(frozen=True)
class Row:
    variant: str
    budget: str
    level: str
    seed: int
    score: float
    floats: int
    bytes: int
    original: float
    full: float | None
    layers: tuple[str, ...] = ()
    epochs: float = 0.0


# ── what workers do ──────────────────────────────────────────────────────────────────────────────────────────────


def measure(spec: JobSpec, level: str, criteria: Sequence[Criterion], emit: Emit) -> None:
    measure_level(spec, level, emit, criteria)


def adapt(spec: JobSpec, level: str, name: str, budget: str, emit: Emit) -> Row:
    r = run_level(spec, level, emit)
    assert r.adaptor is not None
    first = spec.recipe.epochs if spec.sensitivity_epochs is None else spec.sensitivity_epochs
    # the pass over the images that computes gradients is counted as an epoch, although it changes nothing
    epochs = first + spec.recipe.epochs + (first == 0 or spec.criterion.needs_gradients)
    return Row(name, budget, level, spec.seed, r.adaptor, r.floats, r.bytes, r.original, r.full, r.layers, epochs)


def adapt_neighbours(spec: JobSpec, level: str, origin: JobSpec, neighbour: str, name: str, budget: str, emit: Emit) -> Row:
    """A level's adaptor that starts from its neighbour's, in the same layers, without a full fine-tune of its own."""
    r = run_level(origin, neighbour, emit)
    digest = r.digest
    assert digest is not None
    run, task, normalisation = LevelRun(spec, level, emit), spec.task, spec.network.normalisation
    key = spec.key(
        "start at neighbour", level=level, train=spec.data.train.digest, val=spec.data.val.digest,
        recipe=spec.recipe.inputs(), seed=spec.seed, chosen=r.layers, start=digest,
    )  # fmt: skip

    def train() -> TuningResult:
        model, store = run.network(), run.cache.store
        base = store.get_state(spec.base)
        put_adaptor(model, base, decode(base, store.get_state(digest)))
        fine_tune(
            task, model, *spec.training_data(level), spec.recipe, normalisation, spec.execution.precision,
            chosen=r.layers, seed=spec.seed,
        )  # fmt: skip
        predictor = Predictor(model, normalisation, spec.execution.precision)
        evidence = collect_evidence(task, model, [predictor], *spec.validation_data(level), spec.network.num_classes)
        return TuningResult(score(task, evidence[0]))

    result, original = run.cache.result(TuningResult, key, train).score, run.original().score
    assert result is not None
    epochs = float(spec.recipe.epochs)
    return Row(name, budget, level, spec.seed, result, r.floats, r.bytes, original, None, r.layers, epochs)


def baseline(spec: JobSpec, wanted: WeightsSpec, name: str, budget: str, emit: Emit) -> Row:
    weights = make_weights(spec, wanted, emit)
    found = evaluate_weights(spec, wanted.level, [None, weights.digest], emit)
    own, original, size = found[weights.digest].score, found[None].score, weights.floats
    return Row(name, budget, wanted.level, wanted.seed, own, size, 4 * size, original, None)


# ── what the driver does ─────────────────────────────────────────────────────────────────────────────────────────


class Study:
    """The runs of a study file."""

    def __init__(self, study: dict[str, Any], release: JobSpec, floats: int) -> None:
        self.study, self.release, self.floats = study, release, floats
        self.variants: dict[str, JobSpec] = {}
        self.neighbours: dict[str, Mapping[str, str]] = {}
        for name, options in study["variants"].items():
            options = options or {}
            recipe = self._recipe(options.get("recipe", {}))
            epochs = options.get("sensitivity_epochs")
            self.variants[name] = replace(
                release,
                recipe=recipe,
                criterion=Criterion(**options.get("selection", {})),
                sensitivity_epochs=None if epochs is None else float(epochs),
            )
            if "neighbours" in options:
                self.neighbours[name] = options["neighbours"]

    def run(self, tasks: TaskRunner) -> list[Row]:
        """Every row, in waves: what variants share first, so that no two tasks compute it at once."""
        shared: dict[tuple[Any, ...], list[JobSpec]] = defaultdict(list)
        seeds = range(max(self.study["budgets"].values()))
        for (name, spec), seed in itertools.product(self.variants.items(), seeds):
            if name not in self.neighbours:
                shared[spec.recipe, spec.sensitivity_epochs, seed].append(replace(spec, seed=seed))
        controls = [next((spec for spec in specs if spec.criterion.against == "clean"), None) for specs in shared.values()]
        tasks.all(fine_tune_fully, {f"control {n}": (spec, "clean") for n, spec in enumerate(controls) if spec})
        tasks.all(
            measure,
            {
                f"{level} {number}": (specs[0], level, [spec.criterion for spec in specs])
                for number, specs in enumerate(shared.values())
                for level in self.study["levels"]
            },
        )
        rows: list[Row] = []
        started = time.perf_counter()

        def note(row: Row | None) -> None:
            if row is not None:
                rows.append(row)
                minutes = (time.perf_counter() - started) / 60
                print(f"{minutes:6.1f} min: {row.variant} {row.budget} {row.level} seed {row.seed}: "
                      f"{row.score:.2f} in {row.bytes:,} bytes", flush=True)  # fmt: skip

        for calls in (self._runs(), self._runs_at_neighbours()):
            for label, function, arguments in calls:
                tasks.start(label, function, *arguments, then=note)
            tasks.settle()
        return rows

    def _recipe(self, changes: Mapping[str, Any]) -> Any:
        return self.release.recipe.model_copy(update={**self.study.get("recipe", {}), **changes})

    def _cells(self) -> Iterator[tuple[str, str, int]]:
        """Budget, level and seed."""
        for (budget, seeds), level in itertools.product(self.study["budgets"].items(), self.study["levels"]):
            for seed in range(seeds):
                yield budget, level, seed

    def _spec(self, name: str, budget: str, seed: int) -> JobSpec:
        return replace(self.variants[name], budget=budget_floats(budget, self.floats), seed=seed)

    def _runs(self) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        first, smallest = next(iter(self.variants)), next(iter(self.study["budgets"]))
        for budget, level, seed in self._cells():
            for name in self.variants:
                if name not in self.neighbours:
                    own = self._spec(name, budget, seed)
                    yield f"{name} {budget} {level} {seed}", adapt, (own, level, name, budget)
            for name, options in self.study.get("baselines", {}).items():
                method = options["method"]
                if method in ("bn-tuned", "bn-statistics") and budget != smallest:
                    continue  # its size does not depend on the budget
                wanted = WeightsSpec(
                    method, level, seed=seed, learning_rate=options["learning_rate"],
                    budget=self._spec(first, budget, seed).budget if method in ("auto-rgn", "random", "first-block") else 0,
                    draw=seed if method == "random" else 0,
                )  # fmt: skip
                own = replace(self.release, recipe=self._recipe({}))
                yield f"{name} {budget} {level} {seed}", baseline, (own, wanted, name, budget)

    def _runs_at_neighbours(self) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        """After the runs of the first variant, whose adaptors they start from."""
        first = next(iter(self.variants))
        for (budget, level, seed), name in itertools.product(self._cells(), self.neighbours):
            own, origin = (self._spec(each, budget, seed) for each in (name, first))
            arguments = (own, level, origin, self.neighbours[name][level], name, budget)
            yield f"{name} {budget} {level} {seed}", adapt_neighbours, arguments


def figure(rows: Sequence[Row], names: Sequence[str], levels: Sequence[str], baselines: Collection[str]) -> bytes:
    """PNG: a panel per level, mean score over an adaptor's bytes, a line per variant."""
    drawn = new_figure((4.2 * len(levels), 4.6))
    axes = drawn.subplots(1, len(levels), squeeze=False)[0]
    for axis, level in zip(axes, levels, strict=True):
        for number, name in enumerate(names):
            points = defaultdict[str, list[Row]](list)
            for row in rows:
                if (row.variant, row.level) == (name, level):
                    points[row.budget].append(row)
            line = sorted((fmean(r.bytes for r in own), fmean(r.score for r in own)) for own in points.values())
            axis.plot(
                [size / 1000 for size, _ in line], [score for _, score in line], label=name, linewidth=1, markersize=5,
                marker="osv^D<>phX*"[number % 11], color=f"C{number % 10}", linestyle="--" if name in baselines else "-",
            )  # fmt: skip
        mine = [row for row in rows if row.level == level]
        wholes = [row.full for row in mine if row.full is not None]
        lines = {"original": mine[0].original} | ({"whole network": fmean(wholes)} if wholes else {})
        # outliers far below would squeeze the others together
        scores = sorted(row.score for row in mine)
        lowest = max(scores[0], scores[len(scores) // 10] - 3) - 0.5
        axis.set_ylim(lowest, max(scores[-1], *lines.values()) + 1)
        for what, at in lines.items():
            if at < lowest:
                continue
            axis.axhline(at, color="grey", linewidth=0.8, linestyle=":")
            axis.annotate(what, (1, at), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom")
        axis.set(xscale="log", title=level, xlabel="adaptor, kB")
        sizes = sorted({round(row.bytes / 1000, -1 if row.bytes > 20_000 else 1) for row in mine})
        ticks = [size for last, size in zip([0.0, *sizes], sizes, strict=False) if size > 1.3 * last]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mIoU, percent")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure_png(drawn)


def spread(scores: Mapping[int, float | None]) -> str:
    """Mean ± standard deviation over seeds."""
    known = [score for score in scores.values() if score is not None]
    return (f"{fmean(known):.2f}" + (f" ± {stdev(known):.2f}" if len(known) > 1 else "")) if known else "-"


def print_line(head: str, cells: Sequence[str]) -> None:
    print(" ".join([f"{head:<45}", *(f"{cell:>20}" for cell in cells)]))


def print_tables(study: dict[str, Any], rows: Sequence[Row]) -> None:
    """Scores, whole networks, and the overlap of layers."""
    levels, budgets, variants = study["levels"], study["budgets"], study["variants"]
    found = defaultdict[tuple[str, str, str], list[Row]](list)
    for row in rows:
        found[row.variant, row.budget, row.level].append(row)
    print()
    print_line(f"{'variant':<28}{'M':>7}{'bytes':>10}", levels)
    for name, budget in itertools.product((*variants, *study.get("baselines", {})), budgets):
        cells = [found.get((name, budget, level), []) for level in levels]
        if any(cells):
            size = fmean(row.bytes for cell in cells for row in cell)
            texts = [spread({row.seed: row.score for row in cell}) for cell in cells]
            print_line(f"{name:<28}{budget:>7}{size:>10,.0f}", texts)
    print()
    print_line("whole network", levels)
    originals = {row.level: row.original for row in rows}
    print_line("original", [f"{originals[level]:.2f}" for level in levels])
    printed = set[tuple[str, ...]]()
    for name in variants:
        wholes = tuple(
            spread({row.seed: row.full for row in rows if (row.variant, row.level) == (name, level)}) for level in levels
        )
        if wholes not in printed and set(wholes) != {"-"}:  # variants with one recipe have the same
            print_line(name, wholes)
        printed.add(wholes)
    first = next(iter(variants))
    of_first = {(row.budget, row.level, row.seed): set(row.layers) for row in rows if row.variant == first}

    def jaccard(row: Row) -> float:
        others = of_first[row.budget, row.level, row.seed]
        return len(others & set(row.layers)) / max(1, len(others | set(row.layers)))

    print()
    print_line(f"{f'layers in common with {first}':<35}{'epochs':>10}", levels)
    for name, budget in itertools.product(variants, budgets):
        cells = [found.get((name, budget, level), []) for level in levels]
        if any(cells):
            epochs = fmean(row.epochs for cell in cells for row in cell)
            texts = [f"{fmean(map(jaccard, cell)):.2f}" if cell else "-" for cell in cells]
            print_line(f"{name:<28}{budget:>7}{epochs:>10.3g}", texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", help="folder of the data set")
    parser.add_argument("--cache", default="~/.cache/gearnn_ray")
    parser.add_argument("--store", default="artifacts")
    parser.add_argument("--out", type=Path, help="Parquet file of all rows")
    parser.add_argument("--figure", type=Path, help="PNG of scores over bytes")
    options = parser.parse_args()
    study = yaml.safe_load(options.study.read_text())
    config = SweepConfig(
        release=study["release"], store=options.store, data=ReleaseDataConfig(path=options.data, cache=options.cache)
    )
    with job_tasks(ResourcesConfig(), discard) as tasks:
        release = open_release_context(Store(config.store), config, tasks)
        spec, levels = release.spec, dict.fromkeys((*study["levels"], "clean"))
        prepare_images(spec.data, spec.network.task, tuple(levels), spec.cache, tasks, discard)
        rows = Study(study, spec, release.facts.floats).run(tasks)
    for label, reason in tasks.failed.items():
        print(f"{label} failed: {reason}")
    if options.out:
        pq.write_table(pa.Table.from_pylist([{**asdict(row), "layers": list(row.layers)} for row in rows]), options.out)
    if options.figure:
        baselines = study.get("baselines", {})
        options.figure.write_bytes(figure(rows, [*study["variants"], *baselines], study["levels"], baselines))
    print_tables(study, rows)


if __name__ == "__main__":
    main()
