"""Data sets of labelled images: their protocol, and how one is opened by kind and path. Imports no torch."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.config.catalogue import KINDS
from gearnn_ray.core.errors import UserError

__all__ = ["AGREEMENT", "IGNORED", "KINDS", "Dataset", "Split", "open_dataset"]

AGREEMENT = "agreement"  # begins the names of metrics where the base's own answers stand in for labels
IGNORED = 255  # the label of a pixel that neither training nor evaluation uses


class Split(Protocol):
    """The training or the validation part of a data set. Immutable; a pickled split works wherever its paths are valid."""

    @property
    def name(self) -> str:
        """`train` or `val`."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The unique name of every sample. The samples of a clip are adjacent, in order of time."""

    @property
    def clips(self) -> tuple[str, ...]:
        """The clip of every sample. Consecutive frames of a recording are one clip."""

    @property
    def digest(self) -> str:
        """Hex SHA-256 of exactly what decides ids, clips, images and targets."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB image [H, W, 3]. Raises `UserError` if its file cannot be read."""

    def target(self, index: int) -> Any:
        """What the task asks for; not checked. Segmentation: class ids uint8 [H, W], `IGNORED` for pixels without a class.
        Detection: `gearnn_ray.data.objects.Objects`. Raises `UserError` if its file cannot be read.
        """


@dataclass(frozen=True)
class Dataset:
    """A data set: its classes, and its training and validation splits."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    labelled: ClassVar[bool] = True
    """whether there are targets"""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def remark(self) -> str:
        """What a user must know of how the data were read; empty where that is nothing."""
        return ""


def open_dataset(kind: str, path: str | None = None, task: str = "segmentation", **options: Any) -> Dataset:
    """Open the data set of this kind at this path, with targets for this task, without reading any image. `options` belong to
    the kind; None means not given. A folder takes `num_classes`, scenes take the arguments of `open_scenes`. Raises `UserError`
    for an unknown kind or option, a kind without targets for the task, and a folder without the files that this kind needs.
    """
    options = {option: value for option, value in options.items() if value is not None}
    if kind not in KINDS:
        raise UserError(f"there is no data kind {kind!r}: expected one of {', '.join(KINDS)}.")
    if task not in KINDS[kind]:
        fitting = [other for other, tasks in KINDS.items() if task in tasks]
        raise UserError(f"data of kind {kind} has no targets for {task}: use {' or '.join(fitting) or 'another task'}.")
    module = kind.replace("-", "_")
    # imported here, because these modules use the classes above
    opener: Callable[..., Dataset] = getattr(import_module(f"gearnn_ray.data.{module}"), f"open_{module}")
    unknown = sorted(options.keys() - (signature(opener).parameters.keys() - {"root"}))
    if unknown:
        raise UserError(f"data of kind {kind} has no option {unknown[0]!r}: leave it out.")
    if len(KINDS[kind]) > 1:
        options["task"] = task
    if kind == "scenes":
        if path:
            raise UserError(f"data of kind scenes is generated, but a path was given ({path}): leave it out.")
        return opener(**options)
    if not path:
        raise UserError(f"data of kind {kind} needs a path and none was given: give the folder of the data.")
    # absolute, because workers run in another working directory
    root = Path(os.path.expanduser(path)).absolute()
    try:
        if not root.is_dir():
            found = "is a file" if root.exists() else "does not exist"
            raise UserError(f"{root} {found}: expected a folder of {kind} data, so correct the path.")
        return opener(root, **options)
    except OSError as error:
        found = f"{error.filename or root} cannot be read ({error.strerror})"
        raise UserError(f"{found}: expected {kind} data there, so make it readable.") from error
