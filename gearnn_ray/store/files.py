"""Files by relative path, on a local folder or on S3 through `pyarrow.fs`. Each file appears whole or not at all."""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from gearnn_ray.core.errors import UserError, storage_problem
from gearnn_ray.store import local_files
from gearnn_ray.store.local_files import TEMPORARY, too_large
from gearnn_ray.store.patience import Patience, open_s3

_FRESH_SECONDS_S3 = 3600.0  # an object that is younger is not refreshed: that takes an upload


@dataclass(frozen=True)
class Entry:
    """A file in a listing: its path in the tree, its bytes, and when it was last written or refreshed, in seconds since 1970."""

    path: str
    bytes: int
    modified: float

    @property
    def is_temporary(self) -> bool:
        return self.path.rpartition("/")[2].startswith(TEMPORARY)


class FileTree:
    """The files below a local path, a file:// or an s3:// URI. Local: a file is written as `.tmp-…` beside its own, synced and
    renamed, and its folders are synced. S3: an object appears when its upload is complete; a killed writer leaves at most an
    unfinished upload, which no listing shows. Raises UserError for an address that cannot be opened.
    """

    uri: str  # absolute if it is a local path

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = os.fspath(uri)
        self._patience = Patience(self.uri, 0)
        scheme, is_uri, _ = self.uri.partition("://")
        try:
            if not self.uri or "\0" in self.uri:
                raise ValueError("the address is empty or holds a null character")
            if self.uri.startswith(("s3:", "file:")) and not is_uri:
                raise ValueError("after the first colon two slashes are expected, as in s3://bucket/path")
            if not is_uri:
                # Absolute from here on, because the workers of a job have another working directory.
                self.uri = str(Path(self.uri).expanduser().absolute())
                self._fs, self._root = fs.LocalFileSystem(), self.uri
            elif scheme not in ("file", "s3"):
                raise ValueError(f"{scheme}:// is not supported")
            elif "@" in (host := urlsplit(self.uri).netloc):
                self.uri = self.uri.replace(host, "…@" + host.rpartition("@")[2])  # no secret in logs
                raise ValueError("pass credentials in the environment, not in the address")
            elif scheme == "s3":
                self._fs, self._root, self._patience = open_s3(self.uri)
            else:
                self._fs, self._root = fs.FileSystem.from_uri(self.uri)
            if not self._root:
                raise ValueError("the address names no bucket")
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"Cannot open the store {self.uri!r}: {one_line(error)}. "
                "Expected a folder, a file:// URI or an s3://bucket/path URI."
            ) from error
        self._local = isinstance(self._fs, fs.LocalFileSystem)

    def read(self, path: str, at_most: int | None = None) -> bytes | None:
        """All bytes of a file, or None if it does not exist. Raises, before anything is read, TooLargeError for a file of more
        than `at_most` bytes and CorruptStoreError for something that is no regular file.
        """
        while (data := self.read_memory(path, at_most)) is not None:
            # The length of an S3 object is asked for first: if a longer one replaces it in between, the read is cut off.
            if self._local or self.size(path) == len(data):
                return bytes(data)
        return None

    def read_memory(self, path: str, at_most: int | None = None) -> memoryview | None:
        """All bytes of a file that never changes, in new writable memory, or None if it does not exist. Raises as `read`."""
        if self._local:
            return local_files.read_regular(self._full(path), at_most)
        try:
            return self._patience(f"read {path}", lambda: self._download(path, at_most))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, path: str) -> int | None:
        """The length of a file in bytes, or None if it does not exist."""
        info = self._info(path)
        return int(info.size) if info.type == fs.FileType.File else None

    def write(self, path: str, data: bytes) -> None:
        """Write a whole file or nothing. A file that already holds these bytes is left untouched, but made young (`refresh`)."""
        if not (self.size(path) == len(data) and self.read(path) == data and self.refresh(path, data)):
            self._write(path, data)

    def refresh(self, path: str, data: bytes | memoryview | None = None) -> bool:
        """Make a file young, so that no collector takes it within its grace period; False if it does not exist. On S3 that means
        to write it again, which takes its bytes (`data`, or read now).
        """
        if self._local:
            return local_files.refresh(Path(self._root), Path(self._full(path)))
        info = self._info(path)
        if info.type != fs.FileType.File:
            return False
        if not 0 <= time.time() - info.mtime_ns / 1e9 < _FRESH_SECONDS_S3:
            data = self.read_memory(path) if data is None else data
            if data is None:
                return False
            self._write(path, data)
        return True

    def update(self, path: str, change: Callable[[bytes | None], bytes | None], at_most: int) -> bytes | None:
        """Replace a file's content (None: it is absent) by what `change` makes of it, as one step; `change` returns None to leave
        it, and may be asked again. Returns the content that is there afterwards. A file of more than `at_most` bytes, or one that
        is no regular file, counts as empty. On a store without conditional writes reading and writing are two steps, between
        which others may write.
        """
        if self._local:
            return local_files.update(Path(self._root), Path(self._full(path)), change, at_most)
        from gearnn_ray.store.conditional import ConditionalBucket, NotConditionalError

        try:
            return ConditionalBucket(self.uri, self._fs, self._patience).update(path, change, at_most)
        except NotConditionalError:
            size = self.size(path)
            before = self.read(path) if size is None or size <= at_most else b""
            after = change(before)
            if after is None:
                return before
            self.write(path, after)
            return after

    def _write(self, path: str, data: bytes | memoryview) -> None:
        if self._local:
            local_files.replace(Path(self._root), Path(self._full(path)), data)
        else:
            # The destructor of an abandoned stream completes the object with the bytes sent so far. Ctrl-C reaches only
            # the main thread, so an upload in another thread is never abandoned between two calls.
            with ThreadPoolExecutor(max_workers=1) as uploader:
                uploader.submit(int).result()  # an executor that Ctrl-C interrupts while its thread starts does not wait for it
                self._patience(f"write {path}", lambda: uploader.submit(self._upload, self._full(path), data).result())

    def delete(self, path: str) -> bool:
        """Remove a file. Returns whether it existed."""
        if self._local:
            return local_files.delete(Path(self._root), Path(self._full(path)))
        with suppress(FileNotFoundError):
            self._patience(f"delete {path}", lambda: self._fs.delete_file(self._full(path)))
            return True
        return False

    def delete_if_older(self, path: str, limit: float) -> bool:
        """Delete a file that was last written or refreshed before `limit`; whether it was deleted. Local: one step, so that no
        writer refreshes it in between. S3: its time is looked at, then it is deleted.
        """
        if self._local:
            return local_files.delete_if_older(Path(self._root), Path(self._full(path)), limit)
        info = self._info(path)
        if info.type != fs.FileType.File or info.mtime_ns / 1e9 >= limit:
            return False
        self.delete(path)
        return True

    def files(self, folder: str) -> list[str]:
        """Sorted paths, relative to the folder, of all files below it. Temporary files of writers are left out."""
        paths = [entry.path[len(folder) + 1 :] for entry in self.entries(folder)]
        return sorted(path for path in paths if not path.rpartition("/")[2].startswith("."))

    def entries(self, folder: str) -> list[Entry]:
        """All regular files below a folder, in the order of their paths, those of unfinished writers among them."""
        selector = fs.FileSelector(self._full(folder), allow_not_found=True, recursive=True)
        try:
            infos = self._patience(f"list {folder}", lambda: self._fs.get_file_info(selector))
        except FileNotFoundError:
            return []  # the folder was created between pyarrow's two look-ups, or a file was deleted
        start = len(self._full(""))
        found = [Entry(info.path[start:], info.size, info.mtime_ns / 1e9) for info in infos if info.type == fs.FileType.File]
        return sorted(found, key=lambda entry: entry.path)

    def now(self) -> float:
        """The time, in seconds since 1970, by the clock that dates the files of this tree."""
        probe = f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        if self._local:
            path = Path(self._root) / probe
            path.touch()
            try:
                return path.stat().st_mtime
            finally:
                path.unlink()
        self._write(probe, b"now")
        found: float = self._info(probe).mtime_ns / 1e9
        self.delete(probe)
        return found

    def check_writable(self, folders: tuple[str, ...]) -> None:
        """Raise UserError unless files can be written below these folders. Creates none, but on S3 may leave empty markers."""
        probe = f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        with self.plain_errors("written"):
            if not self._local:
                self.write(probe, b"probe")
                self.delete(probe)
                return
            # In the nearest existing folder: a folder created for the probe would remain if this process were killed.
            for folder in {_nearest_existing(Path(self._full(folder))) for folder in folders}:
                if not folder.is_dir():
                    raise NotADirectoryError(f"{folder} is not a folder")
                with open(folder / probe, "xb") as file:
                    file.write(b"probe")
                (folder / probe).unlink()

    @contextmanager
    def plain_errors(self, action: str) -> Iterator[None]:
        """Raise UserError in place of the file system's errors. `action` is "read" or "written"."""
        try:
            yield
        except OSError as error:
            if problem := storage_problem(error):
                raise UserError(f"The store {self.uri} cannot be {action}: {problem}.") from error
            raise UserError(
                f"The store {self.uri} cannot be {action}: {one_line(error)}. Check the address and your permissions."
            ) from error

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def _info(self, path: str) -> fs.FileInfo:
        found: fs.FileInfo = self._patience(f"look up {path}", lambda: self._fs.get_file_info(self._full(path)))
        return found

    def _download(self, path: str, at_most: int | None) -> memoryview:
        with self._fs.open_input_file(self._full(path)) as file:
            size = file.size()
            if at_most is not None and size > at_most:
                raise too_large(path, size, at_most)
            memory = memoryview(pa.allocate_buffer(size, pa.system_memory_pool())).cast("B")
            if (filled := file.readinto(memory)) < size:
                raise ConnectionError(f"{path} has {size:,} bytes, of which {filled:,} arrived")
            return memory

    def _upload(self, full: str, data: bytes | memoryview) -> None:
        stream = self._fs.open_output_stream(full)
        stream.write(data)
        stream.close()


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, and without a full stop at the end."""
    return " ".join(str(error).split()).removesuffix(".")


def _nearest_existing(path: Path) -> Path:
    while True:
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
        else:
            return path
