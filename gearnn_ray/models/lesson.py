"""What a network learns from another's answers, the teacher's, beside labels or instead of them (Hinton et al., "Distilling the
Knowledge in a Neural Network", 2015). Here the teacher is the base, which sees the undistorted images.

A divergence is 0 where both networks answer alike, and is multiplied by T², so that its gradient does not shrink with the
temperature T.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Lesson:
    """The teacher's answers to the undistorted images of one batch, without gradient, in the form of the task or the detector.

    weight: factor of the distance to them. with_labels: whether the loss on labels counts as well.
    """

    answers: Any
    temperature: float = 1.0
    weight: float = 1.0
    with_labels: bool = False


def class_divergence(taught: Tensor, logits: Tensor, dim: int, temperature: float) -> Tensor:
    """KL(softmax(taught / T) ‖ softmax(logits / T)) · T², without the dimension `dim` of the classes."""
    log_p, log_q = (F.log_softmax(each / temperature, dim) for each in (taught, logits))
    return (log_p.exp() * (log_p - log_q)).sum(dim) * temperature**2


def yes_no_divergence(taught: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """KL(σ(taught / T) ‖ σ(logits / T)) · T² of each element."""
    a, b = taught / temperature, logits / temperature
    yes = a.sigmoid() * (F.logsigmoid(a) - F.logsigmoid(b))
    no = (-a).sigmoid() * (F.logsigmoid(-a) - F.logsigmoid(-b))
    return (yes + no) * temperature**2
