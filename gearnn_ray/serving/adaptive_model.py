"""One network for every level: each image of a batch uses the weights of its own distortion level, in one forward pass.

    model = AdaptiveModel.pull("artifacts", "drn22-scenes-jpeg:latest")
    logits = model(images)                                 # the level of each image is estimated
    logits = model(images, levels=["jpeg-10", "jpeg-80"])  # or given
    model.set_level("jpeg-10")                             # or the same for all images until the next set_level

The base is held once, and each adaptor in its storage format; a tensor in a format other than float32 is restored when it
is used. Knows nothing about HTTP, Ray, or how a release is made.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gearnn_ray.config.serve import Untrained
from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.level import CLEAN
from gearnn_ray.models.detector import has_its_own_size
from gearnn_ray.serving.assembly import assemble, predictor, weights_of
from gearnn_ray.serving.batch import Mixture, Selection
from gearnn_ray.serving.frames import evidence_of
from gearnn_ray.serving.jpeg import quality_of_pixels
from gearnn_ray.serving.level_estimation import LevelEstimate, LevelEstimator, Reference
from gearnn_ray.serving.mixing import StreamShares, entropy_share, uncertainties
from gearnn_ray.serving.modules import AdaptiveConv, PerLevel
from gearnn_ray.store.releases import Release, Store
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import Forward
from gearnn_ray.training.precision import fastest_precision
from gearnn_ray.training.predict import Predictor, at_size


class _Choice:
    """The level of `set_level`; a plain object, because getting and setting a Module's attributes takes microseconds."""

    __slots__ = ("hold", "level", "lock", "set_all")

    def __init__(self, selection: Selection) -> None:
        self.level: str | None = None
        self.lock = threading.Lock()
        self.hold, self.set_all = selection.hold, selection.set_all


class AdaptiveModel(nn.Module):
    """The network of a release at all its levels.

    `levels` are the names of the levels, first `clean`, the base itself. `level_estimator` estimates the level of a frame.
    `task` is the network's task. `content` is the manifest of the release, `digest` its digest, and `name` the release's name.

    One model serves one call at a time. `share()` returns another model over the same weights, for another thread or stream.
    """

    def __init__(
        self,
        release: Release,
        device: str | torch.device = "cpu",
        untrained: Untrained = "nearest",
        trust: Collection[str] = (),
        precision: Literal["auto", "float32", "bfloat16"] = "float32",
    ) -> None:
        """Arguments as in `pull`.

        Raises UserError if the network of the release is not trusted, cannot be built, or does not fit its weights.
        """
        super().__init__()
        self.content, self.digest, self.name = release.content, release.digest, release.name
        self.levels = (CLEAN.name, *(level for level in release.levels if level != CLEAN.name))
        self.level_estimator = LevelEstimator(self.levels, Reference.of_manifest(self.content), untrained)
        self.task = task_by_name(self.content.model.task)
        self._number = {level: number for number, level in enumerate(self.levels)}
        with torch.random.fork_rng(devices=[]):  # building a network draws random numbers
            self._network, self._selection = assemble(release, self.levels, _device(device), untrained != "nearest", trust)
        self._predictor = replace(predictor(self.content, self._network), precision=self._precision(precision))
        self._run = self._predictor
        self._input_size = self.content.model.input_size
        self._choice = _Choice(self._selection)
        self._shares, self._has_own_size = StreamShares(), has_its_own_size(self._network)
        self.eval()

    @classmethod
    def pull(
        cls,
        uri: str,
        ref: str,
        device: str | torch.device = "cpu",
        untrained: Untrained = "nearest",
        trust: Collection[str] = (),
        precision: Literal["auto", "float32", "bfloat16"] = "float32",
        require_signature: str | None = None,
    ) -> "AdaptiveModel":
        """The release `ref` ("name", "name:tag" or "name@sha256:…") of the store at `uri`, with every digest verified.

        untrained: the weights for a level between two levels of the release: those of the nearest one, the linear interpolation
        of both, or their mixture by the entropies of both networks' answers (`serving.mixing`). trust: import paths of modules,
        such as "my_package.nets", whose networks the release may name; built-in networks need none. precision: of the network's
        arithmetic; auto: bfloat16 where the device gains from it, else float32. require_signature: a public key, without whose
        signature the release is refused. Raises UserError and CorruptStoreError as `Store.pull` and the constructor do.
        """
        return cls(Store(uri).pull(ref, require_signature), device, untrained, trust, precision)

    def forward(self, images: Any, levels: Any = None) -> Any:
        """The task's outputs for images [B, 3, H, W]. For segmentation, logits float32 [B, K, H, W]. For detection a list with a
        dict for each image, its D detections with the highest scores first: `boxes` float32 [D, 4] (left, top, right and bottom
        in pixels of the image), `scores` float32 [D], `labels` int64 [D] class ids, and `masks` bool [D, H, W] of a network that
        has them. In a compiled graph of the whole model D is fixed, and places without a detection have a score of 0.

        images: uint8 RGB, or float if they are normalised already. Of a release with `model.input` training-size also a list of
        images [3, H, W] of any sizes, whose logits are then a list of [K, H, W]: all are scaled to one size, and share one pass;
        the level of each is that of the image as it came. levels: for each image the name of a level (a level that
        the release does not have is mapped to its levels as `untrained` says) or a `LevelEstimate`; or int64 [B], positions
        in `self.levels`, which a compiled graph can take. None: the level of `set_level`, or without one, the estimated level
        of each image. Raises UserError for anything else.
        """
        self._check_images(images)
        if isinstance(levels, Tensor) and torch.compiler.is_compiling():
            self._selection.set_index(levels)
            return self._outputs(self._predictor, images)
        with self._selected(images, levels), torch.no_grad():
            if self._run is not self._predictor:
                self._selection.write()
            return self._outputs(self._run, images)

    def forward_at(self, levels: Any = None) -> Forward:
        """The network at these levels (as in a call) as the tasks see one: a function of pixel values from 0 to 255 [B, 3, H, W],
        uint8 or float32, to the network's raw output, through which gradients flow to the pixels. Never compiled.
        """

        def forward(x_BCHW: Tensor) -> Any:
            images = x_BCHW.detach().round().clamp(0, 255).to(torch.uint8)
            with self._selected(images, levels):
                return self._predictor(at_size(x_BCHW.to(self.device), self._input_size))

        return forward

    def set_level(self, level: str | None) -> None:
        """Use this level of the release for all images from now on. None: estimate the level of each image.

        Copies no weight: it sets pointers, and a compiled network writes an index before its next run. Tensors of the level in
        a storage format other than float32 are restored by the next run that is not compiled, and kept until the next
        `set_level`. Raises UserError for a level that the release does not have.
        """
        number = None if level is None else self._number.get(level)
        if number is None and level is not None:
            raise self._unknown(level)
        choice = self._choice
        with choice.lock:
            choice.level = level
            choice.hold(number)
            if number is not None:
                choice.set_all(number)

    def estimate_levels(self, images: Tensor | Sequence[Tensor]) -> list[LevelEstimate]:
        """The level of each image (as in a call), from its pixels alone: its size, its brightness and traces of JPEG. With
        `untrained="entropy"`, weights between two levels are left to `mixed`.
        """
        estimates = []
        for image in images:
            pixels = image if image.dtype == torch.uint8 else self._predictor.normalisation.inverse(image[None])[0]
            frame = np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())
            jpeg = quality_of_pixels(frame) if self.level_estimator.sees_jpeg else None
            estimates.append(self.level_estimator.estimate(evidence_of(frame, jpeg)))
        return estimates

    def mixed(self, images: Tensor | Sequence[Tensor], estimates: Sequence[LevelEstimate]) -> list[LevelEstimate]:
        """The estimates of these images (as in a call), one each, with the weights that both networks' answers to the image give
        in place of those that are None, smoothed over the image's stream. A call of the model finds them by itself; this tells
        them. Raises UserError as a call does.
        """
        self._check_images(images)
        if len(estimates) != len(images):
            raise UserError(f"{len(estimates)} estimates for {len(images)} images: give one estimate per image")
        with self._choice.lock, torch.no_grad():
            try:
                return self._mixed(images, estimates)
            finally:
                if (held := self._choice.level) is not None:
                    self._selection.set_all(self._number[held])

    def compile(self, **options: Any) -> None:
        """Compile the network with `torch.compile(fullgraph=True, **options)`: one graph for all levels and mixtures.

        How certain networks are of images between two levels is still measured without the graph, because each number of such
        images in a batch would need a graph of its own.
        """
        self._run = replace(self._predictor, network=torch.compile(self._network, fullgraph=True, **options))

    def share(self) -> "AdaptiveModel":
        """Another model over the same weights, with a level of its own; not compiled."""
        twin = copy.copy(self)
        twin._modules = {}
        tensors: dict[int, Any] = {id(tensor): tensor for tensor in weights_of(self._network)}
        with self._choice.lock:
            host = self._selection.host
            tensors |= {id(host.restored): {}, id(host.merged): OrderedDict(), id(host.mixtures): []}
            tensors |= {id(self._selection.vectors): self._selection.vectors}
            twin._network, twin._selection = copy.deepcopy((self._network, self._selection), tensors)
        twin._selection.hold(None)
        twin._predictor = twin._run = replace(self._predictor, network=twin._network)
        twin._choice, twin._shares = _Choice(twin._selection), StreamShares()
        return twin

    @contextmanager
    def _selected(self, images: Tensor | Sequence[Tensor], levels: Any) -> Iterator[None]:
        """Meanwhile, each image has the weights of its level, and no other call changes them."""
        with self._choice.lock:
            held = self._choice.level
            try:
                with torch.no_grad():
                    self._selection.reserve(len(images))
                    if levels is not None or held is None:
                        self._selection.set_each(self._mixtures(images, levels))
                    elif self._selection.host.rows is None:  # a compiled graph of the whole model ran after `set_level`
                        self._selection.set_all(self._number[held])
                yield
            finally:
                if levels is not None and held is not None:
                    self._selection.set_all(self._number[held])

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptiveModel":
        raise UserError(
            "the device and type of an AdaptiveModel are fixed, because models share weights: pull it with device=… instead"
        )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._selection.maps.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory: the base and all adaptors as they are stored.

        Includes the restored tensors of the level of `set_level`, and the merged tensors of the last few mixtures of two levels.
        """
        tensors = [*weights_of(self._network), *self._selection.kept()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def methods(self) -> dict[str, tuple[str, str]]:
        """How modules with weights per sample compute, by path: in eager execution, and in a compiled graph."""
        chosen = {}
        for module in self._network.modules():
            if isinstance(module, AdaptiveConv) and module.table("weight") is not None:
                chosen[module.path] = (module.eager_method, module.compiled_method)
            elif isinstance(module, PerLevel):
                chosen[module.path] = ("per level", "per sample")
        return chosen

    def _precision(self, precision: str) -> str:
        return fastest_precision(self.device) if precision == "auto" else precision

    def _outputs(self, run: Predictor, images: Tensor | Sequence[Tensor]) -> Any:
        x = self._normalised(images)
        outputs, seen = self.task.outputs(run.normalised(x)), (x.shape[-2], x.shape[-1])

        def fitted(own: Any, frame: Tensor) -> Any:
            return self.task.at_frame_size(own, frame.shape[-2], frame.shape[-1], seen)

        if isinstance(images, Tensor):
            return fitted(outputs, images)
        return [fitted(outputs[place : place + 1], image)[0] for place, image in enumerate(images)]

    def _normalised(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """The images as the network takes them [B, 3, h, w]."""
        batches = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        fitted = [at_size(batch.to(self.device), self._input_size) for batch in batches]
        normalisation = self._predictor.normalisation
        x = [normalisation(batch) if batch.dtype == torch.uint8 else batch.float() for batch in fitted]
        return x[0] if len(x) == 1 else torch.cat(x)

    def _check_images(self, images: Any) -> None:
        """Raise UserError unless these are images that one pass can take."""
        if isinstance(images, list) and self._input_size is not None and images:
            for image in images:
                _check_batch(image[None] if isinstance(image, Tensor) else image)
        else:
            _check_batch(images)

    def _mixtures(self, images: Tensor | Sequence[Tensor], levels: Any) -> list[Mixture]:
        if levels is None:
            levels = self.estimate_levels(images)
        if isinstance(levels, Tensor):
            numbers = levels.tolist() if levels.dim() == 1 and not levels.is_floating_point() else []
            if not all(0 <= number < len(self.levels) for number in numbers):
                raise UserError(f"the positions of levels are {numbers}: expected 0 to {len(self.levels) - 1}")
            levels = [self.levels[number] for number in numbers]
        given = list(levels) if isinstance(levels, Iterable) and not isinstance(levels, str) else [levels]
        if isinstance(levels, str) or len(given) != len(images):
            found = f"one level {levels!r}" if isinstance(levels, str) else f"{len(given)} levels"
            raise UserError(f"{found} for {len(images)} images: give one level per image, or call set_level")
        return [self._mixture(estimate) for estimate in self._mixed(images, [self._estimate(level) for level in given])]

    def _estimate(self, level: Any) -> LevelEstimate:
        if isinstance(level, str):
            level = LevelEstimate(level) if level in self._number else self.level_estimator.match(level)
        if not isinstance(level, LevelEstimate):
            raise UserError(f"{level!r} is not a level: give the name of a level, or a LevelEstimate")
        return level

    def _mixed(self, images: Tensor | Sequence[Tensor], estimates: Sequence[LevelEstimate]) -> list[LevelEstimate]:
        """As `mixed`; leaves the selection at other levels. The two networks of all images run in one pass."""
        found = list(estimates)
        places = [place for place, estimate in enumerate(found) if estimate.weight is None]
        if not places:
            return found
        pairs = [(found[place].level, found[place].neighbour or found[place].level) for place in places]
        self._selection.set_each([self._mixture(LevelEstimate(level)) for pair in pairs for level in pair])

        def network(x_BCHW: Tensor) -> Any:
            return self._predictor.normalised(x_BCHW.repeat_interleave(2, 0))

        chosen = images[places] if isinstance(images, Tensor) else [images[place] for place in places]
        entropies = uncertainties(self.task, network, self._normalised(chosen), self._has_own_size)
        for place, pair, own, neighbours in zip(places, pairs, entropies[::2], entropies[1::2], strict=True):
            share = self._shares.add(entropy_share(own, neighbours), *pair, found[place].stream)
            found[place] = replace(found[place], weight=share)
        return found

    def _mixture(self, estimate: LevelEstimate) -> Mixture:
        names = (estimate.level, estimate.neighbour or estimate.level)
        if unknown := next((name for name in names if name not in self._number), None):
            raise self._unknown(unknown)
        assert estimate.weight is not None
        if estimate.weight and not self._selection.mixes:
            raise UserError("this model cannot mix two levels: pull it with untrained='interpolate' or 'entropy'")
        return Mixture(self._number[names[0]], self._number[names[1]], estimate.weight)

    def _unknown(self, level: str) -> UserError:
        return UserError(f"{self.name} has no level {level!r}: choose one of {', '.join(self.levels)}")


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the device {str(device)!r} cannot be used here ({reason}): give cpu, or cuda on a machine with a GPU"
        ) from error
    return chosen


def _check_batch(images: Any) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != 3 or not images.numel():
        found = f"a tensor {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise UserError(f"the images are {found}: expected a tensor [B, 3, H, W] with at least one image")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UserError(f"the images are {images.dtype}: expected uint8, or float32 that is normalised already")
