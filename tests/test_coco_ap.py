"""Average precision against pycocotools: of all images, of resampled ones, with crowds, ties, and classes without objects."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gearnn_ray.tasks.coco_ap import METRICS, MOST_DETECTIONS, average_precision, box_areas, box_iou, image_evidence

CLASSES = 3
ORACLE = (0, 1, 2, 3, 4, 5, 8)  # places of our metrics in pycocotools' summary


@dataclass
class Picture:
    """Objects of one image (boxes, classes, areas, crowds) and what a detector found (boxes, classes, scores)."""

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    found: NDArray[np.float64]
    found_labels: NDArray[np.int64]
    scores: NDArray[np.float32]

    @property
    def evidence(self) -> dict[str, NDArray[Any]]:
        iou = box_iou(self.found, self.boxes, self.crowd)
        areas = box_areas(self.found)
        return image_evidence(
            iou, self.scores, self.found_labels, areas, self.labels, self.areas, self.crowd, num_classes=CLASSES
        )


def picture(seed: int, objects: int, detections: int, side: float = 200, empty_class: bool = False) -> Picture:
    """Detections lie on objects, beside them, or anywhere; many scores and some boxes are equal."""
    rng = np.random.default_rng(seed)
    size = rng.choice([8.0, 20.0, 50.0, 120.0], (objects, 2))
    corner = np.round(rng.uniform(0, side - 10, (objects, 2)))
    boxes = np.concatenate([corner, corner + size], 1)
    labels = rng.integers(0, CLASSES - empty_class, objects)
    at = rng.integers(0, max(objects, 1), detections) if objects else np.zeros(detections, np.int64)
    shift = rng.choice([0.0, 1.0, 3.0, 40.0], (detections, 4), p=[0.4, 0.3, 0.2, 0.1])
    near = boxes[at] + shift if objects else np.tile([0.0, 0.0, 30.0, 30.0], (detections, 1)) + shift
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    same = rng.random(detections) < 0.8
    found_labels = np.where(same & (objects > 0), labels[at] if objects else 0, rng.integers(0, CLASSES, detections))
    scores = (rng.integers(1, 8, detections) / 8).astype(np.float32)
    crowd = rng.random(objects) < 0.2
    areas = box_areas(boxes) * rng.uniform(0.5, 1, objects)
    return Picture(boxes, labels, areas, crowd, near, found_labels, scores)


def pycocotools(pictures: list[Picture]) -> NDArray[np.float64]:
    """The same metrics by pycocotools, in percent; -1 where there are no objects."""
    annotations = [
        {
            "id": number, "image_id": image, "category_id": int(one.labels[g]), "iscrowd": int(one.crowd[g]),
            "bbox": [*one.boxes[g, :2], *(one.boxes[g, 2:] - one.boxes[g, :2])], "area": float(one.areas[g]),
        }
        for number, (image, one, g) in enumerate(
            ((i, p, g) for i, p in enumerate(pictures) for g in range(len(p.labels))), 1
        )
    ]  # fmt: skip
    results = [
        {
            "image_id": image, "category_id": int(one.found_labels[d]), "score": float(one.scores[d]),
            "bbox": [*one.found[d, :2], *(one.found[d, 2:] - one.found[d, :2])],
        }
        for image, one in enumerate(pictures)
        for d in range(len(one.scores))
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(pictures))], "annotations": annotations,
            "categories": [{"id": k} for k in range(CLASSES)],
        }  # fmt: skip
        truth.createIndex()
        loaded = COCO()
        loaded.dataset = {**truth.dataset, "annotations": []}
        for number, result in enumerate(results, 1):
            area = result["bbox"][2] * result["bbox"][3]
            loaded.dataset["annotations"].append({**result, "id": number, "area": area, "iscrowd": 0})
        loaded.createIndex()
        judged = COCOeval(truth, loaded, "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return np.array([100 * judged.stats[place] if judged.stats[place] >= 0 else -1 for place in ORACLE])


def metrics(pictures: list[Picture], weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    every = [one.evidence for one in pictures]
    evidence = {name: np.stack([each[name] for each in every]) for name in every[0]}
    return average_precision(evidence, np.ones((1, len(pictures))) if weights is None else weights)


def assert_equal(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(ours, np.maximum(theirs, 0), rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 6), objects=st.integers(0, 9), detections=st.integers(0, 30))
def test_it_is_pycocotools(seed: int, images: int, objects: int, detections: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, [objects + 1, detections + 1], (images, 2))
    pictures = [picture(seed + i, int(g), int(d), empty_class=seed % 2 == 0) for i, (g, d) in enumerate(counts)]
    assert_equal(metrics(pictures)[0], pycocotools(pictures))


def test_many_images_and_resampled_ones() -> None:
    """A resample is judged as if its images had been judged, each as often as it was drawn. (Within an image no scores are equal
    here: pycocotools would take turns between the copies of an image.)
    """
    pictures = [picture(seed, seed % 12, 20 + seed % 30) for seed in range(40)]
    for seed, one in enumerate(pictures):
        one.scores = np.random.default_rng(seed).permutation(len(one.scores)).astype(np.float32) / 64
    assert_equal(metrics(pictures)[0], pycocotools(pictures))
    drawn = np.random.default_rng(5).integers(0, len(pictures), (6, len(pictures)))
    weights = np.stack([np.bincount(row, minlength=len(pictures)) for row in drawn]).astype(float)
    for ours, row in zip(metrics(pictures, weights), drawn, strict=True):
        assert_equal(ours, pycocotools([pictures[i] for i in np.sort(row)]))
    alone = metrics(pictures[:5], np.eye(5))
    for ours, one in zip(alone, pictures, strict=False):
        assert_equal(ours, pycocotools([one]))


def test_recalls_on_the_very_thresholds() -> None:
    """With 100 objects every recall is a multiple of 0.01, where the least rounding would move a step."""
    boxes = np.array([[20.0 * (i % 10), 20.0 * (i // 10), 20.0 * (i % 10) + 10, 20.0 * (i // 10) + 10] for i in range(100)])
    for right in (29, 57, 58, 100):
        found = boxes.copy()
        found[right:] += 500
        one = Picture(
            boxes, np.zeros(100, np.int64), box_areas(boxes), np.zeros(100, np.bool_), found, np.zeros(100, np.int64),
            np.linspace(1, 0.1, 100, dtype=np.float32),
        )  # fmt: skip
        assert_equal(metrics([one])[0], pycocotools([one]))


def test_the_best_hundred_detections_count() -> None:
    """As many as torchvision's detectors return; pycocotools counts as many of each class."""
    one = picture(3, 9, MOST_DETECTIONS + 40)
    best = np.argsort(-one.scores, kind="stable")[:MOST_DETECTIONS]
    fewer = Picture(one.boxes, one.labels, one.areas, one.crowd, one.found[best], one.found_labels[best], one.scores[best])
    assert_equal(metrics([one])[0], pycocotools([fewer]))


@pytest.mark.parametrize("detections", [0, 5])
def test_without_any_object_every_metric_is_zero(detections: int) -> None:
    one = picture(0, 0, detections)
    assert metrics([one]).tolist() == [[0.0] * len(METRICS)]
