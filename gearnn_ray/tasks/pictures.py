"""Answers as pictures and arrays of bytes: what a service sends to its clients. Knows nothing about networks."""

import colorsys
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

__all__ = ["coloured", "drawn", "enlarged", "npy", "palette_png", "png"]

_GOLDEN_ANGLE = 222.5  # degrees between the hues of two classes that follow each other: any number of them stay apart
_OPACITY = 0.45  # of a mask
_CLASS_OPACITY = 0.6  # of the colours of classes over a whole frame


def png(pixels: NDArray[np.uint8]) -> bytes:
    """RGB [H, W, 3] as a PNG."""
    return _saved(Pillow.fromarray(pixels))


def palette_png(classes_HW: NDArray[np.uint8]) -> bytes:
    """A PNG whose pixel values are the class ids (mode P); the palette only colours them."""
    image = Pillow.fromarray(classes_HW)
    image.putpalette(_PALETTE)
    return _saved(image)


def coloured(pixels: NDArray[np.uint8], classes_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The frame RGB [H, W, 3] under the colours of the classes."""
    palette = np.frombuffer(_PALETTE, np.uint8).reshape(-1, 3).astype(np.float32)
    mixed: NDArray[np.uint8] = (_CLASS_OPACITY * palette[classes_HW] + (1 - _CLASS_OPACITY) * pixels + 0.5).astype(np.uint8)
    return mixed


def enlarged(array: NDArray[Any], scale: int) -> NDArray[Any]:
    """[H, W, …] at `scale` times the size, every pixel repeated."""
    return array if scale == 1 else array.repeat(scale, 0).repeat(scale, 1)


def npy(array: NDArray[Any]) -> bytes:
    """float32, as numpy.load reads it."""
    file = io.BytesIO()
    np.save(file, np.asarray(array, np.float32))
    return file.getvalue()


def drawn(
    pixels: NDArray[np.uint8],
    boxes_D4: NDArray[np.float32],
    texts: Sequence[str],
    labels_D: NDArray[np.int64],
    masks_DHW: NDArray[np.bool_] | None,
) -> NDArray[np.uint8]:
    """The frame RGB [H, W, 3] with masks, boxes (left, top, right, bottom) and a text at each, coloured by class."""
    if not len(boxes_D4):
        return pixels
    import matplotlib  # both take a second to import
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    image: Tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    colours = [_colour(int(label)) for label in labels_D]
    if masks_DHW is not None:
        image = draw_segmentation_masks(image, torch.from_numpy(masks_DHW), _OPACITY, colours)
    longest = max(pixels.shape[:2])
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # has far more letters than Pillow's own
    image = draw_bounding_boxes(
        image, torch.from_numpy(boxes_D4), list(texts), colours, width=max(1, round(longest / 400)), font=font,
        font_size=max(10, longest // 60), fill_labels=True,
    )  # fmt: skip
    painted: NDArray[np.uint8] = image.permute(1, 2, 0).contiguous().numpy()
    return painted


def _colour(label: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(label * _GOLDEN_ANGLE / 360 % 1, 0.55, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def _saved(image: Pillow.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _palette() -> bytes:
    """256 RGB colours: the 19 of Cityscapes, then in turn the colour farthest from all before it."""
    chosen = np.array(
        [
            *[(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153)],
            *[(250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60)],
            *[(255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)],
        ]
    )
    steps = np.linspace(0, 255, 9).astype(int)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    distance = np.min([np.sum((grid - colour) ** 2, 1) for colour in chosen], 0)
    while len(chosen) < 256:
        chosen = np.vstack([chosen, grid[distance.argmax()]])
        distance = np.minimum(distance, np.sum((grid - chosen[-1]) ** 2, 1))
    return chosen.astype(np.uint8).tobytes()


_PALETTE = _palette()
