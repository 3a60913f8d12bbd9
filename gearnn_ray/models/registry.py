"""Networks by name: the built-in ones, and the user's own by import path."""

import importlib
import inspect
from collections.abc import Collection, Mapping

from torch import nn

from gearnn_ray.config.catalogue import BUILT_IN, TORCHVISION_DETECTORS, check_arguments
from gearnn_ray.core.errors import UserError
from gearnn_ray.models.names import check_name, check_released_name

Argument = int | float | bool | str


def build_model(name: str, num_classes: int, arguments: Mapping[str, Argument] | None = None) -> nn.Module:
    """The network `name`, freshly initialised: a built-in one, or `package.module:function`. An import path is imported, so it
    must come from the user; use `build_released_model` for a name in a manifest. The function gets `num_classes=` if it takes it,
    and `arguments`. For segmentation it returns a Module that maps normalised float images [B, 3, H, W] to logits
    [B, num_classes, h, w], or to a dict with them under "out", as torchvision's networks do; for detection one as in
    `gearnn_ray.models.detector`. Raises UserError if there is no such network or it cannot be built.
    """
    check_name(name)
    check_arguments(name, arguments or {})
    if name in TORCHVISION_DETECTORS:
        from gearnn_ray.models.torchvision_detectors import build  # takes a second to import

        return build(name, num_classes, **(arguments or {}))  # type: ignore[arg-type]
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
    options: dict[str, object] = {**(arguments or {})}
    if any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters):
        options["num_classes"] = num_classes
    if any(p.name == "weights_backbone" for p in parameters):
        options["weights_backbone"] = None  # torchvision would download weights, which the weights file replaces
    try:
        model = function(**options)
    except Exception as error:
        raise UserError(f"building the network {name!r} failed with {type(error).__name__}: {_reason(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name!r} returned a {type(model).__name__}: expected a torch.nn.Module")
    return model


def build_released_model(
    name: str, num_classes: int, trust: Collection[str] = (), arguments: Mapping[str, Argument] | None = None
) -> nn.Module:
    """`build_model` for a name in a release's manifest. It imports only the modules in `trust`, such as "my_package.nets", and
    modules below these; raises UserError for any other, before importing anything.
    """
    check_released_name(name, trust)
    return build_model(name, num_classes, arguments)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
