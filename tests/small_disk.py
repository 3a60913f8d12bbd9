"""A program with a small disk of its own, which is full at one write after the other, or turns read-only.

    unshare -rm python -m tests.small_disk full|read-only FOLDER SEED

Its last line is JSON: how often each action was refused, what was said that is no sentence about this disk, and what was lost or
torn. Actions are what jobs do: publish, tag, note a stage, copy a release, cache images, collect.
"""

import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gearnn_ray.cli.main import run_gc, run_pull
from gearnn_ray.core.errors import UserError, storage_problem
from gearnn_ray.data.cache import level_images
from gearnn_ray.levels.level import parse_level
from gearnn_ray.store.releases import Store
from tests.stores import KEY, TABLE, manifest_of, table

_FULL = ("no space is left on the device", "No space left on device", "MB free")
_READ_ONLY = ("the file system is read-only", "Read-only file system")
_MOST = 60  # pages or names that are left: more than any action takes


def namespaces() -> bool:
    """Whether this user may mount a file system of its own."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Images:
    """A split of three images, another one for each number."""

    name, ids, clips = "val", ("0", "1", "2"), ("0", "1", "2")

    def __init__(self, number: int) -> None:
        self.digest = f"{number:064x}"

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Any:
        return np.full((24, 32, 3), int(self.digest, 16) * 3 + index, np.uint8)


class Program:
    def __init__(self, disk: Path, draw: random.Random) -> None:
        self.disk, self.draw, self.number = disk, draw, 0
        self.store, self.other = Store(disk / "store"), Store(disk.parent / "other")
        self.found: dict[str, Any] = {"refused": Counter[str](), "said": [], "wrong": []}
        for _ in range(2):
            self.publish()
        self.other.publish(manifest_of(self.other, name="road"), {})

    # what jobs do; each raises what a job would end with

    def publish(self) -> None:
        self.number += 1
        self.store.publish(manifest_of(self.store, self.number), {TABLE: table(self.number)}, tags=[f"v{self.number % 2}"])

    def tag(self) -> None:
        """Roll back, or forward again."""
        latest = self.store.tag_digest("street", "latest")
        self.store.tag("street", "latest", next(each for each in self.store.tags("street").values() if each != latest))

    def stage(self) -> None:
        self.number += 1
        self.store.put_checkpoint(KEY, bytes([self.number % 256]) * self.draw.choice((10, 5000, 20_000)))
        self.store.put_record(KEY, {"number": self.number})

    def copy(self) -> None:
        self._command(run_pull, ["road:latest", self.other.uri, "--store", str(self.disk / "copy")])
        shutil.rmtree(self.disk / "copy", ignore_errors=True)  # what is refused there is not of the project

    def images(self) -> None:
        self.number += 1
        split: Any = Images(self.number)
        made = level_images(split, parse_level("jpeg-10"), self.disk / "cache")
        assert len(made) == 3
        shutil.rmtree(self.disk / "cache", ignore_errors=True)

    def collect(self) -> None:
        self._command(run_gc, ["--store", self.store.uri, "--data.cache", str(self.disk / "cache"), "--grace", "0", "--delete"])

    @property
    def actions(self) -> list[Callable[[], None]]:
        return [self.publish, self.tag, self.stage, self.copy, self.images, self.collect]

    def _command(self, run: Callable[[list[str]], int], arguments: list[str]) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            code = run(arguments)
        if code:
            line = said.getvalue().strip()
            raise UserError(line.removeprefix("error: ") if line.startswith("error: ") and code == 2 else f"{code}:\n{line}")

    # what is expected of them

    def refused(self, action: Callable[[], None], *words: str) -> bool:
        """Whether the disk refused an action; notes what was said otherwise, and what is not whole afterwards."""
        name, before, refused = action.__name__, self.store.tag_digest("street", "latest"), False
        try:
            action()
        except (UserError, OSError) as error:
            refused, sentence = True, storage_problem(error) or str(error)
            self.found["refused"][name] += 1
            if not any(each in sentence for each in words) or str(self.disk) not in sentence or "\n" in sentence:
                self.found["said"].append(f"{name}: {sentence}")
        after = self.store.tag_digest("street", "latest")
        if after != before and action not in (self.publish, self.tag):
            self.found["wrong"].append(f"{name} moved latest from {before} to {after}")
        for tag in ("latest", "v0", "v1"):
            try:
                self.store.pull(f"street:{tag}")
            except UserError as error:
                self.found["wrong"].append(f"after {name}: {error}")
        return refused

    def verify(self, after: str) -> None:
        self.found["wrong"] += [f"after {after}: {problem}" for problem in self.store.verify()]


@contextmanager
def filled(disk: Path, left: int, of: str) -> Iterator[None]:
    """A disk on which so many pages, or names of files, are left."""
    filler = disk / "filler"
    filler.mkdir()
    with contextlib.suppress(OSError), open(filler / "file", "wb", buffering=0) as file:
        if of == "pages":
            with contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            file.truncate(max(0, file.tell() - 4096 * left))
    names = []
    with contextlib.suppress(OSError):
        while of == "names":
            (filler / str(len(names))).touch()
            names.append(filler / str(len(names)))
    for name in names[len(names) - left :] if left else []:
        name.unlink()
    try:
        yield
    finally:
        shutil.rmtree(filler)


def full(program: Program) -> None:
    """Every action, with one page (or name) more each time, until it has room enough."""
    for of in ("pages", "names"):
        for action in program.draw.sample(program.actions, 6):
            for left in range(_MOST):
                with filled(program.disk, left, of):
                    refused = program.refused(action, *_FULL)
                if not refused:
                    break
                action()
                program.verify(f"{action.__name__} with {left} {of}")
            else:
                program.found["wrong"].append(f"{action.__name__} was refused with {_MOST} {of}")
            program.verify(action.__name__)
            program.collect()
            program.verify("collect")


def read_only(program: Program) -> None:
    """Actions in any order while the disk turns read-only, and again when it is writable."""

    def turn(after: float) -> None:
        time.sleep(after)
        while mounted(program.disk, "remount,ro"):  # busy while a file is open for writing
            time.sleep(0.001)

    for _ in range(3):
        turning = threading.Thread(target=turn, args=(program.draw.uniform(0, 0.2),))
        turning.start()
        while not program.refused(action := program.draw.choice(program.actions), *_READ_ONLY) or turning.is_alive():
            pass
        for each in program.actions:
            if not program.refused(each, *_READ_ONLY):
                program.found["wrong"].append(f"{each.__name__} was not refused on a read-only disk")
        mounted(program.disk, "remount,rw")
        for name in ("copy", "cache"):
            shutil.rmtree(program.disk / name, ignore_errors=True)
        action()
        program.tag()  # lays out the tables that a publication could not write any more
        program.verify(action.__name__)


def mounted(disk: Path, options: str) -> int:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode


if __name__ == "__main__":
    what, folder, seed = sys.argv[1:]
    place = Path(folder) / "disk"
    place.mkdir()
    assert mounted(place, "size=512k,nr_inodes=300") == 0
    running = Program(place, random.Random(seed))
    {"full": full, "read-only": read_only}[what](running)
    print(json.dumps(running.found))
