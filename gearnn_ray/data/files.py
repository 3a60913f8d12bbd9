"""A split that lies on disk as one image file and one label PNG per sample: found, paired, read, digested.

Knows nothing about any one layout: `camvid`, `cityscapes` and `folder` say which files belong together.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from gearnn_ray.core.errors import UserError

AS_IS = bytes(range(256))
"""The class map of labels that hold class ids already."""

_VERSION = 1  # to be raised when the same files come to mean other arrays: it is part of every digest


@dataclass(frozen=True)
class FileSplit:
    """A `gearnn_ray.data.dataset.Split` kept in files: sample i is `images[i]` and `labels[i]`.

    `class_map` has 256 entries: the class id, 255 for ignored, of each value a label file can hold.
    """

    kind: str
    name: str
    num_classes: int
    class_map: bytes
    ids: tuple[str, ...]
    clips: tuple[str, ...]
    images: tuple[Path, ...]
    labels: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB image [H, W, 3]. Raises `UserError` for a file that is no whole 8-bit PNG or JPEG."""
        path = self.images[index]
        picture, depth = _decode(path, "PNG", "JPEG")
        if depth > 8:  # Pillow would drop the low bytes in silence, or clip
            raise UserError(f"the image {path} has {depth} bits per channel: expected 8, so convert it.")
        return np.array(picture.convert("RGB"))

    def label(self, index: int) -> NDArray[np.uint8]:
        """Class ids [H, W], 255 = ignored. Raises `UserError` for what is no whole grey or palette PNG."""
        path = self.labels[index]
        picture, depth = _decode(path, "PNG")
        # grey of fewer bits is stretched to 0…255 by Pillow, palette indices are not
        if not (picture.mode == "P" or (picture.mode == "L" and depth == 8)):
            raise UserError(
                f"the label {path} has mode {picture.mode} with {depth} bits per channel: "
                "expected class ids as one channel of 8 bits (grey or palette), so convert it."
            )
        ids: NDArray[np.uint8] = np.frombuffer(self.class_map, np.uint8)[np.asarray(picture)]
        return ids

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over kind, names, clips, classes and the bytes of every file, wherever they lie.

        Reads every file once, on first use. Raises `UserError` naming a file that cannot be read.
        """
        told = (_VERSION, self.kind, self.name, self.num_classes, self.class_map.hex(), self.ids, self.clips)
        whole = hashlib.sha256(json.dumps(told).encode())
        for pair in zip(self.images, self.labels, strict=True):
            for path in pair:
                try:
                    with path.open("rb") as file:
                        # of fixed length, so that no byte can move from one file to the next unseen
                        whole.update(hashlib.file_digest(file, "sha256").digest())
                except OSError as error:
                    raise UserError(f"{path} cannot be read ({error.strerror}): restore the file.") from error
        return whole.hexdigest()


def file_split(
    kind: str,
    name: str,
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    *,
    num_classes: int,
    class_map: bytes = AS_IS,
    clip: Callable[[str], str],
    expected: str,
) -> FileSplit:
    """Pair images and labels by their key, the later id; `clip` tells the clip of a key.

    Raises `UserError` where there is no image (`expected` says what one is called) or a file has no partner.
    """
    if not images:
        raise UserError(f"the {name} split of the {kind} data is empty: expected {expected}, so add some.")
    _refuse_lonely(f"{name} images", images, "label", labels)
    _refuse_lonely(f"{name} labels", labels, "image", images)
    ids = tuple(sorted(images, key=lambda key: (clip(key), key)))  # a clip's frames stand together
    return FileSplit(
        kind=kind,
        name=name,
        num_classes=num_classes,
        class_map=class_map,
        ids=ids,
        clips=tuple(map(clip, ids)),
        images=tuple(images[key] for key in ids),
        labels=tuple(labels[key] for key in ids),
    )


def find_files(folder: Path, *suffixes: str) -> dict[str, Path]:
    """The files below a folder whose names end in one of these, by path from there without that ending.

    Hidden files are passed over. Raises `UserError` where there is no such folder, or two files share a key.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: expected files *{suffixes[0]} in it, so check the layout of the data."
        )
    found: dict[str, Path] = {}
    for directory, _, names in os.walk(folder, onerror=_raise, followlinks=True):
        for file_name in sorted(names):
            suffix = next((end for end in suffixes if file_name.lower().endswith(end.lower())), None)
            if suffix is None or file_name.startswith("."):
                continue
            path = Path(directory, file_name)
            key = path.relative_to(folder).as_posix()[: -len(suffix)]
            if key in found:
                raise UserError(f"{found[key]} and {path} share a name: expected one of each, so rename one.")
            found[key] = path
    return found


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a UTF-8 file, less blank ones at its end. Raises `UserError` for other bytes."""
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: expected lines in UTF-8, so save it as such.") from error


def _refuse_lonely(what: str, files: Mapping[str, Path], partner: str, partners: Mapping[str, Path]) -> None:
    lonely = sorted(files.keys() - partners.keys())
    if lonely:
        raise UserError(
            f"{len(lonely)} of {len(files)} {what} have no {partner}, the first is {files[lonely[0]]}: "
            f"expected one {partner} each, so add what is missing or take these files out."
        )


def _raise(error: OSError) -> NoReturn:
    raise error


def _decode(path: Path, *formats: str) -> tuple[Image.Image, int]:
    """The decoded image and the bits per channel (of an index, with a palette) of its file."""
    expected = " or ".join(formats)
    try:
        content = path.read_bytes()
        # decoding ignores the checksums of a PNG's pixels; `verify` looks at them, and uses the image up
        Image.open(BytesIO(content), formats=formats).verify()
        picture = Image.open(BytesIO(content), formats=formats)
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UnidentifiedImageError):  # its text names a buffer of ours
            reason = "unknown format"
        else:
            reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} is no image ({reason}): expected a whole {expected} file, so replace it.") from error
    # the depth stands at a fixed place of a PNG's first chunk; Pillow's modes do not tell it
    return picture, content[24] if picture.format == "PNG" else 8
