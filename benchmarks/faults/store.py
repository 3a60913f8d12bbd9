"""Faults of a store in a folder: power cuts, full and read-only disks, flipped bits, and writers at the same time."""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faults.campaign import Line, Outcome, lasting_folder
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.core.errors import UserError
from gearnn_ray.data.cache import level_images, split_targets
from gearnn_ray.levels.level import parse_level
from gearnn_ray.models.layers import network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.records import BaseResult
from gearnn_ray.offline.stage_cache import StageCache
from gearnn_ray.store.blobs import record_path
from gearnn_ray.store.manifest import Manifest, content_key
from gearnn_ray.store.releases import Release, Store
from gearnn_ray.training.trainer import Progress, fine_tune
from tests.conftest import NORMALISATION, ROOT, SEGMENTATION
from tests.power_cut import Disk, Files
from tests.small_disk import Images, namespaces
from tests.store_programs import Programs
from tests.stores import KEY, TABLE, content_of, manifest_of, table
from tests.stores import equal as equal_states

# ── a power cut ────────────────────────────────────────────────────────────────────────────────────────────────────────

Facts = dict[str, object]
"""What a store holds, seen from outside: digests by tag, a stage's record and its checkpoint. None: there is none."""


def history(store: Store, disk: Disk, draw: random.Random) -> list[Facts]:
    """Do six of the things that jobs do to a store, and note each; returns what each of them changes."""
    changes: list[Facts] = []
    published: list[str] = []

    def publish() -> Facts:
        tags = draw.sample(["v1", "v2"], draw.randrange(3))
        digest = store.publish(manifest_of(store, float(len(changes))), {TABLE: table(len(changes))}, tags)
        published.append(digest)
        return dict.fromkeys(["latest", *tags], digest)

    def tag() -> Facts:
        store.tag("street", name := draw.choice(["latest", "v1", "v2"]), digest := draw.choice(published))
        return {name: digest}

    def untag() -> Facts:
        name = draw.choice(sorted(store.tags("street")))
        store.untag("street", name)
        return {name: None}

    def checkpoint() -> Facts:
        store.put_checkpoint(KEY, data := draw.randbytes(100))
        return {"checkpoint": data}

    def finish() -> Facts:
        store.put_record(KEY, record := {"score": draw.random()})
        store.drop_checkpoint(KEY)
        return {"record": record, "checkpoint": None}

    for action in [publish, *draw.choices([publish, publish, tag, untag, checkpoint, finish], k=5)]:
        if store.tags("street") or action not in (tag, untag):
            changes.append(action())
            disk.note("done", len(changes))
    return changes


def power_cut(draw: random.Random, folder: Path) -> Outcome:
    """One history, and each state that a power cut may leave anywhere in it."""
    (root := folder / "store").mkdir()
    disk = Disk(root)
    with disk.recording():
        changes = history(Store(root), disk, draw)
    torn = lost = states = 0
    note = ""
    for _, files, noted in disk.states():
        states += 1
        store = restored(folder / "after", files)
        done: Any = noted.get("done", 0)
        before = {name: value for change in changes[:done] for name, value in change.items()}
        doing = changes[done] if done < len(changes) else {}
        found = facts_of(store)
        for name in before.keys() | found.keys():
            if found.get(name) not in (before.get(name), doing.get(name, before.get(name))):
                lost += 1
                note = f"{name} is {found.get(name)}, expected {before.get(name)} or {doing.get(name)}"
        for problem in problems_of(store):
            torn, note = torn + 1, problem
        if draw.random() < 0.02:  # what a job does when it is started again
            store.publish(manifest_of(store, -1.0), {TABLE: table(-1.0)})
            if problems := store.verify():
                torn, note = torn + 1, f"after another publication: {problems[0]}"
    return Outcome(torn=torn, lost=lost, note=note, figures={"operations": len(disk.events), "states": states})


def restored(root: Path, files: Files) -> Store:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return Store(root)


def facts_of(store: Store) -> Facts:
    stages = {"record": store.get_record(KEY), "checkpoint": store.get_checkpoint(KEY)}
    return {**store.tags("street"), **{name: value for name, value in stages.items() if value is not None}}


def problems_of(store: Store) -> list[str]:
    """A sentence for each tag that leads to no whole release."""
    found = []
    for tag in store.tags("street"):
        try:
            store.pull(f"street:{tag}")
        except UserError as error:
            found.append(f"{tag}: {error}")
    return found


# ── a full disk, and one that turns read-only ──────────────────────────────────────────────────────────────────────────


def small_disk(what: str, draw: random.Random, folder: Path) -> Outcome:
    """A program with a disk of its own, which is full at each write of each action, or turns read-only under them."""
    if not namespaces():
        raise RuntimeError("this line mounts a small tmpfs, which needs root or user namespaces (`unshare -rm`)")
    command = ["unshare", "-rm", sys.executable, "-m", "tests.small_disk", what, str(folder), str(draw.random())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split())[-300:])
    found = json.loads(done.stdout.splitlines()[-1])
    if found["said"]:
        raise AssertionError(f"this is no sentence about the disk: {found['said'][0]}")
    refused = sum(found["refused"].values())
    note = found["wrong"][0] if found["wrong"] else ""
    return Outcome(hit=len(found["refused"]) == 6, torn=len(found["wrong"]), note=note, figures={"refused": refused})


# ── a flipped bit ──────────────────────────────────────────────────────────────────────────────────────────────────────

LEVEL = parse_level("jpeg-10")
TUNE, BASE = "c" * 64, "d" * 64  # keys of stages


class Labelled(Images):
    def image(self, index: int) -> Any:
        return np.random.default_rng(index).integers(0, 256, (24, 32, 3), np.uint8)

    def target(self, index: int) -> Any:
        return np.full((24, 32), index, np.uint8)


class StoppedError(Exception):
    """A job ended in the middle of a fine-tune."""


def job(root: Path, stop: bool = False) -> Manifest:
    """What a split job does with its store and its cache of images: a base, an adaptor that is fine-tuned at a level, a release.
    It finds what is there as a job does. stop: raise StoppedError in the second epoch of the fine-tune.
    """
    store, split = Store(root / "store"), Labelled(0)
    stages = StageCache(store, LEVEL.name, lambda _: None)

    def intact(result: BaseResult) -> bool:
        return store.is_intact(result.digest)

    def progress(step: Progress) -> None:
        if stop and step.epoch:
            raise StoppedError

    def base() -> BaseResult:
        torch.manual_seed(0)
        blob = store.put_state(network_state(build_model("tests.nets:small", 3)))
        return BaseResult(blob.digest, blob.bytes, 0.0)

    def tuned() -> BaseResult:
        model = build_model("tests.nets:small", 3)
        model.load_state_dict(store.get_state(first.digest))
        images = level_images(split, LEVEL, root / "cache")
        targets = split_targets(split, 3, root / "cache", SEGMENTATION)
        recipe = Recipe(epochs=2, batch_size=3, crop=24)
        fine_tune(
            SEGMENTATION, model, images, targets, recipe, NORMALISATION, "float32", chosen=None, seed=0,
            checkpoint=stages.checkpoint(TUNE, "full"), progress=progress,
        )  # fmt: skip
        blob = store.put_state(network_state(model))
        return BaseResult(blob.digest, blob.bytes, 0.0)

    first = stages.result(BaseResult, BASE, base, intact)
    second = stages.result(BaseResult, TUNE, tuned, intact)
    content = content_of(store)
    floats = sum(tensor.numel() for tensor in store.get_state(second.digest).values())
    content["base"] = {"digest": first.digest, "bytes": first.bytes}
    content["levels"] = {
        LEVEL.name: {"digest": second.digest, "bytes": second.bytes, "floats": floats, "layers": ["all"], "scores": {}}
    }
    manifest = Manifest.model_validate(content)
    store.publish(manifest, {TABLE: table(0.5)}, stages=[BASE, TUNE])
    return manifest


def cached_images(root: Path) -> bytes:
    """All pixels and labels that a job would train on now."""
    split = Labelled(0)
    entries: list[Any] = [level_images(split, LEVEL, root / "cache"), split_targets(split, 3, root / "cache", SEGMENTATION)]
    return b"".join(np.asarray(each).tobytes() for entry in entries for each in entry)


@dataclass(frozen=True)
class Made:
    """Folders with the store and the cache of a job: one that has "ended", with an older release, and one that was "stopped"
    in its fine-tune. releases: what their tags lead to. manifest: what the job publishes. images: what it trains on.
    """

    place: Path
    releases: dict[str, Release]
    manifest: Manifest
    images: bytes


@functools.cache
def made() -> Made:
    place = lasting_folder("made")
    torch.set_num_threads(1)
    with suppress(StoppedError):
        job(place / "stopped", stop=True)
    assert Store(place / "stopped/store").get_checkpoint(TUNE) is not None
    ended = Store(place / "ended/store")
    ended.publish(manifest_of(ended, 9.0), {TABLE: table(9.0)}, ["older"], latest=False)
    manifest = job(place / "ended")
    releases = {tag: ended.pull(f"street:{tag}") for tag in ("older", "latest")}
    return Made(place, releases, manifest, cached_images(place / "ended"))


def same(found: Release, expected: Release) -> bool:
    """Whether two releases have the same levels and the same tensors."""
    return (
        found.levels == expected.levels
        and equal_states(found.base_state(), expected.base_state())
        and all(equal_states(found.stored_state(level), expected.stored_state(level)) for level in found.levels)
    )


def kinds(root: Path) -> dict[str, list[Path]]:
    """The files of a job in which a bit may flip, by what they are."""
    patterns = {
        "blob": "store/blobs/sha256/*",
        "manifest": "store/manifests/*",
        "record": "store/stages/*",
        "checkpoint": "store/checkpoints/*",
        "ref": "store/refs/*/*",
        "table": "store/tables/**/*.parquet",
        "image cache": "cache/*/*",
    }
    found = {kind: sorted(path for path in root.glob(pattern) if path.is_file()) for kind, pattern in patterns.items()}
    return {kind: [path for path in paths if path.stat().st_size] for kind, paths in found.items() if paths}


def bit_flip(draw: random.Random, folder: Path) -> Outcome:
    """One bit of one file; then the release is pulled, the job is run again, and what it leaves is looked at."""
    before = made()
    which = draw.choice(["ended", "stopped"])
    shutil.copytree(before.place / which, root := folder / which)
    files = kinds(root)
    path = draw.choice(files[kind := draw.choice(sorted(files))])
    bit = draw.randrange(8 * path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)

    store, refused, wrong = Store(root / "store"), 0, list[str]()
    verified = store.verify()
    for tag in store.tags("street"):
        try:
            found = store.pull(f"street:{tag}")
        except UserError as error:
            refused += 1
            wrong += [f"this is no sentence: {error}"] if "\n" in str(error) else []
        else:
            wrong += [] if same(found, before.releases[tag]) else [f"{tag} is another release"]
    if refused and not verified:
        wrong.append("a pull is refused, and verify has found nothing")
    manifest = job(root)
    equal = manifest == before.manifest and same(store.pull("street"), before.releases["latest"])
    wrong += ["the cached images are others"] if cached_images(root) != before.images else []
    others = ("street:older: ", record_path(content_key(before.releases["older"].manifest)))  # of another job: only named
    wrong += [f"after the job, {problem}" for problem in store.verify() if not problem.startswith(others)]
    note = f"bit {bit} of {path.relative_to(root)}: {wrong[0] if wrong else 'another adaptor'}" if wrong or not equal else ""
    figures = {f"in a {kind}, pulls refused": float(refused), f"in a {kind}, problems named by verify": float(len(verified))}
    return Outcome(equal=equal, silent=len(wrong), note=note, figures=figures)


# ── writers at the same time ───────────────────────────────────────────────────────────────────────────────────────────

RELEASES, DAY = 4, 86400.0


@functools.cache
def old_releases() -> tuple[Store, list[str], Programs]:
    """A store of releases that nobody used for a day, all but one without a tag; and programs that will work on copies of it."""
    template = Store(lasting_folder("old"))
    digests = [template.publish(manifest_of(template, float(i)), {TABLE: table(i / 10)}) for i in range(RELEASES)]
    template.tag("street", "latest", digests[0])
    for path in Path(template.uri).rglob("*"):
        os.utime(path, (time.time() - DAY,) * 2)
    return template, digests, Programs(5)


def races(draw: random.Random, folder: Path) -> Outcome:
    """Two publishers, a rollback, a collector and a reader: what a tag leads to is whole, and what a writer was told is there."""
    template, digests, programs = old_releases()
    root = folder / "store"
    shutil.copytree(template.uri, root)  # with the times
    tasks: list[dict[str, Any]] = [
        {"what": "publish", "digest": draw.choice(digests[1:])},
        {"what": "publish", "digest": draw.choice(digests[1:])},
        {"what": "rollback", "digest": draw.choice(digests)},
        {"what": "gc"},
        {"what": "pull", "times": 5},
    ]
    common = {"store": str(root), "template": template.uri}
    answers = programs.round([{**task, **common, "delay": draw.uniform(0, 0.02)} for task in tasks])
    store, wrong, lost = Store(root), list[str](), 0
    for task, answer in zip(tasks, answers, strict=True):
        if "refused" in answer and not (task["what"] == "rollback" and "missing" in answer["refused"]):
            wrong.append(f"{task['what']}: {answer['refused']}")  # only a rollback may come too late
    if tasks[0]["digest"] == tasks[1]["digest"] and answers[0] != answers[1]:
        wrong.append(f"equal content was published as {answers[0]} and {answers[1]}")
    for answer in answers[:3]:
        if "done" in answer:
            try:
                store.pull(f"street@{answer['done']}")
            except UserError as error:
                lost, wrong = lost + 1, [*wrong, str(error)]
    problems = store.verify()
    note = next(iter([*wrong, *problems]), "")
    figures = {"deleted": len(answers[3].get("done", ())), "rollbacks refused": float("refused" in answers[2])}
    return Outcome(torn=len(problems), lost=lost, silent=len(wrong) - lost, note=note, figures=figures)


def _small_disk(what: str) -> Callable[[random.Random, Path], Outcome]:
    return functools.partial(small_disk, what)


LINES: tuple[Line, ...] = (
    Line("power-cut", "power cut after each operation of a history of a store", 100, power_cut),
    Line("disk-full", "disk full at each write of each action", 20, _small_disk("full")),
    Line("read-only", "disk turns read-only in the middle", 20, _small_disk("read-only")),
    Line("bit-flip", "one flipped bit, then the job runs again", 1000, bit_flip),
    Line("races", "publish against rollback, collector and reader", 1000, races),
)
