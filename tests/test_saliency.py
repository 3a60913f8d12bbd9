"""Gradients of a task's utility by the pixels: finite differences, every kind of detector, mixed levels; and what errors cost."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from examples.fastestdet import fastestdet
from gearnn_ray import AdaptiveModel
from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs import objective
from gearnn_ray.knobs.saliency import for_size, gradient, saliency
from gearnn_ray.knobs.tiles import tile_means, tile_sums
from gearnn_ray.models.centre_detector import centre_detector
from gearnn_ray.models.detector import offer_candidates
from gearnn_ray.models.registry import build_model
from gearnn_ray.tasks import task_by_name
from gearnn_ray.training.predict import Predictor, for_inference
from tests.conftest import NORMALISATION
from tests.test_adaptive_model import release_of

SEGMENTATION, DETECTION = task_by_name("segmentation"), task_by_name("detection")
RNG = np.random.default_rng(0)
FRAME = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)


def predictor(model: nn.Module) -> Predictor:
    return Predictor(for_inference(model), NORMALISATION)


def small(network: str = "tests.nets:small") -> Predictor:
    torch.manual_seed(0)
    return predictor(build_model(network, 4))


# ---- utilities


def test_the_soft_count_of_detection_counts_candidates_of_the_wanted_classes() -> None:
    found = {
        "boxes": torch.zeros(1, 2, 4), "scores": torch.tensor([[0.9, 0.1]]), "labels": torch.tensor([[1, 0]])
    }  # fmt: skip

    def forward(_: Any) -> Any:
        offer_candidates(lambda: torch.tensor([[[0.2, 0.9], [0.1, 0.5], [0.7, 0.0]]]))
        return found

    def count(*scores: float) -> float:
        return float(torch.sigmoid(20 * (torch.tensor(scores) - 0.5)).sum())

    x = torch.zeros(1, 3, 8, 8)
    assert float(DETECTION.utility(forward, x)) == pytest.approx(count(0.2, 0.9, 0.1, 0.5, 0.7, 0.0))
    assert float(DETECTION.utility(forward, x, [0])) == pytest.approx(count(0.2, 0.1, 0.7))
    assert float(DETECTION.utility(lambda _: found, x)) == pytest.approx(count(0.9, 0.1))
    assert float(DETECTION.utility(lambda _: found, x, [1])) == pytest.approx(count(0.9))
    with pytest.raises(UserError, match="expected boxes, scores and labels"):
        DETECTION.utility(lambda _: x, x)


def test_the_utility_of_segmentation_draws_classes_as_often_as_the_network_expects_them() -> None:
    """Its expectation is minus the entropy; a class that is certain is always drawn."""
    x, p = torch.zeros(2, 3, 8, 8), torch.tensor([0.1, 0.2, 0.7])
    logits = p.log()[None, :, None, None].expand(2, 3, 100, 100)
    found = float(SEGMENTATION.utility(lambda _: logits, x))
    assert found == pytest.approx(2 * float((p * p.log()).sum()), rel=0.03)
    assert found == float(SEGMENTATION.utility(lambda _: logits, x))
    assert float(SEGMENTATION.utility(lambda _: logits, x, [2])) == found
    assert float(SEGMENTATION.utility(lambda _: logits, x, [0, 1])) == 0
    sure = torch.tensor([0.0, 200.0, 0.0])[None, :, None, None].expand(1, 3, 10, 10)
    assert float(SEGMENTATION.utility(lambda _: sure, x)) == 0


def test_a_network_agrees_with_its_own_answer_as_a_target() -> None:
    logits = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = SEGMENTATION.target_of(logits, (10, 14))
    assert (labels.shape, labels.dtype) == ((10, 14), np.uint8)
    assert score_of(SEGMENTATION, logits, labels, (10, 14), 4) == 100
    found = {
        "boxes": torch.tensor([[0.0, 0, 9, 9], [10, 10, 30, 30], [5, 5, 6, 6]]),
        "scores": torch.tensor([0.8, 0.3, 0.1]), "labels": torch.tensor([2, 0, 1]),
    }  # fmt: skip
    objects = DETECTION.target_of(found, (40, 40))
    assert objects.labels.tolist() == [2, 0]
    assert objects.crowd.tolist() == [False, True]  # unsure, so that nobody need find it
    assert objects.areas.tolist() == [81, 400]
    assert score_of(DETECTION, found, objects, (40, 40), 3) == pytest.approx(100)
    assert score_of(DETECTION, {name: part[1:] for name, part in found.items()}, objects, (40, 40), 3) == 0


def score_of(task: Any, prediction: Any, target: Any, size: tuple[int, int], classes: int) -> float:
    evidence = task.evidence(prediction, target, size, classes)
    return float(task.first_metric({name: part[None] for name, part in evidence.items()}, np.ones((1, 1)))[0])


def test_masks_of_an_own_answer_are_kept() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:4, 2:6] = True
    found = {"boxes": torch.tensor([[2.0, 2, 6, 4]]), "scores": torch.ones(1), "labels": torch.zeros(1).long(), "masks": mask}
    objects = DETECTION.target_of(found, (8, 8))
    assert np.array_equal(objects.masks(), mask.numpy())
    assert objects.areas.tolist() == [8]


# ---- gradients


def open_minded() -> Predictor:
    torch.manual_seed(0)
    model = centre_detector(2)
    assert model.centres.bias is not None
    nn.init.zeros_(model.centres.bias)  # so that all scores are about one half, where the count is steepest
    return predictor(model)


@pytest.mark.parametrize(("task", "forward"), [(SEGMENTATION, small()), (DETECTION, open_minded())], ids=["classes", "boxes"])
def test_the_gradient_is_that_of_pixel_values(task: Any, forward: Predictor) -> None:
    found = gradient(task, forward, FRAME)
    assert found.shape == FRAME.shape
    assert found.dtype == np.float32
    direction = np.sign(found)
    x = torch.from_numpy(FRAME.astype(np.float64)).permute(2, 0, 1)[None]

    def utility(step: float) -> float:
        with torch.no_grad():
            moved = x + step * torch.from_numpy(direction.astype(np.float64)).permute(2, 0, 1)
            return float(task.utility(forward, moved.float()))

    slope = (utility(0.001) - utility(-0.001)) / 0.002
    assert slope == pytest.approx(float(np.abs(found).sum()), rel=0.1)
    assert slope > 0


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "heatmap": lambda: centre_detector(3),
    "grid": lambda: fastestdet(3),
    "two stages": lambda: build_model("light_maskrcnn", 3, {"min_size": 64, "max_size": 96}),
    "anchors": lambda: build_model("ssdlite320_mobilenet_v3_large", 3),
    "a decoder of one's own": lambda: build_model("tests.nets:tiny_detector", 3),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_gradients_reach_the_pixels_through_detectors_that_find_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = for_inference(DETECTORS[name]())
    found = gradient(DETECTION, Predictor(model, NORMALISATION), FRAME)
    assert np.isfinite(found).all()
    assert np.abs(found).sum() > 0


def test_it_works_within_inference_mode_as_a_service_calls_it() -> None:
    forward = small()
    wanted = saliency(SEGMENTATION, forward, FRAME)
    with torch.inference_mode():
        assert np.array_equal(saliency(SEGMENTATION, forward, FRAME), wanted)


# ---- through the adaptive network


@pytest.mark.parametrize("network", ["tests.nets:small", "tests.zoo:zoo"])
def test_gradients_go_through_the_weights_of_each_frames_level(network: str) -> None:
    release = release_of(network)
    model = AdaptiveModel(release, trust=("tests",))
    frames = RNG.integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    levels = ["jpeg-10", "clean", "jpeg-50"]
    with torch.inference_mode():  # a service has run before
        model(torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), levels)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float().requires_grad_()
    (mixed,) = torch.autograd.grad(SEGMENTATION.utility(model.forward_at(levels), x), x)
    for frame, level, found in zip(frames, levels, mixed, strict=True):
        plain = build_model(network, 4)
        plain.load_state_dict({**release.base_state(), **release.adaptor_state(level)}, strict=False)
        wanted = gradient(SEGMENTATION, predictor(plain), frame)
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), wanted, rtol=1e-2, atol=1e-3 * np.abs(wanted).max())
        np.testing.assert_allclose(gradient(SEGMENTATION, model.forward_at([level]), frame), wanted, rtol=1e-2,
                                   atol=1e-3 * np.abs(wanted).max())  # fmt: skip


def test_a_mixture_that_a_service_has_kept_can_be_differentiated() -> None:
    model = AdaptiveModel(release_of("tests.nets:small"), untrained="interpolate", trust=("tests",))
    images = torch.from_numpy(FRAME[:32, :48].copy()).permute(2, 0, 1)[None].contiguous()
    with torch.inference_mode():
        model(images, ["jpeg-20"])
    found = gradient(SEGMENTATION, model.forward_at(["jpeg-20"]), FRAME[:32, :48])
    assert np.abs(found).sum() > 0


def test_the_level_that_was_set_stays_set() -> None:
    model = AdaptiveModel(release_of("tests.nets:small"), trust=("tests",))
    images = torch.from_numpy(FRAME[:32, :48].copy()).permute(2, 0, 1)[None].contiguous()
    model.set_level("jpeg-10")
    before = model(images)
    own = gradient(SEGMENTATION, model.forward_at(), FRAME[:32, :48])
    assert not np.allclose(own, gradient(SEGMENTATION, model.forward_at(["brightness-0.4"]), FRAME[:32, :48]))
    assert np.array_equal(own, gradient(SEGMENTATION, model.forward_at(["jpeg-10"]), FRAME[:32, :48]))
    assert torch.equal(model(images), before)


# ---- tiles


def test_tiles_at_the_edge_are_smaller() -> None:
    values = RNG.random((40, 56)).astype(np.float32)
    sums, means = tile_sums(values), tile_means(values)
    assert sums.shape == means.shape == (3, 4)
    assert sums.sum() == pytest.approx(values.sum(), rel=1e-5)
    assert means[2, 3] == pytest.approx(values[32:, 48:].mean(), rel=1e-5)
    assert tile_means(np.ones((16, 17), np.float32)).tolist() == [[1, 1]]


def test_saliency_of_a_smaller_frame_weighs_the_same_error_alike() -> None:
    tiles = RNG.random((2, 3)).astype(np.float32)
    assert for_size(tiles, (32, 48), (32, 48)) is tiles
    larger = for_size(tiles, (32, 48), (64, 96))
    assert larger.shape == (4, 6)
    assert np.array_equal(larger[::2, ::2], tiles / 4)
    assert larger.sum() * 16**2 == pytest.approx(tiles.sum() * 16**2, rel=1e-5)
    assert for_size(tiles, (24, 40), (50, 70)).shape == (4, 5)


# ---- losses


PRISTINE = RNG.integers(20, 236, (2, 32, 32, 3), dtype=np.uint8)
ONES = {"saliency": np.ones((2, 2), np.float32), "signed": -np.ones((32, 32, 3), np.float32)}


@pytest.mark.parametrize("name", sorted(objective.LOSSES))
def test_equal_frames_lose_nothing_and_larger_errors_lose_more(name: str) -> None:
    loss, weights = objective.LOSSES[name], ONES.get(name, np.zeros(0, np.float32))
    if name == "random":
        assert 0 <= loss(weights, PRISTINE, PRISTINE) == loss(weights, PRISTINE, PRISTINE) < 1
        assert loss(weights, PRISTINE, PRISTINE) != loss(weights, PRISTINE, PRISTINE + 1)
        return
    noise = RNG.random(PRISTINE.shape)
    found = [loss(weights, PRISTINE, (PRISTINE + scale * noise).astype(np.uint8)) for scale in (0, 5, 19)]
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[0] < found[1] < found[2]


def test_an_error_counts_by_the_saliency_of_its_tile() -> None:
    shown = PRISTINE.copy()
    shown[1, 20, 5] += 3  # of two frames the second, in the tile below left
    tiles = np.array([[1, 2], [40, 8]], np.float32)
    assert objective.probe_loss(tiles, PRISTINE, shown) == pytest.approx(40 * 3 / 2)
    g = np.zeros((32, 32, 3), np.float32)
    g[20, 5] = 0.5, 0.25, -1.0
    assert objective.signed_loss(g, PRISTINE, shown) == pytest.approx(0.25 * 3 / 2)


def test_rivals_have_their_textbook_values() -> None:
    dark, bright = np.full((1, 32, 32, 3), 100, np.uint8), np.full((1, 32, 32, 3), 110, np.uint8)
    none = np.zeros(0, np.float32)
    assert objective.pixel_loss(none, dark, bright) == 10
    assert objective.psnr_loss(none, dark, bright) == pytest.approx(100 - 10 * np.log10(255**2 / 100))
    c1 = (0.01 * 255) ** 2
    assert objective.ssim_loss(none, dark, bright) == pytest.approx(1 - (2 * 11000 + c1) / (100**2 + 110**2 + c1), rel=1e-5)


def test_probes_that_show_the_same_pixels_have_no_outcome() -> None:
    same, other = PRISTINE.copy(), PRISTINE // 2
    assert objective.outcome(objective.pixel_loss, ONES["saliency"], PRISTINE, same, 10, deployed=same.copy()) is None
    found = objective.outcome(objective.pixel_loss, ONES["saliency"], PRISTINE, other, 10, deployed=same)
    assert found is not None
    assert (found.loss, found.bits) == (objective.pixel_loss(ONES["saliency"], PRISTINE, other), 80)
