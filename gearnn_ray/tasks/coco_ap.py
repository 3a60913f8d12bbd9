"""COCO's average precision and recall, in two steps: what one image says (`image_evidence`), and what many images say together.

The first step matches detections to objects as pycocotools does. Its result is small and has one shape for all images, so it can
be stored; every metric, also of resampled images, is computed from it. Letters of shapes: D detections of one image, G its
objects, K classes, T = 10 thresholds of the intersection over union, A = 4 ranges of area, N images, R weightings of the images.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["METRICS", "MOST_DETECTIONS", "average_precision", "box_areas", "box_iou", "image_evidence"]

METRICS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AR")
MOST_DETECTIONS = 100  # of one image that count, those with the highest scores

_IOUS_T = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
# pixels of an object: all, small, medium and large, both ends inside
_AREAS = np.array([(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)])
_BITS = np.arange(len(_AREAS) * len(_IOUS_T)).reshape(len(_AREAS), len(_IOUS_T))  # [A, T] places in `matched` and `ignored`


def box_areas(boxes_N4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Areas [N] of boxes (left, top, right, bottom)."""
    areas: NDArray[np.float64] = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    return areas


def box_iou(boxes_D4: NDArray[np.float64], boxes_G4: NDArray[np.float64], crowd_G: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Intersection over union [D, G] of boxes (left, top, right, bottom); of a crowd, the intersection over the detection."""
    corner = np.maximum(boxes_D4[:, None, :2], boxes_G4[None, :, :2])
    other = np.minimum(boxes_D4[:, None, 2:], boxes_G4[None, :, 2:])
    inside_DG = np.clip(other - corner, 0, None).prod(-1)
    areas_D1, areas_G = box_areas(boxes_D4)[:, None], box_areas(boxes_G4)
    union_DG = np.where(crowd_G, areas_D1, areas_D1 + areas_G - inside_DG)
    iou: NDArray[np.float64] = np.divide(inside_DG, union_DG, out=np.zeros_like(inside_DG), where=union_DG > 0)
    return iou


def image_evidence(
    iou_DG: NDArray[np.float64],
    scores_D: NDArray[np.float32],
    labels_D: NDArray[np.int64],
    areas_D: NDArray[np.float64],
    labels_G: NDArray[np.int64],
    areas_G: NDArray[np.float64],
    crowd_G: NDArray[np.bool_],
    num_classes: int,
) -> dict[str, NDArray[Any]]:
    """What one image contributes to the metrics, of its `MOST_DETECTIONS` detections with the highest scores.

    scores: float32 [100]. labels: int16 [100], -1 where there is no detection. matched, ignored: int64 [100], a bit for each
    range of area and threshold. objects: int32 [K, 4], those that a detector should find, by class and range of area.
    """
    order = np.argsort(-scores_D, kind="stable")[:MOST_DETECTIONS]
    iou_DG, labels_D, areas_D = iou_DG[order], labels_D[order], areas_D[order]
    found: dict[str, NDArray[Any]] = {
        "scores": np.zeros(MOST_DETECTIONS, np.float32),
        "labels": np.full(MOST_DETECTIONS, -1, np.int16),
        "matched": np.zeros(MOST_DETECTIONS, np.int64),
        "ignored": np.zeros(MOST_DETECTIONS, np.int64),
        "objects": np.zeros((num_classes, len(_AREAS)), np.int32),
    }
    found["scores"][: len(order)], found["labels"][: len(order)] = scores_D[order], labels_D
    for a, (low, high) in enumerate(_AREAS):
        ignored_G = crowd_G | (areas_G < low) | (areas_G > high)
        np.add.at(found["objects"], (labels_G[~ignored_G], a), 1)
        outside_D = (areas_D < low) | (areas_D > high)
        for label in np.unique(labels_D):
            of_D, of_G = np.flatnonzero(labels_D == label), np.flatnonzero(labels_G == label)
            of_G = of_G[np.argsort(ignored_G[of_G], kind="stable")]
            for t, threshold in enumerate(_IOUS_T):
                matches = _match(iou_DG[np.ix_(of_D, of_G)], ignored_G[of_G], crowd_G[of_G], threshold)
                matched = matches >= 0
                ignored = np.where(matched, ignored_G[of_G][matches], outside_D[of_D]) if len(of_G) else outside_D[of_D]
                found["matched"][of_D] |= matched.astype(np.int64) << _BITS[a, t]
                found["ignored"][of_D] |= ignored.astype(np.int64) << _BITS[a, t]
    return found


def _match(
    iou_DG: NDArray[np.float64], ignored_G: NDArray[np.bool_], crowd_G: NDArray[np.bool_], threshold: float
) -> NDArray[np.int64]:
    """The object [D] that each detection of one class is matched to, -1 for none. Detections come with falling scores, objects
    with the ignored ones last. A detection takes the free object with the largest overlap, the last of equal ones, and an
    ignored one only if no other overlaps enough. A crowd is never used up.
    """
    free_G = np.ones(len(ignored_G), np.bool_)
    matches_D = np.full(len(iou_DG), -1, np.int64)
    least = min(threshold, 1 - 1e-10)
    for d, iou_G in enumerate(iou_DG):
        possible_G = (iou_G >= least) & (free_G | crowd_G)
        if (possible_G & ~ignored_G).any():
            possible_G &= ~ignored_G
        if possible_G.any():
            best = np.where(possible_G, iou_G, -1.0)
            matches_D[d] = len(best) - 1 - int(np.argmax(best[::-1]))
            free_G[matches_D[d]] = False
    return matches_D


def average_precision(evidence: Mapping[str, NDArray[Any]], weights_RN: NDArray[np.float64]) -> NDArray[np.float64]:
    """The `METRICS` [R, 7] in percent, from the evidence of N images ([N, ...] each). weights_RN: how often each resample has
    each image, whole numbers. As in COCO, a mean is taken over the classes that have objects in the range of area (and over
    thresholds); a metric without objects is 0.
    """
    times_RN = weights_RN.astype(np.int64)
    labels, scores = evidence["labels"].reshape(-1), evidence["scores"].reshape(-1)
    matched, ignored = (evidence[name].reshape(-1).astype(np.int64) for name in ("matched", "ignored"))
    image = np.repeat(np.arange(times_RN.shape[1]), evidence["labels"].shape[1])
    objects_RKA = np.einsum("rn,nka->rka", times_RN, evidence["objects"].astype(np.int64))
    # sums over classes with objects
    precision_RAT, recall_RAT = (np.zeros((len(times_RN), *_BITS.shape)) for _ in range(2))
    for label in np.flatnonzero(objects_RKA.any((0, 2))):
        of = np.flatnonzero(labels == label)
        of = of[np.argsort(-scores[of], kind="stable")]
        times_Rn = times_RN[:, image[of]]
        for a in range(len(_AREAS)):
            for t in range(len(_IOUS_T)):
                kept = (ignored[of] >> _BITS[a, t] & 1) == 0
                right = matched[of[kept]] >> _BITS[a, t] & 1
                precision, recall = _precision_and_recall(times_Rn[:, kept], right, objects_RKA[:, label, a])
                precision_RAT[:, a, t] += precision
                recall_RAT[:, a, t] += recall
    classes_RA1 = np.maximum((objects_RKA > 0).sum(1), 1)[..., None]
    precision_RAT, recall_RAT = 100 * precision_RAT / classes_RA1, 100 * recall_RAT / classes_RA1
    everything, *by_size = precision_RAT.transpose(1, 0, 2)
    columns = [everything.mean(1), everything[:, 0], everything[:, 5], *(sized.mean(1) for sized in by_size)]
    return np.stack([*columns, recall_RAT[:, 0].mean(1)], axis=1)


def _precision_and_recall(
    times_Rn: NDArray[np.int64], right_n: NDArray[np.int64], objects_R: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean precision over 101 recalls [R], and the recall of all detections [R], of one class, threshold and range of area. The n
    detections come with falling scores; right: 1 where one is matched. 0 where there are no objects.
    """
    rows, n = times_Rn.shape
    there_R, objects_R1 = objects_R > 0, np.maximum(objects_R, 1)[:, None]
    if n == 0:
        return np.zeros(rows), np.zeros(rows)
    right_Rn, all_Rn = np.cumsum(times_Rn * right_n, axis=1), np.cumsum(times_Rn, axis=1)
    precision_Rn = right_Rn / (all_Rn + np.spacing(1))
    precision_Rn = np.maximum.accumulate(precision_Rn[:, ::-1], axis=1)[:, ::-1]
    # the first detection at which a recall is reached: compared as whole numbers, so that rows can be searched together
    needed = np.maximum(np.floor(_RECALLS * objects_R1).astype(np.int64) - 1, 0)
    while (short := needed / objects_R1 < _RECALLS).any():
        needed += short
    apart = np.arange(rows)[:, None] * (max(int(right_Rn[:, -1].max()), int(needed.max())) + 1)
    first = np.searchsorted((right_Rn + apart).reshape(-1), (needed + apart).reshape(-1)).reshape(rows, -1)
    first -= np.arange(rows)[:, None] * n
    reached = first < n
    precision = np.where(reached, np.take_along_axis(precision_Rn, np.minimum(first, n - 1), axis=1), 0.0)
    return there_R * precision.mean(1), there_R * right_Rn[:, -1] / objects_R1[:, 0]
