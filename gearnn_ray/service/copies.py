"""Copies of the releases that a node serves, on its own disk: a replica that starts while the store is away, or while the newest
release is corrupt, serves the last release of its bundle that could be loaded.

    <folder>/<digest of the manifest>/   a store with one release, so that every digest is verified when it is read
    <folder>/last/<store and bundle>     which release that was: "name@sha256:…"
"""

import hashlib
import logging
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from gearnn_ray.core.errors import UserError
from gearnn_ray.store.releases import Store

__all__ = ["Copies"]

_MOST = 16  # releases of all services of this user on this node; the one that was kept or read least recently is deleted
_LOG = logging.getLogger("ray.serve")  # Ray Serve writes this log to a file of the replica


class Copies:
    """The copies of the releases of one store."""

    def __init__(self, folder: str, store: str, require_signature: str | None = None) -> None:
        """folder: of the copies. require_signature: as in `Store.pull`."""
        self._folder, self._store, self._key = Path(os.path.expanduser(folder)), store, require_signature

    def keep(self, bundle: str, release: str) -> None:
        """Copy the release "name@sha256:…" as the last good one of a bundle. A failure is logged: the service does without."""
        try:
            self._folder.mkdir(0o700, parents=True, exist_ok=True)
            copy = self._copy(release)
            Store(self._store).copy_to(Store(copy), release, self._key)
            last = self._last(bundle)
            last.parent.mkdir(exist_ok=True)
            unfinished = last.with_name(f"{last.name}.{os.getpid()}")
            unfinished.write_text(release)
            unfinished.replace(last)
            os.utime(copy)
            self._forget_others()
        except (OSError, UserError) as error:
            _LOG.warning("no copy of %s could be kept in %s: %s", release, self._folder, error)

    def last(self, bundle: str) -> tuple[str, str] | None:
        """The copy of a bundle's last good release, not verified yet: its address and "name@sha256:…". None if there is none."""
        with suppress(OSError, UnicodeDecodeError):
            release = self._last(bundle).read_text()
            if re.fullmatch(r"[^@/]{1,128}@sha256:[0-9a-f]{64}", release):
                copy = self._copy(release)
                os.utime(copy)
                return str(copy), release
        return None

    def _copy(self, release: str) -> Path:
        return self._folder / release.rpartition(":")[2]

    def _last(self, bundle: str) -> Path:
        return self._folder / "last" / hashlib.sha256(f"{self._store}\n{bundle}".encode()).hexdigest()[:32]

    def _forget_others(self) -> None:
        """Delete the oldest copies beyond `_MOST`, and the names of bundles that were not kept for as long."""
        for folder, pattern in ((self._folder, "[0-9a-f]" * 64), (self._folder / "last", "[0-9a-f]" * 32)):
            for path in sorted(folder.glob(pattern), key=_changed, reverse=True)[_MOST:]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another replica has deleted it
        return time.time()
