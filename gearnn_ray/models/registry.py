"""Networks by name: the built-in ones, those of installed libraries, and the user's own by import path."""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping

from torch import nn

from gearnn_ray.config.catalogue import BUILT_IN, TORCHVISION_DETECTORS, check_arguments, library_of
from gearnn_ray.core.errors import UserError
from gearnn_ray.models.libraries import build as build_of_library
from gearnn_ray.models.names import check_name, check_released_name
from gearnn_ray.models.segmenter import padded

Argument = int | float | bool | str


def build_model(
    name: str, num_classes: int, arguments: Mapping[str, Argument] | None = None, pad_to: int | None = None
) -> nn.Module:
    """The network `name`, freshly initialised: a built-in one, one of an installed library (`models.libraries`), or
    `package.module:function`. An import path is imported, so it must come from the user; use `build_released_model` for a name in
    a manifest. The function gets `num_classes=` if it takes it, and `arguments`. For segmentation it returns a Module that maps
    normalised float images [B, 3, H, W] to logits [B, num_classes, h, w] in a form of `models.segmenter`; for detection one as in
    `gearnn_ray.models.detector`. pad_to: what the sides of its images must be multiples of, to which others are then padded.
    Raises UserError if there is no such network or it cannot be built.
    """
    check_name(name)
    check_arguments(name, arguments or {})
    if name in TORCHVISION_DETECTORS:
        from gearnn_ray.models.torchvision_detectors import build  # takes a second to import

        return build(name, num_classes, **(arguments or {}))  # type: ignore[arg-type]
    try:
        make: Callable[..., object] = build_of_library if library_of(name) else _by_import_path
        model = make(name, num_classes, arguments or {})
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"building the network {name!r} failed with {type(error).__name__}: {_reason(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name!r} returned a {type(model).__name__}: expected a torch.nn.Module")
    return model if pad_to is None else padded(model, pad_to)


def _by_import_path(name: str, num_classes: int, arguments: Mapping[str, Argument]) -> object:
    if name in BUILT_IN:
        name = f"gearnn_ray.models.{BUILT_IN[name]}:{name}"
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        parameters = inspect.signature(function).parameters.values()
    except Exception as error:  # importing runs the module, which may raise anything
        raise UserError(
            f"the network {name!r} cannot be imported ({_reason(error)}): check the path and that the module is installed"
        ) from error
    options: dict[str, object] = {**arguments}
    if any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters):
        options["num_classes"] = num_classes
    if any(p.name == "weights_backbone" for p in parameters):
        options["weights_backbone"] = None  # torchvision would download weights, which the weights file replaces
    return function(**options)


def build_released_model(
    name: str,
    num_classes: int,
    trust: Collection[str] = (),
    arguments: Mapping[str, Argument] | None = None,
    pad_to: int | None = None,
) -> nn.Module:
    """`build_model` for a name in a release's manifest. It imports only the modules in `trust`, such as "my_package.nets", and
    modules below these; raises UserError for any other, before importing anything.
    """
    check_released_name(name, trust)
    return build_model(name, num_classes, arguments, pad_to)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
