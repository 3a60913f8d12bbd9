"""What an evaluation does: which methods at which levels, checked against the release before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gearnn_ray.config.budget import budget_floats
from gearnn_ray.config.release_jobs import EvaluateConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.axes import Neighbours, axes_of, neighbours
from gearnn_ray.levels.level import parse_level
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.release_context import ReleaseContext
from gearnn_ray.store.manifest import LevelEntry, Manifest


@dataclass(frozen=True)
class Plan:
    """What is evaluated where.

    spec: with the release's recipe and seed, and its budget for one level. untrained: levels that are answered with their
    neighbours' adaptors. budgets: further ones of GearNN, in floats.
    """

    config: EvaluateConfig
    release: ReleaseContext
    spec: JobSpec
    levels: tuple[str, ...]
    baseline_levels: tuple[str, ...]
    untrained: Mapping[str, Neighbours]
    budgets: tuple[int, ...]

    @property
    def entries(self) -> Mapping[str, LevelEntry]:
        """The released levels in the manifest."""
        return self.release.manifest.levels

    @property
    def is_joint(self) -> bool:
        """Whether the release selects the layers of all levels together."""
        return self.spec.coupling.is_joint

    def seeds(self, level: str) -> range:
        """Seeds of the main methods at a level: as many as configured where baselines are evaluated, else one."""
        count = self.config.seeds if level in self.baseline_levels else 1
        return range(self.spec.seed, self.spec.seed + count)


def check_levels(config: EvaluateConfig, manifest: Manifest) -> tuple[tuple[str, ...], dict[str, Neighbours]]:
    """The levels to evaluate, and the neighbours of those that count as untrained. Raises UserError. Needs no cluster."""
    levels = config.levels or tuple(manifest.levels)
    named = [*config.baseline_levels, *config.untrained, *config.budget_levels, *config.frequency_levels]
    foreign = next((name for name in (*named, config.tuning_level) if name and name not in levels), None)
    if foreign is not None:
        raise UserError(f"the level {foreign} is not among the levels evaluated ({', '.join(levels)}): add it to levels")
    if all(parse_level(name).is_clean for name in levels):
        raise UserError(f"{config.release} has no distorted level to evaluate: name some with --levels")
    trained = [name for name in levels if name not in config.untrained]
    between = {}
    for name in config.untrained:
        sides = neighbours(name, trained)
        if sides is None:
            raise UserError(f"the untrained level {name} does not lie between two other levels of its kind: add them to levels")
        between[name] = sides
    return levels, between


def plan_of(config: EvaluateConfig, release: ReleaseContext) -> Plan:
    """The plan for a release. Raises UserError."""
    levels, between = check_levels(config, release.manifest)
    spec, facts = release.spec, release.facts
    # a further budget for one level has no meaning where all levels are selected in one problem
    asked = () if spec.coupling.is_joint else config.budgets
    budgets = tuple(dict.fromkeys(budget_floats(text, facts.floats) for text in asked))
    small = next((m for m in budgets if m < facts.least_budget(spec.criterion)), None)
    if small is not None:
        raise UserError(
            f"a budget of {small} floats fits no layer: the smallest of {spec.network.name} has {facts.smallest_layer}, so give "
            "larger budgets"
        )
    if len(config.learning_rates) > 1 and len(spec.data.train) < 2:
        raise UserError("learning rates are chosen on held-back training images, and there is only one: give no grid")
    spec = replace(spec, budget=_budget_of_each(spec, release.levels))
    further = tuple(m for m in budgets if m != spec.budget)
    if not spec.task.has_stability:
        methods = tuple(method for method in config.methods if method != "stability")
        config = config.model_copy(update={"methods": methods})
    return Plan(config, release, spec, levels, config.baseline_levels, between, further)


def worst_of_each_axis(levels: Sequence[str], worst: Sequence[str]) -> tuple[str, ...]:
    """The level of each axis that comes first in `worst`, in the order of `levels`."""
    taken = {next((name for name in worst if name in members), None) for members in axes_of(levels).values()}
    return tuple(name for name in levels if name in taken)


def _budget_of_each(spec: JobSpec, released: Sequence[str]) -> int:
    """M in floats of one level's adaptor, which baselines get: an equal part if all levels share one memory."""
    sharing = sum(not parse_level(name).is_clean for name in released)
    return spec.budget // max(1, sharing) if spec.coupling.problem == "one-memory" else spec.budget
