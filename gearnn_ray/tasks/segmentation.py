"""Semantic segmentation: crops, flips, cross-entropy without label 255 (DRN, Yu et al. 2017), mIoU from confusion matrices.

Shapes: x_BCHW pixel values, y_BHW int64 class ids, logits_BKhw float32, counts_NKK int32 [image, label, prediction] pixels.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import IGNORED
from gearnn_ray.models.lesson import class_divergence
from gearnn_ray.models.segmenter import logits_of
from gearnn_ray.tasks import pictures
from gearnn_ray.tasks.base import Batch, Forward, Image, LossTerm, Served, Window

_PNG, _NPY = "image/png", "application/x-npy"


class Segmentation:
    """The task `segmentation`. Targets are label maps uint8 [H, W]; a prediction is logits float32 [K, h, w] of one image."""

    name = "segmentation"
    version = 1
    metrics: tuple[str, ...] = ("mIoU",)
    shown: tuple[str, ...] = ("mIoU",)
    has_stability = True
    stored_as = "labels"
    media_types: tuple[str, ...] = (_PNG, _NPY)
    exported: tuple[str, ...] = ("logits",)

    def check(self, image: Image, target: Image, num_classes: int, where: str) -> None:
        """Raise UserError unless the label map has the image's size and ids below `num_classes`, or 255."""
        if target.shape != image.shape[:2]:
            found, expected = (f"{side.shape[1]}x{side.shape[0]}" for side in (target, image))
            raise UserError(
                f"{where} has a label of {found} for an image of {expected}, expected equal sizes: give every image a label of "
                "its own size."
            )
        unknown = target[(target >= num_classes) & (target != IGNORED)]
        if unknown.size:
            raise UserError(
                f"{where} has the class id {unknown[0]} in its label, expected ids below {num_classes}, or {IGNORED} for ignored "
                "pixels: correct the label or the number of classes."
            )

    def store(self, target: Image) -> Image:
        """The label map itself."""
        return target

    def restore(self, stored: Image) -> Image:
        """The label map itself."""
        return stored

    def crop_size(self, shapes: Sequence[tuple[int, ...]], crop: int) -> tuple[int, int]:
        """`crop`, or less where the smallest image is smaller: all samples of a batch have one size."""
        return min(crop, *(shape[0] for shape in shapes)), min(crop, *(shape[1] for shape in shapes))

    def augment(self, image: Image, target: Image, crop: tuple[int, int], draws: NDArray[np.float64]) -> tuple[Image, Image]:
        """A random window of `crop` (height, width), flipped horizontally half the time. A label of another size is resized."""
        window = Window.drawn(image.shape, crop, draws)
        return window.of(image), window.of(resize_label(target, image.shape[0], image.shape[1]))

    def collate(self, samples: Sequence[tuple[Image, Image]]) -> Batch:
        """uint8 x_BCHW and int64 y_BHW."""
        x_BHWC, y_BHW = (torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))
        return Batch(x_BHWC.permute(0, 3, 1, 2), y_BHW.long())

    def losses(self, forward: Forward, batch: Batch) -> dict[str, LossTerm]:
        """Cross-entropy over the labelled pixels. With a lesson KL(teacher || network), a mean over all pixels."""
        return _terms(self.outputs(forward(batch.images)), batch)

    def teacher(self, network: nn.Module) -> Callable[..., Any]:
        """The network itself."""
        return network

    def answers(self, teacher: Forward, batch: Batch) -> Tensor:
        """logits_BKHW at the size of the distorted images. Those of larger undistorted ones are resized as labels are: each pixel
        gets the answer at its centre.
        """
        windows = [each[None] for each in batch.undistorted] if isinstance(batch.undistorted, list) else [batch.undistorted]
        whole = [self.at_frame_size(self.outputs(teacher(x_BCHW)), *x_BCHW.shape[-2:]) for x_BCHW in windows]
        return torch.cat([F.interpolate(each, size=batch.images.shape[-2:], mode="nearest-exact") for each in whole])

    def stability_losses(self, forward: Forward, batch: Batch, perturbed_BCHW: Tensor, alpha: float) -> dict[str, LossTerm]:
        """The loss on the clean images + alpha · KL(clean || perturbed), a mean over pixels (Zheng et al. 2016). Both copies go
        through the network as one batch, so that a batch normalisation sees them alike.
        """
        both = forward(torch.cat([batch.images.float(), perturbed_BCHW]))
        clean, perturbed = self.outputs(both).chunk(2)
        return {**_terms(clean, batch), "stability": _mean(class_divergence(clean, perturbed, 1, 1.0), alpha)}

    def outputs(self, raw: Any) -> Tensor:
        """logits_BKhw float32, from any form of `models.segmenter`."""
        return logits_of(raw).float()

    def tensors(self, raw: Any) -> tuple[Tensor]:
        """logits_BKhw float32."""
        return (self.outputs(raw),)

    def at_frame_size(self, outputs: Tensor, height: int, width: int, seen: tuple[int, int] | None = None) -> Tensor:
        """logits_BKHW, resized bilinearly."""
        if outputs.shape[-2:] == (height, width):
            return outputs
        return F.interpolate(outputs, size=(height, width), mode="bilinear", align_corners=False)

    def evidence(self, prediction: Tensor, target: Image, size: tuple[int, int], num_classes: int) -> dict[str, Tensor]:
        """`counts`: int32 [K, K] pixels by label and predicted class. Logits are resized to the label first."""
        K = num_classes
        y = torch.from_numpy(target.astype(np.int64)).to(prediction.device)
        classes = self.at_frame_size(prediction[None], *target.shape)[0].argmax(0)
        valid = y != IGNORED
        cells = y[valid] * K + classes[valid]
        return {"counts": torch.bincount(cells, minlength=K * K).view(K, K).to("cpu", torch.int32)}

    def aggregate(self, evidence: Mapping[str, Tensor], weights_RN: NDArray[np.float64]) -> NDArray[np.float64]:
        """mIoU [R, 1] in percent over the classes that occur in labels or predictions; 0 where none does."""
        counts_NKK = evidence["counts"].numpy().astype(np.int64)
        inside_NK = np.diagonal(counts_NKK, axis1=-2, axis2=-1)
        union_NK = counts_NKK.sum(-1) + counts_NKK.sum(-2) - inside_NK
        # float64 for a fast product of matrices; pixels are exact in it up to 2^53
        inside_RK, union_RK = weights_RN @ inside_NK, weights_RN @ union_NK
        present_RK = union_RK > 0
        iou_RK = inside_RK / np.where(present_RK, union_RK, 1)
        return np.asarray(100 * iou_RK.sum(-1) / np.maximum(present_RK.sum(-1), 1), dtype=np.float64)[:, None]

    def first_metric(self, evidence: Mapping[str, Tensor], weights_RN: NDArray[np.float64]) -> NDArray[np.float64]:
        """mIoU [R]."""
        return self.aggregate(evidence, weights_RN)[:, 0]

    def target_summary(self, evidence: Mapping[str, Tensor]) -> NDArray[np.int64]:
        """Labelled pixels by image and class [N, K]."""
        labelled_NK: NDArray[np.int64] = evidence["counts"].numpy().astype(np.int64).sum(-1)
        return labelled_NK

    def utility(self, forward: Forward, images_BCHW: Tensor, classes: Collection[int] = ()) -> Tensor:
        """The log-probability of a class that is drawn for each pixel from the network's own answer, a mean over pixels.

        The square of its gradient estimates the Fisher information: how far the answer moves with each pixel value. It
        ranks encodings best among the utilities that benchmarks/accgrad.py compares.
        The draw is always the same. Only pixels whose most likely class is one of `classes` count.
        """
        log_p_BKhw = self.outputs(forward(images_BCHW)).log_softmax(1)
        draw_hw = torch.rand(log_p_BKhw.shape[-2:], generator=torch.Generator().manual_seed(0)).to(log_p_BKhw.device)
        below_BKhw = log_p_BKhw.detach().exp().cumsum(1) < draw_hw
        drawn_B1hw = below_BKhw.sum(1, keepdim=True).clamp(max=log_p_BKhw.shape[1] - 1)  # the sum may round to less than 1
        found_Bhw = log_p_BKhw.gather(1, drawn_B1hw)[:, 0]
        if classes:
            best_Bhw = log_p_BKhw.argmax(1)
            found_Bhw = found_Bhw * torch.isin(best_Bhw, best_Bhw.new_tensor(sorted(classes)))
        return found_Bhw.mean((1, 2)).sum()

    def target_of(self, prediction: Tensor, size: tuple[int, int]) -> Image:
        """The class of each pixel [H, W]."""
        return self.answer(self.at_frame_size(prediction[None], *size)[0])

    def of_classes(self, evidence: Mapping[str, Tensor], classes: Collection[int]) -> dict[str, Tensor]:
        """Not defined: a pixel that is taken for another class counts for both."""
        raise UserError("classes are given for a segmentation, whose accuracy is that of all classes: leave them out")

    def uncertainty(self, prediction: Tensor) -> float:
        """The mean over pixels of the entropy of the class probabilities, 0 to ln K."""
        return float(torch.special.entr(prediction.softmax(0)).sum(0).mean())

    def answer(self, prediction: Tensor) -> NDArray[np.uint8]:
        """Class ids [h, w]."""
        classes: NDArray[np.uint8] = prediction.argmax(0).to("cpu", torch.uint8).numpy()
        return classes

    def content(self, prediction: Tensor, media_type: str) -> NDArray[Any]:
        """The answer, or for application/x-npy a copy of the logits [K, h, w], which does not keep the whole batch in memory."""
        return prediction.to("cpu", copy=True).numpy() if media_type == _NPY else self.answer(prediction)

    def answer_bytes(self, media_type: str, num_classes: int, height: int, width: int) -> int:
        """A float32 for each class and pixel, or a byte for each pixel."""
        return height * width * (4 * num_classes if media_type == _NPY else 1)

    def described(self, answer: Image, served: Served) -> dict[str, object]:
        """`classes`: those that occur, the largest first, with their shares of the pixels."""
        counts = np.bincount(answer.reshape(-1))
        largest_first = sorted(np.flatnonzero(counts).tolist(), key=lambda label: -counts[label])
        names = served.class_names
        return {
            "classes": [
                {
                    "category_id": label,
                    "category": names[label] if label < len(names) else f"class {label}",
                    "share": round(counts[label] / answer.size, 5),
                }
                for label in largest_first
            ]
        }

    def drawn(self, answer: Image, served: Served, scale: int = 1) -> Image:
        """The classes' colours over the frame."""
        return pictures.coloured(pictures.enlarged(served.frame, scale), pictures.enlarged(answer, scale))

    def encode(self, content: NDArray[Any], media_type: str, served: Served) -> bytes:
        """A PNG whose pixel values are the class ids, or the logits as a NumPy file."""
        return pictures.npy(content) if media_type == _NPY else pictures.palette_png(content)

    def close(self, a: Tensor, b: Tensor) -> bool:
        """Equal to a thousandth of the largest logit."""
        return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def resize_label(label: Image, height: int, width: int) -> Image:
    """[H, W] class ids at another size, by nearest neighbour (pixel centres)."""
    if label.shape == (height, width):
        return label
    rows = ((np.arange(height) + 0.5) * label.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * label.shape[1] / width).astype(np.int64)
    resized: Image = label[rows[:, None], columns]
    return resized


def _terms(logits_BKhw: Tensor, batch: Batch) -> dict[str, LossTerm]:
    """The terms of the loss of these logits for the images of a batch."""
    lesson, size = batch.lesson, batch.images.shape[-2:]
    if logits_BKhw.shape[-2:] != size:
        logits_BKhw = F.interpolate(logits_BKhw, size=size, mode="bilinear", align_corners=False)
    terms = {}
    if lesson is None or lesson.with_labels:
        total = F.cross_entropy(logits_BKhw, batch.targets, ignore_index=IGNORED, reduction="sum")
        terms["cross_entropy"] = LossTerm(total, (batch.targets != IGNORED).sum())
    if lesson is not None:
        terms["teacher"] = _mean(class_divergence(lesson.answers, logits_BKhw, 1, lesson.temperature), lesson.weight)
    return terms


def _mean(divergence_BHW: Tensor, weight: float) -> LossTerm:
    """The mean over all pixels, times a weight."""
    return LossTerm(weight * divergence_BHW.sum(), torch.tensor(divergence_BHW.numel(), device=divergence_BHW.device))
