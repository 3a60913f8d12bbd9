"""Where releases live: a content-addressed store that jobs publish to and anyone pulls from, verified.

    blobs/sha256/<hex>             safetensors: the base, the adaptors (`codes.py` says how)
    manifests/<hex>.json           one release: canonical JSON, named by its own digest
    refs/<name>/<tag>              the digest of a manifest; every split writes `latest`
    tables/<name>/….parquet        what was measured on the way
    figures/<name>/….png           pictures of it
    reports/<name>/….html          what an evaluation found, as a page
    stages/<key>.json              what a finished stage returned (how an interrupted job goes on)
    checkpoints/<key>.safetensors  where an unfinished stage stands

Blobs and manifests never change, and everything is written before what points to it, refs last. Two writers
of the same content write the same bytes, so they do each other no harm. Knows nothing about networks, Ray, or
what a level means.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

import pyarrow as pa
from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, StringConstraints, ValidationError
from torch import Tensor

from gearnn_ray.adaptors.storage_formats import check_format, decode, formats_of
from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.blobs import (
    DIGEST,
    PART,
    Blob,
    BlobStore,
    canonical_json,
    decode_state,
    digest_of,
    encode_state,
    hex_of,
    table_path,
)

__all__ = ["SCHEMA", "Blob", "Release", "Store", "decode_state", "digest_of", "encode_state"]

SCHEMA = 1  # of the manifest; raise it when an older reader would misread a newer one
_STORED_FORMATS_SCHEMA = 2  # of one with a level whose adaptor is stored under codes

_CLEAN = "clean"  # the undistorted level: the base itself, without an adaptor
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


@dataclass(frozen=True, eq=False)
class Release:
    """One published release, verified, in memory.

    The dicts it hands out are fresh, the tensors in them shared: clone one before changing it in place.
    """

    manifest: dict[str, Any]
    digest: str  # of the manifest
    _base: Mapping[str, Tensor] = field(repr=False)
    _adaptors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)  # as they are stored

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def levels(self) -> tuple[str, ...]:
        """The published levels, `clean` among them where it was published."""
        return tuple(self._adaptors)

    def base_state(self) -> dict[str, Tensor]:
        """The base network, by state-dict names."""
        return dict(self._base)

    def adaptor_state(self, level: str) -> dict[str, Tensor]:
        """What a level changes: `{**base, **adaptor}` is its network. Raises UserError for others.

        Tensors that are stored under a code (`codes.py`) are restored anew at each call.
        """
        return decode(self._base, self.stored_state(level))

    def stored_state(self, level: str) -> dict[str, Tensor]:
        """What a level changes, as it is stored: `codes.decode` gives `adaptor_state`. Raises UserError for others."""
        if level not in self._adaptors:
            raise UserError(f"{self.name} has no level {level!r}, it has {', '.join(self.levels) or 'none'}")
        return dict(self._adaptors[level])


class Store(BlobStore):
    """A store of releases; opening and addresses as in `BlobStore`."""

    def publish(
        self, manifest: dict[str, Any], tables: Mapping[str, pa.Table], tags: Sequence[str] = (), *, latest: bool = True
    ) -> str:
        """Publish a release whose blobs lie here already; returns the digest of its manifest.

        `manifest` comes without `created`, which is added: when this content was first published here, so
        that publishing it again adds nothing and returns the same digest. A level whose blob `codes.encode` made
        says so in `codes`: those other than float32, by the tensors' names in the base. With any the manifest is
        written in the schema that older readers refuse, though it came in `SCHEMA`. `tables` go by path as in
        `put_table`. `tags` and, unless told otherwise, `latest` then point to the manifest. Raises UserError, with every
        ref as it was, for a manifest that is none (`_Manifest`), a blob that is not here, an unsafe name or tag.
        """
        content = {key: value for key, value in manifest.items() if key != "created"}
        if content.get("schema") == SCHEMA:
            content["schema"] = _schema_of(content)
        key = hashlib.sha256(canonical_json(content)).hexdigest()
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        created = (self.get_record(key) or {}).get("created", now)
        data = canonical_json({**content, "created": created})
        digest = digest_of(data)

        _check_name("name", str(content.get("name")))
        release = _parse_manifest(json.loads(data), digest)
        for tag in tags:
            _check_name("tag", tag)
        for path in tables:
            table_path(path)
        for entry in (release.base, *release.levels.values()):
            if entry.digest is not None and self._blob_size(entry.digest) != entry.bytes:
                size = f"{entry.bytes:,} bytes"
                raise CorruptStoreError(f"{entry.digest} of {size} is not in {self.uri}, put it there first")

        for path, table in tables.items():
            self.put_table(path, table)
        # Before the manifest: who is interrupted here finds the same time again, hence the same digest.
        self.put_record(key, {"manifest": digest, "created": created})
        self._files.write(f"manifests/{hex_of(digest)}.json", data)
        for tag in dict.fromkeys((*tags, *(["latest"] if latest else []))):
            self._files.write(f"refs/{release.name}/{tag}", digest.encode())
        return digest

    def pull(self, ref: str) -> Release:
        """The release "name" (its `latest`), "name:tag" or "name@sha256:<hex>"; everything in it is verified.

        Raises UserError when it is not there, CorruptStoreError naming the digest of what is missing, altered
        or at odds with the manifest.
        """
        with self._files.plain_errors("read"):
            name, digest = self._resolve(ref)
            content, manifest = self._manifest(name, digest)
            base = self._state(manifest.base)
            # an adaptor that levels share is read, and held, once
            states = {entry.digest: self._state(entry) for entry in manifest.levels.values()}
            stored = {level: states[entry.digest] for level, entry in manifest.levels.items()}
        for level, entry in manifest.levels.items():
            _check_adaptor(level, entry, stored[level], base)
        return Release(content, digest, base, stored)

    def manifest(self, ref: str) -> tuple[str, dict[str, Any]]:
        """Digest and content of a release's manifest, without its blobs. `ref` and errors as in `pull`."""
        with self._files.plain_errors("read"):
            name, digest = self._resolve(ref)
            return digest, self._manifest(name, digest)[0]

    def tag(self, name: str, tag: str, digest: str) -> None:
        """Point a tag at a manifest that is here; moving `latest` back is a rollback. Raises UserError."""
        _check_name("name", name)
        _check_name("tag", tag)
        self._manifest(name, digest)
        self._files.write(f"refs/{name}/{tag}", digest.encode())

    def tags(self, name: str) -> dict[str, str]:
        """The tags of a release and the manifest digests they point to; empty for an unknown name."""
        _check_name("name", name)
        with self._files.plain_errors("read"):
            found = {tag: self._ref(name, tag) for tag in self._files.files(f"refs/{name}")}
        return {tag: digest for tag, digest in found.items() if digest is not None}

    def names(self) -> list[str]:
        """The names releases are published under."""
        with self._files.plain_errors("read"):
            return sorted({path.partition("/")[0] for path in self._files.files("refs")})

    def _resolve(self, ref: str) -> tuple[str, str]:
        """The name and the manifest digest that a reference means."""
        name, pinned, digest = ref.partition("@")
        if pinned:
            _check_name("name", name)
            return name, digest
        name, tagged, tag = ref.partition(":")
        tag = tag if tagged else "latest"
        _check_name("name", name)
        _check_name("tag", tag)
        found = self._ref(name, tag)
        if found is None:
            known = [f"{name}:{tag}" for tag in self.tags(name)] or self.names()
            there = ", ".join(known) or "none at all"
            raise UserError(f"there is no release {name}:{tag} in {self.uri}, there is {there}")
        return name, found

    def _ref(self, name: str, tag: str) -> str | None:
        data = self._files.read(f"refs/{name}/{tag}")
        if data is None:
            return None
        digest = data.decode(errors="replace").strip()
        if not re.fullmatch(DIGEST, digest):
            raise CorruptStoreError(f"refs/{name}/{tag} in {self.uri} is {digest[:80]!r}, expected a digest")
        return digest

    def _manifest(self, name: str, digest: str) -> tuple[dict[str, Any], "_Manifest"]:
        data = self._verified(f"manifests/{hex_of(digest)}.json", digest)
        try:
            content = json.loads(bytes(data))
        except ValueError as error:
            raise CorruptStoreError(f"the manifest {digest} is not JSON: {error}") from error
        manifest = _parse_manifest(content, digest)
        if manifest.name != name:
            raise UserError(f"the manifest {digest} is a release of {manifest.name!r}, not of {name!r}")
        return content, manifest

    def _state(self, entry: "_BlobEntry") -> dict[str, Tensor]:
        if entry.digest is None:
            return {}
        data = self._blob(entry.digest)
        if data.nbytes != entry.bytes:
            raise CorruptStoreError(f"{entry.digest} has {data.nbytes} bytes, the manifest says {entry.bytes}")
        return decode_state(data)


# What a manifest says at least; it may say more.


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _BlobEntry(_Entry):
    digest: Annotated[str, StringConstraints(pattern=DIGEST)] | None
    bytes: NonNegativeInt


class _BaseEntry(_BlobEntry):
    digest: Annotated[str, StringConstraints(pattern=DIGEST)]


class _LevelEntry(_BlobEntry):
    floats: NonNegativeInt
    layers: list[str]
    scores: dict[str, Any]
    storage_formats: dict[str, Annotated[str, AfterValidator(check_format)]] = {}


class _Model(_Entry):
    name: str
    num_classes: NonNegativeInt
    floats: NonNegativeInt
    task: str
    normalisation: Any


class _Manifest(_Entry):
    name: Annotated[str, StringConstraints(pattern=_NAME)]
    created: str
    model: _Model
    base: _BaseEntry
    levels: dict[Annotated[str, StringConstraints(pattern=f"^{PART}$")], _LevelEntry]
    budget: Any
    recipe: dict[str, Any]
    versions: dict[str, Any]


def _schema_of(content: Mapping[str, Any]) -> int:
    """The schema that a manifest, checked or not, is written with."""
    levels = content.get("levels")
    entries = levels.values() if isinstance(levels, Mapping) else ()
    stored_variants = any(isinstance(entry, Mapping) and entry.get("storage_formats") for entry in entries)
    return _STORED_FORMATS_SCHEMA if stored_variants else SCHEMA


def _parse_manifest(content: Any, digest: str) -> _Manifest:
    """Raises CorruptStoreError naming manifest and entry, UserError for another schema version."""
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in (SCHEMA, _STORED_FORMATS_SCHEMA):
        wrote = f"the manifest {digest} was written with schema version {schema!r}"
        raise UserError(f"{wrote}, this gearnn_ray reads {SCHEMA} and {_STORED_FORMATS_SCHEMA}: use one that fits")
    if schema != _schema_of(content):
        wrote = f"the manifest {digest} was written with schema version {schema}"
        raise CorruptStoreError(f"{wrote}, and its levels' codes ask for {_schema_of(content)}")
    try:
        manifest = _Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, found = ".".join(map(str, first["loc"])), f"{first['input']!r:.100}"
        fault = f"the manifest {digest} is not valid at {place}: {first['msg']}"
        raise CorruptStoreError(f"{fault} (found {found})") from error
    for level, entry in manifest.levels.items():
        empty = not (entry.digest or entry.bytes or entry.floats or entry.layers or entry.storage_formats)
        if not empty if level == _CLEAN else entry.digest is None:
            rule = f"{_CLEAN} has no digest and holds nothing, every other level has an adaptor"
            raise CorruptStoreError(f"the manifest {digest} is not valid at levels.{level}: {rule}")
    return manifest


def _check_adaptor(level: str, entry: _LevelEntry, stored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Raise CorruptStoreError unless a level's blob is coded as the manifest says, every restored tensor fits one of the
    base, and together they count `floats`.
    """
    what = f"{entry.digest}, the adaptor of {level},"
    adaptor = _decoded(what, entry.storage_formats, stored, base) if entry.storage_formats else stored
    for name, tensor in adaptor.items():
        if name not in base:
            raise CorruptStoreError(f"{what} holds {name!r}, which the base has not")
        if (tensor.shape, tensor.dtype) != (base[name].shape, base[name].dtype):
            ours, its = (f"{list(each.shape)} of {each.dtype}" for each in (tensor, base[name]))
            raise CorruptStoreError(f"{what} holds {name!r} as {ours}, the base as {its}")
    count = sum(tensor.numel() for tensor in adaptor.values())
    if count != entry.floats:
        raise CorruptStoreError(f"{what} holds {count:,} numbers, the manifest says {entry.floats:,}")


def _decoded(
    what: str, storage_formats: Mapping[str, str], stored: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    try:
        found = {
            name: storage_format for name, storage_format in formats_of(stored).items() if storage_format != "float32"
        }
        for name in sorted(found.keys() | storage_formats):
            if found.get(name) != storage_formats.get(name):
                ours, its = (each.get(name, "float32 or not at all") for each in (found, storage_formats))
                raise ValueError(f"{name!r} is stored as {ours}, the manifest says {its}")
        return decode(base, stored)
    except ValueError as error:
        raise CorruptStoreError(f"{what} cannot be decoded: {error}") from error


def _check_name(what: str, text: str) -> None:
    if not re.fullmatch(_NAME, text):
        rule = "take up to 128 letters, digits, dots, dashes and underscores, a letter or digit first"
        raise UserError(f"the {what} {text!r} cannot be used: {rule}")
