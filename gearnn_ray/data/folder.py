"""A folder of the user's own data: {train,val}/images, {train,val}/labels, and classes.txt with the names of the classes. A label
PNG has the name of its image and holds class ids, 255 = ignored.
"""

from pathlib import Path

from gearnn_ray.data.dataset import Dataset
from gearnn_ray.data.files import FileSplit, class_names, file_split, find_files


def open_folder(root: Path, num_classes: int | None = None) -> Dataset:
    """The data in this folder, with `num_classes` classes or those in its classes.txt, one name per line. The images of a
    sub-folder, or of none, are a clip in the order of their names. Raises `UserError` for an image or a label without its
    partner, and for a number of classes that is missing or contradictory.
    """
    names = class_names(root / "classes.txt", num_classes)
    return Dataset("folder", names, _split(root, "train", len(names)), _split(root, "val", len(names)))


def _split(root: Path, name: str, num_classes: int) -> FileSplit:
    folder = root / name / "images"
    return file_split(
        "folder",
        name,
        find_files(folder, ".png", ".jpg", ".jpeg"),
        find_files(root / name / "labels", ".png"),
        num_classes=num_classes,
        clip=lambda key: key.rpartition("/")[0] or ".",
        expected=f"{folder}/*.png, *.jpg or *.jpeg",
    )
