"""A sample of the campaign's faults of stores, and that each line sees what it looks for."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from benchmarks.faults import hostile, store
from benchmarks.faults.campaign import Line, Run, run_once, sound
from gearnn_ray.core.errors import CorruptStoreError
from gearnn_ray.store import local_files
from tests.small_disk import namespaces


def runs_of(line: Line, count: int, seed: int = 0) -> list[Run]:
    return [run_once(line, seed, index) for index in range(count)]


def line(name: str) -> Line:
    return next(each for each in (*store.LINES, *hostile.LINES) if each.name == name)


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    yield
    if store.old_releases.cache_info().currsize:
        store.old_releases()[2].end()
        store.old_releases.cache_clear()


SAMPLE = {"power-cut": 3, "disk-full": 1, "read-only": 1, "bit-flip": 20, "races": 30}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_campaign_sees_nothing_wrong(name: str) -> None:
    if name in ("disk-full", "read-only") and not namespaces():
        pytest.skip("needs mount namespaces")
    runs = runs_of(line(name), SAMPLE[name])
    assert sound(runs), [run for run in runs if not sound([run])]
    outcomes = [run.outcome for run in runs if run.outcome]
    assert all(outcome.hit for outcome in outcomes)
    if name == "races":  # there was something to collect, and mostly something to roll back to
        assert sum(outcome.figures["deleted"] for outcome in outcomes) > len(outcomes)
        assert sum(outcome.figures["rollbacks refused"] for outcome in outcomes) < len(outcomes) / 2


@pytest.mark.parametrize("kind", hostile.KINDS, ids=lambda kind: kind.__name__)
def test_a_forged_store_is_refused(kind: Any, tmp_path: Path) -> None:
    for number in range(3):
        (folder := tmp_path / str(number)).mkdir()
        outcome = hostile.hostile(random.Random(number), folder, kind)
        assert outcome.silent == 0, outcome.note


# ── what is broken is seen ─────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def unsynced(root: Path, path: Path, data: bytes) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    (temporary := path.with_name(".tmp-1")).write_bytes(data)
    yield temporary


@pytest.mark.parametrize(("broken", "by"), [("_sync_folders", lambda *_: None), ("_temporary", unsynced)])
def test_a_power_cut_shows_what_was_not_synced(broken: str, by: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, broken, by)
    outcome = store.power_cut(random.Random(0), tmp_path)
    assert outcome.torn or outcome.lost
    assert outcome.note


def unchecked(store_: Any, key: str) -> bytes:
    return bytes(store_._files.read(f"checkpoints/{key}.safetensors")[32:])


def unverified(blobs: Any, path: str, *_: object, **__: object) -> Any:
    if (data := blobs._files.read_memory(path)) is None:
        raise CorruptStoreError(f"there is no {path}")
    return data


class Trusting(dict[Any, Any]):
    """What a process knows to be intact: everything."""

    def get(self, *_: object) -> Any:
        return ANY


@pytest.mark.parametrize(
    ("broken", "by"),
    [
        ("gearnn_ray.data.cache._intact", Trusting()),
        ("gearnn_ray.store.blobs.BlobStore.get_checkpoint", unchecked),
        ("gearnn_ray.store.blobs.BlobStore._verified", unverified),
    ],
    ids=["images", "checkpoints", "blobs"],
)
def test_a_flipped_bit_shows_what_nobody_checks(broken: str, by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.made()
    monkeypatch.setattr(broken, by)
    runs = (run_once(line("bit-flip"), 0, number) for number in range(200))
    assert any(run.outcome and (run.outcome.silent or run.outcome.equal is False) for run in runs)


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        (hostile.many_values, "gearnn_ray.store.manifest.check_json"),
        (hostile.import_path, "gearnn_ray.models.registry.check_released_name"),
    ],
)
def test_a_forged_store_shows_what_nobody_checks(kind: Any, broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hostile.honest()
    monkeypatch.setattr(broken, lambda *_: None)

    def seen(number: int) -> bool:
        (folder := tmp_path / str(number)).mkdir()
        outcome = hostile.hostile(random.Random(number), folder, kind)
        sys.modules.pop("trap", None)
        return outcome.silent > 0

    assert any(map(seen, range(8)))
