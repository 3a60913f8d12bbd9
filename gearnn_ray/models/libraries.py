"""Segmentation networks of installed libraries by name: `torchvision:NAME`, `timm:NAME`, `smp:NAME` and `hf:FOLDER_OR_ID`.

They are built without weights and without a download: weights come from the job's file. A library is imported only when a
network of it is built. Each is an extra of this package, except torchvision.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gearnn_ray.config.catalogue import LIBRARIES, missing_library
from gearnn_ray.core.errors import UserError

# they name code, places, the precision of somebody's weights, or the version that wrote them
_NOT_RELEASED = (
    "auto_map", "attn_implementation", "_attn_implementation", "_name_or_path", "dtype", "torch_dtype", "transformers_version",
)  # fmt: skip


def build(name: str, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """The network `name`, which has a prefix of `LIBRARIES`, freshly initialised. Raises UserError for a library that is not
    installed, an unknown name, and an argument that would fetch weights; and whatever the library raises.
    """
    prefix, _, own = name.partition(":")
    return _BUILDERS[prefix](_library(name), own, num_classes, arguments)


def _library(name: str) -> Any:
    library = LIBRARIES[name.partition(":")[0]]
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise missing_library(name) from error


def _torchvision(torchvision: Any, name: str, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    models = torchvision.models
    known = models.list_models(module=models.segmentation)
    if name not in known:
        raise UserError(f"torchvision has no segmentation network {name!r}: expected one of {', '.join(known)}")
    network: nn.Module = models.get_model(name, weights=None, weights_backbone=None, num_classes=num_classes, **arguments)
    return network


def _timm(timm: Any, name: str, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name):  # which a name with a place, such as hf-hub:, is not
        near = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:5])
        raise UserError(
            f"timm has no network {name!r}: expected one of timm.list_models()" + (f", such as {near}" if near else "")
        )
    _leave_out(arguments, ("pretrained", "checkpoint_path", "pretrained_cfg", "features_only", "num_classes"))
    options = {"pretrained": False, "features_only": True, **arguments}
    try:
        encoder = timm.create_model(name, feature_cls="getter", **options)  # keeps the names of the published weights
    except (AttributeError, AssertionError, RuntimeError):
        encoder = timm.create_model(name, **options)
    return SkipConnected(encoder, encoder.feature_info.channels(), num_classes)


def _smp(smp: Any, name: str, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    known = smp.MODEL_ARCHITECTURES_MAPPING
    if name.lower() not in known:
        raise UserError(f"segmentation_models_pytorch has no {name!r}: expected one of {', '.join(known)}")
    _leave_out(arguments, ("encoder_weights", "classes"))
    network: nn.Module = smp.create_model(name, encoder_weights=None, classes=num_classes, **arguments)
    return network


def _leave_out(arguments: Mapping[str, Any], fixed: tuple[str, ...]) -> None:
    if given := next((name for name in fixed if name in arguments), None):
        raise UserError(
            f"model.arguments has {given!r}, which the job sets itself: leave it out, and give weights in model.weights"
        )


class SkipConnected(nn.Module):
    """A segmentation network of any encoder: a 1x1 convolution to logits on each of its feature maps, from fine to coarse, which
    are resized to the finest map and added (Long et al., "Fully Convolutional Networks", CVPR 2015).
    """

    def __init__(self, encoder: nn.Module, channels: list[int], num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Conv2d(each, num_classes, 1) for each in channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        finest: Tensor
        finest, *coarser = (head(features) for head, features in zip(self.heads, self.encoder(x_BCHW), strict=True))
        for logits in coarser:
            finest = finest + F.interpolate(logits, size=finest.shape[-2:], mode="bilinear", align_corners=False)
        return finest


@dataclass(frozen=True)
class Resolved:
    """Name and arguments from which the same network is built on any machine. about: `mean` and `std` of its input, if known."""

    name: str
    arguments: Mapping[str, Any]
    about: Mapping[str, object] = field(default_factory=dict)


def resolved(name: str, arguments: Mapping[str, Any]) -> Resolved:
    """For `hf:` the configuration in the folder becomes an argument; all other names stay as they are.

    Raises UserError for a folder or identifier whose configuration is not on this machine.
    """
    if not name.startswith("hf:") or "config" in arguments:
        return Resolved(name, arguments)
    transformers, source = _library(name), name.partition(":")[2]
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False, **arguments)
    except Exception as error:  # OSError, ValueError, and errors of the hub's client
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"transformers finds no configuration of {source!r} on this machine ({reason}…): give a folder with config.json, or "
            f"download it first with `hf download {source}`"
        ) from error
    told = {key: value for key, value in json.loads(config.to_json_string()).items() if key not in _NOT_RELEASED}
    return Resolved(f"hf:{config.model_type}", {"config": json.dumps(told, sort_keys=True)}, _preprocessing(source))


def _preprocessing(source: str) -> Mapping[str, object]:
    """What the preprocessor's file in a folder says of `mean` and `std`; nothing where there is none."""
    try:
        about = json.loads((Path(source) / "preprocessor_config.json").read_text())
        return {"mean": about["image_mean"], "std": about["image_std"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _hf(transformers: Any, name: str, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    given = json.loads(resolved(f"hf:{name}", arguments).arguments["config"])
    told = {key: value for key, value in given.items() if key not in _NOT_RELEASED}
    told |= {"num_labels": num_classes, "id2label": None, "label2id": None, "use_pretrained_backbone": False}
    config = transformers.AutoConfig.for_model(told.pop("model_type"), **told)
    network: nn.Module = transformers.AutoModelForSemanticSegmentation.from_config(config, trust_remote_code=False)
    network.__class__ = _with_renamed_files(type(network), transformers.utils.logging)
    return network


def _with_renamed_files(own: Any, logging: Any) -> type[nn.Module]:
    """A subclass of transformers' class `own` whose files load under the names that they had in older versions, too."""

    def renamed_published(self: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with _quiet(logging):
            loaded, about = own.from_pretrained(
                None, config=self.config, state_dict=dict(state), ignore_mismatched_sizes=True, output_loading_info=True
            )
        found = {name: tensor for name, tensor in loaded.state_dict().items() if name not in about["missing_keys"]}
        # what has no place, or another shape, is for the caller to name
        misshapen = {name: torch.zeros(shape) for name, shape, _ in about["mismatched_keys"]}
        return {**found, **misshapen, **{name: state[name] for name in about["unexpected_keys"] if name in state}}

    return type(own.__name__, (own,), {"renamed_published": renamed_published, "__module__": own.__module__})


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Meanwhile transformers shows no progress and prints no report, because what is missing becomes an error of ours."""
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


_BUILDERS: dict[str, Callable[[Any, str, int, Mapping[str, Any]], nn.Module]] = {
    "torchvision": _torchvision, "timm": _timm, "smp": _smp, "hf": _hf,
}  # fmt: skip
