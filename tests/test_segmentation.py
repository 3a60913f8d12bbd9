"""Batches, loss and mIoU against plain reference arithmetic."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import IGNORED
from gearnn_ray.tasks.base import Batch, Image, loss_of, score, scores_of_images
from gearnn_ray.tasks.segmentation import resize_label
from gearnn_ray.training.sampling import crop_size
from gearnn_ray.training.sampling import training_batches as batches_of
from tests.conftest import NORMALISATION, SEGMENTATION


def training_batches(*arguments: object) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for batch in batches_of(SEGMENTATION, *arguments):  # type: ignore[arg-type]
        yield batch.images, batch.targets


def loss(logits_BKhw: torch.Tensor, y_BHW: torch.Tensor) -> torch.Tensor:
    batch = Batch(torch.zeros(len(y_BHW), 3, *y_BHW.shape[1:]), y_BHW)
    return loss_of(SEGMENTATION.losses(lambda _: logits_BKhw, batch))


def mean_iou(logits_1Khw: torch.Tensor, label: Image) -> float:
    evidence = SEGMENTATION.evidence(logits_1Khw[0], label, label.shape, len(logits_1Khw[0]))
    return score(SEGMENTATION, {name: tensor[None] for name, tensor in evidence.items()})


def encoded(count: int, height: int = 20, width: int = 30) -> tuple[list[Image], list[Image]]:
    """Images whose every pixel says which image, row and column it is; labels say row + column."""
    images, labels = [], []
    for index in range(count):
        rows, columns = np.mgrid[:height, :width]
        images.append(np.stack([np.full((height, width), index), rows, columns], -1).astype(np.uint8))
        labels.append((rows + columns).astype(np.uint8))
    return images, labels


def test_crops_are_cut_alike_from_image_and_label_and_each_image_comes_once() -> None:
    images, labels = encoded(10)
    seen, flipped, tops = [], 0, set()
    for x, y in training_batches(images, labels, 4, (8, 12), (1, 2)):
        assert x.shape == (4, 3, 8, 12)
        assert x.dtype == torch.uint8
        for image, label in zip(x, y, strict=True):
            assert torch.equal(image[1].long() + image[2].long(), label)
            flipped += int(image[2, 0, 0] > image[2, 0, 1])
            tops.add(int(image[1, 0, 0]))
            seen.append(int(image[0, 0, 0]))
    assert len(seen) == len(set(seen)) == 8  # an incomplete last batch is left out
    assert 0 < flipped < 8
    assert len(tops) > 2


def test_batches_are_a_pure_function_of_the_seed() -> None:
    images, labels = encoded(6)
    first, again, other = (list(training_batches(images, labels, 3, (8, 8), seed)) for seed in ((1, 0), (1, 0), (1, 1)))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_workers_split_the_very_batch_one_would_see() -> None:
    images, labels = encoded(8)
    whole = list(training_batches(images, labels, 4, (8, 8), (3,)))
    parts = [list(training_batches(images, labels, 4, (8, 8), (3,), rank, 2)) for rank in (0, 1)]
    for (x, y), (x0, y0), (x1, y1) in zip(whole, *parts, strict=True):
        assert torch.equal(x[0::2], x0)
        assert torch.equal(x[1::2], x1)
        assert torch.equal(torch.cat([y[0::2], y[1::2]]), torch.cat([y0, y1]))


def test_a_set_smaller_than_a_batch_makes_one_batch() -> None:
    images, labels = encoded(3)
    (batch,) = training_batches(images, labels, 8, (8, 8), (0,))
    assert batch[0].shape[0] == 3


def test_the_crop_shrinks_to_the_smallest_image() -> None:
    images = encoded(1, 20, 30)[0] + encoded(1, 10, 40)[0]
    assert crop_size(SEGMENTATION, images, 208) == (10, 30)
    assert crop_size(SEGMENTATION, images, 8) == (8, 8)


def test_labels_follow_an_image_the_level_made_smaller() -> None:
    label = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert resize_label(label, 2, 2).tolist() == [[5, 7], [13, 15]]
    assert resize_label(label, 8, 8)[::2, ::2].tolist() == label.tolist()
    images, labels = encoded(4, 10, 15)[0], encoded(4, 20, 30)[1]
    x, y = next(training_batches(images, labels, 4, (10, 15), (0,)))
    assert x.shape[-2:] == y.shape[-2:] == (10, 15)


def test_normalisation() -> None:
    x = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = (x.float() / 255 - 0.4) / 0.3
    torch.testing.assert_close(NORMALISATION(x), expected)


def test_loss_ignores_255_and_survives_a_batch_without_labels() -> None:
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    y = torch.randint(0, 3, (2, 4, 5))
    y[0] = IGNORED
    torch.testing.assert_close(loss(logits, y), F.cross_entropy(logits[1:], y[1:]))
    nothing = loss(logits, torch.full((2, 4, 5), IGNORED))
    assert nothing.item() == 0
    nothing.backward()
    assert torch.isfinite(logits.grad).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_mean_iou_equals_the_definition(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, (6, 7)).astype(np.uint8)
    label[rng.random((6, 7)) < 0.3] = IGNORED
    prediction = rng.integers(0, classes, (6, 7))
    logits = F.one_hot(torch.from_numpy(prediction), classes).permute(2, 0, 1)[None].float()
    valid = label != IGNORED
    ious = []
    for c in range(classes):
        a, b = (label == c) & valid, (prediction == c) & valid
        if (a | b).any():
            ious.append(100 * (a & b).sum() / (a | b).sum())
    expected = float(np.mean(ious)) if ious else 0.0
    assert mean_iou(logits, label) == pytest.approx(expected)


def test_logits_are_judged_at_the_labels_size() -> None:
    label = np.zeros((8, 8), np.uint8)
    label[:, 4:] = 1
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, :, 1] = 4
    logits[0, 0, :, 0] = 4
    assert mean_iou(logits, label) == 100


def test_an_images_own_score_is_that_of_the_image_alone() -> None:
    rng = np.random.default_rng(4)
    labels = [rng.integers(0, 3, (6, 7)).astype(np.uint8) for _ in range(5)]
    logits = torch.randn(5, 3, 6, 7)
    parts = [SEGMENTATION.evidence(one, label, label.shape, len(one)) for one, label in zip(logits, labels, strict=True)]
    evidence = {"counts": torch.stack([part["counts"] for part in parts])}
    expected = [mean_iou(one[None], label) for one, label in zip(logits, labels, strict=True)]
    assert scores_of_images(SEGMENTATION, evidence) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (np.zeros((4, 5), np.uint8), "label of 5x4 for an image of 6x4"),
        (np.full((4, 6), 7, np.uint8), "class id 7 in its label, expected ids below 3"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(label: Image, sentence: str) -> None:
    with pytest.raises(UserError, match=f"train sample 'a' has .*{sentence}"):
        SEGMENTATION.check(np.zeros((4, 6, 3), np.uint8), label, 3, "train sample 'a'")


def test_stability_training_adds_the_divergence_of_the_perturbed_copy() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 4, 5, generator=generator) * 255, torch.randint(0, 3, (2, 4, 5), generator=generator)
    perturbed = x + torch.randn(x.shape, generator=generator)
    weight = torch.randn(3, 3, generator=generator) / 100

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return torch.einsum("kc,bchw->bkhw", weight, pixels)

    found = loss_of(SEGMENTATION.stability_losses(forward, Batch(x, y), perturbed, alpha=0.7))
    p, q = forward(x).softmax(1), forward(perturbed).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(found, F.cross_entropy(forward(x), y) + 0.7 * divergence)


def test_uncertainty_is_the_mean_entropy_of_the_pixels() -> None:
    K = 5
    even, sure = torch.zeros(K, 4, 6), torch.full((K, 4, 6), float("-inf"))
    sure[2] = 3.0
    assert SEGMENTATION.uncertainty(even) == pytest.approx(np.log(K))
    assert SEGMENTATION.uncertainty(sure) == 0
    assert SEGMENTATION.uncertainty(torch.cat([even, sure], 1)) == pytest.approx(np.log(K) / 2)
    logits = torch.randn(K, 4, 6, generator=torch.Generator().manual_seed(1))
    p = logits.double().softmax(0)
    assert SEGMENTATION.uncertainty(logits) == pytest.approx(float(-(p * p.log()).sum(0).mean()), rel=1e-5)


def test_the_logits_of_an_answer_keep_no_batch_in_memory() -> None:
    batch = torch.zeros(4, 3, 6, 8)
    logits = SEGMENTATION.content(batch[1], "application/x-npy")
    batch += 1
    assert not logits.any()
    assert SEGMENTATION.answer_bytes("application/x-npy", 3, 6, 8) == logits.nbytes
    assert SEGMENTATION.answer_bytes("image/png", 3, 6, 8) == SEGMENTATION.content(batch[1], "image/png").nbytes
