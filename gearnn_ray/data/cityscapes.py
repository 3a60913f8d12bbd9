"""Cityscapes (Cordts et al., CVPR 2016) as published: leftImg8bit/{train,val}/<city>/ and gtFine/{train,val}/<city>/."""

from pathlib import Path

from gearnn_ray.data.dataset import IGNORED, Dataset
from gearnn_ray.data.files import AS_IS, FileSplit, file_split, find_files

NUM_LABEL_IDS = 34

# label id of each class, in the order of the train ids 0 … 18 (labels.py of cityscapesScripts)
LABEL_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19, "traffic sign": 20,
    "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31,
    "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
CLASS_NAMES = tuple(LABEL_IDS)


def _train_ids() -> bytes:
    train_ids = bytearray([IGNORED] * NUM_LABEL_IDS) + AS_IS[NUM_LABEL_IDS:]  # larger ids stay as they are, and are refused later
    for train_id, label_id in enumerate(LABEL_IDS.values()):
        train_ids[label_id] = train_id
    return bytes(train_ids)


def open_cityscapes(root: Path) -> Dataset:
    """The Cityscapes data in this folder. Raises `UserError` for an image without a label, or a label without an image."""
    return Dataset("cityscapes", CLASS_NAMES, _split(root, "train"), _split(root, "val"))


def _split(root: Path, name: str) -> FileSplit:
    images_folder, labels_folder = root / "leftImg8bit" / name, root / "gtFine" / name
    class_map = _train_ids()
    images = find_files(images_folder, "_leftImg8bit.png")
    labels = find_files(labels_folder, "_gtFine_labelIds.png")
    if not labels:  # only the prepared train ids
        class_map, labels = AS_IS, find_files(labels_folder, "_gtFine_labelTrainIds.png")
    return file_split(
        "cityscapes",
        name,
        images,
        labels,
        num_classes=len(CLASS_NAMES),
        class_map=class_map,
        # one frame per snippet is labelled; in a city that is one long sequence, labelled frames are seconds apart
        clip=lambda key: key,
        expected=f"{images_folder}/<city>/*_leftImg8bit.png",
    )
