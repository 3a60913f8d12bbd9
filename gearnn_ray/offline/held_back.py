"""How much of M an adaptor needs: parts of it are tried on training images that are held back. Knows no network and no files.

More floats fit the training images better, and others not always: M is a ceiling.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gearnn_ray.core.errors import UserError
from gearnn_ray.offline.selection import LayerSelection
from gearnn_ray.tasks.base import Image
from gearnn_ray.training.sampling import Subset

Data = tuple[Sequence[Image], Sequence[Any]]
"""Images and their targets."""

TRIALS = {"trial of M": 1, "trial of M/2": 2, "trial of M/4": 4, "trial of M/8": 8}
"""The trials by the name that they have in events, and what M is divided by."""

NOTHING = LayerSelection(layers=(), storage_formats={}, objective=0.0, bound=0.0, status="OPTIMAL", used=0)
"""What is selected under a budget that fits nothing: the base stays as it is."""


def best_part(parts: Mapping[str, LayerSelection], score: Callable[[LayerSelection, str], float]) -> LayerSelection:
    """The selection with the best score, the smaller one of equals. parts: by the trial's name; equal ones are tried once, under
    the first name. score: of a selection, and the trial's name.
    """

    def tried() -> Iterator[tuple[float, int, LayerSelection]]:
        seen = []
        for name, selection in parts.items():
            chosen = selection.layers, selection.storage_formats
            if chosen not in seen:
                seen.append(chosen)
                yield score(selection, name), -selection.used, selection

    return max(tried(), key=lambda each: each[:2])[2]


def kept_of(count: int, held_back: float) -> int:
    """How many of the training images are trained on where this share is held back. Raises UserError if these, or those that are
    held back, would be none.
    """
    kept = count - round(held_back * count)
    if held_back and not 0 < kept < count:
        raise UserError(f"selection.held_back is {held_back:g} of {count} training images, which leaves none: give more images")
    return kept


def parted(data: Data, held_back: float) -> tuple[Data, Data]:
    """The images that are trained on, and those that are held back: the last ones, because neighbours in a video are alike.
    Raises UserError as `kept_of` does.
    """
    count = len(data[0])
    kept = kept_of(count, held_back)

    def part(positions: range) -> Data:
        return Subset(data[0], positions), Subset(data[1], positions)

    return part(range(kept)), part(range(kept, count))
