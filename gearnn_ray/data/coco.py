"""Objects in COCO's format: a JSON file of images, annotations and categories beside the folder of the images.

    annotations/instances_train*.json   train*/    the layout of COCO itself, with val likewise; or
    train/instances.json                train/images/

Polygons, compressed and uncompressed run-length encodings, and crowds are read; annotations without a segmentation have a box
alone. Category ids may have gaps: classes are numbered in the order of the ids.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_masks
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import Dataset
from gearnn_ray.data.files import digest_of, read_image
from gearnn_ray.data.objects import Objects

_VERSION = 1  # part of every digest: raise it if the same files would give other objects
_OUTSIDE = 1.0  # pixels by which a box may leave the image: annotations are rounded
T = TypeVar("T")


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Image(_Entry):
    id: int
    file_name: str
    height: int = Field(ge=1, le=100_000)
    width: int = Field(ge=1, le=100_000)


class _Category(_Entry):
    id: int
    name: str


class _Rle(_Entry):
    size: tuple[int, int]
    counts: list[int] | str


class _Annotation(_Entry):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: Literal[0, 1] = 0
    segmentation: list[list[float]] | _Rle | None = None


class _File(_Entry):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


@dataclass(frozen=True)
class CocoSplit:
    """A `gearnn_ray.data.dataset.Split` whose samples have objects. Every image is a clip of its own."""

    name: str
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    images: tuple[Path, ...]
    every: tuple[Objects, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def clips(self) -> tuple[str, ...]:
        return self.ids

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB image [H, W, 3]. Raises `UserError` unless the file is a complete image of the size in the annotations."""
        pixels, (height, width) = read_image(self.images[index]), self.every[index].size
        if pixels.shape[:2] != (height, width):
            found = f"{self.images[index]} has {pixels.shape[1]}x{pixels.shape[0]} pixels"
            raise UserError(f"{found} and its annotations are of {width}x{height}: give the images that were annotated.")
        return pixels

    def target(self, index: int) -> Objects:
        """The objects of one image."""
        return self.every[index]

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of names, classes, objects and the images' bytes. Raises `UserError` for a file that cannot be read."""
        whole = hashlib.sha256(json.dumps(["coco", _VERSION, self.name, self.class_names, self.ids]).encode())
        for path, objects in zip(self.images, self.every, strict=True):
            for array in (objects.boxes, objects.labels, objects.areas, objects.crowd):
                whole.update(hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest())
            whole.update(hashlib.sha256(repr((objects.size, objects.rles)).encode()).digest())
            whole.update(digest_of(path))
        return whole.hexdigest()


def open_coco(root: Path) -> Dataset:
    """The data in this folder. Masks are there if every object that is not a crowd has one, in both splits. Raises `UserError`
    for a file that is missing or not in COCO's format, an annotation of an image or category that the file does not have, a box
    outside its image or without area, a mask that does not decode, an image named twice, and a split without any object.
    """
    files = {name: _find(root, name) for name in ("train", "val")}
    read = {name: _read(path) for name, (path, _) in files.items()}
    classes = {name: _classes(content, files[name][0]) for name, content in read.items()}
    if classes["train"] != classes["val"]:
        raise UserError(f"{files['train'][0]} and {files['val'][0]} have different categories: expected the same ids and names.")
    with_masks = all(a.segmentation for content in read.values() for a in content.annotations if not a.iscrowd)
    splits = [_split(name, read[name], *files[name], classes[name], with_masks) for name in files]
    return Dataset("coco", tuple(classes["train"].values()), train=splits[0], val=splits[1])


def _find(root: Path, name: str) -> tuple[Path, Path]:
    """The annotations and the images' folder of a split."""
    own = root / name / "instances.json"
    if own.is_file():
        return own, root / name / "images"
    found = sorted((root / "annotations").glob(f"instances_{name}*.json"))
    if len(found) != 1:
        raise UserError(
            f"{root} has {len(found)} files annotations/instances_{name}*.json and no {name}/instances.json: expected one of "
            "either, so check the layout of the data."
        )
    return found[0], root / found[0].stem.removeprefix("instances_")


def _read(path: Path) -> _File:
    try:
        return _File.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path} is not in COCO's format ({where}: {first['msg']}): correct it or give another.") from error


def _classes(content: _File, path: Path) -> dict[int, str]:
    """Names by category id, in the order of the ids."""
    _refuse_twice([c.id for c in content.categories], f"{path} declares the category id")
    if not content.categories:
        raise UserError(f"{path} declares no category: add the list `categories`.")
    return {category.id: category.name for category in sorted(content.categories, key=lambda c: c.id)}


def _split(name: str, content: _File, path: Path, folder: Path, classes: Mapping[int, str], with_masks: bool) -> CocoSplit:
    images = sorted(content.images, key=lambda image: image.file_name)
    _refuse_twice([image.id for image in images], f"{path} has the image id")
    _refuse_twice([image.file_name for image in images], f"{path} has the image")
    by_image: dict[int, list[_Annotation]] = defaultdict(list)
    for annotation in content.annotations:
        by_image[annotation.image_id].append(annotation)
    if unknown := by_image.keys() - {image.id for image in images}:
        raise UserError(f"{path} annotates the image id {min(unknown)}, which it does not list: is it of another data set?")
    if not any(not annotation.iscrowd for annotation in content.annotations):
        raise UserError(f"{path} has no object at all: expected at least one annotation that is not a crowd.")
    paths = tuple(folder / image.file_name for image in images)
    missing = [each for each in paths if not each.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(paths)} images of {path} are missing, the first is {missing[0]}: add them.")
    numbers = {category: number for number, category in enumerate(classes)}
    every = tuple(_objects(image, by_image[image.id], numbers, path, with_masks) for image in images)
    return CocoSplit(name, tuple(classes.values()), tuple(image.file_name for image in images), paths, every)


def _objects(image: _Image, annotations: list[_Annotation], numbers: Mapping[int, int], path: Path, with_masks: bool) -> Objects:
    where, boxes, rles = f"{path}: image {image.file_name}", [], []
    for annotation in annotations:
        if annotation.category_id not in numbers:
            raise UserError(f"{where} has category id {annotation.category_id}, which the file does not declare: add it there.")
        left, top, wide, high = annotation.bbox
        inside = left >= -_OUTSIDE and top >= -_OUTSIDE
        inside = inside and left + wide <= image.width + _OUTSIDE and top + high <= image.height + _OUTSIDE
        if not (all(map(math.isfinite, annotation.bbox)) and inside and wide > 0 and high > 0):
            found = ", ".join(f"{side:g}" for side in annotation.bbox)
            raise UserError(
                f"{where} ({image.width}x{image.height}) has the box {found}: expected left, top, width and height inside the "
                "image, with an area."
            )
        boxes.append((left, top, left + wide, top + high))
        if with_masks:
            rles.append(_rle(annotation.segmentation, annotation, image, where))
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    areas = [a.bbox[2] * a.bbox[3] if a.area is None else a.area for a in annotations]
    return Objects(
        corners,
        np.array([numbers[a.category_id] for a in annotations], np.int64),
        np.array(areas, np.float32),
        np.array([a.iscrowd for a in annotations], np.bool_),
        (image.height, image.width),
        tuple(rles) if with_masks else None,
    )


def _rle(segmentation: list[list[float]] | _Rle | None, annotation: _Annotation, image: _Image, where: str) -> bytes:
    """The mask of an annotation as compressed RLE; of a crowd without one, its box."""
    height, width = image.height, image.width
    if isinstance(segmentation, _Rle) and segmentation.size != (height, width):
        found, expected = (f"{w}x{h}" for h, w in (segmentation.size, (height, width)))
        raise UserError(f"{where} has a mask of {found} for an image of {expected}: expected equal sizes.")
    if isinstance(segmentation, _Rle):
        given = segmentation.counts
        lengths = _run_lengths(given) if isinstance(given, str) else given
        if min(lengths, default=0) < 0 or sum(lengths) != height * width:
            raise UserError(f"{where} has a mask whose run lengths do not add up to {width}x{height} pixels: write it again.")
        encoded: dict[str, Any] = coco_masks.frPyObjects({"size": [height, width], "counts": lengths}, height, width)
    else:
        polygons = segmentation or [_outline(annotation.bbox)]
        if any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
            raise UserError(f"{where} has a polygon that is not three or more pairs of x and y: correct it or take it out.")
        encoded = coco_masks.merge(coco_masks.frPyObjects(polygons, height, width))
    counts: bytes = encoded["counts"]
    return counts


def _run_lengths(text: str) -> list[int]:
    """The run lengths of a compressed RLE; empty if it is none. pycocotools itself reads beyond the end of a damaged one.

    A length is written in groups of five bits, the lowest first, each plus 48 as a character; bit 5 says that another follows.
    From the fourth on it is the difference from the last but one.
    """
    lengths: list[int] = []
    value, shift = 0, 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift > 30:
            return []
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (group & 16) >> 4 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value, shift = 0, 0
    return [] if shift else lengths


def _outline(bbox: tuple[float, float, float, float]) -> list[float]:
    left, top, wide, high = bbox
    return [left, top, left + wide, top, left + wide, top + high, left, top + high]


def _refuse_twice(values: list[T], what: str) -> None:
    value, times = Counter(values).most_common(1)[0] if values else (None, 0)
    if times > 1:
        raise UserError(f"{what} {value} {times} times: expected each once, so take the others out.")
