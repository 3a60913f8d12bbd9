"""Training batches: which images an epoch has, at which levels, and the share of each worker."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.evaluation import baselines
from gearnn_ray.tasks.base import Image
from gearnn_ray.training.sampling import Mixture, Subset, crop_size, steps_per_epoch, training_batches
from tests.conftest import SEGMENTATION

Pictures = tuple[list[Image], list[Image]]
RECIPE = Recipe(epochs=2, learning_rate=0.1, batch_size=4, crop=24, precision="float32")
examples = settings(max_examples=40, deadline=None)


def stored_variants(count: int, sizes: Sequence[tuple[int, int]]) -> tuple[list[list[Image]], list[Image]]:
    """A level per size [height, width]; red is the image's index, green its level, blue the quadrant, which with the
    index makes the label, whose size is 16 × 24."""

    def quadrants(height: int, width: int) -> Image:
        rows, columns = (np.arange(side) >= side // 2 for side in (height, width))
        return (2 * rows[:, None] + columns).astype(np.uint8)

    def image(index: int, level: int, height: int, width: int) -> Image:
        code = [np.full((height, width), v, np.uint8) for v in (index, level)]
        return np.stack([*code, quadrants(height, width)], -1)

    levels = [[image(i, level, *size) for i in range(count)] for level, size in enumerate(sizes)]
    return levels, [4 * i + quadrants(16, 24) for i in range(count)]


def epoch(
    count: int, sizes: Sequence[tuple[int, int]], batch_size: int, seed: Sequence[int], **more: int
) -> list[tuple[Tensor, Tensor]]:
    levels, labels = stored_variants(count, sizes)
    mixture = Mixture(levels, crop=10)
    batches = training_batches(SEGMENTATION, mixture, labels, batch_size, crop_size(SEGMENTATION, mixture, 10), seed, **more)
    return [(batch.images, batch.targets) for batch in batches]


def indices(x: Tensor) -> list[int]:
    return [int(image[0, 0, 0]) for image in x]


def levels_in(x: Tensor) -> list[int]:
    return [int(image[1, 0, 0]) for image in x]


SAME, BIG, SMALL = (16, 24), (16, 24), (8, 12)


def test_a_subset_is_what_it_says() -> None:
    images = [np.full((2, i + 1, 3), i, np.uint8) for i in range(6)]
    part = Subset(images, range(2, 5))
    assert len(part) == 3
    assert [int(image[0, 0, 0]) for image in part] == [2, 3, 4]
    assert part.shapes == [(2, 3, 3), (2, 4, 3), (2, 5, 3)]
    assert int(part[-1][0, 0, 0]) == 4

    class Unread(list[Image]):
        shapes = [image.shape for image in images]  # noqa: RUF012

        def __getitem__(self, index: object) -> Image:  # type: ignore[override]
            raise AssertionError("an image was read to learn its shape")

    assert Subset(Unread(images), [4, 1]).shapes == [(2, 5, 3), (2, 2, 3)]
    assert Subset(part, [2, 0]).shapes == [(2, 5, 3), (2, 3, 3)]


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (4, 1), (5, 1), (9, 1), (10, 2), (367, 73)])
def test_a_fifth_is_held_back_and_never_nothing(count: int, expected: int) -> None:
    assert baselines.tuning_images(count) == expected


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(12, 4, 3), (14, 4, 3), (3, 4, 1), (1, 1, 1)])
@pytest.mark.parametrize("sizes", [[SAME, SAME, SAME], [BIG, SMALL, BIG, SMALL]])
def test_an_epoch_of_all_levels_has_every_image_once_in_as_many_steps_as_one(
    count: int, batch_size: int, steps: int, sizes: list[tuple[int, int]]
) -> None:
    batches = epoch(count, sizes, batch_size, (7, 0))
    seen = [index for x, _ in batches for index in indices(x)]
    assert len(batches) == steps == steps_per_epoch(count, batch_size)
    assert len(set(seen)) == len(seen) == min(count, steps * batch_size)
    assert set(seen) <= set(range(count))


@examples
@given(
    st.integers(1, 20),
    st.lists(st.sampled_from([BIG, SMALL, (12, 12)]), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_labels_belong_to_their_images_and_every_batch_to_one_size(
    count: int, sizes: list[tuple[int, int]], batch_size: int, seed: int
) -> None:
    for x, y in epoch(count, sizes, batch_size, (seed, 1)):
        assert x.dtype == torch.uint8
        assert y.dtype == torch.int64
        assert torch.equal(4 * x[:, 0].long() + x[:, 2].long(), y)
        (size,) = {sizes[level] for level in levels_in(x)}
        assert x.shape[1:] == (3, min(10, size[0]), min(10, size[1]))


def test_batches_are_a_function_of_the_seed_and_epochs_differ() -> None:
    def drawn(seed: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        return [(indices(x), levels_in(x)) for x, _ in epoch(12, [SAME] * 3, 4, seed)]

    first, again = (epoch(12, [SAME, SAME, SMALL], 4, (7, 0)) for _ in range(2))
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert drawn((7, 0)) != drawn((7, 1))
    assert drawn((7, 0)) != drawn((8, 0))
    # an image is not tied to one level
    of_image = [dict(zip(i, v, strict=True)) for e in range(8) for i, v in drawn((7, e))]
    assert all(len({levels[i] for levels in of_image if i in levels}) > 1 for i in range(12))


def test_crops_differ_from_step_to_step() -> None:
    """The first image of every step: where its quadrants meet tells its crop."""
    firsts = [tuple(x[0, 2].flatten().tolist()) for x, _ in epoch(40, [SAME], 4, (7, 0))]
    assert len(set(firsts)) > 5


def test_levels_of_equal_size_are_mixed_within_a_batch_and_equally_often() -> None:
    batches = [x for e in range(50) for x, _ in epoch(12, [SAME] * 3, 4, (7, e))]
    assert sum(len(set(levels_in(x))) > 1 for x in batches) > 0.9 * len(batches)
    often = Counter(level for x in batches for level in levels_in(x))
    assert all(often[level] == pytest.approx(200, abs=45) for level in range(3))


def test_every_size_gets_steps_in_proportion_to_its_levels() -> None:
    for number in range(3):
        batches = epoch(32, [BIG, BIG, SMALL, BIG], 4, (7, number))
        assert Counter(tuple(x.shape[2:]) for x, _ in batches) == {(10, 10): 6, (8, 10): 2}


def test_no_size_is_left_out_for_ever_where_there_are_fewer_steps_than_levels() -> None:
    # which levels get a step where there are fewer than levels is drawn anew in each epoch
    batches = [x for e in range(60) for x, _ in epoch(8, [BIG, SMALL, (12, 12)], 4, (7, e))]
    often = Counter(level for x in batches for level in set(levels_in(x)))
    assert all(often[level] == pytest.approx(40, abs=15) for level in range(3))


def test_workers_share_a_batch() -> None:
    whole = epoch(12, [SAME, SAME, SMALL], 4, (7, 0))
    shares = [epoch(12, [SAME, SAME, SMALL], 4, (7, 0), rank=rank, world_size=2) for rank in range(2)]
    for (x, y), *parts in zip(whole, *shares, strict=True):
        for rank, (own_x, own_y) in enumerate(parts):
            assert torch.equal(own_x, x[rank::2])
            assert torch.equal(own_y, y[rank::2])


def test_a_mixture_takes_the_levels_in_turn_for_who_only_looks() -> None:
    levels, _ = stored_variants(3, [BIG, SMALL])
    mixture = Mixture(levels, crop=10)
    assert len(mixture) == 3
    assert mixture.shapes == [image.shape for image in mixture] == [(16, 24, 3), levels[1][1].shape, (16, 24, 3)]
    assert np.array_equal(mixture[1], levels[1][1])
    assert np.array_equal(mixture[2], levels[0][2])
