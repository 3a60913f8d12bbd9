"""A bounded cache of images: entries that nobody has used for long go, and beyond a size those that were used longest ago.

An entry is made again where it is needed, so a limit costs time and no result. A job that has opened an entry keeps its pixels,
but a process that it starts later opens the folder again: only entries that nobody has opened within the grace period are
deleted.
"""

import fcntl
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gearnn_ray.core.errors import UserError

_ENTRY = re.compile(r"[0-9a-f]{64}(\.[^/]+\.building)?")  # finished, or left unfinished by a killed process


@dataclass(frozen=True)
class _Entry:
    folder: Path
    bytes: int
    used: float

    @property
    def finished(self) -> bool:
        return not self.folder.name.endswith(".building")


def limit_cache(cache: Path, grace_seconds: float, max_age_seconds: float, max_bytes: float, dry_run: bool = True) -> list[str]:
    """Delete entries that were not used for `max_age_seconds`, then, while the others hold more than `max_bytes`, those that were
    used longest ago; none that was used within `grace_seconds`. Unfinished entries go after the grace period. Returns a line for
    each, with its bytes; with `dry_run` nothing is deleted. Raises UserError if the folder cannot be read or written.
    """
    now = time.time()
    try:
        entries = sorted(_entries(cache), key=lambda entry: entry.used)
        total, gone = sum(entry.bytes for entry in entries), list[str]()
        for entry in entries:
            age = now - entry.used
            if age < grace_seconds or (entry.finished and age < max_age_seconds and total <= max_bytes):
                continue
            if dry_run or _delete(entry, now - grace_seconds):
                total -= entry.bytes
                gone.append(f"{entry.folder}: {entry.bytes:,} bytes")
    except OSError as error:
        raise UserError(
            f"the cache folder {cache} cannot be cleared ({error.strerror}): check the path and your permissions"
        ) from error
    return gone


def _entries(cache: Path) -> Iterator[_Entry]:
    for folder in cache.iterdir() if cache.exists() else ():
        if not _ENTRY.fullmatch(folder.name):
            continue
        with suppress(FileNotFoundError):  # finished, or deleted by another process
            files = [file.stat() for file in folder.iterdir()]
            used = max([folder.stat().st_mtime, *(file.st_mtime for file in files)])
            yield _Entry(folder, sum(file.st_size for file in files), used)


def _delete(entry: _Entry, limit: float) -> bool:
    """Delete an entry that is not being made and was not used meanwhile. Its name goes first, so that nobody opens half of it."""
    with _alone(entry.folder) as alone, suppress(FileNotFoundError):
        if not alone or entry.folder.stat().st_mtime >= limit:
            return False
        doomed = entry.folder.with_name(f"{entry.folder.name}.gone.building")
        entry.folder.rename(doomed)
        shutil.rmtree(doomed)
        return True
    return False


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no process of this host makes the entry; none begins while this is held. The lock is that of `data.cache`."""
    with folder.with_name(f"{folder.name[:64]}.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
