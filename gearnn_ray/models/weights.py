"""Reads weights files and loads them into a network. No file can run code: pickles are read with `weights_only=True`, and objects
of most other classes, such as the arguments of a training script, are skipped without importing theirs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from gearnn_ray.core.errors import UserError
from gearnn_ray.models.names import INDEX, check_weights_path, parts_of, weights_file

# keys under which training scripts save a state dict
_WRAPPERS = ("state_dict", "model", "model_state_dict", "network", "net")
_COMPILED = "_orig_mod."  # what torch.compile puts before the names inside a module
_AUXILIARY = "aux_classifier."  # torchvision's second head, which its published files have and only training uses


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a weights file by state-dict name, and its metadata."""

    state: Mapping[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)


def read_weights(path: str | Path) -> WeightsFile:
    """Read a `.safetensors` file, one of torch's (`.pt`, `.pth`, `.bin`, `.ckpt`), or all parts that an `.index.json` names; of a
    folder, the file that transformers keeps its weights in. Names lose `module.` (DataParallel) and `_orig_mod.` (torch.compile).
    A state dict nested under a usual key is found. `about` merges the JSON objects in the metadata of a safetensors file. Raises
    UserError for a missing or unreadable file and for one without a state dict.
    """
    state: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for file in _files(path):
        part = _read_safetensors(file) if file.suffix == ".safetensors" else WeightsFile(_read_torch(file))
        state |= part.state
        about |= part.about
    return WeightsFile(_plain_names(state), about)


def digest_of_weights(path: str | Path) -> str:
    """SHA-256 of the file, in hex; of all files, where it has parts. Raises UserError as `read_weights` does."""
    files = _files(path)
    digests = [hashlib.sha256(file.read_bytes()) for file in files]
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def _files(path: str | Path) -> list[Path]:
    """The files that hold the tensors."""
    file = weights_file(Path(path))
    check_weights_path(file)
    return parts_of(file) if file.name.endswith(INDEX) else [file]


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
    return WeightsFile(state, about)


class _Skipped:
    """Stands for whatever object of a foreign class a checkpoint holds, and keeps nothing of it."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __new__(cls, *_: object, **__: object) -> "_Skipped":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None: ...


def _read_torch(path: Path) -> dict[str, Tensor]:
    skipped: list[str] = []
    try:
        try:
            skipped = sorted(get_unsafe_globals_in_checkpoint(path))
        except (ValueError, RuntimeError):  # torch's format before 1.6: such a file is read if it holds nothing foreign
            skipped = []
        # the name of the class is all that is looked at: none is imported
        stands_for = [(type("_Skipped", (_Skipped,), {}), name) for name in skipped]
        with safe_globals(stands_for):  # type: ignore[arg-type]
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, KeyError…
        raise _not_opened(path) from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if isinstance(loaded, dict):  # a state dict's extra state is no tensor
        loaded = {name: value for name, value in loaded.items() if not isinstance(value, _Skipped)}
    if isinstance(loaded, dict) and loaded and all(isinstance(v, Tensor) for v in loaded.values()):
        return loaded
    if skipped:
        raise _not_opened(path)
    raise UserError(f"{path} holds no state dict: expected a mapping of names to tensors")


def _not_opened(path: Path) -> UserError:
    return UserError(
        f"{path} holds something other than plain tensors (a pickle, or a damaged file) and is not opened: "
        "save its state_dict() with torch.save or as .safetensors"
    )


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    return _within(state, "module.") if state and all(name.startswith("module.") for name in state) else state


def _within(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names have the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def start_from(model: nn.Module, weights: WeightsFile, source: str) -> int:
    """Put the tensors of a file, or of one part of it (`model.`), into the network, or into the part of it that has most of them
    (a backbone), wherever name and shape are the same. Returns how many. `source` names the file in errors. Raises UserError if
    fewer than half of the file's tensors fit, or one of them is not finite.
    """
    expected, given = model.state_dict(), _todays_names(model, weights.state)
    prefixes = ("", *(f"{path}." for path, _ in model.named_modules() if path))

    def fitting(prefix: str, part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {f"{prefix}{name}": tensor for name, tensor in part.items()}
        return {n: t for n, t in named.items() if n in expected and expected[n].shape == t.shape and t.numel() > 1}

    inside = [_within(given, f"{first}.") for first in dict.fromkeys(name.partition(".")[0] for name in given)]
    taken = max((fitting(prefix, part) for part in (given, *inside) for prefix in prefixes), key=len)
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


def _of_this_network(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """The tensors of a file behind the prefix, such as Lightning's `model.`, behind which it has all of the network's; without an
    auxiliary head that the network was built without. Raises UserError where that is true of several prefixes.
    """
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    if needed and not given.keys() >= set(needed):
        ends = sorted(name for name in given if name.endswith(f".{needed[0]}"))
        inside = {prefix: _within(given, prefix) for prefix in (name.removesuffix(needed[0]) for name in ends)}
        whole = {prefix: part for prefix, part in inside.items() if part.keys() >= set(needed)}
        if len(whole) > 1:
            raise UserError(
                f"{source} has all weights of the network {len(whole)} times, behind {' and '.join(whole)}: save the one that "
                "is meant"
            )
        given = next(iter(whole.values()), given)
    auxiliary = any(name.startswith(_AUXILIARY) for name in expected)
    return given if auxiliary else {name: tensor for name, tensor in given.items() if not name.startswith(_AUXILIARY)}


def _check_finite(name: str, tensor: Tensor, source: str) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise UserError(
            f"{name!r} in the weights file {source} holds values that are not finite: give weights that were trained to the end"
        )


def load_weights(model: nn.Module, weights: WeightsFile, source: str) -> None:
    """Load `weights` into `model`, in its floating-point types. `source` names the file in errors. `num_batches_tracked` may be
    missing (before torch 0.4.1). All names may stand behind one prefix, and torchvision's auxiliary head may be there. Raises
    UserError for a tensor that is missing, extra, misshapen or not finite.
    """
    expected = model.state_dict()
    given = _of_this_network(expected, _todays_names(model, weights.state), source)
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
