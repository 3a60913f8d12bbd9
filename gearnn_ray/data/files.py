"""A split on disk with one image file and one label PNG per sample, in any layout: finds, pairs, reads and digests the files."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from gearnn_ray.core.errors import UserError

AS_IS = bytes(range(256))  # the class map of label files that already hold class ids
_MOST_CLASSES = 255  # class ids are bytes, and 255 is ignored
_VERSION = 1  # part of every digest: raise it if the same files would give other arrays


@dataclass(frozen=True)
class FileSplit:
    """A `gearnn_ray.data.dataset.Split` in files. `class_map`: the class id, or 255, of each of the 256 label values."""

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
        """RGB image [H, W, 3]. Raises `UserError` unless the file is a complete 8-bit PNG or JPEG."""
        return read_image(self.images[index])

    def target(self, index: int) -> Any:
        """Class ids uint8 [H, W], 255 = ignored. Raises `UserError` unless the file is a complete grey or palette PNG."""
        path = self.labels[index]
        picture, depth = _decode(path, "PNG")
        # Pillow stretches grey of fewer bits to 0…255, but not palette indices
        if not (picture.mode == "P" or (picture.mode == "L" and depth == 8)):
            raise UserError(
                f"the label {path} has mode {picture.mode} with {depth} bits per channel: "
                "expected class ids as one channel of 8 bits (grey or palette), so convert it."
            )
        ids: NDArray[np.uint8] = np.frombuffer(self.class_map, np.uint8)[np.asarray(picture)]
        return ids

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of kind, names, clips, classes and files' bytes, not paths. Raises `UserError` for an unreadable file."""
        header = (_VERSION, self.kind, self.name, self.num_classes, self.class_map.hex(), self.ids, self.clips)
        whole = hashlib.sha256(json.dumps(header).encode())
        for pair in zip(self.images, self.labels, strict=True):
            for path in pair:
                whole.update(digest_of(path))
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
    """Pair images and labels by their key, which becomes the id; `clip` maps a key to its clip. Raises `UserError` if there is no
    image (`expected` describes an image's name) or a file has no partner.
    """
    if not images:
        raise UserError(f"the {name} split of the {kind} data is empty: expected {expected}, so add some.")
    _refuse_lonely(f"{name} images", images, "label", labels)
    _refuse_lonely(f"{name} labels", labels, "image", images)
    ids = tuple(sorted(images, key=lambda key: (clip(key), key)))  # the frames of a clip are adjacent
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


def digest_of(path: Path) -> bytes:
    """SHA-256 of a file, 32 bytes: in a digest of several files, bytes that move from one to the next change the result. Raises
    `UserError` for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore the file.") from error


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, from the file's header. Raises `UserError` unless it is a PNG or JPEG."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no image: expected a whole PNG or JPEG file, so replace it.") from error


def read_image(path: Path) -> NDArray[np.uint8]:
    """RGB image [H, W, 3]. Raises `UserError` unless the file is a complete 8-bit PNG or JPEG."""
    picture, depth = _decode(path, "PNG", "JPEG")
    if depth > 8:  # Pillow would silently drop the low bytes, or clip
        raise UserError(f"the image {path} has {depth} bits per channel: expected 8, so convert it.")
    return np.array(picture.convert("RGB"))


def find_files(folder: Path, *suffixes: str) -> dict[str, Path]:
    """The files below a folder with one of these suffixes, by relative path without the suffix. Hidden files are skipped. Raises
    `UserError` if the folder does not exist, or two files have the same key.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: expected files *{suffixes[0]} in it, so check the layout of the data.")
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
    """The stripped lines of a UTF-8 file, without blank ones at its end. Raises `UserError` unless it is UTF-8."""
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: expected lines in UTF-8, so save it as such.") from error


def class_names(listing: Path, num_classes: int | None) -> tuple[str, ...]:
    """`num_classes` classes, or those in the file `listing`, one name per line. Raises `UserError` for a number of classes that
    is missing or contradictory.
    """
    if num_classes is not None and (type(num_classes) is not int or not 1 <= num_classes <= _MOST_CLASSES):
        raise UserError(f"num_classes is {num_classes!r}: expected a whole number from 1 to {_MOST_CLASSES}.")
    if not listing.is_file():
        if num_classes is None:
            raise UserError(f"there is neither num_classes nor a file {listing}: give one of the two.")
        return tuple(f"class {index}" for index in range(num_classes))
    names = tuple(read_lines(listing))
    if not 1 <= len(names) <= _MOST_CLASSES or "" in names:
        raise UserError(
            f"{listing} holds {len(names)} lines, {names.count('')} of them blank: "
            f"expected 1 to {_MOST_CLASSES} names of classes, one a line."
        )
    if num_classes not in (None, len(names)):
        raise UserError(f"num_classes is {num_classes} but {listing} names {len(names)} classes: make them agree.")
    return names


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
    """The decoded image, and the bits per channel (with a palette: per index) of its file."""
    expected = " or ".join(formats)
    try:
        content = path.read_bytes()
        # decoding ignores the checksums of a PNG's pixels; `verify` checks them, and consumes the image
        Image.open(BytesIO(content), formats=formats).verify()
        picture = Image.open(BytesIO(content), formats=formats)
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UnidentifiedImageError):  # its text names an internal buffer
            reason = "unknown format"
        else:
            reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} is no image ({reason}): expected a whole {expected} file, so replace it.") from error
    # a PNG states its bit depth at a fixed offset in its first chunk; Pillow's modes do not
    return picture, content[24] if picture.format == "PNG" else 8
