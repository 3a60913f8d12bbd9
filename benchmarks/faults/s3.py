"""Faults of a store on S3: a server that refuses, resets, stays silent or breaks off, answers that get lost, stale listings."""

import atexit
import functools
import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.campaign import Line, Outcome
from gearnn_ray.core.errors import UserError
from gearnn_ray.store import files, patience
from gearnn_ray.store.releases import Store
from tests import conftest  # noqa: F401  it sets the credentials for a server on loopback
from tests.faulty_s3 import Fault, FaultyS3, faulty_s3, s3_server
from tests.stores import KEY, TABLE, manifest_of, table

_PATIENCE = 60.0  # seconds; faults end long before
_SILENT = 1.0  # seconds after which a request that nobody answers has failed


@functools.cache
def proxy() -> FaultyS3:
    """A proxy before a server of this process."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(faulty_s3(stack.enter_context(s3_server("models"))))


@contextmanager
def quick() -> Iterator[None]:
    """Requests that fail soon and are repeated soon, and releases that are published at the same time everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "SILENT_SECONDS", _SILENT)
        patch.setattr(patience, "_pauses", lambda: itertools.repeat(0.05))
        patch.setattr("gearnn_ray.store.releases.datetime", Noon)
        yield


class Noon(datetime):
    """One moment."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2026, 1, 1, 12, tzinfo=tz)


def actions(draw: random.Random) -> list[tuple[str, Callable[[Store], object]]]:
    """What a job and those who look after a store ask of it; each returns what it was told. The same on every store."""
    first, *others = (float(draw.randrange(1000)) for _ in range(3))
    payload = draw.randbytes(draw.choice((100, 100_000)))

    def publish(shift: float, *tags: str) -> Callable[[Store], object]:
        return lambda store: store.publish(manifest_of(store, shift), {TABLE: table(shift)}, tags)

    def roll_back(store: Store) -> object:
        to, latest = store.tag_digest("street", "v1"), store.tag_digest("street", "latest")
        assert to is not None
        store.tag("street", "latest", to, expected=latest)
        return store.tag_digest("street", "latest")

    drawn = [
        ("publish", publish(others[0], "v2")),
        ("publish again", publish(first)),
        ("publish another", publish(others[1])),
        ("roll back", roll_back),
        ("note a stage", lambda store: (store.put_record(KEY, {"a": first}), store.get_record(KEY))[1]),
        ("keep a checkpoint", lambda store: (store.put_checkpoint(KEY, payload), store.get_checkpoint(KEY))[1]),
        ("drop a checkpoint", lambda store: (store.drop_checkpoint(KEY), store.get_checkpoint(KEY))[1]),
        ("pull", lambda store: store.pull("street:v1").digest),
        ("look at the tags", lambda store: store.tags("street")),
        ("verify", lambda store: store.verify()),
        ("collect", lambda store: store.gc(86400, dry_run=False)),
    ]
    return [("publish first", publish(first, "v1")), *draw.sample(drawn, 7)]


def bursts(fault: Fault, draw: random.Random) -> tuple[Callable[[str, str], Fault], list[str]]:
    """Which requests fail: one in 25, with up to two after it. Also a list, of the requests that failed."""
    left, failed = 0, list[str]()
    most = 3 if fault == "hang" else 1000  # each takes seconds
    longest = 1 if fault == "hang" else 3

    def decide(method: str, path: str) -> Fault:
        nonlocal left
        if not left and draw.random() < 1 / 25:
            left = draw.randint(1, longest)
        if left and len(failed) < most:
            left -= 1
            failed.append(f"{method} {path}")
            return fault
        return "none"

    return decide, failed


def faulty(fault: Fault, draw: random.Random, folder: Path) -> Outcome:
    """The same actions on a store in a folder and on one whose server fails in between: the same answers, the same content."""
    server, wrong = proxy(), list[str]()
    told = actions(draw)
    with quick():
        undisturbed = Store(folder)
        expected = [act(undisturbed) for _, act in told]
        store = Store(f"s3://models/{folder.name}?endpoint_override={server.address}&scheme=http&patience={_PATIENCE:g}")
        server.fault, failed = bursts(fault, draw)
        started, slowest = time.monotonic(), 0.0
        try:
            for (name, act), answer in zip(told, expected, strict=True):
                began = time.monotonic()
                try:
                    if (found := act(store)) != answer:
                        wrong.append(f"{name}: {found}, expected {answer}")
                except UserError as error:
                    raise AssertionError(f"{name} was refused: {error}") from error
                slowest = max(slowest, time.monotonic() - began)
        finally:
            server.fault = lambda method, path: "none"
        seconds = time.monotonic() - started
        there, should = content_of(store), content_of(undisturbed)
    lost = [path for path in should if path not in there]
    torn = [path for path in there if there[path] != should.get(path)]
    note = next(iter([*wrong, *(f"{path} is lost" for path in lost), *(f"{path} differs" for path in torn)]), "")
    figures = {"requests that failed": len(failed), "seconds of all actions": seconds, "seconds of the slowest": slowest}
    return Outcome(hit=bool(failed), torn=len(torn), lost=len(lost), silent=len(wrong), note=note, figures=figures)


_GRACE = 2.0  # seconds: S3 dates objects to the second


def stale_listing(draw: random.Random, folder: Path) -> Outcome:
    """Writers and a collector whose listings are those of before: nothing that a tag leads to is deleted."""
    server, note = proxy(), ""
    with quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_FRESH_SECONDS_S3", _GRACE / 4)
        store = Store(f"s3://models/{folder.name}?endpoint_override={server.address}&scheme=http&patience={_PATIENCE:g}")
        old = [store.publish(manifest_of(store, shift), {TABLE: table(shift)}) for shift in (0.0, 1.0, 2.0)]
        garbage = store.put_blob(b"what nobody names")
        store.verify(), store.gc(0)  # the listings that come again
        time.sleep(_GRACE + 1)
        listed, rate = 0, draw.choice((0.5, 1.0))

        def stale(method: str, path: str) -> Fault:
            nonlocal listed
            if "list-type=2" in path and draw.random() < rate:
                listed += 1
                return "stale listing"
            return "none"

        expected: dict[str, str] = {"kept": draw.choice(old[:2])}  # no tag leads to these now, and no listing will show this one
        server.fault = stale
        try:
            store.tag("street", "kept", expected["kept"])
            for number in range(draw.randint(1, 3)):
                match draw.randrange(3):
                    case 0:
                        digest, tags = draw.choice(old), [draw.choice(["latest", "v9"])]
                        store.tag("street", tags[0], digest)
                    case 1:
                        tags, shift = ["latest", f"v{number}"], draw.choice((0.0, 1.0, 2.0))
                        digest = store.publish(manifest_of(store, shift), {TABLE: table(shift)}, tags)
                    case _:
                        tags, shift = ["latest"], 3.0 + number
                        digest = store.publish(manifest_of(store, shift), {TABLE: table(shift)})
                expected |= dict.fromkeys(tags, digest)
            deleted = store.gc(_GRACE, dry_run=False)
        finally:
            server.fault = lambda method, path: "none"
        found, lost = store.tags("street"), 0
        for tag, digest in ({"latest": old[-1]} | expected).items():
            try:
                if found.get(tag) != digest or store.pull(f"street:{tag}").digest != digest:
                    lost, note = lost + 1, f"{tag} is {found.get(tag)}, expected {digest}"
            except UserError as error:
                lost, note = lost + 1, f"{tag}: {error}"
        problems = store.verify()
    hit = listed > 0 and any(garbage[7:] in line for line in deleted)  # the collector did collect
    figures = {"stale listings": listed, "deleted": len(deleted)}
    return Outcome(hit=hit, torn=len(problems), lost=lost, note=note or next(iter(problems), ""), figures=figures)


def content_of(store: Store) -> dict[str, bytes | None]:
    """All files of a store by path, but those of writers that have not finished, and the lock."""
    paths = [entry.path for entry in store._files.entries("")]
    return {path: store._files.read(path) for path in paths if not path.rpartition("/")[2].startswith(".")}


def _line(name: str, title: str, fault: Fault) -> Line:
    return Line(name, f"S3: {title}", 40, functools.partial(faulty, fault))


LINES: tuple[Line, ...] = (
    _line("s3-503", "503 SlowDown", "503"),
    _line("s3-reset", "connection reset", "reset"),
    _line("s3-hang", "no answer", "hang"),
    _line("s3-truncated", "answer cut off", "truncate"),
    _line("s3-lost-reply", "reply lost after the request was done", "lose reply"),
    Line("s3-stale-listing", "S3: listings of before", 40, stale_listing),
)
