"""What a segmentation network looks like to this package: normalised images [B, 3, H, W] in, logits out, in one of several forms.

Letters of shapes: B images, K classes, H and W the image's size, h and w the logits'.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gearnn_ray.core.errors import UserError

_KEYS = ("out", "logits", "sem_seg")  # torchvision's, transformers', detectron2's


def logits_of(raw: Any) -> Tensor:
    """The logits of what a network returned: a tensor, a dict that has them under one of `_KEYS`, an object that has them as
    `logits`, or a tuple or list whose first element is one of these (auxiliary outputs follow). Raises UserError for all else.
    """
    if isinstance(raw, Tensor):
        return raw
    if isinstance(raw, dict):
        if (key := next((key for key in _KEYS if key in raw), None)) is None:
            found = ", ".join(map(str, raw)) or "nothing"
            raise UserError(f"the network returned a dict with {found}: expected logits [B, K, h, w] under {', '.join(_KEYS)}")
        return logits_of(raw[key])
    if isinstance(raw, (tuple, list)) and raw:
        return logits_of(raw[0])
    if isinstance(logits := getattr(raw, "logits", None), Tensor):
        return logits
    raise UserError(
        f"the network returned a {type(raw).__name__}: expected logits [B, K, h, w], or a dict, tuple or object that has them"
    )


def padded(model: nn.Module, multiple: int) -> nn.Module:
    """`model` itself, which from now on takes images of any size, although its own forward pass needs sides that are multiples of
    this number: the bottom and the right are padded with copies of the last row and column, which add no edge that is not in the
    image, and the logits of the padding are cut off. Names of tensors stay. It returns logits [B, K, H, W] whatever its form was.
    """
    model.__class__ = _padded_class(type(model), multiple)
    return model


def _padded_class(own: type[nn.Module], multiple: int) -> type[nn.Module]:
    """A subclass, because a module around the network would change the names of its tensors."""

    def forward(self: Any, images: Tensor, *more: Any) -> Tensor:
        height, width = images.shape[-2:]
        whole = height + -height % multiple, width + -width % multiple
        x = F.pad(images, (0, whole[1] - width, 0, whole[0] - height), mode="replicate")
        logits = logits_of(own.forward(self, x, *more))
        if logits.shape[-2:] != whole:
            logits = F.interpolate(logits.float(), size=whole, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    return type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})
