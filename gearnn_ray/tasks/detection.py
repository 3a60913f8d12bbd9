"""Object detection and instance segmentation: whole images or crops, flips, the network's own loss, COCO's average precision.

Networks follow `models.detector`. Targets are `data.objects.Objects`. A prediction is a mapping of one image: `boxes` float32
[D, 4] (left, top, right, bottom in pixels of that image), `scores` float32 [D], `labels` int64 [D], and `masks` bool [D, H, W] of
a network that has them. Letters of shapes: B images, D detections, G objects, N images of a data set, R resamples.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pycocotools import mask as coco_masks
from torch import Tensor, nn

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.objects import Objects, boxes_of, rle_of
from gearnn_ray.models.detector import collected_candidates, teacher_of
from gearnn_ray.tasks import coco_ap, pictures
from gearnn_ray.tasks.base import Batch, Forward, Image, LossTerm, Served, Window, tensors_of

_LEAST_SEEN = 0.3  # share of a box inside the crop below which an object is neither to be found nor an error
_SURE, _UNSURE = 0.5, 0.2  # scores of a network's own answers: from the one on they are targets, between both they do not count
_STEEPNESS = 20.0  # of σ(20 (score − 0.5)), a count of the scores above one half that has a gradient (OneAdapt, Section 4.1)
_MASK = 0.5  # probability from which on a pixel belongs to an object
_SAME = 0.95  # share of the detections that two equal networks have in common
_JUDGED_PLACES = 10  # whose entropies are a network's uncertainty; an image of COCO has 7 objects on average
_PARTS = {"boxes", "scores", "labels"}
_JSON, _PNG = "application/json", "image/png"
_LEAST_SCORE = {_JSON: 0.05, _PNG: 0.3}  # of what an answer has, unless the client says otherwise
_OF_MASKS = "mask_"  # begins the names of the masks' evidence

Prediction = Mapping[str, Tensor]


class Detection:
    """The task `detection`, with masks where network and data set have them."""

    name = "detection"
    version = 1
    metrics: tuple[str, ...] = (*coco_ap.METRICS, *(f"mask {metric}" for metric in coco_ap.METRICS))
    shown: tuple[str, ...] = ("AP", "AP50", "mask AP", "mask AP50")
    has_stability = False
    stored_as = "objects"
    media_types: tuple[str, ...] = (_JSON, _PNG)
    exported: tuple[str, ...] = ("boxes", "scores", "labels")

    def check(self, image: Image, target: Objects, num_classes: int, where: str) -> None:
        """Raise UserError unless the objects are of this image and of these classes."""
        if target.size != image.shape[:2]:
            found, expected = (f"{width}x{height}" for height, width in (target.size, image.shape[:2]))
            raise UserError(
                f"{where} has objects of an image of {found} and {expected} pixels: give every image its own objects."
            )
        if len(target) and not 0 <= target.labels.min() <= target.labels.max() < num_classes:
            raise UserError(f"{where} has the class id {target.labels.max()}, expected 0 to {num_classes - 1}: correct it.")

    def store(self, target: Objects) -> NDArray[np.uint8]:
        """The objects as one row of bytes."""
        return np.frombuffer(target.to_bytes(), np.uint8)[None]

    def restore(self, stored: NDArray[np.uint8]) -> Objects:
        """The objects in a row of bytes."""
        return Objects.from_bytes(stored.tobytes())

    def crop_size(self, shapes: Sequence[tuple[int, ...]], crop: int) -> tuple[int, int]:
        """`crop`; a smaller image is used whole, because detectors take images of different sizes."""
        return crop, crop

    def augment(self, image: Image, target: Objects, crop: tuple[int, int], draws: NDArray[np.float64]) -> tuple[Image, Objects]:
        """A random window of `crop` (height, width), or the whole of a smaller side, flipped horizontally half the time. An
        object of which the window shows less than 30% becomes a crowd. Objects of another image size are scaled to the image's.
        """
        height, width = image.shape[:2]
        target, window = _scaled(target, height, width), Window.drawn(image.shape, crop, draws)
        if (window.height, window.width) != (height, width):
            target = _window(target, window.top, window.left, window.height, window.width)
        return window.of(image), _flipped(target) if window.mirrored else target

    def collate(self, samples: Sequence[tuple[Image, Objects]]) -> Batch:
        """uint8 x_BCHW where the images have one size, else a list; the targets as `models.detector.Target`."""
        return Batch(tensors_of([image for image, _ in samples]), _Targets(_tensors(target) for _, target in samples))

    def losses(self, forward: Forward, batch: Batch) -> dict[str, LossTerm]:
        """The network's own terms. A plain number, as torchvision's own detectors return it, counts as one item."""
        lesson = batch.lesson
        targets = list(batch.targets) if lesson is None or lesson.with_labels else None
        found = forward(batch.images, targets, *(() if lesson is None else (lesson,)))
        if not isinstance(found, dict) or not found:
            raise UserError(
                f"the network returned a {type(found).__name__} for images with targets: expected its losses by name, so see "
                "gearnn_ray.models.detector for what a detector is called with"
            )
        terms = {name: term if isinstance(term, tuple) else (term, torch.ones_like(term)) for name, term in found.items()}
        return {name: LossTerm(total, count.detach()) for name, (total, count) in terms.items()}

    def teacher(self, network: nn.Module) -> Callable[..., Any]:
        """The dense answers of a detector (`models.detector.teacher_of`)."""
        return teacher_of(network)

    def answers(self, teacher: Forward, batch: Batch) -> Any:
        """The detector's raw tensors for the undistorted images, of whatever size these are."""
        return teacher(batch.undistorted)

    def stability_losses(self, forward: Forward, batch: Batch, perturbed_BCHW: Tensor, alpha: float) -> dict[str, LossTerm]:
        """Not defined: two answers have no objects in common that a distance could be taken of."""
        raise NotImplementedError

    def outputs(self, raw: Any) -> list[dict[str, Tensor]]:
        """The predictions of the images, highest scores first; empty places are dropped."""
        return [_prediction(each) for each in _found(raw)]

    def tensors(self, raw: Any) -> tuple[Tensor, ...]:
        """Boxes [B, D, 4], scores [B, D] and labels [B, D] of a network that finds D in every image, empty places included."""
        if not isinstance(raw, dict):
            raise UserError(
                "the network returns a list with the detections of each image, and a graph needs tensors of fixed shape: use "
                ".safetensors, or a single-stage detector (see gearnn_ray.models.detector)"
            )
        return raw["boxes"].float(), raw["scores"].float(), raw["labels"]

    def at_frame_size(self, outputs: Any, height: int, width: int, seen: tuple[int, int] | None = None) -> Any:
        """Boxes and masks in pixels of the frame; they are those of the images that the network saw."""
        if seen is None or tuple(seen) == (height, width):
            return outputs
        return [_at_size(each, height, width, seen) for each in outputs]

    def evidence(self, prediction: Prediction, target: Objects, size: tuple[int, int], num_classes: int) -> dict[str, Tensor]:
        """`coco_ap.image_evidence` of the boxes, and under names that begin with `mask` that of the masks."""
        order = torch.argsort(prediction["scores"], descending=True, stable=True)[: coco_ap.MOST_DETECTIONS]
        chosen = {name: part[order].cpu() for name, part in prediction.items()}
        (height, width), scores, labels = target.size, chosen["scores"].numpy(), chosen["labels"].numpy()
        areas_G, crowd_G = target.areas.astype(np.float64), target.crowd
        boxes = chosen["boxes"].numpy().astype(np.float64) * np.array([width / size[1], height / size[0]] * 2)

        def judged(iou_DG: NDArray[np.float64], areas_D: NDArray[np.float64], prefix: str) -> dict[str, Tensor]:
            found = coco_ap.image_evidence(iou_DG, scores, labels, areas_D, target.labels, areas_G, crowd_G, num_classes)
            return {f"{prefix}{name}": torch.from_numpy(array) for name, array in found.items()}

        evidence = judged(coco_ap.box_iou(boxes, target.boxes.astype(np.float64), crowd_G), coco_ap.box_areas(boxes), "")
        if "masks" in chosen and target.rles is not None:
            both = (_rles(chosen, height, width), target.rles)
            rles_D, rles_G = ([{"size": [height, width], "counts": counts} for counts in each] for each in both)
            # pycocotools returns an empty list where one side is empty
            ious = coco_masks.iou(rles_D, rles_G, crowd_G.tolist()) if rles_D and rles_G else np.zeros((len(rles_D), len(rles_G)))
            evidence |= judged(np.asarray(ious), np.array([coco_masks.area(rle) for rle in rles_D], np.float64), _OF_MASKS)
        return evidence

    def aggregate(self, evidence: Mapping[str, Tensor], weights_RN: NDArray[np.float64]) -> NDArray[np.float64]:
        """`coco_ap.METRICS` of the boxes [R, 7], with masks also of these [R, 14]."""
        arrays = {name: tensor.numpy() for name, tensor in evidence.items()}
        of_masks = {name.removeprefix(_OF_MASKS): array for name, array in arrays.items() if name.startswith(_OF_MASKS)}
        of_boxes = {name: array for name, array in arrays.items() if not name.startswith(_OF_MASKS)}
        return np.hstack([coco_ap.average_precision(each, weights_RN) for each in (of_boxes, of_masks) if each])

    def first_metric(self, evidence: Mapping[str, Tensor], weights_RN: NDArray[np.float64]) -> NDArray[np.float64]:
        """AP of the boxes [R]."""
        arrays = {name: evidence[name].numpy() for name in ("scores", "labels", "matched", "ignored", "objects")}
        return coco_ap.average_precision(arrays, weights_RN, only_all_areas=True)[:, 0]

    def target_summary(self, evidence: Mapping[str, Tensor]) -> NDArray[np.int64]:
        """Objects by image, class and range of area [N, K, 4]."""
        objects: NDArray[np.int64] = evidence["objects"].numpy().astype(np.int64)
        return objects

    def utility(self, forward: Forward, images_BCHW: Tensor, classes: Collection[int] = ()) -> Tensor:
        """Σ σ(20 (score − 0.5)) over the candidates (`collected_candidates`): how many objects are sure. Of a detector that has
        none, what it found counts.
        """
        wanted = sorted(classes)
        with collected_candidates() as candidates:
            found = _found(forward(images_BCHW))
        if candidates:
            scores = [each[..., wanted] if wanted else each for each in candidates]
        else:
            scores = [each["scores"][_is_one_of(each["labels"], wanted)] if wanted else each["scores"] for each in found]
        return torch.stack([torch.sigmoid(_STEEPNESS * (each.float() - 0.5)).sum() for each in scores]).sum()

    def target_of(self, prediction: Prediction, size: tuple[int, int]) -> Objects:
        """The objects with a score of 0.5 and more. Those from 0.2 on are regions where a detection is not judged."""
        likely = prediction["scores"] >= _UNSURE
        found = {name: part[likely].cpu().numpy() for name, part in prediction.items()}
        boxes, masks = found["boxes"].astype(np.float32), found.get("masks")
        areas = coco_ap.box_areas(boxes.astype(np.float64)) if masks is None else masks.sum((1, 2))
        return Objects(
            boxes, found["labels"].astype(np.int64), areas.astype(np.float32), found["scores"] < _SURE, size,
            None if masks is None else tuple(map(rle_of, masks)),
        )  # fmt: skip

    def of_classes(self, evidence: Mapping[str, Tensor], classes: Collection[int]) -> dict[str, Tensor]:
        """The evidence without objects of other classes, because metrics are means over the classes that have objects."""
        found = dict(evidence)
        for name in ("objects", f"{_OF_MASKS}objects"):
            if name in found:
                others = [label for label in range(len(found[name])) if label not in classes]
                found[name] = found[name].index_fill(0, torch.tensor(others, dtype=torch.int64), 0)
        return found

    def uncertainty(self, prediction: Prediction) -> float:
        """The mean entropy of "is there an object" over ten places, those of the highest scores, 0 to ln 2.

        A score below 1/2, or no detection at all, counts as 1/2, the most uncertain: the scores of a network that a distortion
        has blinded are all near 0, where their entropy would be that of a network that is sure. So a network is the more certain
        the more objects it finds, and the higher their scores are.
        """
        best = prediction["scores"].sort(descending=True).values[:_JUDGED_PLACES].clamp(0.5, 1.0)
        entropies = torch.special.entr(best) + torch.special.entr(1 - best)
        return (float(entropies.sum()) + math.log(2) * (_JUDGED_PLACES - len(best))) / _JUDGED_PLACES

    def answer(self, prediction: Prediction) -> dict[str, NDArray[Any]]:
        """The prediction as arrays."""
        return {name: part.cpu().numpy() for name, part in prediction.items()}

    def content(self, prediction: Prediction, media_type: str) -> dict[str, NDArray[Any]]:
        """The answer, whatever the type."""
        return self.answer(prediction)

    def answer_bytes(self, media_type: str, num_classes: int, height: int, width: int) -> int:
        """The picture on which detections are drawn; none for JSON."""
        return 3 * height * width if media_type == _PNG else 0

    def described(self, answer: Mapping[str, NDArray[Any]], served: Served) -> dict[str, object]:
        """`detections`: entries of COCO's result files, of which the client wants the score, by default 0.05."""
        found, names = _wanted(answer, served, _LEAST_SCORE[_JSON])
        return {"detections": _coco_results(found, names)}

    def drawn(self, answer: Mapping[str, NDArray[Any]], served: Served, scale: int = 1) -> Image:
        """Masks, boxes, and at each its class and score; by default of those with a score of 0.3 and more."""
        found, names = _wanted(answer, served, _LEAST_SCORE[_PNG])
        texts = [f"{name} {score:.2f}" for name, score in zip(names, found["scores"], strict=True)]
        masks = found.get("masks")
        return pictures.drawn(
            pictures.enlarged(served.frame, scale), scale * found["boxes"], texts, found["labels"],
            None if masks is None else pictures.enlarged(masks.transpose(1, 2, 0), scale).transpose(2, 0, 1),
        )  # fmt: skip

    def encode(self, content: Mapping[str, NDArray[Any]], media_type: str, served: Served) -> bytes:
        """JSON with COCO's fields, or the frame with the detections drawn: the `coco_ap.MOST_DETECTIONS` with the highest scores,
        from the client's least score on, or from 0.05 in JSON and 0.3 in a picture.
        """
        if media_type == _PNG:
            return pictures.png(self.drawn(content, served))
        height, width = served.frame.shape[:2]
        answer = {"image": {"width": width, "height": height}, **served.facts, **self.described(content, served)}
        return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()

    def close(self, a: Sequence[Prediction], b: Sequence[Prediction]) -> bool:
        """Whether every image has the same detections, to a thousandth of its highest score and of a box's position. Images in
        which `b` finds nothing show nothing, so they are not close to any.
        """
        return all(len(y["scores"]) and _has_all(x, y) and _has_all(y, x) for x, y in zip(a, b, strict=True))


class _Targets(list[dict[str, Tensor]]):
    """The targets of a batch."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "_Targets":
        return _Targets({name: part.to(device, non_blocking=non_blocking) for name, part in each.items()} for each in self)


def _tensors(target: Objects) -> dict[str, Tensor]:
    """The objects as `models.detector.Target`."""
    boxes, crowd = torch.from_numpy(target.boxes), torch.from_numpy(target.crowd)
    tensors = {"boxes": boxes[~crowd], "labels": torch.from_numpy(target.labels)[~crowd], "crowd": boxes[crowd]}
    return tensors if target.rles is None else tensors | {"masks": torch.from_numpy(target.masks())[~crowd]}


def _found(raw: Any) -> list[dict[str, Tensor]]:
    """What a network found in each image (`models.detector.Found`). Raises UserError if it returned anything else."""
    if isinstance(raw, dict):
        raw = [dict(zip(raw, parts, strict=True)) for parts in zip(*raw.values(), strict=True)]
    if not isinstance(raw, list) or not all(isinstance(each, dict) and each.keys() >= _PARTS for each in raw):
        raise UserError(
            f"the network returned a {type(raw).__name__}: expected boxes, scores and labels of each image, so a network of "
            "raw tensors needs a decoder (see gearnn_ray.models.detector)"
        )
    return raw


def _is_one_of(labels: Tensor, wanted: Sequence[int]) -> Tensor:
    return torch.isin(labels, labels.new_tensor(wanted))


def _prediction(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was found in one image (`models.detector.Found`) as a prediction."""
    # in a graph, shapes do not depend on values: there, empty places stay, behind all others
    there = slice(None) if torch.compiler.is_compiling() else found["scores"] > 0
    order = torch.argsort(found["scores"].detach()[there], descending=True, stable=True)
    chosen = {name: found[name][there][order] for name in ("boxes", "scores", "labels", "masks") if name in found}
    if "masks" in chosen and chosen["masks"].is_floating_point():
        chosen["masks"] = (chosen["masks"] > _MASK).flatten(0, -3)  # torchvision's have a channel
    return {**chosen, "boxes": chosen["boxes"].float(), "scores": chosen["scores"].float()}


def _at_size(found: Prediction, height: int, width: int, seen: tuple[int, int]) -> dict[str, Tensor]:
    """What was found in an image of the size `seen`, in pixels of the same image at another size."""
    scaled = {**found, "boxes": found["boxes"] * found["boxes"].new_tensor([width / seen[1], height / seen[0]] * 2)}
    return scaled if "masks" not in found else scaled | {"masks": _resized(found["masks"], height, width)}


def _resized(masks: Tensor, height: int, width: int) -> Tensor:
    """Masks bool [D, h, w] at another size [D, height, width], by nearest neighbour (pixel centres)."""
    if masks.shape[-2:] == (height, width):
        return masks
    if not len(masks):
        return masks.new_zeros(0, height, width)
    return F.interpolate(masks[None].float(), size=(height, width), mode="nearest-exact")[0] > 0


def _wanted(answer: Mapping[str, NDArray[Any]], served: Served, default: float) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The detections that the client wants, the best ones only, and the names of their classes."""
    enough = answer["scores"] >= (default if served.least_score is None else served.least_score)
    found = {name: part[enough][: coco_ap.MOST_DETECTIONS] for name, part in answer.items()}
    return found, [_class_name(served.class_names, label) for label in found["labels"].tolist()]


def _class_name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"


def _coco_results(found: Mapping[str, NDArray[Any]], names: Sequence[str]) -> list[dict[str, object]]:
    """Detections as entries of COCO's result files, with the class's name beside its id."""
    corners_D4 = found["boxes"].astype(np.float64)  # in which a difference of two float32 is exact enough to be added again
    boxes_D4 = np.hstack([corners_D4[:, :2], corners_D4[:, 2:] - corners_D4[:, :2]])
    columns = zip(found["labels"].tolist(), names, boxes_D4.tolist(), found["scores"].tolist(), strict=True)
    results: list[dict[str, object]] = [
        {"category_id": label, "category": name, "bbox": box, "score": score} for label, name, box, score in columns
    ]
    for result, mask in zip(results, found.get("masks", ()), strict=False):
        result["segmentation"] = {"size": list(mask.shape), "counts": rle_of(mask).decode("ascii")}
    return results


def _rles(prediction: Prediction, height: int, width: int) -> list[bytes]:
    """The masks of a prediction in an image of this size."""
    return [rle_of(mask) for mask in _resized(prediction["masks"], height, width).numpy()]


def _has_all(a: Prediction, b: Prediction) -> bool:
    """Whether `b` has the detections of `a`, but for those at the end, which may fall out of either, and a few that suppression
    of overlapping boxes decides by the last bit of a score.
    """
    if not len(a["scores"]):
        return True
    most = float(a["scores"].max())
    sure = a["scores"] > a["scores"].min() + 1e-3 * most
    if not len(b["scores"]):
        return not bool(sure.any())
    size = float(a["boxes"].abs().max())
    near = (a["scores"][:, None] - b["scores"]).abs() <= 1e-3 * most
    near &= a["labels"][:, None] == b["labels"]
    near &= (a["boxes"][:, None] - b["boxes"]).abs().amax(2) <= 1e-3 * size
    if not bool(sure.any()):  # all scores are about equal, so that none is at the end
        sure[:] = True
    return bool(near.any(1)[sure].float().mean() >= _SAME)


def _scaled(target: Objects, height: int, width: int) -> Objects:
    """Objects in an image of another size: that of a level whose frames are smaller."""
    if target.size == (height, width):
        return target
    down, across = height / target.size[0], width / target.size[1]
    boxes = target.boxes * np.array([across, down, across, down], np.float32)
    rles = None
    if target.rles is not None:
        rows = ((np.arange(height) + 0.5) / down).astype(np.int64)
        columns = ((np.arange(width) + 0.5) / across).astype(np.int64)
        rles = tuple(rle_of(mask[rows[:, None], columns]) for mask in target.masks())
    return replace(target, boxes=boxes, areas=target.areas * np.float32(down * across), size=(height, width), rles=rles)


def _window(target: Objects, top: int, left: int, height: int, width: int) -> Objects:
    """The objects in a window of their image: those of which nothing is seen are left out."""
    boxes = target.boxes - np.array([left, top, left, top], np.float32)
    inside = boxes.clip(0, np.array([width, height, width, height], np.float32))
    masks = target.masks()[:, top : top + height, left : left + width] if target.rles is not None else None
    if masks is not None:
        seen = masks.any((1, 2))
        inside[seen] = boxes_of(masks[seen])
    else:
        seen = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    whole, part = (coco_ap.box_areas(each.astype(np.float64)) for each in (target.boxes, inside))
    share = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return Objects(
        inside[seen],
        target.labels[seen],
        (target.areas * share).astype(np.float32)[seen],
        (target.crowd | (share < _LEAST_SEEN))[seen],
        (height, width),
        None if masks is None else tuple(map(rle_of, masks[seen])),
    )


def _flipped(target: Objects) -> Objects:
    """The objects of the image mirrored left to right."""
    width = target.size[1]
    boxes = np.stack([width - target.boxes[:, 2], target.boxes[:, 1], width - target.boxes[:, 0], target.boxes[:, 3]], 1)
    rles = None if target.rles is None else tuple(rle_of(mask[:, ::-1]) for mask in target.masks())
    return replace(target, boxes=boxes, rles=rles)
