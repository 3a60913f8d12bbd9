"""The example of a detector of one's own: FastestDet's decoder and loss against plain loops, and its published weights."""

import contextlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from examples.fastestdet import FastestDet
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.models.detector import Target, Terms
from gearnn_ray.models.layers import layers_of, model_size
from gearnn_ray.models.registry import build_model
from gearnn_ray.models.weights import load_weights, read_weights
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import scores
from gearnn_ray.tasks.detection import Prediction
from gearnn_ray.training.predict import Normalisation, Predictor, for_inference, predict_image
from tests.conftest import ROOT

K = 3
STRIDE = 16  # pixels between two positions
SHARED = Path(os.environ.get("GEARNN_SHARED", ROOT.parent / "shared"))
WEIGHTS, DATA = SHARED / "weights" / "fastestdet_coco.pth", SHARED / "data"
JUDGED = 32  # images


def small(seed: int = 0) -> FastestDet:
    """Random weights, and an input of 96 x 96 pixels or 6 x 6 positions, which takes milliseconds."""
    torch.manual_seed(seed)
    detector = FastestDet(K)
    detector.input_size = (96, 96)
    return detector


def logits(seed: int, h: int, w: int, images: int = 2) -> Tensor:
    return 2 * torch.randn(images, 1 + 4 + K, h, w, generator=torch.Generator().manual_seed(seed))


def target(boxes: list[list[float]], labels: list[int], crowd: list[list[float]] | None = None) -> Target:
    corners, crowds = (torch.tensor(each or [], dtype=torch.float32).reshape(-1, 4) for each in (boxes, crowd))
    return {"boxes": corners, "labels": torch.tensor(labels, dtype=torch.int64), "crowd": crowds}


EMPTY = target([], [])


def total(terms: Terms) -> Tensor:
    return torch.stack([term / count.clamp(min=1) for term, count in terms.values()]).sum()


# ── the decoder and the loss once more, position by position ─────────────────────────────────────────────────────────

Box = list[float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def box_at(raw: Tensor, row: int, column: int) -> Box:
    """The box of one position of one image."""
    h, w = raw.shape[-2:]
    x, y, wide, high = raw[1:5, row, column].tolist()
    x, y, wide, high = math.tanh(x) + column, math.tanh(y) + row, sigmoid(wide) * w, sigmoid(high) * h
    return [STRIDE * side for side in (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)]


def sides(box: Box) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]


def iou(a: Box, b: Box) -> float:
    across, down = (max(min(a[2 + i], b[2 + i]) - max(a[i], b[i]), 0.0) for i in (0, 1))
    return across * down / (math.prod(sides(a)) + math.prod(sides(b)) - across * down)


def siou(a: Box, b: Box) -> float:
    """As the paper defines it, with the arcsine."""
    apart = [(b[i] + b[2 + i] - a[i] - a[2 + i]) / 2 for i in (0, 1)]
    around = [max(a[2 + i], b[2 + i]) - min(a[i], b[i]) for i in (0, 1)]
    sine = abs(apart[1]) / math.hypot(*apart)
    angle = 1 - 2 * math.sin(math.asin(sine) - math.pi / 4) ** 2
    distance = sum(1 - math.exp((angle - 2) * (d / c) ** 2) for d, c in zip(apart, around, strict=True))
    shape = sum((1 - math.exp(-abs(m - n) / max(m, n))) ** 4 for m, n in zip(sides(a), sides(b), strict=True))
    return iou(a, b) - (distance + shape) / 2


def decoded(raw: Tensor) -> list[tuple[float, int, Box]]:
    """The detections of one image: score, class and box."""
    candidates = []
    for row in range(raw.shape[1]):
        for column in range(raw.shape[2]):
            probability = raw[5:, row, column].softmax(0)
            score = sigmoid(float(raw[0, row, column])) ** 0.6 * float(probability.max()) ** 0.4
            candidates.append((score, int(probability.argmax()), box_at(raw, row, column)))
    found: list[tuple[float, int, Box]] = []
    for score, label, box in sorted(candidates, reverse=True):
        if score > 0.001 and all(label != other or iou(box, before) <= 0.45 for _, other, before in found):
            found.append((score, label, box))
    return found[:100]


def loss_of(raw: Tensor, targets: list[Target]) -> dict[str, float]:
    h, w = raw.shape[-2:]
    pairs = []
    for image, each in enumerate(targets):
        for box, label in zip(each["boxes"].tolist(), each["labels"].tolist(), strict=True):
            row, column = int((box[1] + box[3]) / 2 / STRIDE), int((box[0] + box[2]) / 2 / STRIDE)
            for y, x in ((row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)):
                if y < h and x < w:
                    pairs.append((siou(box_at(raw[image], y, x), box), image, y, x, label))
    mean = sum(pair[0] for pair in pairs) / len(pairs)
    pairs = [pair for pair in pairs if pair[0] > mean]
    objectness, count = 0.0, 0
    for image, each in enumerate(targets):
        own = [pair for pair in pairs if pair[1] == image]
        positive = {(y, x) for _, _, y, x, _ in own}
        crowded = {
            (y, x)
            for left, top, right, bottom in each["crowd"].tolist()
            for y in range(h)
            for x in range(w)
            if left <= STRIDE * x <= right and top <= STRIDE * y <= bottom
        }
        counted = [(y, x) for y in range(h) for x in range(w) if (y, x) in positive or (y, x) not in crowded]
        count += len(counted)
        for y, x in counted:
            wanted = max((quality for quality, _, *place, _ in own if (y, x) == tuple(place)), default=0.0)
            d = abs(sigmoid(float(raw[image, 0, y, x])) - wanted)
            factor = 0.25 * len(counted) / len(own) if (y, x) in positive else 0.75
            objectness += factor * (d * d / 2 if d < 1 else d - 0.5)
    return {
        "boxes": 8 * sum(1 - quality for quality, *_ in pairs) / len(pairs),
        "objectness": 16 * objectness / count,
        "classes": -sum(math.log(raw[i, 5:, y, x].softmax(0)[label]) for _, i, y, x, label in pairs) / len(pairs),
    }


# ── network ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_its_size_is_the_published_one() -> None:
    detector = build_model("examples.fastestdet:fastestdet", num_classes=80)
    assert model_size(detector) == 252_868
    of_norms = sum(layer.numel for layer in layers_of(detector) if layer.kind.startswith("norm"))
    assert of_norms / model_size(detector) == pytest.approx(0.066, abs=5e-4)
    with torch.inference_mode():
        found = detector.eval()(torch.rand(1, 3, 240, 320))
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "boxes": (1, 100, 4), "scores": (1, 100), "labels": (1, 100)
    }  # fmt: skip


def test_the_network_takes_bgr() -> None:
    """With weights on the first channel alone, it sees nothing but blue."""
    detector = small().eval()
    first = detector.backbone.first_conv[0]
    assert isinstance(first, nn.Conv2d)
    with torch.no_grad():
        first.weight[:, 1:] = 0
        x = torch.rand(1, 3, 96, 96)
        before = detector.raw(x)
        x[:, :2] = 0
        assert torch.equal(detector.raw(x), before)
        x[:, 2] = 0
        assert not torch.equal(detector.raw(x), before)


def test_a_batch_is_its_images_alone() -> None:
    detector = small().eval()
    images = [torch.rand(3, *size) for size in ((96, 96), (60, 130), (200, 96))]
    with torch.inference_mode():
        together = detector(images)
        for index, image in enumerate(images):
            for name, part in detector(image[None]).items():
                torch.testing.assert_close(part[0], together[name][index], rtol=1e-4, atol=1e-4)


# ── decoder ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("h", "w"), [(6, 8), (22, 22)])
@pytest.mark.parametrize(("lowered", "scale"), [(0, 1), (12, 1), (0, 4)])
def test_decoding_position_by_position(h: int, w: int, lowered: float, scale: float) -> None:
    """With lowered objectness, many scores are below the least; with larger logits of boxes, many boxes overlap."""
    raw = logits(seed=h, h=h, w=w)
    raw[:, 0] -= lowered
    raw[:, 1:5] *= scale
    found = FastestDet(K).decode(raw, STRIDE * h, STRIDE * w)
    for image in range(len(raw)):
        expected = decoded(raw[image].double())
        count = len(expected)
        assert int((found["scores"][image] > 0).sum()) == count
        for name, column in (("scores", 0), ("labels", 1), ("boxes", 2)):
            values = torch.tensor([each[column] for each in expected], dtype=found[name].dtype)
            torch.testing.assert_close(found[name][image, :count], values, rtol=1e-4, atol=1e-3)
            assert not found[name][image, count:].any()


def test_nothing_above_the_least_score() -> None:
    raw = torch.full((2, 1 + 4 + K, 6, 6), -20.0)
    found = FastestDet(K).decode(raw.bfloat16(), 96, 96)
    assert all(part.shape[:2] == (2, 100) and not part.any() for part in found.values())
    assert found["scores"].dtype == found["boxes"].dtype == torch.float32


def test_detections_have_gradients() -> None:
    """Of the scores and boxes that were found, also beside positions whose probabilities round to 0."""
    raw = logits(0, 6, 6)
    raw[:, 0, :3] = raw[:, 5, 2:] = -500
    found = FastestDet(K).decode(raw.requires_grad_(), 96, 96)
    torch.autograd.backward(found["scores"].sum() + found["boxes"].sum())
    assert raw.grad is not None
    assert torch.isfinite(raw.grad).all()
    assert torch.equal((raw.grad[:, 0] != 0).sum((1, 2)), (found["scores"] > 0).sum(1))


# ── loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

STREET = [
    target([[10, 8, 60, 70], [12, 40, 90, 95], [30.5, 3, 45, 9]], [0, 2, 1], crowd=[[40, 0, 96, 33]]),
    target([[5, 50, 40, 90]], [1]),
    target([], [], crowd=[[0, 0, 30, 30], [10, 20, 50, 96]]),
]


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_pair_by_pair(seed: int) -> None:
    raw = logits(seed, 6, 6, images=3)
    terms = FastestDet(K).losses(raw, STREET, 96, 96)
    expected = loss_of(raw.double(), STREET)
    assert terms.keys() == expected.keys()
    for name, (term, count) in terms.items():
        assert float(term / count) == pytest.approx(expected[name], rel=1e-4), name


def test_a_position_of_two_objects_aims_at_the_larger_quality() -> None:
    raw = logits(0, 6, 6, images=1)
    twice = target([[20, 20, 50, 50], [21, 21, 75, 52]], [0, 1])
    terms = FastestDet(K).losses(raw, [twice], 96, 96)
    for name, value in loss_of(raw.double(), [twice]).items():
        assert float(terms[name][0] / terms[name][1]) == pytest.approx(value, rel=1e-4)


def test_an_image_twice_has_the_loss_of_the_image() -> None:
    raw = logits(0, 6, 6, images=1)
    once, twice = (FastestDet(K).losses(raw.repeat(n, 1, 1, 1), STREET[:1] * n, 96, 96) for n in (1, 2))
    for name, (term, count) in twice.items():
        torch.testing.assert_close(term / count, once[name][0] / once[name][1])
        assert count == 2 * once[name][1]


def test_without_objects_only_objectness_is_trained() -> None:
    raw = logits(0, 6, 6).requires_grad_()
    terms = FastestDet(K).losses(raw, [EMPTY, EMPTY], 96, 96)
    assert {name: int(count) for name, (_, count) in terms.items()} == {"boxes": 0, "objectness": 72, "classes": 0}
    torch.autograd.backward(total(terms))
    assert raw.grad is not None
    assert raw.grad[:, 0].all()
    assert not raw.grad[:, 1:].any()
    everywhere = target([], [], crowd=[[0, 0, 96, 96]])
    assert not total(FastestDet(K).losses(raw, [everywhere, everywhere], 96, 96)).detach()


def test_crowds_hide_positions_without_an_object() -> None:
    raw = logits(0, 6, 6, images=1).requires_grad_()
    seen = target([[10, 10, 40, 40]], [0], crowd=[[0, 0, 48, 48]])
    torch.autograd.backward(total(FastestDet(K).losses(raw, [seen], 96, 96)))
    assert raw.grad is not None
    trained = raw.grad[0, 0] != 0
    pairs = raw.grad[0, 1:5].any(0)
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[:4, :4] = True
    assert pairs.any()
    assert torch.equal(trained, ~inside | pairs)


def test_a_single_pair_and_a_box_that_is_right_already() -> None:
    """The last position alone lies inside the grid; sides of half the image and no shift make its box exact."""
    raw = torch.zeros(1, 1 + 4 + K, 6, 6, requires_grad=True)
    exact = target([[56, 56, 104, 104]], [2])
    terms = FastestDet(K).losses(raw, [exact], 96, 96)
    assert {name: int(count) for name, (_, count) in terms.items()} == {"boxes": 1, "objectness": 36, "classes": 1}
    assert terms["boxes"][0].item() == pytest.approx(0, abs=1e-5)
    torch.autograd.backward(total(terms))
    assert raw.grad is not None
    assert torch.isfinite(raw.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_reaches_every_parameter(dtype: torch.dtype) -> None:
    detector = small()
    x = torch.rand(3, 3, 96, 96)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        terms = detector(x, STREET)
    assert all(term.dtype == torch.float32 for term, _ in terms.values())
    torch.autograd.backward(total(terms))
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_it_learns_one_image() -> None:
    """It is asked in training mode: running statistics would need many more steps to follow the weights."""
    detector = small().train()
    x = torch.rand(1, 3, 120, 160) / 4
    box = [40.0, 30.0, 110.0, 100.0]
    x[:, :, 30:100, 40:110] += torch.tensor([0.7, 0.2, 0.1])[:, None, None]
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(40):
        loss = total(detector(x, [target([box], [1])]))
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    with torch.inference_mode():
        found = detector(x)
    assert int(found["labels"][0, 0]) == 1
    assert iou(found["boxes"][0, 0].tolist(), box) > 0.6


# ── published weights ────────────────────────────────────────────────────────────────────────────────────────────────


def coco_scores(listing: dict[str, Any], predictions: dict[int, Prediction]) -> dict[str, float]:
    """AP and AP50 by pycocotools, in percent, of the predictions by image id."""
    ids = sorted(category["id"] for category in listing["categories"])
    results = [
        {"image_id": image, "category_id": ids[label], "score": score, "bbox": [*box[:2], *sides(box)]}
        for image, prediction in predictions.items()
        for box, score, label in zip(*(prediction[name].tolist() for name in ("boxes", "scores", "labels")), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = listing
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(results), "bbox")
        judged.params.imgIds = list(predictions)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return {"AP": 100 * judged.stats[0], "AP50": 100 * judged.stats[1]}


@pytest.mark.skipif(
    not (WEIGHTS.is_file() and (DATA / "cocoval128").is_dir()),
    reason=f"needs weights/fastestdet_coco.pth and data/cocoval128 in {SHARED} (GEARNN_SHARED gives another folder)",
)
def test_published_weights(tmp_path: Path) -> None:
    """Figures of the first 32 images. Of all 128, AP is 19.0 and AP50 35.7; with stretched pixels rounded to whole numbers, as in
    FastestDet's own evaluation, 19.1 and 35.6.
    """
    model = build_model("examples.fastestdet:fastestdet", num_classes=80)
    model.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True), strict=True)
    load_weights(model, read_weights(WEIGHTS), str(WEIGHTS))
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(DATA / "cocoval128")
    split = open_dataset("coco", str(tmp_path), task="detection").val
    listing = json.loads((DATA / "cocoval128" / "instances.json").read_text())
    ids = {image["file_name"]: image["id"] for image in listing["images"]}
    task, predictor = task_by_name("detection"), Predictor(for_inference(model), Normalisation((0.0,) * 3, (1.0,) * 3))
    predictions, evidence = {}, []
    for index in range(JUDGED):
        image = split.image(index)
        found = predict_image(task, predictor, image, torch.device("cpu"))
        predictions[ids[split.ids[index]]] = found
        evidence.append(task.evidence(found, split.target(index), image.shape[:2], 80))
    ours = scores(task, {name: torch.stack([each[name] for each in evidence]) for name in evidence[0]})
    theirs = coco_scores(listing, predictions)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
    assert theirs == pytest.approx({"AP": 23.5, "AP50": 43.9}, abs=0.3)
