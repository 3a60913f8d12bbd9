"""Results of stages in a store: found, verified, computed again, and read back only where they are what they should be."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.core.errors import StoreUnavailableError
from gearnn_ray.core.events import Event
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline import records
from gearnn_ray.offline.job_spec import stage_key
from gearnn_ray.offline.records import BaseResult, OriginalResult, PartialResult, StageResult, from_json, to_json
from gearnn_ray.offline.stage_cache import NotCachedError, StageCache
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks.base import Image
from gearnn_ray.training.trainer import fine_tune
from tests.conftest import NORMALISATION, SEGMENTATION

KEY = stage_key("original", level="jpeg-10")


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def cache(tmp_path: Path, events: list[Event]) -> StageCache:
    return StageCache(Store(tmp_path), "jpeg-10", events.append)


def test_a_result_is_computed_once(cache: StageCache, events: list[Event]) -> None:
    calls: list[int] = []

    def compute() -> OriginalResult:
        calls.append(1)
        return OriginalResult(42.5)

    for _ in range(2):
        assert cache.result(OriginalResult, KEY, compute, metric="mIoU") == OriginalResult(42.5)
    assert len(calls) == 1
    assert [(event.kind, event.stage, event.score) for event in events] == [
        ("started", "original", None), ("finished", "original", 42.5), ("reused", "original", 42.5),
    ]  # fmt: skip
    assert {event.metric for event in events[1:]} == {"mIoU"}


def test_only_looking_computes_nothing(tmp_path: Path) -> None:
    looking = StageCache(Store(tmp_path), "jpeg-10", lambda _: None, only_cached=True)
    with pytest.raises(NotCachedError):
        looking.result(OriginalResult, KEY, lambda: pytest.fail("computed"))


def test_a_result_whose_blob_is_corrupt_is_computed_again(tmp_path: Path, cache: StageCache) -> None:
    blob = cache.store.put_blob(b"weights")
    made: list[BaseResult] = []

    def compute() -> BaseResult:
        made.append(BaseResult(cache.store.put_blob(b"weights"), 7, 1.0))
        return made[-1]

    def look() -> BaseResult:
        return cache.result(BaseResult, KEY, compute, lambda result: cache.store.is_intact(result.digest))

    look()
    look()
    assert len(made) == 1
    path = tmp_path / "blobs" / "sha256" / blob.removeprefix("sha256:")
    path.write_bytes(b"weighty")
    assert look().digest == blob
    assert len(made) == 2
    assert cache.store.get_blob(blob) == b"weights"


def test_a_result_of_other_versions_is_reused_with_a_remark(
    cache: StageCache, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    older = {**records.installed_versions(), "torch": "1.2.3", "pillow": "9.0"}
    monkeypatch.setattr(records, "installed_versions", lambda: older)
    cache.result(OriginalResult, KEY, lambda: OriginalResult(1.0))
    monkeypatch.undo()
    assert cache.result(OriginalResult, KEY, lambda: pytest.fail("computed")) == OriginalResult(1.0)
    assert events[-1].note == "made with torch 1.2.3 and pillow 9.0"


@dataclass(frozen=True)
class Other(StageResult):
    """Another stage with the same fields."""

    stage = "other"
    score: float


@pytest.mark.parametrize(
    "damage",
    [{"schema": records.RECORD_SCHEMA + 1}, {"stage": "full"}, {"result": {"score": "many"}}, {"result": {}}, {"result": None}],
)
def test_a_record_that_is_not_what_it_should_be_is_none(cache: StageCache, damage: dict[str, Any]) -> None:
    cache.store.put_record(KEY, to_json(OriginalResult(3.0)) | damage)
    assert cache.result(OriginalResult, KEY, lambda: OriginalResult(9.0)) == OriginalResult(9.0)
    assert cache.result(OriginalResult, KEY, lambda: pytest.fail("computed")) == OriginalResult(9.0)
    assert from_json(Other, to_json(OriginalResult(9.0))) is None


def test_results_read_back_as_they_were() -> None:
    result = PartialResult("sha256:" + "a" * 64, 12, 3, {"conv.weight": "int8"}, 5, 50.25, 1.5)
    assert from_json(PartialResult, to_json(result)) == (result, "")


def test_a_checkpoint_that_cannot_be_written_is_a_notice_and_the_next_epoch_writes_another(
    cache: StageCache, events: list[Event], pictures: tuple[list[Image], list[Image]], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failures = Store.put_checkpoint, [OSError(28, "No space left on device"), StoreUnavailableError("no answer in 300 s")]

    def fail_twice(store: Store, key: str, data: bytes) -> None:
        if failures:
            raise failures.pop(0)
        put(store, key, data)

    monkeypatch.setattr(Store, "put_checkpoint", fail_twice)
    recipe, model = Recipe(epochs=4, batch_size=4, crop=24), build_model("tests.nets:small", 3)
    outcome = fine_tune(
        SEGMENTATION, model, *pictures, recipe, NORMALISATION, "float32", chosen=None, seed=0,
        checkpoint=cache.checkpoint(KEY, "full"),
    )  # fmt: skip
    assert outcome.epochs_run == 4
    assert [(event.kind, event.stage, event.level) for event in events] == [("notice", "full", "jpeg-10")] * 2
    assert "the fine-tune goes on" in events[0].note
    assert "No space left on device" in events[0].note
    assert cache.store.get_checkpoint(KEY) is not None
