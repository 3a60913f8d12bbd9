"""The same images at several levels, mixed in training: every image of an epoch at one level drawn for it.

Mixed training (§5 of the paper) is one network trained so, an adaptor that levels share one adaptor. Knows nothing of
networks, layers, or what levels do.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gearnn_ray.tasks import segmentation
from gearnn_ray.tasks.segmentation import Image


class Subset(Sequence[Image]):
    """Some images of a sequence, by position."""

    def __init__(self, images: Sequence[Image], positions: Sequence[int]) -> None:
        self._images, self._positions = images, positions
        shapes = getattr(images, "shapes", None)
        self.shapes = [shapes[i] if shapes else images[i].shape for i in positions]

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        return self._images[self._positions[index]]


class Mixture(Sequence[Image]):
    """The same images at several levels, for `mixed_batches`; as a sequence, they take the levels in turn.

    crop: side of the training crop in pixels, taken of each level's own images.
    """

    def __init__(self, levels: Sequence[Sequence[Image]], crop: int) -> None:
        self.levels, self.crop = tuple(levels), crop
        shapes = [_shapes(level) for level in self.levels]
        self.shapes = [shapes[index % len(shapes)][index] for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.levels[0])

    def __getitem__(self, index: Any) -> Any:
        return self.levels[index % len(self.levels)][index]


class _Drawn(Sequence[Image]):
    """Every image at a level of its own."""

    def __init__(self, levels: Sequence[Sequence[Image]], drawn: Mapping[int, int], positions: Sequence[int]) -> None:
        self._levels, self._drawn, self._positions = levels, drawn, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        position = self._positions[index]
        return self._levels[self._drawn[position]][position]


def mixed_batches(
    images: Mixture,
    labels: Sequence[Image],
    batch_size: int,
    crop: tuple[int, int],
    seed: Sequence[int],
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch over all levels: every image once, at a random level; as many steps as with one level.

    Levels of equal frame sizes are mixed within a batch. Others cannot be stacked: a batch is then of one size, and each size
    gets steps in proportion to its levels. Yields x_BCHW uint8 and y_BHW int64; a pure function of `seed`.
    """
    sizes: dict[tuple[Any, ...], list[int]] = {}
    for index, level in enumerate(images.levels):
        sizes.setdefault(tuple(_shapes(level)), []).append(index)
    rng = np.random.default_rng([*seed, 1])  # not the draws that order and crop
    order = rng.permutation(len(images))
    steps = segmentation.steps_per_epoch(len(images), batch_size)
    # every level gets its share of the steps, whatever its size; which get one more, or any where steps are few, is drawn
    rounds = [rng.permutation(len(images.levels)) for _ in range(math.ceil(steps / len(images.levels)))]
    dealt = np.concatenate(rounds)[:steps]
    group_of = {index: group for group in sizes.values() for index in group}
    for step in range(steps):
        positions = order[step * batch_size : (step + 1) * batch_size]
        group = group_of[int(dealt[step])]
        drawn = {int(p): group[int(rng.integers(len(group)))] for p in positions}
        members = [int(p) for p in positions]
        yield from segmentation.training_batches(
            _Drawn(images.levels, drawn, members),
            Subset(labels, members),
            len(members),
            segmentation.crop_size(images.levels[group[0]], images.crop),
            (*seed, 2 + step),
            rank,
            world_size,
        )


def _shapes(images: Sequence[Image]) -> list[tuple[int, ...]]:
    return list(getattr(images, "shapes", None) or (image.shape for image in images))
