"""A sample of the campaign's faults of S3, and that a line sees what it looks for."""

import random
from pathlib import Path

import pytest

pytest.importorskip("moto", reason="needs moto's S3 server")

from benchmarks.faults import s3
from benchmarks.faults.campaign import run_once, sound
from gearnn_ray.store import files

STALE = s3.LINES[-1]
# slow: tests/test_patience.py has each of these faults, one request after the other
OTHERS = [pytest.param(line, marks=pytest.mark.slow) for line in s3.LINES[:-1]]


@pytest.mark.parametrize("line", [*OTHERS, STALE], ids=lambda line: line.name)
def test_a_sample_of_the_campaign_sees_nothing_wrong(line: s3.Line) -> None:
    run = run_once(line, 0, 0)
    assert sound([run]), run
    assert run.outcome is not None
    assert run.outcome.hit


def test_a_lost_object_and_an_altered_one_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = files.FileTree._upload

    def forgetful(tree: files.FileTree, full: str, data: bytes) -> None:
        if "/blobs/" not in full:
            upload(tree, full, data[:-1] if "/checkpoints/" in full else data)

    monkeypatch.setattr(files.FileTree, "_upload", forgetful)
    with pytest.raises(AssertionError, match="was refused"):
        s3.faulty("none", random.Random(0), tmp_path)


@pytest.mark.slow  # up to four runs
def test_a_collector_that_believes_a_listing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.FileTree, "delete_if_older", lambda tree, path, limit: tree.delete(path))
    assert not all(sound([run_once(STALE, 0, index)]) for index in range(4))
