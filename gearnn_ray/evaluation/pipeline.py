"""An evaluation on a Ray cluster.

    release ─► originals judged ─► learning rates ─► weights of every method ─► each level judged in one pass ─► tables, report

Every set of weights is one task, every level's judging another that waits for the weights it needs and for no others. What
survives a killed task or driver is what the stages put into the store.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import ray

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.schema import EvaluateConfig, ResourcesConfig, budget_floats
from gearnn_ray.core.errors import UserError
from gearnn_ray.evaluation import baselines, runs, statistics
from gearnn_ray.evaluation.baselines import CONSTANT, TITLES
from gearnn_ray.evaluation.findings import Cell, Found, Outcome, Plan, publish
from gearnn_ray.evaluation.runs import Judged, Main, Making, Picture, Weights
from gearnn_ray.levels.level import parse_level
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.release_context import make_images, open_release_context
from gearnn_ray.ray_jobs.cluster import (
    POLL_SECONDS,
    EventBoard,
    EventRelay,
    beside_driver,
    cluster,
    cluster_resources,
    event_sender,
    reason_of,
    result_of,
)
from gearnn_ray.ray_jobs.resources import check_resources
from gearnn_ray.reporting.progress import Reporter
from gearnn_ray.store.releases import Store
from gearnn_ray.training.trainer import prepare_process

_MAIN = ("switching", "gearnn")
_PICTURED = 3  # levels, the worst ones
_ALL = "all"
"""where a constant network belongs"""

# what things cost, in full fine-tunes; it only steers the remaining time
_COST = {"main": 1.65, "stability": 2.0, "bn-statistics": 0.2, "judged": 0.11}


def evaluate(config: EvaluateConfig, emit: Reporter, command: str) -> Outcome:
    """Run the job. Raises UserError before anything is trained or written when what it was told is wrong."""
    store = Store(config.store)
    store.manifest(config.release)  # there is one, or nothing is started
    store.check_writable()
    with cluster():
        check_resources(ResourcesConfig(**config.resources.model_dump()), *cluster_resources())
        board = cast(Any, EventBoard).options(scheduling_strategy=beside_driver()).remote()
        relay = EventRelay(board, emit)
        plan = _checked(config, store, relay)
        found = _Run(config, plan, board, relay, emit).all()
        relay.flush()
    return publish(store, config, plan, found, command)


# ── what is checked before anything is trained ───────────────────────────────────────────────────────────────────


def _checked(config: EvaluateConfig, store: Store, relay: EventRelay) -> Plan:
    """Release, data, network, levels: looked at, and every level's images made. Raises UserError."""
    release = open_release_context(store, config.release, config.data, relay)
    manifest, facts, spec = release.manifest, release.facts, release.spec
    levels = config.levels or release.levels
    foreign = [name for name in (*config.baseline_levels, *config.untrained, *config.budget_levels, *config.frequency_levels)
               if name not in levels]  # fmt: skip
    if config.tuning_level is not None and config.tuning_level not in levels:
        foreign.append(config.tuning_level)
    adapted = {
        "tuning_level": (config.tuning_level,),
        "budget_levels": config.budget_levels,
        "frequency_levels": config.frequency_levels,
    }
    undistorted = next((option for option, names in adapted.items() if "clean" in names), None)
    if undistorted is not None:
        raise UserError(f"{undistorted} has clean, where nothing is adapted: name a distorted level")
    if foreign:
        raise UserError(
            f"the level {foreign[0]} is not among the levels evaluated ({', '.join(levels)}): add it to levels"
        )
    trained = [name for name in levels if name not in config.untrained]
    between = {name: baselines.neighbours(name, trained) for name in config.untrained}
    for name, sides in between.items():
        if sides is None:
            raise UserError(
                f"the untrained level {name} does not lie between two other levels of its kind: add them to levels"
            )
    if not any(not parse_level(name).is_clean for name in levels):
        raise UserError(f"{config.release} has no distorted level to evaluate: name some with --levels")
    # another budget of one level's own is no part of a problem of all levels together
    asked = () if spec.coupling.is_joint else config.budgets
    budgets = tuple(dict.fromkeys(budget_floats(text, facts.floats) for text in asked))
    small = next((m for m in budgets if m < facts.least(spec.criterion)), None)
    if small is not None:
        raise UserError(
            f"a budget of {small} floats fits no layer: the smallest of {spec.network.name} has {facts.smallest_layer}, so give "
            "larger budgets"
        )
    if len(config.learning_rates) > 1 and len(spec.data.train) < 2:
        raise UserError("learning rates are chosen on held-back training images, and there is only one: give no grid")
    make_images(spec, levels, relay)
    spec = replace(spec, budget=_budget_of_each(spec, release.levels))
    return Plan(
        name=release.name,
        release=release.digest,
        manifest=manifest,
        spec=spec,
        model_floats=facts.floats,
        levels=levels,
        baseline_levels=config.baseline_levels,
        untrained={name: sides for name, sides in between.items() if sides is not None},
        budgets=tuple(m for m in budgets if m != spec.budget),
    )


def _budget_of_each(spec: JobSpec, released: Sequence[str]) -> int:
    """M in floats of one level's adaptor, which rivals get; where all levels have one memory, an equal part of it."""
    sharing = sum(not parse_level(name).is_clean for name in released)
    return spec.budget // max(1, sharing) if spec.coupling.problem == "one-memory" else spec.budget


def _worst_of_each_axis(levels: Sequence[str], worst: Sequence[str]) -> tuple[str, ...]:
    """The level of each axis that comes first in `worst`, in the order of `levels`."""
    taken = {next((name for name in worst if name in members), None) for members in baselines.axes_of(levels).values()}
    return tuple(name for name in levels if name in taken)


# ── what workers do ──────────────────────────────────────────────────────────────────────────────────────────────


@ray.remote
def _do(function: Callable[..., Any], arguments: Sequence[Any], spec: JobSpec, threads: int, board: Any) -> Any:
    """`function(work, *arguments, say)` in a worker."""
    prepare_process(threads)
    with event_sender(board) as emit:
        return function(spec, *arguments, emit)


def _main(
    spec: JobSpec, full: Recipe, adaptor: Recipe, level: str, seed: int, budgets: Sequence[int], label: str, emit: Any
) -> Main:
    own = replace(spec, seed=seed, keep_full=True)
    return runs.make_main(
        replace(own, recipe=full), replace(own, recipe=adaptor), level, (spec.budget, *budgets), emit, label
    )


def _released(
    spec: JobSpec, full: Recipe, level: str, seed: int, entry: Mapping[str, Any] | None, label: str, emit: Any
) -> Main:
    return runs.released_main(replace(spec, seed=seed, keep_full=True, recipe=full), level, entry, emit, label)


def _control(spec: JobSpec, full: Recipe, seed: int, emit: Any) -> None:
    runs.make_control(replace(spec, seed=seed, keep_full=True, recipe=full), emit)


def _judge_original(spec: JobSpec, level: str, emit: Any) -> dict[str | None, Judged]:
    return runs.judge(spec, level, [None], lambda event: emit(replace(event, stage="original")))


def _mix(spec: JobSpec, lower: Weights, upper: Weights, share: float, emit: Any) -> Weights:
    del emit
    return runs.mix_adaptors(spec, lower, upper, share)


def _see(spec: JobSpec, level: str, weights: Weights, original: Judged, adaptor: Judged, emit: Any) -> Picture:
    del emit
    return runs.see(spec, level, weights, original, adaptor)


def _compare(
    spec: JobSpec, judged: Mapping[tuple[str, str], Sequence[Judged]], axes: Mapping[str, Sequence[str]], emit: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of DIFFERENCES and AVERAGES."""
    del emit
    counts = {place: [runs.counts_of(spec, each) for each in cells] for place, cells in judged.items()}
    return statistics.differences(counts), statistics.averages(counts, axes)


@dataclass(frozen=True)
class _Unit:
    """Weights to be made by one task, and the cells they fill once they are there."""

    label: str
    levels: tuple[str, ...]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    cells: Callable[[Any], Sequence[Cell]]


class _Run:
    """The tasks of one evaluation, in the order in which each can start."""

    def __init__(self, config: EvaluateConfig, plan: Plan, board: Any, relay: EventRelay, emit: Reporter) -> None:
        self.config, self.plan, self.relay, self.emit = config, plan, relay, emit
        self.found = Found()
        self._board = board
        self._shared = ray.put(plan.spec)
        self._threads = max(1, int(config.resources.cpus))
        self._running: dict[Any, tuple[str, Callable[[Any], None]]] = {}
        resources = config.resources
        self._task = _do.options(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=resources.retries)
        # of each level: what its judging waits for, and what is to be judged
        self._waiting: dict[str, set[str]] = {level: set() for level in plan.levels}
        self._cells: dict[str, list[Cell]] = {level: [] for level in plan.levels}

    def all(self) -> Found:
        """Everything, in waves that only wait for what they need."""
        scores = self._judge_originals()
        if not scores:
            raise UserError(f"the original cannot be judged at any level: {next(iter(self.found.failed.values()))}")
        worst = sorted(scores, key=scores.__getitem__)
        if not self.plan.baseline_levels:
            self.plan = replace(self.plan, baseline_levels=_worst_of_each_axis(self.plan.levels, worst))
        self.found.tuning_level = self.config.tuning_level or worst[0]
        self._tune()
        if self.plan.spec.criterion.against == "clean" and not self.plan.spec.coupling.is_joint:
            self._make_controls()
        self._make_and_judge()
        self._look_closer()
        return self.found

    def start(self, label: str, function: Callable[..., Any], *arguments: Any, then: Callable[[Any], None]) -> None:
        """One task; `then` gets its result here in the driver, None where it failed, which is noted under `label`."""
        ref = self._task.remote(function, arguments, self._shared, self._threads, self._board)
        self._running[ref] = (label, then)

    def settle(self) -> None:
        """Until nothing is running."""
        while self._running:
            done, _ = ray.wait(list(self._running), timeout=POLL_SECONDS)
            self.relay.flush()
            for ref in done:
                label, then = self._running.pop(ref)
                try:
                    result = result_of(ref)
                except Exception as error:
                    self.found.failed[label] = reason_of(error)
                    result = None
                then(result)

    # ── the originals, and learning rates

    def _judge_originals(self) -> dict[str, float]:
        """What the original scores at every distorted level."""
        scores: dict[str, float] = {}
        distorted = [level for level in self.plan.levels if not parse_level(level).is_clean]
        self.emit.expect({(level, "original"): _COST["judged"] for level in distorted})

        def note(level: str, judged: Any) -> None:
            if judged is not None:
                scores[level] = judged[None].score

        for level in distorted:
            self.start(f"{level} original", _judge_original, level, then=partial(note, level))
        self.settle()
        return scores

    def _tune(self) -> None:
        """Each method's learning rate: the one of the grid with the best score on held-back training images."""
        plan, grid, found, level = self.plan, self.config.learning_rates, self.found, self.found.tuning_level
        trained = [m for m in (*_MAIN, *self.config.methods) if m != "bn-statistics"]
        if plan.spec.coupling.is_joint:
            # as released, its adaptors have the learning rate that they have
            trained.remove("gearnn")
            found.rates["gearnn"] = plan.spec.recipe.learning_rate
        if len(grid) <= 1:
            found.rates |= dict.fromkeys(trained, *(grid or (plan.spec.recipe.learning_rate,)))
            return
        scores: dict[str, dict[float, float]] = {method: {} for method in trained}

        def note(method: str, rate: float, score: Any) -> None:
            scores[method][rate] = score

        def try_rates(method: str, layers: Any = ()) -> None:
            for rate in grid if layers is not None else ():
                making = replace(self._making(method, level), learning_rate=rate, layers=tuple(layers))
                label = f"learning rate {rate:g} of {method}"
                self.start(label, runs.tune, making, level, then=partial(note, method, rate))

        self.emit.expect(
            {
                (making.level, f"tuning: {making.label} at {rate:g}"): 0.8 * _COST.get(method, 1.0)
                for method, making in ((method, self._making(method, level)) for method in trained)
                for rate in grid
            }
        )
        for method in trained:
            if method != "gearnn":
                try_rates(method)
            elif level in plan.manifest["levels"]:
                try_rates(method, plan.manifest["levels"][level]["layers"])
            else:
                self.start(f"{level} layers", runs.choose_layers, level, then=partial(try_rates, method))
        self.settle()
        for method, tried in scores.items():
            if len(tried) < len(grid) or None in tried.values():
                # a task failed, and is tried again by the next run: this one leaves a rival out, and what is evaluated untuned
                if method in _MAIN:
                    found.rates[method] = plan.spec.recipe.learning_rate
                continue
            # in the grid's order, not that in which tasks ended
            best = max(sorted(tried), key=tried.__getitem__)
            found.rates[method] = best
            found.tuning += [
                {
                    "method": method, "level": level, "learning_rate": rate, "alpha": None, "sigma": None,
                    # what diverged has no score
                    "value": score if score > float("-inf") else None, "chosen": rate == best,
                }
                for rate, score in sorted(tried.items())
            ]  # fmt: skip

    def _making(self, method: str, level: str, draw: int = 0) -> Making:
        plan, grid = self.plan, self.config.stability
        making = Making(
            method,
            _ALL if method in CONSTANT else level,
            seed=plan.spec.seed,
            draw=draw,
            learning_rate=self.found.rates.get(method, 0.0),
        )
        if method == "mixed":
            return replace(making, levels=plan.levels)
        if method == "stability":
            # where its learning rate is chosen: the middle of the grid
            return replace(making, alpha=grid.alphas[len(grid.alphas) // 2], sigma=grid.sigmas[len(grid.sigmas) // 2])
        return replace(making, budget=plan.spec.budget) if method in ("first-block", "auto-rgn", "random") else making

    # ── weights and judging

    def _make_controls(self) -> None:
        """What the levels' changes are measured against, before tasks of several levels would each make it."""
        full = self.plan.spec.recipe.model_copy(update={"learning_rate": self.found.rates["switching"]})
        seeds = dict.fromkeys(seed for level in self.plan.levels for seed in self.plan.seeds(self.config.seeds, level))
        self.emit.expect({("clean", "full"): 1.0 * len(seeds)})
        for seed in seeds:
            self.start(f"clean seed {seed}", _control, full, seed, then=lambda _: None)
        self.settle()

    def _make_and_judge(self) -> None:
        units = [*self._constant_units(), *self._units_per_level()]
        for unit in units:
            for level in unit.levels:
                self._waiting[level].add(unit.label)
        for level in self.plan.untrained:
            self._waiting[level].add("its neighbours")
        for level in self.plan.levels:
            self._cells[level].append(Cell("original", level, self.plan.spec.seed, Weights()))
            if parse_level(level).is_clean:
                # undistorted, every method with weights per level is the base itself
                adaptive = (*_MAIN, *(method for method in self.config.methods if method not in CONSTANT))
                self._cells[level] += [Cell(method, level, self.plan.spec.seed, Weights()) for method in adaptive]
        self.emit.expect(
            {(level, "judging"): _COST["judged"] * (1 + len(units)) for level, units in self._waiting.items()}
        )
        for unit in units:
            self.start(unit.label, unit.function, *unit.arguments, then=partial(self._made, unit))
        for level in [level for level, units in self._waiting.items() if not units]:
            self._judge(level)
        self.settle()

    def _constant_units(self) -> Iterator[_Unit]:
        """One network for all levels, each; judged at the rivals' levels and undistorted."""
        grid, plan = self.config.stability, self.plan
        levels = tuple(level for level in plan.levels if level in plan.baseline_levels or parse_level(level).is_clean)
        for method in self.config.methods:
            if method not in CONSTANT or method not in self.found.rates:
                continue
            making = self._making(method, _ALL)
            if method == "stability":
                for alpha, sigma in itertools.product(grid.alphas, grid.sigmas):
                    yield self._baseline_unit(replace(making, alpha=alpha, sigma=sigma), levels)
            else:
                yield self._baseline_unit(making, levels)

    def _units_per_level(self) -> Iterator[_Unit]:
        """Rivals' levels first, in the order given: that is where comparisons become complete."""
        plan, rates = self.plan, self.found.rates
        baselines = [method for method in self.config.methods if method in rates or method == "bn-statistics"]
        for level in dict.fromkeys((*plan.baseline_levels, *plan.levels)):
            if parse_level(level).is_clean:
                continue
            for seed in plan.seeds(self.config.seeds, level):
                yield self._main_unit(level, seed)
            for method in baselines if level in plan.baseline_levels else ():
                draws = range(self.config.draws if method == "random" else 1)
                for draw in draws if method not in CONSTANT else ():
                    yield self._baseline_unit(self._making(method, level, draw), (level,))

    def _baseline_unit(self, making: Making, levels: tuple[str, ...]) -> _Unit:
        def cells(weights: Weights) -> Sequence[Cell]:
            # of random layers each draw is one of several, as a seed is of others
            seed = making.draw if making.method == "random" else making.seed
            about = (seed, weights, making.alpha, making.sigma)
            return [Cell(making.method, level, *about) for level in levels]

        self.emit.expect({(making.level, making.label): _COST.get(making.method, 0.65)})
        label = making.label if making.level == _ALL else f"{making.level} {making.label}"
        return _Unit(label, levels, runs.make_weights, (making,), cells)

    def _main_unit(self, level: str, seed: int) -> _Unit:
        plan, found, first = self.plan, self.found, seed == self.plan.spec.seed
        full, adaptor = (plan.spec.recipe.model_copy(update={"learning_rate": found.rates[m]}) for m in _MAIN)
        further = plan.budgets if first and level in (self.config.budget_levels or (found.tuning_level,)) else ()
        suffix, entry = "" if first else f" seed {seed}", plan.manifest["levels"].get(level)

        def cells(main: Main) -> Sequence[Cell]:
            found.mains[level, seed] = main
            made = [Cell("switching", level, seed, main.switching)]
            for budget, weights in main.gearnn.items():
                own = budget == plan.spec.budget
                made.append(Cell("gearnn", level, seed, weights, budget=None if own else budget))
            if first and entry is not None and entry["digest"] != main.gearnn[plan.spec.budget].digest:
                made.append(Cell("gearnn-released", level, seed, Weights(entry["digest"], entry["floats"])))
            return made

        name = f"{level} switching and gearnn{suffix}"
        self.emit.expect({(level, f"switching{suffix}"): 1.0})
        if plan.spec.coupling.is_joint and entry is not None:
            released = (full, level, seed, entry if first else None, suffix)
            return _Unit(name, (level,), _released, released, cells)
        self.emit.expect({(level, f"gearnn{suffix}"): 0.65 * (1 + len(further))})
        return _Unit(name, (level,), _main, (full, adaptor, level, seed, further, suffix), cells)

    def _made(self, unit: _Unit, result: Any) -> None:
        """A unit has ended: its cells wait for their level's judging."""
        for cell in unit.cells(result) if result is not None else ():
            self._cells[cell.level].append(cell)
        self._ended(unit.label, unit.levels)
        for level, sides in self.plan.untrained.items():
            both = {f"{side} switching and gearnn" for side in (sides.lower, sides.upper)}
            if unit.label in both and not any(both & self._waiting[side] for side in (sides.lower, sides.upper)):
                self._between(level, sides)

    def _ended(self, label: str, levels: Sequence[str]) -> None:
        """What a judging waited for is there, or will never be: where it was the last, the level is judged."""
        for level in levels:
            self._waiting[level].discard(label)
            if not self._waiting[level]:
                self._judge(level)

    def _between(self, level: str, sides: baselines.Neighbours) -> None:
        """An untrained level by its neighbours' adaptors, once both have ended."""
        spec = self.plan.spec
        lower, upper = (self.found.mains.get((name, spec.seed)) for name in (sides.lower, sides.upper))
        if lower is None or upper is None:
            self.found.failed[f"{level} by its neighbours"] = f"{sides.lower} and {sides.upper} are not both there"
            self._ended("its neighbours", [level])
            return
        adaptors = [main.gearnn[spec.budget] for main in (lower, upper)]
        self._cells[level].append(Cell("gearnn-nearest", level, spec.seed, adaptors[sides.nearest == sides.upper]))

        def mixed(weights: Weights | None) -> None:
            if weights is not None:
                self._cells[level].append(Cell("gearnn-interpolated", level, spec.seed, weights))
            self._ended("its neighbours", [level])

        self.start(f"{level} interpolated adaptors", _mix, *adaptors, sides.share, then=mixed)

    def _judge(self, level: str) -> None:
        cells = self._cells[level]

        def judged(results: Any) -> None:
            if results is not None:
                self.found.cells += [(cell, results[cell.weights.digest]) for cell in cells]

        digests = list(dict.fromkeys(cell.weights.digest for cell in cells))
        self.start(f"{level} judging", runs.judge, level, digests, then=judged)

    # ── what is made of it

    def _look_closer(self) -> None:
        found, spec = self.found, self.plan.spec
        found.put_in_order(self.plan.levels)
        found.choose_stability()

        def compared(rows: Any) -> None:
            if rows is not None:
                found.differences, found.averages = rows

        self.start("the comparison", _compare, found.judged(), baselines.axes_of(self.plan.levels), then=compared)

        def responded(network: str, level: str, response: Any) -> None:
            found.frequency += [
                {"network": network, "level": level, "vertical": v, "horizontal": h, "magnitude": magnitude}
                for v, row in enumerate(response or ())
                for h, magnitude in enumerate(row)
            ]

        for level in self.config.frequency_levels or (found.tuning_level,):
            main = found.mains.get((level, spec.seed))
            if main is None:
                continue
            networks = {"original": Weights(), "switching": main.switching, "gearnn": main.gearnn[spec.budget]}
            for network, weights in networks.items():
                label = f"frequency response: {network}"
                self.emit.expect({(level, label): 0.3})
                then = partial(responded, network, level)
                self.start(f"{level} {label}", runs.frequency, level, weights, network, then=then)

        def seen(picture: Picture | None) -> None:
            if picture is not None:
                found.pictures.append(picture)

        worst = found.worst_levels(spec.seed)[:_PICTURED]
        for level in worst:
            weights = found.mains[level, spec.seed].gearnn[spec.budget]
            self.start(f"{level} picture", _see, level, weights, *found.pair(level, spec.seed), then=seen)
        self.settle()
        found.pictures.sort(key=lambda picture: worst.index(picture.level))
        found.frequency.sort(key=lambda row: (row["level"], list(TITLES).index(row["network"])))
