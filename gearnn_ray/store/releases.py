"""Releases in a content-addressed store: jobs publish them, and readers pull them with every digest verified.

    blobs/sha256/<hex>             safetensors: the base, and the adaptors in the formats of `storage_formats.py`
    manifests/<hex>.json           one release: canonical JSON under its own digest
    refs/<name>/<tag>              the digest of a manifest; every complete split job writes `latest`
    tables/<name>/….parquet        measurements of the jobs
    figures/<name>/….png           pictures of them
    reports/<name>/….html          the page of an evaluation
    stages/<key>.json              the result of a finished stage, from which an interrupted job goes on
    checkpoints/<key>.safetensors  the state of an unfinished stage

Blobs and manifests never change. A file is written before any file that names it, and refs are written last. Two writers of the
same content write the same bytes, so they cannot harm each other.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.blobs import Blob, BlobStore, canonical_json, digest_of, hex_of, is_digest, table_path
from gearnn_ray.store.manifest import NAME_PATTERN, LevelEntry, Manifest, read_manifest

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


class Store(BlobStore):
    """A store of releases. `BlobStore` describes addresses and how a store is opened."""

    def publish(
        self, manifest: Manifest, tables: Mapping[str, pa.Table], tags: Sequence[str] = (), *, latest: bool = True
    ) -> str:
        """Publish a release whose blobs are in the store, and return the digest of its manifest. `created` is the time at which
        this content was first published here, so publishing it again adds nothing and returns the same digest. `tables` maps
        paths as in `put_table` to tables. `tags`, and `latest` unless it is False, then point to the manifest. Raises UserError
        for an invalid manifest or an unsafe tag, CorruptStoreError for a missing or altered blob; every ref then stays unchanged.
        """
        content = {key: value for key, value in manifest.as_json().items() if key != "created"}
        key = hashlib.sha256(canonical_json(content)).hexdigest()
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        created = (self.get_record(key) or {}).get("created", now)
        data = canonical_json({**content, "created": created})
        digest = digest_of(data)
        release = read_manifest(data, digest)
        for tag in tags:
            _check_name("tag", tag)
        for path in tables:
            table_path(path)
        for blob in release.blobs:
            self._intact(blob)

        for path, table in tables.items():
            self.put_table(path, table)
        # Before the manifest: a job interrupted here finds the same time again, and therefore the same digest.
        self.put_record(key, {"manifest": digest, "created": created})
        self._files.write(f"manifests/{hex_of(digest)}.json", data)
        for tag in dict.fromkeys((*tags, *(["latest"] if latest else []))):
            self._files.write(f"refs/{release.name}/{tag}", digest.encode())
        return digest

    def pull(self, ref: str) -> Release:
        """The release "name" (its `latest`), "name:tag" or "name@sha256:<hex>", verified. Raises UserError if it does not exist,
        CorruptStoreError, naming the digest, for a file that is missing, altered or in conflict with the manifest.
        """
        with self._files.plain_errors("read"):
            name, digest = self._resolve(ref)
            manifest = self._manifest(name, digest)
            base = self._state(manifest.base)
            # An adaptor that levels share is read, and held in memory, once.
            adaptors = {entry.adaptor_blob for entry in manifest.levels.values()}
            states = {None if blob is None else blob.digest: self._state(blob) for blob in adaptors}
            stored = {level: states[entry.digest] for level, entry in manifest.levels.items()}
        for level, entry in manifest.levels.items():
            _check_adaptor(level, entry, stored[level], base)
        return Release(manifest, digest, base, stored)

    def manifest(self, ref: str) -> tuple[str, Manifest]:
        """The digest and the content of a release's manifest, without its blobs. `ref` and errors as in `pull`."""
        with self._files.plain_errors("read"):
            name, digest = self._resolve(ref)
            return digest, self._manifest(name, digest)

    def tag(self, name: str, tag: str, digest: str) -> None:
        """Point a tag at a manifest in the store; moving `latest` back is a rollback. Raises UserError for an unsafe name or tag
        and for a manifest of another name, CorruptStoreError if the manifest is missing or altered.
        """
        _check_name("name", name)
        _check_name("tag", tag)
        self._manifest(name, digest)
        self._files.write(f"refs/{name}/{tag}", digest.encode())

    def tag_digest(self, name: str, tag: str) -> str | None:
        """The manifest digest that a tag points to, or None if the tag does not exist. Reads no other file. Raises UserError for
        an unsafe name or tag, CorruptStoreError if the file holds no digest.
        """
        _check_name("name", name)
        _check_name("tag", tag)
        with self._files.plain_errors("read"):
            text = self._ref(name, tag)
        if text is not None and not is_digest(text):
            raise CorruptStoreError(
                f"refs/{name}/{tag} in {self.uri} holds {text[:80]!r}, expected a digest. "
                "Publish the release again, or write the digest of its manifest there."
            )
        return text

    def tags(self, name: str) -> dict[str, str]:
        """A release's tags and their manifest digests; empty for an unknown name. Files without a digest are left out."""
        _check_name("name", name)
        with self._files.plain_errors("read"):
            tags = [file for file in self._files.files(f"refs/{name}") if re.fullmatch(NAME_PATTERN, file)]
            texts = {tag: self._ref(name, tag) for tag in tags}
        return {tag: text for tag, text in texts.items() if text is not None and is_digest(text)}

    def names(self) -> list[str]:
        """The names that releases are published under."""
        with self._files.plain_errors("read"):
            return sorted({path.partition("/")[0] for path in self._files.files("refs") if "/" in path})

    def _resolve(self, ref: str) -> tuple[str, str]:
        """The name and the manifest digest that a reference stands for."""
        name, pinned, digest = ref.partition("@")
        if pinned:
            _check_name("name", name)
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

    def _ref(self, name: str, tag: str) -> str | None:
        data = self._files.read(f"refs/{name}/{tag}")
        return None if data is None else data.decode(errors="replace").strip()

    def _manifest(self, name: str, digest: str) -> Manifest:
        data = self._verified(f"manifests/{hex_of(digest)}.json", digest)
        manifest = read_manifest(bytes(data), digest)
        if manifest.name != name:
            raise UserError(f"The manifest {digest} is a release of {manifest.name!r}, not of {name!r}.")
        return manifest

    def _intact(self, blob: Blob) -> memoryview:
        """The bytes of a blob. Raises CorruptStoreError unless they have the digest and the length of the manifest."""
        data = self._verified(f"blobs/sha256/{hex_of(blob.digest)}", blob.digest)
        if data.nbytes != blob.bytes:
            raise CorruptStoreError(f"{blob.digest} has {data.nbytes} bytes, but the manifest says {blob.bytes}.")
        return data

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


def _check_name(what: str, text: str) -> None:
    if not re.fullmatch(NAME_PATTERN, text):
        raise UserError(
            f"The {what} {text!r} cannot be used: expected up to 128 letters, digits, dots, dashes and underscores, "
            "starting with a letter or digit."
        )
