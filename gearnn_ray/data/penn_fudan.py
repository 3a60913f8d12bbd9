"""Penn-Fudan's people in its own layout: PNGImages/*.png, and PedMasks/*_mask.png with 0 for the background and people from 1.

Boxes are taken from the masks: those in Annotation/ count from 1 and are up to 7 pixels off. The data set has no validation part
of its own: here every third image, in the order of the names, is validated on (56 of 170).
"""

from dataclasses import fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import Dataset
from gearnn_ray.data.files import FileSplit, file_split, find_files
from gearnn_ray.data.objects import Objects, boxes_of, rle_of

_EVERY = 3


class PennFudanSplit(FileSplit):
    """A `gearnn_ray.data.dataset.Split` of images with people. Every image is a clip of its own."""

    def target(self, index: int) -> Objects:
        """The people. Raises `UserError` unless the mask is a complete grey or palette PNG with somebody in it."""
        people: NDArray[np.uint8] = super().target(index)
        numbers = [number for number in np.unique(people) if number]
        if not numbers:
            raise UserError(f"the mask {self.labels[index]} has nobody in it: expected people numbered from 1, so correct it.")
        masks = [people == number for number in numbers]
        areas = np.array([mask.sum() for mask in masks], np.float32)
        labels, crowd = np.zeros(len(masks), np.int64), np.zeros(len(masks), np.bool_)
        return Objects(boxes_of(masks), labels, areas, crowd, people.shape, tuple(map(rle_of, masks)))


def open_penn_fudan(root: Path) -> Dataset:
    """The data in this folder. Raises `UserError` for an image or a mask without its partner, and for fewer than three images."""
    images = find_files(root / "PNGImages", ".png")
    masks = find_files(root / "PedMasks", "_mask.png")
    if len(images) < _EVERY:
        raise UserError(
            f"{root / 'PNGImages'} has {len(images)} images: expected at least {_EVERY}, to train and to validate on."
        )
    held_back = sorted(images)[_EVERY - 1 :: _EVERY]
    parts = {"train": [key for key in images if key not in held_back], "val": held_back}
    splits = {}
    for name, keys in parts.items():
        # a mask without an image is refused with the training part
        others = masks.keys() - images.keys() if name == "train" else ()
        paired = file_split(
            "penn-fudan",
            name,
            {key: images[key] for key in keys},
            {key: masks[key] for key in (*keys, *others) if key in masks},
            num_classes=1,
            clip=lambda key: key,
            expected=f"{root}/PNGImages/*.png",
        )
        splits[name] = PennFudanSplit(**{field.name: getattr(paired, field.name) for field in fields(paired)})
    return Dataset("penn-fudan", ("person",), **splits)
