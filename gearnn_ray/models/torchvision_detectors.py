"""torchvision's detectors behind the convention of `models.detector`. State-dict names and weights are torchvision's.

Four things differ from what torchvision builds:

- Images are normalised already, so the model only resizes them. Published weights expect ImageNet's mean and standard deviation,
  except those of ssdlite320_mobilenet_v3_large (`model.mean` and `model.std` 0.5) and of ssd300_vgg16 (`model.mean` 0.48235
  0.45882 0.40784, `model.std` 0.00392157, which is 1 / 255).
- Labels count from 0 and have no background. torchvision's label 0 is the background, so K classes are K + 1 outputs; for K = 80,
  COCO's number of classes, they are the 91 outputs of the published files.
- Batch normalisations stay in evaluation mode, because batches of a few images have poor statistics.
- Under autocast the outputs of all heads are float32. In bfloat16, which torchvision would compute in, neighbouring coordinates
  between 512 and 1024 are 4 pixels apart.

torchvision's objects get subclasses of their classes, which are at the top level of this module so that models can be copied and
pickled. Importing torchvision's detectors takes more than a second, so nothing imports this module before a model needs it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models import detection
from torchvision.models.detection import faster_rcnn, fcos, mask_rcnn, retinanet, roi_heads, rpn, ssd, ssdlite
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import FeaturePyramidNetwork

from gearnn_ray.core.errors import UserError
from gearnn_ray.models.detector import Found, Target, Terms, offer_candidates

_COCO_CLASSES = 80
_COCO_OUTPUTS = 91  # ids 0 to 90
_COCO_UNUSED = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # the background, and ids that COCO reserved but never used
# Their published weights were trained with frozen batch normalisations that ignored eps. torchvision's builders set eps to 0 when
# they load these files (`overwrite_eps`), and only for these.
_PUBLISHED_WITHOUT_EPS = ("maskrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")


def build(name: str, num_classes: int, min_size: int | None = None, max_size: int | None = None) -> nn.Module:
    """torchvision's detector `name` for `num_classes` classes, freshly initialised.

    min_size, max_size: images are scaled until the shorter side has `min_size` pixels, or less if the longer side would otherwise
    exceed `max_size`; None leaves torchvision's defaults. Raises UserError for an SSD, which scales every image to a fixed size.
    """
    outputs = _COCO_OUTPUTS if num_classes == _COCO_CLASSES else num_classes + 1
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=outputs)
    model.published_without_eps = name in _PUBLISHED_WITHOUT_EPS
    scaling = model.transform
    if scaling.fixed_size is not None and (min_size, max_size) != (None, None):
        width, height = scaling.fixed_size
        raise UserError(f"{name} scales every image to {width}x{height}: leave out min_size and max_size")
    scaling.min_size = scaling.min_size if min_size is None else (min_size,)
    scaling.max_size = scaling.max_size if max_size is None else max_size
    return as_ours(model, num_classes)


def as_ours(model: nn.Module, num_classes: int) -> nn.Module:
    """A detector of torchvision's classes, in training mode, with what this module changes. It has `num_classes` + 1 outputs, or
    91 for 80 classes.
    """
    outputs = _COCO_OUTPUTS if num_classes == _COCO_CLASSES else num_classes + 1
    for module in model.modules():
        module.__class__ = _OURS.get(type(module), type(module))
    for part in (model.rpn, model.roi_heads) if isinstance(model, _RCNN) else ():
        part.fg_bg_sampler.__class__ = _Sampler
    used = [label for label in range(1, outputs) if outputs != _COCO_OUTPUTS or label not in _COCO_UNUSED]
    our_labels = torch.full((outputs,), -1)
    our_labels[used] = torch.arange(num_classes)
    # not persistent, because the state dict must have torchvision's names
    model.register_buffer("our_labels", our_labels, persistent=False)
    for part in (model, model.roi_heads) if isinstance(model, _RCNN) else (model,):
        part.register_buffer("their_labels", torch.tensor(used), persistent=False)
    scaling: Any = model.transform
    scaling.image_mean, scaling.image_std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    return model.train()


def renamed_published(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file under the names of today's torchvision, which `model` has. Other names stay as they are.

    Most published files predate these names. torchvision sets eps to 0 when it loads the files of maskrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn and retinanet_resnet50_fpn. Here ε stays as it is and weights γ become γ·√((σ² + ε)/σ²), so that the
    model computes the same, up to rounding, and needs no eps of its own in a release. A file is taken for one of these if it has
    old names and no `num_batches_tracked`, which frozen batch normalisations do not have. Raises UserError if a tensor is in the
    file under its old and its new name.
    """
    renamed = dict(state)
    for path, module in model.named_modules():
        if isinstance(module, _RENAMING):
            # these modules have no tensors of their own, so that torchvision's hook renames and loads nothing
            module._load_from_state_dict(renamed, f"{path}." if path else "", {}, False, [], [], [])
    if len(renamed) != len(state):
        twice = next(name for name in renamed if name in state and renamed[name] is not state[name])
        raise UserError(f"the weights hold {twice!r} twice, also under its name before torchvision 0.13: remove one of both")
    is_old = renamed.keys() != state.keys() and not any(name.endswith("num_batches_tracked") for name in state)
    if is_old and getattr(model, "published_without_eps", False):
        for path, module in model.named_modules():
            weight, variance = f"{path}.weight", f"{path}.running_var"
            if isinstance(module, FixedBatchNorm2d) and {weight, variance} <= renamed.keys():
                ratio = 1 + module.eps / renamed[variance].double()
                renamed[weight] = (renamed[weight].double() * ratio.sqrt()).to(renamed[weight].dtype)
    return renamed


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that stays in evaluation mode: weight and bias train, running statistics do not move."""

    def train(self, mode: bool = True) -> "FixedBatchNorm2d":
        return super().train(False)


class _Float32(nn.Module):
    """A head whose outputs are float32 under autocast, too."""

    def forward(self, *inputs: Any) -> Any:
        return pytree.tree_map(Tensor.float, super().forward(*inputs))


class RPNHead(_Float32, rpn.RPNHead):  # type: ignore[misc]
    pass


class FastRCNNPredictor(_Float32, faster_rcnn.FastRCNNPredictor):  # type: ignore[misc]
    pass


class MaskRCNNPredictor(_Float32, mask_rcnn.MaskRCNNPredictor):  # type: ignore[misc]
    pass


class RetinaNetHead(_Float32, retinanet.RetinaNetHead):  # type: ignore[misc]
    pass


class SSDHead(_Float32, ssd.SSDHead):  # type: ignore[misc]
    pass


class SSDLiteHead(_Float32, ssdlite.SSDLiteHead):  # type: ignore[misc]
    pass


class FCOSHead(_Float32, fcos.FCOSHead):  # type: ignore[misc]
    def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matched_idxs: Sequence[Tensor]) -> Terms:
        return _per_match(super().compute_loss(targets, outputs, anchors, matched_idxs), matched_idxs)


class _Sampler(BalancedPositiveNegativeSampler):  # type: ignore[misc]
    """Keeps how many items it drew for a batch, by which torchvision divides losses, until they are taken."""

    _drawn: tuple[Tensor, Tensor] | None = None

    def __call__(self, matched_idxs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        masks: tuple[list[Tensor], list[Tensor]] = super().__call__(matched_idxs)
        positives, negatives = (torch.cat(each).sum() for each in masks)
        self._drawn = positives, positives + negatives
        return masks

    def take(self) -> tuple[Tensor, Tensor]:
        """The number of positive items, and of all."""
        drawn, self._drawn = self._drawn, None
        assert drawn is not None
        return drawn


class _Detector(nn.Module):
    """The convention, in front of a detector class of torchvision's."""

    needs_masks = False
    our_labels: Tensor  # [outputs], -1 where a label of torchvision's is none of ours
    their_labels: Tensor  # [K]
    published_without_eps = False

    def renamed_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`renamed_published` of this model: `models.weights` calls it for every file."""
        return renamed_published(self, state)

    def forward(self, images: Tensor | Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Found] | Terms:
        """What was found in each image; with targets, the terms of the loss. Both in any mode of the modules."""
        if targets is None:
            with _training(self, False):
                return [self._in_our_labels(found) for found in super().forward(list(images))]
        theirs = [self._in_their_labels(target) for target in targets]
        with _training(self, True):
            return self.terms(super().forward(list(images), theirs), len(images))

    def terms(self, losses: Mapping[str, Any], images: int) -> Terms:
        """torchvision's losses, which are averages over this batch, as sums and counts. Some of them are that already."""
        return dict(losses)

    def _in_our_labels(self, found: Found) -> Found:
        labels = self.our_labels[found["labels"]]
        used = labels >= 0
        found = {**found, "labels": labels}
        # the masks of one large image take up to a gigabyte, so they are copied only where something is dropped
        return found if bool(used.all()) else {name: part[used] for name, part in found.items()}

    def _in_their_labels(self, target: Target) -> dict[str, Tensor]:
        theirs = {"boxes": target["boxes"], "labels": self.their_labels[target["labels"]]}
        if self.needs_masks:
            if "masks" not in target:
                raise UserError(
                    "Mask R-CNN trains on masks and the data set has only boxes: give a data set with masks, or use the network "
                    "fasterrcnn_resnet50_fpn"
                )
            theirs["masks"] = target["masks"]
        return theirs


class RoIHeads(roi_heads.RoIHeads):  # type: ignore[misc]
    their_labels: Tensor  # [K], the detector's

    def postprocess_detections(self, class_logits: Tensor, *more: Any) -> Any:
        offer_candidates(lambda: class_logits.softmax(-1)[:, self.their_labels])
        return super().postprocess_detections(class_logits, *more)


class _RCNN(_Detector):
    """R-CNNs draw anchors and regions from torch's generator, and average over those drawn."""

    rpn: Any
    roi_heads: Any

    def terms(self, losses: Mapping[str, Any], images: int) -> Terms:
        _, anchors = self.rpn.fg_bg_sampler.take()
        positives, regions = self.roi_heads.fg_bg_sampler.take()
        counts = {"loss_objectness": anchors, "loss_rpn_box_reg": anchors, "loss_mask": positives}
        terms = {name: (loss, counts.get(name, regions)) for name, loss in losses.items()}
        # an average over nothing is not a number
        return {name: (torch.where(count > 0, loss * count, 0.0), count) for name, (loss, count) in terms.items()}


class FasterRCNN(_RCNN, faster_rcnn.FasterRCNN):  # type: ignore[misc]
    pass


class MaskRCNN(_RCNN, mask_rcnn.MaskRCNN):  # type: ignore[misc]
    needs_masks = True


class RetinaNet(_Detector, retinanet.RetinaNet):  # type: ignore[misc]
    """Each image's loss is divided by its own number of matched anchors; the loss of a batch is their average."""

    def terms(self, losses: Mapping[str, Any], images: int) -> Terms:
        count = self.our_labels.new_tensor(images)
        return {name: (loss * images, count) for name, loss in losses.items()}

    def postprocess_detections(self, head_outputs: Any, *more: Any) -> Any:
        offer_candidates(lambda: torch.cat(head_outputs["cls_logits"], 1).sigmoid()[..., self.their_labels])
        return super().postprocess_detections(head_outputs, *more)


class FCOS(_Detector, fcos.FCOS):  # type: ignore[misc]
    """Its head gives sums and counts."""

    def postprocess_detections(self, head_outputs: Any, *more: Any) -> Any:
        def scores() -> Tensor:
            log_class, log_centre = (F.logsigmoid(torch.cat(head_outputs[name], 1)) for name in ("cls_logits", "bbox_ctrness"))
            return ((log_class + log_centre) / 2).exp()[..., self.their_labels]

        offer_candidates(scores)
        return super().postprocess_detections(head_outputs, *more)


class SSD(_Detector, ssd.SSD):  # type: ignore[misc]
    def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matched_idxs: Sequence[Tensor]) -> Terms:
        return _per_match(super().compute_loss(targets, outputs, anchors, matched_idxs), matched_idxs)

    def postprocess_detections(self, head_outputs: Any, *more: Any) -> Any:
        offer_candidates(lambda: head_outputs["cls_logits"].softmax(-1)[..., self.their_labels])
        return super().postprocess_detections(head_outputs, *more)


_SUBCLASSES = (
    FasterRCNN, MaskRCNN, RetinaNet, FCOS, SSD, FixedBatchNorm2d, RoIHeads, RPNHead, FastRCNNPredictor, MaskRCNNPredictor,
    RetinaNetHead, FCOSHead, SSDHead, SSDLiteHead,
)  # fmt: skip
_OURS: dict[type, type] = {ours.__bases__[-1]: ours for ours in _SUBCLASSES}
_RENAMING = (
    FeaturePyramidNetwork,
    rpn.RPNHead,
    mask_rcnn.MaskRCNNHeads,
    retinanet.RetinaNetClassificationHead,
    retinanet.RetinaNetRegressionHead,
)


def _per_match(losses: Mapping[str, Tensor], matched_idxs: Sequence[Tensor]) -> Terms:
    """Losses that torchvision divided by the number of matched positions, or by 1 if there are none, as sums and counts."""
    count = torch.stack([(matched >= 0).sum() for matched in matched_idxs]).sum()
    return {name: (loss * count.clamp(min=1), count) for name, loss in losses.items()}


@contextmanager
def _training(model: nn.Module, training: bool) -> Iterator[None]:
    """Sets whether torchvision's code computes losses or detections, and leaves the modes of all layers."""
    parts = [model, *(part for name, part in model.named_children() if name in ("transform", "rpn", "roi_heads"))]
    before = [part.training for part in parts]
    try:
        for part in parts:
            part.training = training
        yield
    finally:
        for part, mode in zip(parts, before, strict=True):
            part.training = mode
