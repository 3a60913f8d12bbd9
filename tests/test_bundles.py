"""The bundles of a replica without Ray: a moved tag is followed, and whatever goes wrong leaves the old release serving."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.service import bundles
from gearnn_ray.service.bundles import Bundle, Item, check_bundles, passes, predict
from gearnn_ray.serving.frames import Evidence, Frame
from gearnn_ray.serving.level_estimation import LevelEstimate
from gearnn_ray.store.releases import Store
from tests import served
from tests.nets import TRUST


def config_for(store: Path, *bundles: str, trust: tuple[str, ...] = TRUST) -> ServeConfig:
    return ServeConfig(store=str(store), bundles=bundles or ("tiny:latest",), device="cpu", trust=trust)


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


def item(model: Any, height: int, width: int) -> Item:
    frame = Frame(np.zeros((height, width, 3), np.uint8), Evidence(height, width, 0.0))
    return Item(model, frame, LevelEstimate("clean"), "image/png", 0.0)


def test_a_pass_holds_one_release_and_size_and_a_bounded_number_of_pixels() -> None:
    one, other = object(), object()
    items = [item(one, 4, 5), item(other, 4, 5), item(one, 5, 4), *(item(one, 4, 5) for _ in range(4)), item(one, 9, 9)]
    found = list(passes(items, 60))
    assert sorted(position for positions in found for position in positions) == list(range(len(items)))
    assert found == [[0, 3, 4], [5, 6], [1], [2], [7]]  # the last item alone has more pixels than a pass


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


def test_streams_that_are_not_used_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_STREAMS", 2)
    served.publish(Store(tmp_path), level_names=("h264-crf18", "h264-crf40"))
    bundle = Bundle("tiny:latest", config_for(tmp_path))
    bundle.refresh()
    for stream in ("north", "south", "north", "west"):
        level_of(bundle, stream, 30)
    assert [level_of(bundle, stream, 34.1) for stream in ("north", "south")] == ["h264-crf18", "h264-crf40"]


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
