"""A sample of the campaign's faults of running jobs (`benchmarks/chaos.py`)."""

import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import clusters, jobs, running
from benchmarks.faults.campaign import Outcome, run_once
from benchmarks.faults.running import (
    Fault,
    Moment,
    Run,
    Undisturbed,
    epochs_repeated,
    fault_now,
    judged,
    progress_after,
    undisturbed,
)

LINES = {line.name: line for line in (*jobs.LINES, *clusters.LINES)}


@pytest.fixture(scope="module")
def own_ray(ray_cluster: Mapping[str, str]) -> Iterator[None]:
    """The Ray of the campaign's process is that of all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "joining", lambda: ray_cluster)
        yield


def sampled(line: str, number: int, share: float, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """A run of a line whose fault comes after this share of the job's events, however busy this machine is."""
    monkeypatch.setattr(Undisturbed, "moment", lambda job, _: Moment(int(share * (len(job.times) - 2)), 0.05))
    run = run_once(LINES[line], 0, number)
    assert run.outcome is not None, run.error
    return run.outcome


# two thirds of the events are those of fine-tunes, the full ones first
@pytest.mark.parametrize(
    ("line", "number", "share"),
    [
        ("kill-worker", 0, 0.5),
        ("lose-worker-again", 5, 0.0),
        ("clock", 1, 0.3),
        # slow: the same faults at moments of our choice are in test_recovery, test_attempts and test_leases
        *(
            pytest.param(*sample, marks=pytest.mark.slow)
            for sample in (
                ("kill-driver", 2, 0.7),
                ("stop-worker", 2, 0.5),
                ("stop-lease-holder", 0, 0.5),
                ("kill-raylet", 1, 0.5),
            )
        ),
    ],
)
def test_a_disturbed_job_ends_with_the_digests_of_an_undisturbed_one(
    line: str, number: int, share: float, own_ray: None, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = sampled(line, number, share, monkeypatch)
    assert (outcome.hit, outcome.equal, outcome.torn, outcome.lost, outcome.silent) == (True, True, 0, 0, 0), outcome.note


@pytest.mark.slow  # a Ray of its own for each
@pytest.mark.parametrize("line", ["kill-gcs", "out-of-memory", "ray-messages", "hosts-apart"])
def test_a_job_whose_ray_is_disturbed_ends_with_the_digests_of_an_undisturbed_one(
    line: str, own_ray: None, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = sampled(line, 0, 0.5, monkeypatch)
    assert (outcome.hit, outcome.equal, outcome.torn, outcome.lost, outcome.silent) == (True, True, 0, 0, 0), outcome.note


@pytest.fixture
def finished(tmp_path: Path, own_ray: None, ray_cluster: object) -> Run:
    """A job that ended, in a store of its own."""
    shutil.copytree(undisturbed("given").store, tmp_path / "store")
    return Run(tmp_path, "given")


def test_the_campaign_sees_what_is_altered_lost_or_computed_again(finished: Run) -> None:
    fault = fault_now(finished)
    assert judged(finished, fault).equal
    record = next((finished.store / "stages").rglob("*.json"))
    whole = record.read_bytes()
    record.write_bytes(whole[:-10])
    assert judged(finished, fault).torn == 1
    record.unlink()
    assert judged(finished, fault).lost == 1
    record.write_bytes(whole)
    (finished.store / "blobs/sha256" / ("0" * 64)).write_bytes(b"weights")
    assert judged(finished, fault).equal is False
    finished.lines = [epoch(1), epoch(1), epoch(2)]
    with pytest.raises(AssertionError, match="1 epochs were computed again"):
        judged(finished, fault, 0)


def epoch(number: int, level: str = "jpeg-10", at: float = 0.0, **changes: Any) -> dict[str, Any]:
    """The event at the end of an epoch of four steps."""
    line = {"event": "progress", "stage": "full", "level": level, "step": 4 * number, "steps": 16, "epoch": number, "epochs": 4}
    return {**line, "at": at, "time": at, "note": "", **changes}


def test_epochs_count_as_repeated_where_they_ended_before() -> None:
    begun_again = epoch(2, step=6)
    assert (
        epochs_repeated([epoch(1), epoch(2), begun_again, epoch(2), epoch(2, "brightness-0.4"), epoch(2, stage="partial")]) == 1
    )


def test_a_job_recovers_where_the_lost_level_gets_further_than_it_was() -> None:
    lost = {"event": "notice", "note": "jpeg-10 is started again, from its last checkpoint: its worker died", "at": 3.0}
    fault = Fault(2.5, wall=2.5)
    lines = [epoch(1, at=1), epoch(2, at=2), lost, epoch(1, "brightness-0.4", at=4), epoch(2, at=5), epoch(3, at=6)]
    assert progress_after(lines, fault) == 6
    assert progress_after([line for line in lines if line is not lost], fault) == 4
    assert progress_after([line for line in lines if line is not lost], Fault(2.5, wall=2.5, level="jpeg-10")) == 6
    assert progress_after(lines[:3], fault) is None


def test_what_was_reported_before_a_fault_and_arrives_later_is_no_recovery() -> None:
    late = {**epoch(3, at=2.6), "time": 2.4}
    assert progress_after([epoch(2, at=2), late, epoch(4, at=9)], Fault(2.5, wall=2.5)) == 9


def test_moments_are_as_likely_in_each_second_of_a_job() -> None:
    job = Undisturbed(Path(), [10.0, 11.0, 13.0, 14.0])
    draw = random.Random(0)
    moments = [job.moment(draw) for _ in range(4000)]
    for events, seconds in ((0, 1), (1, 2), (2, 1)):
        times = [moment.later for moment in moments if moment.events == events]
        assert len(times) == pytest.approx(1000 * seconds, rel=0.1)
        assert 0 <= min(times) < max(times) < seconds


def test_a_moment_that_a_job_does_not_reach_is_no_fault(tmp_path: Path) -> None:
    run = Run(tmp_path, "given")
    run.ended.set()
    assert not Moment(0, 0.0).of(run)
    assert Fault().at is None
