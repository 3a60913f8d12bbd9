"""The distorted images of a split, made once and read back from disk while nothing about them changes.

An entry of the cache is a folder named by the digest of everything that decides its pixels: one flat data
file, memory-mapped by every reader on the machine, and an index. Knows how entries are made and found, and
nothing about what levels do, how images are read, or what they are used for.
"""

import fcntl
import hashlib
import io
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.data.dataset import IGNORED, Split
from gearnn_ray.levels.level import CLEAN, LEVELS_VERSION, Level, codec_versions

__all__ = ["PackedImages", "level_images", "split_labels"]

_FORMAT = 1  # of data.bin and index.json
_DATA, _INDEX = "data.bin", "index.json"

Pixels = NDArray[np.uint8]
"""An RGB image [H, W, 3] or a map of class ids [H, W]."""


class PackedImages(Sequence[Pixels]):
    """The images of one cache entry: read-only uint8 arrays, [H, W, 3] or [H, W], each of its own size.

    Raw entries are views of the memory-mapped file: nothing is copied, nor read before it is looked at. PNG
    entries are decoded at each access. Pickled by path: a worker on the same machine maps the same file.
    Raises `CorruptStoreError` when the entry is not there, or not of the size that its index promises.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        try:
            index = json.loads((folder / _INDEX).read_bytes())
            self.encoding: str = index["encoding"]
            self._offsets: list[int] = index["offsets"]
            self._shapes: list[tuple[int, ...]] = [tuple(shape) for shape in index["shapes"]]
            size = (folder / _DATA).stat().st_size
            if size != self._offsets[-1] or len(self._offsets) != len(self._shapes) + 1:
                raise ValueError(f"{size} bytes of {self._offsets[-1]}")
            self._data = np.memmap(folder / _DATA, np.uint8, "r").view(np.ndarray)
        except (OSError, ValueError, LookupError, TypeError) as error:
            found = f"the cached images in {folder} are missing or damaged ({error})"
            raise CorruptStoreError(f"{found}, expected them whole: run the job again to remake them.") from None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every image, known without reading one."""
        return list(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pixels]: ...
    def __getitem__(self, index: int | slice) -> Pixels | list[Pixels]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones count from the end, others raise IndexError
        stored = self._data[self._offsets[index] : self._offsets[index + 1]]
        if self.encoding == "raw":
            return stored.reshape(self._shapes[index])
        pixels = np.asarray(Image.open(io.BytesIO(stored.tobytes())))
        pixels.setflags(write=False)
        return pixels

    def __reduce__(self) -> tuple[type["PackedImages"], tuple[Path]]:
        return PackedImages, (self.folder,)


def level_images(split: Split, level: Level, cache: Path) -> PackedImages:
    """The images of a split at a level, in its order: uint8 [H, W, 3], from the cache or made now.

    Frames are streamed: memory does not grow with the split. Processes that ask for the same images at the
    same time make them once. Raises `UserError` when an image cannot be read, the frames of a clip differ in
    size (H.264 only), the cache cannot be written, or the images are not likely to fit on its disk.
    """

    def frames() -> Iterator[Pixels]:
        for _, clip in itertools.groupby(range(len(split)), key=split.clips.__getitem__):
            yield from level.stream(map(split.image, clip))

    return _cached(split, level.name, codec_versions(level), frames(), cache)


def split_labels(split: Split, num_classes: int, cache: Path) -> PackedImages:
    """The labels of a split, uint8 [H, W], from the cache or checked and stored now.

    The first call reads every image and label: it is the validation of a data set. Raises `UserError` naming
    the sample when one cannot be read, a label has not the size of its image, or it holds an id that is
    neither below `num_classes` nor 255; and when the cache cannot be written.
    """

    def labels() -> Iterator[Pixels]:
        for index, sample in enumerate(split.ids):
            image, label = split.image(index), split.label(index)
            where = f"{split.name} sample {sample!r}"
            if label.shape != image.shape[:2]:
                found = f"{where} has a label of {_sides(label)} for an image of {_sides(image)}"
                raise UserError(f"{found}, expected equal sizes: give every image a label of its own size.")
            unknown = label[(label >= num_classes) & (label != IGNORED)]
            if unknown.size:
                found = f"{where} has the class id {unknown[0]} in its label"
                expected = f"expected ids below {num_classes}, or {IGNORED} for ignored pixels"
                raise UserError(f"{found}, {expected}: correct the label or the number of classes.")
            yield label

    return _cached(split, f"labels-{num_classes}", codec_versions(CLEAN), labels(), cache)


def _cached(split: Split, content: str, codecs: dict[str, str], images: Iterator[Pixels], cache: Path) -> PackedImages:
    """The entry of this content, made of `images` where there is none or a damaged one."""
    identity = {
        "split": [split.digest, split.name],
        "content": content,
        "levels": LEVELS_VERSION,
        "codecs": codecs,
        "format": _FORMAT,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    entry = cache / key
    with suppress(CorruptStoreError):
        return PackedImages(entry)
    with _alone(cache, key):
        with suppress(CorruptStoreError):  # somebody made it while we waited
            return PackedImages(entry)
        # The lock is good among the processes of one host at least, so what bears our name is a dead one's.
        building = cache / f"{key}.{socket.gethostname()}.building"
        shutil.rmtree(building, ignore_errors=True)
        try:
            with _writing(cache):
                building.mkdir()
            _write(building, images, len(split), cache)
            with suppress(CorruptStoreError):  # somebody on another host made it where locks do not reach
                return PackedImages(entry)
            with _writing(cache):
                if entry.exists():
                    shutil.rmtree(entry)
                building.rename(entry)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return PackedImages(entry)


def _write(entry: Path, images: Iterator[Pixels], count: int, cache: Path) -> None:
    """Stream `count` images into the files of an entry, raw where they fit and otherwise as PNG."""
    first = next(images, None)
    if first is None:
        raise UserError("a split without images was found, expected one at least: add images to it.")
    encode = _encoding(first, count, _free_bytes(cache), cache)
    offsets, shapes = [0], []
    with _writing(cache):
        data = (entry / _DATA).open("wb")
    try:
        for pixels in itertools.chain([first], images):
            stored = encode(pixels)
            with _writing(cache):
                data.write(stored)
            offsets.append(offsets[-1] + len(stored))
            shapes.append(pixels.shape)
        if len(shapes) != count:
            raise RuntimeError(f"{len(shapes)} images were made of {count}")  # they would meet others' labels
        index = {"encoding": "png" if encode is _png else "raw", "offsets": offsets, "shapes": shapes}
        with _writing(cache):
            data.flush()
            os.fsync(data.fileno())  # or a power cut may leave a file of zeros behind the final name
            (entry / _INDEX).write_text(json.dumps(index))
    finally:
        with suppress(OSError):  # on a full disk closing fails once more, and would hide the sentence
            data.close()


def _encoding(first: Pixels, count: int, free: int, cache: Path) -> Callable[[Pixels], bytes]:
    """Raw where `count` images like the first take half of the free bytes at most, else PNG if that fits."""
    raw, png = first.nbytes * count, len(_png(first)) * count
    if raw <= free / 2:
        return _raw
    if png <= free:
        return _png
    raise UserError(
        f"{cache} has {_megabytes(free)} free, but {count} images need about {_megabytes(png)} as PNG and "
        f"{_megabytes(2 * raw)} of free space to be kept raw: make room, or name another cache folder."
    )


def _raw(pixels: Pixels) -> bytes:
    return pixels.tobytes()


def _png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _free_bytes(cache: Path) -> int:
    return shutil.disk_usage(cache).free


@contextmanager
def _alone(cache: Path, key: str) -> Iterator[None]:
    """Be the only process that makes this entry; a killed one lets go of its lock."""
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"{key}.lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        yield


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = f"the cache folder {cache} cannot be written ({error.strerror})"
        raise UserError(f"{found}, expected room and permission: make them, or name another.") from error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _sides(image: Pixels) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
