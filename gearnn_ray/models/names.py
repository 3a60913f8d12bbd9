"""Names of networks and of weights files. Checking one imports neither torch nor the module that a name is in."""

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gearnn_ray.config.catalogue import BUILT_IN, LIBRARIES, library_of
from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.level import parse_level
from gearnn_ray.levels.own import Own

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


INDEX = ".index.json"
"""How the name of a file ends that lists the parts of a large weights file (transformers' sharded files)."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_EXPECTED = f"a {', '.join(_SUFFIXES)} or {INDEX} file"


def weights_file(path: Path) -> Path:
    """The path; of a folder of transformers, the file in it that holds or lists the weights. Raises UserError if none does."""
    if not path.is_dir():
        return path
    usual = [path / f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX)]
    if (found := next((file for file in usual if file.is_file()), None)) is None:
        raise UserError(f"the folder {path} has none of {', '.join(file.name for file in usual)}: give a weights file")
    return found


def parts_of(index: Path) -> list[Path]:
    """The files that an `.index.json` lists, each once, in order of their names. Raises UserError unless all stand beside it."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        parts = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} lists no parts of a weights file under weight_map: give another file") from error
    for part in parts:
        if part.name.endswith(INDEX):
            raise UserError(f"{index} lists {part.name}, another list of parts: expected weights files")
        if part.parent != index.parent or not part.is_file():
            raise UserError(f"{index} lists {part.name}, which is not beside it: copy it there")
    return parts


def check_weights_path(path: Path) -> None:
    """Raise UserError unless there is a file that ends, and if it is safetensors begins, like a weights file; or a folder or an
    index that leads to such files.
    """
    path = weights_file(path)
    if not path.is_file():
        raise UserError(f"there is no weights file {path}: give the path of {_EXPECTED}")
    if path.name.endswith(INDEX):
        for part in parts_of(path):
            check_weights_path(part)
        return
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'!r}: expected {_EXPECTED}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file ({error}): write it again or give another") from error


def check_name(name: str) -> None:
    """Raise UserError unless `name` is a built-in network or has the form of an import path, or of a name in a library."""
    if library_of(name):
        if name.endswith(":") or name != name.strip():
            raise UserError(f"the network {name!r} names none of the library's: expected a name behind the colon")
    elif name not in BUILT_IN and not IMPORT_PATH.fullmatch(name):
        raise UserError(
            f"there is no network {name!r}: expected {', '.join(BUILT_IN)}, a network of a library such as "
            f"{', '.join(f'{prefix}:NAME' for prefix in LIBRARIES)}, or an import path like package.module:function"
        )


def check_released_name(name: str, trust: Collection[str]) -> None:
    """Raise UserError unless the network that a release names is built in, or its module is in `trust` or below one of these.

    Importing a module runs its code, and anybody who can write to the store can write a release. torchvision is imported anyway,
    and its segmentation networks take no argument that could do more than build them. The other libraries take many, some of
    which read files or fetch from the network, so that their prefix must be in `trust`, too: `smp` for `smp:unet`.
    """
    check_name(name)
    if name.startswith("torchvision:"):
        return
    module, _, function = name.partition(":")
    if function and not is_trusted(module, trust):
        raise UserError(
            f"the release names the network {name!r}, and only built-in networks load by themselves: "
            f"if you trust the code of {LIBRARIES.get(module, module)}, give "
            f'trust=("{module}",) in Python or --trust {module} on the command line'
        )


def check_released_levels(levels: Iterable[str], trust: Collection[str]) -> None:
    """Raise UserError unless every level of the user's own that a release names is in a module of `trust`. Imports nothing."""
    for level in levels:
        for part in parse_level(level).parts:
            if isinstance(part, Own) and not is_trusted(part.module, trust):
                raise UserError(
                    f"the release has the level {level}, whose images only the code of {part.module} can make: "
                    f"if you trust it, give --trust {part.module}"
                )


def is_trusted(module: str, trust: Collection[str]) -> bool:
    """Whether a module is in `trust` or below one of these."""
    trusted = (trust,) if isinstance(trust, str) else trust
    return any(module == each or module.startswith(f"{each}.") for each in trusted)
