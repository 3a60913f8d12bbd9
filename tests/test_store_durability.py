"""What a store keeps through a power cut, a full disk and a file system that turns read-only."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gearnn_ray.cli.main import run_pull
from gearnn_ray.core.errors import UserError, storage_problem
from gearnn_ray.store.releases import Store
from tests.conftest import ROOT
from tests.stores import KEY, TABLE, manifest_of, table

# ── a power cut ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Disk:
    """What a store asks of the disk, in order. An operation on a folder's names is durable once that folder was synced after it,
    and the bytes of a file once the file was; anything else may or may not be there after a power cut.
    """

    root: Path
    events: list[tuple[str, Any, Any]] = field(default_factory=list)

    def record(self, patch: pytest.MonkeyPatch) -> None:
        replace, mkdir, unlink = os.replace, os.mkdir, os.unlink

        def synced(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isdir(path):
                self.events.append(("folder synced", path, None))
            else:
                self.events.append(("file synced", os.fstat(descriptor).st_ino, Path(path).read_bytes()))

        def renamed(source: Any, target: Any) -> None:
            inode = os.stat(source).st_ino
            replace(source, target)
            self.events.append(("named", str(target), inode))

        def made(path: Any, *more: Any) -> None:
            mkdir(path, *more)
            self.events.append(("folder made", str(path), None))

        def removed(path: Any, *more: Any, **named: Any) -> None:
            unlink(path, *more, **named)
            self.events.append(("removed", str(path), None))

        for name, call in (("fsync", synced), ("replace", renamed), ("mkdir", made), ("unlink", removed)):
            patch.setattr(os, name, call)

    def acknowledge(self, what: str, value: object) -> None:
        self.events.append(("acknowledged", what, value))

    def states(self) -> Iterator[tuple[dict[str, bytes], dict[str, object]]]:
        """Every state that a power cut may leave after any number of events, each once: files by path, and what had been
        acknowledged until then.
        """
        seen = set()
        for length in range(len(self.events) + 1):
            durable, pending, content, acknowledged = self._until(length)
            for chosen in itertools.product((True, False), repeat=min(len(pending), 6)):
                applied = [*durable, *itertools.compress(pending, chosen)]
                files = self._files(applied, content)
                state = (frozenset(files.items()), frozenset(acknowledged.items()))
                if state not in seen:
                    seen.add(state)
                    yield files, acknowledged

    def _until(self, length: int) -> tuple[list[Any], list[Any], dict[int, bytes], dict[str, object]]:
        durable, pending, content, acknowledged = [], [], dict[int, bytes](), dict[str, object]()
        for kind, what, value in self.events[:length]:
            if kind == "file synced":
                content[what] = value
            elif kind == "folder synced":
                durable += [each for each in pending if os.path.dirname(each[1]) == what]
                pending = [each for each in pending if os.path.dirname(each[1]) != what]
            elif kind == "acknowledged":
                acknowledged[what] = value
            else:
                pending.append((kind, what, value))
        return durable, pending, content, acknowledged

    def _files(self, applied: list[Any], content: dict[int, bytes]) -> dict[str, bytes]:
        folders, names = {str(self.root)}, dict[str, int]()
        for kind, path, inode in applied:
            if kind == "folder made":
                folders.add(path)
            elif kind == "named":
                names[path] = inode
            else:
                names.pop(path, None)

        def reachable(path: str) -> bool:
            above = Path(path).relative_to(self.root).parents
            return all(str(self.root / each) in folders for each in above)

        start = len(str(self.root)) + 1
        return {path[start:]: content.get(inode, b"") for path, inode in names.items() if reachable(path)}


def test_a_power_cut_leaves_what_was_acknowledged_and_never_half_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    root.mkdir()
    store, disk = Store(root), Disk(root)
    with monkeypatch.context() as patch:
        disk.record(patch)
        store.put_checkpoint(KEY, b"epoch 1")
        disk.acknowledge("checkpoint", b"epoch 1")
        store.put_record(KEY, {"score": 1})
        disk.acknowledge("record", 1)
        history = [store.publish(manifest_of(store, 1.0), {TABLE: table(0.1)})]
        disk.acknowledge("latest", history[-1])
        history.append(store.publish(manifest_of(store, 2.0), {TABLE: table(0.2)}, tags=["v2"]))
        disk.acknowledge("latest", history[-1])
        disk.acknowledge("v2", history[-1])
        store.tag("street", "latest", history[0])
        disk.acknowledge("latest", history[0])
        disk.acknowledge("rolled back", True)
    count = 0
    after = tmp_path / "after"
    for files, acknowledged in disk.states():
        count += 1
        shutil.rmtree(after, ignore_errors=True)
        after.mkdir()
        for path, data in files.items():
            (after / path).parent.mkdir(parents=True, exist_ok=True)
            (after / path).write_bytes(data)
        found = Store(after)
        if "checkpoint" in acknowledged:
            assert found.get_checkpoint(KEY) == acknowledged["checkpoint"]
        if "record" in acknowledged:
            assert found.get_record(KEY) == {"score": acknowledged["record"]}
        assert found.tags("street").keys() >= acknowledged.keys() & {"latest", "v2"}
        for tag, digest in found.tags("street").items():
            assert found.pull(f"street:{tag}").digest == digest  # complete, every digest verified
        if found.tags("street").get("latest") != acknowledged.get("latest"):
            # on the way to the next one
            step = history.index(acknowledged["latest"]) + 1 if "latest" in acknowledged else 0  # type: ignore[arg-type]
            assert found.tag_digest("street", "latest") == [*history, history[0]][step]
            assert "rolled back" not in acknowledged
    assert found.verify() == []  # the last one: nothing was cut off
    assert count > 20


def test_a_file_that_a_killed_writer_left_unsynced_is_synced_by_who_relies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    digest = store.put_blob(b"content")
    disk = Disk(tmp_path)
    disk.record(monkeypatch)
    for use in (lambda: store.put_blob(b"content"), lambda: store.is_intact(digest)):
        disk.events.clear()
        use()
        synced = [path for kind, path, _ in disk.events if kind == "folder synced"]
        assert synced == [str(tmp_path / "blobs/sha256"), str(tmp_path / "blobs"), str(tmp_path)]


# ── a full disk, and one that turns read-only ──────────────────────────────────────────────────────────────────────────

FULL = """
import os, subprocess, sys
from pathlib import Path
from gearnn_ray.cli.main import run_pull, run_gc
from gearnn_ray.core.errors import UserError, storage_problem
from gearnn_ray.store.releases import Store
from tests.stores import TABLE, manifest_of, table

disk, other = Path(sys.argv[1]), sys.argv[2]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
store, filler, refused = Store(disk / "store"), disk / "filler", 0
a = store.publish(manifest_of(store, 1.0), {TABLE: table(0.1)})

def fill(left):
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
        file.truncate(max(0, file.tell() - left))

for pages in (0, 1, 2, 3, 5, 8, 13, 21):
    fill(4096 * pages)
    try:
        b = store.publish(manifest_of(store, 2.0 + pages), {TABLE: table(0.2 + pages)})
    except (UserError, OSError) as error:  # of the job, or of the blob that it puts first
        sentence = storage_problem(error) or str(error)
        assert "no space is left on the device: " + str(disk) in sentence and "\\n" not in sentence, error
        refused += 1
        latest = store.pull("street").digest
        assert store.get_table(TABLE) is not None
        filler.unlink()
        b = store.publish(manifest_of(store, 2.0 + pages), {TABLE: table(0.2 + pages)})
    else:
        filler.unlink()
        assert pages, "it fitted into nothing"
    assert store.pull("street").digest == b and store.verify() == []
    store.gc(0, dry_run=False)
    assert store.pull("street").digest == b and store.verify() == []
assert refused >= 3, refused

fill(0)
assert run_pull(["road:latest", other, "--store", str(disk / "copy")]) == 2
filler.unlink()
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
assert Store(disk / "store").pull("street").digest == b and store.verify() == []
for call in (lambda: store.publish(manifest_of(Store(other), 9.0), {}), lambda: store.tag("street", "v1", b)):
    try:
        call()
    except UserError as error:
        assert "\\n" not in str(error), error
    else:
        raise AssertionError("a read-only disk was written")
assert run_pull(["road:latest", other, "--store", str(disk / "copy")]) == 2
assert run_gc(["--store", str(disk / "store"), "--data.cache", str(disk / "cache"), "--grace", "0", "--delete"]) == 2
print("done")
"""


def namespaces() -> bool:
    """Whether this user may mount a file system of its own."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not namespaces(), reason="needs mount namespaces")
def test_a_full_disk_and_a_read_only_one_are_sentences_and_harm_nothing(tmp_path: Path) -> None:
    other, disk = Store(tmp_path / "other"), tmp_path / "disk"
    disk.mkdir()
    other.publish(manifest_of(other, name="road"), {})
    result = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FULL, str(disk), other.uri],
        capture_output=True, text=True, cwd=ROOT, timeout=200, check=False,
    )  # fmt: skip
    assert result.stdout.endswith("done\n"), result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [("no space is left" in line, "read-only" in line) for line in lines] == [(True, False), (False, True), (False, True)]
    assert all(str(disk) in line for line in lines)


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
