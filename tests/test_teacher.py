"""A network learns from the base's own answers to undistorted images: what the distance is, and where it is zero."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from examples.fastestdet import fastestdet
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.core.errors import UserError
from gearnn_ray.data.objects import Objects
from gearnn_ray.models.centre_detector import centre_detector
from gearnn_ray.models.layers import network_state, same_bits
from gearnn_ray.models.lesson import Lesson
from gearnn_ray.models.registry import build_model
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import Batch, Image, LossTerm, loss_of
from gearnn_ray.tasks.segmentation import resize_label
from gearnn_ray.training.gradients import gradients
from gearnn_ray.training.predict import Predictor, for_inference
from gearnn_ray.training.sampling import Mixture, crop_size, training_batches
from gearnn_ray.training.teacher import Teacher, check_teacher
from gearnn_ray.training.trainer import fine_tune
from tests.conftest import NORMALISATION, SEGMENTATION
from tests.test_trainer import Memory

DETECTION = task_by_name("detection")
TEACHER = Recipe(epochs=3, learning_rate=0.1, batch_size=4, crop=24, objective="teacher")
BOTH = TEACHER.model_copy(update={"objective": "both"})

Pictures = tuple[list[Image], list[Image]]


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return build_model("tests.nets:small", num_classes=3)


def copy_of(model: nn.Module) -> nn.Module:
    twin = build_model("tests.nets:small", num_classes=3)
    twin.load_state_dict(model.state_dict())
    return twin


def teacher_of(base: nn.Module, images: list[Image], recipe: Recipe = TEACHER) -> Teacher:
    return Teacher(SEGMENTATION, copy_of(base), images, recipe, NORMALISATION, "float32")


def darkened(images: list[Image]) -> list[Image]:
    return [(image * 0.2).astype(np.uint8) for image in images]


def batches_of(images: Any, pictures: Pictures, **more: Any) -> list[Batch]:
    """One epoch of a level's images, with the undistorted ones."""
    size = crop_size(SEGMENTATION, images, 24)
    return list(training_batches(SEGMENTATION, images, pictures[1], 4, size, (7, 0), undistorted=pictures[0], **more))


def value(terms: dict[str, LossTerm]) -> float:
    return loss_of(terms).item()


# ── the distance ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_zero_where_nothing_is_distorted_and_the_network_is_the_base(base: nn.Module, pictures: Pictures) -> None:
    teacher, forward = teacher_of(base, pictures[0]), Predictor(for_inference(base), NORMALISATION)
    for batch in batches_of(pictures[0], pictures):
        assert value(SEGMENTATION.losses(forward, teacher.teach(batch))) == 0.0
    dark = batches_of(darkened(pictures[0]), pictures)[0]
    assert value(SEGMENTATION.losses(forward, teacher.teach(dark))) > 1e-3


def test_undistorted_images_give_no_gradient_at_the_base(base: nn.Module, pictures: Pictures) -> None:
    """So that Eq. (1) measures the distortion alone."""
    arguments = (NORMALISATION, "float32", 24, 5, teacher_of(base, pictures[0]))
    still = gradients(SEGMENTATION, base, *pictures, *arguments)
    assert max(float(tensor.abs().max()) for tensor in still.mean.values()) < 1e-6
    moved = gradients(SEGMENTATION, base, darkened(pictures[0]), pictures[1], *arguments)
    assert max(float(tensor.abs().max()) for tensor in moved.mean.values()) > 1e-4


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_divergence_of_the_class_probabilities_at_every_pixel(temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    taught, logits = (3 * torch.randn(2, 4, 3, 5, generator=generator) for _ in range(2))
    batch = Batch(torch.zeros(2, 3, 3, 5), None, lesson=Lesson(taught, temperature, weight=0.5))
    (term,) = SEGMENTATION.losses(lambda _: logits, batch).values()

    def probabilities(column: Tensor) -> list[float]:
        powers = [math.exp(value / temperature) for value in column.tolist()]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for b, h, w in np.ndindex(2, 3, 5):
        p, q = (probabilities(each[b, :, h, w]) for each in (taught, logits))
        total += temperature**2 * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    assert term.sum.item() == pytest.approx(0.5 * total, rel=1e-5)
    assert int(term.count) == 2 * 3 * 5


def test_both_is_the_sum_of_labels_and_teacher(base: nn.Module, pictures: Pictures) -> None:
    (batch, *_), forward = batches_of(darkened(pictures[0]), pictures), Predictor(for_inference(base), NORMALISATION)
    weighted = BOTH.model_copy(update={"teacher_weight": 3.0})
    labels = SEGMENTATION.losses(forward, batch)
    alone, both = (SEGMENTATION.losses(forward, teacher_of(base, pictures[0], r).teach(batch)) for r in (TEACHER, weighted))
    assert (labels.keys(), alone.keys()) == ({"cross_entropy"}, {"teacher"})
    assert both.keys() == {"cross_entropy", "teacher"}
    torch.testing.assert_close(loss_of(both), loss_of(labels) + 3 * loss_of(alone))


def test_how_many_workers_share_a_batch_does_not_matter(base: nn.Module, pictures: Pictures) -> None:
    teacher, forward = teacher_of(base, pictures[0], BOTH), Predictor(for_inference(base), NORMALISATION)
    dark = darkened(pictures[0])

    def terms(**more: Any) -> dict[str, LossTerm]:
        return SEGMENTATION.losses(forward, teacher.teach(batches_of(dark, pictures, **more)[0]))

    whole, parts = terms(), [terms(rank=rank, world_size=2) for rank in (0, 1)]
    for name, term in whole.items():
        torch.testing.assert_close(sum(part[name].sum for part in parts), term.sum, rtol=1e-5, atol=1e-5)
        assert sum(int(part[name].count) for part in parts) == int(term.count)


def test_without_labels_the_targets_say_nothing(base: nn.Module, pictures: Pictures) -> None:
    (batch, *_), forward = batches_of(darkened(pictures[0]), pictures), Predictor(for_inference(base), NORMALISATION)
    batch = teacher_of(base, pictures[0]).teach(batch)
    other = replace(batch, targets=torch.full_like(batch.targets, 255))
    assert value(SEGMENTATION.losses(forward, batch)) == value(SEGMENTATION.losses(forward, other))


# ── which part of the undistorted image is answered ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("height", "width"), [(32, 40), (16, 20), (8, 10), (12, 15), (11, 17)])
def test_the_answer_to_a_smaller_frame_is_where_its_label_is(pictures: Pictures, height: int, width: int) -> None:
    """Where undistorted pixels are class ids, and the base answers what it sees, the answers are the labels of the crop."""
    labels = pictures[1]
    clean = [np.repeat(label[..., None], 3, 2) for label in labels]
    small = [resize_label(image[..., 0], height, width)[..., None].repeat(3, 2) for image in clean]
    size = crop_size(SEGMENTATION, small, 10)
    exact = 32 % height == 0 and 40 % width == 0
    for batch in training_batches(SEGMENTATION, small, labels, 4, size, (1, 2), undistorted=clean):
        answers = SEGMENTATION.answers(lambda x: x.float(), batch)
        assert answers.shape == batch.images.shape
        same = float((answers[:, 0] == batch.targets).float().mean())
        assert same == 1.0 if exact else same > 0.85


def test_images_of_several_levels_and_sizes_have_their_own_windows(base: nn.Module, pictures: Pictures) -> None:
    half = [image[::2, ::2] for image in pictures[0]]
    mixture = Mixture([pictures[0], half], 10)
    teacher = teacher_of(base, pictures[0])
    for batch in batches_of(mixture, pictures):
        taught = teacher.teach(batch)
        assert taught.lesson is not None
        assert taught.lesson.answers.shape == (4, 3, *batch.images.shape[-2:])


# ── the fine-tune ────────────────────────────────────────────────────────────────────────────────────────────────


def tune(model: nn.Module, base: nn.Module, pictures: Pictures, recipe: Recipe, **options: Any) -> dict[str, Tensor]:
    teacher, told = teacher_of(base, pictures[0], recipe), {"chosen": None, "seed": 7} | options
    dark = darkened(pictures[0])
    fine_tune(SEGMENTATION, model, dark, pictures[1], recipe, NORMALISATION, "float32", teacher=teacher, **told)
    return network_state(model)


def agreement(model: nn.Module, base: nn.Module, pictures: Pictures) -> float:
    """Share of pixels of dark images that get the class which the base gives the undistorted ones."""
    shares = []
    for clean, dark in zip(pictures[0], darkened(pictures[0]), strict=True):
        answers = [
            Predictor(for_inference(network), NORMALISATION)(torch.from_numpy(image).permute(2, 0, 1)[None]).argmax(1)
            for network, image in ((base, clean), (model, dark))
        ]
        shares.append(float((answers[0] == answers[1]).float().mean()))
    return sum(shares) / len(shares)


def test_it_learns_without_labels(base: nn.Module, pictures: Pictures) -> None:
    fine_tune(
        SEGMENTATION, base, *pictures, TEACHER.model_copy(update={"epochs": 12}), NORMALISATION, "float32", chosen=None, seed=1
    )
    model = copy_of(base)
    before = agreement(model, base, pictures)
    nothing = (pictures[0], [np.full_like(label, 255) for label in pictures[1]])
    tune(model, base, nothing, TEACHER.model_copy(update={"epochs": 8}))
    assert before < 0.92
    assert agreement(model, base, pictures) > before + 0.05


def test_killed_it_goes_on_to_the_same_bits(base: nn.Module, pictures: Pictures) -> None:
    undisturbed = tune(copy_of(base), base, pictures, TEACHER)
    dying = Memory(die_after=1)
    with pytest.raises(KeyboardInterrupt):
        tune(copy_of(base), base, pictures, TEACHER, checkpoint=dying)
    resumed = tune(copy_of(base), base, pictures, TEACHER, checkpoint=Memory(dying.data))
    assert all(same_bits(undisturbed[name], tensor) for name, tensor in resumed.items())


def test_only_chosen_statistics_are_re_estimated(base: nn.Module, pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, and only where there are no labels."""
    seen: list[dict[str, Tensor]] = []
    monkeypatch.setattr(
        Teacher, "teach", lambda self, batch, real=Teacher.teach: seen.append(network_state(model)) or real(self, batch)
    )
    start = network_state(base)
    for recipe, moved in ((TEACHER, {"bn2.running_mean", "bn2.running_var"}), (BOTH, set())):
        model = copy_of(base)
        seen.clear()
        tune(model, base, pictures, recipe, chosen=("head.bias", "bn2.running_stats"))
        assert {name for name, tensor in seen[0].items() if not same_bits(start[name], tensor)} == moved


# ── detectors ────────────────────────────────────────────────────────────────────────────────────────────────────


def street(height: int, width: int, seed: int = 0) -> Image:
    """Rectangles over noise."""
    rng = np.random.default_rng(seed)
    image = rng.integers(40, 90, (height, width, 3)).astype(np.uint8)
    image[height // 4 : height // 2, width // 4 : width // 2] = (220, 40, 40)
    image[height // 2 :, width // 2 : 3 * width // 4] = (40, 220, 40)
    return image


def nothing(height: int, width: int) -> Objects:
    none = np.zeros(0)
    return Objects(
        np.zeros((0, 4), np.float32), none.astype(np.int64), none.astype(np.float32), none.astype(np.bool_), (height, width)
    )


def taught(model: nn.Module, image: Image, clean: Image, recipe: Recipe = TEACHER) -> dict[str, LossTerm]:
    """The terms of one image's loss, without any object."""
    teacher = Teacher(DETECTION, model, [clean], recipe, NORMALISATION, "float32")
    whole = (10**4, 10**4)
    (batch,) = training_batches(DETECTION, [image], [nothing(*image.shape[:2])], 1, whole, (0,), undistorted=[clean])
    return DETECTION.losses(Predictor(model, NORMALISATION), teacher.teach(batch))


@pytest.mark.parametrize("build", [centre_detector, fastestdet])
def test_a_detector_is_its_own_teacher(build: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    model, clean = build(2).eval(), street(64, 96)
    for name, parameter in model.named_parameters():
        if "reg_layers" in name:  # untrained, FastestDet's boxes have no area
            nn.init.zeros_(parameter)
    same = taught(model, clean, clean)
    assert all(name.startswith("teacher ") for name in same)
    assert value(same) == pytest.approx(0, abs=1e-5)
    assert value(taught(model, (clean * 0.2).astype(np.uint8), clean)) > 1e-4
    labels = DETECTION.losses(Predictor(model, NORMALISATION), DETECTION.collate([(clean, nothing(64, 96))]))
    assert taught(model, clean, clean, BOTH).keys() == labels.keys() | same.keys()


def test_a_peak_of_a_larger_image_is_not_lost() -> None:
    """The teacher saw 16 positions for each of the network's: the surest of them answers, with its box in the small image."""
    detector = centre_detector(2)
    heat, logarithms = torch.full((1, 2, 8, 16), -9.0), torch.zeros(1, 4, 8, 16)
    heat[0, 1, 5, 9] = 4.0
    logarithms[0, :, 5, 9] = math.log(4.0)
    own_heat, own = torch.full((1, 2, 2, 4), -9.0), torch.zeros(1, 4, 2, 4)
    own_heat[0, 1, 1, 2] = 4.0
    left, top, right, bottom = (9.5 - 4) / 4, (5.5 - 4) / 4, (9.5 + 4) / 4, (5.5 + 4) / 4
    own[0, :, 1, 2] = torch.tensor([2.5 - left, 1.5 - top, right - 2.5, bottom - 1.5]).log()
    terms = detector.imitation((own_heat, own), (heat, logarithms), 1.0, 8, 16)
    assert float(terms["centres"][0]) == pytest.approx(0, abs=1e-6)
    assert float(terms["boxes"][0]) == pytest.approx(0, abs=0.01)
    moved = own.clone()
    moved[0, :, 1, 2] += 0.5
    assert float(detector.imitation((own_heat, moved), (heat, logarithms), 1.0, 8, 16)["boxes"][0]) > 0.3


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────


class _AlwaysDropping(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner = build_model("tests.nets:small", num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.inner(x), 0.3, training=True)


class _AlwaysTraining(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner = build_model("tests.nets:small", num_classes)

    def train(self, mode: bool = True) -> "_AlwaysTraining":
        return super().train(True)

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor = self.inner(x)
        return answers


@pytest.mark.parametrize(("kind", "reason"), [(_AlwaysDropping, "different answers"), (_AlwaysTraining, "statistics move")])
def test_a_teacher_that_disagrees_with_itself(kind: Callable[[int], nn.Module], reason: str, pictures: Pictures) -> None:
    with pytest.raises(UserError, match=f"my.nets:net is a teacher that disagrees with itself.*{reason}"):
        check_teacher(SEGMENTATION, kind(3), NORMALISATION, TEACHER, pictures[0][0], pictures[1][0], "my.nets:net")


def test_a_network_that_agrees_with_itself_may_teach(base: nn.Module, pictures: Pictures) -> None:
    check_teacher(SEGMENTATION, base, NORMALISATION, TEACHER, pictures[0][0], pictures[1][0], "tests.nets:small")
    with_dropout = build_model("tests.nets:with_dropout", 3)
    check_teacher(SEGMENTATION, with_dropout, NORMALISATION, BOTH, pictures[0][0], pictures[1][0], "tests.nets:with_dropout")


def test_a_detector_without_dense_answers_cannot_teach() -> None:
    tiny = build_model("tests.nets:tiny_detector", 2)
    with pytest.raises(UserError, match=r"no dense answers .* choose recipe\.objective labels"):
        check_teacher(DETECTION, tiny, NORMALISATION, TEACHER, street(32, 40), nothing(32, 40), "tests.nets:tiny_detector")
