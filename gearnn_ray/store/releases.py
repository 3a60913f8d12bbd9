"""Releases in a content-addressed store: jobs publish them, and readers pull them with every digest verified.

    blobs/sha256/<hex>             safetensors: the base, and the adaptors in the formats of `storage_formats.py`
    manifests/<hex>.json           one release: canonical JSON under its own digest
    refs/<name>/<tag>              the digest of a manifest; every complete split job writes `latest`
    signatures/<hex>/<public key>  the signature of a release's name and manifest (`signatures.py`), where somebody signed it
    tables/<name>/….parquet        measurements of the jobs
    figures/<name>/….png           pictures of them
    reports/<name>/….html          the page of an evaluation
    stages/<key>.json              the result of a finished stage, from which an interrupted job goes on
    checkpoints/<key>.safetensors  the state of an unfinished stage
    leases/<key>.json              which driver runs a job (`leases.py`), while it runs

Blobs and manifests never change. A file is written before any file that names it, and refs are written last. Two writers of the
same content write the same bytes, so they cannot harm each other.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.blobs import (
    RECORD_BYTES,
    Blob,
    blob_path,
    canonical_json,
    check_json,
    digest_of,
    encode_table,
    figure_path,
    hex_of,
    opened_record,
    record_path,
    sealed_record,
    table_path,
)
from gearnn_ray.store.manifest import MANIFEST_BYTES, LevelEntry, Manifest, content_key, manifest_path, read_manifest
from gearnn_ray.store.tags import TaggedStore, check_name

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Release:
    """One published release in memory, verified. Its dicts are new, their tensors shared: clone a tensor before changing it."""

    content: Manifest
    digest: str  # of the manifest
    _base: Mapping[str, "Tensor"] = field(repr=False)
    _adaptors: Mapping[str, Mapping[str, "Tensor"]] = field(repr=False)  # as they are stored

    @property
    def manifest(self) -> dict[str, Any]:
        return self.content.as_json()

    @property
    def name(self) -> str:
        return self.content.name

    @property
    def levels(self) -> tuple[str, ...]:
        """The published levels, with `clean` if it was published."""
        return tuple(self._adaptors)

    def base_state(self) -> dict[str, "Tensor"]:
        """The base network, by state-dict names."""
        return dict(self._base)

    def adaptor_state(self, level: str) -> dict[str, "Tensor"]:
        """A level's restored tensors: `{**base, **adaptor}` is its network. Raises UserError for an unknown level."""
        from gearnn_ray.adaptors.storage_formats import decode

        return decode(self._base, self.stored_state(level))

    def stored_state(self, level: str) -> dict[str, "Tensor"]:
        """A level's adaptor as it is stored, for `storage_formats.decode`. Raises UserError for an unknown level."""
        if level not in self._adaptors:
            raise UserError(f"{self.name} has no level {level!r}. Its levels: {', '.join(self.levels) or 'none'}.")
        return dict(self._adaptors[level])


class Store(TaggedStore):
    """A store of releases. `BlobStore` describes addresses and how a store is opened."""

    def publish(
        self,
        manifest: Manifest,
        tables: Mapping[str, pa.Table],
        tags: Sequence[str] = (),
        *,
        latest: bool = True,
        figures: Mapping[str, bytes] | None = None,
        stages: Sequence[str] = (),
    ) -> str:
        """Publish a release whose blobs are in the store, and return the digest of its manifest. `tables` and `figures` map
        paths, as in `put_table` and `put_figure`, to tables and PNG files; the manifest lists them. Publishing the same content
        again adds nothing and returns the same digest: `created`, tables and figures are those of the first who published it
        here, as long as they are intact, because whoever computes the same again measures other seconds. `tags`, and `latest`
        unless it is False, then point to the manifest. `stages`: keys of the records that it was made from, which `gc` keeps as
        long as a tag leads to the release. Raises UserError for an invalid manifest or an unsafe tag, CorruptStoreError for a
        missing or altered blob; every ref then stays unchanged.
        """
        files = {table_path(path): encode_table(table) for path, table in tables.items()}
        files |= {figure_path(path): png for path, png in (figures or {}).items()}
        made = {path: Blob(digest=digest_of(data), bytes=len(data)) for path, data in files.items()}
        listed: Mapping[str, Blob] = {**manifest.files, **made}
        content = {key: value for key, value in manifest.as_json().items() if key not in ("created", "tables", "figures")}
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        release = _read_as_published(content, listed, now)[2]
        for tag in tags:
            check_name("tag", tag)
        with self._files.plain_errors("written"):
            for blob in {*release.blobs, *(blob for path, blob in listed.items() if path not in files)}:
                intact = self._intact(blob)
                if not self._files.refresh(blob_path(blob.digest), intact):  # a collector took it since it was read
                    self.put_blob(bytes(intact))
            for data in files.values():
                self.put_blob(data)
            # Before the manifest: a job interrupted here finds the same time again, and therefore the same digest.
            created, listed = self._first_published(content, listed, now, stages)
            digest, data, release = _read_as_published(content, listed, created)
            self._files.write(manifest_path(digest), data)
            self._point(release, digest, [*tags, *(["latest"] if latest else [])])
        return digest

    def pull(self, ref: str, require_signature: str | None = None) -> Release:
        """The release "name" (its `latest`), "name:tag" or "name@sha256:<hex>", verified. Raises UserError if it does not exist,
        CorruptStoreError, naming the digest, for a file that is missing, altered or in conflict with the manifest.

        require_signature: a public key, as a PEM file or 64 hexadecimal digits. A release without a valid signature by this key
        is refused with a UserError before its manifest is read.
        """
        with self._files.plain_errors("read"):
            name, digest = self._resolve(ref)
            self._require_signature(name, digest, require_signature)
            manifest = self._manifest(name, digest)
            base = self._state(manifest.base)
            # An adaptor that levels share is read, and held in memory, once.
            adaptors = {entry.adaptor_blob for entry in manifest.levels.values()}
            states = {None if blob is None else blob.digest: self._state(blob) for blob in adaptors}
            stored = {level: states[entry.digest] for level, entry in manifest.levels.items()}
        for level, entry in manifest.levels.items():
            _check_adaptor(level, entry, stored[level], base)
        return Release(manifest, digest, base, stored)

    def manifest(self, ref: str, require_signature: str | None = None) -> tuple[str, Manifest]:
        """The digest and the content of a release's manifest, without its blobs. Arguments and errors as in `pull`."""
        with self._files.plain_errors("read"):
            name, digest = self._resolve(ref)
            self._require_signature(name, digest, require_signature)
            return digest, self._manifest(name, digest)

    def sign(self, ref: str, key: str | os.PathLike[str]) -> str:
        """Sign a release with the private key in a PEM file, and return the public key's 64 hexadecimal digits. `ref` and errors
        as in `pull`. Raises UserError for a file without an ed25519 key.
        """
        from gearnn_ray.store import signatures

        private = signatures.read_private_key(key)
        digest, manifest = self.manifest(ref)
        public, signature = signatures.sign(manifest.name, digest, private)
        with self._files.plain_errors("written"):
            self._files.write(signatures.signature_path(digest, public), signature)
        return public

    def signers(self, ref: str) -> list[str]:
        """The public keys, 64 hexadecimal digits each, whose valid signatures the release has. `ref` as in `pull`."""
        with self._files.plain_errors("read"):
            name, digest = self._resolve(ref)
            found = []
            for key in self._files.files(f"signatures/{hex_of(digest)}"):
                with suppress(UserError):
                    hex_of(f"sha256:{key}")  # the name of a foreign file must not be taken for the path of a key
                    self._require_signature(name, digest, key)
                    found.append(key)
        return found

    def copy_to(self, other: "Store", ref: str, require_signature: str | None = None) -> str:
        """Copy a release with its tables, figures and valid signatures to another store; return its digest. No tag is written.
        Arguments and errors as in `pull`. Raises UserError where the other store cannot be written.
        """
        with self._files.plain_errors("read"):
            name, digest = self._resolve(ref)
            self._require_signature(name, digest, require_signature)
            manifest = self._manifest(name, digest)
            missing = [blob for blob in manifest.needed if not other.is_intact(blob.digest)]
            signatures = (f"signatures/{hex_of(digest)}/{key}" for key in self.signers(f"{name}@{digest}"))
            paths = [f"manifests/{hex_of(digest)}.json", *signatures]
            with other._files.plain_errors("written"):
                for blob in missing:
                    other.put_blob(bytes(self._intact(blob)))
                for path in paths:
                    other._files.write(path, self._files.read(path) or b"")
        return digest

    def verify(self) -> list[str]:
        """Read everything that a tag leads to, and all stage records; a sentence for each thing that is wrong, none if all is
        well.
        """
        from gearnn_ray.store.verification import problems

        return problems(self)

    def gc(self, grace_seconds: float, dry_run: bool = True) -> list[str]:
        """Delete what no tag leads to and nobody has written or used for `grace_seconds`: blobs, manifests, stage records,
        checkpoints, leases, tables, figures, reports, signatures, temporary files. Returns a line for each, with its bytes; with
        `dry_run` nothing is deleted. Beside running jobs it is safe if no job relies on what it used longer ago than
        `grace_seconds`. Raises UserError, and deletes nothing, where a tag or its manifest cannot be read. Unfinished uploads on
        S3 cannot be seen here.
        """
        from gearnn_ray.store.collection import collect

        return collect(self._files, grace_seconds, dry_run)

    def _resolve(self, ref: str) -> tuple[str, str]:
        """The name and the manifest digest that a reference stands for."""
        name, pinned, digest = ref.partition("@")
        if pinned:
            check_name("name", name)
            return name, digest
        name, tagged, tag = ref.partition(":")
        tag = tag if tagged else "latest"
        if (found := self.tag_digest(name, tag)) is not None:
            return name, found
        if tags := self.tags(name):
            known = f"the store {self.uri} has {', '.join(f'{name}:{each}' for each in tags)}. Choose one of these."
        elif names := self.names():
            known = f"the store {self.uri} has releases of {', '.join(names)}. Choose one of these, or check --store."
        else:
            known = f"the store {self.uri} is empty. Run the split job first, or check --store."
        raise UserError(f"No release {name}:{tag}: {known}")

    def _first_published(
        self, content: Mapping[str, Any], files: Mapping[str, Blob], now: str, stages: Sequence[str]
    ) -> tuple[str, Mapping[str, Blob]]:
        """When this content was first published here, and with which tables and figures: now and these, unless somebody was first
        whose files have the same paths and are intact. Notes the stages of this publisher too.
        """
        key = content_key(content)
        seen = _files_in(self.get_record(key) or {})
        damaged = {} if all(self.is_intact(blob.digest) for blob in seen.values()) else seen

        def note(before: bytes | None) -> bytes:
            record = opened_record(before or b"") or {}
            created, first = str(record.get("created", now)), _files_in(record)
            # the files of somebody who was here meanwhile are young: they need no second look
            kept = first if first.keys() >= files.keys() and first != damaged else files
            body = {
                "manifest": _as_published(content, kept, created)[0],
                "created": created,
                "files": _as_json(kept),
                "stages": sorted({*record.get("stages", ()), *stages}),
            }
            return sealed_record(body)

        record = opened_record(self._files.update(record_path(key), note, RECORD_BYTES) or b"")
        assert record is not None
        return str(record["created"]), _files_in(record)

    def _require_signature(self, name: str, digest: str, key: str | None) -> None:
        """Raise UserError unless the key, if one is given, has signed this release under this name."""
        if key is None:
            return
        from gearnn_ray.store import signatures

        public = signatures.public_key(key)
        path = signatures.signature_path(digest, public)
        size = self._files.size(path)
        if size is None:
            raise UserError(
                f"{name}@{digest} in {self.uri} has no signature by the key {public[:12]}…. Sign it with `gearnn sign`, or "
                "require the key of its publisher."
            )
        # by size first, because whoever can write to the store chooses the size
        signature = self._files.read(path) if size == signatures.SIGNATURE_BYTES else None
        signatures.check_signature(name, digest, signature or b"", public)

    def _state(self, blob: Blob | None) -> dict[str, "Tensor"]:
        from gearnn_ray.store.states import decode_state

        return {} if blob is None else decode_state(self._intact(blob))


def _check_adaptor(level: str, entry: LevelEntry, stored: Mapping[str, "Tensor"], base: Mapping[str, "Tensor"]) -> None:
    """Raise CorruptStoreError unless the stored adaptor fits the base and has the storage formats and floats of its entry."""
    from gearnn_ray.adaptors.storage_formats import decode, formats_of

    try:
        formats = {name: each for name, each in formats_of(stored).items() if each != "float32"}
        for name in sorted(formats.keys() | entry.storage_formats):
            found, expected = (each.get(name, "float32 or not at all") for each in (formats, entry.storage_formats))
            if found != expected:
                raise ValueError(f"{name!r} is stored as {found}, but the manifest says {expected}")
        floats = sum(tensor.numel() for tensor in decode(base, stored).values())
        if floats != entry.floats:
            raise ValueError(f"it holds {floats:,} numbers, but the manifest says {entry.floats:,}")
    except ValueError as error:
        raise CorruptStoreError(f"{entry.digest}, the adaptor of {level}, cannot be used: {error}.") from error


def _as_json(files: Mapping[str, Blob]) -> Mapping[str, object]:
    return {path: blob.model_dump() for path, blob in files.items()}


def _files_in(record: Mapping[str, Any]) -> Mapping[str, Blob]:
    """The tables and figures that the record of a publication lists."""
    return {path: Blob.model_validate(blob) for path, blob in record.get("files", {}).items()}


def _as_published(content: Mapping[str, Any], files: Mapping[str, Blob], created: str) -> tuple[str, bytes]:
    """The digest and the bytes of the manifest with this content and these tables and figures."""
    listed = {kind: {path: files[path] for path in files if path.startswith(f"{kind}/")} for kind in ("tables", "figures")}
    data = canonical_json({**content, **{kind: _as_json(own) for kind, own in listed.items() if own}, "created": created})
    return digest_of(data), data


def _read_as_published(content: Mapping[str, Any], files: Mapping[str, Blob], created: str) -> tuple[str, bytes, Manifest]:
    """The same, and the manifest that a reader finds in it. Raises UserError where a reader would refuse it."""
    digest, data = _as_published(content, files, created)
    if len(data) > MANIFEST_BYTES:
        raise UserError(
            f"The manifest of {content.get('name')} has {len(data):,} bytes, expected at most {MANIFEST_BYTES:,}. "
            "Publish fewer levels in one release."
        )
    try:
        check_json(data)
    except ValueError as error:
        raise UserError(
            f"The manifest of {content.get('name')} cannot be read: {error}. Publish fewer levels in one release."
        ) from error
    return digest, data, read_manifest(data, digest)
