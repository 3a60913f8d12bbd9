"""Names of releases, and references to them: name, name:tag or name@sha256:…"""

import re
from typing import Annotated

from pydantic import AfterValidator

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def full_reference(release: str) -> str:
    """The reference in its one spelling: name:tag (`latest` where no tag is given) or name@sha256:…

    Raises ValueError for anything else.
    """
    name, pinned, digest = release.partition("@")
    if not pinned:
        name, tagged, tag = release.partition(":")
        tag = tag if tagged else "latest"
    if SAFE_NAME.fullmatch(name) and (re.fullmatch("sha256:[0-9a-f]{64}", digest) if pinned else SAFE_NAME.fullmatch(tag)):
        return release if pinned else f"{name}:{tag}"
    raise ValueError(f"{release!r} is no bundle: expected name, name:tag or name@sha256:… with 64 hexadecimal digits")


def _safe_name(name: str) -> str:
    if not SAFE_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no safe name: expected letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    return name


def _module_path(module: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module):
        raise ValueError(f"{module!r} is no import path of a module: expected one such as my_package.nets")
    return module


Reference = Annotated[str, AfterValidator(full_reference)]
SafeName = Annotated[str, AfterValidator(_safe_name)]
TrustedModules = tuple[Annotated[str, AfterValidator(_module_path)], ...]
"""Import paths of modules that a release may name as the home of its network: importing one runs its code."""
