"""The objects of one image: boxes, classes and masks. Imports no torch.

Masks are held as COCO's compressed run-length encoding (RLE), a few dozen bytes each: a photograph may have a hundred objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pycocotools import mask as coco_masks

__all__ = ["Objects", "boxes_of", "rle_of"]

Mask = NDArray[np.bool_]  # [H, W]


@dataclass(frozen=True, eq=False)
class Objects:
    """G objects of one image.

    boxes: float32 [G, 4] left, top, right, bottom in pixels; right and bottom are outside. labels: int64 [G] class ids. areas:
    float32 [G] in pixels, as the data set counts them (of the mask, where there is one). crowd: bool [G], a region that a
    detector need not find and may find (COCO's `iscrowd`). size: height and width of the image. rles: each mask; None without.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    areas: NDArray[np.float32]
    crowd: Mask
    size: tuple[int, int]
    rles: tuple[bytes, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to_bytes(self) -> bytes:
        """The objects as a safetensors file."""
        arrays: dict[str, NDArray[Any]] = {
            "boxes": np.ascontiguousarray(self.boxes, np.float32),
            "labels": np.ascontiguousarray(self.labels, np.int64),
            "areas": np.ascontiguousarray(self.areas, np.float32),
            "crowd": np.ascontiguousarray(self.crowd, np.bool_),
            "size": np.array(self.size, np.int64),
        }
        if self.rles is not None:
            arrays["rles"] = np.frombuffer(b"".join(self.rles), np.uint8)
            arrays["rle_lengths"] = np.array([len(rle) for rle in self.rles], np.int64)
        return safetensors.numpy.save(arrays)

    @staticmethod
    def from_bytes(data: bytes) -> "Objects":
        """The objects that `to_bytes` wrote."""
        arrays = safetensors.numpy.load(data)
        height, width = map(int, arrays["size"])
        rles = None
        if "rles" in arrays:
            ends = np.cumsum(arrays["rle_lengths"])
            joined = arrays["rles"].tobytes()
            rles = tuple(joined[end - length : end] for end, length in zip(ends, arrays["rle_lengths"], strict=True))
        return Objects(arrays["boxes"], arrays["labels"], arrays["areas"], arrays["crowd"], (height, width), rles)

    def masks(self) -> Mask:
        """bool [G, H, W]."""
        if not self.rles:
            return np.zeros((0, *self.size), np.bool_)
        decoded = coco_masks.decode([{"size": list(self.size), "counts": counts} for counts in self.rles])
        masks: Mask = np.ascontiguousarray(decoded.transpose(2, 0, 1)).astype(np.bool_)
        return masks


def rle_of(mask: Mask) -> bytes:
    """The RLE of one mask [H, W]."""
    encoded: dict[str, Any] = coco_masks.encode(np.asfortranarray(mask, np.uint8))
    counts: bytes = encoded["counts"]
    return counts


def boxes_of(masks: Sequence[Mask] | Mask) -> NDArray[np.float32]:
    """The smallest box [G, 4] around each mask, none of which is empty."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
