"""What each job can be told: one typed, validated object, whose fields' docstrings are the help of its options.

Everything that can be judged without looking at the data or the cluster is judged here. Knows nothing of Ray, files or
command lines.
"""

import re
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from gearnn_ray.config.recipe import PAPERS, Coupling, Criterion, Importance, Recipe
from gearnn_ray.levels.level import parse_level

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# the ImageNet statistics: what torchvision's and DRN's classification networks were trained with
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_MOST_LEVELS = 12  # of few-adaptors, whose solver looks at all sets of levels
ItemT = TypeVar("ItemT", str, float)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScenesConfig(_Section):
    """The generated street scenes (data.kind scenes)."""

    train: int = Field(192, ge=1)
    """training images"""
    val: int = Field(32, ge=1)
    """validation images"""
    height: int = Field(96, ge=48, le=2048)
    """pixels"""
    width: int = Field(128, ge=48, le=2048)
    """pixels"""
    seed: int = Field(0, ge=0)
    """which scenes"""


class DataConfig(_Section):
    """Images and labels."""

    kind: Literal["scenes", "camvid", "cityscapes", "folder"] = "scenes"
    """generated scenes, CamVid, Cityscapes, or a folder with train/images, train/labels, val/images, val/labels"""
    path: str | None = None
    """where the data set lies, as every worker sees it"""
    num_classes: int | None = Field(None, ge=2, le=255)
    """classes of a folder of your own"""
    scenes: ScenesConfig = ScenesConfig()
    cache: str = "~/.cache/gearnn_ray"
    """where each node keeps the distorted images it made"""


class ModelConfig(_Section):
    """The network D."""

    name: str = "drn_d_22"
    """drn_d_22, drn_d_38, or a function of your own as package.module:function"""
    weights: str | None = None
    """.safetensors, .pt or .pth file as the driver sees it; without one the network is first trained on the undistorted images"""
    mean: tuple[float, float, float] | None = None
    """RGB mean in [0, 1] the network's input is normalised with; default: the weights file's own, else ImageNet's"""
    std: tuple[float, float, float] | None = None
    """RGB standard deviation in [0, 1], likewise"""

    @model_validator(mode="after")
    def _both_or_none(self) -> "ModelConfig":
        if (self.mean is None) != (self.std is None):
            raise ValueError("only one of model.mean and model.std is given: give both or neither")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"model.std is {self.std}: every value must be above 0")
        return self


class TaskResources(_Section):
    """What one fine-tune gets."""

    cpus: float = Field(1, gt=0)
    """CPUs a fine-tune reserves; torch gets as many threads"""
    gpus: float = Field(0, ge=0)
    """GPUs a fine-tune reserves; 0.25 lets four share one"""
    retries: int = Field(3, ge=0)
    """how often a task whose worker died is started again; it goes on from its checkpoint"""

    @field_validator("gpus")
    @classmethod
    def _fraction_or_whole(cls, gpus: float) -> float:
        return fraction_or_whole(gpus)


class ResourcesConfig(TaskResources):
    """What one fine-tune gets, and how it is spread."""

    workers_per_level: int = Field(1, ge=1)
    """above 1 each fine-tune is spread over so many workers with Ray Train, each with these resources"""


class SensitivityConfig(_Section):
    """How layers' sensitivities are found."""

    epochs: float | None = Field(None, ge=0)
    """of the full fine-tune, a fraction too, after which layers are chosen; 0: by the gradient at the base; default: all"""


class SelectionConfig(Coupling, Criterion):
    """What layers are worth, and the problem that chooses among them."""

    @model_validator(mode="after")
    def _layers_as_they_are(self) -> "SelectionConfig":
        plain = (self.granularity, self.storage_formats) == (PAPERS.granularity, PAPERS.storage_formats)
        if self.problem in ("few-layers", "few-adaptors") and not plain:
            raise ValueError(
                f"selection.problem is {self.problem}, which chooses tensors as float32: leave out selection.granularity and "
                "selection.storage_formats or choose another problem"
            )
        return self

    @property
    def criterion(self) -> Criterion:
        """A level's values."""
        return Criterion(**{name: getattr(self, name) for name in Criterion.model_fields})

    @property
    def coupling(self) -> Coupling:
        """The problem that they enter."""
        return Coupling(**{name: getattr(self, name) for name in Coupling.model_fields})


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"sensitivity": {"epochs": 0.125}, "recipe": {"epochs": 3}},
    "compact": {
        "selection": {
            "importance": "fisher",
            "granularity": "module",
            "against": "clean",
            "storage_formats": ["float32", "bfloat16", "int8"],
        }
    },
}
"""By name, what `preset` sets of a `SplitConfig` where nothing else does: fewer epochs, or more accuracy for each byte.
docs/budget.md says what they cost and give."""


class SplitConfig(_Section):
    """GearNN's Algorithm 1 over a set of distortion levels."""

    name: str = "drn22-scenes-jpeg"
    """the release's name in the store"""
    store: str = "artifacts"
    """a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    levels: tuple[str, ...] = ("jpeg-10", "jpeg-20", "jpeg-40", "jpeg-80")
    """distortion levels: jpeg-Q, brightness-B, h264-WxH, h264-crfC, clean, and combinations with +"""
    budget: str = "0.2%"
    """M of Eq. (2): a share of the model size such as 0.2%, a number of floats, or of bytes such as 127256B; of each
    adaptor, with selection.problem one-memory of all together"""
    seed: int = Field(0, ge=0, lt=2**32)
    """decides order and crops of every fine-tune"""
    tags: tuple[str, ...] = ()
    """tags that shall point at this release besides latest"""
    keep_full: bool = False
    """also keep the fully fine-tuned networks in the store (the release names them)"""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    recipe: Recipe = Recipe()
    sensitivity: SensitivityConfig = SensitivityConfig()
    selection: SelectionConfig = SelectionConfig()
    base_recipe: Recipe = Recipe(epochs=14, learning_rate=0.1, batch_size=4)
    """how the base is trained where no weights are given"""
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: object) -> object:
        """`preset` is no option of its own: a configuration holds what it stands for."""
        if not isinstance(values, dict) or "preset" not in values:
            return values
        told = dict(values)
        name = told.pop("preset")
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"the preset {name!r} is unknown: expected {' or '.join(PRESETS)}")
        for section, settings in PRESETS[name].items():
            own = told.get(section, {})
            told[section] = {**settings, **own} if isinstance(own, dict) else own
        return told

    @field_validator("name", "tags")
    @classmethod
    def _path_safe(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (value,) if isinstance(value, str) else value:
            if not SAFE_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no safe name: expected letters, digits, '.', '_' and '-', beginning with a letter or digit"
                )
        return value

    @field_validator("levels")
    @classmethod
    def _known_levels(cls, levels: tuple[str, ...]) -> tuple[str, ...]:
        if not levels:
            raise ValueError("no level is given: expected at least one, such as jpeg-10")
        return known_levels(levels)

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_text(cls, budget: object) -> object:
        return _budget_text(budget)

    @field_validator("budget")
    @classmethod
    def _readable_budget(cls, budget: str) -> str:
        budget_floats(budget, 1)
        return budget

    @model_validator(mode="after")
    def _no_longer_than_the_recipe(self) -> "SplitConfig":
        short = self.sensitivity.epochs
        if short is not None and short > self.recipe.epochs:
            raise ValueError(
                f"sensitivity.epochs is {short:g} and recipe.epochs {self.recipe.epochs}: expected at most as many"
            )
        if short is not None and self.keep_full:
            raise ValueError(
                "keep_full and sensitivity.epochs are both given: only whole fine-tunes can be kept, leave out one"
            )
        return self

    @model_validator(mode="after")
    def _levels_that_go_together(self) -> "SplitConfig":
        selection, distorted = self.selection, [name for name in self.levels if not parse_level(name).is_clean]
        unknown = next((name for name in selection.frequencies if name not in self.levels), None)
        if unknown is not None:
            raise ValueError(
                f"selection.frequencies has {unknown}, which levels has not: add it there or take it out here"
            )
        unsaid = next((name for name in distorted if selection.frequencies and name not in selection.frequencies), None)
        if unsaid is not None:
            raise ValueError(
                f"selection.frequencies says nothing of {unsaid}: give it for every distorted level, 0 too"
            )
        if selection.is_joint and not sum(selection.frequencies.get(name, 1.0) for name in distorted):
            raise ValueError(
                f"selection.problem is {selection.problem} and no distorted level occurs: name one in levels, with a frequency "
                "above 0"
            )
        if selection.problem == "few-adaptors" and len(distorted) > _MOST_LEVELS:
            raise ValueError(
                f"selection.problem is few-adaptors and there are {len(distorted)} distorted levels: expected at most "
                f"{_MOST_LEVELS}, leave out some"
            )
        return self

    def resolved_data_options(self) -> dict[str, Any]:
        """Own options of the data set's kind, for `open_dataset`."""
        if self.data.kind == "scenes":
            return self.data.scenes.model_dump()
        return {"num_classes": self.data.num_classes} if self.data.kind == "folder" else {}


class LimitsConfig(_Section):
    """What a request may ask for; more is refused before anything is allocated for it."""

    body_mib: float = Field(16, gt=0, le=1024)
    """MiB of one request's body"""
    megapixels: float = Field(8.5, gt=0, le=100)
    """million pixels of one frame, and of the frames that go through the network at once; a 4K frame has 8.3"""


class ServeConfig(_Section):
    """Serving releases over HTTP, each frame with the network of its own distortion level."""

    store: str = "artifacts"
    """a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    bundles: tuple[str, ...] = ("drn22-scenes-jpeg:latest",)
    """releases as name:tag, followed when the tag moves, or name@sha256:…; the first answers requests that name none"""
    host: str = Field("127.0.0.1", min_length=1)
    """address to listen on; 0.0.0.0 lets other machines in"""
    port: int = Field(8000, ge=1, le=65535)
    """of HTTP"""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where a GPU is reserved"""
    replicas: int = Field(1, ge=1)
    """processes that answer; each holds every bundle"""
    num_cpus: float = Field(1, gt=0)
    """CPUs a replica reserves; torch gets as many threads"""
    num_gpus: float | None = Field(None, ge=0)
    """GPUs a replica reserves; default: one where the cluster has any and device is not cpu"""
    max_batch: int = Field(16, ge=1, le=1024)
    """frames that go through the network at once, whatever their levels"""
    batch_wait_ms: float = Field(2, ge=0, le=1000)
    """how long a first frame waits for others"""
    untrained: Literal["nearest", "interpolate"] = "nearest"
    """what answers a frame whose level lies between released ones: the nearest, or a mixture of its neighbours"""
    poll_seconds: float = Field(10, gt=0)
    """how often the store is asked whether a tag has moved"""
    limits: LimitsConfig = LimitsConfig()
    cameras: dict[str, float] = {}
    """x-gearnn-stream of a camera and the mean luma (0 to 255) of its undistorted frames, where not the training set's"""

    @field_validator("bundles")
    @classmethod
    def _references(cls, bundles: tuple[str, ...]) -> tuple[str, ...]:
        if not bundles:
            raise ValueError("no bundle is given: expected at least one, such as drn22-scenes-jpeg:latest")
        return _each_once("bundle", tuple(full_reference(bundle) for bundle in bundles))

    @field_validator("num_gpus")
    @classmethod
    def _fraction_or_whole(cls, gpus: float | None) -> float | None:
        return gpus if gpus is None else fraction_or_whole(gpus)

    @field_validator("cameras")
    @classmethod
    def _lumas(cls, cameras: dict[str, float]) -> dict[str, float]:
        for camera, luma in cameras.items():
            if not 0 < luma <= 255:
                raise ValueError(f"the mean luma of camera {camera} is {luma:g}: expected above 0 and at most 255")
        return cameras


Baseline = Literal[
    "mixed", "stability", "clean-tuned", "bn-statistics", "bn-tuned", "first-block", "auto-rgn", "random"
]
"""What GearNN's adaptors are compared with, beside the original and switching."""


class StabilityConfig(_Section):
    """The grid of stability training (Zheng et al. 2016)."""

    alphas: tuple[float, ...] = (1.0,)
    """weights of the stability loss"""
    sigmas: tuple[float, ...] = (0.04, 0.1)
    """standard deviations of the Gaussian perturbation, of pixels in [0, 1]"""

    @field_validator("alphas", "sigmas")
    @classmethod
    def _a_grid(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        return _grid("alpha" if info.field_name == "alphas" else "sigma", values)


class ReleaseDataConfig(_Section):
    """Where images and labels lie; which they are, the release says."""

    path: str | None = None
    """the data set, as every worker sees it, where the release does not generate it; default: where it was split"""
    cache: str = "~/.cache/gearnn_ray"
    """where each node keeps the distorted images it made"""


class _OfARelease(_Section):
    """What starts from a release, with budgets of its own."""

    release: str = "drn22-scenes-jpeg:latest"
    """the release as name, name:tag or name@sha256:…"""
    store: str = "artifacts"
    """a local path or a pyarrow.fs URI such as s3://bucket/prefix"""

    @field_validator("release")
    @classmethod
    def _one_spelling(cls, release: str) -> str:
        return full_reference(release)

    @field_validator("budgets", mode="before", check_fields=False)
    @classmethod
    def _budget_texts(cls, budgets: object) -> object:
        return tuple(map(_budget_text, budgets)) if isinstance(budgets, list | tuple) else budgets

    @field_validator("budgets", check_fields=False)
    @classmethod
    def _readable_budgets(cls, budgets: tuple[str, ...]) -> tuple[str, ...]:
        for budget in budgets:
            budget_floats(budget, 1)
        return _each_once("budget", budgets)


class EvaluateConfig(_OfARelease):
    """Every method at every level of a release, on the same images."""

    levels: tuple[str, ...] = ()
    """levels where original, switching and GearNN are judged; default: the release's"""
    baseline_levels: tuple[str, ...] = ()
    """levels where the other methods are judged; default: the one of each axis where the original is worst"""
    untrained: tuple[str, ...] = ()
    """levels that are also answered by their neighbours' adaptors, as if they had none of their own"""
    seeds: int = Field(1, ge=1, le=20)
    """fine-tunes of switching and GearNN at each rival level, each with another order and other crops"""
    methods: tuple[Baseline, ...] = get_args(Baseline)
    """what GearNN is compared with beside the original and switching"""
    learning_rates: tuple[float, ...] = ()
    """the grid each method's learning rate is chosen from, once; default: the release's for all"""
    tuning_level: str | None = None
    """the level where learning rates are chosen; default: the one where the original is worst"""
    stability: StabilityConfig = StabilityConfig()
    draws: int = Field(2, ge=1, le=100)
    """random choices of layers (method random)"""
    budgets: tuple[str, ...] = ("0.05%", "1%")
    """further budgets of GearNN, as shares of the model size or numbers of floats; none: only the release's own"""
    budget_levels: tuple[str, ...] = ()
    """levels where the further budgets are judged; default: the tuning level"""
    frequency_levels: tuple[str, ...] = ()
    """levels whose frequency response is measured; default: the tuning level"""
    data: ReleaseDataConfig = ReleaseDataConfig()
    resources: TaskResources = TaskResources()

    @field_validator("levels", "baseline_levels", "untrained", "budget_levels", "frequency_levels")
    @classmethod
    def _known_levels(cls, levels: tuple[str, ...]) -> tuple[str, ...]:
        return known_levels(levels)

    @field_validator("tuning_level")
    @classmethod
    def _known_level(cls, level: str | None) -> str | None:
        return level and parse_level(level).name

    @field_validator("methods")
    @classmethod
    def _methods_once(cls, methods: tuple[Baseline, ...]) -> tuple[Baseline, ...]:
        _each_once("method", methods)
        return methods

    @field_validator("learning_rates")
    @classmethod
    def _a_grid(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        return _grid("learning rate", rates) if rates else rates

    @model_validator(mode="after")
    def _baselines_where_gearnn_is(self) -> "EvaluateConfig":
        alone = next((name for name in self.baseline_levels if self.levels and name not in self.levels), None)
        if alone:
            raise ValueError(f"baseline_levels has {alone}, which levels has not: add it there or take it out here")
        return self


class SweepConfig(_OfARelease):
    """A release's levels under several budgets M: which is worth its bytes."""

    budgets: tuple[str, ...] = ()
    """as shares of the model size (0.2%), floats (31814) or bytes (127256B); default: seven from 0.05% to 1%, on scenes three"""
    levels: tuple[str, ...] = ()
    """levels that budgets are judged by; default: the release's, on scenes the two where the original is worst"""
    values: tuple[Importance, ...] = ()
    """what a layer is worth, each swept over all budgets; default: as in the release"""
    within: float = Field(0.5, ge=0)
    """the recommended budget is the smallest whose mean score is at most so many points below the best"""
    asha: bool = False
    """stop a budget early when, after as many levels, it is in the worse half (ASHA)"""
    data: ReleaseDataConfig = ReleaseDataConfig()
    resources: TaskResources = TaskResources()

    @field_validator("levels")
    @classmethod
    def _adapted_levels(cls, levels: tuple[str, ...]) -> tuple[str, ...]:
        if "clean" in known_levels(levels):
            raise ValueError("levels has clean, where nothing is adapted: name distorted levels")
        return levels

    @field_validator("values")
    @classmethod
    def _values_once(cls, values: tuple[Importance, ...]) -> tuple[Importance, ...]:
        _each_once("value", values)
        return values


def known_levels(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names themselves. UserError or ValueError where one is no level or given twice."""
    for name in names:
        parse_level(name)
    return _each_once("level", names)


def _grid(what: str, values: tuple[float, ...]) -> tuple[float, ...]:
    """The values themselves. ValueError where there are none, one is not above 0, or one is given twice."""
    if not values:
        raise ValueError(f"no {what} is given: expected at least one, above 0")
    if min(values) <= 0:
        raise ValueError(f"the {what} {min(values):g} is given: expected above 0")
    return _each_once(what, values)


def _each_once(what: str, values: tuple[ItemT, ...]) -> tuple[ItemT, ...]:
    """The values themselves. ValueError where one is given twice."""
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"the {what} {twice} is given twice: give each {what} once")
    return values


def _budget_text(budget: object) -> object:
    """A number of floats may stand in a file without quotes."""
    return str(budget) if isinstance(budget, int) and not isinstance(budget, bool) else budget


def full_reference(bundle: str) -> str:
    """The one spelling of a release's reference: name:tag (the tag `latest` where none is said) or name@sha256:…

    ValueError for anything else.
    """
    name, pinned, digest = bundle.partition("@")
    if not pinned:
        name, tagged, tag = bundle.partition(":")
        tag = tag if tagged else "latest"
    if SAFE_NAME.fullmatch(name) and (
        re.fullmatch("sha256:[0-9a-f]{64}", digest) if pinned else SAFE_NAME.fullmatch(tag)
    ):
        return bundle if pinned else f"{name}:{tag}"
    raise ValueError(f"{bundle!r} is no bundle: expected name, name:tag or name@sha256:… with 64 hexadecimal digits")


def fraction_or_whole(gpus: float) -> float:
    """The number itself. ValueError where Ray cannot reserve so many GPUs."""
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g} GPUs cannot be reserved: expected a fraction below 1 or a whole number")
    return gpus


def budget_floats(budget: str, model_floats: int) -> int:
    """M in floats of four bytes: floor(fraction × model size), or the number itself (§3.2). ValueError when it is neither."""
    text = budget.strip()
    if match := re.fullmatch(r"(\d+)(?:\.(\d+))?\s*%", text):
        whole, decimals = match[1], match[2] or ""
        # integers, because 0.2 / 100 * 15,907,139 in floating point may fall on the wrong side of a whole number
        share, scale = int(whole + decimals), int(100 * 10 ** len(decimals))
        if share > scale:
            raise ValueError(f"the budget {budget!r} is more than the whole network: expected at most 100%")
        return model_floats * share // scale
    if match := re.fullmatch(r"(\d+)(\s*B)?", text):
        return int(match[1]) // (4 if match[2] else 1)
    raise ValueError(
        f"the budget {budget!r} is not understood: expected a share such as 0.2%, a number of floats such as 31814 or of "
        "bytes such as 127256B"
    )


def normalisation_values(
    model: ModelConfig, about: dict[str, Any]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation: the configuration's, else those the weights file states, else ImageNet's."""
    if model.mean is not None and model.std is not None:
        return model.mean, model.std
    mean, std = _triple(about.get("mean")), _triple(about.get("std"))
    return (mean, std) if mean and std and min(std) > 0 else _IMAGENET


def _triple(value: object) -> tuple[float, float, float] | None:
    if isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value):
        return float(value[0]), float(value[1]), float(value[2])
    return None
