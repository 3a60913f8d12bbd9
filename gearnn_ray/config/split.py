"""The configuration of the split job: one typed, validated object, whose fields' docstrings are the help of its options.

Everything that can be judged without looking at the data or the cluster is judged here. Knows nothing of Ray, files or
command lines.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gearnn_ray.config.budget import Budget
from gearnn_ray.config.catalogue import check_arguments, task_of_network, task_of_options
from gearnn_ray.config.checks import LevelNames, Section
from gearnn_ray.config.recipe import BaseRecipe, Coupling, Criterion, Recipe
from gearnn_ray.config.release_ref import SafeName
from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.levels.level import parse_level


class ScenesConfig(Section):
    """The generated street scenes (data.kind scenes)."""

    train: int = Field(192, ge=1)
    """number of training images"""
    val: int = Field(32, ge=1)
    """number of validation images"""
    height: int = Field(96, ge=48, le=2048)
    """height of an image in pixels"""
    width: int = Field(128, ge=48, le=2048)
    """width of an image in pixels"""
    seed: int = Field(0, ge=0)
    """seed of the generator; another seed gives other scenes"""
    frames: int = Field(1, ge=1, le=256)
    """images of each scene, which the camera pans over: H.264 levels then are those of video, not of stills"""


class FootageConfig(Section):
    """Images and videos without labels (data.kind footage)."""

    rate: float = Field(1, gt=0, le=1000)
    """frames that are taken from each second of a video"""


class DataConfig(Section):
    """Images and labels."""

    kind: Literal["scenes", "camvid", "cityscapes", "folder", "coco", "penn-fudan", "yolo", "footage"] = "scenes"
    """generated scenes, for either task; CamVid, Cityscapes, or a folder with train/images, train/labels, val/images, val/labels,
    for segmentation; COCO's format, Penn-Fudan, or YOLO's format, for detection; a folder of videos and images without labels"""
    path: str | None = None
    """folder of the data set, as every worker sees it; generated scenes need none"""
    num_classes: int | None = Field(None, ge=2, le=255)
    """number of classes, for kinds folder and footage"""
    scenes: ScenesConfig = ScenesConfig()
    footage: FootageConfig = FootageConfig()
    cache: str = "~/.cache/gearnn_ray"
    """folder where each node caches the distorted images"""


class ModelConfig(Section):
    """The network D."""

    name: str = "drn_d_22"
    """drn_d_22, drn_d_22_narrow (the default of generated scenes) or drn_d_38; centre_detector, light_maskrcnn, or a detector of
    torchvision's such as maskrcnn_resnet50_fpn; a segmentation network of an installed library, as torchvision:NAME, timm:NAME,
    smp:NAME or hf:FOLDER_OR_ID (docs/networks.md); or a function that returns a network, as package.module:function"""
    arguments: dict[str, int | float | bool | str] = Field(default_factory=dict)
    """further arguments that the network is built with: min_size and max_size of torchvision's detectors, or what the user's own
    function takes"""
    pad_to: int | None = Field(None, ge=2, le=1024)
    """for a segmentation network that only takes sides of multiples of this number, such as 32: images are padded to these with
    copies of their last row and column, and the logits of the padding are cut off; default: images stay as they are"""
    input: Literal["own-size", "training-size"] = "own-size"
    """size at which the network sees frames; own-size: at which they arrive, as in the paper; training-size: that of the
    undistorted training images, to which frames of another size are scaled (docs/levels.md). Answers have the frame's size"""
    weights: str | None = None
    """.safetensors, .bin, .pt, .pth or .ckpt file, the .index.json of a file in parts, or a folder of transformers, as every
    worker sees it; default: the network is first trained on the undistorted images"""
    start: str | None = None
    """a file as for model.weights that the training of the base begins with, such as a backbone: tensors whose name and shape
    are the network's, or those of one part of it, are taken; the others are initialised anew"""
    mean: tuple[float, float, float] | None = None
    """RGB mean in [0, 1] that normalises the network's input; default: the one in the weights file, else ImageNet's"""
    std: tuple[float, float, float] | None = None
    """RGB standard deviation in [0, 1] that normalises the network's input; default: as for the mean"""

    @model_validator(mode="after")
    def _both_or_none(self) -> "ModelConfig":
        if (self.mean is None) != (self.std is None):
            raise ValueError("only one of model.mean and model.std is given: give both or neither")
        if self.start is not None and self.weights is not None:
            raise ValueError("model.start and model.weights are both given: the base is trained from the one, or is the other")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"model.std is {self.std}: every value must be above 0")
        return self


class SensitivityConfig(Section):
    """How the sensitivity of layers is measured."""

    epochs: float | None = Field(None, ge=0)
    """epochs of full fine-tuning before layers are selected; may be fractional; 0: one step along the gradient at the base;
    default: all epochs of the recipe"""


class SelectionConfig(Coupling, Criterion):
    """How important layers are, and the problem that selects among them."""

    held_back: float = Field(0, ge=0, le=0.5)
    """share of the training images, counted from the last one, by which each level's budget is chosen: M, or a half, a quarter or
    an eighth of it, whichever adaptor does best on them when it is trained on the others; 0: always M"""

    @model_validator(mode="after")
    def _held_back_per_level(self) -> "SelectionConfig":
        if self.held_back and self.is_joint:
            raise ValueError(
                f"selection.held_back is given and selection.problem is {self.problem}, where levels share the budget: leave it "
                "out or choose per-level"
            )
        return self

    @property
    def criterion(self) -> Criterion:
        """How important a layer is to one level."""
        return Criterion(**{name: getattr(self, name) for name in Criterion.model_fields})

    @property
    def coupling(self) -> Coupling:
        """Whether levels are selected for alone or jointly."""
        return Coupling(**{name: getattr(self, name) for name in Coupling.model_fields})


BASE_RECIPE = BaseRecipe(epochs=14, learning_rate=0.1, batch_size=4)

PRESETS: dict[str, dict[str, object]] = {
    "paper": {
        "budget": "0.2%",
        "selection": {
            "importance": "mean-abs",
            "granularity": "tensor",
            "against": "base",
            "storage_formats": ["float32"],
            "problem": "per-level",
        },
        "recipe": {"objective": "labels", "epochs": 4},
    },
    "fast": {"sensitivity": {"epochs": 0.125}, "recipe": {"epochs": 3}},
    "compact": {
        "selection": {
            "importance": "fisher",
            "granularity": "module",
            "against": "clean",
            "storage_formats": ["float32", "bfloat16", "int8"],
        }
    },
    "video": {
        "task": "detection",
        "name": "centre-video",
        "budget": "1%",
        "levels": [
            "h264-crf36",
            "h264-crf44",
            "h264-64x48+h264-crf28",
            "h264-64x48+h264-crf36",
            "brightness-0.5",
            "brightness-0.2",
            "brightness-0.1",
            "brightness-0.2+h264-crf36",
        ],
        "data": {"scenes": {"train": 768, "val": 128, "frames": 8}},
        "base_recipe": {"epochs": 6},
        "recipe": {"epochs": 1},
    },
}
"""Values that a preset gives to options of `SplitConfig` that are not given: Algorithm 1 as published; fewer epochs, or more
accuracy per byte (docs/budget.md has costs and gains); or levels as video streams have them (docs/streams.md)."""


DETECTION: dict[str, object] = {
    "name": "centre-scenes",
    "levels": ["jpeg-5", "jpeg-10", "jpeg-20", "jpeg-40", "brightness-0.2"],
    "budget": "0.4%",
    "data": {"scenes": {"val": 64}},
    "model": {"name": "centre_detector"},
    "recipe": {"crop": 1333},
    "base_recipe": {"crop": 1333, "epochs": 24, "learning_rate": 0.02, "batch_size": 4},
}
"""Defaults of the task detection, where they are not those of `SplitConfig`."""


SCENES: dict[str, object] = {
    "model": {"name": "drn_d_22_narrow"},
    "budget": "1%",
    "base_recipe": {"epochs": 20, "learning_rate": 0.1, "batch_size": 4},
}
"""Defaults of segmentation of the generated scenes, unless a network or its weights are given: a few minutes on two cores."""


FOOTAGE: dict[str, object] = {"recipe": {"objective": "teacher"}}
"""Defaults of data without labels."""


def _filled(values: Mapping[str, object], defaults: Mapping[str, object]) -> dict[str, object]:
    """The values, and the defaults of those that are not given."""
    filled = {**defaults, **values}
    for name, default in defaults.items():
        own = values.get(name)
        if isinstance(default, Mapping) and isinstance(own, Mapping):
            filled[name] = _filled(own, default)
    return filled


class SplitConfig(Section):
    """GearNN's Algorithm 1 over a set of distortion levels."""

    name: SafeName = "drn22-scenes-jpeg"
    """name of the release in the store"""
    store: str = "artifacts"
    """where the release is stored: a local path or a pyarrow.fs URI such as s3://bucket/prefix"""
    task: Literal["segmentation", "detection"] = "segmentation"
    """what the network predicts: segmentation, a class for each pixel; detection, boxes, and masks if network and data have them.
    Default: that of the data or of the built-in network. Each task has defaults of its own (docs/detection.md)"""
    levels: LevelNames = ("jpeg-10", "jpeg-20", "jpeg-40", "jpeg-80")
    """distortion levels (docs/levels.md): jpeg-Q, brightness-B, h264-WxH, h264-crfC, clean and more, and combinations with +"""
    budget: Budget = "0.2%"
    """M of Eq. (2), the size of each adaptor: a share of the model size such as 0.2%, a number of floats, or of bytes such as
    127256B; with selection.problem one-memory the size of all adaptors together"""
    seed: int = Field(0, ge=0, lt=2**32)
    """seed for the order and the crops of the images in every fine-tune"""
    tags: tuple[SafeName, ...] = ()
    """further tags of the release, beside latest"""
    keep_full: bool = False
    """also store the fully fine-tuned networks; the release lists their digests"""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    recipe: Recipe = Recipe()
    sensitivity: SensitivityConfig = SensitivityConfig()
    selection: SelectionConfig = SelectionConfig()
    base_recipe: BaseRecipe = BASE_RECIPE
    """how the base is trained if no weights are given"""
    resources: ResourcesConfig = ResourcesConfig()

    @classmethod
    def _preset(cls, values: object) -> object:
        """Replace `preset`, which is no field, by the values that it stands for."""
        if not isinstance(values, dict) or "preset" not in values:
            return values
        given = dict(values)
        name = given.pop("preset")
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"the preset {name!r} is unknown: expected {' or '.join(PRESETS)}")
        return _filled(given, PRESETS[name])

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, values: object) -> object:
        values = cls._preset(values)  # first, because it may name the task
        if not isinstance(values, dict):
            return values
        data, model = (values.get(section) for section in ("data", "model"))
        kind = data.get("kind", "scenes") if isinstance(data, dict) else "scenes"
        network = model.get("name") if isinstance(model, dict) else None
        task = values.get("task") or task_of_options(kind, network)
        values = _filled({**values, "task": task}, DETECTION if task == "detection" else {})
        own_network = isinstance(model, dict) and {"name", "weights", "start"} & model.keys()
        if task == "segmentation" and kind == "scenes" and not own_network:
            values = _filled(values, SCENES)
        return _filled(values, FOOTAGE if kind == "footage" else {})

    @model_validator(mode="after")
    def _labels_where_they_are_needed(self) -> "SplitConfig":
        if self.data.kind == "footage" and self.recipe.objective != "teacher":
            raise ValueError(
                f"recipe.objective is {self.recipe.objective} and footage has no labels: give teacher, which is the default there"
            )
        return self

    @model_validator(mode="after")
    def _network_of_the_task(self) -> "SplitConfig":
        own = task_of_network(self.model.name)
        if own is not None and own != self.task:
            raise ValueError(f"the task is {self.task} and the network {self.model.name} is for {own}: give another of the two")
        check_arguments(self.model.name, self.model.arguments)
        if self.model.pad_to is not None and self.task != "segmentation":
            raise ValueError("model.pad_to is given and detectors take images of any size: leave it out")
        return self

    @field_validator("levels")
    @classmethod
    def _one_or_more(cls, levels: tuple[str, ...]) -> tuple[str, ...]:
        if not levels:
            raise ValueError("no level is given: expected at least one, such as jpeg-10")
        if set(levels) == {"clean"}:
            raise ValueError("levels has only clean, where nothing is adapted: name at least one distorted level")
        return levels

    @model_validator(mode="after")
    def _no_longer_than_the_recipe(self) -> "SplitConfig":
        short = self.sensitivity.epochs
        if short is not None and short > self.recipe.epochs:
            raise ValueError(f"sensitivity.epochs is {short:g} and recipe.epochs {self.recipe.epochs}: expected at most as many")
        if short is not None and self.keep_full:
            raise ValueError("keep_full and sensitivity.epochs are both given: only whole fine-tunes can be kept, leave out one")
        return self

    @model_validator(mode="after")
    def _an_image_for_every_worker(self) -> "SplitConfig":
        # the base is trained by one process
        workers, images = self.resources.workers_per_level, self.recipe.batch_size
        if workers > images:
            raise ValueError(
                f"resources.workers_per_level is {workers} and recipe.batch_size {images}: expected at most one worker per "
                "image of a step, lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _levels_of_a_joint_problem(self) -> "SplitConfig":
        selection, distorted = self.selection, [name for name in self.levels if not parse_level(name).is_clean]
        unknown = next((name for name in selection.frequencies if name not in self.levels), None)
        if unknown is not None:
            raise ValueError(f"selection.frequencies has {unknown}, which levels has not: add it there or take it out here")
        missing = next((n for n in distorted if selection.frequencies and n not in selection.frequencies), None)
        if missing is not None:
            raise ValueError(f"selection.frequencies lacks {missing}: give one for every distorted level, 0 is allowed")
        if selection.is_joint and not sum(selection.frequencies.get(name, 1.0) for name in distorted):
            raise ValueError(
                f"selection.problem is {selection.problem} and no distorted level occurs: name one in levels, with a frequency "
                "above 0"
            )
        return self

    def resolved_data_options(self) -> dict[str, Any]:
        """Options of the data set's kind, for `open_dataset`."""
        if self.data.kind == "scenes":
            return self.data.scenes.model_dump()
        if self.data.kind == "footage":
            return {"num_classes": self.data.num_classes, **self.data.footage.model_dump()}
        return {"num_classes": self.data.num_classes} if self.data.kind == "folder" else {}
