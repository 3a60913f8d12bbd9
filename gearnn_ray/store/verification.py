"""Everything that a tag leads to, and every stage record, read and compared: what is wrong, in sentences."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.blobs import RECORD_BYTES, Blob, blob_path, opened_record
from gearnn_ray.store.collection import named_blobs
from gearnn_ray.store.manifest import NAME_PATTERN

if TYPE_CHECKING:
    from gearnn_ray.store.releases import Store


def problems(store: "Store") -> list[str]:
    """What `Store.verify` returns. Blobs that releases share are read once. Raises UserError if the store cannot be read."""
    with store._files.plain_errors("read"):
        return [*_of_releases(store), *_of_records(store)]


def _of_releases(store: "Store") -> Iterator[str]:
    pulled: set[str] = set()

    @functools.cache
    def check(blob: Blob) -> str | None:
        return _problem(lambda: store._verified(blob_path(blob.digest), blob.digest, blob.bytes))

    for path in store._files.files("refs"):
        name, _, tag = path.partition("/")
        if not (re.fullmatch(NAME_PATTERN, name) and re.fullmatch(NAME_PATTERN, tag)):
            continue  # a file beside the refs
        ref = f"{name}:{tag}"
        try:
            digest, manifest = store.manifest(ref)
        except UserError as error:
            yield f"{ref}: {error}"
            continue
        if digest not in pulled:
            pulled.add(digest)
            kept = [blob for blob in manifest.blobs if store._files.size(blob_path(blob.digest)) is not None]
            wrong = [each for blob in dict.fromkeys((*manifest.needed, *kept)) if (each := check(blob))]
            # the digests are right, but do the adaptors fit the base?
            wrong = wrong or [each for each in [_problem(functools.partial(store.pull, ref))] if each]
            yield from (f"{ref}: {each}" for each in wrong)
        if tag == "latest":
            yield from (f"{ref}: {each}" for file, blob in manifest.files.items() if (each := _differs(store, file, blob)))


def _differs(store: "Store", path: str, blob: Blob) -> str | None:
    """What is wrong with a table or figure of `latest` at its path, where people look."""
    if problem := _problem(lambda: store._verified(path, blob.digest, blob.bytes)):
        return f"{path} is not the one that the release lists ({problem.removesuffix('.')}). Tag the release again."
    return None


def _of_records(store: "Store") -> Iterator[str]:
    for entry in store._files.entries("stages"):
        if entry.is_temporary:
            continue
        read = functools.partial(_read_record, store, entry.path)
        if problem := _problem(read):
            yield problem


def _read_record(store: "Store", path: str) -> None:
    """Raise CorruptStoreError unless the record is whole and the blobs that it names are there, by their presence alone."""
    data = store._files.read(path, RECORD_BYTES)
    record = opened_record(data or b"")
    if data is None:
        return  # deleted since the listing
    if record is None:
        raise CorruptStoreError(f"{path} is altered or cut off. The job that needs this stage computes it again.")
    listed = "blobs" in record or "stage" not in record  # earlier versions also named blobs that were never stored
    for digest in sorted(named_blobs(record)) if listed else ():
        if store._files.size(blob_path(digest)) is None:
            raise CorruptStoreError(f"{path} names {digest}, which is missing. The job that needs this stage computes it again.")


def _problem(check: Callable[[], object]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None
