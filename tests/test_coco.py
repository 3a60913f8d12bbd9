"""Folders in COCO's format: tiny trees with crowds, polygons, both encodings of masks, and the sentence for each mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_masks

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.coco import _run_lengths
from gearnn_ray.data.dataset import Dataset, open_dataset

H, W = 40, 60
SHARED = Path(__file__).parents[2] / "shared" / "data"
CATEGORIES = [{"id": 44, "name": "bottle"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
SQUARE = np.zeros((H, W), np.uint8)
SQUARE[5:15, 10:30] = 1


def rle(mask: np.ndarray, compressed: bool) -> dict[str, Any]:
    if compressed:
        encoded = coco_masks.encode(np.asfortranarray(mask))
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [-1]])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def annotation(
    image: int, category: int, segmentation: Any, box: tuple[float, ...] = (10, 5, 20, 10), **more: Any
) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": list(box), "segmentation": segmentation, **more}


def content() -> dict[str, Any]:
    """Three images: one with each form of a mask, one with a crowd, one without objects."""
    triangle, other = [10.0, 5.0, 30.0, 5.0, 30.0, 15.0], [40.0, 20.0, 50.0, 20.0, 50.0, 30.0]
    annotations = [
        annotation(7, 44, [[10, 5, 30, 5, 30, 15, 10, 15]], area=200.0),
        annotation(7, 1, [triangle, other], (10, 5, 40, 25), area=150.0, iscrowd=0),
        annotation(7, 3, rle(SQUARE, compressed=True)),
        annotation(2, 3, rle(SQUARE, compressed=False), iscrowd=1, area=200.0),
        annotation(2, 1, [triangle]),
    ]
    images = [{"id": i, "file_name": f"{n}.png", "height": H, "width": W} for i, n in ((7, "b"), (2, "a"), (5, "c"))]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": [*CATEGORIES]}


def write(root: Path, change: Callable[[dict[str, Any]], object] = lambda _: None, official: bool = False) -> Path:
    """Both splits; `change` is applied to the training annotations."""
    for split in ("train", "val"):
        data = content()
        if split == "train":
            change(data)
        folder = root / f"{split}2017" if official else root / split / "images"
        listing = root / "annotations" / f"instances_{split}2017.json" if official else root / split / "instances.json"
        folder.mkdir(parents=True)
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(json.dumps(data))
        for seed, name in enumerate("abc"):
            pixels = np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)
            Image.fromarray(pixels).convert("L" if name == "c" else "RGB").save(folder / f"{name}.png")
    return root


def opened(root: Path) -> Dataset:
    return open_dataset("coco", str(root), task="detection")


@pytest.mark.parametrize("official", [True, False])
def test_objects_of_every_form(tmp_path: Path, official: bool) -> None:
    data = opened(write(tmp_path, official=official))
    assert data.class_names == ("person", "car", "bottle")  # by id, whose gaps are closed
    assert data.train.ids == data.train.clips == ("a.png", "b.png", "c.png")
    objects = data.train.target(1)
    assert objects.labels.tolist() == [2, 0, 1]
    assert objects.boxes.tolist() == [[10, 5, 30, 15], [10, 5, 50, 30], [10, 5, 30, 15]]
    assert objects.areas.tolist() == [200, 150, 200]  # the last one has none of its own: its box's
    square, two_triangles, encoded = objects.masks()
    np.testing.assert_array_equal(square, SQUARE)
    np.testing.assert_array_equal(encoded, SQUARE)
    assert two_triangles[:, :35].any()
    assert two_triangles[:, 35:].any()
    crowded = data.train.target(0)
    assert crowded.crowd.tolist() == [True, False]
    np.testing.assert_array_equal(crowded.masks()[0], SQUARE)
    empty = data.train.target(2)
    assert len(empty) == 0
    assert (empty.boxes.shape, empty.masks().shape) == ((0, 4), (0, H, W))
    assert data.train.image(2).shape == (H, W, 3)


def test_without_segmentations_there_are_boxes_only(tmp_path: Path) -> None:
    data = opened(write(tmp_path, lambda c: c["annotations"][1].pop("segmentation")))
    assert data.train.target(1).rles is None
    assert data.val.target(1).rles is None
    assert len(data.train.target(1)) == 3


def test_the_digest_is_of_content_and_not_of_paths(tmp_path: Path) -> None:
    digests = {opened(write(tmp_path / name)).train.digest for name in "ab"}
    digests.add(opened(write(tmp_path / "c", official=True)).train.digest)
    assert len(digests) == 1
    for name, change in {
        "box": lambda c: c["annotations"][0].update(bbox=[10, 5, 20, 9]),
        "class": lambda c: c["annotations"][0].update(category_id=1),
        "crowd": lambda c: c["annotations"][0].update(iscrowd=1),
        "area": lambda c: c["annotations"][0].update(area=199),
        "mask": lambda c: c["annotations"][0].update(segmentation=[[10, 5, 30, 5, 30, 15]]),
    }.items():
        digests.add(opened(write(tmp_path / name, change)).train.digest)
    assert len(digests) == 6


def _set(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda c: c["annotations"][0].update(values)


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a box outside": (_set(bbox=[50, 5, 20, 10]), "b.png (60x40) has the box 50, 5, 20, 10: expected"),
    "a box without area": (_set(bbox=[10, 5, 0, 10]), "has the box 10, 5, 0, 10"),
    "a box without an end": (lambda c: c["annotations"][0].update(bbox=[float("nan"), 5, 20, 10]), "has the box nan"),
    "a box of three": (_set(bbox=[10, 5, 20]), "annotations.0.bbox"),
    "an unknown category": (_set(category_id=2), "b.png has category id 2, which the file does not declare"),
    "an unknown image": (_set(image_id=99), "annotates the image id 99, which it does not list"),
    "a mask of another size": (_set(segmentation=rle(np.eye(4, dtype=np.uint8), True)), "a mask of 4x4 for an image of 60x40"),
    "run lengths too short": (_set(segmentation={"size": [H, W], "counts": [3, 4]}), "do not add up to 60x40"),
    "a negative run length": (_set(segmentation={"size": [H, W], "counts": [H * W + 1, -1]}), "do not add up"),
    "an RLE cut off": (_set(segmentation={"size": [H, W], "counts": rle(SQUARE, True)["counts"][:-1]}), "do not add up"),
    "an empty RLE": (_set(segmentation={"size": [H, W], "counts": ""}), "do not add up"),
    "a polygon of two points": (_set(segmentation=[[1, 2, 3, 4]]), "a polygon that is not three or more pairs"),
    "an odd polygon": (_set(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "a polygon that is not three or more pairs"),
    "an image twice": (lambda c: c["images"].append({**c["images"][0], "id": 8}), "has the image b.png 2 times"),
    "an image id twice": (lambda c: c["images"].append({**c["images"][0], "file_name": "d.png"}), "has the image id 7 2 times"),
    "a category twice": (lambda c: c["categories"].append({"id": 1, "name": "man"}), "declares the category id 1 2 times"),
    "other categories": (lambda c: c["categories"].append({"id": 2, "name": "bicycle"}), "have different categories"),
    "no categories": (lambda c: c.update(categories=[]), "declares no category"),
    "no object": (lambda c: c.update(annotations=[]), "has no object at all"),
    "only crowds": (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "has no object at all"),
    "a lost image": (lambda c: c["images"].append({"id": 8, "file_name": "d.png", "height": H, "width": W}), "1 of 4 images"),
    "no annotations": (lambda c: c.pop("annotations"), "is not in COCO's format (annotations: Field required)"),
    "a list": (lambda c: c.update(images={}), "is not in COCO's format (images"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_one_sentence(mistake: str, tmp_path: Path) -> None:
    change, found = BAD[mistake]
    with pytest.raises(UserError) as caught:
        opened(write(tmp_path, change))
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_the_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 0 files annotations/instances_train\*\.json and no train/instances\.json"):
        opened(tmp_path)
    with pytest.raises(UserError, match="data of kind coco has no targets for segmentation: use scenes or camvid"):
        open_dataset("coco", str(tmp_path))
    with pytest.raises(UserError, match="data of kind camvid has no targets for detection: use scenes or coco"):
        open_dataset("camvid", str(tmp_path), task="detection")
    write(tmp_path)
    Image.new("RGB", (W, H + 1)).save(tmp_path / "train/images/a.png")
    with pytest.raises(UserError, match=r"a\.png has 60x41 pixels and its annotations are of 60x40"):
        opened(tmp_path).train.image(0)
    (tmp_path / "train/instances.json").write_bytes(b'{"images": [')
    with pytest.raises(UserError, match="is not in COCO's format"):
        opened(tmp_path)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), height=st.integers(1, 40), width=st.integers(1, 300))
def test_compressed_run_lengths_are_pycocotools(seed: int, share: float, height: int, width: int) -> None:
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    assert _run_lengths(rle(mask, compressed=True)["counts"]) == rle(mask, compressed=False)["counts"]


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(min_codepoint=40, max_codepoint=130), max_size=30))
def test_damaged_run_lengths_end_in_a_list_of_numbers(text: str) -> None:
    assert all(isinstance(length, int) for length in _run_lengths(text))


@pytest.mark.skipif(not (SHARED / "coco128").is_dir(), reason="the COCO images are not on this machine")
def test_real_annotations(tmp_path: Path) -> None:
    for name, folder in (("train", "coco128"), ("val", "cocoval128")):
        (tmp_path / name).symlink_to(SHARED / folder)
    data = opened(tmp_path)
    assert (len(data.train), len(data.val), data.num_classes) == (128, 128, 80)
    every = [data.train.target(index) for index in range(128)]
    assert sum(map(len, every)) == 939
    assert sum(int(each.crowd.sum()) for each in every) == 10
    assert sum(len(each) == 0 for each in every) == 2
    assert all(data.train.image(index).shape == (*every[index].size, 3) for index in range(0, 128, 8))
