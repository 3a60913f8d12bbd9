"""How a task's answers are drawn: one renderer per task, by the task's name. A new task adds its own here."""

import colorsys
import math
from collections.abc import Callable

import numpy as np
from matplotlib.patches import Patch

from gearnn_ray.data.dataset import IGNORED
from gearnn_ray.evaluation.records import Picture
from gearnn_ray.evaluation.report.figures import WIDTH, empty_figure, plain_style, png_of


@plain_style
def _class_maps(picture: Picture) -> bytes:
    """Input, label, and the classes that the original and the adaptor find, side by side, with the classes that occur.

    target, original, adaptor: uint8 [h, w] class ids, 255 not labelled.
    """
    names, maps = picture.class_names, (picture.target, picture.original, picture.adaptor)
    palette = np.full((256, 3), 235, dtype=np.uint8)
    palette[: len(names)] = [_colour(index) for index in range(len(names))]
    height, width = picture.image.shape[:2]
    found = [int(c) for c in np.unique(np.concatenate([each.ravel() for each in maps]))]
    figure = empty_figure(0.35 + WIDTH / 4 * height / width + 0.24 * math.ceil(len(found) / 8))
    titles = ("label", f"original, {picture.scores[0]:.1f}%", f"adaptor, {picture.scores[1]:.1f}%")
    parts = {"input": picture.image, **{title: palette[each] for title, each in zip(titles, maps, strict=True)}}
    for panel, (title, pixels) in zip(figure.subplots(1, 4), parts.items(), strict=True):
        panel.imshow(pixels, interpolation="nearest", extent=(0, width, height, 0))
        panel.set_title(title)
        panel.axis("off")
    handles = [
        Patch(
            facecolor=tuple(palette[c] / 255),
            edgecolor="#666666",
            linewidth=0.5,
            label="not labelled" if c == IGNORED else names[c],
        )
        for c in found
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, handlelength=1.2)
    return png_of(figure, dpi=110)


def _colour(index: int) -> tuple[int, int, int]:
    """RGB of a class: hues a golden section apart in three degrees of brightness, for any number of classes."""
    saturation, light = ((0.75, 0.80), (0.50, 0.95), (0.85, 0.50))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(0.61 + index * (math.sqrt(5) - 1) / 2 % 1, saturation, light)
    return round(255 * red), round(255 * green), round(255 * blue)


RENDERERS: dict[str, Callable[[Picture], bytes]] = {"segmentation": _class_maps}
"""Task name to the function that draws one picture as PNG."""
