"""Two drivers of one job: one runs it, the other follows, and takes over where the first one is gone."""

import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gearnn_ray.core.errors import UserError
from gearnn_ray.core.events import Event
from gearnn_ray.store import leases
from gearnn_ray.store.files import FileTree
from gearnn_ray.store.leases import HeldLease, Lease, LeaseLostError, Seen, decode, lease_key, run_leased
from tests.conftest import eventually
from tests.faulty_s3 import s3_server

KEY = lease_key("split", {"name": "tiny"})
processes = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 3.0)


def lease_in(store: Path) -> Lease | None:
    path = store / "leases" / f"{KEY}.json"
    return decode(path.read_bytes()) if path.exists() else None


def hold(store: Path, log: Path, seconds: float = 60) -> None:
    """A driver whose job takes this long, in a process of its own."""

    def job(lease: HeldLease) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {lease.generation}\n")
        for _ in range(int(seconds / 0.05)):
            time.sleep(0.05)
            lease.check()

    run_leased(str(store), KEY, lambda _: None, job)
    with log.open("a") as file:
        file.write(f"{os.getpid()} done\n")


def test_a_job_that_is_alone_takes_its_lease_and_leaves_none(tmp_path: Path) -> None:
    def job(lease: HeldLease) -> str:
        held = lease_in(tmp_path)
        assert held is not None
        assert (held.generation, held.pid) == (1, os.getpid())
        lease.confirm()
        return "result"

    assert run_leased(str(tmp_path), KEY, lambda _: pytest.fail("a notice"), job) == "result"
    assert lease_in(tmp_path) is None


def test_a_job_that_fails_releases_its_lease(tmp_path: Path) -> None:
    def job(_: HeldLease) -> None:
        raise UserError("wrong")

    with pytest.raises(UserError):
        run_leased(str(tmp_path), KEY, lambda _: None, job)
    assert lease_in(tmp_path) is None


def test_the_second_driver_says_in_one_line_that_it_follows_and_runs_when_the_first_is_done(tmp_path: Path) -> None:
    log, seen = tmp_path / "log", list[Event]()
    first = processes.Process(target=hold, args=(tmp_path, log, 5))
    first.start()
    eventually(log.exists)
    result = run_leased(str(tmp_path), KEY, seen.append, lambda lease: (log.read_text().split()[-1], lease.generation))
    first.join(10)
    assert result == ("done", 1)  # longer than the lease lasts: it was renewed
    (notice,) = seen
    assert (notice.kind, notice.level) == ("notice", "all")
    assert f"process {first.pid}): this one follows it" in notice.note


def test_a_killed_driver_of_this_machine_is_followed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = processes.Process(target=hold, args=(tmp_path, tmp_path / "log"))
    first.start()
    eventually((tmp_path / "log").exists)
    first.kill()
    first.join(10)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 60)
    started = time.monotonic()
    assert run_leased(str(tmp_path), KEY, lambda _: None, lambda lease: lease.generation) == 2
    assert time.monotonic() - started < 10


def test_a_killed_driver_of_another_machine_is_followed_when_its_lease_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = processes.Process(target=hold, args=(tmp_path, tmp_path / "log"))
    first.start()
    eventually((tmp_path / "log").exists)
    first.kill()
    first.join(10)
    monkeypatch.setattr(leases, "_machine", lambda: "another")
    started = time.monotonic()
    assert run_leased(str(tmp_path), KEY, lambda _: None, lambda lease: lease.generation) == 2
    assert time.monotonic() - started > leases.LEASE_SECONDS


def test_a_stopped_driver_is_replaced_and_follows_when_it_wakes_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = processes.Process(target=hold, args=(tmp_path, log, 5))
    first.start()
    assert first.pid is not None
    try:
        eventually(log.exists)
        os.kill(first.pid, signal.SIGSTOP)
        running, end = threading.Event(), threading.Event()

        def job(lease: HeldLease) -> int:
            running.set()
            assert end.wait(30)
            lease.confirm()
            return lease.generation

        results = list[int]()
        second = threading.Thread(target=lambda: results.append(run_leased(str(tmp_path), KEY, lambda _: None, job)))
        second.start()
        assert running.wait(20)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    time.sleep(1)  # the first one finds that it lost the job, and waits
    assert log.read_text().splitlines() == [f"{first.pid} 1"]
    end.set()
    second.join(20)
    assert results == [2]
    first.join(20)
    assert first.exitcode == 0
    assert log.read_text().splitlines()[1:] == [f"{first.pid} 1", f"{first.pid} done"]


def test_a_driver_that_lost_its_lease_moves_no_tags(tmp_path: Path) -> None:
    def job(lease: HeldLease) -> None:
        path = tmp_path / "leases" / f"{KEY}.json"
        path.write_bytes(replace(Lease(**json.loads(path.read_bytes())), generation=2, holder="another").encode())
        with pytest.raises(LeaseLostError):
            lease.confirm()
        path.unlink()

    run_leased(str(tmp_path), KEY, lambda _: None, job)


def test_of_many_drivers_that_begin_at_once_one_holds_the_lease(tmp_path: Path) -> None:
    at_work, most, ran = [0], [0], list[int]()
    guard = threading.Lock()

    def job(lease: HeldLease) -> None:
        with guard:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
            ran.append(lease.generation)
        time.sleep(0.1)
        with guard:
            at_work[0] -= 1

    drivers = [threading.Thread(target=run_leased, args=(str(tmp_path), KEY, lambda _: None, job)) for _ in range(6)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(30)
    assert (most, len(ran)) == ([1], 6)


@pytest.mark.parametrize("conditional", [True, False])
def test_on_s3_a_lease_is_taken_kept_and_released(conditional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without conditional writes a driver looks again after it has written; the later of two writers has the lease."""
    pytest.importorskip("moto", reason="needs moto's S3 server")
    from gearnn_ray.store import conditional as conditional_writes

    def refuse(*_: object) -> None:
        raise conditional_writes.NotConditionalError

    if not conditional:
        monkeypatch.setattr(conditional_writes.ConditionalBucket, "update", refuse)
    monkeypatch.setattr(leases, "_SETTLE_SECONDS", 0.5)
    with s3_server("models") as address:
        uri, order = f"s3://models/store?endpoint_override={address}&scheme=http", list[str]()

        def job(lease: HeldLease) -> None:
            order.append("begun")
            time.sleep(2)
            lease.confirm()
            order.append("ended")

        drivers = [threading.Thread(target=run_leased, args=(uri, KEY, lambda _: None, job)) for _ in range(2)]
        for driver in drivers:
            driver.start()
            time.sleep(0.2)  # the second one writes before the first has looked again
        for driver in drivers:
            driver.join(60)
        assert order == ["begun", "ended"] * 2
        assert FileTree(uri).files("leases") == []


def test_a_damaged_lease_is_free(tmp_path: Path) -> None:
    for damage in (b"", b"{", b"[]", b'{"generation": 1}', b"null"):
        (tmp_path / "leases").mkdir(exist_ok=True)
        (tmp_path / "leases" / f"{KEY}.json").write_bytes(damage)
        assert run_leased(str(tmp_path), KEY, lambda _: None, lambda lease: lease.generation) == 1


def test_a_lease_expires_by_the_followers_clock_alone() -> None:
    seen, lease = Seen(), Lease(1, "a", 5, machine="another")
    assert seen.is_free(None, 0, 30)
    assert not seen.is_free(lease, 100, 30)
    assert not seen.is_free(lease, 130, 30)
    assert seen.is_free(lease, 131, 30)
    assert not seen.is_free(replace(lease, beat=6), 131, 30)  # it was renewed meanwhile, whatever a clock says


def test_other_jobs_have_other_leases() -> None:
    assert len({lease_key("split", {"seed": 0}), lease_key("split", {"seed": 1}), lease_key("sweep", {"seed": 0})}) == 3
