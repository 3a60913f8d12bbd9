"""An evaluation on a Ray cluster.

    release ─► originals' scores ─► learning rates ─► weights of every method ─► each level evaluated in one pass ─► report

Every set of weights is one task. Evaluating a level is another task, which waits for the weights it needs and for no others.
What survives a killed task or driver is what the stages put into the store.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.release_jobs import EvaluateConfig
from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Emit
from gearnn_ray.evaluation import measurements, runs, statistics
from gearnn_ray.evaluation.baselines import CONSTANT
from gearnn_ray.evaluation.findings import Cell, Found, Outcome, publish
from gearnn_ray.evaluation.plan import Plan, check_levels, plan_of, worst_of_each_axis
from gearnn_ray.evaluation.records import (
    AverageRow,
    DifferenceRow,
    Evaluated,
    FrequencyResult,
    MainWeights,
    Picture,
    Source,
    Weights,
)
from gearnn_ray.evaluation.runs import WeightsSpec
from gearnn_ray.levels.axes import Neighbours, axes_of, properties_of
from gearnn_ray.levels.level import parse_level
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.level_run import fine_tune_fully
from gearnn_ray.offline.pipeline import prepare_images
from gearnn_ray.offline.release_context import open_release_context
from gearnn_ray.ray_jobs.run_tasks import TaskRunner, job_tasks
from gearnn_ray.reporting.progress import Reporter
from gearnn_ray.store.leases import HeldLease, lease_key, run_leased
from gearnn_ray.store.manifest import LevelEntry
from gearnn_ray.store.patience import patient
from gearnn_ray.store.releases import Store

_MAIN = ("switching", "gearnn")
_PICTURED = 3  # levels, those where the original is worst
_ALL = "all"
"""The level of one network for all levels."""

_COST = {"stability": 2.0, "bn-statistics": 0.2, "evaluation": 0.11, "adaptor": 0.65}
"""In full fine-tunes; only the estimate of the remaining time uses it. "adaptor" is any partial fine-tune."""


def evaluate(config: EvaluateConfig, emit: Reporter, command: str) -> Outcome:
    """Run the job. Raises UserError before anything is trained or written when the configuration is invalid."""
    store = Store(patient(config.store))
    check_levels(config, store.manifest(config.release)[1])
    store.check_writable()
    key = lease_key("evaluate", config.model_dump(mode="json", exclude={"store"}))
    return run_leased(store.uri, key, emit, lambda lease: _evaluate(config, store, lease, emit, command))


def _evaluate(config: EvaluateConfig, store: Store, lease: HeldLease, emit: Reporter, command: str) -> Outcome:
    with job_tasks(ResourcesConfig(**config.resources.model_dump()), emit, lease.check) as tasks:
        plan = plan_of(config, open_release_context(store, config, tasks))
        spec, levels = plan.spec, tuple(dict.fromkeys((*plan.levels, "clean")))
        prepare_images(spec.data, spec.network.task, levels, spec.cache, tasks, emit)
        plan, found = _Run(plan, tasks, emit).all()
    lease.confirm()
    return publish(store, plan, found, command)


def _with_recipe(spec: JobSpec, recipe: Recipe, seed: int) -> JobSpec:
    """The job spec of a full fine-tune whose weights are kept."""
    return replace(spec, recipe=recipe, seed=seed, keep_full=True)


def _main(
    spec: JobSpec, full: Recipe, adaptor: Recipe, level: str, seed: int, budgets: Sequence[int], label: str, emit: Emit
) -> MainWeights:
    step_1, step_4 = (_with_recipe(spec, recipe, seed) for recipe in (full, adaptor))
    return runs.make_main(step_1, step_4, level, (spec.budget, *budgets), emit, label)


def _released(
    spec: JobSpec, full: Recipe, level: str, seed: int, entry: LevelEntry | None, label: str, emit: Emit
) -> MainWeights:
    return runs.released_main(_with_recipe(spec, full, seed), level, entry, emit, label)


def _control(spec: JobSpec, full: Recipe, seed: int, emit: Emit) -> None:
    fine_tune_fully(_with_recipe(spec, full, seed), "clean", emit)


def _evaluate_original(spec: JobSpec, level: str, emit: Emit) -> float:
    return measurements.evaluate_weights(spec, level, [None], runs.renamed(emit, lambda _: "original"))[None].score


def _evaluate_scaled(spec: JobSpec, level: str, emit: Emit) -> Evaluated | None:
    return measurements.evaluate_scaled(spec, level, emit)


def _mix(spec: JobSpec, lower: Weights, upper: Weights, share: float, emit: Emit) -> Weights:
    del emit
    return runs.mix_adaptors(spec, lower, upper, share)


def _picture(spec: JobSpec, level: str, weights: Weights, original: Evaluated, adaptor: Evaluated, emit: Emit) -> Picture:
    del emit
    return measurements.picture_of(spec, level, weights, original, adaptor)


def _compare(
    spec: JobSpec, evaluated: Mapping[tuple[str, str], Sequence[Evaluated]], axes: Mapping[str, Sequence[str]], emit: Emit
) -> tuple[list[DifferenceRow], list[AverageRow]]:
    del emit
    cells = {place: [measurements.evidence_of(spec, each) for each in seeds] for place, seeds in evaluated.items()}
    return statistics.compare(spec.task, cells, axes)


@dataclass(frozen=True)
class _Unit:
    """Weights that one task makes, and the cells of the result."""

    label: str
    levels: tuple[str, ...]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    cells: Callable[[Any], Sequence[Cell]]


class _Run:
    """The tasks of one evaluation, each started as soon as what it needs is there."""

    def __init__(self, plan: Plan, tasks: TaskRunner, emit: Reporter) -> None:
        self.plan, self.config, self.tasks, self.emit = plan, plan.config, tasks, emit
        self.found = Found(failed=tasks.failed)
        self._shared = tasks.share(plan.spec)
        # of each level: the labels of what its evaluation waits for, and what is to be evaluated
        self._waiting: dict[str, set[str]] = {level: set() for level in plan.levels}
        self._cells: dict[str, list[Cell]] = {level: [] for level in plan.levels}

    def all(self) -> tuple[Plan, Found]:
        """Run everything. Returns the plan with the baselines' levels chosen, and what was found."""
        scores = self._evaluate_originals()
        if not scores:
            raise UserError(f"the original cannot be evaluated at any level: {next(iter(self.tasks.failed.values()))}")
        worst = sorted(scores, key=scores.__getitem__)
        if not self.plan.baseline_levels:
            self.plan = replace(self.plan, baseline_levels=worst_of_each_axis(self.plan.levels, worst))
        self.found.tuning_level = self.config.tuning_level or worst[0]
        self._tune()
        if self.plan.spec.criterion.against == "clean" and not self.plan.is_joint:
            self._make_controls()
        self._make_and_evaluate()
        self._look_closer()
        return self.plan, self.found

    def _start(self, label: str, function: Callable[..., Any], *arguments: Any, then: Callable[[Any], None]) -> None:
        self.tasks.start(label, function, self._shared, *arguments, then=then)

    def _evaluate_originals(self) -> dict[str, float]:
        """Distorted level to the original's score."""
        scores: dict[str, float] = {}
        distorted = [level for level in self.plan.levels if not parse_level(level).is_clean]
        self.emit.expect({(level, "original"): _COST["evaluation"] for level in distorted})

        def note(level: str, score: float | None) -> None:
            if score is not None:
                scores[level] = score

        for level in distorted:
            self._start(f"{level} original", _evaluate_original, level, then=partial(note, level))
        self.tasks.settle()
        # in the order of levels, not in that in which tasks ended
        return {level: scores[level] for level in distorted if level in scores}

    def _tune(self) -> None:
        """Each method's learning rate: the one of the grid with the best score on held-back training images."""
        plan, grid, found, level = self.plan, self.config.learning_rates, self.found, self.found.tuning_level
        trained = [m for m in (*_MAIN, *self.config.methods) if m != "bn-statistics"]
        if plan.is_joint:
            # its adaptors are the released ones
            trained.remove("gearnn")
            found.rates["gearnn"] = plan.spec.recipe.learning_rate
        if len(grid) <= 1:
            found.rates |= dict.fromkeys(trained, *(grid or (plan.spec.recipe.learning_rate,)))
            return
        scores: dict[str, dict[float, float | None]] = {method: {} for method in trained}

        def note(method: str, rate: float, score: float | None) -> None:
            scores[method][rate] = score

        def try_rates(method: str, layers: Sequence[str] | None = ()) -> None:
            for rate in grid if layers is not None else ():
                wanted = replace(self._wanted(method, level), learning_rate=rate, layers=tuple(layers or ()))
                label = f"learning rate {rate:g} of {method}"
                self._start(label, runs.tune, wanted, level, then=partial(note, method, rate))

        self.emit.expect(
            {
                (wanted.level, f"tuning: {wanted.label} at {rate:g}"): 0.8 * _COST.get(wanted.method, 1.0)
                for wanted in (self._wanted(method, level) for method in trained)
                for rate in grid
            }
        )
        for method in trained:
            if method != "gearnn":
                try_rates(method)
            elif level in plan.entries:
                try_rates(method, plan.entries[level].layers)
            else:
                self._start(f"{level} layers", runs.choose_layers, level, then=partial(try_rates, method))
        self.tasks.settle()
        for method, tried in scores.items():
            known = {rate: score for rate, score in sorted(tried.items()) if score is not None}
            if len(known) < len(grid):
                # a task failed, and the next run repeats it: this run leaves the baseline out, and does not tune a main method
                if method in _MAIN:
                    found.rates[method] = plan.spec.recipe.learning_rate
                continue
            found.rates[method] = best = max(known, key=known.__getitem__)
            found.tuning += [
                {
                    "method": method, "level": level, "learning_rate": rate, "alpha": None, "sigma": None,
                    # no score where training diverged
                    "value": score if score > float("-inf") else None, "chosen": rate == best,
                }
                for rate, score in known.items()
            ]  # fmt: skip

    def _wanted(self, method: str, level: str, draw: int = 0) -> WeightsSpec:
        plan, grid = self.plan, self.config.stability
        rate = self.found.rates.get(method, 0.0)
        wanted = WeightsSpec(method, _ALL if method in CONSTANT else level, plan.spec.seed, learning_rate=rate, draw=draw)
        if method == "mixed":
            return replace(wanted, levels=plan.levels)
        if method == "stability":
            # its learning rate is chosen in the middle of the grid
            return replace(wanted, alpha=grid.alphas[len(grid.alphas) // 2], sigma=grid.sigmas[len(grid.sigmas) // 2])
        return replace(wanted, budget=plan.spec.budget) if method in ("first-block", "auto-rgn", "random") else wanted

    def _recipe(self, method: str) -> Recipe:
        return self.plan.spec.recipe.model_copy(update={"learning_rate": self.found.rates[method]})

    def _make_controls(self) -> None:
        """The fine-tunes on undistorted images, before tasks of several levels would each make them."""
        seeds = dict.fromkeys(seed for level in self.plan.levels for seed in self.plan.seeds(level))
        self.emit.expect({("clean", "full"): 1.0 * len(seeds)})
        recipe = self._recipe("switching")
        self.tasks.all(_control, {f"clean seed {seed}": (self._shared, recipe, seed) for seed in seeds})

    def _make_and_evaluate(self) -> None:
        plan, units = self.plan, [*self._constant_units(), *self._units_per_level()]
        for unit in units:
            for level in unit.levels:
                self._waiting[level].add(unit.label)
        for level in plan.untrained:
            self._waiting[level].add("its neighbours")
        # at the undistorted level every method with weights per level is the base itself
        adaptive = (*_MAIN, *(method for method in self.config.methods if method not in CONSTANT))
        for level, cells in self._cells.items():
            methods = ("original", *(adaptive if parse_level(level).is_clean else ()))
            cells += [Cell(method, level, plan.spec.seed, Weights()) for method in methods]
        cost = _COST["evaluation"]
        self.emit.expect({(level, Evaluated.stage): cost * (1 + len(labels)) for level, labels in self._waiting.items()})
        for unit in units:
            self._start(unit.label, unit.function, *unit.arguments, then=partial(self._made, unit))
        for level in [level for level, labels in self._waiting.items() if not labels]:
            self._evaluate(level)
        self._scale_frames()
        self.tasks.settle()

    def _scale_frames(self) -> None:
        """The original at the frame sizes of levels that change it, fed at training size: a rival that holds nothing."""

        def evaluated(level: str, result: Evaluated | None) -> None:
            if result is not None:
                self.found.cells.append((Cell("original-scaled", level, self.plan.spec.seed, Weights()), result))

        for level in self.plan.levels if self.plan.spec.network.input_size is None else ():
            if properties_of(parse_level(level)).size is not None:
                self._start(f"{level} original at training size", _evaluate_scaled, level, then=partial(evaluated, level))

    def _constant_units(self) -> Iterator[_Unit]:
        """One network for all levels each, evaluated at the baselines' levels and undistorted."""
        grid, plan = self.config.stability, self.plan
        levels = tuple(level for level in plan.levels if level in plan.baseline_levels or parse_level(level).is_clean)
        for method in self.config.methods:
            if method not in CONSTANT or method not in self.found.rates:
                continue
            wanted = self._wanted(method, _ALL)
            if method == "stability":
                for alpha, sigma in itertools.product(grid.alphas, grid.sigmas):
                    yield self._baseline_unit(replace(wanted, alpha=alpha, sigma=sigma), levels)
            else:
                yield self._baseline_unit(wanted, levels)

    def _units_per_level(self) -> Iterator[_Unit]:
        """The baselines' levels first, in the order given: there comparisons become complete."""
        plan, rates = self.plan, self.found.rates
        baselines = [method for method in self.config.methods if method in rates or method == "bn-statistics"]
        for level in dict.fromkeys((*plan.baseline_levels, *plan.levels)):
            if parse_level(level).is_clean:
                continue
            for seed in plan.seeds(level):
                yield self._main_unit(level, seed)
            for method in baselines if level in plan.baseline_levels else ():
                draws = range(self.config.draws if method == "random" else 1)
                for draw in draws if method not in CONSTANT else ():
                    yield self._baseline_unit(self._wanted(method, level, draw), (level,))

    def _baseline_unit(self, wanted: WeightsSpec, levels: tuple[str, ...]) -> _Unit:
        def cells(weights: Weights) -> Sequence[Cell]:
            # a draw of random layers takes the place of a seed
            seed = wanted.draw if wanted.method == "random" else wanted.seed
            return [Cell(wanted.method, level, seed, weights, wanted.alpha, wanted.sigma) for level in levels]

        self.emit.expect({(wanted.level, wanted.label): _COST.get(wanted.method, _COST["adaptor"])})
        label = wanted.label if wanted.level == _ALL else f"{wanted.level} {wanted.label}"
        return _Unit(label, levels, runs.make_weights, (wanted,), cells)

    def _main_unit(self, level: str, seed: int) -> _Unit:
        plan, found, first = self.plan, self.found, seed == self.plan.spec.seed
        full, adaptor = map(self._recipe, _MAIN)
        further = plan.budgets if first and level in (self.config.budget_levels or (found.tuning_level,)) else ()
        suffix, entry = "" if first else f" seed {seed}", plan.entries.get(level)

        def cells(main: MainWeights) -> Sequence[Cell]:
            found.mains[level, seed] = main
            made = [Cell("switching", level, seed, main.switching)]
            for budget, weights in main.gearnn.items():
                own = budget == plan.spec.budget
                made.append(Cell("gearnn", level, seed, weights, budget=None if own else budget))
            if first and entry is not None and entry.digest != main.gearnn[plan.spec.budget].digest:
                made.append(Cell("gearnn-released", level, seed, Weights(entry.digest, entry.floats)))
            return made

        name = f"{level} switching and gearnn{suffix}"
        self.emit.expect({(level, f"switching{suffix}"): 1.0})
        if plan.is_joint and entry is not None:
            released = (full, level, seed, entry if first else None, suffix)
            return _Unit(name, (level,), _released, released, cells)
        self.emit.expect({(level, f"gearnn{suffix}"): _COST["adaptor"] * (1 + len(further))})
        return _Unit(name, (level,), _main, (full, adaptor, level, seed, further, suffix), cells)

    def _made(self, unit: _Unit, result: Any) -> None:
        """A unit has ended: its cells wait for the evaluation of their level."""
        for cell in unit.cells(result) if result is not None else ():
            self._cells[cell.level].append(cell)
        self._ended(unit.label, unit.levels)
        for level, sides in self.plan.untrained.items():
            both = {f"{side} switching and gearnn" for side in (sides.lower, sides.upper)}
            if unit.label in both and not any(both & self._waiting[side] for side in (sides.lower, sides.upper)):
                self._mix_neighbours(level, sides)

    def _ended(self, label: str, levels: Sequence[str]) -> None:
        """What these levels' evaluation waited for has ended, with or without a result; after the last, a level is evaluated."""
        for level in levels:
            self._waiting[level].discard(label)
            if not self._waiting[level]:
                self._evaluate(level)

    def _mix_neighbours(self, level: str, sides: Neighbours) -> None:
        """Answer an untrained level with its neighbours' adaptors, once both have ended."""
        spec = self.plan.spec
        lower, upper = (self.found.mains.get((name, spec.seed)) for name in (sides.lower, sides.upper))
        if lower is None or upper is None:
            self.tasks.failed[f"{level} by its neighbours"] = f"{sides.lower} and {sides.upper} are not both there"
            self._ended("its neighbours", [level])
            return
        adaptors = [main.gearnn[spec.budget] for main in (lower, upper)]
        self._cells[level].append(Cell("gearnn-nearest", level, spec.seed, adaptors[sides.nearest == sides.upper]))

        def mixed(weights: Weights | None) -> None:
            if weights is not None:
                self._cells[level].append(Cell("gearnn-interpolated", level, spec.seed, weights))
                # each image has a mixture of its own, as large as the linear one
                own = replace(adaptors[0], floats=weights.floats)
                self._cells[level].append(Cell("gearnn-entropy", level, spec.seed, own, neighbour=adaptors[1]))
            self._ended("its neighbours", [level])

        self._start(f"{level} interpolated adaptors", _mix, *adaptors, sides.share, then=mixed)

    def _evaluate(self, level: str) -> None:
        cells = self._cells[level]

        def evaluated(results: Mapping[Source, Evaluated] | None) -> None:
            if results is not None:
                self.found.cells += [(cell, results[cell.source]) for cell in cells]

        sources = list(dict.fromkeys(cell.source for cell in cells))
        self._start(f"{level} evaluation", measurements.evaluate_weights, level, sources, then=evaluated)

    def _look_closer(self) -> None:
        found, spec = self.found, self.plan.spec
        found.put_in_order(self.plan.levels)
        found.choose_stability()

        def compared(rows: tuple[list[DifferenceRow], list[AverageRow]] | None) -> None:
            if rows is not None:
                found.differences, found.averages = rows

        self._start("the comparison", _compare, found.evaluated(), axes_of(self.plan.levels), then=compared)
        for level in self.config.frequency_levels or (found.tuning_level,):
            main = found.mains.get((level, spec.seed))
            if main is None:
                continue
            networks = {"original": Weights(), "switching": main.switching, "gearnn": main.gearnn[spec.budget]}
            for network, weights in networks.items():

                def responded(result: FrequencyResult | None, level: str = level, network: str = network) -> None:
                    if result is not None:
                        found.frequency[level, network] = result

                label = f"frequency response: {network}"
                self.emit.expect({(level, label): 0.3})
                self._start(f"{level} {label}", measurements.frequency, level, weights, network, then=responded)

        def seen(picture: Picture | None) -> None:
            if picture is not None:
                found.pictures.append(picture)

        worst = found.worst_levels(spec.seed)[:_PICTURED]
        for level in worst:
            weights = found.mains[level, spec.seed].gearnn[spec.budget]
            self._start(f"{level} picture", _picture, level, weights, *found.pair(level, spec.seed), then=seen)
        self.tasks.settle()
        found.pictures.sort(key=lambda picture: worst.index(picture.level))
