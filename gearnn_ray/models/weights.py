"""Reads weights files and loads them into a network. No file can run code: `.pt` and `.pth` are read with `weights_only=True`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gearnn_ray.core.errors import UserError
from gearnn_ray.models.names import check_weights_path

# keys under which training scripts save a state dict
_WRAPPERS = ("state_dict", "model", "model_state_dict")


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a weights file by state-dict name, and its metadata."""

    state: Mapping[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)


def read_weights(path: str | Path) -> WeightsFile:
    """Read a `.safetensors`, `.pt` or `.pth` file, without the prefix `module.` (DataParallel). A state dict nested under a usual
    key is found. `about` merges the JSON objects in the metadata of a safetensors file. Raises UserError for a missing or
    unreadable file and for one without a state dict.
    """
    path = Path(path)
    check_weights_path(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else WeightsFile(_read_torch(path))


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            raw: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): write it again or give another") from error
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
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, KeyError…
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


def start_from(model: nn.Module, weights: WeightsFile, source: str) -> int:
    """Put the tensors of a file into the network, or into the part of it that has most of them (a backbone), wherever name and
    shape are the same. Returns how many. `source` names the file in errors. Raises UserError if fewer than half of the file's
    tensors fit, or one of them is not finite.
    """
    expected, given = model.state_dict(), _todays_names(model, weights.state)
    prefixes = ("", *(f"{path}." for path, _ in model.named_modules() if path))

    def fitting(prefix: str) -> dict[str, Tensor]:
        named = {f"{prefix}{name}": tensor for name, tensor in given.items()}
        return {n: t for n, t in named.items() if n in expected and expected[n].shape == t.shape and t.numel() > 1}

    taken = max(map(fitting, prefixes), key=len)
    whole = sum(tensor.numel() > 1 for tensor in given.values())
    if 2 * len(taken) < whole or not taken:
        raise UserError(
            f"{len(taken)} of the {whole} tensors in the weights file {source} fit this network or a part of it: expected at "
            "least half, so give another file, or none"
        )
    for name, tensor in taken.items():
        _check_finite(name, tensor, source)
    model.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in taken.items()}, strict=False)
    return len(taken)


def _todays_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under today's names, where a network has had others."""
    renamed = getattr(model, "renamed_published", None)
    return dict(state) if renamed is None else renamed(state)


def _check_finite(name: str, tensor: Tensor, source: str) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise UserError(
            f"{name!r} in the weights file {source} holds values that are not finite: give weights that were trained to the end"
        )


def load_weights(model: nn.Module, weights: WeightsFile, source: str) -> None:
    """Load `weights` into `model`, in its floating-point types. `source` names the file in errors. `num_batches_tracked` may be
    missing (before torch 0.4.1). Raises UserError for a tensor that is missing, extra, misshapen or not finite.
    """
    expected = model.state_dict()
    given = _todays_names(model, weights.state)
    missing = [n for n in expected if n not in given and not n.endswith("num_batches_tracked")]
    extra = [n for n in given if n not in expected]
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which the network does not have"
        count = f" ({len(missing)} missing, {len(extra)} extra tensors)"
        raise UserError(f"the weights file {source} {what}{count}: expected the weights of this network, with as many classes")
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{name!r} in the weights file {source} has the shape {list(tensor.shape)}: "
                f"expected {list(expected[name].shape)}, so give the weights of this network with as many classes"
            )
        _check_finite(name, tensor, source)
    model.load_state_dict({n: t.to(expected[n].dtype) for n, t in given.items()}, strict=False)
