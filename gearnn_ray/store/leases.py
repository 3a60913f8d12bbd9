"""Who runs a job: a lease in its store, so that a second driver of the same job follows the first instead of computing it twice.

A lease is a file, leases/<key>.json, with a generation, its holder, and a beat that the holder raises every few seconds. Whoever
has seen the same beat for 30 s by its own clock, or sees on its own machine that the holder's process has ended, takes the lease
over with the next generation; clocks are never compared. A holder that was stopped and wakes up finds another generation, and
follows. What it wrote before it noticed does no harm: blobs, stage records and checkpoints are pure functions of the names they
are written under, so both drivers write the same bytes. Only tags say something else at another time, and a driver confirms its
lease before it moves any.

Taking a lease is one step on local disks and on S3 with conditional writes. Where S3 has none, a driver writes, waits, and looks
whether its lease is still there: of two that begin in the same moment both may run for some seconds, which costs time only.
"""

import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from gearnn_ray.core.errors import StoreUnavailableError, UserError
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.store.blobs import canonical_json
from gearnn_ray.store.files import FileTree

LEASE_SECONDS = 30.0
"""How long a lease lasts without a new beat."""

_BEATS = 3  # of a holder, in the time that its lease lasts
_LOOKS = 30  # of a follower, in that time
_SETTLE_SECONDS = 2.0  # on S3, in which another driver's write shows
_BYTES = 4096  # of a lease's file, at most
T = TypeVar("T")


class LeaseLostError(Exception):
    """Another driver has taken the job over."""


@dataclass(frozen=True)
class Lease:
    """A lease as it is stored. holder: a random name. The others describe its process, for people and for `has_ended`."""

    generation: int
    holder: str
    beat: int = 0
    host: str = ""
    pid: int = 0
    started: float = 0.0
    machine: str = ""

    def encode(self) -> bytes:
        return canonical_json(asdict(self))

    def is_of(self, holder: str) -> bool:
        return self.holder == holder

    def has_ended(self) -> bool:
        """Whether this machine knows that the holder's process has ended."""
        if self.machine != _machine():
            return False
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.started) > 1)
        except psutil.NoSuchProcess:
            return True


def decode(data: bytes | None) -> Lease | None:
    """The lease in a file; None if there is none, or something else."""
    try:
        return Lease(**json.loads(data or b""))
    except (ValueError, TypeError):
        return None


@dataclass
class Seen:
    """What a follower has seen of a lease: its latest form, and since when it is the same."""

    lease: Lease | None = None
    since: float = 0.0

    def is_free(self, lease: Lease | None, now: float, seconds: float) -> bool:
        """Whether the lease, as it is now, can be taken."""
        if lease != self.lease:
            self.lease, self.since = lease, now
        return lease is None or now - self.since > seconds or lease.has_ended()


def lease_key(kind: str, inputs: Mapping[str, Any]) -> str:
    """The key of a job: of what kind it is, and everything that decides what it computes."""
    return hashlib.sha256(canonical_json([kind, inputs])).hexdigest()


def run_leased(uri: str, key: str, emit: Emit, job: Callable[["HeldLease"], T]) -> T:
    """`job(lease)`, as the only driver of the job with this key. While another driver runs it, wait, and then run it as well: its
    results are in the store, and nothing is computed again. A job that raises LeaseLostError follows whoever took it over.
    """

    def notice(note: str) -> None:
        emit(Event("notice", "job", "all", note=note))

    while True:
        lease = HeldLease(uri, key)
        lease.take(notice)
        try:
            with lease.kept():
                return job(lease)
        except LeaseLostError:
            notice("this driver did not renew its lease in time, and another one has taken the job over")


class HeldLease:
    """The lease of one driver on one job."""

    def __init__(self, uri: str, key: str) -> None:
        self._files, self._path = FileTree(uri), f"leases/{key}.json"
        self._waits = uri.startswith("s3://")
        self._lease = Lease(
            0, secrets.token_hex(8), 0, socket.gethostname(), os.getpid(), psutil.Process().create_time(), _machine()
        )
        self._lost = threading.Event()

    @property
    def generation(self) -> int:
        return self._lease.generation

    def take(self, notice: Callable[[str], None]) -> None:
        """Take the lease, now or when its holder has released or not renewed it. Raises UserError if the store cannot be used."""
        seen, told = Seen(), None
        while True:
            data = self._files.read(self._path)
            found = decode(data)
            if seen.is_free(found, time.monotonic(), LEASE_SECONDS):
                if self._replace(data, found):
                    return
            elif found is not None and found.holder != told:
                told = found.holder
                where = f"{found.host}, process {found.pid}"
                notice(f"another driver runs this job ({where}): this one follows it, and then shows the result")
            time.sleep(LEASE_SECONDS / _LOOKS)

    def check(self) -> None:
        """Raise LeaseLostError if another driver has taken the job over, as far as is known. Reads nothing."""
        if self._lost.is_set():
            raise LeaseLostError

    def confirm(self) -> None:
        """Renew the lease now. Raises LeaseLostError if another driver has it."""
        self._renew()
        self.check()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renew the lease while the context lasts, and release it then."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(LEASE_SECONDS / _BEATS) and not self._lost.is_set():
                with suppress(OSError, UserError):  # the next beat tries again; who cannot reach the store either takes nothing
                    self._renew()

        threading.Thread(target=renew, daemon=True).start()
        reachable = True
        try:
            yield
        except StoreUnavailableError:
            reachable = False  # nor could the lease be released there: it expires
            raise
        finally:
            ended.set()
            if reachable:
                self._release()

    def _replace(self, data: bytes | None, found: Lease | None) -> bool:
        """Whether the lease is this driver's, after it has been put in the place of `data`."""
        mine = replace(self._lease, generation=(found.generation if found else 0) + 1, beat=0)
        after = self._files.update(self._path, lambda before: mine.encode() if before == data else None, _BYTES)
        if self._waits:
            time.sleep(_SETTLE_SECONDS)
            after = self._files.read(self._path)
        if after != mine.encode():
            return False
        self._lease = mine
        return True

    def _renew(self) -> None:
        following = replace(self._lease, beat=self._lease.beat + 1)

        def change(before: bytes | None) -> bytes | None:
            found = decode(before)
            return following.encode() if found is not None and found.is_of(self._lease.holder) else None

        found = decode(self._files.update(self._path, change, _BYTES))
        if found is None or not found.is_of(self._lease.holder):
            self._lost.set()
        self._lease = following

    def _release(self) -> None:
        with suppress(OSError, UserError):
            found = decode(self._files.read(self._path))
            if found is not None and found.is_of(self._lease.holder):
                self._files.delete(self._path)


def _machine() -> str:
    """The same for all processes that see each other's numbers, and for no others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()
