"""The bundles of a replica: the release that each one is now, and the forward pass of a batch of frames.

Knows nothing about HTTP or Ray.
"""

import logging
import math
import time
from collections.abc import Sequence
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
from gearnn_ray.service.batching import Group
from gearnn_ray.service.copies import Copies
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.serving.frames import Evidence, Frame
from gearnn_ray.serving.level_estimation import LevelEstimate, LevelEstimator, Reference
from gearnn_ray.serving.stream_table import StreamTable
from gearnn_ray.store.releases import Store
from gearnn_ray.tasks.base import Image
from gearnn_ray.video.decoding import VideoFrame
from gearnn_ray.video.stream_levels import StreamLevels

_LOG = logging.getLogger("ray.serve")  # Ray Serve writes this log to a file of the replica


class Bundle:
    """A configured bundle: its model, and what went wrong when it was last looked up."""

    def __init__(self, ref: str, config: ServeConfig) -> None:
        """ref: "name:tag" or "name@sha256:…". Loads nothing; `refresh` does."""
        self.ref, self._config = ref, config
        self._copies = Copies(config.cache, config.store, config.require_signature)
        self.current: AdaptiveModel | None = None
        self.problem: str | None = None
        self.is_copy = False
        """Whether the current release was read from this node's copy."""
        self._streams: StreamTable[StreamLevels] = StreamTable()
        self._streams_of: str | None = None  # the release that they are levels of

    def refresh(self) -> None:
        """Load the release if there is none yet or the tag has moved. Blocks. If this fails, the old release stays; if there is
        none, the last one that could be loaded on this node is served from its copy.
        """
        try:
            if self.current is None or self.is_copy or self._tagged() != self.current.digest:
                self.current = self._pull(self._config.store, self.ref)
                self._copies.keep(self.ref, f"{self.current.name}@{self.current.digest}")
            self.problem, self.is_copy = None, False
        except UserError as error:
            self.problem = str(error)
        except Exception as error:
            _LOG.exception("%s could not be looked up", self.ref)
            self.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if self.current is None:
            self._serve_copy()

    def model(self) -> AdaptiveModel:
        """The model of the current release. Raises CorruptStoreError while none could be loaded."""
        if self.current is None:
            raise CorruptStoreError(f"the bundle {self.ref} is not loaded ({self.problem}): try again later")
        return self.current

    def level_of_next(self, stream: str, evidence: Evidence) -> tuple[AdaptiveModel, LevelEstimate]:
        """The model and the level for the next frame of a stream. A stream is remembered from segment to segment, until the
        release is replaced. Raises as `model` does, and TooManyStreamsError.
        """
        model = self.model()
        if self._streams_of != model.digest:
            self._streams, self._streams_of = StreamTable(), model.digest
        levels = self._streams.state(stream, lambda: StreamLevels(model.level_estimator, stream))
        return model, levels.estimate(evidence)

    def health(self) -> BundleHealth:
        """The state of this bundle."""
        if (model := self.current) is None:
            return BundleHealth(problem=self.problem)
        names = model.content.model.class_names
        return BundleHealth(model.digest, model.task.name, model.levels, names, self.problem, self.is_copy)

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

    def _serve_copy(self) -> None:
        if (last := self._copies.last(self.ref)) is None:
            return
        try:
            self.current = self._pull(*last)
        except Exception as error:  # a copy may be damaged in any way, and is only a help
            _LOG.warning("the copy of %s in %s cannot be served: %s", last[1], last[0], error)
        else:
            self.is_copy = True
            _LOG.warning("%s cannot be loaded (%s): the copy of %s is served", self.ref, self.problem, last[1])

    def _pull(self, store: str, ref: str) -> AdaptiveModel:
        config = self._config
        model = AdaptiveModel.pull(
            store, ref, config.device, config.untrained, config.trust, config.precision, config.require_signature
        )
        reference = Reference.of_manifest(model.content)
        model.level_estimator = LevelEstimator(model.levels, reference, config.untrained, config.cameras)
        return model


def check_bundles(config: ServeConfig) -> None:
    """Raise UserError unless every bundle can be pulled, is signed as required, and its network is built in or trusted.

    Imports no network.
    """
    store = Store(config.store)
    for ref in config.bundles:
        check_released_name(store.pull(ref, config.require_signature).content.model.name, config.trust)


@dataclass(frozen=True, eq=False)
class Item:
    """One frame in a batch. media_type: of its answer; None for a line. since: time.perf_counter when it entered the queue."""

    model: AdaptiveModel
    frame: Frame | VideoFrame
    estimate: LevelEstimate
    media_type: str | None
    since: float


def values_of(model: AdaptiveModel, frame: Frame | VideoFrame) -> int:
    """Of the frame or of the image that the network sees, whichever has more: the numbers that a pass has to do with."""
    input_size = model.content.model.input_size
    return max(frame.pixels.size, 3 * math.prod(input_size) if input_size else 0)


def group_of(item: Item, most: int, pixels: int) -> Group:
    """The frames that may share a pass: at most `most`, and no more than have so many pixels together.

    Those of one size share one. Where the network scales frames to one size, all frames up to this size do, those up to twice as
    many pixels, and so on: larger ones apart, because answers have the size of the frame.
    """
    height, width, _ = item.frame.pixels.shape
    input_size = item.model.content.model.input_size
    if input_size is None:
        return Group((id(item.model), height, width), max(1, min(most, pixels // (height * width))))
    doublings = max(0, math.ceil(math.log2(height * width / math.prod(input_size))))
    return Group((id(item.model), doublings), max(1, min(most, pixels // (math.prod(input_size) << doublings))))


@torch.no_grad()  # not inference_mode: weights that are merged and kept here are used where gradients are taken, too
def predict(items: Sequence[Item]) -> list[Prediction]:
    """One forward pass over frames of one group (`group_of`), each at its own level."""
    start = time.perf_counter()
    model = items[0].model
    images = _images([item.frame.pixels for item in items])
    estimates = model.mixed(images, [item.estimate for item in items])
    outputs = model(images, estimates)
    release, class_names = f"{model.name}@{model.digest}", model.content.model.class_names
    predictions = []
    for item, estimate, prediction in zip(items, estimates, outputs, strict=True):
        kind, task = item.media_type, model.task
        content = task.answer(prediction) if kind is None else task.content(prediction, kind)
        seconds = {"queue": start - item.since, "network": time.perf_counter() - start}
        predictions.append(Prediction(content, estimate, release, seconds, class_names))
    return predictions


def _images(frames: Sequence[Image]) -> torch.Tensor | list[torch.Tensor]:
    """[B, 3, H, W] of frames of one size, else a list of [3, H, W]."""
    if len({frame.shape for frame in frames}) == 1:
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
    return [torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames]


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
