"""What a store says of a disk that takes nothing, and what it syncs. Power cuts and real full disks: `test_chaos_store.py`."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gearnn_ray.cli.main import run_pull
from gearnn_ray.core.errors import UserError, storage_problem
from gearnn_ray.store.releases import Store
from tests.power_cut import Disk
from tests.stores import KEY, manifest_of


def test_a_file_that_a_killed_writer_left_unsynced_is_synced_by_who_relies_on_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = store.put_blob(b"content")
    for use in (lambda: store.put_blob(b"content"), lambda: store.is_intact(digest)):
        disk = Disk(tmp_path)
        with disk.recording():
            use()
        synced = [path for kind, path, _ in disk.events if kind == "folder synced"]
        assert synced == [str(tmp_path / "blobs/sha256"), str(tmp_path / "blobs"), str(tmp_path)]


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "no space is left on the device"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
    ],
)
def test_a_job_that_cannot_write_ends_with_a_sentence(
    number: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Store(tmp_path / "other")
    other.publish(manifest_of(other), {})

    def fail(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    assert run_pull(["street:latest", other.uri, "--store", str(tmp_path / "store")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert f"{sentence}: {tmp_path}" in line


def test_only_a_disk_that_takes_nothing_is_such_a_problem() -> None:
    assert storage_problem(OSError(errno.ENOENT, "No such file")) is None
    assert storage_problem(ValueError("no space left")) is None
    found = storage_problem(OSError(errno.ENOSPC, "No space left on device", "/data/x"))
    assert found == "no space is left on the device: /data/x could not be written. Make room, and run the same command again"
    assert "could not be written" in str(storage_problem(OSError(errno.EROFS, "Read-only file system")))


@pytest.mark.parametrize("write", [lambda store: store.put_blob(b"x"), lambda store: store.put_record(KEY, {})])
def test_a_write_that_fails_names_its_file(
    write: Callable[[Store], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write(Store(tmp_path))
    assert str(caught.value.filename).startswith(str(tmp_path))
    monkeypatch.undo()
    manifest = manifest_of(Store(tmp_path))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: no space is left"):
        Store(tmp_path).publish(manifest, {})
