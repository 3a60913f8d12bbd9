"""Content by digest: a store's blobs, stage records, checkpoints and tables. Imports torch, which takes seconds, if needed."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, NonNegativeInt, StringConstraints

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.files import FileTree, one_line
from gearnn_ray.store.local_files import TooLargeError

if TYPE_CHECKING:
    from torch import Tensor

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]

PATH_PART = r"[A-Za-z0-9_][A-Za-z0-9._+:(),-]{0,199}"  # one part of a path that holds outside names, such as a level's

RECORD_BYTES = 64 * 2**20
"""The largest stage record. Theirs are kilobytes, those of a thousand layers a megabyte; parsing takes ten times the memory."""

_TABLE_BYTES, _TABLE_VALUES = 64 * 2**20, 16_000_000  # the largest table that is read: of its file, and rows times columns
_UNPACKED_BYTES, _TABLE_COLUMNS = 256 * 2**20, 1000  # of a table: kilobytes may unpack to gigabytes

_JSON_VALUES = 150_000
"""The most values and escapes in JSON that a stranger may have written: a hundred levels that change a thousand layers each have
fewer. A value takes up to 100 bytes and 2 µs."""

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
        self._files.write(blob_path(digest), data)
        return digest

    def get_blob(self, digest: str) -> bytes:
        """The bytes of a blob. Raises CorruptStoreError naming the digest if they are missing or altered."""
        return bytes(self._verified(blob_path(digest), digest))

    def is_intact(self, digest: str) -> bool:
        """Whether the blob is in the store and its bytes have this digest. Reads and hashes the whole blob, and makes it young,
        so that `Store.gc` leaves it for its grace period.
        """
        path = blob_path(digest)
        data = self._files.read_memory(path)
        return data is not None and digest_of(data) == digest and self._files.refresh(path, data)

    def blobs_in(self, record: Mapping[str, Any]) -> list[str]:
        """The digests in a JSON object whose blobs are in the store, by their presence alone."""
        named = sorted(set(re.findall("sha256:[0-9a-f]{64}", json.dumps(record))))
        return [digest for digest in named if self._files.size(blob_path(digest)) is not None]

    def put_state(self, state: Mapping[str, "Tensor"]) -> Blob:
        """Store a state dict as a blob of safetensors."""
        from gearnn_ray.store.states import encode_state

        data = encode_state(state)
        return Blob(digest=self.put_blob(data), bytes=len(data))

    def get_state(self, digest: str) -> dict[str, "Tensor"]:
        """The state dict in a blob. Raises CorruptStoreError naming the digest."""
        from gearnn_ray.store.states import decode_state

        return decode_state(self._verified(blob_path(digest), digest))

    def put_record(self, key: str, record: dict[str, Any]) -> None:
        """Store the result of a stage, any JSON object, under its key of 64 hexadecimal digits."""
        self._files.write(record_path(key), sealed_record(record))

    def get_record(self, key: str) -> Mapping[str, Any] | None:
        """The result of a stage, or None if it is absent, cut off or altered and must be computed again. A record that is used is
        made young, so that `Store.gc` leaves it for its grace period.
        """
        path = record_path(key)
        with suppress(CorruptStoreError):
            data = self._files.read(path, RECORD_BYTES)
            if data is not None and (body := opened_record(data)) is not None:
                with suppress(OSError):  # where it cannot be written it can still be used
                    self._files.refresh(path, data)
                return body
        return None

    def put_checkpoint(self, key: str, data: bytes) -> None:
        """Store the state of an unfinished stage: the 32 bytes of its SHA-256, then the data."""
        self._files.write(_checkpoint_path(key), hashlib.sha256(data).digest() + data)

    def get_checkpoint(self, key: str) -> bytes | None:
        """The state of an unfinished stage, or None if it is absent, cut off or altered."""
        sealed = b""
        with suppress(CorruptStoreError):
            sealed = self._files.read(_checkpoint_path(key)) or b""
        checksum, data = sealed[:32], sealed[32:]
        return data if hashlib.sha256(data).digest() == checksum else None

    def drop_checkpoint(self, key: str) -> None:
        """Delete a checkpoint if it exists."""
        self._files.delete(_checkpoint_path(key))

    def put_table(self, path: str, table: pa.Table) -> None:
        """Write a table with its metadata at `tables/….parquet`. A file with equal bytes is left untouched."""
        self._files.write(table_path(path), encode_table(table))

    def put_figure(self, path: str, png: bytes) -> None:
        """Write a picture at `figures/….png`. A file with equal bytes is left untouched."""
        self._files.write(figure_path(path), png)

    def put_report(self, path: str, page: str) -> None:
        """Write a page at `reports/….html`. A file with equal bytes is left untouched."""
        self._files.write(_checked_path(path, "reports", ".html"), page.encode())

    def get_table(self, path: str) -> pa.Table:
        """The table at `tables/….parquet`. Raises UserError if it is absent, CorruptStoreError if it is not Parquet, has
        cells that are neither numbers nor text, or more than 64 MiB (256 MiB unpacked) or 16 million values.
        """
        data = self._files.read(table_path(path), _TABLE_BYTES)
        if data is None:
            raise UserError(f"The store {self.uri} has no {path}. Run the job that writes it, or check the path.")
        try:
            return _unpacked(data)
        except (pa.ArrowException, OSError) as error:
            raise CorruptStoreError(f"{path} in {self.uri} is not Parquet: {one_line(error)}.") from error

    def _verified(self, path: str, digest: str, size: int | None = None, at_most: int | None = None) -> memoryview:
        """The bytes of a file with this digest, of `size` bytes if that is known: compared before anything is read."""
        try:
            data = self._files.read_memory(path, at_most if size is None else size)
        except TooLargeError as error:
            if size is None:
                raise
            raise CorruptStoreError(_other_size(digest, error.size, size)) from None
        if data is None:
            raise CorruptStoreError(f"{digest} is missing from {self.uri}. Run the job that wrote it again.")
        if size is not None and data.nbytes != size:
            raise CorruptStoreError(_other_size(digest, data.nbytes, size))
        if (actual := digest_of(data)) != digest:
            raise CorruptStoreError(
                f"{digest} is altered in {self.uri}: its bytes have the digest {actual}. Run the job that wrote it again."
            )
        return data


def _other_size(digest: str, found: int, stated: int) -> str:
    return f"{digest} has {found} bytes, but the manifest says {stated}. Run the job that wrote it again."


def _unpacked(data: bytes) -> pa.Table:
    """The table in a Parquet file. Raises ArrowInvalid for one that takes far more memory than its file, as far as it says so."""
    file = pq.ParquetFile(pa.BufferReader(data))
    values = file.metadata.num_rows * file.metadata.num_columns
    if values > _TABLE_VALUES:
        raise pa.ArrowInvalid(f"it has {values:,} values, expected at most {_TABLE_VALUES:,}")
    if file.metadata.num_columns > _TABLE_COLUMNS:
        raise pa.ArrowInvalid(f"it has {file.metadata.num_columns:,} columns, expected at most {_TABLE_COLUMNS:,}")
    schema = file.schema_arrow
    if strange := [field for field in schema if not (pa.types.is_primitive(field.type) or pa.types.is_string(field.type))]:
        raise pa.ArrowInvalid(f"its column {strange[0].name!r:.80} has {strange[0].type!s:.40}, expected numbers or text")
    size = sum(file.metadata.row_group(number).total_byte_size for number in range(file.metadata.num_row_groups))
    if size <= _UNPACKED_BYTES:
        # a text that many rows have in common is in the file once: so it is read, and its copies are counted before they are made
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        table = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts).read()
        size = sum(map(_text_bytes, table.columns))
    if size > _UNPACKED_BYTES:
        raise pa.ArrowInvalid(f"it has {size:,} bytes when it is unpacked, expected at most {_UNPACKED_BYTES:,}")
    return table.cast(schema)


def _text_bytes(column: pa.ChunkedArray) -> int:
    """The bytes of all texts in a column that holds each text once."""
    if not pa.types.is_dictionary(column.type):
        return 0
    lengths = (pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices)).as_py() for chunk in column.chunks)
    return sum(length or 0 for length in lengths)


def check_json(data: bytes) -> None:
    """Raise ValueError for JSON of more values than any file here has, before it is parsed."""
    values = sum(map(data.count, (b",", b"[", b"{", b"\\")))
    if values > _JSON_VALUES:
        raise ValueError(f"it has {values:,} values, expected at most {_JSON_VALUES:,}")


def encode_table(table: pa.Table) -> bytes:
    """A table as Parquet, with its metadata."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def sealed_record(record: Mapping[str, Any]) -> bytes:
    """The file of a record, with its checksum. Raises ValueError if it is too large to be read again."""
    body = canonical_json(record)
    data = canonical_json({"body": json.loads(body), "sha256": hashlib.sha256(body).hexdigest()})
    if len(data) > RECORD_BYTES:
        raise ValueError(f"A record has {len(data):,} bytes, expected at most {RECORD_BYTES:,}.")
    return data


def opened_record(data: bytes) -> Mapping[str, Any] | None:
    """The record in a file, or None if the file is cut off or altered."""
    try:
        sealed = json.loads(data)
        body, checksum = sealed["body"], sealed["sha256"]
        intact = isinstance(body, dict) and hashlib.sha256(canonical_json(body)).hexdigest() == checksum
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return body if intact else None


def table_path(path: str) -> str:
    """The path itself. Raises ValueError unless it is `tables/….parquet` and stays in that folder."""
    return _checked_path(path, "tables", ".parquet")


def figure_path(path: str) -> str:
    """The path itself. Raises ValueError unless it is `figures/….png` and stays in that folder."""
    return _checked_path(path, "figures", ".png")


def _checked_path(path: str, folder: str, suffix: str) -> str:
    if not re.fullmatch(rf"{folder}(/{PATH_PART})+", path) or not path.endswith(suffix):
        raise ValueError(f"Expected a path {folder}/…{suffix}, found {path!r}.")
    return path


def blob_path(digest: str) -> str:
    """Where the blob with this digest lies. Raises CorruptStoreError for what is no digest."""
    return f"blobs/sha256/{hex_of(digest)}"


def record_path(key: str) -> str:
    """Where the record with this key lies. Raises ValueError for what is no key."""
    return f"stages/{_checked_key(key)}.json"


def _checkpoint_path(key: str) -> str:
    return f"checkpoints/{_checked_key(key)}.safetensors"


def _checked_key(key: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise ValueError(f"The key of a stage is 64 hexadecimal digits, not {key!r}.")
    return key
