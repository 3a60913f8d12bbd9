"""The manifest of a release as a typed, frozen model, and its canonical JSON. The JSON omits entries that are None or empty and
keeps unknown ones, so that a manifest that is read and published again has the same digest.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from gearnn_ray.config.recipe import StorageFormat
from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.store.blobs import PATH_PART, Blob, Digest, canonical_json, check_json, hex_of

SCHEMA: Final = 2  # raise it when a reader of this number would misread a newer manifest

MANIFEST_BYTES = 4 * 2**20
"""The largest manifest. A hundred levels that change a thousand layers each take less; a reader parses as much in 0.1 s."""

MOST_CLASSES = 10_000
"""Of a network: data sets have up to a few thousand, and a reader builds a network with outputs for all that a manifest names."""

_Side = Annotated[int, Field(ge=1, le=2**14)]  # pixels; a reader makes images of this size

_CLEAN = "clean"  # the undistorted level: the base itself, without an adaptor
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"  # of releases and tags


class _Entry(BaseModel):
    # NaN in a plain mapping stays NaN, so that `canonical_json` refuses it.
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, ser_json_inf_nan="constants")


class NormalisationEntry(_Entry):
    """Mean and standard deviation of the RGB channels, pixel values in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ModelEntry(_Entry):
    """The network: `floats` counts its floating-point values, running statistics included; `arguments` it is built with;
    `pad_to`: its images are padded to multiples of this number of pixels; `input_size`: height and width to which frames are
    scaled before, by default none, so that they are fed at their own size.
    """

    name: str
    num_classes: Annotated[int, Field(ge=0, le=MOST_CLASSES)]
    class_names: tuple[str, ...] = ()
    floats: NonNegativeInt
    task: str
    normalisation: NormalisationEntry
    arguments: Mapping[str, int | float | bool | str] = Field(default_factory=dict)
    pad_to: Annotated[int, Field(ge=2, le=1024)] | None = None
    input_size: tuple[_Side, _Side] | None = None


class ReferenceEntry(_Entry):
    """The undistorted training images: most frequent size in pixels, mean Rec. 601 luma (0 to 255), and the spread of its ln."""

    height: NonNegativeInt
    width: NonNegativeInt
    luma: float
    luma_spread: float | None = None


class DataEntry(_Entry):
    """The data set: its name and the digests of its two splits."""

    name: str | None = None
    train: str | None = None
    val: str | None = None
    reference: ReferenceEntry | None = None


class Scores(_Entry):
    """Accuracy on the validation images in percent: base, full fine-tune and adaptor; `others` are further metrics, by name and
    network (original, full, adaptor).
    """

    metric: str | None = None
    original: float | None = None
    full: float | None = None
    adaptor: float | None = None
    others: Mapping[str, Mapping[str, float]] = Field(default_factory=dict)


class ShareChanged(_Entry):
    """Shares of the network's floats, 0 to 1, in layers whose mean change, or whose own change, exceeds 2e-4 (Fig. 5)."""

    by_layer: float
    by_weight: float


class LevelEntry(_Entry):
    """One published level; `clean` has no adaptor: its digest is None and it holds nothing. `luma` is the mean luma of its
    training images, 0 to 255, and `qp` the mean macroblock QP of their H.264 pictures. `storage_formats` names, by tensor of the
    base, every storage format other than float32. `full` is the fully fine-tuned network, if it was kept.
    """

    digest: Digest | None
    bytes: NonNegativeInt
    floats: NonNegativeInt
    layers: tuple[str, ...]
    scores: Scores
    luma: float | None = None
    qp: float | None = None
    storage_formats: Mapping[str, StorageFormat] = Field(default_factory=dict)
    share_above_2e_4: ShareChanged | None = None
    full: Blob | None = None

    @property
    def adaptor_blob(self) -> Blob | None:
        return None if self.digest is None else Blob(digest=self.digest, bytes=self.bytes)


class BudgetEntry(_Entry):
    """The budget M: as it was asked for ("0.2%"), and in floats."""

    asked: str | None = None
    floats: NonNegativeInt | None = None


class ExecutionEntry(_Entry):
    """What decides the bits of a fine-tune beside its inputs."""

    device: str
    precision: str
    threads: NonNegativeInt


LevelName = Annotated[str, StringConstraints(pattern=f"^{PATH_PART}$")]


def _check_levels(levels: Mapping[str, LevelEntry]) -> Mapping[str, LevelEntry]:
    for name, entry in levels.items():
        empty = not (entry.digest or entry.bytes or entry.floats or entry.layers or entry.storage_formats)
        if not empty if name == _CLEAN else entry.digest is None:
            rule = f"{name}: {_CLEAN} has no digest and holds nothing, every other level has an adaptor"
            raise PydanticCustomError("adaptor", "{rule}", {"rule": rule})
    return levels


class Manifest(_Entry):
    """One release. `Store.publish` sets `created` (UTC, ISO 8601), and `tables` and `figures`: their blobs, by the path where
    they lie while the release is `latest`. `config` is the configuration of the split job.
    """

    schema_version: Literal[2] = Field(default=SCHEMA, alias="schema")
    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    created: str | None = None
    model: ModelEntry
    data: DataEntry | None = None
    base: Blob
    levels: Annotated[Mapping[LevelName, LevelEntry], AfterValidator(_check_levels)]
    budget: BudgetEntry
    recipe: Mapping[str, object]
    seed: int | None = None
    execution: ExecutionEntry | None = None
    config: Mapping[str, object] | None = None
    versions: Mapping[str, str]
    tables: Mapping[str, Blob] = Field(default_factory=dict)
    figures: Mapping[str, Blob] = Field(default_factory=dict)

    @field_validator("tables", "figures")
    @classmethod
    def _among_its_own(cls, files: Mapping[str, Blob], info: ValidationInfo) -> Mapping[str, Blob]:
        """A release that becomes `latest` writes these paths: it may name none outside its own folders."""
        folder, suffix = f"{info.field_name}/{info.data.get('name')}", {"tables": ".parquet"}.get(info.field_name or "", ".png")
        for path in files:
            if not re.fullmatch(rf"{re.escape(folder)}(/{PATH_PART})+", path) or not path.endswith(suffix):
                rule = f"{path!r}: expected a path {folder}/…{suffix}"
                raise PydanticCustomError("path", "{rule}", {"rule": rule})
        return files

    @property
    def files(self) -> Mapping[str, Blob]:
        """The tables and figures of the release, by path."""
        return {**self.tables, **self.figures}

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """Every blob that the release names, each once: base, adaptors and full fine-tunes."""
        named = [self.base]
        for entry in self.levels.values():
            named += [blob for blob in (entry.adaptor_blob, entry.full) if blob is not None]
        return tuple({(blob.digest, blob.bytes): blob for blob in named}.values())

    @property
    def needed(self) -> tuple[Blob, ...]:
        """What a copy of the release has: base, adaptors, tables and figures, each once. A copy may lack the full fine-tunes."""
        adaptors = (entry.adaptor_blob for entry in self.levels.values())
        return tuple(dict.fromkeys((self.base, *(blob for blob in adaptors if blob is not None), *self.files.values())))

    def as_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values, in a new dict."""
        return {"schema": SCHEMA, **self.model_dump(mode="json", by_alias=True, exclude_defaults=True)}


def manifest_path(digest: str) -> str:
    """Where the manifest with this digest lies. Raises CorruptStoreError for what is no digest."""
    return f"manifests/{hex_of(digest)}.json"


def content_key(content: Mapping[str, Any]) -> str:
    """The key of the record that says when this content, a manifest as JSON, was first published. It depends on nothing that
    differs when the same is computed again: not on `created`, and not on tables and figures, which hold seconds.
    """
    same = {key: value for key, value in content.items() if key not in ("created", "tables", "figures")}
    return hashlib.sha256(canonical_json(same)).hexdigest()


def read_manifest(data: bytes, digest: str) -> Manifest:
    """The manifest in a file. Raises CorruptStoreError naming the digest and the invalid entry, UserError for another schema."""
    try:
        check_json(data)
        content = json.loads(data)
    except RecursionError:
        raise CorruptStoreError(f"The manifest {digest} is not valid: its JSON is nested too deeply.") from None
    except ValueError as error:
        raise CorruptStoreError(f"The manifest {digest} cannot be parsed as JSON: {error}.") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"The manifest {digest} was written with schema {schema!r}, and this version of gearnn_ray reads schema "
            f"{SCHEMA}. Publish the release again with this version, or read it with the version that wrote it."
        )
    try:
        manifest = Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, found = ".".join(map(str, first["loc"])), f"{reprlib.repr(first['input']):.100}"
        raise CorruptStoreError(f"The manifest {digest} is not valid at {place}: {first['msg']}. Found {found}.") from error
    if manifest.created is None:
        raise CorruptStoreError(f"The manifest {digest} is not valid at created: a published manifest has a time.")
    return manifest
