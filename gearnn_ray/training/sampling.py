"""Training batches: images, their levels, and the share of each worker. An epoch is a pure function of its seed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gearnn_ray.tasks.base import Batch, Image, Task, Window, tensors_of
from gearnn_ray.training.predict import image_at_size


class Subset(Sequence[Any]):
    """Some images, or some targets, of a sequence, by position."""

    def __init__(self, items: Sequence[Any], positions: Sequence[int]) -> None:
        self._items, self._positions = items, positions

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of images alone."""
        shapes = getattr(self._items, "shapes", None)
        return [shapes[i] if shapes else self._items[i].shape for i in self._positions]

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        return self._items[self._positions[index]]


class AtSize(Sequence[Image]):
    """Images scaled to one size (height, width) when they are read."""

    def __init__(self, images: Sequence[Image], size: tuple[int, int]) -> None:
        self._images, self._size = images, size

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every image, without reading any."""
        return [(*self._size, 3)] * len(self)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        return image_at_size(self._images[index], self._size)


class Mixture(Sequence[Image]):
    """The same images at several levels, taken in turn. crop: side of the crop in pixels, limited by each level's own images."""

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


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches of an epoch, at least one."""
    return max(1, images // batch_size)


def crop_size(task: Task, images: Sequence[Image], crop: int) -> tuple[int, int]:
    """Height and width of the task's training crop, of the side that the recipe asks for."""
    return task.crop_size(_shapes(images), crop)


def training_batches(
    task: Task,
    images: Sequence[Image],
    targets: Sequence[Any],
    batch_size: int,
    crop: tuple[int, int],
    seed: Sequence[int],
    rank: int = 0,
    world_size: int = 1,
    undistorted: Sequence[Image] | None = None,
) -> Iterator[Batch]:
    """One epoch: every image once in random order, augmented; an incomplete last batch is left out, but a set smaller than one
    batch makes one. Images of a `Mixture` are drawn at a random level each. A pure function of `seed`: worker `rank` of
    `world_size` gets its share of each batch, augmented as it would be alone. crop: height and width in pixels (`crop_size`),
    unused by a mixture. undistorted: the same images before distortion, whose windows the batches get too.
    """
    if isinstance(images, Mixture):
        yield from _mixed_batches(task, images, targets, batch_size, seed, rank, world_size, undistorted)
        return
    rng = np.random.default_rng(list(seed))
    order = rng.permutation(len(images))
    draws_N3 = rng.random((len(images), 3))
    for start in range(0, steps_per_epoch(len(images), batch_size) * batch_size, batch_size):
        share = range(start + rank, min(start + batch_size, len(order)), world_size)
        samples = [(images[order[position]], targets[order[position]], draws_N3[position]) for position in share]
        batch = task.collate([task.augment(image, target, crop, draws) for image, target, draws in samples])
        if undistorted is not None:
            clean = [undistorted[order[position]] for position in share]
            windows = [
                Window.drawn(image.shape, crop, draws).scaled(image.shape, whole.shape).of(whole)
                for (image, _, draws), whole in zip(samples, clean, strict=True)
            ]
            batch = replace(batch, undistorted=tensors_of(windows))
        yield batch


def _mixed_batches(
    task: Task,
    images: Mixture,
    targets: Sequence[Any],
    batch_size: int,
    seed: Sequence[int],
    rank: int,
    world_size: int,
    undistorted: Sequence[Image] | None,
) -> Iterator[Batch]:
    """As many steps as with one level. A batch has frames of one size; each size gets steps in proportion to its levels."""
    sizes: dict[tuple[Any, ...], list[int]] = {}
    for index, level in enumerate(images.levels):
        sizes.setdefault(tuple(_shapes(level)), []).append(index)
    rng = np.random.default_rng([*seed, 1])  # not the draws that order and crop
    order = rng.permutation(len(images))
    steps = steps_per_epoch(len(images), batch_size)
    # every level gets its share of the steps, whatever its size; which get one more, or any where steps are few, is drawn
    rounds = [rng.permutation(len(images.levels)) for _ in range(math.ceil(steps / len(images.levels)))]
    dealt = np.concatenate(rounds)[:steps]
    group_of = {index: group for group in sizes.values() for index in group}
    for step in range(steps):
        positions = [int(p) for p in order[step * batch_size : (step + 1) * batch_size]]
        group = group_of[int(dealt[step])]
        drawn = {position: group[int(rng.integers(len(group)))] for position in positions}
        yield from training_batches(
            task,
            _Drawn(images.levels, drawn, positions),
            Subset(targets, positions),
            len(positions),
            crop_size(task, images.levels[group[0]], images.crop),  # of all of a level's images, whichever are drawn
            (*seed, 2 + step),
            rank,
            world_size,
            None if undistorted is None else Subset(undistorted, positions),
        )


def _shapes(images: Sequence[Image]) -> list[tuple[int, ...]]:
    return list(getattr(images, "shapes", None) or (image.shape for image in images))
