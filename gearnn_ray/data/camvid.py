"""CamVid (Brostow et al., "Semantic object classes in video", 2009) with the 11 classes of Badrinarayanan et al. (SegNet), in the
layout of the SegNet tutorial: train/ trainannot/ val/ valannot/ train.txt val.txt.
"""

from pathlib import Path, PurePosixPath

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import IGNORED, Dataset
from gearnn_ray.data.files import AS_IS, FileSplit, file_split, find_files, read_lines

CLASS_NAMES = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
UNLABELLED = 11
_CLASS_MAP = AS_IS[:UNLABELLED] + bytes([IGNORED]) + AS_IS[UNLABELLED + 1 :]


def open_camvid(root: Path) -> Dataset:
    """The CamVid data in this folder. Raises `UserError` for missing files and incorrect listings."""
    return Dataset("camvid", CLASS_NAMES, _split(root, "train"), _split(root, "val"))


def _split(root: Path, name: str) -> FileSplit:
    listing = root / f"{name}.txt"
    if listing.is_file():
        images, labels = _listed(root, listing)
    else:
        images, labels = find_files(root / name, ".png"), find_files(root / f"{name}annot", ".png")
    return file_split(
        "camvid",
        name,
        images,
        labels,
        num_classes=len(CLASS_NAMES),
        class_map=_CLASS_MAP,
        clip=lambda key: key.partition("_")[0],  # 0001TP_006690 is a frame of the recording 0001TP
        expected=f"line in {listing}" if listing.is_file() else f"{root / name}/*.png",
    )


def _listed(root: Path, listing: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and labels by the image's name, paired by the lines "<image> <label>" of the listing."""
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for number, line in enumerate(read_lines(listing), 1):
        fields = line.split()
        if len(fields) != 2:
            raise UserError(f"line {number} of {listing} is {line!r}: expected an image and its label, so correct it.")
        # the leading folders are those of the machine where the list was written
        image, label = (root.joinpath(*PurePosixPath(field).parts[-2:]) for field in fields)
        if image.stem in images:
            raise UserError(f"line {number} of {listing} repeats {image.stem}: expected it once, so remove the line.")
        images[image.stem], labels[image.stem] = image, label
    missing = [path for path in (*images.values(), *labels.values()) if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the images and labels listed in {listing} do not exist, "
            f"the first is {missing[0]}: add these files or remove their lines."
        )
    return images, labels
