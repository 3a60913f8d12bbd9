"""What the stages of a job leave in the store: one frozen dataclass per stage, written as {"stage", "schema", "versions",
"result"}. A record of another schema, or one that does not validate, is treated as missing: the stage is computed again.
"""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar, TypeVar

from pydantic import TypeAdapter, ValidationError

from gearnn_ray.offline.selection import LayerSelection
from gearnn_ray.offline.sensitivity import Sensitivity, StoredVariant

RECORD_SCHEMA = 1
"""Raised when records of a stage get other fields."""

VERSIONED = ("torch", "torchvision", "numpy", "pillow", "av", "ortools")
"""Packages whose versions stand in every record, because they decide the bits of images, crops, weights and selections."""


@dataclass(frozen=True)
class StageResult:
    """What a stage returned. `stage` names it in records and events."""

    stage: ClassVar[str]


@dataclass(frozen=True)
class Execution:
    """How the fine-tunes of a job are computed; bits depend on it. device: cpu or cuda. precision: float32 or bfloat16. threads:
    torch's, of one process.
    """

    device: str
    precision: str
    threads: int


@dataclass(frozen=True)
class ExecutionResult(StageResult):
    """What a job decided when it first ran, and keeps on whatever machine it continues."""

    stage = "execution"
    levels: Execution
    base: Execution


@dataclass(frozen=True)
class BaseResult(StageResult):
    """A base network that was trained here."""

    stage = "base"
    digest: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class OriginalResult(StageResult):
    """The base, evaluated at a level. score: percent. others: the task's other metrics, in percent."""

    stage = "original"
    score: float
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FullResult(StageResult):
    """Step 1 at one level. score: percent, None where the fine-tune was too short to be evaluated. others: as of the original."""

    stage = "full"
    digest: str
    bytes: int
    score: float | None
    seconds: float
    sensitivity: tuple[Sensitivity, ...]
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasureResult(StageResult):
    """Step 2 at one level. sensitivity: Eq. (1), against the base. compared: the rows that the criterion uses, in the same order:
    changes against the control, normalisations folded. stored_variants: the rounding error of each storage format.
    """

    stage = "measure"
    sensitivity: tuple[Sensitivity, ...]
    compared: tuple[Sensitivity, ...]
    stored_variants: tuple[StoredVariant, ...]


@dataclass(frozen=True)
class SelectionResult(StageResult):
    """Step 3 at one level."""

    stage = "selection"
    selection: LayerSelection


@dataclass(frozen=True)
class JointSelectionResult(StageResult):
    """Step 3 of all levels at once, by level."""

    stage = "selection"
    selections: dict[str, LayerSelection]


@dataclass(frozen=True)
class PartialResult(StageResult):
    """Step 4 at one level: the adaptor. storage_formats: by tensor, where not float32. stored_bytes: of its tensors. others: as
    of the original.
    """

    stage = "partial"
    digest: str
    bytes: int
    floats: int
    storage_formats: dict[str, str]
    stored_bytes: int
    score: float
    seconds: float
    others: dict[str, float] = field(default_factory=dict)


ResultT = TypeVar("ResultT", bound=StageResult)


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@functools.cache
def installed_versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED}


def to_json(result: StageResult) -> dict[str, Any]:
    return {"stage": result.stage, "schema": RECORD_SCHEMA, "versions": installed_versions(), "result": asdict(result)}


def from_json(kind: type[ResultT], record: Mapping[str, Any]) -> tuple[ResultT, str] | None:
    """The result in a record and a remark on it (empty, or which versions made it); None where it is no such record."""
    if record.get("stage") != kind.stage or record.get("schema") != RECORD_SCHEMA:
        return None
    try:
        result: ResultT = _adapter(kind).validate_python(record.get("result"))  # type: ignore[arg-type]
    except ValidationError:
        return None
    made_with, here = record.get("versions") or {}, installed_versions()
    # records of earlier releases name fewer libraries
    others = [f"{name} {made_with[name]}" for name in here if name in made_with and made_with[name] != here[name]]
    return result, f"made with {' and '.join(others)}" if others else ""
