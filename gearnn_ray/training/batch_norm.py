"""Running statistics of batch normalisations, re-estimated on images without labels."""

from collections.abc import Collection, Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gearnn_ray.models.layers import statistics_of
from gearnn_ray.tasks.base import Batch
from gearnn_ray.training.predict import Normalisation, Predictor, for_inference


def reestimate_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    normalisation: Normalisation,
    precision: str,
    chosen: Collection[str] | None = None,
) -> None:
    """Replace the running statistics of batch normalisations by the mean over the statistics of these batches (AdaBN).

    batches: cropped as in training, because statistics of whole frames differ from those that the weights were trained with;
    their targets are not used. chosen: layers whose statistics may move, by default all; the others stay, and normalise with what
    they have. Weights stay as they are. Leaves the network in evaluation mode.
    """
    device = next(for_inference(model).parameters()).device
    forward = Predictor(model, normalisation, precision)
    norms = [
        module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and (chosen is None or statistics_of(path) in chosen)
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.training = True  # not by `train()`, which norms that are never trained do not follow
    with torch.no_grad():
        for batch in batches if norms else ():
            forward(batch.to(device).images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.training = False
    model.eval()
