"""Files of a local folder: written whole and durably, read only where they are regular files, changed and deleted under a lock.

Every writer that relies on a file which is already there makes it young again (`refresh`), and a collector deletes only files
that are old (`delete_if_older`). Both look at the time and act on it under one lock, so that neither acts on what the other has
changed.
"""

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from gearnn_ray.core.errors import CorruptStoreError

LOCK = ".lock"
"""The file, in a store's folder, whose flock orders writers and collectors. The system releases the lock of a killed process."""

TEMPORARY = ".tmp-"
"""How the names of files begin that a writer has not finished."""

FRESH_SECONDS = 1.0
"""A file that is younger is not refreshed, so that a job that asks for the same file many times touches it once."""

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # of file systems, such as CIFS, that sync no folders


class TooLargeError(CorruptStoreError):
    """A file has more bytes than its reader takes: `size`. It was not read."""

    def __init__(self, message: str, size: int = 0) -> None:
        super().__init__(message)
        self.size = size


def too_large(path: str, size: int, at_most: int) -> TooLargeError:
    message = f"{path} has {size:,} bytes, expected at most {at_most:,}. Remove it, and run the job that writes this file again."
    return TooLargeError(message, size)


def read_regular(path: str, at_most: int | None = None) -> memoryview | None:
    """All bytes of a file in new writable memory, or None if it does not exist. Raises CorruptStoreError, before anything is
    read, if it is no regular file, and TooLargeError if it has more than `at_most` bytes.
    """
    try:
        # Opened without waiting: a FIFO would otherwise hold this process until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket
            raise
        raise CorruptStoreError(_no_file(path, "socket")) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptStoreError(_no_file(path, _kind(status.st_mode)))
        if at_most is not None and status.st_size > at_most:
            raise too_large(path, status.st_size, at_most)
        # Arrow's default pool and NumPy ask for huge pages, and getting those takes longer than the read itself.
        memory = memoryview(pa.allocate_buffer(status.st_size, pa.system_memory_pool())).cast("B")
        filled = 0
        while filled < len(memory) and (count := os.readv(descriptor, [memory[filled:]])):  # one call reads at most 2 GiB
            filled += count
        return memory[:filled]
    finally:
        os.close(descriptor)


def _no_file(path: str, kind: str) -> str:
    return f"{path} cannot be read: it is a {kind}, expected a regular file. Remove it, and run the job that writes it again."


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "FIFO", stat.S_ISSOCK: "socket"}
    return next((kind for is_kind, kind in kinds.items() if is_kind(mode)), "device")


def replace(root: Path, path: Path, data: bytes | memoryview) -> None:
    """Put a whole file at `path`, below `root`. When this returns, the file survives a power cut: its bytes are synced before it
    gets its name, then the folder with the name, and the folders above it.
    """
    with _temporary(root, path, data) as temporary, locked(root, exclusive=False):
        os.replace(temporary, path)
    _sync_folders(root, path)


def update(root: Path, path: Path, change: Callable[[bytes | None], bytes | None], at_most: int) -> bytes | None:
    """Replace a file's content (None: it is absent) by what `change` makes of it, as one step: nobody changes it in between. A
    file of more than `at_most` bytes, or no regular file, counts as empty. `change` returns None to leave it. Returns the content
    that is there afterwards.
    """
    _make_folders(root, path.parent)
    with locked(root, exclusive=True):
        try:
            memory = read_regular(str(path), at_most)
            before = None if memory is None else bytes(memory)
        except CorruptStoreError:
            before = b""
        after = change(before)
        if after is not None and after != before:
            with _temporary(root, path, after) as temporary:
                os.replace(temporary, path)
    _sync_folders(root, path)
    return before if after is None else after


def refresh(root: Path, path: Path) -> bool:
    """Make a file young, so that no collector takes it within its grace period, and durable: whoever wrote it may have been
    killed before the folder was synced. Returns whether the file exists.
    """
    with locked(root, exclusive=False):
        try:
            age = time.time() - path.stat().st_mtime
            if not 0 <= age < FRESH_SECONDS:  # a file of the future was written by another clock: its age is unknown
                os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    _sync_folders(root, path)
    return True


def delete(root: Path, path: Path) -> bool:
    """Delete a file. Returns whether it was there; if so, it stays deleted after a power cut."""
    if not os.path.lexists(path):
        return False
    with locked(root, exclusive=True):
        path.unlink(missing_ok=True)
    _sync_folders(root, path)
    return True


def delete_if_older(root: Path, path: Path, limit: float) -> bool:
    """Delete a file that was last written or refreshed before `limit`, in seconds since 1970. Returns whether it was deleted."""
    with locked(root, exclusive=True), suppress(FileNotFoundError, NotADirectoryError):
        if path.lstat().st_mtime < limit:
            path.unlink()
            return True
    return False


@contextmanager
def locked(root: Path, exclusive: bool) -> Iterator[None]:
    """Hold the lock of the store at `root`: shared among writers, or exclusively."""
    descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(root: Path, path: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A synced file with these bytes beside `path`, which is gone afterwards unless it was renamed."""
    _make_folders(root, path.parent)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
    try:
        with _named(path), open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could keep the new name and lose the content
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors say which file they are about: those of writing and syncing do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _make_folders(root: Path, folder: Path) -> None:
    """Make a folder and those above it. Those above `root` are synced here, the others with the file that is written there."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        if each == root or each in root.parents:
            _sync(each.parent)


def _sync_folders(root: Path, path: Path) -> None:
    """Sync the folders from that of `path` up to `root`. All of them, because another writer may have made one and been killed
    before it was synced.
    """
    for folder in path.parents:
        _sync(folder)
        if folder == root:
            return


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _named(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
