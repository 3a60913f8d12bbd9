"""Networks: DRN-D-22 and DRN-D-38, any of the user's own by import path, and the files their weights come in.

Weights are read without ever unpickling code: `.safetensors`, or `.pt`/`.pth` with `weights_only=True`.
"""

import importlib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gearnn_ray.core.errors import UserError
from gearnn_ray.models.drn import drn_d_22, drn_d_38

_BUILTIN = {"drn_d_22": drn_d_22, "drn_d_38": drn_d_38}
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
# containers that training scripts put a state dict into
_WRAPPERS = ("state_dict", "model", "model_state_dict")


def build_model(name: str, num_classes: int) -> nn.Module:
    """The network `name`, freshly initialised: `drn_d_22`, `drn_d_38`, or `package.module:function`.

    A function of the user's is called with `num_classes=` if it takes it; it returns a Module that maps normalised
    float images [B, 3, H, W] to logits [B, num_classes, h, w] (or a dict with them under "out", as torchvision's do).
    Raises UserError when there is no such network.
    """
    if name in _BUILTIN:
        return _BUILTIN[name](num_classes)
    if not _IMPORT_PATH.fullmatch(name):
        raise UserError(
            f"there is no network {name!r}: expected drn_d_22, drn_d_38 or an import path like package.module:function"
        )
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the network {name!r} cannot be imported ({error}): check the path and that the module is installed"
        ) from error
    parameters = inspect.signature(function).parameters.values()
    options: dict[str, Any] = {}
    if any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters):
        options["num_classes"] = num_classes
    if any(p.name == "weights_backbone" for p in parameters):
        options["weights_backbone"] = None  # torchvision would download one: the weights are the weights file's
    try:
        model = function(**options)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"building the network {name!r} failed with {type(error).__name__}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name!r} returned a {type(model).__name__}: expected a torch.nn.Module")
    return model


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of a weights file under state-dict names, and what its metadata says of it."""

    state: Mapping[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)


def read_weights(path: str | Path) -> WeightsFile:
    """Read `.safetensors`, or `.pt`/`.pth` without unpickling code.

    A `module.` prefix (DataParallel) is taken off, and a state dict nested under the usual names is found. `about` is the
    metadata of a safetensors file, its values read as JSON where they are. Raises UserError for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weights file {path}: give the path of a .safetensors, .pt or .pth file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth"):
        return WeightsFile(_read_torch(path))
    raise UserError(f"{path} ends in {path.suffix or 'nothing'!r}: expected a .safetensors, .pt or .pth weights file")


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            raw: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}): write it again or give another"
        ) from error
    about: dict[str, Any] = {}
    for value in raw.values():
        try:
            parsed = json.loads(value)
        except ValueError:
            continue
        if isinstance(parsed, dict):
            about.update(parsed)
    return WeightsFile(_plain_names(state), about)


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises UnpicklingError, RuntimeError, EOFError, KeyError… for what it will not read
        raise UserError(
            f"{path} holds something other than plain tensors (a pickle, or a damaged file) and is not opened: "
            "save its state_dict() with torch.save or as .safetensors"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"{path} holds no state dict: expected a mapping of names to tensors")
    return _plain_names(loaded)


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrapped = bool(state) and all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}


def load_weights(model: nn.Module, weights: WeightsFile, source: str) -> None:
    """Fill `model` from `weights`; floats of any width become the network's own.

    `num_batches_tracked` may be missing (checkpoints from before torch 0.4.1). Raises UserError naming the first
    missing, extra or misshapen tensor, or one that holds NaN or infinity; the model is untouched then.
    """
    expected = model.state_dict()
    given = dict(weights.state)
    missing = [n for n in expected if n not in given and not n.endswith("num_batches_tracked")]
    extra = [n for n in given if n not in expected]
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which the network has not"
        count = f" ({len(missing)} missing, {len(extra)} extra tensors)"
        raise UserError(
            f"the weights file {source} {what}{count}: expected the weights of this network, with as many classes"
        )
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{name!r} in the weights file {source} has the shape {list(tensor.shape)}: "
                f"expected {list(expected[name].shape)}, so give the weights of this network with as many classes"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{name!r} in the weights file {source} holds values that are not finite: "
                "give weights that were trained to the end"
            )
    model.load_state_dict({n: t.to(expected[n].dtype) for n, t in given.items()}, strict=False)
