"""The bundles of a replica: the release that each one is now, and the forward pass of a batch of frames.

Knows nothing about HTTP or Ray.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.knobs.saliency import for_size, saliency
from gearnn_ray.knobs.tiles import tiles_of
from gearnn_ray.knobs.wire import Head
from gearnn_ray.models.names import check_released_name
from gearnn_ray.service.backend import BundleHealth, Prediction
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.serving.frames import Evidence, Frame
from gearnn_ray.serving.level_estimation import LevelEstimate, LevelEstimator, Reference
from gearnn_ray.store.releases import Store
from gearnn_ray.video.decoding import VideoFrame
from gearnn_ray.video.stream_levels import StreamLevels

_STREAMS = 4096  # streams whose level is remembered; the one that was used least recently is dropped
_LOG = logging.getLogger("ray.serve")  # Ray Serve writes this log to a file of the replica


class Bundle:
    """A configured bundle: its model, and what went wrong when it was last looked up."""

    def __init__(self, ref: str, config: ServeConfig) -> None:
        """ref: "name:tag" or "name@sha256:…". Loads nothing; `refresh` does."""
        self.ref, self._config = ref, config
        self.current: AdaptiveModel | None = None
        self.problem: str | None = None
        self._streams: OrderedDict[tuple[str, str], StreamLevels] = OrderedDict()

    def refresh(self) -> None:
        """Load the release if there is none yet or the tag has moved. Blocks. If this fails, the old release stays."""
        try:
            if self.current is None or self._tagged() != self.current.digest:
                self.current = self._pull()
            self.problem = None
        except UserError as error:
            self.problem = str(error)
        except Exception as error:
            _LOG.exception("%s could not be looked up", self.ref)
            self.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"

    def model(self) -> AdaptiveModel:
        """The model of the current release. Raises CorruptStoreError while none could be loaded."""
        if self.current is None:
            raise CorruptStoreError(f"the bundle {self.ref} is not loaded ({self.problem}): try again later")
        return self.current

    def level_of_next(self, stream: str, evidence: Evidence) -> tuple[AdaptiveModel, LevelEstimate]:
        """The model and the level for the next frame of a stream. A stream is remembered from segment to segment, until the
        release is replaced. Raises as `model` does.
        """
        model = self.model()
        key = model.digest, stream
        levels = self._streams.setdefault(key, StreamLevels(model.level_estimator, stream))
        self._streams.move_to_end(key)
        if len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)
        return model, levels.estimate(evidence)

    def health(self) -> BundleHealth:
        """The state of this bundle."""
        if (model := self.current) is None:
            return BundleHealth(problem=self.problem)
        return BundleHealth(model.digest, model.task.name, model.levels, model.content.model.class_names, self.problem)

    def _tagged(self) -> str:
        """The digest that the bundle refers to now."""
        name, pinned, digest = self.ref.partition("@")
        if pinned:
            return digest
        name, _, tag = self.ref.partition(":")
        store = Store(self._config.store)
        if (now := store.tag_digest(name, tag)) is None:
            raise UserError(f"{self.ref} is not in {store.uri} any more: restore the store or the tag")
        return now

    def _pull(self) -> AdaptiveModel:
        config = self._config
        model = AdaptiveModel.pull(config.store, self.ref, config.device, config.untrained, config.trust, config.precision)
        reference = Reference.of_manifest(model.content)
        model.level_estimator = LevelEstimator(model.levels, reference, config.untrained, config.cameras)
        return model


def check_bundles(config: ServeConfig) -> None:
    """Raise UserError unless every bundle can be pulled, and its network is built in or trusted. Imports no network."""
    store = Store(config.store)
    for ref in config.bundles:
        check_released_name(store.pull(ref).content.model.name, config.trust)


@dataclass(frozen=True, eq=False)
class Item:
    """One frame in a batch. media_type: of its answer; None for a line. since: time.perf_counter when it entered the queue."""

    model: AdaptiveModel
    frame: Frame | VideoFrame
    estimate: LevelEstimate
    media_type: str | None
    since: float


def passes(items: Sequence[Item], pixels: int) -> Iterator[list[int]]:
    """Positions of the items that share a forward pass: one release, one size, and at most `pixels` pixels in total."""
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for position, item in enumerate(items):
        groups.setdefault((id(item.model), item.frame.pixels.shape), []).append(position)
    for (_, (height, width, _)), positions in groups.items():
        most = max(1, pixels // (height * width))
        for start in range(0, len(positions), most):
            yield positions[start : start + most]


@torch.no_grad()  # not inference_mode: weights that are merged and kept here are used where gradients are taken, too
def predict(items: Sequence[Item]) -> list[Prediction]:
    """One forward pass over frames of one release and size, each at its own level."""
    start = time.perf_counter()
    model = items[0].model
    images_BCHW = torch.from_numpy(np.stack([item.frame.pixels for item in items])).permute(0, 3, 1, 2).contiguous()
    estimates = model.mixed(images_BCHW, [item.estimate for item in items])
    outputs = model(images_BCHW, estimates)
    release, class_names = f"{model.name}@{model.digest}", model.content.model.class_names
    predictions = []
    for item, estimate, prediction in zip(items, estimates, outputs, strict=True):
        kind, task = item.media_type, model.task
        content = task.answer(prediction) if kind is None else task.content(prediction, kind)
        seconds = {"queue": start - item.since, "network": time.perf_counter() - start}
        predictions.append(Prediction(content, estimate, release, seconds, class_names))
    return predictions


def weights_at(model: AdaptiveModel, frame: VideoFrame, estimate: LevelEstimate, head: Head) -> NDArray[np.float32]:
    """What an error counts in each tile of a camera's frames: the same everywhere, or as the network's gradient says."""
    if head.gradient:
        return saliency_at(model, frame, estimate, head.frame)
    return np.ones(tiles_of(head.frame), np.float32)


def saliency_at(model: AdaptiveModel, frame: VideoFrame, estimate: LevelEstimate, size: tuple[int, int]) -> NDArray[np.float32]:
    """The saliency of a frame at the level at which it was answered, for the tiles of frames of this size (height, width)."""
    if not {estimate.level, estimate.neighbour or estimate.level} <= set(model.levels):  # of another release than now
        estimate = model.level_estimator.match(estimate.level)
    height, width, _ = frame.pixels.shape
    found = saliency(model.task, model.forward_at([estimate]), frame.pixels, model.device)
    return for_size(found, (height, width), size)
