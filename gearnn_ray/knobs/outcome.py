"""What a segment costs and earns with each configuration of the knobs: all that a method that steers them could find out.

It is a pure function of segment, network and configurations, computed once. Every method is then a walk through these numbers
(`methods`). Q stands for the number of configurations, the best one first.
"""

import functools
import math
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gearnn_ray.core.events import Emit
from gearnn_ray.knobs.encoding import Encoded, encode, shown
from gearnn_ray.knobs.encoding import decode as decode_segment
from gearnn_ray.knobs.objective import pixel_loss, psnr_loss, random_loss, ssim_loss, tile_errors
from gearnn_ray.knobs.saliency import for_size, gradient
from gearnn_ray.knobs.settings import Image, Settings
from gearnn_ray.knobs.streams import Segment
from gearnn_ray.knobs.tiles import tile_means
from gearnn_ray.levels.h264_codec import video_versions
from gearnn_ray.levels.level import CLEAN
from gearnn_ray.offline.job_spec import stage_key
from gearnn_ray.offline.records import StageResult
from gearnn_ray.offline.stage_cache import StageCache
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.serving.frames import evidence_of, read_frame
from gearnn_ray.store.releases import Store

OUTCOME_VERSION = 1
"""Part of every key: raised whenever the same segment would give other numbers."""

ORIGINAL, ADAPTED = "original", "gearnn"
NETWORKS: Final = (ORIGINAL, ADAPTED)
"""The base alone, and the adaptive network at each configuration's own level."""

_OF_PIXELS = {"pixels": pixel_loss, "psnr": psnr_loss, "ssim": ssim_loss, "random": random_loss}

Numbers = tuple[float | None, ...]


@dataclass(frozen=True)
class Outcomes(StageResult):
    """One segment at Q configurations, over one network.

    bytes, sent: of the segment, and how many frames are in it. accuracy: percent over the segment's frames, against the labels or
    the original network's answers to the pristine frames; None where there is nothing to find. agreement: the same against the
    network's own answers to the best configuration, which is what a server without labels can know. level: of the network.
    shows: a checksum of what is seen, so that equal ones are equal pixels. losses: by name, a row for each configuration at which
    a gradient was taken with a number for each one that it judges; a single row where no gradient is needed; None where it is not
    finite. seconds: of the pristine frames' answers, of one frame's gradient, and of one encoding, means.
    """

    stage = "outcomes"
    bytes: tuple[int, ...]
    sent: tuple[int, ...]
    accuracy: Numbers
    agreement: Numbers
    level: tuple[str, ...]
    shows: tuple[int, ...]
    losses: dict[str, tuple[Numbers, ...]]
    seconds_forward: float
    seconds_gradient: float
    seconds_encode: float


@dataclass(frozen=True)
class Judge:
    """What outcomes depend on beside the segment. digest: of the release's manifest. classes: ids of those that count, empty for
    all. configurations: the knobs' specifications, which name the settings in keys. threads: torch's.
    """

    store: str
    release: str
    digest: str
    trust: tuple[str, ...]
    device: str
    threads: int
    classes: tuple[int, ...]
    specifications: tuple[str, ...]
    settings: tuple[Settings, ...]


def outcomes(judge: Judge, segment: Segment, model: AdaptiveModel, emit: Emit) -> tuple[Outcomes, ...]:
    """Of both `NETWORKS`, from the store or computed now."""
    cache, digest = StageCache(Store(judge.store), "all", emit), segment.digest(model.task)
    keys = {_key(judge, model, digest, segment.rate, network): network for network in NETWORKS}

    def compute(missing: Sequence[str]) -> list[Outcomes]:
        return measured(model, segment, judge.settings, [keys[key] for key in missing], judge.classes)

    return tuple(cache.results(Outcomes, list(keys), compute))


def _key(judge: Judge, model: AdaptiveModel, segment: str, rate: float, network: str) -> str:
    return stage_key(
        "adapt", adapt=OUTCOME_VERSION, task_version=model.task.version, release=judge.digest, network=network, segment=segment,
        rate=rate, knobs=judge.specifications, classes=judge.classes, device=judge.device, threads=judge.threads,
        codecs=video_versions(),
    )  # fmt: skip


@dataclass
class _Seen:
    """What is kept of one configuration until gradients are taken. error: decoded less pristine pixels, a mean over frames."""

    encoded: Encoded
    received: list[Image]
    tiles: NDArray[np.float32]
    error: NDArray[np.float16]
    shows: int
    losses: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class _Gradient:
    """Σ |S · e| and -⟨g, e⟩ (`objective`) of one gradient with the errors of each configuration. seconds: of the gradient."""

    saliency: Numbers
    signed: Numbers
    seconds: float


def measured(
    model: AdaptiveModel, segment: Segment, settings: Sequence[Settings], networks: Sequence[str], classes: Collection[int] = ()
) -> list[Outcomes]:
    """The outcomes of a segment at each of the settings, over each of `NETWORKS` that is named."""
    judging = _Judging(model, segment, [_seen(segment.frames, each) for each in settings], classes)
    return [judging.outcomes(settings, network) for network in networks]


def level_of(model: AdaptiveModel, seen: _Seen, settings: Settings) -> str:
    """The level of the release for a segment that was encoded like this: its size and quality are known from the settings, its
    light is seen in its first frame.
    """
    first = seen.received[0]
    if settings.jpeg_quality is not None:
        evidence = read_frame(seen.encoded.packets[0], "image/jpeg").evidence
    elif settings.qp is not None:
        evidence = evidence_of(first, qp=float(settings.qp))
    else:
        evidence = evidence_of(first, crf=settings.crf)
    return model.level_estimator.estimate(evidence).level


def _seen(frames: Sequence[Image], settings: Settings) -> _Seen:
    start = time.perf_counter()
    encoded = encode(frames, settings)
    seconds = time.perf_counter() - start
    pristine, visible, none = np.stack(frames), shown(encoded, frames), np.zeros(0, np.float32)
    error = np.zeros(visible.shape[1:], np.int64)
    for own, each in zip(pristine, visible, strict=True):
        error += each.astype(np.int16) - own
    losses = {name: loss(none, pristine, visible) for name, loss in _OF_PIXELS.items()}
    mean, shows = (error / len(frames)).astype(np.float16), zlib.crc32(visible.tobytes())
    return _Seen(encoded, decode_segment(encoded), tile_errors(pristine, visible), mean, shows, losses, seconds)


class _Judging:
    """What the network says of one segment. Configurations at which both networks are the same are judged once."""

    def __init__(self, model: AdaptiveModel, segment: Segment, seen: Sequence[_Seen], classes: Collection[int]) -> None:
        self._model, self._segment, self._seen, self._classes = model, segment, seen, classes
        self._size = segment.frames[0].shape[:2]
        start = time.perf_counter()
        pristine = self._answers(segment.frames, CLEAN.name)
        self._seconds = time.perf_counter() - start
        self._targets = segment.targets or tuple(model.task.target_of(answer, self._size) for answer in pristine)
        # cached by the number of the configuration and the level of the network
        self.answers_to, self.gradient_at = functools.cache(self._answers_to), functools.cache(self._gradient_at)
        self.accuracy, self.agreement = functools.cache(self._accuracy), functools.cache(self._agreement)

    def outcomes(self, settings: Sequence[Settings], network: str) -> Outcomes:
        seen, model = self._seen, self._model
        levels = [CLEAN.name if network == ORIGINAL else level_of(model, *each) for each in zip(seen, settings, strict=True)]
        gradients = [self.gradient_at(*each) for each in enumerate(levels)]
        rows = {name: tuple(getattr(each, name) for each in gradients) for name in ("saliency", "signed")}
        return Outcomes(
            tuple(len(each.encoded) for each in seen),
            tuple(len(each.encoded.sent) for each in seen),
            tuple(self.accuracy(*each) for each in enumerate(levels)),
            tuple(self.agreement(*each, levels[0]) for each in enumerate(levels)),
            tuple(levels),
            tuple(each.shows for each in seen),
            {**rows, **{name: (tuple(each.losses[name] for each in seen),) for name in _OF_PIXELS}},
            self._seconds,
            float(np.mean([each.seconds for each in gradients])),
            float(np.mean([each.seconds for each in seen])),
        )

    def _answers(self, images: Sequence[Image], level: str) -> list[Any]:
        images_BCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return list(self._model(images_BCHW, [level] * len(images)))

    def _answers_to(self, number: int, level: str) -> list[Any]:
        """An answer for each pristine frame: that to the last frame sent."""
        seen = self._seen[number]
        answers = self._answers(seen.received, level)
        places = np.searchsorted(seen.encoded.sent, np.arange(len(self._segment.frames)), "right") - 1
        return [answers[place] for place in places]

    def _accuracy(self, number: int, level: str) -> float | None:
        return self._score(self.answers_to(number, level), number, self._targets)

    def _agreement(self, number: int, level: str, best: str) -> float | None:
        task, size = self._model.task, self._seen[0].encoded.size
        own = [task.target_of(answer, size) for answer in self.answers_to(0, best)]
        return self._score(self.answers_to(number, level), number, own)

    def _score(self, answers: Sequence[Any], number: int, targets: Sequence[Any]) -> float | None:
        """The task's first metric in percent over the frames; None where their targets have nothing to be found."""
        task, count, size = self._model.task, self._model.content.model.num_classes, self._seen[number].encoded.size
        each = [task.evidence(answer, target, size, count) for answer, target in zip(answers, targets, strict=True)]
        each = [task.of_classes(evidence, self._classes) for evidence in each] if self._classes else each
        evidence: Mapping[str, Tensor] = {name: torch.stack([one[name] for one in each]) for name in each[0]}
        if not task.target_summary(evidence).any():
            return None
        return float(task.first_metric(evidence, np.ones((1, len(each))))[0])

    def _gradient_at(self, number: int, level: str) -> _Gradient:
        """Of the last frame of a configuration."""
        model, seen = self._model, self._seen[number]
        start = time.perf_counter()
        found = gradient(model.task, model.forward_at([level]), seen.received[-1], model.device, self._classes)
        weights = for_size(tile_means(np.abs(found).sum(-1)), seen.encoded.size, self._size)
        seconds, full = time.perf_counter() - start, _for_size(found, self._size)
        return _Gradient(
            tuple(_finite(float((weights * other.tiles).sum())) for other in self._seen),
            tuple(_finite(-float(np.vdot(full, other.error.astype(np.float32)))) for other in self._seen),
            seconds,
        )


def _for_size(found: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """A gradient [h, w, 3] for the pixels of frames of this size, of which several share the effect of one."""
    if found.shape[:2] == size:
        return found
    rows, columns = (((np.arange(side) + 0.5) * own / side).astype(np.intp) for side, own in zip(size, found.shape, strict=False))
    share = np.float32(found.shape[0] * found.shape[1] / (size[0] * size[1]))
    spread: NDArray[np.float32] = found[rows[:, None], columns] * share
    return spread


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
