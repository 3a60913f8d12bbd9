"""What a byte buys: every variant of selection and recipe, and rivals of equal size, under every budget, seed by seed.

    uv run benchmarks/budget.py docs/results/budget.yaml --data CAMVID --store artifacts --out budget.parquet

The file names a release, levels, budgets with how many seeds each gets, variants (each with `selection`, `recipe` and
`sensitivity_epochs` where they differ from the release's; `neighbours`, where a level's adaptor is to begin at another's, in
the same layers) and rivals (methods of an evaluation, each with its learning rate). One task per fine-tune on Ray; what the
store has is not made again, so that the same command goes on after a crash. Prints scores (mean ± standard deviation over
seeds), and what of the first variant's layers each has chosen (Jaccard index) in how many epochs of fine-tuning.
"""

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import yaml

from gearnn_ray.adaptors.adaptor import put_adaptor
from gearnn_ray.adaptors.storage_formats import decode
from gearnn_ray.config.recipe import Criterion
from gearnn_ray.config.schema import ReleaseDataConfig, budget_floats
from gearnn_ray.evaluation import runs as evaluation
from gearnn_ray.offline import level_run
from gearnn_ray.offline.job_spec import JobSpec, training_data, validation_data
from gearnn_ray.offline.release_context import make_images, open_release_context
from gearnn_ray.ray_jobs.cluster import EventBoard, EventRelay, cluster, discard
from gearnn_ray.reporting.summary import figure_png, new_figure
from gearnn_ray.store.releases import Store
from gearnn_ray.training.trainer import evaluate, fine_tune, prepare_process


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


@ray.remote(num_cpus=1)
def control(spec: JobSpec) -> None:
    prepare_process(1)
    level_run.fine_tune_fully(spec, "clean", discard)


@ray.remote(num_cpus=1)
def sense(spec: JobSpec, level: str, criteria: list[Criterion], _: Any) -> None:
    prepare_process(1)
    level_run.sense_level(spec, level, criteria, discard)


@ray.remote(num_cpus=1)
def adapt(spec: JobSpec, level: str, name: str, budget: str, sensed: Any) -> Row:
    prepare_process(1)
    r = level_run.run_level(spec, level, discard)
    assert r.adaptor is not None
    first = spec.recipe.epochs if spec.sensitivity_epochs is None else spec.sensitivity_epochs
    # a pass over the images for the gradients is counted as an epoch, though it moves nothing
    epochs = first + spec.recipe.epochs + (first == 0 or spec.criterion.needs_gradients)
    return Row(name, budget, level, spec.seed, r.adaptor, r.floats, r.bytes, r.original, r.full, r.layers, epochs)


@ray.remote(num_cpus=1)
def adapt_neighbours(spec: JobSpec, level: str, origin: JobSpec, neighbour: str, name: str, budget: str, _: Row) -> Row:
    """A level's adaptor that begins at its neighbour's, which is there, in the same layers: no full fine-tune of its own."""
    prepare_process(1)
    r = level_run.run_level(origin, neighbour, discard)
    assert r.digest is not None
    run = level_run.LevelRun(spec, level, discard)

    def tune(_: str) -> dict[str, Any]:
        model, normalisation = run.network(), spec.network.normalisation
        base = run.store.get_state(spec.base)
        put_adaptor(model, base, decode(base, run.store.get_state(cast(str, r.digest))))
        images, labels = training_data(spec, level)
        fine_tune(model, images, labels, spec.recipe, normalisation, chosen=r.layers, seed=spec.seed)
        return {"score": evaluate(model, *validation_data(spec, level), normalisation, spec.recipe.precision)}

    score = run.stage("partial", run.key("partial", chosen=r.layers, start=r.digest), tune)["score"]
    original = run.stage("original", run.key("original"), run.judge_original)["score"]
    return Row(
        name, budget, level, spec.seed, score, r.floats, r.bytes, original, None, r.layers, float(spec.recipe.epochs)
    )


@ray.remote(num_cpus=1)
def baseline(spec: JobSpec, making: evaluation.Making, name: str, budget: str) -> Row:
    prepare_process(1)
    weights = evaluation.make_weights(spec, making, discard)
    judged = evaluation.judge(spec, making.level, [None, weights.digest], discard)
    scores = judged[weights.digest].score, judged[None].score
    return Row(name, budget, making.level, making.seed, scores[0], weights.floats, 4 * weights.floats, scores[1], None)


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
        # what lies far below says no more about the others than that
        scores = sorted(row.score for row in mine)
        lowest = max(scores[0], scores[len(scores) // 10] - 3) - 0.5
        axis.set_ylim(lowest, max(scores[-1], *lines.values()) + 1)
        for what, score in lines.items():
            if score < lowest:
                continue
            axis.axhline(score, color="grey", linewidth=0.8, linestyle=":")
            axis.annotate(what, (1, score), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom")
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


def jaccard(row: Row) -> float:
    """Of the layers chosen and those of the first variant under the same budget, level and seed."""
    others = of_first[row.budget, row.level, row.seed]
    return len(others & set(row.layers)) / max(1, len(others | set(row.layers)))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("study", type=Path)
parser.add_argument("--data", help="folder of the data set")
parser.add_argument("--cache", default="~/.cache/gearnn_ray")
parser.add_argument("--store", default="artifacts")
parser.add_argument("--out", type=Path, help="Parquet file of all rows")
parser.add_argument("--figure", type=Path, help="PNG of scores over bytes")
options = parser.parse_args()
study = yaml.safe_load(options.study.read_text())

rows: list[Row] = []
with cluster():
    relay = EventRelay(cast(Any, EventBoard).remote(), discard)
    release = open_release_context(
        Store(options.store), study["release"], ReleaseDataConfig(path=options.data, cache=options.cache), relay
    )
    make_images(release.spec, study["levels"], relay)
    variants: dict[str, JobSpec] = {}
    for name, told in study["variants"].items():
        told = told or {}
        recipe = release.spec.recipe.model_copy(update={**study.get("recipe", {}), **told.get("recipe", {})})
        own = replace(release.spec, recipe=recipe, criterion=Criterion(**told.get("selection", {})))
        epochs = told.get("sensitivity_epochs")
        variants[name] = replace(own, sensitivity_epochs=None if epochs is None else float(epochs))
    running: list[Any] = []
    controls = dict[Any, Any]()  # of each recipe and seed one, for all levels
    begun = dict[tuple[str, str, int], Any]()  # neighbours' adaptors
    for seed, level in itertools.product(range(max(study["budgets"].values())), study["levels"]):
        # what variants share is made once: their tasks wait for it
        shared = defaultdict[Any, list[JobSpec]](list)
        for name, spec in variants.items():
            if "neighbours" in (study["variants"][name] or {}):
                continue
            shared[spec.recipe, spec.sensitivity_epochs].append(replace(spec, seed=seed))
        # weights that any of them looks at again are kept from the start
        sensed = dict[Any, Any]()
        for key, works in shared.items():
            against = next((spec for spec in works if spec.criterion.against == "clean"), None)
            if against and (key, seed) not in controls:
                controls[key, seed] = control.remote(against)
            criteria = [spec.criterion for spec in works]
            sensed[key] = sense.remote(works[0], level, criteria, controls.get((key, seed)))
        for budget in (budget for budget, seeds in study["budgets"].items() if seed < seeds):
            floats = budget_floats(budget, release.facts.floats)
            for name, spec in variants.items():
                own = replace(spec, budget=floats, seed=seed)
                if near := (study["variants"][name] or {}).get("neighbours"):
                    origin = replace(next(iter(variants.values())), budget=floats, seed=seed)
                    if (near[level], budget, seed) not in begun:
                        begun[near[level], budget, seed] = adapt.remote(origin, near[level], name, budget, None)
                    first = begun[near[level], budget, seed]
                    running.append(adapt_neighbours.remote(own, level, origin, near[level], name, budget, first))
                    continue
                running.append(adapt.remote(own, level, name, budget, sensed[spec.recipe, spec.sensitivity_epochs]))
            for name, told in study.get("rivals", {}).items():
                if told["method"] in ("bn-tuned", "bn-statistics") and budget != next(iter(study["budgets"])):
                    continue  # of one size, whatever the budget
                own = replace(release.spec, recipe=release.spec.recipe.model_copy(update=study.get("recipe", {})))
                making = evaluation.Making(
                    told["method"], level, seed=seed, learning_rate=told["learning_rate"],
                    budget=floats if told["method"] in ("auto-rgn", "random", "first-block") else 0,
                    draw=seed if told["method"] == "random" else 0,
                )  # fmt: skip
                running.append(baseline.remote(own, making, name, budget))
    started, left = time.perf_counter(), list(running)
    while left:
        (done,), left = ray.wait(left)
        row = ray.get(done)
        rows.append(row)
        minutes = (time.perf_counter() - started) / 60
        print(f"{minutes:6.1f} min, {len(left):3d} left: {row.variant} {row.budget} {row.level} seed {row.seed}: "
              f"{row.score:.2f} in {row.bytes:,} bytes", flush=True)  # fmt: skip

if options.out:
    pq.write_table(pa.Table.from_pylist([{**asdict(row), "layers": list(row.layers)} for row in rows]), options.out)
names = list(dict.fromkeys((*study["variants"], *study.get("rivals", {}))))
if options.figure:
    options.figure.write_bytes(figure(rows, names, study["levels"], study.get("rivals", {})))
found = defaultdict[tuple[str, str, str], list[Row]](list)
for row in rows:
    found[row.variant, row.budget, row.level].append(row)
first = next(iter(study["variants"]))
of_first = {(row.budget, row.level, row.seed): set(row.layers) for row in rows if row.variant == first}
print("\n" + " ".join([f"{'variant':<28}{'M':>7}{'bytes':>10}", *(f"{level:>20}" for level in study["levels"])]))
for name, budget in itertools.product(names, study["budgets"]):
    cells = [found.get((name, budget, level), []) for level in study["levels"]]
    if not any(cells):
        continue
    texts = [spread({row.seed: row.score for row in cell}) for cell in cells]
    size = fmean(row.bytes for cell in cells for row in cell)
    print(" ".join([f"{name:<28}{budget:>7}{size:>10,.0f}", *(f"{text:>20}" for text in texts)]))

print("\n" + " ".join([f"{'whole network':<45}", *(f"{level:>20}" for level in study["levels"])]))
originals = {row.level: row.original for row in rows}
print(" ".join([f"{'original':<45}", *(f"{originals[level]:>20.2f}" for level in study["levels"])]))
said = set[tuple[str, ...]]()
for name in study["variants"]:
    texts = [
        spread({row.seed: row.full for row in rows if (row.variant, row.level) == (name, level)})
        for level in study["levels"]
    ]
    if tuple(texts) not in said and set(texts) != {"-"}:  # of one recipe they are the same
        print(" ".join([f"{name:<45}", *(f"{text:>20}" for text in texts)]))
    said.add(tuple(texts))

print(
    "\n"
    + " ".join(
        [f"{f'layers in common with {first}':<35}{'epochs':>10}", *(f"{level:>20}" for level in study["levels"])]
    )
)
for name, budget in itertools.product(study["variants"], study["budgets"]):
    cells = [found.get((name, budget, level), []) for level in study["levels"]]
    epochs = fmean(row.epochs for cell in cells for row in cell)
    texts = [f"{fmean(jaccard(row) for row in cell):.2f}" if cell else "-" for cell in cells]
    print(" ".join([f"{name:<28}{budget:>7}{epochs:>10.3g}", *(f"{text:>20}" for text in texts)]))
