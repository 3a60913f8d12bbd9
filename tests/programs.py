"""Optional programs that tests use."""

import functools
import shutil
import subprocess

__all__ = ["installed"]


@functools.cache
def installed(name: str, product: str, option: str = "--version") -> str | None:
    """Path of a program that names the product when it is asked for its version; else None.

    Programs of other makers may have the same name: `convert` is not always ImageMagick's.
    """
    path = shutil.which(name)
    if path is None:
        return None
    try:
        done = subprocess.run([path, option], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return path if done.returncode == 0 and product in done.stdout + done.stderr else None
