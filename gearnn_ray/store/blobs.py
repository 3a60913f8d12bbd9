"""Content by digest: a store's blobs, stage records, checkpoints and tables. Imports torch, which takes seconds, if needed."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, NonNegativeInt, StringConstraints

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.files import FileTree, one_line

if TYPE_CHECKING:
    from torch import Tensor

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]

PATH_PART = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}"  # one part of a path that holds outside names, such as a level's

_FOLDERS = ("blobs/sha256", "manifests", "refs", "tables", "stages", "checkpoints")


def canonical_json(value: object) -> bytes:
    """The single canonical form of a JSON value: sorted keys, no spaces, UTF-8. Raises ValueError on NaN."""
    # Through JSON once before sorting: numeric keys become strings, and strings sort differently.
    plain = json.loads(json.dumps(value, allow_nan=False))
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(data: bytes | memoryview) -> str:
    """The digest of these bytes: "sha256:" and 64 hexadecimal digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def is_digest(text: str) -> bool:
    """Whether a text has the form of a digest."""
    return re.fullmatch("sha256:[0-9a-f]{64}", text) is not None


def hex_of(digest: str) -> str:
    """The hexadecimal digits of a digest. Raises CorruptStoreError for anything else, such as a path."""
    if not is_digest(digest):
        raise CorruptStoreError(f"{digest!r} is not a digest: expected sha256: and 64 hexadecimal digits.")
    return digest.removeprefix("sha256:")


class Blob(BaseModel):
    """A blob in the store: the digest and the number of its bytes."""

    model_config = ConfigDict(frozen=True, extra="allow")

    digest: Digest
    bytes: NonNegativeInt


class BlobStore:
    """Blobs, stage records, checkpoints and tables at a local path, a file:// or an s3:// URI. S3 takes the options of pyarrow's
    `FileSystem.from_uri` and credentials from the environment. Opening creates nothing; it raises UserError if it fails.
    """

    uri: str  # absolute if it is a local path

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self._files = FileTree(uri)
        self.uri = self._files.uri

    def check_writable(self) -> None:
        """Raise UserError if the store cannot be written. Leaves the store unchanged."""
        self._files.check_writable(_FOLDERS)

    def put_blob(self, data: bytes) -> str:
        """Store bytes under their digest and return it. An intact blob is left untouched, a corrupt one repaired."""
        digest = digest_of(data)
        self._files.write(_blob_path(digest), data)
        return digest

    def get_blob(self, digest: str) -> bytes:
        """The bytes of a blob. Raises CorruptStoreError naming the digest if they are missing or altered."""
        return bytes(self._verified(_blob_path(digest), digest))

    def is_intact(self, digest: str) -> bool:
        """Whether the blob is in the store and its bytes have this digest. Reads and hashes the whole blob."""
        data = self._files.read_memory(_blob_path(digest))
        return data is not None and digest_of(data) == digest

    def put_state(self, state: Mapping[str, "Tensor"]) -> Blob:
        """Store a state dict as a blob of safetensors."""
        from gearnn_ray.store.states import encode_state

        data = encode_state(state)
        return Blob(digest=self.put_blob(data), bytes=len(data))

    def get_state(self, digest: str) -> dict[str, "Tensor"]:
        """The state dict in a blob. Raises CorruptStoreError naming the digest."""
        from gearnn_ray.store.states import decode_state

        return decode_state(self._verified(_blob_path(digest), digest))

    def put_record(self, key: str, record: dict[str, Any]) -> None:
        """Store the result of a stage, any JSON object, under its key of 64 hexadecimal digits."""
        body = canonical_json(record)
        sealed = {"body": json.loads(body), "sha256": hashlib.sha256(body).hexdigest()}
        self._files.write(_record_path(key), canonical_json(sealed))

    def get_record(self, key: str) -> dict[str, Any] | None:
        """The result of a stage, or None if it is absent, cut off or altered and must be computed again."""
        data = self._files.read(_record_path(key)) or b"null"
        try:
            sealed = json.loads(data)
            body, checksum = sealed["body"], sealed["sha256"]
            intact = isinstance(body, dict) and hashlib.sha256(canonical_json(body)).hexdigest() == checksum
        except (ValueError, KeyError, TypeError):
            return None
        return body if intact else None

    def put_checkpoint(self, key: str, data: bytes) -> None:
        """Store the state of an unfinished stage: the 32 bytes of its SHA-256, then the data."""
        self._files.write(_checkpoint_path(key), hashlib.sha256(data).digest() + data)

    def get_checkpoint(self, key: str) -> bytes | None:
        """The state of an unfinished stage, or None if it is absent, cut off or altered."""
        sealed = self._files.read(_checkpoint_path(key)) or b""
        checksum, data = sealed[:32], sealed[32:]
        return data if hashlib.sha256(data).digest() == checksum else None

    def drop_checkpoint(self, key: str) -> None:
        """Delete a checkpoint if it exists."""
        self._files.delete(_checkpoint_path(key))

    def put_table(self, path: str, table: pa.Table) -> None:
        """Write a table with its metadata at `tables/….parquet`. A file with equal bytes is left untouched."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self._files.write(table_path(path), sink.getvalue().to_pybytes())

    def put_figure(self, path: str, png: bytes) -> None:
        """Write a picture at `figures/….png`. A file with equal bytes is left untouched."""
        self._files.write(_checked_path(path, "figures", ".png"), png)

    def put_report(self, path: str, page: str) -> None:
        """Write a page at `reports/….html`. A file with equal bytes is left untouched."""
        self._files.write(_checked_path(path, "reports", ".html"), page.encode())

    def get_table(self, path: str) -> pa.Table:
        """The table at `tables/….parquet`. Raises UserError if it is absent, CorruptStoreError if it is not Parquet."""
        data = self._files.read(table_path(path))
        if data is None:
            raise UserError(f"The store {self.uri} has no {path}. Run the job that writes it, or check the path.")
        try:
            return pq.read_table(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            raise CorruptStoreError(f"{path} in {self.uri} is not Parquet: {one_line(error)}.") from error

    def _verified(self, path: str, digest: str) -> memoryview:
        data = self._files.read_memory(path)
        if data is None:
            raise CorruptStoreError(f"{digest} is missing from {self.uri}. Run the job that wrote it again.")
        if (actual := digest_of(data)) != digest:
            raise CorruptStoreError(
                f"{digest} is altered in {self.uri}: its bytes have the digest {actual}. Run the job that wrote it again."
            )
        return data


def table_path(path: str) -> str:
    """The path itself. Raises ValueError unless it is `tables/….parquet` and stays in that folder."""
    return _checked_path(path, "tables", ".parquet")


def _checked_path(path: str, folder: str, suffix: str) -> str:
    if not re.fullmatch(rf"{folder}(/{PATH_PART})+", path) or not path.endswith(suffix):
        raise ValueError(f"Expected a path {folder}/…{suffix}, found {path!r}.")
    return path


def _blob_path(digest: str) -> str:
    return f"blobs/sha256/{hex_of(digest)}"


def _record_path(key: str) -> str:
    return f"stages/{_checked_key(key)}.json"


def _checkpoint_path(key: str) -> str:
    return f"checkpoints/{_checked_key(key)}.safetensors"


def _checked_key(key: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise ValueError(f"The key of a stage is 64 hexadecimal digits, not {key!r}.")
    return key
