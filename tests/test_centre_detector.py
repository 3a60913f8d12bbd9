"""The built-in single-stage detector, and what every single-stage detector inherits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou

from gearnn_ray.core.errors import UserError
from gearnn_ray.models.centre_detector import STRIDE, centre_detector
from gearnn_ray.models.detector import SingleStageDetector, stretched
from gearnn_ray.models.layers import model_size
from gearnn_ray.models.registry import build_model

BOXES = torch.tensor([[8.0, 12, 30, 40], [40, 4, 60, 20]])


def target(boxes: Tensor = BOXES, labels: tuple[int, ...] = (1, 0), crowd: Tensor | None = None) -> dict[str, Tensor]:
    empty = torch.zeros(0, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "crowd": empty if crowd is None else crowd}


def perfect(boxes: Tensor, labels: tuple[int, ...], classes: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The raw tensors of a detector that knows these boxes."""
    h, w = math.ceil(height / STRIDE), math.ceil(width / STRIDE)
    heat, distances = torch.full((1, classes, h, w), -20.0), torch.zeros(1, 4, h, w)
    for (left, top, right, bottom), label in zip((boxes / STRIDE).tolist(), labels, strict=True):
        column, row = int((left + right) / 2), int((top + bottom) / 2)
        heat[0, label, row, column] = 20
        sides = torch.tensor([column + 0.5 - left, row + 0.5 - top, right - column - 0.5, bottom - row - 0.5])
        distances[0, :, row, column] = sides.log()
    return heat, distances


def test_size_and_name() -> None:
    model = build_model("centre_detector", num_classes=2)
    assert model_size(model) == 749_262
    with pytest.raises(UserError, match="centre_detector has no argument 'min_size': leave it out"):
        build_model("centre_detector", 2, {"min_size": 320})


def test_the_decoder_gives_the_boxes_back() -> None:
    model = centre_detector(3)
    raw = perfect(BOXES, (1, 0), 3, 48, 64)
    found = model.decode(raw, 48, 64)
    assert found["boxes"].shape == (1, 100, 4)
    assert found["scores"][0, :2] == pytest.approx(1, abs=1e-6)
    assert found["scores"][0, 2:].max() < 1e-6
    order = found["labels"][0, :2].argsort(descending=True)
    assert torch.allclose(found["boxes"][0, :2][order], BOXES, atol=1e-3)


def test_a_peak_is_the_largest_of_its_neighbours_and_boxes_stay_inside() -> None:
    heat, distances = torch.full((1, 1, 6, 6), -20.0), torch.full((1, 4, 6, 6), 3.0)
    heat[0, 0, 2, 2], heat[0, 0, 2, 3], heat[0, 0, 5, 5] = 3, 2, 1
    found = centre_detector(1).decode((heat, distances), 24, 24)
    assert (found["scores"][0] > 1e-3).sum() == 2
    assert found["boxes"].min() >= 0
    assert found["boxes"].max() <= 24


def test_the_loss_falls_to_nothing_for_a_perfect_answer_and_boxes_cost_their_generalised_iou() -> None:
    model = centre_detector(3)
    heat, distances = perfect(BOXES, (1, 0), 3, 48, 64)
    terms = model.losses((heat, distances), [target()], 48, 64)
    assert [int(count) for _, count in terms.values()] == [2, 2]
    assert float(terms["centres"][0]) < 1e-3
    assert float(terms["boxes"][0]) == pytest.approx(0, abs=1e-5)
    wide = model.losses((heat, distances + math.log(1.5)), [target()], 48, 64)["boxes"][0]
    middle = (BOXES[:, :2] + BOXES[:, 2:]) / 2
    cells = (middle / STRIDE).floor() * STRIDE + STRIDE / 2
    sides = torch.cat([cells - BOXES[:, :2], BOXES[:, 2:] - cells], 1) * 1.5
    grown = torch.cat([cells - sides[:, :2], cells + sides[:, 2:]], 1)
    assert float(wide) == pytest.approx(float((1 - generalized_box_iou(grown, BOXES).diagonal()).sum()), rel=1e-5)


def test_a_crowd_is_no_error_and_images_without_objects_have_finite_losses() -> None:
    model = centre_detector(2)
    heat, distances = torch.full((1, 2, 12, 16), -20.0), torch.zeros(1, 4, 12, 16)
    heat[0, 0, 6, 8] = 5.0
    nobody = target(torch.zeros(0, 4), ())
    wrong = model.losses((heat, distances), [nobody], 48, 64)
    assert float(wrong["centres"][0]) > 1
    ignored = model.losses((heat, distances), [target(torch.zeros(0, 4), (), torch.tensor([[20.0, 16, 50, 36]]))], 48, 64)
    assert float(ignored["centres"][0]) < 1e-3
    assert all(math.isfinite(float(total)) and int(count) == 0 for total, count in wrong.values())


def test_it_learns_an_image_by_heart() -> None:
    torch.manual_seed(0)
    model, x = centre_detector(2).train(), torch.randn(2, 3, 48, 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        terms = model(x, [target(), target(BOXES + 2)])
        sum(total / count for total, count in terms.values()).backward()
        optimizer.step()
    found = model(x)
    order = found["labels"][0, :2].argsort(descending=True)
    assert torch.allclose(found["boxes"][0, :2][order], BOXES, atol=3)
    assert found["scores"][0, :2].min() > 0.5 > found["scores"][0, 2]
    assert all(p.grad is not None for p in model.parameters())


def test_a_batch_equals_its_images_alone() -> None:
    torch.manual_seed(0)
    model, x = centre_detector(2).eval(), torch.randn(3, 3, 50, 66)
    with torch.no_grad():
        together, alone = model(x), [model(x[[i]]) for i in range(3)]
    for name, values in together.items():
        assert torch.allclose(values.float(), torch.cat([each[name] for each in alone]).float(), atol=1e-4)


class _Fixed(SingleStageDetector):
    """Sees 20 by 40 pixels, and returns what it was given."""

    input_size = (20, 40)

    def raw(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW

    def decode(self, raw: Tensor, height: int, width: int) -> dict[str, Tensor]:
        assert (height, width) == tuple(raw.shape[-2:]) == (20, 40)
        boxes = torch.tensor([[[10.0, 5, 20, 10]]]).expand(len(raw), 1, 4)
        return {"boxes": boxes, "scores": torch.ones(len(raw), 1), "labels": torch.zeros(len(raw), 1, dtype=torch.int64)}

    def losses(self, raw: Tensor, targets: Any, height: int, width: int) -> dict[str, tuple[Tensor, Tensor]]:
        self.seen = targets
        return {"nothing": (raw.sum(), torch.tensor(len(raw)))}


def test_images_are_stretched_to_the_input_and_boxes_converted() -> None:
    model, x = _Fixed(), torch.randn(2, 3, 80, 80)
    assert model(x)["boxes"].tolist() == [[[20, 20, 40, 40]]] * 2
    images = [torch.randn(3, 80, 80), torch.randn(3, 40, 20), torch.randn(3, 20, 40)]
    assert [each[0].tolist() for each in model(images)["boxes"]] == [[20, 20, 40, 40], [5, 10, 10, 20], [10, 5, 20, 10]]
    box, nothing = torch.tensor([[20.0, 20, 40, 40]]), torch.zeros(0, 4)
    each = {"boxes": box, "labels": torch.tensor([0]), "crowd": box}
    terms = model(images[:2], [each, {**each, "crowd": nothing}])
    assert int(terms["nothing"][1]) == 2
    assert model.seen[0]["boxes"].tolist() == model.seen[0]["crowd"].tolist() == [[10, 5, 20, 10]]
    assert model.seen[1]["boxes"].tolist() == [[40, 10, 80, 20]]
    assert torch.equal(model.raw(stretched(x, 20, 40)), stretched(x, 20, 40))


def test_images_of_different_sizes_need_a_detector_with_an_input_size() -> None:
    with pytest.raises(UserError, match="a batch has images of different sizes, and the detector takes only equal ones"):
        centre_detector(2)([torch.zeros(3, 48, 64), torch.zeros(3, 64, 64)])
