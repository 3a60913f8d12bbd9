"""Publishers, rollbacks, a collector and a reader at the same time: what a tag leads to is always complete."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gearnn_ray.store.releases import Store
from tests.conftest import ROOT
from tests.stores import TABLE, manifest_of, table

ROUNDS, RELEASES, DAY = 30, 4, 86400.0


@pytest.fixture
def programs() -> Iterator[list[Any]]:
    """Two publishers, one who rolls back, one collector."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.store_programs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(4)
    ]
    yield started
    for program in started:
        program.stdin.close()  # type: ignore[union-attr]
        program.wait(20)


def test_a_tag_leads_to_a_whole_release_whoever_publishes_collects_and_rolls_back(tmp_path: Path, programs: list[Any]) -> None:
    template = Store(tmp_path / "template")
    digests = [template.publish(manifest_of(template, float(i)), {TABLE: table(i / 10)}) for i in range(RELEASES)]
    template.tag("street", "latest", digests[0])  # no tag leads to the others
    for path in (tmp_path / "template").rglob("*"):
        os.utime(path, (time.time() - DAY,) * 2)
    draw, refused, deleted = random.Random(0), 0, 0
    for number in range(ROUNDS):
        root = tmp_path / f"store-{number}"
        shutil.copytree(tmp_path / "template", root)  # with the times
        store = Store(root)
        tasks = [
            {"what": "publish", "digest": draw.choice(digests[1:])},
            {"what": "publish", "digest": draw.choice(digests[1:])},
            {"what": "rollback", "digest": draw.choice(digests)},
            {"what": "gc"},
        ]
        for program, task in zip(programs, tasks, strict=True):
            common = {"store": str(root), "template": template.uri, "delay": draw.uniform(0, 0.02)}
            program.stdin.write(json.dumps({**task, **common}) + "\n")
            program.stdin.flush()
        for _ in range(5):
            store.pull("street")
        answers = [json.loads(program.stdout.readline()) for program in programs]
        published = [answer["done"] for answer in answers[:2]]  # neither was refused
        assert tasks[0]["digest"] != tasks[1]["digest"] or published[0] == published[1]
        if "refused" in answers[2]:  # the collector was first
            assert "missing" in answers[2]["refused"]
            refused += 1
        deleted += len(answers[3]["done"])
        assert store.verify() == [], (number, tasks, answers)
        # nothing that a publisher or a rollback was told is there has gone
        for answer in answers[:3]:
            if "done" in answer:
                assert store.pull(f"street@{answer['done']}").digest == answer["done"]
        shutil.rmtree(root)
    assert deleted > ROUNDS  # there was something to collect
    assert refused < ROUNDS / 2  # and mostly something to roll back to
