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
    low_A1, high_A1 = _AREAS[:, :1], _AREAS[:, 1:]
    ignored_AG = crowd_G | (areas_G < low_A1) | (areas_G > high_A1)
    outside_AD = (areas_D < low_A1) | (areas_D > high_A1)
    for a, ignored_G in enumerate(ignored_AG):
        np.add.at(found["objects"], (labels_G[~ignored_G], a), 1)
    # without a match, a detection is ignored where its own area is outside of the range
    ignored_ATD = np.repeat(outside_AD[:, None], len(_IOUS_T), axis=1)
    matched_ATD = np.zeros_like(ignored_ATD)
    for label in np.intersect1d(labels_D, labels_G):
        of_D, of_G = np.flatnonzero(labels_D == label), np.flatnonzero(labels_G == label)
        matches, ignored = _match(iou_DG[np.ix_(of_D, of_G)], ignored_AG[:, of_G], crowd_G[of_G])
        matched_ATD[..., of_D] = matches
        ignored_ATD[..., of_D] = np.where(matches, ignored, ignored_ATD[..., of_D])
    for name, bits in (("matched", matched_ATD), ("ignored", ignored_ATD)):
        found[name][: len(order)] = (bits.astype(np.int64) << _BITS[..., None]).sum((0, 1))
    return found


def _match(
    iou_DG: NDArray[np.float64], ignored_AG: NDArray[np.bool_], crowd_G: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of each detection of one class, whether it is matched to an object and whether to an ignored one [A, T, D]. Detections come
    with falling scores. A detection takes the free object with the largest overlap, the last of equal ones, and an ignored one
    only if no other overlaps enough. A crowd is never used up.
    """
    order_AG = np.argsort(ignored_AG, axis=1, kind="stable")  # the ignored ones last, which decides between equal overlaps
    ignored_A1G = np.take_along_axis(ignored_AG, order_AG, axis=1)[:, None]
    crowd_A1G, iou_DA1G = crowd_G[order_AG][:, None], iou_DG[:, order_AG][:, :, None]
    least_T1 = np.minimum(_IOUS_T, 1 - 1e-10)[:, None]
    free_ATG = np.ones((len(_AREAS), len(_IOUS_T), len(crowd_G)), np.bool_)
    matched_ATD, ignored_ATD = (np.zeros((*free_ATG.shape[:2], len(iou_DG)), np.bool_) for _ in range(2))
    last = free_ATG.shape[2] - 1
    for d, iou_A1G in enumerate(iou_DA1G):
        possible_ATG = (iou_A1G >= least_T1) & (free_ATG | crowd_A1G)
        if not possible_ATG.any():
            continue
        counting_ATG = possible_ATG & ~ignored_A1G
        possible_ATG = np.where(counting_ATG.any(2, keepdims=True), counting_ATG, possible_ATG)
        best_AT1 = last - np.argmax(np.where(possible_ATG, iou_A1G, -1.0)[..., ::-1], axis=2)[..., None]
        matched_AT1 = possible_ATG.any(2, keepdims=True)
        matched_ATD[..., d] = matched_AT1[..., 0]
        ignored_ATD[..., d] = np.take_along_axis(np.broadcast_to(ignored_A1G, free_ATG.shape), best_AT1, axis=2)[..., 0]
        np.put_along_axis(free_ATG, best_AT1, np.take_along_axis(free_ATG, best_AT1, axis=2) & ~matched_AT1, axis=2)
    return matched_ATD, ignored_ATD


def average_precision(
    evidence: Mapping[str, NDArray[Any]], weights_RN: NDArray[np.float64], only_all_areas: bool = False
) -> NDArray[np.float64]:
    """The `METRICS` [R, 7] in percent, from the evidence of N images ([N, ...] each). weights_RN: how often each resample has
    each image, whole numbers. As in COCO, a mean is taken over the classes that have objects in the range of area (and over
    thresholds); a metric without objects is 0. only_all_areas: leave those by size at 0, for a quarter of the work.
    """
    times_RN = np.rint(weights_RN)  # whole numbers in float64, whose products of matrices are exact and fast
    labels, scores = evidence["labels"].reshape(-1), evidence["scores"].reshape(-1)
    matched, ignored = (evidence[name].reshape(-1).astype(np.int64) for name in ("matched", "ignored"))
    image = np.repeat(np.arange(times_RN.shape[1]), evidence["labels"].shape[1])
    objects_RKA = np.einsum("rn,nka->rka", times_RN, evidence["objects"].astype(np.float64)).astype(np.int64)
    # sums over classes with objects
    precision_RAT, recall_RAT = (np.zeros((len(times_RN), *_BITS.shape)) for _ in range(2))
    for label in np.flatnonzero(objects_RKA.any((0, 2))):
        of = np.flatnonzero(labels == label)
        of = of[np.argsort(-scores[of], kind="stable")]
        for a in range(1 if only_all_areas else len(_AREAS)):
            for t in range(len(_IOUS_T)):
                kept = of[(ignored[of] >> _BITS[a, t] & 1) == 0]
                right = matched[kept] >> _BITS[a, t] & 1 == 1
                precision, recall = _precision_and_recall(times_RN, image[kept], right, objects_RKA[:, label, a])
                precision_RAT[:, a, t] += precision
                recall_RAT[:, a, t] += recall
    classes_RA1 = np.maximum((objects_RKA > 0).sum(1), 1)[..., None]
    precision_RAT, recall_RAT = 100 * precision_RAT / classes_RA1, 100 * recall_RAT / classes_RA1
    everything, *by_size = precision_RAT.transpose(1, 0, 2)
    columns = [everything.mean(1), everything[:, 0], everything[:, 5], *(sized.mean(1) for sized in by_size)]
    return np.stack([*columns, recall_RAT[:, 0].mean(1)], axis=1)


def _precision_and_recall(
    times_RN: NDArray[np.float64], image_n: NDArray[np.int64], right_n: NDArray[np.bool_], objects_R: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean precision over 101 recalls [R], and the recall of all detections [R], of one class, threshold and range of area. The n
    detections come with falling scores; image: which each is of; right: whether it is matched. 0 where there are no objects.

    Only the m right detections are looked at: behind each of them precision falls until the next, and recall stays.
    """
    rows, (places,) = len(times_RN), np.nonzero(right_n)
    m, there_R, objects_R1 = len(places), objects_R > 0, np.maximum(objects_R, 1)[:, None]
    if m == 0:
        return np.zeros(rows), np.zeros(rows)
    # how many detections each image has between a right one and the one before, and then up to it
    counted = np.searchsorted(places, np.arange(places[-1] + 1))
    counts = np.bincount(image_n[: places[-1] + 1] * m + counted, minlength=times_RN.shape[1] * m)
    all_Rm = times_RN @ np.cumsum(counts.reshape(-1, m), axis=1).astype(np.float64)
    right_Rm = np.cumsum(times_RN[:, image_n[places]], axis=1)
    precision_Rm = right_Rm / (all_Rm + np.spacing(1))
    precision_Rm = np.maximum.accumulate(precision_Rm[:, ::-1], axis=1)[:, ::-1]
    # the first detection at which a recall is reached: compared as whole numbers, so that rows can be searched together
    needed = np.maximum(np.floor(_RECALLS * objects_R1).astype(np.int64) - 1, 0)
    while (short := needed / objects_R1 < _RECALLS).any():
        needed += short
    apart = np.arange(rows)[:, None] * (max(int(right_Rm[:, -1].max()), int(needed.max())) + 1)
    first = np.searchsorted((right_Rm + apart).reshape(-1), (needed + apart).reshape(-1)).reshape(rows, -1)
    first -= np.arange(rows)[:, None] * m
    reached = first < m
    precision = np.where(reached, np.take_along_axis(precision_Rm, np.minimum(first, m - 1), axis=1), 0.0)
    return there_R * precision.mean(1), there_R * right_Rm[:, -1] / objects_R1[:, 0]
