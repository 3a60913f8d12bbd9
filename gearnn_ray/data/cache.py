"""The distorted images of a split, computed once and then read from disk. A cache entry is a folder named by the digest of
everything that decides its pixels: a flat data file, mapped into memory, and a sealed index with the images' sizes, brightness
and QPs, and the digest of the data. Each process checks the digest once before it uses an entry, and makes a damaged one again.
"""

import fcntl
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import socket
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.data.dataset import Split
from gearnn_ray.levels.h264_codec import Picture
from gearnn_ray.levels.level import CLEAN, LEVELS_VERSION, Level, codec_versions
from gearnn_ray.store.blobs import opened_record, sealed_record

__all__ = [
    "ImageStatistics",
    "PackedImages",
    "PackedTargets",
    "TargetFormat",
    "answered_targets",
    "level_images",
    "level_statistics",
    "split_targets",
]

_FORMAT = 2  # of data.bin and index.json; part of every key
_DATA, _INDEX = "data.bin", "index.json"
_MEASURED_IMAGES = 200
_LOG = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]  # an RGB image [H, W, 3] or a map of class ids [H, W]


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of a level's images, from which a server estimates levels. height, width: the most frequent size in pixels.
    luma: mean over images of their mean Rec. 601 luma, 0 to 255. luma_spread: standard deviation of ln(mean luma). qp: mean
    macroblock QP of the pictures of the level's last H.264 part; None without H.264.
    """

    height: int
    width: int
    luma: float
    luma_spread: float
    qp: float | None = None


class DamagedCacheError(CorruptStoreError):
    """A cache entry is missing or damaged. reason: how, in a few words; empty if there is none."""

    def __init__(self, folder: Path, reason: str) -> None:
        what = f"damaged ({reason})" if reason else "missing"
        super().__init__(f"the cached images in {folder} are {what}, expected them complete: run the job to make them again.")
        self.reason = reason


_intact: dict[Path, tuple[int, int, int]] = {}
"""Data files whose digests this process has checked, as they were: inode, time of the last change, bytes."""


class PackedImages(Sequence[Pixels]):
    """The images of one cache entry: read-only uint8 arrays, [H, W, 3] or [H, W], each of its own size. Raw images are views of
    the memory-mapped file, PNG images are decoded at each access. Pickled by path. Raises `CorruptStoreError` if the entry does
    not exist, or its files are not as they were written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        try:
            index = opened_record((folder / _INDEX).read_bytes())
            if index is None:
                raise ValueError("its index is altered, or of a version without digests")
            self.encoding: str = index["encoding"]
            self._offsets: list[int] = index["offsets"]
            self._shapes: list[tuple[int, ...]] = [tuple(shape) for shape in index["shapes"]]
            self._lumas: list[float] = index["lumas"]
            self._qps: list[float] = index["qps"]
            data = self.folder / _DATA
            status = data.stat()
            if status.st_size != self._offsets[-1] or len(self._offsets) != len(self._shapes) + 1:
                raise ValueError(f"{status.st_size} bytes of {self._offsets[-1]}")
            self._data = np.memmap(data, np.uint8, "r").view(np.ndarray)
            state = status.st_ino, status.st_mtime_ns, status.st_size
            if _intact.get(data) != state:
                if _digest(self._data).hexdigest() != index["digest"]:
                    raise ValueError("its images do not have the digest that they were written with")
                _intact[data] = state
        except FileNotFoundError as error:
            missing = "" if not self.folder.exists() else f"it has no {Path(error.filename).name}"
            raise DamagedCacheError(folder, missing) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DamagedCacheError(folder, str(error)) from None
        with suppress(OSError):  # a folder that this user cannot write
            os.utime(folder)  # it is in use: `data.cache_limits` leaves it

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every image, without reading any."""
        return list(self._shapes)

    def statistics(self) -> ImageStatistics:
        """Statistics of at most 200 evenly spaced images, QPs of all, without reading any; only of RGB images."""
        return _statistics([self._shapes[i] for i in _measured_positions(len(self))], self._lumas, self._qps)

    def __len__(self) -> int:
        return len(self._shapes)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pixels]: ...
    def __getitem__(self, index: int | slice) -> Pixels | list[Pixels]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # a negative index counts from the end; others raise IndexError
        stored = self._data[self._offsets[index] : self._offsets[index + 1]]
        if self.encoding == "raw":
            return stored.reshape(self._shapes[index])
        pixels = np.asarray(Image.open(io.BytesIO(stored.tobytes())))
        pixels.setflags(write=False)
        return pixels

    def __reduce__(self) -> tuple[type["PackedImages"], tuple[Path]]:
        return PackedImages, (self.folder,)


def level_images(split: Split, level: Level, cache: Path) -> PackedImages:
    """The images of a split at a level, uint8 [H, W, 3], in the split's order; from the cache, or made now by one process. Frames
    are streamed: memory does not grow with the split. Raises `UserError` if an image cannot be read, the frames of a clip differ
    in size (H.264 only), the cache cannot be written, or its disk probably has too little space.
    """
    return _entry(split, level.name, codec_versions(level), _pictures(split, level), cache)


def level_statistics(split: Split, level: Level, cache: Path) -> ImageStatistics:
    """Statistics of at most 200 evenly spaced images of a level, QPs of all. Equal images give equal numbers. Raises as
    `level_images`. If the cache does not have the undistorted images, only the measured ones are read, and none is stored.
    """
    if not level.is_clean:
        return level_images(split, level, cache).statistics()
    with suppress(CorruptStoreError):
        return PackedImages(cache / _key(split, level.name, codec_versions(level))).statistics()
    images = [split.image(index) for index in _measured_positions(len(split))]
    return _statistics([image.shape for image in images], [_mean_luma(image) for image in images])


class TargetFormat(Protocol):
    """What the cache needs to know of a task: its targets as bytes [h, w], and whether one fits its image and the classes."""

    stored_as: str

    def check(self, image: Pixels, target: Any, num_classes: int, where: str) -> None: ...
    def store(self, target: Any) -> Pixels: ...
    def restore(self, stored: Pixels) -> Any: ...


class PackedTargets(Sequence[Any]):
    """The targets of a split, each restored when it is accessed."""

    def __init__(self, packed: PackedImages, restore: Callable[[Pixels], Any]) -> None:
        self.packed, self._restore = packed, restore

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: Any) -> Any:
        found = self.packed[index]
        return [self._restore(each) for each in found] if isinstance(found, list) else self._restore(found)


def split_targets(split: Split, num_classes: int, cache: Path, task: TargetFormat) -> PackedTargets:
    """The targets of a split, from the cache, or read, checked and stored now with all images of the split. The task's `check`
    raises `UserError` naming the sample. Raises `UserError` also if a file cannot be read or the cache cannot be written.
    """

    def targets() -> Iterator[Picture]:
        for index, sample in enumerate(split.ids):
            image, target = split.image(index), split.target(index)
            task.check(image, target, num_classes, f"{split.name} sample {sample!r}")
            yield Picture(task.store(target))

    packed = _entry(split, f"{task.stored_as}-{num_classes}", codec_versions(CLEAN), targets(), cache)
    return PackedTargets(packed, task.restore)


def answered_targets(
    split: Split, name: str, answers: Callable[[Iterator[Pixels]], Iterator[Any]], cache: Path, task: TargetFormat
) -> PackedTargets:
    """Targets that a network answers to the undistorted images of a split, from the cache or made now. name: of what decides them
    beside the images. answers: the target of each image.
    """

    def targets() -> Iterator[Picture]:
        images = (split.image(index) for index in range(len(split)))
        yield from (Picture(task.store(target)) for target in answers(images))

    return PackedTargets(_entry(split, f"{task.stored_as}-{name}", codec_versions(CLEAN), targets(), cache), task.restore)


def _pictures(split: Split, level: Level) -> Iterator[Picture]:
    for _, clip in itertools.groupby(range(len(split)), key=split.clips.__getitem__):
        yield from level.pictures(map(split.image, clip))


def _measured_positions(images: int) -> list[int]:
    count = min(images, _MEASURED_IMAGES)
    return [index * images // count for index in range(count)]


def _mean_luma(pixels: Pixels) -> float:
    """Mean Rec. 601 luma of an RGB image, 0 to 255."""
    return float(np.asarray(Image.fromarray(pixels).convert("L")).mean())


def _mean_qp(qps: Sequence[float]) -> float | None:
    return round(statistics.fmean(qps), 3) if qps else None


def _statistics(shapes: Sequence[tuple[int, ...]], lumas: Sequence[float], qps: Sequence[float] = ()) -> ImageStatistics:
    height, width, *_ = Counter(shapes).most_common(1)[0][0]
    # The logarithm of a black image is infinite: a luma below 1 counts as 1. Rounded, because logarithms differ in their last
    # bit between machines, and equal jobs must write equal manifests.
    spread = statistics.pstdev(math.log(max(luma, 1.0)) for luma in lumas)
    return ImageStatistics(height, width, round(statistics.fmean(lumas), 3), round(spread, 4), _mean_qp(qps))


def _key(split: Split, content: str, codecs: dict[str, str]) -> str:
    identity = {
        "split": [split.digest, split.name],
        "content": content,
        "levels": LEVELS_VERSION,
        "codecs": codecs,
        "format": _FORMAT,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _entry(split: Split, content: str, codecs: dict[str, str], pictures: Iterator[Picture], cache: Path) -> PackedImages:
    """The entry with this content; made from `pictures` if it does not exist or is damaged."""
    key = _key(split, content, codecs)
    entry = cache / key
    with suppress(CorruptStoreError):
        return PackedImages(entry)
    with _locked(cache, key):
        try:
            return PackedImages(entry)  # another process made it while this one waited for the lock
        except DamagedCacheError as error:
            if error.reason:
                _LOG.warning("the cached images in %s are damaged (%s) and are made again", entry, error.reason)
        # The lock excludes the other processes of this host, so a folder with its name is left over from a dead one.
        building = cache / f"{key}.{socket.gethostname()}.building"
        shutil.rmtree(building, ignore_errors=True)
        try:
            with _writing(cache):
                building.mkdir()
            _write(building, pictures, len(split), cache)
            with suppress(CorruptStoreError):  # another host, which the lock does not reach, made it
                return PackedImages(entry)
            with _writing(cache):
                if entry.exists():
                    shutil.rmtree(entry)
                building.rename(entry)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return PackedImages(entry)


def _write(entry: Path, pictures: Iterator[Picture], count: int, cache: Path) -> None:
    """Stream `count` images into the files of an entry, raw if there is enough space and otherwise as PNG."""
    first = next(pictures, None)
    if first is None:
        raise UserError("the split has no images, expected at least one: add images to it.")
    encode = _encoding(first.pixels, count, _free_bytes(cache), cache)
    measured = set(_measured_positions(count))
    offsets, shapes, lumas, qps, digest = [0], [], [], [], _digest(b"")
    with _writing(cache):
        data = (entry / _DATA).open("wb")
    try:
        for position, (pixels, qp) in enumerate(itertools.chain([first], pictures)):
            stored = encode(pixels)
            with _writing(cache):
                data.write(stored)
            digest.update(stored)
            offsets.append(offsets[-1] + len(stored))
            shapes.append(pixels.shape)
            if pixels.ndim == 3 and position in measured:
                lumas.append(_mean_luma(pixels))
            if qp is not None:
                qps.append(qp)
        if len(shapes) != count:
            raise RuntimeError(f"{len(shapes)} images were made of {count}")  # they would be paired with wrong targets
        encoding = "png" if encode is _png else "raw"
        index = {"encoding": encoding, "offsets": offsets, "shapes": shapes, "lumas": lumas, "qps": qps}
        index["digest"] = digest.hexdigest()
        with _writing(cache):
            data.flush()
            os.fsync(data.fileno())  # else a power cut could leave a file of zeros under the final name
            (entry / _INDEX).write_bytes(sealed_record(index))
    finally:
        with suppress(OSError):  # on a full disk closing fails too, and would hide the first error
            data.close()


def _digest(data: Any) -> "hashlib._Hash":
    """Of bytes, or of an array's memory: 0.13 s of CPU for the 190 MB of CamVid's training images."""
    return hashlib.sha256(data)


def _encoding(first: Pixels, count: int, free: int, cache: Path) -> Callable[[Pixels], bytes]:
    """Raw if `count` images like the first take at most half of the free bytes, else PNG if these fit."""
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
def _locked(cache: Path, key: str) -> Iterator[None]:
    """Exclude other processes from making this entry. The system releases the lock of a killed process."""
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"{key}.lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        yield


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turn an OSError into a UserError about the cache folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache folder {cache} cannot be written ({error.strerror}), expected space and permission: provide them, "
            "or name another folder."
        ) from error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
