"""The bundles of a replica without Ray: a moved tag is followed, and whatever goes wrong leaves the old release serving."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.service import copies
from gearnn_ray.service.bundles import Bundle, Item, check_bundles, predict
from gearnn_ray.serving.frames import Evidence, Frame
from gearnn_ray.serving.level_estimation import LevelEstimate
from gearnn_ray.serving.stream_table import TooManyStreamsError
from gearnn_ray.store.releases import Store
from tests import served
from tests.nets import TRUST


def config_for(store: Path, *bundles: str, trust: tuple[str, ...] = TRUST) -> ServeConfig:
    names = bundles or ("tiny:latest",)
    return ServeConfig(store=str(store), bundles=names, device="cpu", trust=trust, cache=str(store.with_name("copies")))


def test_a_stray_file_beside_a_tag_does_not_end_polling(tmp_path: Path) -> None:
    first = served.publish(Store(tmp_path))
    bundle = Bundle("tiny:latest", config_for(tmp_path))
    bundle.refresh()
    (tmp_path / "refs/tiny/latest.bak").write_text("an editor's copy")
    (tmp_path / "refs/tiny/latest~").write_bytes(b"\xff\x00")
    second = served.publish(Store(tmp_path), seed=1)
    bundle.refresh()
    assert (bundle.problem, bundle.model().digest) == (None, second)
    Store(tmp_path).tag("tiny", "latest", first)  # a rollback
    bundle.refresh()
    assert (bundle.problem, bundle.model().digest) == (None, first)


@pytest.mark.parametrize("network", ["os:abort", "http.server:test"])
def test_a_tag_that_moves_to_a_network_that_is_not_trusted_leaves_the_old_release(tmp_path: Path, network: str) -> None:
    first = served.publish(Store(tmp_path))
    bundle = Bundle("tiny:latest", config_for(tmp_path))
    bundle.refresh()
    loaded = set(sys.modules)
    served.publish(Store(tmp_path), network_name=network)
    bundle.refresh()
    assert bundle.model().digest == first
    problem = bundle.health().problem
    assert problem is not None
    assert network in problem
    assert "\n" not in problem
    assert "http.server" in loaded or "http.server" not in sys.modules
    with pytest.raises(UserError, match=network):
        check_bundles(config_for(tmp_path))


def test_without_trust_no_network_of_another_module_is_loaded(tmp_path: Path) -> None:
    digest = served.publish(Store(tmp_path))
    bundle = Bundle("tiny:latest", config_for(tmp_path, trust=("tests.zoo",)))
    bundle.refresh()
    with pytest.raises(CorruptStoreError, match=r"--trust tests\.nets"):
        bundle.model()
    trusting = Bundle("tiny:latest", config_for(tmp_path, trust=("tests.nets",)))
    trusting.refresh()
    assert trusting.model().digest == digest


def started(store: Path, **changes: Any) -> Bundle:
    """The bundle of a replica that has just been started."""
    bundle = Bundle("tiny:latest", config_for(store).model_copy(update=changes))
    bundle.refresh()
    return bundle


def broken_latest(store: Path) -> str:
    """Publish a release of which a blob is corrupt. Returns its digest."""
    before = set((store / "blobs/sha256").iterdir())
    digest = served.publish(Store(store), seed=1)
    broken = next(iter(set((store / "blobs/sha256").iterdir()) - before))
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    return digest


@pytest.mark.parametrize("loss", ["corrupt", "away"])
def test_a_replica_that_starts_without_the_newest_release_serves_the_last_good_one(tmp_path: Path, loss: str) -> None:
    store = tmp_path / "store"
    first = served.publish(Store(store))
    answers = [predict([item(started(store).model(), 32, 40)])[0]]
    if loss == "corrupt":
        broken_latest(store)
    else:
        store.rename(tmp_path / "away")
    again = started(store)
    health = again.health()
    assert (health.digest, health.is_copy) == (first, True)
    assert ("is altered in" if loss == "corrupt" else "No release tiny:latest") in (health.problem or "")
    answers.append(predict([item(again.model(), 32, 40)])[0])
    assert np.array_equal(answers[0].content, answers[1].content)
    again.refresh()
    assert again.health() == health

    if loss == "away":
        (tmp_path / "away").rename(store)
    else:
        first = served.publish(Store(store), seed=2)
    again.refresh()
    health = again.health()
    assert (health.digest, health.is_copy, health.problem) == (first, False, None)


def test_a_release_that_is_damaged_in_the_store_is_served_from_its_copy_until_it_is_mended(tmp_path: Path) -> None:
    store = tmp_path / "store"
    digest = served.publish(Store(store))
    started(store)
    manifest = store / "manifests" / f"{digest.removeprefix('sha256:')}.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[:-1])
    bundle = started(store)
    for _ in range(2):
        assert (bundle.is_copy, bundle.model().digest) == (True, digest)
        assert "is altered in" in str(bundle.problem)
        bundle.refresh()
    manifest.write_bytes(content)
    bundle.refresh()
    assert (bundle.is_copy, bundle.problem) == (False, None)


def test_a_copy_that_is_not_what_it_was_is_not_served(tmp_path: Path) -> None:
    store = tmp_path / "store"
    served.publish(Store(store))
    started(store)
    broken_latest(store)
    for blob in (tmp_path / "copies").glob("*/blobs/sha256/*"):
        blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptStoreError, match="not loaded"):
        started(store).model()


def test_a_copy_of_an_untrusted_network_is_not_served(tmp_path: Path) -> None:
    store = tmp_path / "store"
    served.publish(Store(store))
    started(store)
    store.rename(tmp_path / "away")
    assert started(store, trust=("tests.zoo",)).current is None
    assert started(store).current is not None


def test_copies_are_bounded_in_number_and_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_MOST", 3)
    store = tmp_path / "store"
    bundle = started(store)
    digests = []
    for seed in range(5):
        digests.append(served.publish(Store(store), seed=seed))
        bundle.refresh()
        os.utime(tmp_path / "copies" / digests[-1].removeprefix("sha256:"), (seed, seed))
    kept = {path.name for path in (tmp_path / "copies").iterdir()}
    assert kept == {"last", *(digest.removeprefix("sha256:") for digest in digests[2:])}


def test_a_disk_that_takes_no_copies_does_not_keep_a_release_from_being_served(tmp_path: Path) -> None:
    digest = served.publish(Store(tmp_path / "store"))
    (tmp_path / "file").touch()
    bundle = started(tmp_path / "store", cache=str(tmp_path / "file"))
    assert (bundle.model().digest, bundle.problem) == (digest, None)


def item(model: Any, height: int, width: int) -> Item:
    frame = Frame(np.zeros((height, width, 3), np.uint8), Evidence(height, width, 0.0))
    return Item(model, frame, LevelEstimate("clean"), "image/png", 0.0)


def test_a_pass_gives_answers_and_raw_outputs_side_by_side(tmp_path: Path) -> None:
    served.publish(Store(tmp_path))
    bundle = Bundle("tiny:latest", config_for(tmp_path))
    bundle.refresh()
    pixels = served.picture()
    frame = Frame(pixels, Evidence(*pixels.shape[:2], 0.0))
    levels, types = ("jpeg-10", "clean"), ("image/png", "application/x-npy")
    items = [Item(bundle.model(), frame, LevelEstimate(level), kind, 0.0) for level in levels for kind in types]
    for level, (answer, raw) in zip(levels, zip(*[iter(predict(items))] * 2, strict=True), strict=True):
        expected = served.expected_logits(tmp_path, "tiny:latest", level, served.png(pixels))
        np.testing.assert_allclose(raw.content, expected, rtol=1e-4, atol=1e-4)
        assert np.array_equal(answer.content, raw.content.argmax(0))
        assert (answer.content.dtype, raw.content.dtype) == (np.uint8, np.float32)
        assert answer.release == f"tiny@{bundle.model().digest}"


def level_of(bundle: Bundle, stream: str, qp: float) -> str:
    return bundle.level_of_next(stream, Evidence(64, 80, 100.0, qp=qp))[1].level


def test_a_stream_keeps_its_level_until_the_release_is_replaced(tmp_path: Path) -> None:
    names = ("h264-crf18", "h264-crf40")
    served.publish(Store(tmp_path), level_names=names)
    bundle = Bundle("tiny:latest", config_for(tmp_path))
    with pytest.raises(CorruptStoreError, match="not loaded"):
        level_of(bundle, "north", 30)
    bundle.refresh()
    # halfway between both, where a level in use is kept
    assert [level_of(bundle, "north", qp) for qp in (30, 34.1)] == ["h264-crf18"] * 2
    assert [level_of(bundle, "south", qp) for qp in (40, 33.9)] == ["h264-crf40"] * 2
    assert level_of(bundle, "north", 34.1) == "h264-crf18"
    served.publish(Store(tmp_path), seed=1, level_names=names)
    bundle.refresh()
    assert level_of(bundle, "north", 34.1) == "h264-crf40"


def test_invented_names_do_not_have_a_stream_forgotten_that_is_in_use(tmp_path: Path) -> None:
    served.publish(Store(tmp_path), level_names=("h264-crf18", "h264-crf40"))
    bundle = started(tmp_path)
    assert level_of(bundle, "north", 30) == "h264-crf18"
    for number in range(4095):
        level_of(bundle, f"invented-{number}", 40)
    with pytest.raises(TooManyStreamsError, match="4,096 streams, all of them in use"):
        level_of(bundle, "invented-4095", 40)
    assert level_of(bundle, "north", 34.1) == "h264-crf18"


def test_an_answer_names_the_shares_that_its_network_has(tmp_path: Path) -> None:
    served.publish(Store(tmp_path))
    bundle = Bundle("tiny:latest", config_for(tmp_path).model_copy(update={"untrained": "entropy"}))
    bundle.refresh()
    model, pixels = bundle.model(), served.picture()
    frame = Frame(pixels, Evidence(*pixels.shape[:2], 0.0))
    between = model.level_estimator.match("jpeg-20")
    (answer,) = predict([Item(model, frame, between, "application/x-npy", 0.0)])
    share = answer.estimate.weight
    assert share is not None
    assert 0 < share < 1
    assert answer.estimate == replace(between, weight=share)
    assert answer.estimate.spelled == f"jpeg-10*{1 - share:.2f}, jpeg-50*{share:.2f}"
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    assert np.array_equal(answer.content, model(images, [answer.estimate])[0].numpy())
