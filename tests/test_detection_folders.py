"""Folders in the formats of Penn-Fudan and YOLO: tiny trees, and the sentence for each mistake."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import Dataset, open_dataset

H, W = 40, 60


def opened(kind: str, root: Path) -> Dataset:
    return open_dataset(kind, str(root), task="detection")


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def picture(seed: int, height: int = H, width: int = W) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# ── Penn-Fudan ───────────────────────────────────────────────────────────────────────────────────────────────────────


def penn_fudan(root: Path, images: int = 7) -> Path:
    """Images of distinct sizes with one or two people, in front of each other."""
    for index in range(images):
        name, height = f"FudanPed{index:05d}", H + index
        people = np.zeros((height, W), np.uint8)
        people[5:25, 10:20] = 1
        if index % 2:
            people[10:30, 15:25] = 2
        save(root / "PNGImages" / f"{name}.png", picture(index, height))
        save(root / "PedMasks" / f"{name}_mask.png", people)
        text = root / "Annotation" / f"{name}.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text('# Compatible with PASCAL Annotation Version 1.00\n"PASpersonWalking"\n')
    return root


def test_penn_fudans_people_have_the_boxes_of_their_masks(tmp_path: Path) -> None:
    data = opened("penn-fudan", penn_fudan(tmp_path))
    assert data.class_names == ("person",)
    assert data.val.ids == ("FudanPed00002", "FudanPed00005")
    assert len(data.train) == 5
    objects = data.val.target(1)
    assert objects.boxes.tolist() == [[10, 5, 20, 25], [15, 10, 25, 30]]
    assert objects.labels.tolist() == [0, 0]
    assert objects.areas.tolist() == [200 - 75, 200]
    assert objects.size == data.val.image(1).shape[:2] == (H + 5, W)
    assert objects.masks().sum((1, 2)).tolist() == [125, 200]
    assert not objects.crowd.any()
    assert data.train.digest != data.val.digest
    assert opened("penn-fudan", penn_fudan(tmp_path / "again")).train.digest == data.train.digest


@pytest.mark.parametrize("number", [0, 2])  # to train on, to validate on
def test_penn_fudan_refuses_a_file_without_its_partner(number: int, tmp_path: Path) -> None:
    mask = penn_fudan(tmp_path) / "PedMasks" / f"FudanPed{number:05d}_mask.png"
    mask.unlink()
    with pytest.raises(UserError, match=rf"images have no label, the first is .*FudanPed0000{number}\.png"):
        opened("penn-fudan", tmp_path)
    penn_fudan(tmp_path)
    (tmp_path / "PNGImages" / f"FudanPed{number:05d}.png").unlink()
    with pytest.raises(UserError, match=rf"labels have no image, the first is .*FudanPed0000{number}_mask\.png"):
        opened("penn-fudan", tmp_path)


def test_penn_fudan_refuses_a_mask_with_nobody_and_too_few_images(tmp_path: Path) -> None:
    penn_fudan(tmp_path)
    save(tmp_path / "PedMasks/FudanPed00000_mask.png", np.zeros((H, W), np.uint8))
    with pytest.raises(UserError, match="has nobody in it"):
        opened("penn-fudan", tmp_path).train.target(0)
    with pytest.raises(UserError, match="has 2 images: expected at least 3"):
        opened("penn-fudan", penn_fudan(tmp_path / "few", 2))
    with pytest.raises(UserError, match="PNGImages is not a folder"):
        opened("penn-fudan", tmp_path / "PNGImages")


# ── YOLO ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def yolo(root: Path, names: str = "names: [person, car]") -> Path:
    """Two images with objects, and one without a text file."""
    root.mkdir(exist_ok=True)
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\n{names}\n")
    for split in ("train", "val"):
        for seed, name in enumerate(("a", "b", "sub/c")):
            save(root / f"images/{split}/{name}.png", picture(seed))
        labels = root / "labels" / split
        labels.mkdir(parents=True, exist_ok=True)
        (labels / "a.txt").write_text("1 0.5 0.5 0.5 0.25\n0 0.125 0.25 0.25 0.5\n")
        (labels / "b.txt").write_text("")
    return root


@pytest.mark.parametrize("names", ["names: [person, car]", "names: {1: car, 0: person}"])
def test_yolos_boxes_in_pixels(names: str, tmp_path: Path) -> None:
    data = opened("yolo", yolo(tmp_path, names))
    assert data.class_names == ("person", "car")
    assert data.train.ids == ("a", "b", "sub/c")
    objects = data.train.target(0)
    assert objects.labels.tolist() == [1, 0]
    assert objects.boxes.tolist() == [[15, 15, 45, 25], [0, 0, 15, 20]]
    assert objects.areas.tolist() == [300, 300]
    assert objects.rles is None
    assert [len(data.val.target(index)) for index in range(3)] == [2, 0, 0]
    assert data.train.image(2).shape == (H, W, 3)
    other = yolo(tmp_path / "other", names)
    assert opened("yolo", other).train.digest == data.train.digest
    (other / "labels/train/b.txt").write_text("0 0.5 0.5 0.1 0.1")
    assert opened("yolo", other).train.digest != data.train.digest


def _line(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "labels/train/a.txt").write_text(text)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a box outside": (_line("1 0.9 0.5 0.5 0.25"), "a.txt, line 1 has the box 0.9 0.5 0.5 0.25: expected shares"),
    "pixels": (_line("1 30 20 30 10"), "has the box 30 20 30 10: expected shares"),
    "no area": (_line("1 0.5 0.5 0 0.25"), "has the box 0.5 0.5 0 0.25"),
    "no number": (_line("1 nan 0.5 0.5 0.25"), "has the box nan"),
    "another class": (
        _line("0 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1 0.1"),
        "line 2 has class 2, and data.yaml names 2: expected 0 to 1",
    ),
    "half a class": (_line("0.5 0.5 0.5 0.1 0.1"), "has class 0.5"),
    "a polygon": (_line("0 0.1 0.1 0.2 0.1 0.2 0.2"), "expected a class number, and x, y, width and height of a box"),
    "words": (_line("person 0.1 0.1 0.2 0.1"), "expected a class number"),
    "no object": (_line(""), "labels/train has no object at all"),
    "a label without an image": (lambda r: (r / "labels/val/d.txt").write_text(""), "d.txt belongs to no image"),
    "no images": (lambda r: [p.unlink() for p in (r / "images/val").rglob("*.png")], "images/val has no images"),
    "no names": (lambda r: (r / "data.yaml").write_text("nc: 2"), "has no list `names`"),
    "names with a gap": (lambda r: (r / "data.yaml").write_text("names: {0: a, 2: b}"), "expected 0, 1, 2 without gaps"),
    "no data.yaml": (lambda r: (r / "data.yaml").unlink(), "there is no file"),
    "an unreadable data.yaml": (lambda r: (r / "data.yaml").write_text("names: ["), "is not readable as YAML"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_one_sentence(mistake: str, tmp_path: Path) -> None:
    change, found = BAD[mistake]
    change(yolo(tmp_path / "data"))
    with pytest.raises(UserError) as caught:
        opened("yolo", tmp_path / "data")
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (yolo(tmp_path) / "images/train/a.png").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"a\.png is no image"):
        opened("yolo", tmp_path).train.target(0)
