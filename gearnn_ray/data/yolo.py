"""Objects in YOLO's format: images/{train,val}, labels/{train,val} with a text file for each image, and data.yaml with the names.

A line of a text file is `class x y width height`: a class number, and centre and size of the box as shares of the image. An image
without objects has an empty file, or none.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from gearnn_ray.config.command_line import read_yaml
from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import Dataset
from gearnn_ray.data.files import digest_of, find_files, image_size, read_image, read_lines
from gearnn_ray.data.objects import Objects

_VERSION = 1  # part of every digest: raise it if the same files would give other objects
_OUTSIDE = 1e-3  # by which a box may leave the image, as a share: numbers are rounded


class _Description(BaseModel):
    model_config = ConfigDict(extra="ignore")
    names: list[str] | dict[int, str]


@dataclass(frozen=True)
class YoloSplit:
    """A `gearnn_ray.data.dataset.Split` whose samples have boxes. Every image is a clip of its own."""

    name: str
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    images: tuple[Path, ...]
    shares: tuple[tuple[tuple[float, ...], ...], ...]  # of each image, its lines

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def clips(self) -> tuple[str, ...]:
        return self.ids

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB image [H, W, 3]. Raises `UserError` unless the file is a complete 8-bit PNG or JPEG."""
        return read_image(self.images[index])

    def target(self, index: int) -> Objects:
        """The objects of one image, whose size is read from its file. Raises `UserError` if that cannot be read."""
        height, width = image_size(self.images[index])
        lines = np.array(self.shares[index], np.float64).reshape(-1, 5)
        centre, half = lines[:, 1:3], lines[:, 3:] / 2
        boxes = np.concatenate([centre - half, centre + half], 1) * [width, height, width, height]
        areas = (lines[:, 3] * width * lines[:, 4] * height).astype(np.float32)
        labels = lines[:, 0].astype(np.int64)
        return Objects(boxes.astype(np.float32), labels, areas, np.zeros(len(lines), np.bool_), (height, width))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of names, classes, boxes and the images' bytes. Raises `UserError` for a file that cannot be read."""
        header = ["yolo", _VERSION, self.name, self.class_names, self.ids, self.shares]
        whole = hashlib.sha256(json.dumps(header).encode())
        for path in self.images:
            whole.update(digest_of(path))
        return whole.hexdigest()


def open_yolo(root: Path) -> Dataset:
    """The data in this folder. Raises `UserError` for a file that is missing or not in this format, a class that data.yaml does
    not name, a box outside its image or without area, and a split without any object.
    """
    names = _names(root / "data.yaml")
    return Dataset("yolo", names, train=_split(root, "train", names), val=_split(root, "val", names))


def _names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(f"there is no file {path}: expected one with `names`, the list of the classes.")
    try:
        names = _Description.model_validate(read_yaml(path)).names
    except ValidationError as error:
        raise UserError(f"{path} has no list `names` of the classes: expected one, such as names: [person, car].") from error
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not names or sorted(names) != list(range(len(names))):
        raise UserError(f"{path} numbers its {len(names)} names from {min(names, default=0)}: expected 0, 1, 2 without gaps.")
    return tuple(names[number] for number in range(len(names)))


def _split(root: Path, name: str, names: tuple[str, ...]) -> YoloSplit:
    folder = root / "images" / name
    images, texts = find_files(folder, ".png", ".jpg", ".jpeg"), find_files(root / "labels" / name, ".txt")
    if not images:
        raise UserError(f"{folder} has no images: expected *.png, *.jpg or *.jpeg in it, so add some.")
    if lonely := sorted(texts.keys() - images.keys()):
        raise UserError(f"{texts[lonely[0]]} belongs to no image in {folder}: add {lonely[0]}.jpg or take it out.")
    ids = tuple(sorted(images))
    shares = tuple(_boxes(texts[key], len(names)) if key in texts else () for key in ids)
    if not any(shares):
        raise UserError(f"{root / 'labels' / name} has no object at all: expected at least one line in one file.")
    return YoloSplit(name, names, ids, tuple(images[key] for key in ids), shares)


def _boxes(path: Path, num_classes: int) -> tuple[tuple[float, ...], ...]:
    boxes = []
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            label, x, y, width, height = map(float, line.split())
        except ValueError as error:
            raise UserError(f"{where} is {line!r}: expected a class number, and x, y, width and height of a box.") from error
        if label not in range(num_classes):
            raise UserError(f"{where} has class {label:g}, and data.yaml names {num_classes}: expected 0 to {num_classes - 1}.")
        inside = all(side / 2 - _OUTSIDE <= middle <= 1 - side / 2 + _OUTSIDE for middle, side in ((x, width), (y, height)))
        if not (inside and width > 0 and height > 0):
            raise UserError(f"{where} has the box {line.split(maxsplit=1)[1]}: expected shares of the image, with an area.")
        boxes.append((label, x, y, width, height))
    return tuple(boxes)
