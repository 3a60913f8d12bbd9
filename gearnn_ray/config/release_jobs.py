"""The configurations of the jobs that start from a release: evaluation and sweep."""

from typing import Literal, TypeVar, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gearnn_ray.config.budget import Budget
from gearnn_ray.config.checks import LevelNames, Section, each_once, grid
from gearnn_ray.config.recipe import Importance
from gearnn_ray.config.release_ref import Reference, TrustedModules
from gearnn_ray.config.resources import TaskResources
from gearnn_ray.levels.level import parse_level

Baseline = Literal["mixed", "stability", "clean-tuned", "bn-statistics", "bn-tuned", "first-block", "auto-rgn", "random"]
"""Methods that GearNN is compared with, beside the original and switching."""


LevelsT = TypeVar("LevelsT", bound=str | tuple[str, ...] | None)


class StabilityConfig(Section):
    """The grid of stability training (Zheng et al. 2016)."""

    alphas: tuple[float, ...] = (1.0,)
    """weights of the stability loss"""
    sigmas: tuple[float, ...] = (0.04, 0.1)
    """standard deviations of the Gaussian perturbation, of pixels in [0, 1]"""

    @field_validator("alphas", "sigmas")
    @classmethod
    def _a_grid(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        return grid("alpha" if info.field_name == "alphas" else "sigma", values)


class ReleaseDataConfig(Section):
    """Where the data set is; the release records which one it is."""

    path: str | None = None
    """folder of the data set, as every worker sees it; default: the folder that the split job used"""
    cache: str = "~/.cache/gearnn_ray"
    """folder where each node caches the distorted images"""


class _ReleaseJob(Section):
    """What every job that starts from a release is given."""

    release: Reference = "drn22-scenes-jpeg:latest"
    """the release, as name, name:tag or name@sha256:…"""
    store: str = "artifacts"
    """where releases are stored: a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    trust: TrustedModules = ()
    """import paths of networks' modules that a release may name, such as my_package.nets; built-in networks need none"""

    @field_validator("budgets", check_fields=False)
    @classmethod
    def _budgets_once(cls, budgets: tuple[str, ...]) -> tuple[str, ...]:
        return each_once("budget", budgets)


class EvaluateConfig(_ReleaseJob):
    """Every method at every level of a release, on the same images."""

    levels: LevelNames = ()
    """levels where original, switching and GearNN are evaluated; default: the release's levels"""
    baseline_levels: LevelNames = ()
    """levels where the other methods are evaluated; default: of each level property the level where the original is worst"""
    untrained: LevelNames = ()
    """levels that are also answered with their neighbours' adaptors, as if they had none"""
    seeds: int = Field(1, ge=1, le=20)
    """how many fine-tunes of switching and GearNN each baseline level gets, each with its own order and crops of the images"""
    methods: tuple[Baseline, ...] = get_args(Baseline)
    """methods that GearNN is compared with, beside the original and switching; default: all"""
    learning_rates: tuple[float, ...] = ()
    """grid from which each method's learning rate is chosen once, at the tuning level; default: all methods use the release's"""
    tuning_level: str | None = None
    """level where learning rates are chosen; default: the level where the original is worst"""
    stability: StabilityConfig = StabilityConfig()
    draws: int = Field(2, ge=1, le=100)
    """how many random selections of layers the method random averages"""
    budgets: tuple[Budget, ...] = ("0.05%", "1%")
    """further budgets of GearNN, as shares of the model size or numbers of floats; none: only the release's budget"""
    budget_levels: LevelNames = ()
    """levels where the further budgets are evaluated; default: the tuning level"""
    frequency_levels: LevelNames = ()
    """levels whose frequency response is measured; default: the tuning level"""
    data: ReleaseDataConfig = ReleaseDataConfig()
    resources: TaskResources = TaskResources()

    @field_validator("tuning_level")
    @classmethod
    def _known_level(cls, level: str | None) -> str | None:
        return level and parse_level(level).name

    @field_validator("tuning_level", "budget_levels", "frequency_levels")
    @classmethod
    def _adapted(cls, levels: LevelsT, info: ValidationInfo) -> LevelsT:
        if levels is not None and "clean" in ((levels,) if isinstance(levels, str) else levels):
            raise ValueError(f"{info.field_name} has clean, where nothing is adapted: name a distorted level")
        return levels

    @field_validator("levels")
    @classmethod
    def _not_only_clean(cls, levels: tuple[str, ...]) -> tuple[str, ...]:
        if set(levels) == {"clean"}:
            raise ValueError("levels has only clean, where nothing is adapted: name at least one distorted level")
        return levels

    @field_validator("methods")
    @classmethod
    def _methods_once(cls, methods: tuple[Baseline, ...]) -> tuple[Baseline, ...]:
        each_once("method", methods)
        return methods

    @field_validator("learning_rates")
    @classmethod
    def _a_grid(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        return grid("learning rate", rates) if rates else rates

    @model_validator(mode="after")
    def _baselines_where_gearnn_is(self) -> "EvaluateConfig":
        alone = next((name for name in self.baseline_levels if self.levels and name not in self.levels), None)
        if alone:
            raise ValueError(f"baseline_levels has {alone}, which levels has not: add it there or take it out here")
        return self


class SweepConfig(_ReleaseJob):
    """A release's levels under several budgets M: which is worth its bytes."""

    budgets: tuple[Budget, ...] = ()
    """budgets to try, as shares of the model size (0.2%), floats (31814) or bytes (127256B); default: seven from 0.05% to 1%, on
    generated scenes three"""
    levels: LevelNames = ()
    """levels where the budgets are evaluated; default: the release's, on generated scenes the two where the original is worst"""
    importance: tuple[Importance, ...] = ()
    """measures of a layer's importance, each tried with every budget; default: the release's"""
    within: float = Field(0.5, ge=0)
    """the recommended budget is the smallest whose mean score is at most this many points below the best"""
    asha: bool = False
    """stop a budget early if, after the same number of levels, it is in the worse half (ASHA)"""
    data: ReleaseDataConfig = ReleaseDataConfig()
    resources: TaskResources = TaskResources()

    @field_validator("levels")
    @classmethod
    def _adapted_levels(cls, levels: tuple[str, ...]) -> tuple[str, ...]:
        if "clean" in levels:
            raise ValueError("levels has clean, where nothing is adapted: name distorted levels")
        return levels

    @field_validator("importance")
    @classmethod
    def _importance_once(cls, importance: tuple[Importance, ...]) -> tuple[Importance, ...]:
        each_once("importance", importance)
        return importance
