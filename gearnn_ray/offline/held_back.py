"""How much of M an adaptor needs: parts of it are tried on training images that are held back. Knows no network and no files.

More floats fit the training images better, and others not always: M is a ceiling.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gearnn_ray.core.errors import UserError
from gearnn_ray.offline.selection import LayerSelection
from gearnn_ray.tasks.base import Image
from gearnn_ray.training.sampling import Subset

Data = tuple[Sequence[Image], Sequence[Any]]
"""Images and their targets."""

TRIALS = {"trial of M": 1, "trial of M/2": 2, "trial of M/4": 4, "trial of M/8": 8}
"""The trials by the name that they have in events, and what M is divided by."""


def best_part(
    select: Callable[[int], LayerSelection], score: Callable[[LayerSelection, str], float], budget: int
) -> LayerSelection:
    """The selection with the best score, the smaller one of equals. select: the selection under so many floats; raises UserError
    where not even the smallest layer fits. score: of a selection, and the trial's name. budget: M, under which the selection must
    succeed.
    """

    def tried() -> Iterator[tuple[float, int, LayerSelection]]:
        seen = []
        for name, divisor in TRIALS.items():
            try:
                selection = select(budget // divisor)
            except UserError:
                if divisor == 1:
                    raise
                return
            chosen = selection.layers, selection.storage_formats
            if chosen not in seen:
                seen.append(chosen)
                yield score(selection, name), -selection.used, selection

    return max(tried(), key=lambda each: each[:2])[2]


def parted(data: Data, held_back: float) -> tuple[Data, Data]:
    """The images that are trained on, and those that are held back: the last ones, because neighbours in a video are alike.
    Raises UserError if either would be none.
    """
    count = len(data[0])
    kept = count - round(held_back * count)
    if not 0 < kept < count:
        raise UserError(f"selection.held_back is {held_back:g} of {count} training images, which leaves none: give more images")

    def part(positions: range) -> Data:
        return Subset(data[0], positions), Subset(data[1], positions)

    return part(range(kept)), part(range(kept, count))
