"""Files by relative path, on a local folder or on S3 through `pyarrow.fs`. Each file appears whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from gearnn_ray.core.errors import UserError


class FileTree:
    """The files below a local path, a file:// or an s3:// URI. Local: a file is written as `.tmp-…` beside its own, synced and
    renamed. S3: an object appears when its upload is complete; a killed writer leaves at most an unfinished upload, which no
    listing shows. Raises UserError for an address that cannot be opened.
    """

    uri: str  # absolute if it is a local path

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = os.fspath(uri)
        scheme, is_uri, _ = self.uri.partition("://")
        try:
            if not self.uri or "\0" in self.uri:
                raise ValueError("the address is empty or holds a null character")
            if not is_uri:
                # Absolute from here on, because the workers of a job have another working directory.
                self.uri = str(Path(self.uri).expanduser().absolute())
                self._fs, self._root = fs.LocalFileSystem(), self.uri
            elif scheme not in ("file", "s3"):
                raise ValueError(f"{scheme}:// is not supported")
            elif "@" in (host := urlsplit(self.uri).netloc):
                self.uri = self.uri.replace(host, "…@" + host.rpartition("@")[2])  # no secret in logs
                raise ValueError("pass credentials in the environment, not in the address")
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

    def read(self, path: str) -> bytes | None:
        """All bytes of a file, or None if it does not exist."""
        while (data := self.read_memory(path)) is not None:
            # The length of an S3 object is asked for first: if a longer one replaces it in between, the read is cut off.
            if self._local or self.size(path) == len(data):
                return bytes(data)
        return None

    def read_memory(self, path: str) -> memoryview | None:
        """All bytes of a file that never changes, in new writable memory, or None if the file does not exist."""
        try:
            with self._fs.open_input_file(self._full(path)) as file:
                # Arrow's default pool and NumPy ask for huge pages, and getting those takes longer than the read itself.
                memory = memoryview(pa.allocate_buffer(file.size(), pa.system_memory_pool())).cast("B")
                return memory[: file.readinto(memory)]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, path: str) -> int | None:
        """The length of a file in bytes, or None if it does not exist."""
        info = self._fs.get_file_info(self._full(path))
        return int(info.size) if info.type == fs.FileType.File else None

    def write(self, path: str, data: bytes) -> None:
        """Write a whole file or nothing. A file that already holds these bytes is left untouched."""
        if self.size(path) == len(data) and self.read(path) == data:
            return
        if self._local:
            _replace(Path(self._full(path)), data)
        else:
            # The destructor of an abandoned stream completes the object with the bytes sent so far. Ctrl-C reaches only
            # the main thread, so an upload in another thread is never abandoned between two calls.
            with ThreadPoolExecutor(max_workers=1) as uploader:
                uploader.submit(self._upload, self._full(path), data).result()

    def delete(self, path: str) -> None:
        """Remove a file if it exists."""
        with suppress(FileNotFoundError):
            self._fs.delete_file(self._full(path))

    def files(self, folder: str) -> list[str]:
        """Sorted paths, relative to the folder, of all files below it. Temporary files of writers are left out."""
        root = self._full(folder)
        try:
            infos = self._fs.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
        except FileNotFoundError:
            return []  # the folder was created between pyarrow's two look-ups
        paths = [info.path[len(root) + 1 :] for info in infos if info.type == fs.FileType.File]
        return sorted(path for path in paths if not path.rpartition("/")[2].startswith("."))

    def check_writable(self, folders: tuple[str, ...]) -> None:
        """Raise UserError unless files can be written below these folders. Creates none, but on S3 may leave empty markers."""
        probe = f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
        with self.plain_errors("written"):
            if not self._local:
                self.write(probe, b"probe")
                self.delete(probe)
                return
            # In the nearest existing folder: a folder created for the probe would remain if this process were killed.
            for folder in {_nearest_existing(Path(self._full(folder))) for folder in folders}:
                if not folder.is_dir():
                    raise NotADirectoryError(f"{folder} is not a folder")
                _replace(folder / probe, b"probe")
                (folder / probe).unlink()

    @contextmanager
    def plain_errors(self, action: str) -> Iterator[None]:
        """Raise UserError in place of the file system's errors. `action` is "read" or "written"."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"The store {self.uri} cannot be {action}: {one_line(error)}. Check the address and your permissions."
            ) from error

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def _upload(self, full: str, data: bytes) -> None:
        stream = self._fs.open_output_stream(full)
        stream.write(data)
        stream.close()


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, and without a full stop at the end."""
    return " ".join(str(error).split()).removesuffix(".")


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure could keep the new name and lose the content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _nearest_existing(path: Path) -> Path:
    while True:
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
        else:
            return path
