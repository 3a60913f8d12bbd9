"""Images and labels for semantic segmentation: what a data set is, and how one is opened by kind and path.

Knows nothing about distortion levels, networks or caches: `gearnn_ray.data.cache` builds on this.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.core.errors import UserError

__all__ = ["IGNORED", "KINDS", "Dataset", "Split", "open_dataset"]

IGNORED = 255
"""The label of a pixel that is neither learned from nor judged."""

KINDS = ("scenes", "camvid", "cityscapes", "folder")


class Split(Protocol):
    """The training or the validation part of a data set: immutable, and picklable where paths are shared."""

    @property
    def name(self) -> str:
        """`train` or `val`."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The unique name of every sample; samples of one clip stand together, in order of time."""

    @property
    def clips(self) -> tuple[str, ...]:
        """The clip of every sample: consecutive frames of one recording share one."""

    @property
    def digest(self) -> str:
        """Hex SHA-256 over all that decides ids, clips, images and labels, and over nothing else."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB image [H, W, 3]. Raises `UserError` naming the file that cannot be read."""

    def label(self, index: int) -> NDArray[np.uint8]:
        """Class ids [H, W], `IGNORED` where there is none. Raises `UserError` naming the unreadable file.

        Ids outside 0 … num_classes-1 are handed on: `gearnn_ray.data.cache.split_labels` refuses them.
        """


@dataclass(frozen=True)
class Dataset:
    """A data set of labelled images: its classes, what to train on, and what to judge on."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def open_dataset(kind: str, path: str | None = None, **own: Any) -> Dataset:
    """Open the data set of this kind at this path without reading a pixel.

    `own` are the options of the kind, `None` meaning not given: `num_classes` of a folder, and those that
    `gearnn_ray.data.scenes.open_scenes` takes. Raises `UserError` when the kind, an option or what lies at
    the path is not what it should be.
    """
    own = {option: value for option, value in own.items() if value is not None}
    if kind not in KINDS:
        raise UserError(f"there is no data kind {kind!r}: expected one of {', '.join(KINDS)}.")
    if kind == "scenes":
        if path:
            raise UserError(f"data of kind scenes is generated, but a path was given ({path}): leave it out.")
        from gearnn_ray.data.scenes import open_scenes

        _refuse_unknown(kind, own, set(inspect.signature(open_scenes).parameters))
        return open_scenes(**own)
    _refuse_unknown(kind, own, {"num_classes"} if kind == "folder" else set())
    if not path:
        raise UserError(f"data of kind {kind} needs a path and none was given: name the folder it lies in.")
    # absolute, because a worker runs in another directory than the one the path was written for
    root = Path(os.path.expanduser(path)).absolute()
    try:
        if not root.is_dir():
            found = "is a file" if root.exists() else "does not exist"
            raise UserError(f"{root} {found}: expected a folder of {kind} data, so correct the path.")
        return _opener(kind)(root, **own)
    except OSError as error:
        found = f"{error.filename or root} cannot be read ({error.strerror})"
        raise UserError(f"{found}: expected {kind} data there, so make it readable.") from error


def _refuse_unknown(kind: str, given: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(given.keys() - known)
    if unknown:
        raise UserError(f"data of kind {kind} has no option {unknown[0]!r}: leave it out.")


def _opener(kind: str) -> Callable[..., Dataset]:
    # imported here, because these modules build on the classes above
    if kind == "camvid":
        from gearnn_ray.data.camvid import open_camvid

        return open_camvid
    if kind == "cityscapes":
        from gearnn_ray.data.cityscapes import open_cityscapes

        return open_cityscapes
    from gearnn_ray.data.folder import open_folder

    return open_folder
