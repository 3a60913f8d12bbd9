"""What no tag leads to, and how it is deleted beside running jobs.

Why nothing that is used is ever deleted. Call G the grace period, and let every writer that relies on a file write it or make it
young (`FileTree.refresh`) less than G before the ref or record that names the file, or a manifest that leads to it, is there.

1. The listing comes first, then the refs, manifests and records are read. A file that one of these names when it is read is kept.
2. A file that is named only later was written or made young less than G before, so its time is later than the listing's time
   less G. Each time is looked at again when the file is to be deleted, and on a local folder under the lock that writers hold
   while they make a file young or give it its name: it is either young in time and stays, or gone before its writer looks, who
   then writes it again.
3. A release that loses its last tag was made young then (`TaggedStore._point`, `untag`), and a young manifest counts as tagged: a
   rollback finds everything within G, and what a publisher writes between manifest and ref is kept.
4. Names go before what they name, so that a collector that is killed leaves no manifest or record without its blobs.

On S3 looking at a time and deleting are two requests. A writer that makes a file young between these two loses it; it looks once
more after its refs (`TaggedStore._point`) and fails with a sentence. What remains is a collector that stands still between the
two requests for longer than a publication takes, and the first of the two cannot be made part of the second by pyarrow.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.blobs import RECORD_BYTES, blob_path, digest_of, is_digest, opened_record, record_path
from gearnn_ray.store.files import Entry, FileTree
from gearnn_ray.store.manifest import MANIFEST_BYTES, NAME_PATTERN, Manifest, content_key, manifest_path, read_manifest
from gearnn_ray.store.tags import REF_BYTES

_NAMES_FIRST = ("signatures", "manifests", "stages")
_OF_NAMES = ("tables", "figures", "reports")  # folders with a folder for each name
_FOLDERS = (*_NAMES_FIRST, "checkpoints", "leases", *_OF_NAMES, "blobs")


def collect(files: FileTree, grace_seconds: float, dry_run: bool) -> list[str]:
    """Delete what `Store.gc` says. A line for each file: its path and bytes."""
    if grace_seconds < 0:
        raise ValueError(f"The grace period is {grace_seconds} seconds, expected 0 or more.")
    with files.plain_errors("read"):
        entries = files.entries("")
        if not entries:
            return []
        limit = files.now() - grace_seconds
        reached = _Reached.of(files, entries, limit)
    old = [entry for entry in entries if entry.modified < limit and not reached.has(entry)]
    old.sort(key=lambda entry: (_NAMES_FIRST.index(_folder(entry)) if _folder(entry) in _NAMES_FIRST else 9, entry.path))
    with files.plain_errors("written"):
        gone = [entry for entry in old if dry_run or files.delete_if_older(entry.path, limit)]
    return [f"{entry.path}: {entry.bytes:,} bytes" for entry in gone]


def tagged(files: FileTree) -> dict[str, set[str]]:
    """The digests that the tags of each name lead to. Raises CorruptStoreError where a tag cannot be read."""
    found: dict[str, set[str]] = {}
    for path in files.files("refs"):
        name, _, tag = path.partition("/")
        if not (re.fullmatch(NAME_PATTERN, name) and re.fullmatch(NAME_PATTERN, tag)):
            continue
        data = files.read(f"refs/{path}", REF_BYTES)
        if data is None:
            continue  # removed since the listing
        digest = data.decode(errors="replace").strip()
        if not is_digest(digest):
            raise CorruptStoreError(
                f"refs/{path} in {files.uri} holds {digest[:80]!r}, expected a digest. Nothing was deleted: publish the release "
                "again, or remove the file."
            )
        found.setdefault(name, set()).add(digest)
    return found


def named_blobs(record: Mapping[str, Any]) -> set[str]:
    """The digests of the blobs that a stage record needs. A record that does not list them, of an earlier version, may need any
    digest in it.
    """
    if isinstance(listed := record.get("blobs"), list):
        return {digest for digest in listed if isinstance(digest, str) and is_digest(digest)}
    return set() if "manifest" in record else set(re.findall(r"sha256:[0-9a-f]{64}", json.dumps(record)))


@dataclass(frozen=True)
class _Reached:
    """What a tag, a young manifest or a young record leads to. names: of releases with a tag."""

    names: frozenset[str]
    paths: frozenset[str]
    manifests: frozenset[str]

    @classmethod
    def of(cls, files: FileTree, entries: list[Entry], limit: float) -> "_Reached":
        tags = tagged(files)
        manifests = dict(_manifests(files, entries, limit, {digest for each in tags.values() for digest in each}))
        blobs = {blob.digest for each in manifests.values() for blob in (*each.blobs, *each.files.values())}
        records, needed = _records(files, entries, limit, manifests.values(), blobs)
        paths = {manifest_path(digest) for digest in manifests} | records | {blob_path(digest) for digest in blobs | needed}
        return cls(frozenset(tags), frozenset(paths), frozenset(digest.removeprefix("sha256:") for digest in manifests))

    def has(self, entry: Entry) -> bool:
        folder, _, rest = entry.path.partition("/")
        if entry.is_temporary:
            return False
        if folder in _OF_NAMES:
            return rest.partition("/")[0] in self.names
        if folder == "signatures":
            return rest.partition("/")[0] in self.manifests
        return folder not in _FOLDERS or entry.path in self.paths


def _folder(entry: Entry) -> str:
    return entry.path.partition("/")[0]


def _manifests(files: FileTree, entries: Iterable[Entry], limit: float, tagged: set[str]) -> Iterator[tuple[str, Manifest]]:
    """The manifests that have a tag or are young. Raises UserError for one with a tag that cannot be read."""
    young = {f"sha256:{entry.path[10:-5]}" for entry in entries if _folder(entry) == "manifests" and entry.modified >= limit}
    for digest in tagged | {digest for digest in young if is_digest(digest)}:
        try:
            data = files.read(manifest_path(digest), MANIFEST_BYTES)
            if data is None or digest_of(data) != digest:
                raise CorruptStoreError(f"The manifest {digest}, which a tag leads to, is missing from {files.uri} or altered.")
            yield digest, read_manifest(data, digest)
        except UserError as error:
            if digest in tagged:
                advice = "Nothing was deleted: publish the release again, or remove its tags."
                raise CorruptStoreError(f"{str(error).removesuffix('.')}. {advice}") from error


def _records(
    files: FileTree, entries: Iterable[Entry], limit: float, manifests: Iterable[Manifest], blobs: set[str]
) -> tuple[set[str], set[str]]:
    """The paths of the records that are kept, and the digests of the blobs that they need. Kept are young ones, those that a
    release was made from, and those whose result is a blob of a release.
    """
    stages = [entry for entry in entries if _folder(entry) == "stages"]
    opened = {entry.path: opened_record(files.read(entry.path, RECORD_BYTES) or b"") or {} for entry in stages}
    kept = {entry.path for entry in stages if entry.modified >= limit}
    for manifest in manifests:
        path = record_path(content_key(manifest.as_json()))
        keys = opened.get(path, {}).get("stages", [])
        kept |= {path, *(record_path(key) for key in keys if re.fullmatch("[0-9a-f]{64}", str(key)))}
    needs = {path: named_blobs(record) for path, record in opened.items()}
    kept |= {path for path, named in needs.items() if named & blobs}
    return kept, {digest for path in kept for digest in needs.get(path, ())}
