"""What a store asks of the disk, and every state in which a power cut may leave it."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_MOST_PENDING = 6  # operations whose subsets are all tried, the oldest ones; the others have not reached the disk

Files = dict[str, bytes]
"""Files by their paths below the store."""


@dataclass
class Disk:
    """What a store asks of the disk, in order. An operation on a folder's names is durable once that folder was synced after it,
    and the bytes of a file once the file was; anything else may or may not be there after a power cut.
    """

    root: Path
    events: list[tuple[str, Any, Any]] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this process does meanwhile."""
        replace, mkdir, unlink = os.replace, os.mkdir, os.unlink
        kept: list[int] = []  # open descriptors: the number of a deleted file's inode goes to no other file

        def synced(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isdir(path):
                self.events.append(("folder synced", path, None))
            else:
                kept.append(os.dup(descriptor))
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

        try:
            with pytest.MonkeyPatch.context() as patch:
                for name, call in (("fsync", synced), ("replace", renamed), ("mkdir", made), ("unlink", removed)):
                    patch.setattr(os, name, call)
                yield
        finally:
            for descriptor in kept:
                os.close(descriptor)

    def note(self, what: str, value: object) -> None:
        """Put a remark of the caller between the operations."""
        self.events.append(("noted", what, value))

    def states(self) -> Iterator[tuple[int, Files, dict[str, object]]]:
        """Every state that a power cut may leave after any number of events, each once: that number, the files, and what had
        been noted until then, the last value of each remark.
        """
        seen = set()
        for length in range(len(self.events) + 1):
            durable, pending, content, noted = self._until(length)
            for chosen in itertools.product((True, False), repeat=min(len(pending), _MOST_PENDING)):
                files = self._files([*durable, *itertools.compress(pending, chosen)], content)
                state = (frozenset(files.items()), frozenset(noted.items()))
                if state not in seen:
                    seen.add(state)
                    yield length, files, noted

    def _until(self, length: int) -> tuple[list[Any], list[Any], dict[int, bytes], dict[str, object]]:
        durable, pending, content, noted = [], [], dict[int, bytes](), dict[str, object]()
        for kind, what, value in self.events[:length]:
            if kind == "file synced":
                content[what] = value
            elif kind == "folder synced":
                durable += [each for each in pending if os.path.dirname(each[1]) == what]
                pending = [each for each in pending if os.path.dirname(each[1]) != what]
            elif kind == "noted":
                noted[what] = value
            else:
                pending.append((kind, what, value))
        return durable, pending, content, noted

    def _files(self, applied: list[Any], content: dict[int, bytes]) -> Files:
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
