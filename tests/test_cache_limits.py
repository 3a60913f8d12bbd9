"""The cache of images is bounded by age and by size, and nothing that is in use is deleted."""

import fcntl
import os
import time
from pathlib import Path

import pytest

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.cache import PackedImages, level_images
from gearnn_ray.data.cache_limits import limit_cache
from gearnn_ray.levels.level import parse_level
from tests.test_data import make_folder, open_folder_of_5

HOUR, DAY, MANY = 3600.0, 86400.0, 1e12


def entry(cache: Path, letter: str, size: int, age: float, suffix: str = "") -> Path:
    folder = cache / (letter * 64 + suffix)
    folder.mkdir(parents=True)
    (folder / "data.bin").write_bytes(bytes(size))
    for path in (folder / "data.bin", folder):
        os.utime(path, (time.time() - age,) * 2)
    return folder


def test_old_entries_go_and_young_ones_stay(tmp_path: Path) -> None:
    old, young = entry(tmp_path, "a", 10, 40 * DAY), entry(tmp_path, "b", 10, 20 * DAY)
    (tmp_path / "notes.txt").write_text("not an entry")
    lines = limit_cache(tmp_path, DAY, 30 * DAY, MANY)
    assert lines == [f"{old}: 10 bytes"]
    assert old.exists()  # a dry run
    assert limit_cache(tmp_path, DAY, 30 * DAY, MANY, dry_run=False) == lines
    assert not old.exists()
    assert young.exists()
    assert limit_cache(tmp_path, DAY, 30 * DAY, MANY) == []
    assert (tmp_path / "notes.txt").exists()


def test_beyond_the_size_those_go_that_were_used_longest_ago(tmp_path: Path) -> None:
    a, b, c = entry(tmp_path, "a", 600, 4 * DAY), entry(tmp_path, "b", 600, 6 * DAY), entry(tmp_path, "c", 600, HOUR)
    assert limit_cache(tmp_path, DAY, 30 * DAY, 1300, dry_run=False) == [f"{b}: 600 bytes"]
    # what was used within the grace period stays, however large it is
    for dry_run in (True, False):
        assert limit_cache(tmp_path, DAY, 30 * DAY, 0, dry_run) == [f"{a}: 600 bytes"]
    assert c.exists()


def test_what_is_being_made_stays_and_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    left = entry(tmp_path, "a", 10, 2 * DAY, ".host.building")
    made = entry(tmp_path, "b", 10, 2 * DAY, ".host.building")
    with (tmp_path / f"{'b' * 64}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert limit_cache(tmp_path, DAY, 30 * DAY, MANY, dry_run=False) == [f"{left}: 10 bytes"]
    assert not left.exists()
    assert made.exists()


def test_an_entry_that_is_opened_is_in_use_and_is_made_again_after_it_went(tmp_path: Path) -> None:
    data, cache = open_folder_of_5(make_folder(tmp_path / "data")), tmp_path / "cache"
    images = level_images(data.train, parse_level("jpeg-10"), cache)
    before = [image.copy() for image in images]
    for path in (*images.folder.iterdir(), images.folder):
        os.utime(path, (time.time() - 40 * DAY,) * 2)
    PackedImages(images.folder)
    assert limit_cache(cache, DAY, 30 * DAY, 0, dry_run=False) == []
    os.utime(images.folder, (time.time() - 40 * DAY,) * 2)
    assert len(limit_cache(cache, DAY, 30 * DAY, MANY, dry_run=False)) == 1
    assert not images.folder.exists()
    assert (images[0] == before[0]).all()  # whoever had it open goes on
    again = level_images(data.train, parse_level("jpeg-10"), cache)
    assert all((one == other).all() for one, other in zip(again, before, strict=True))


def test_a_cache_that_is_not_there_is_empty_and_a_file_is_a_sentence(tmp_path: Path) -> None:
    assert limit_cache(tmp_path / "none", 0, 0, 0, dry_run=False) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be cleared"):
        limit_cache(tmp_path / "file", 0, 0, 0)
