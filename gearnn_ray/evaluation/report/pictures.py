"""How a task's answers are drawn: one renderer per task, by the task's name. A new task adds its own here."""

import colorsys
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.patches import Patch, Rectangle

from gearnn_ray.data.dataset import IGNORED
from gearnn_ray.evaluation.records import Picture
from gearnn_ray.evaluation.report.figures import WIDTH, empty_figure, plain_style, png_of

_LEAST_SCORE = 0.3  # of a detection that is drawn


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


@plain_style
def _boxes(picture: Picture) -> bytes:
    """Input, the objects that are there, and those that the original and the adaptor find, side by side, with their classes.

    target: `data.objects.Objects`. original, adaptor: boxes [D, 4], scores [D], labels [D], and masks [D, H, W] if there are any.
    """
    names, target, (height, width) = picture.class_names, picture.target, picture.image.shape[:2]
    scale = np.array([width / target.size[1], height / target.size[0]] * 2)
    there: dict[str, Any] = {"boxes": target.boxes * scale, "labels": target.labels}
    if target.rles is not None and target.size == (height, width):
        there["masks"] = target.masks()
    panels = {"input": None, "objects": there}
    for title, found, score in zip(("original", "adaptor"), (picture.original, picture.adaptor), picture.scores, strict=True):
        sure = found["scores"] >= _LEAST_SCORE
        panels[f"{title}, AP {score:.1f}%"] = {name: part[sure] for name, part in found.items()}
    seen = sorted({int(label) for panel in panels.values() if panel is not None for label in panel["labels"]})
    figure = empty_figure(0.35 + WIDTH / 4 * height / width + 0.24 * math.ceil(max(1, len(seen)) / 8))
    for axis, (title, panel) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        axis.imshow(picture.image, interpolation="nearest", extent=(0, width, height, 0))
        axis.set_title(title)
        axis.axis("off")
        for index, label in enumerate(() if panel is None else panel["labels"]):
            assert panel is not None
            colour = _share(int(label))
            left, top, right, bottom = panel["boxes"][index]
            crowd = title == "objects" and target.crowd[index]
            style = "dotted" if crowd else "solid"
            axis.add_patch(
                Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.4, linestyle=style)
            )
            if "masks" in panel:
                shade = np.zeros((height, width, 4))
                shade[panel["masks"][index]] = (*colour, 0.4)
                axis.imshow(shade, interpolation="nearest", extent=(0, width, height, 0))
            if "scores" in panel:
                axis.text(left, top, f"{panel['scores'][index]:.2f}", fontsize=5.5, va="bottom", color="white",
                          bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6})  # fmt: skip
    handles = [Patch(facecolor=_share(label), label=names[label]) for label in seen]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, handlelength=1.2)
    return png_of(figure, dpi=110)


def _share(index: int) -> tuple[float, float, float]:
    """The colour of a class in shares of 1."""
    red, green, blue = _colour(index)
    return red / 255, green / 255, blue / 255


def _colour(index: int) -> tuple[int, int, int]:
    """RGB of a class: hues a golden section apart in three degrees of brightness, for any number of classes."""
    saturation, light = ((0.75, 0.80), (0.50, 0.95), (0.85, 0.50))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(0.61 + index * (math.sqrt(5) - 1) / 2 % 1, saturation, light)
    return round(255 * red), round(255 * green), round(255 * blue)


RENDERERS: dict[str, Callable[[Picture], bytes]] = {"segmentation": _class_maps, "detection": _boxes}
"""Task name to the function that draws one picture as PNG."""
