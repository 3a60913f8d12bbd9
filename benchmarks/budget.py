"""What a byte buys: every variant of selection and recipe, and rivals of equal size, under every budget, seed by seed.

    uv run benchmarks/budget.py docs/results/budget.yaml --data CAMVID --store artifacts --out budget.parquet

The file names a release, levels, budgets with how many seeds each gets, variants (each with `selection`, `recipe` and
`sensitivity_epochs` where they differ from the release's) and rivals (methods of an evaluation, each with its learning rate). One
task per fine-tune on Ray; what the store has is not made again, so that the same command goes on after a crash. Prints mean ±
standard deviation over seeds.
"""

import argparse
import itertools
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import yaml

from gearnn_ray.cluster import Board, Relay, cluster, mute
from gearnn_ray.config import ReleaseDataConfig, budget_floats
from gearnn_ray.evaluation import stages as evaluation
from gearnn_ray.offline import stages
from gearnn_ray.offline.finetune import prepare_process
from gearnn_ray.offline.recipe import Criterion
from gearnn_ray.offline.reopen import make_images, reopen
from gearnn_ray.offline.stages import Work
from gearnn_ray.store import Store


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


@ray.remote(num_cpus=1)
def sense(work: Work, level: str, criteria: list[Criterion]) -> None:
    prepare_process(1)
    stages.sense_level(work, level, criteria, mute)


@ray.remote(num_cpus=1)
def adapt(work: Work, level: str, name: str, budget: str, sensed: Any) -> Row:
    prepare_process(1)
    r = stages.run_level(work, level, mute)
    assert r.adaptor is not None
    return Row(name, budget, level, work.seed, r.adaptor, r.floats, r.bytes, r.original, r.full)


@ray.remote(num_cpus=1)
def rival(work: Work, making: evaluation.Making, name: str, budget: str) -> Row:
    prepare_process(1)
    weights = evaluation.make_weights(work, making, mute)
    judged = evaluation.judge(work, making.level, [None, weights.digest], mute)
    scores = judged[weights.digest].score, judged[None].score
    return Row(name, budget, making.level, making.seed, scores[0], weights.floats, 4 * weights.floats, scores[1], None)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("study", type=Path)
parser.add_argument("--data", help="folder of the data set")
parser.add_argument("--cache", default="~/.cache/gearnn_ray")
parser.add_argument("--store", default="artifacts")
parser.add_argument("--out", type=Path, help="Parquet file of all rows")
options = parser.parse_args()
study = yaml.safe_load(options.study.read_text())

rows: list[Row] = []
with cluster():
    relay = Relay(cast(Any, Board).remote(), mute)
    release = reopen(
        Store(options.store), study["release"], ReleaseDataConfig(path=options.data, cache=options.cache), relay
    )
    make_images(release.work, study["levels"], relay)
    variants: dict[str, Work] = {}
    for name, told in study["variants"].items():
        told = told or {}
        recipe = release.work.recipe.model_copy(update={**study.get("recipe", {}), **told.get("recipe", {})})
        own = replace(release.work, recipe=recipe, criterion=Criterion(**told.get("selection", {})))
        epochs = told.get("sensitivity_epochs")
        variants[name] = replace(own, sensitivity_epochs=None if epochs is None else float(epochs))
    running: list[Any] = []
    for seed, level in itertools.product(range(max(study["budgets"].values())), study["levels"]):
        # what variants share is made once: their tasks wait for it
        shared = defaultdict[Any, list[Work]](list)
        for work in variants.values():
            shared[work.recipe, work.sensitivity_epochs].append(replace(work, seed=seed))
        # weights that any of them looks at again are kept from the start
        sensed = dict[Any, Any]()
        for key, works in shared.items():
            sensed[key] = sense.remote(works[0], level, [work.criterion for work in works])
        for budget in (budget for budget, seeds in study["budgets"].items() if seed < seeds):
            floats = budget_floats(budget, release.facts.floats)
            for name, work in variants.items():
                own = replace(work, budget=floats, seed=seed)
                running.append(adapt.remote(own, level, name, budget, sensed[work.recipe, work.sensitivity_epochs]))
            for name, told in study.get("rivals", {}).items():
                if told["method"] in ("bn-tuned", "bn-statistics") and budget != next(iter(study["budgets"])):
                    continue  # of one size, whatever the budget
                own = replace(release.work, recipe=release.work.recipe.model_copy(update=study.get("recipe", {})))
                making = evaluation.Making(
                    told["method"], level, seed=seed, learning_rate=told["learning_rate"],
                    budget=floats if told["method"] in ("auto-rgn", "random", "first-block") else 0,
                    draw=seed if told["method"] == "random" else 0,
                )  # fmt: skip
                running.append(rival.remote(own, making, name, budget))
    started, left = time.perf_counter(), list(running)
    while left:
        (done,), left = ray.wait(left)
        row = ray.get(done)
        rows.append(row)
        minutes = (time.perf_counter() - started) / 60
        print(f"{minutes:6.1f} min, {len(left):3d} left: {row.variant} {row.budget} {row.level} seed {row.seed}: "
              f"{row.score:.2f} in {row.bytes:,} bytes", flush=True)  # fmt: skip

if options.out:
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows]), options.out)
found = defaultdict[tuple[str, str, str], list[Row]](list)
for row in rows:
    found[row.variant, row.budget, row.level].append(row)
names = list(dict.fromkeys((*study["variants"], *study.get("rivals", {}))))
print("\n" + " ".join([f"{'variant':<22}{'M':>7}{'bytes':>10}", *(f"{level:>16}" for level in study["levels"])]))
for name, budget in itertools.product(names, study["budgets"]):
    cells = [found.get((name, budget, level), []) for level in study["levels"]]
    if not any(cells):
        continue
    texts = [
        (f"{fmean(s):.2f}" + (f" ± {stdev(s):.2f}" if len(s) > 1 else ""))
        if (s := [row.score for row in cell])
        else "-"
        for cell in cells
    ]
    size = fmean(row.bytes for cell in cells for row in cell)
    print(" ".join([f"{name:<22}{budget:>7}{size:>10,.0f}", *(f"{text:>16}" for text in texts)]))
