"""What is measured of weights: scores and evidence, frequency responses, pictures. Knows nothing of Ray or of how they were made.

One pass over a level's images evaluates all weights at this level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from gearnn_ray.core.events import Emit, Event
from gearnn_ray.evaluation.entropy import MixedByEntropy
from gearnn_ray.evaluation.frequency import frequency_response
from gearnn_ray.evaluation.records import Evaluated, FrequencyResult, Picture, Source, Weights
from gearnn_ray.evaluation.runs import EVALUATION_VERSION, base_network, change_of, pixels_version, renamed
from gearnn_ray.models.detector import has_its_own_size
from gearnn_ray.offline.base import SeveralSizesError, training_size
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.stage_cache import StageCache
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks.base import scores, scores_of_images
from gearnn_ray.training.predict import Predictor, collect_evidence, for_inference, predict_image, with_weights
from gearnn_ray.training.sampling import Subset

FREQUENCY_IMAGES = 24
"""Validation images, evenly spaced, that a frequency response is averaged over."""


def evaluate_weights(spec: JobSpec, level: str, sources: Sequence[Source], emit: Emit) -> dict[Source, Evaluated]:
    """These weights on a level's validation images; those not yet in the store in one pass."""
    cache = StageCache(Store(spec.store), level, emit)
    source_of = {_key(spec, "evaluated", level, weights=source): source for source in sources}

    def evaluate(keys: Sequence[str]) -> list[Evaluated]:
        model, base = base_network(spec)
        predictors = [_predictor_of(spec, model, base, source_of[key]) for key in keys]
        images, targets = spec.validation_data(level)

        def report(done: int) -> None:
            emit(Event("progress", Evaluated.stage, level, done, len(images)))

        found = collect_evidence(spec.task, model, predictors, images, targets, spec.network.num_classes, report)
        return [_evaluated(spec, each, cache.store.put_state(each).digest) for each in found]

    results = cache.results(
        Evaluated, list(source_of), evaluate, lambda result: cache.store.is_intact(result.evidence), metric=spec.task.metrics[0]
    )
    return dict(zip(source_of.values(), results, strict=True))


def evaluate_scaled(spec: JobSpec, level: str, emit: Emit) -> Evaluated | None:
    """The base on a level's validation images after they are scaled to the size of the training images, as `model.input`
    training-size does. None where this changes nothing, or no such size is defined; and where the targets are the base's own
    answers to undistorted images of another size, which it would answer otherwise.
    """
    try:
        size = training_size(spec.data, spec.cache)
    except SeveralSizesError:
        return None
    images, _ = spec.validation_data(level)
    if images[0].shape[:2] == size or has_its_own_size(spec.network.build()):
        return None
    if not spec.data.labelled and any(image.shape[:2] != size for image in spec.validation_data("clean")[0]):
        return None
    scaled = replace(spec, network=replace(spec.network, input_size=size))
    return evaluate_weights(scaled, level, [None], renamed(emit, lambda _: "original at training size"))[None]


def _evaluated(spec: JobSpec, evidence: Mapping[str, Tensor], digest: str) -> Evaluated:
    first, *others = scores(spec.task, evidence).items()
    return Evaluated(first[1], digest, dict(others))


def evidence_of(spec: JobSpec, evaluated: Evaluated) -> dict[str, Tensor]:
    """The task's evidence [N, ...]."""
    return Store(spec.store).get_state(evaluated.evidence)


def frequency(spec: JobSpec, level: str, weights: Weights, network: str, emit: Emit) -> FrequencyResult:
    """The frequency response (§3.1.2) of a network at a level, over at most `FREQUENCY_IMAGES` validation images."""
    cache = StageCache(Store(spec.store), level, emit)
    key = _key(spec, "frequency", level, weights=weights.digest, images=FREQUENCY_IMAGES)

    def respond() -> FrequencyResult:
        model, base = base_network(spec)
        model.load_state_dict({**base, **change_of(cache.store, base, weights.digest)})
        images, targets = spec.validation_data(level)
        count = min(len(images), FREQUENCY_IMAGES)
        positions = [index * len(images) // count for index in range(count)]
        shown, their_targets = (Subset(part, positions) for part in (images, targets))
        response = frequency_response(spec.task, model, shown, their_targets, spec.network.normalisation)
        return FrequencyResult(tuple(map(tuple, response.tolist())))

    return cache.result(FrequencyResult, key, respond, label=f"frequency response: {network}")


def picture_of(spec: JobSpec, level: str, weights: Weights, original: Evaluated, adaptor: Evaluated) -> Picture:
    """The image with the median gain from the adaptor: neither the best nor the worst example."""
    task = spec.task
    before_N, after_N = (scores_of_images(task, evidence_of(spec, each)) for each in (original, adaptor))
    gains_N = after_N - before_N
    index = int(np.argsort(gains_N, kind="stable")[len(gains_N) // 2])
    images, targets = spec.validation_data(level)
    model, base = base_network(spec)
    changes = [change_of(Store(spec.store), base, digest) for digest in (None, weights.digest)]
    predictors = [_predictor(spec, for_inference(model), change) for change in changes]
    first, second = (task.answer(predict_image(task, each, images[index], spec.device)) for each in predictors)
    both = (float(before_N[index]), float(after_N[index]))
    sample, names = spec.data.val.ids[index], spec.data.class_names
    return Picture(level, sample, images[index], targets[index], first, second, names, both)


def _predictor_of(spec: JobSpec, model: nn.Module, base: Mapping[str, Tensor], source: Source) -> Predictor:
    store = Store(spec.store)
    if not isinstance(source, tuple):
        return _predictor(spec, model, change_of(store, base, source))
    network = MixedByEntropy(spec.task, model, base, *(change_of(store, base, digest) for digest in source))
    return Predictor(network, spec.network.normalisation, spec.execution.precision)


def _predictor(spec: JobSpec, model: nn.Module, change: Mapping[str, Tensor]) -> Predictor:
    network = with_weights(model, {name: tensor.to(spec.device) for name, tensor in change.items()})
    return Predictor(network, spec.network.normalisation, spec.execution.precision)


def _key(spec: JobSpec, stage: str, level: str, **more: object) -> str:
    return spec.key(
        f"evaluation-{stage}",
        evaluation=EVALUATION_VERSION,
        level=level,
        val=spec.data.val.digest,
        pixels=pixels_version(level),
        **more,
    )
