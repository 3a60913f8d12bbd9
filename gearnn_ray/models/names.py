"""Names of networks and of weights files. Checking one imports neither torch nor the module that a name is in."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gearnn_ray.config.catalogue import BUILT_IN
from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.level import parse_level
from gearnn_ray.levels.own import Own

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def check_weights_path(path: Path) -> None:
    """Raise UserError unless there is a file that ends, and if it is safetensors begins, like a weights file."""
    if not path.is_file():
        raise UserError(f"there is no weights file {path}: give the path of a .safetensors, .pt or .pth file")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise UserError(f"{path} ends in {path.suffix or 'nothing'!r}: expected a .safetensors, .pt or .pth weights file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file ({error}): write it again or give another") from error


def check_name(name: str) -> None:
    """Raise UserError unless `name` is a built-in network or has the form of an import path."""
    if name not in BUILT_IN and not IMPORT_PATH.fullmatch(name):
        raise UserError(
            f"there is no network {name!r}: expected {', '.join(BUILT_IN)} or an import path like package.module:function"
        )


def check_released_name(name: str, trust: Collection[str]) -> None:
    """Raise UserError unless the network that a release names is built in, or its module is in `trust` or below one of these.

    Importing a module runs its code, and anybody who can write to the store can write a release.
    """
    check_name(name)
    module, _, function = name.partition(":")
    if function and not is_trusted(module, trust):
        raise UserError(
            f"the release names the network {name!r}, and only built-in networks load by themselves: "
            f'if you trust the code of {module}, give trust=("{module}",) in Python or --trust {module} on the command line'
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
