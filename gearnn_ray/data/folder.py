"""A folder of the user's own data: {train,val}/images, {train,val}/labels, and classes.txt with the names of the classes. A label
PNG has the name of its image and holds class ids, 255 = ignored.
"""

from pathlib import Path

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import IGNORED, Dataset
from gearnn_ray.data.files import FileSplit, file_split, find_files, read_lines


def open_folder(root: Path, num_classes: int | None = None) -> Dataset:
    """The data in this folder, with `num_classes` classes or those in its classes.txt, one name per line. The images of a
    sub-folder, or of none, are a clip in the order of their names. Raises `UserError` for an image or a label without its
    partner, and for a number of classes that is missing or contradictory.
    """
    names = _class_names(root / "classes.txt", num_classes)
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


def _class_names(listing: Path, num_classes: int | None) -> tuple[str, ...]:
    if num_classes is not None and (type(num_classes) is not int or not 1 <= num_classes <= IGNORED):
        raise UserError(f"num_classes is {num_classes!r}: expected a whole number from 1 to {IGNORED}.")
    if not listing.is_file():
        if num_classes is None:
            raise UserError(f"there is neither num_classes nor a file {listing}: give one of the two.")
        return tuple(f"class {index}" for index in range(num_classes))
    names = tuple(read_lines(listing))
    if not 1 <= len(names) <= IGNORED or "" in names:
        raise UserError(
            f"{listing} holds {len(names)} lines, {names.count('')} of them blank: "
            f"expected 1 to {IGNORED} names of classes, one a line."
        )
    if num_classes not in (None, len(names)):
        raise UserError(f"num_classes is {num_classes} but {listing} names {len(names)} classes: make them agree.")
    return names
