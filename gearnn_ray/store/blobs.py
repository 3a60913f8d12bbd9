"""The store's lower half: bytes with a digest, what stages leave behind, and files that are whole or absent.

Works on a local folder and on S3 through `pyarrow.fs`. Knows nothing about releases (that is `store.py`),
networks or levels.
"""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from pyarrow import fs
from torch import Tensor

from gearnn_ray.core.errors import CorruptStoreError, UserError

DIGEST = r"^sha256:[0-9a-f]{64}$"
PART = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}"  # of a path that we did not make up: a level, say

_FOLDERS = ("blobs/sha256", "manifests", "refs", "tables", "stages", "checkpoints")


# Content as stable bytes


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: keys sorted, no spaces, UTF-8. Raises ValueError on NaN."""
    # Through JSON once before sorting: keys that are numbers become strings, which sort otherwise.
    plain = json.loads(json.dumps(value, allow_nan=False))
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(data: bytes | memoryview) -> str:
    """The name of these bytes: "sha256:" and 64 hexadecimal digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def hex_of(digest: str) -> str:
    """The digits of a digest. Raises CorruptStoreError for anything else, such as a path out of the store."""
    if not re.fullmatch(DIGEST, digest):
        raise CorruptStoreError(f"{digest!r} is not a digest, expected sha256: and 64 hexadecimal digits")
    return digest.removeprefix("sha256:")


def encode_state(state: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None) -> bytes:
    """A state dict as safetensors; equal content gives equal bytes, whatever the order, strides or device.

    Metadata goes under one key as canonical JSON: two or more keys safetensors writes in random order.
    """
    # Copies, because safetensors refuses tensors that share memory (tied weights).
    dense = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    header = None if metadata is None else {"gearnn_ray": canonical_json(dict(metadata)).decode()}
    return safetensors.torch.save(dense, header)


def decode_state(data: bytes | memoryview) -> dict[str, Tensor]:
    """The state dict of `encode_state`, names sorted. Raises CorruptStoreError when it is not safetensors.

    Writable memory is not copied: the tensors are views of it, each of its own part, and keep it alive.
    """
    # safetensors.torch.load copies every tensor, which takes half as long as hashing it
    try:
        state = _views(data if isinstance(data, memoryview) and not data.readonly else memoryview(bytearray(data)))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CorruptStoreError(f"{digest_of(data)} does not hold safetensors: {_one_line(error)}") from error
    return dict(sorted(state.items()))


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def _views(memory: memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file: 8 bytes with the length of a JSON header, the header, the elements.

    As the format demands, the tensors fill the bytes after the header with neither a gap nor an overlap.
    """
    start = end = 8 + int.from_bytes(memory[:8], "little")
    header = json.loads(bytes(memory[8:start]).decode())
    header.pop("__metadata__", None)
    state = dict[str, Tensor]()
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = math.prod(shape)
        if start + first != end or last < first or last - first != count * dtype.itemsize:
            raise ValueError(f"{name!r} of shape {shape} cannot lie in the bytes from {first} to {last}")
        # torch makes no tensor of no bytes
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=end) if count else torch.empty(0, dtype=dtype)
        state[name] = flat.reshape(shape)
        end = start + last
    if end != len(memory):
        raise ValueError(f"its tensors end at byte {end} of {len(memory)}")
    return state


# What a worker leaves in the store


@dataclass(frozen=True)
class Blob:
    """A state dict in the store: the digest and the length of its bytes."""

    digest: str
    bytes: int


class BlobStore:
    """Blobs, stage records, checkpoints and tables at a local path, a file:// or an s3:// URI.

    S3 takes the options of `pyarrow.fs.FileSystem.from_uri` and credentials from the environment. Opening
    creates nothing. Raises UserError for an address nobody can open.
    """

    uri: str  # absolute where it is a local path

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self._files = FileTree(uri)
        self.uri = self._files.uri

    def check_writable(self) -> None:
        """Raise UserError if the store cannot be written; leaves it as it was."""
        self._files.check_writable(_FOLDERS)

    def put_blob(self, data: bytes) -> str:
        """Store bytes under their digest and return it; nothing is written where they lie intact already."""
        digest = digest_of(data)
        self._files.write(f"blobs/sha256/{hex_of(digest)}", data)
        return digest

    def get_blob(self, digest: str) -> bytes:
        """The bytes of a digest. Raises CorruptStoreError naming it when they are missing or altered."""
        return bytes(self._blob(digest))

    def has_blob(self, digest: str) -> bool:
        """Whether there is such a blob; `get_blob` says whether it is intact."""
        return self._blob_size(digest) is not None

    def put_state(self, state: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None) -> Blob:
        """Store a state dict as a blob of safetensors."""
        data = encode_state(state, metadata)
        return Blob(self.put_blob(data), len(data))

    def get_state(self, digest: str) -> dict[str, Tensor]:
        """The state dict in a blob. Raises CorruptStoreError naming the digest."""
        return decode_state(self._blob(digest))

    def put_record(self, key: str, record: dict[str, Any]) -> None:
        """Remember what the stage `key` (64 hexadecimal digits) returned: any JSON object."""
        body = canonical_json(record)
        sealed = {"body": json.loads(body), "sha256": hashlib.sha256(body).hexdigest()}
        self._files.write(f"stages/{_key(key)}.json", canonical_json(sealed))

    def get_record(self, key: str) -> dict[str, Any] | None:
        """What the stage returned; None when absent, torn or altered: it is then computed again."""
        data = self._files.read(f"stages/{_key(key)}.json") or b"null"
        try:
            sealed = json.loads(data)
            body, checksum = sealed["body"], sealed["sha256"]
            intact = isinstance(body, dict) and hashlib.sha256(canonical_json(body)).hexdigest() == checksum
        except (ValueError, KeyError, TypeError):
            return None
        return body if intact else None

    def put_checkpoint(self, key: str, data: bytes) -> None:
        """Keep where an unfinished stage stands, as the 32 bytes of its SHA-256, then the data."""
        self._files.write(_checkpoint(key), hashlib.sha256(data).digest() + data)

    def get_checkpoint(self, key: str) -> bytes | None:
        """Where an unfinished stage stands; None when it is absent, torn or altered."""
        sealed = self._files.read(_checkpoint(key)) or b""
        checksum, data = sealed[:32], sealed[32:]
        return data if hashlib.sha256(data).digest() == checksum else None

    def drop_checkpoint(self, key: str) -> None:
        """Forget a checkpoint, if there is one."""
        self._files.delete(_checkpoint(key))

    def put_table(self, path: str, table: pa.Table) -> None:
        """Write a table with its metadata at `tables/….parquet`; one of equal bytes is left untouched."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self._files.write(table_path(path), sink.getvalue().to_pybytes())

    def put_figure(self, path: str, png: bytes) -> None:
        """Write a picture at `figures/….png`; one of equal bytes is left untouched."""
        if not re.fullmatch(rf"figures(/{PART})+", path) or not path.endswith(".png"):
            raise ValueError(f"a picture's path is figures/….png, not {path!r}")
        self._files.write(path, png)

    def put_report(self, path: str, page: str) -> None:
        """Write a page at `reports/….html`; one of equal bytes is left untouched."""
        if not re.fullmatch(rf"reports(/{PART})+", path) or not path.endswith(".html"):
            raise ValueError(f"a report's path is reports/….html, not {path!r}")
        self._files.write(path, page.encode())

    def get_table(self, path: str) -> pa.Table:
        """The table at `tables/….parquet`. Raises UserError if absent, CorruptStoreError if no Parquet."""
        data = self._files.read(table_path(path))
        if data is None:
            raise UserError(f"the store {self.uri} holds no {path}")
        try:
            return pq.read_table(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            raise CorruptStoreError(f"{path} in {self.uri} is no Parquet: {_one_line(error)}") from error

    def _blob_size(self, digest: str) -> int | None:
        return self._files.size(f"blobs/sha256/{hex_of(digest)}")

    def _blob(self, digest: str) -> memoryview:
        return self._verified(f"blobs/sha256/{hex_of(digest)}", digest)

    def _verified(self, path: str, digest: str) -> memoryview:
        data = self._files.read_memory(path)
        if data is None:
            raise CorruptStoreError(f"{digest} is missing from {self.uri}")
        if digest_of(data) != digest:
            raise CorruptStoreError(f"{digest} is altered in {self.uri}: there is {digest_of(data)}")
        return data


def table_path(path: str) -> str:
    """The path itself. Raises ValueError unless it is `tables/….parquet` and stays there."""
    if not re.fullmatch(rf"tables(/{PART})+", path) or not path.endswith(".parquet"):
        raise ValueError(f"a table's path is tables/….parquet, not {path!r}")
    return path


def _key(key: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise ValueError(f"a stage's key is 64 hexadecimal digits, not {key!r}")
    return key


def _checkpoint(key: str) -> str:
    return f"checkpoints/{_key(key)}.safetensors"


# Where bytes lie


class FileTree:
    """Files by relative path. A reader finds a file whole or not at all, even when its writer is killed.

    Local: written beside under a `.tmp-` name, synced, renamed. S3: an object appears when its upload is
    complete; a killed writer leaves at most an unfinished multipart upload, which no listing shows.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = os.fspath(uri)
        scheme, is_uri, _ = self.uri.partition("://")
        try:
            if not self.uri or "\0" in self.uri:
                raise ValueError("that is no address")
            if not is_uri:
                # Absolute from here on: the workers of a job have another working directory.
                self.uri = str(Path(self.uri).expanduser().absolute())
                self._fs, self._root = fs.LocalFileSystem(), self.uri
            elif scheme not in ("file", "s3"):
                raise ValueError(f"nothing here opens {scheme}://")
            elif "@" in (host := urlsplit(self.uri).netloc):
                self.uri = self.uri.replace(host, "…@" + host.rpartition("@")[2])  # no secret into logs
                raise ValueError("credentials belong in the environment")
            else:
                self._fs, self._root = fs.FileSystem.from_uri(self.uri)
            if not self._root:
                raise ValueError("it names no bucket")
        except (OSError, ValueError, RuntimeError) as error:
            reason = f"cannot open the store {self.uri!r}: {_one_line(error)}"
            raise UserError(f"{reason}; expected a folder, a file:// or an s3://bucket/path URI") from error
        self._local = isinstance(self._fs, fs.LocalFileSystem)

    def read(self, path: str) -> bytes | None:
        """All bytes of a file, None where there is none."""
        while (data := self.read_memory(path)) is not None:
            # S3 is asked for the length first: a file replaced by a longer one in between comes cut off
            if self._local or self.size(path) == len(data):
                return bytes(data)
        return None

    def read_memory(self, path: str) -> memoryview | None:
        """All bytes of a file that never changes, in writable memory that nobody else has; None where there is none."""
        try:
            with self._fs.open_input_file(self._full(path)) as file:
                # Arrow's own pool and numpy ask for huge pages, which are slower to get than the file is to read
                memory = memoryview(pa.allocate_buffer(file.size(), pa.system_memory_pool())).cast("B")
                return memory[: file.readinto(memory)]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, path: str) -> int | None:
        """The length of a file in bytes, None where there is none."""
        info = self._fs.get_file_info(self._full(path))
        return int(info.size) if info.type == fs.FileType.File else None

    def write(self, path: str, data: bytes) -> None:
        """Put a file, all of it or nothing; one that holds these bytes already is left untouched."""
        if self.size(path) == len(data) and self.read(path) == data:
            return
        if self._local:
            _replace(Path(self._full(path)), data)
        else:
            # An abandoned stream is completed by its destructor with what it holds by then. Ctrl-C reaches
            # only the main thread, so in another one an upload is never abandoned between two calls.
            with ThreadPoolExecutor(max_workers=1) as uploader:
                uploader.submit(self._upload, self._full(path), data).result()

    def delete(self, path: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self._fs.delete_file(self._full(path))

    def files(self, folder: str) -> list[str]:
        """The files anywhere below a folder, relative to it and sorted, without writers' temporary ones."""
        root = self._full(folder)
        try:
            found = self._fs.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
        except FileNotFoundError:
            return []  # made while pyarrow looked: absent at its first look, there at its second
        paths = [info.path[len(root) + 1 :] for info in found if info.type == fs.FileType.File]
        return sorted(path for path in paths if not path.rpartition("/")[2].startswith("."))

    def check_writable(self, folders: tuple[str, ...]) -> None:
        """Raise UserError unless files can be written below each of these folders; none of them is created.

        On S3 the zero-byte marker may remain that pyarrow puts where the last object of a folder was deleted.
        """
        probe = f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
        with self.plain_errors("written"):
            if not self._local:
                self.write(probe, b"probe")
                self.delete(probe)
                return
            # In the nearest folder there is: one made for the probe would stay behind if we were killed.
            for folder in {_nearest(Path(self._full(folder))) for folder in folders}:
                if not folder.is_dir():
                    raise NotADirectoryError(f"{folder} is not a folder")
                _replace(folder / probe, b"probe")
                (folder / probe).unlink()

    @contextmanager
    def plain_errors(self, done: str) -> Iterator[None]:
        """Turn what the file system reports into one sentence: the store cannot be read, or written."""
        try:
            yield
        except OSError as error:
            reason = f"the store {self.uri} cannot be {done}: {_one_line(error)}"
            raise UserError(f"{reason}; check the address and what you may do there") from error

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def _upload(self, full: str, data: bytes) -> None:
        stream = self._fs.open_output_stream(full)
        stream.write(data)
        stream.close()


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may keep the new name and lose the content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _nearest(path: Path) -> Path:
    """The path itself, or its nearest ancestor that is there."""
    while True:
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
        else:
            return path


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
