"""The task `detection`: targets, crops, losses, predictions, and evidence against pycocotools."""

import contextlib
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.objects import Objects, boxes_of, rle_of
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import scores, scores_of_images
from gearnn_ray.training.predict import Predictor
from gearnn_ray.training.sampling import training_batches
from tests.conftest import NORMALISATION

TASK = task_by_name("detection")
CLASSES = 3


def some_objects(seed: int, height: int = 40, width: int = 56, masks: bool = True, least: int = 0) -> Objects:
    """Up to five random rectangles with a corner cut off, some of them crowds."""
    rng = np.random.default_rng(seed)
    painted = []
    for _ in range(rng.integers(least, 6)):
        top, left = rng.integers(0, height - 6), rng.integers(0, width - 6)
        mask = np.zeros((height, width), np.bool_)
        mask[top : top + rng.integers(4, 20), left : left + rng.integers(4, 20)] = True
        mask[top, left] = False
        painted.append(mask)
    areas = np.array([mask.sum() for mask in painted], np.float32)
    labels = rng.integers(0, CLASSES, len(painted))
    crowd = rng.random(len(painted)) < 0.2
    rles = tuple(map(rle_of, painted)) if masks else None
    return Objects(boxes_of(painted), labels, areas, crowd, (height, width), rles)


def image_like(objects: Objects, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*objects.size, 3)).astype(np.uint8)


def same(a: Objects, b: Objects) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("boxes", "labels", "areas", "crowd"))
    return arrays and a.size == b.size and a.rles == b.rles


@given(st.integers(0, 10**6), st.booleans())
def test_stored_objects_are_restored(seed: int, masks: bool) -> None:
    objects = some_objects(seed, masks=masks)
    stored = TASK.store(objects)
    assert stored.dtype == np.uint8
    assert stored.ndim == 2
    restored = TASK.restore(stored)
    assert same(objects, restored)
    assert restored.boxes.dtype == np.float32
    assert restored.labels.dtype == np.int64
    assert restored.crowd.dtype == np.bool_


def test_objects_of_another_image_or_class_are_refused() -> None:
    objects = some_objects(1, least=2)
    with pytest.raises(UserError, match="train sample 'a' has objects of an image of 56x40 and 56x41 pixels"):
        TASK.check(np.zeros((41, 56, 3), np.uint8), objects, CLASSES, "train sample 'a'")
    other = replace(objects, labels=np.full(len(objects), 2))
    with pytest.raises(UserError, match="has the class id 2, expected 0 to 0"):
        TASK.check(image_like(objects), other, 1, "x")
    TASK.check(image_like(objects), objects, CLASSES, "x")


@given(st.integers(0, 10**6), st.booleans(), st.lists(st.floats(0, 0.999), min_size=3, max_size=3), st.integers(8, 70))
def test_a_crop_has_the_objects_that_are_seen_in_it(seed: int, masks: bool, draws: list[float], crop: int) -> None:
    objects = some_objects(seed, masks=masks)
    image = image_like(objects)
    # a plane of its own for every object: the picture and the objects must be cropped alike
    image[..., 0] = 0
    for mask in objects.masks():
        image[..., 0][mask] = 255
    cropped, left = TASK.augment(image, objects, (crop, crop), np.array(draws))
    assert cropped.shape[:2] == left.size == (min(crop, 40), min(crop, 56))
    height, width = left.size
    assert (left.boxes[:, :2] >= 0).all()
    assert (left.boxes[:, 2] <= width).all()
    assert (left.boxes[:, 3] <= height).all()
    assert (left.boxes[:, 2:] > left.boxes[:, :2]).all()
    if masks:
        assert np.array_equal(left.masks().any(0) if len(left) else np.zeros(left.size, bool), cropped[..., 0] == 255)
        assert np.array_equal(left.boxes, boxes_of(left.masks()))
    if crop >= 56:
        assert len(left) == len(objects)
        assert np.array_equal(left.crowd, objects.crowd)


def test_an_object_that_is_hardly_seen_is_no_error() -> None:
    box = np.array([[10, 10, 30, 30]], np.float32)
    whole = Objects(box, np.array([1]), np.array([400], np.float32), np.array([False]), (40, 40))
    image = image_like(whole)
    _, half = TASK.augment(image, whole, (20, 40), np.array([0.0, 0.0, 0.9]))
    assert not half.crowd[0]
    assert half.areas[0] == 200
    _, little = TASK.augment(image, whole, (15, 40), np.array([0.0, 0.0, 0.9]))
    assert little.crowd[0]
    _, none = TASK.augment(image, whole, (10, 40), np.array([0.0, 0.0, 0.9]))
    assert len(none) == 0


def test_objects_follow_the_frames_of_a_smaller_level() -> None:
    objects = some_objects(3, least=2)
    small = image_like(objects)[::2, ::2]
    _, scaled = TASK.augment(small, objects, (100, 100), np.array([0.0, 0.0, 0.9]))
    assert np.allclose(scaled.boxes, objects.boxes / 2)
    assert np.allclose(scaled.areas, objects.areas / 4)
    assert scaled.masks().shape == (len(objects), 20, 28)


def test_images_of_different_sizes_make_a_list_and_equal_ones_a_tensor() -> None:
    every = [some_objects(seed) for seed in range(4)]
    equal = TASK.collate([(image_like(objects), objects) for objects in every])
    assert equal.images.shape == (4, 3, 40, 56)
    tall = some_objects(9, height=48)
    mixed = TASK.collate([(image_like(every[0]), every[0]), (image_like(tall), tall)]).to(torch.device("cpu"))
    assert [tuple(image.shape) for image in mixed.images] == [(3, 40, 56), (3, 48, 56)]
    for objects, target in zip(every, equal.targets, strict=True):
        assert len(target["labels"]) == (~objects.crowd).sum()
        assert len(target["crowd"]) == objects.crowd.sum()
        assert target["masks"].shape == (len(target["labels"]), 40, 56)


def test_an_epoch_is_a_pure_function_of_its_seed_and_workers_share_it() -> None:
    objects = [some_objects(seed) for seed in range(6)]
    images = [image_like(each, seed) for seed, each in enumerate(objects)]

    def epoch(**more: int) -> list[Any]:
        return list(training_batches(TASK, images, objects, 4, (32, 32), (1, 2), **more))

    whole, again = epoch(), epoch()
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, again, strict=True))
    shares = [epoch(rank=rank, world_size=2)[0] for rank in range(2)]
    assert torch.equal(torch.stack([shares[i % 2].images[i // 2] for i in range(4)]), whole[0].images)


def test_losses_are_sums_over_counts_and_plain_numbers_count_once() -> None:
    batch = TASK.collate([(image_like(some_objects(1)), some_objects(1))])
    pair = TASK.losses(lambda images, targets: {"a": (torch.tensor(6.0), torch.tensor(3))}, batch)
    assert (float(pair["a"].sum), int(pair["a"].count)) == (6, 3)
    plain = TASK.losses(lambda images, targets: {"a": torch.tensor(6.0)}, batch)
    assert (float(plain["a"].sum), int(plain["a"].count)) == (6, 1)
    with pytest.raises(UserError, match="returned a Tensor for images with targets: expected its losses"):
        TASK.losses(lambda images, targets: torch.zeros(3), batch)


def test_outputs_of_both_kinds_become_one_mapping_per_image() -> None:
    boxes = torch.arange(16.0).view(2, 2, 4)
    batched = {"boxes": boxes, "scores": torch.tensor([[0.2, 0.7], [0.5, 0.0]]), "labels": torch.tensor([[0, 1], [2, 0]])}
    first, second = TASK.outputs(batched)
    assert first["scores"].tolist() == pytest.approx([0.7, 0.2])
    assert first["labels"].tolist() == [1, 0]
    assert second["boxes"].tolist() == [[8, 9, 10, 11]]  # an empty place is no detection
    listed = [
        {"boxes": boxes[0], "scores": batched["scores"][0], "labels": batched["labels"][0], "masks": torch.rand(2, 1, 5, 6)}
    ]
    (only,) = TASK.outputs(listed)
    assert only["masks"].dtype == torch.bool
    assert only["masks"].shape == (2, 5, 6)
    assert torch.equal(only["masks"][1], listed[0]["masks"][0, 0] > 0.5)


@pytest.mark.parametrize("raw", [torch.zeros(2, 4, 8, 8), (torch.zeros(2, 4),), [{"logits": torch.zeros(4)}]])
def test_a_detector_that_returns_raw_tensors_is_refused(raw: Any) -> None:
    with pytest.raises(
        UserError, match="expected boxes, scores and labels of each image, so a network of raw tensors needs a decoder"
    ):
        TASK.outputs(raw)


def noisy_prediction(objects: Objects, seed: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """Some of the objects, shifted a little, and some that are not there; in an image of another size."""
    rng = np.random.default_rng(seed)
    found = []
    for mask, label in zip(objects.masks(), objects.labels, strict=True):
        if rng.random() < 0.8:
            found.append((np.roll(mask, rng.integers(-2, 3, 2), (0, 1)), label if rng.random() < 0.9 else 0))
    found += [(other, 1) for other in some_objects(seed + 1).masks()[:2]]
    rows, columns = ((np.arange(n) + 0.5) * m / n for n, m in zip(size, objects.size, strict=True))
    masks = np.array([m[rows.astype(int)[:, None], columns.astype(int)] for m, _ in found], bool).reshape(-1, *size)
    kept = masks.any((1, 2))
    return {
        "boxes": torch.from_numpy(boxes_of(masks[kept])),
        "scores": torch.from_numpy(rng.random(len(found)).astype(np.float32))[kept],
        "labels": torch.tensor([label for _, label in found], dtype=torch.int64)[kept],
        "masks": torch.from_numpy(masks[kept]),
    }


def coco_says(every: list[Objects], predictions: list[dict[str, Tensor]], sizes: list[tuple[int, int]], kind: str) -> list[float]:
    annotations, results = [], []
    for image, (objects, prediction, size) in enumerate(zip(every, predictions, sizes, strict=True), 1):
        height, width = objects.size
        for box, label, area, crowd, rle in zip(
            objects.boxes.tolist(), objects.labels, objects.areas, objects.crowd, objects.rles or (), strict=True
        ):
            corner = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image, "category_id": int(label), "bbox": corner, "area": float(area),
                    "iscrowd": int(crowd), "segmentation": {"size": [height, width], "counts": rle},
                }
            )  # fmt: skip
        scale = np.array([width / size[1], height / size[0]] * 2)
        for box, score, label, mask in zip(*(prediction[name] for name in ("boxes", "scores", "labels", "masks")), strict=True):
            left, top, right, bottom = box.double().numpy() * scale
            rows, columns = ((np.arange(n) + 0.5) * m / n for n, m in zip(objects.size, size, strict=True))
            whole = mask.numpy()[rows.astype(int)[:, None], columns.astype(int)]
            result = {"image_id": image, "category_id": int(label), "score": float(score)}
            if kind == "bbox":
                results.append(result | {"bbox": [left, top, right - left, bottom - top]})
            else:
                results.append(result | {"segmentation": coco_masks.encode(np.asfortranarray(whole, np.uint8))})
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i + 1, "height": o.size[0], "width": o.size[1]} for i, o in enumerate(every)],
        "annotations": annotations, "categories": [{"id": k, "name": str(k)} for k in range(CLASSES)], "info": {},
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(results), kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return [100 * max(0.0, judged.stats[i]) for i in (0, 1, 2, 3, 4, 5, 8)]


@pytest.mark.parametrize("size", [(40, 56), (20, 28)], ids=["own size", "half size"])
def test_scores_of_boxes_and_masks_are_those_of_pycocotools(size: tuple[int, int]) -> None:
    every = [some_objects(seed) for seed in range(12)]
    predictions = [noisy_prediction(objects, seed, size) for seed, objects in enumerate(every)]
    evidence = [TASK.evidence(p, o, size, CLASSES) for p, o in zip(predictions, every, strict=True)]
    together = {name: torch.stack([each[name] for each in evidence]) for name in evidence[0]}
    found = scores(TASK, together)
    assert list(found) == list(TASK.metrics)
    expected = coco_says(every, predictions, [size] * 12, "bbox") + coco_says(every, predictions, [size] * 12, "segm")
    assert 5 < expected[0] < 95
    assert 5 < expected[7] < 95
    assert list(found.values()) == pytest.approx(expected, abs=1e-9)
    assert len(scores_of_images(TASK, together)) == 12
    assert TASK.target_summary(together).shape == (12, CLASSES, 4)


def test_without_masks_there_are_no_scores_of_masks() -> None:
    objects = some_objects(5, masks=False, least=2)
    prediction = {
        "boxes": torch.from_numpy(objects.boxes),
        "scores": torch.ones(len(objects)),
        "labels": torch.from_numpy(objects.labels),
    }
    evidence = {name: part[None] for name, part in TASK.evidence(prediction, objects, objects.size, CLASSES).items()}
    assert list(scores(TASK, evidence)) == list(TASK.metrics[:7])
    assert scores(TASK, evidence)["AP"] == pytest.approx(100)


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_close_outputs_have_the_same_detections_in_any_order_of_ties(seed: int) -> None:
    prediction = noisy_prediction(some_objects(seed, least=1), seed, (40, 56))
    order = torch.randperm(len(prediction["scores"]), generator=torch.Generator().manual_seed(seed))
    shuffled = {name: part[order] for name, part in prediction.items()}
    if len(prediction["scores"]) > 1:
        assert TASK.close([prediction], [shuffled])
        moved = {**prediction, "boxes": prediction["boxes"] + 3}
        assert not TASK.close([prediction], [moved])
        level = {**prediction, "scores": torch.full_like(prediction["scores"], 0.5)}
        assert not TASK.close([level], [{**level, "boxes": moved["boxes"]}])
        weaker = {**prediction, "scores": prediction["scores"] * 0.9}
        assert not TASK.close([prediction], [weaker])


def test_a_predictor_takes_images_of_different_sizes() -> None:
    seen: list[Any] = []
    predictor = Predictor(lambda images, targets: seen.append((images, targets)), NORMALISATION)
    images = [torch.full((3, 8, 8), 102, dtype=torch.uint8), torch.full((3, 9, 7), 102, dtype=torch.uint8)]
    predictor(images, "targets")
    ((normalised, targets),) = seen
    assert targets == "targets"
    assert [tuple(image.shape) for image in normalised] == [(3, 8, 8), (3, 9, 7)]
    assert all(torch.allclose(image, torch.zeros(()), atol=1e-6) for image in normalised)


def found_with(scores: list[float]) -> dict[str, Tensor]:
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0]]).expand(len(scores), -1)
    return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.zeros(len(scores), dtype=torch.int64)}


def unsure(*scores: float) -> float:
    return TASK.uncertainty(found_with([*scores]))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), max_size=30), st.floats(0, 1, width=32))
def test_a_detection_more_or_a_higher_score_never_makes_a_network_less_certain(scores: list[float], more: float) -> None:
    before = unsure(*scores)
    assert 0 <= before <= np.log(2) + 1e-6
    assert unsure(*scores, more) <= before + 1e-6
    assert unsure(*(max(score, more) for score in scores)) <= before + 1e-6
    assert unsure(*scores[::-1]) == pytest.approx(before)


def test_a_network_that_finds_nothing_is_not_certain() -> None:
    blind = np.log(2)
    for low in ((), (0.0,), (0.02, 0.01), (0.4,) * 30, (0.5,)):
        assert unsure(*low) == pytest.approx(blind)
    assert unsure(0.99) < unsure(0.9) < unsure(0.6) < blind
    assert unsure(0.9, 0.8) < unsure(0.9)  # two objects rather than one
    assert unsure(*(1.0,) * 10) == pytest.approx(0)
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert unsure(0.9) == pytest.approx((entropy + 9 * blind) / 10)
