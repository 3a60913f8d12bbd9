"""One base, every level: a network whose samples each use the weights of their own distortion level, in one pass.

    model = AdaptiveModel.pull("artifacts", "drn22-scenes-jpeg:latest")
    logits = model(images)                                 # levels detected per frame
    logits = model(images, levels=["jpeg-10", "jpeg-80"])  # or given
    model.set_level("jpeg-10")                             # or one for all until told otherwise

Holds the base and all adaptors once, to the byte, each as it is stored: a tensor under a code is restored when it is used.
Knows nothing of HTTP, Ray, or how a release was made.
"""

import copy
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from gearnn_ray.adaptors.storage_formats import parts_of
from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.level import CLEAN
from gearnn_ray.models.registry import build_model
from gearnn_ray.serving import convolution
from gearnn_ray.serving.batch import CompressedTable, Mixture, Selection, Table
from gearnn_ray.serving.frames import evidence_of
from gearnn_ray.serving.jpeg import quality_of_pixels
from gearnn_ray.serving.level_estimation import LevelEstimate, LevelEstimator, Reference
from gearnn_ray.serving.modules import Adaptive, AdaptiveConv, NeedsParentError, PerLevel, kind_of
from gearnn_ray.store.releases import Release, Store
from gearnn_ray.tasks.segmentation import Normalisation, logits_of

_DRY_BATCH = 3  # of the dry run: a number that no layer has by chance as its first dimension (as 1 or 2 might be)
_MEASURED_BATCH = 4
_LEAST_SIDE = 256  # pixels: images that the dry run may take a quarter of on each side
_USUAL_SIZE = (360, 480)  # height and width where a release does not say on what it was trained


class _Choice:
    """The level that `set_level` chose; a plain object, because a Module's attributes take microseconds to get and set."""

    __slots__ = ("hold", "level", "lock", "set_all")

    def __init__(self, selection: Selection) -> None:
        self.level: str | None = None
        self.lock = threading.Lock()
        self.hold, self.set_all = selection.hold, selection.set_all


class AdaptiveModel(nn.Module):
    """The network of a release at all its levels.

    levels: those of the release with `clean`, the base itself, first. device, detector, manifest, digest as they say.
    One model serves one call at a time; `share()` gives others for other threads or streams, without another copy of the
    weights.
    """

    def __init__(
        self,
        release: Release,
        device: str | torch.device = "cpu",
        untrained: Literal["nearest", "interpolate"] = "nearest",
    ) -> None:
        """Raises UserError when the release's network cannot be built or does not fit its weights."""
        super().__init__()
        self.manifest, self.digest, self.name = release.manifest, release.digest, release.name
        self.levels = (CLEAN.name, *(level for level in release.levels if level != CLEAN.name))
        self.level_estimator = LevelEstimator(self.levels, Reference.of_manifest(self.manifest), untrained)
        normalisation = self.manifest["model"]["normalisation"]
        self._normalise = Normalisation(tuple(normalisation["mean"]), tuple(normalisation["std"]))
        self._number = {level: number for number, level in enumerate(self.levels)}
        with torch.random.fork_rng(devices=[]):  # building a network draws numbers that nobody asked for
            self._network, self._selection = _assemble(
                release, self.levels, _device(device), untrained == "interpolate"
            )
        self._run: Any = self._network
        self._choice = _Choice(self._selection)
        self.eval()

    @classmethod
    def pull(
        cls,
        uri: str,
        ref: str,
        device: str | torch.device = "cpu",
        untrained: Literal["nearest", "interpolate"] = "nearest",
    ) -> "AdaptiveModel":
        """The release `ref` ("name", "name:tag" or "name@sha256:…") of the store at `uri`, every digest verified.

        untrained: what stands in for a level between the release's own: the nearest of them, or the interpolation of
        its two neighbours. Raises UserError, CorruptStoreError as `Store.pull` does.
        """
        return cls(Store(uri).pull(ref), device, untrained)

    def forward(self, images: Any, levels: Any = None) -> Tensor:
        """logits float32 [B, K, H, W] of images [B, 3, H, W]: uint8 RGB, or float and then normalised already.

        levels: a name per image (levels of the release, or others that `untrained` maps to them), or what the detector said
        of it, or int64 [B] of positions in `self.levels` (which a compiled graph may take); None: what `set_level` chose,
        otherwise detected per image. Raises UserError for anything else.
        """
        _check_images(images)
        if isinstance(levels, Tensor) and torch.compiler.is_compiling():
            self._selection.set_index(levels)
            return self._logits(self._network, images)
        with self._choice.lock, torch.no_grad():
            held = self._choice.level
            self._selection.reserve(len(images))
            if levels is not None or held is None:
                self._selection.set_each(self._mixtures(images, levels))
            elif self._selection.host.rows is None:  # the whole model was run compiled in between
                self._selection.set_all(self._number[held])
            if self._run is not self._network:
                self._selection.write()
            try:
                return self._logits(self._run, images)
            finally:
                if levels is not None and held is not None:
                    self._selection.set_all(self._number[held])

    def set_level(self, level: str | None) -> None:
        """Use this level of the release for every image from now on; None: detect again.

        No weight is moved: pointers change, and where the network is compiled an index is written before its next run. What
        is stored of the level under codes is restored by the first run of the plain network and held until the next `set_level`.
        """
        number = None if level is None else self._number.get(level)
        if number is None and level is not None:
            raise UserError(f"{self.name} has no level {level!r}: it has {', '.join(self.levels)}")
        choice = self._choice
        with choice.lock:
            choice.level = level
            choice.hold(number)
            if number is not None:
                choice.set_all(number)

    def estimate(self, images: Tensor) -> list[LevelEstimate]:
        """The level of each image [B, 3, H, W] alone, from its size, its brightness and the traces that JPEG left in it."""
        pixels = images if images.dtype == torch.uint8 else self._denormalised(images)
        found = []
        for image in pixels.permute(0, 2, 3, 1).cpu().numpy():
            frame = np.ascontiguousarray(image)
            jpeg = quality_of_pixels(frame) if self.level_estimator.sees_jpeg else None
            found.append(self.level_estimator.estimate(evidence_of(frame, jpeg)))
        return found

    def compile(self, **options: Any) -> None:
        """Compile the network with `torch.compile(fullgraph=True, **options)`: one graph for all levels and mixtures."""
        self._run = torch.compile(self._network, fullgraph=True, **options)

    def share(self) -> "AdaptiveModel":
        """Another model over the same weights with a level of its own, for another thread or stream; not compiled."""
        twin = copy.copy(self)
        twin._modules = {}
        tensors: dict[int, Any] = {id(tensor): tensor for tensor in _weights_of(self._network)}
        with self._choice.lock:
            tensors[id(self._selection.host.restored)] = {}
            twin._network, twin._selection = copy.deepcopy((self._network, self._selection), tensors)
        twin._selection.hold(None)
        twin._run, twin._choice = twin._network, _Choice(twin._selection)
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptiveModel":
        raise UserError(
            "an AdaptiveModel stays as it was pulled, its weights being shared: pull it with device=… instead"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._selection.maps.device

    @property
    def weight_bytes(self) -> int:
        """What the weights occupy: exactly the base's bytes and those of all adaptors as they are stored.

        Where `set_level` holds a level under codes, also those of what was restored of it.
        """
        tensors = [*_weights_of(self._network), *self._selection.host.restored.values()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def methods(self) -> dict[str, tuple[str, str]]:
        """How modules with weights per sample compute: by path, the method in eager execution and in a compiled graph."""
        chosen = {}
        for module in self._network.modules():
            if isinstance(module, AdaptiveConv) and module.table("weight") is not None:
                chosen[module.path] = (module.eager_method, module.compiled_method)
            elif isinstance(module, PerLevel):
                chosen[module.path] = ("per level", "per sample")
        return chosen

    def _logits(self, network: Any, images: Tensor) -> Tensor:
        x = images.to(self.device)
        x = self._normalise(x) if x.dtype == torch.uint8 else x.float()
        logits = logits_of(network, x)
        if logits.shape[-2:] != x.shape[-2:]:
            logits = F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return logits

    def _mixtures(self, images: Tensor, levels: Any) -> list[Mixture]:
        if levels is None:
            levels = self.estimate(images)
        if isinstance(levels, Tensor):
            numbers = levels.tolist() if levels.dim() == 1 and not levels.is_floating_point() else []
            if not all(0 <= number < len(self.levels) for number in numbers):
                raise UserError(f"levels {numbers} were given as positions: expected 0 to {len(self.levels) - 1}")
            levels = [self.levels[number] for number in numbers]
        given = list(levels) if isinstance(levels, Iterable) and not isinstance(levels, str) else [levels]
        if isinstance(levels, str) or len(given) != len(images):
            found = f"one level {levels!r}" if isinstance(levels, str) else f"{len(given)} levels"
            raise UserError(f"{found} was given for {len(images)} images: give one for each, or call set_level")
        return [self._mixture(level) for level in given]

    def _mixture(self, level: Any) -> Mixture:
        if isinstance(level, str):
            if (number := self._number.get(level)) is not None:
                return Mixture(number)
            level = self.level_estimator.match(level)
        if not isinstance(level, LevelEstimate):
            raise UserError(f"{level!r} was given as a level: expected a name, or what a detector found")
        names = (level.level, level.neighbour or level.level)
        if unknown := next((name for name in names if name not in self._number), None):
            raise UserError(f"{self.name} has no level {unknown!r}: it has {', '.join(self.levels)}")
        if level.weight and not self._selection.mixes:
            raise UserError("a mixture of two levels was given: pull the model with untrained='interpolate' for that")
        return Mixture(self._number[names[0]], self._number[names[1]], level.weight)

    def _denormalised(self, x_BCHW: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(v, device=x_BCHW.device).view(1, 3, 1, 1) for v in (self._normalise.mean, self._normalise.std)
        )
        return ((x_BCHW * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)


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


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != 3 or not images.numel():
        found = f"a tensor {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise UserError(f"{found} was given as images: expected a tensor [B, 3, H, W] with at least one image")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UserError(f"images of {images.dtype} were given: expected uint8, or float32 that is normalised already")


# ── from a release to a network of tables ────────────────────────────────────────────────────────────────────────


def _assemble(
    release: Release, levels: Sequence[str], device: torch.device, mixes: bool
) -> tuple[nn.Module, Selection]:
    network = _base_network(release, device)
    made_for = _made_for(release, levels)
    adaptors = {level: parts_of(release.stored_state(level)) for level in made_for.values() if level in release.levels}
    adapted = [name for name in network.state_dict() if any(name in a for a in adaptors.values())]
    stored_variants = {name: _by_format(name, adaptors) for name in adapted}
    rows = {name: _rows(stored_variants[name], list(made_for.values())) for name in adapted}
    maps = list(dict.fromkeys(rows.values())) or [(0,) * len(levels)]
    selection = Selection(maps, mixes, device)
    tables: dict[str, Table] = {}
    made: dict[int, Table] = {}  # tied tensors share a table
    for name in adapted:
        owner, leaf = _owner(network, name)
        base = getattr(owner, leaf)
        if id(base) not in made:
            made[id(base)] = _table(name, base.detach(), stored_variants[name], maps.index(rows[name]), selection)
        tables[name] = made[id(base)]
    for name, table in tables.items():
        # the plain network goes on to hold the base, in row 0: no tensor is kept twice
        owner, leaf = _owner(network, name)
        _replace(owner, leaf, table.row(0))
    size = _training_size(release.manifest)
    alone: set[str] = set()  # paths of modules that run as a whole, once per level
    while True:
        built = _with_tables(network, tables, alone)
        try:
            _dry_run(built, size)
        except NeedsParentError as error:
            if not error.path:
                raise UserError(f"{release.name} cannot be served: its network takes no batch of images") from error
            alone.add(_around(network, error.path))
            continue
        if "" in alone or _agrees(network, built, selection, tables, size):
            break
        alone.add("")
    _measure(built)
    return built, selection


def _around(network: nn.Module, path: str) -> str:
    """The path of the module around one, passing by lists of modules, which are never called."""
    path = path.rpartition(".")[0]
    while isinstance(network.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
        path = path.rpartition(".")[0]
    return path


def _agrees(
    network: nn.Module,
    built: nn.Module,
    selection: Selection,
    tables: Mapping[str, Table],
    size: tuple[int, int],
) -> bool:
    """Whether the adaptive network gives what the plain one gives with each level's tensors, mixed and alone.

    A network may use its modules in ways that cannot be seen from outside; on three images, all can.
    """
    levels = [0, *range(1, len(selection.maps[0]))][:_DRY_BATCH]
    levels += levels[-1:] * (_DRY_BATCH - len(levels))
    device = selection.maps.device
    for scale in _scales(size):
        images = torch.randn(_DRY_BATCH, 3, size[0] // scale, size[1] // scale).to(device)
        try:
            with torch.no_grad():
                want = []
                for sample, level in enumerate(levels):
                    picked = {table: table.row(selection.row(table.map_index, level)) for table in tables.values()}
                    state = {name: picked[table] for name, table in tables.items()}
                    want.append(_logits_with(network, state, images[[sample]]))
                selection.set_each([Mixture(level) for level in levels])
                found = [logits_of(built, images)]
                selection.set_all(levels[-1])
                found.append(torch.cat([*want[:-1], logits_of(built, images[-1:])]))
        except Exception:
            continue  # a network may take images of its own size only
        finally:
            selection.set_all(0)
        right = torch.cat(want)
        if not all(torch.allclose(f, right, rtol=1e-3, atol=1e-3 * float(right.abs().max())) for f in found):
            return False
    return True


class _WithState(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network, images)


def _logits_with(network: nn.Module, state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The logits of `network` with other tensors in place of its own."""
    named = {f"network.{name}": tensor for name, tensor in state.items()}
    logits: Tensor = functional_call(_WithState(network), named, (images,))
    return logits


def _scales(size: tuple[int, int]) -> tuple[int, ...]:
    """By what to divide the training size to look at a network cheaply; itself, where only that is taken."""
    return (4, 1) if min(size) >= _LEAST_SIDE else (1,)


def _base_network(release: Release, device: torch.device) -> nn.Module:
    model = release.manifest["model"]
    network = build_model(model["name"], model["num_classes"])
    try:
        network.load_state_dict(release.base_state(), strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"the network {model['name']!r} does not fit the weights of {release.name}: {first}") from error
    for module in network.modules():
        if isinstance(module, _NormBase):
            module.num_batches_tracked = None  # of use in training alone
    return network.eval().requires_grad_(False).to(device)


_Parts = Mapping[str, Tensor]


def _by_format(name: str, adaptors: Mapping[str, Mapping[str, tuple[str, _Parts]]]) -> dict[str, dict[str, _Parts]]:
    """By code, float32 first, and level: the parts of the tensor `name` in every adaptor that holds it."""
    stored_variants: dict[str, dict[str, _Parts]] = {"float32": {}}
    for level, adaptor in adaptors.items():
        if name in adaptor:
            storage_format, parts = adaptor[name]
            stored_variants.setdefault(storage_format, {})[level] = parts
    return stored_variants


def _made_for(release: Release, levels: Sequence[str]) -> dict[str, str]:
    """For each level the first whose adaptor is the same: one that levels share is held once."""
    first: dict[str, str] = {}
    adaptor_of = {level: release.manifest["levels"][level].get("digest") or level for level in release.levels}
    for level, adaptor in adaptor_of.items():
        first.setdefault(adaptor, level)
    return {level: first[adaptor_of[level]] if level in adaptor_of else level for level in levels}


def _rows(stored_variants: Mapping[str, Mapping[str, _Parts]], levels: Sequence[str]) -> tuple[int, ...]:
    """The row that each level uses of the table of these parts: 0, the base's, where its adaptor does not hold it."""
    holding = [level for its in stored_variants.values() for level in its]
    return tuple(holding.index(level) + 1 if level in holding else 0 for level in levels)


def _table(
    name: str, base: Tensor, stored_variants: Mapping[str, Mapping[str, _Parts]], map_index: int, selection: Selection
) -> Table:
    """The table of the tensor `name` of the base, on its device."""
    stacked = {
        storage_format: {
            part: torch.stack([parts[part].to(base.device) for parts in its.values()])
            for part in next(iter(its.values()))
        }
        for storage_format, its in stored_variants.items()
        if storage_format != "float32"
    }
    values = torch.stack([base, *(parts[""].to(base.device) for parts in stored_variants["float32"].values())])
    if not stacked:
        return Table(values, map_index, selection)
    return CompressedTable(values, stacked, name, map_index, selection)


def _owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return network.get_submodule(path), leaf


def _replace(owner: nn.Module, leaf: str, values: Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    else:
        owner._buffers[leaf] = values


def _with_tables(network: nn.Module, tables: Mapping[str, Table], alone: set[str]) -> nn.Module:
    """A copy of the modules of `network`, but not of its tensors, with adaptive ones where levels change something.

    alone: paths of modules that are to run as a whole, once per level.
    """
    alone = alone | {
        path for name in tables if kind_of(network.get_submodule(path := name.rpartition(".")[0])) is PerLevel
    }
    owners: dict[str, dict[str, Table]] = {}
    for name, table in tables.items():
        path = name.rpartition(".")[0]
        # what runs once per level takes everything inside it along
        around = [p for p in sorted(alone, key=len) if p == path or not p or path.startswith(f"{p}.")]
        path = around[0] if around else path
        owners.setdefault(path, {})[name.removeprefix(f"{path}.") if path else name] = table
    if "" in alone:
        return PerLevel(network, owners[""], "")  # itself, not a copy: a copy's hooks may still see the original
    built = copy.deepcopy(network, {id(tensor): tensor for tensor in _weights_of(network)})
    for path, its in owners.items():
        module = built.get_submodule(path)
        if isinstance(module, Adaptive):
            continue  # the same module under another name
        wrapped = (PerLevel if path in alone else kind_of(module))(module, its, path)
        parent, _, leaf = path.rpartition(".")
        setattr(built.get_submodule(parent), leaf, wrapped)
    return built


def _weights_of(network: nn.Module) -> list[Tensor]:
    """Every tensor that holds numbers of the network; the indices of a `Selection` are none."""
    indices = {id(t) for m in network.modules() if isinstance(m, Selection) for t in m.buffers()}
    return [t for t in (*network.parameters(), *network.buffers()) if id(t) not in indices]


def _training_size(manifest: Mapping[str, Any]) -> tuple[int, int]:
    reference = Reference.of_manifest(manifest)
    return _USUAL_SIZE if reference is None else (reference.height, reference.width)


def _dry_run(network: nn.Module, size: tuple[int, int]) -> None:
    """Run empty images through the network: finds modules that cannot be adapted alone, and what each convolution gets.

    Raises NeedsParentError. (Real ones, of a sixteenth of the pixels: torch's shapes without numbers, its meta device,
    take seconds to import.)
    """
    device = next(tensor for tensor in (*network.parameters(), *network.buffers())).device
    parts = _parts(network)
    selections = [module for module in network.modules() if isinstance(module, Selection)]
    for selection in selections:
        selection.forget()
    for part in parts:
        part.check_batch = _DRY_BATCH
    try:
        for scale in _scales(size):
            try:
                with torch.no_grad():
                    logits_of(network, torch.zeros(_DRY_BATCH, 3, size[0] // scale, size[1] // scale, device=device))
            except NeedsParentError:
                raise
            except Exception as error:
                failure = error
                continue
            for part in parts:
                if isinstance(part, AdaptiveConv) and part.seen is not None:
                    part.seen = torch.Size((*part.seen[:2], *(scale * side for side in part.seen[2:])))
            return
    finally:
        for part in parts:
            part.check_batch = None
        for selection in selections:
            selection.set_all(0)
    if isinstance(network, PerLevel):
        raise UserError(f"the network does not run on images of {size[1]}x{size[0]}: {failure}") from failure
    raise NeedsParentError("network") from failure  # whatever it is: as a whole it runs as it always did


def _parts(network: nn.Module) -> list[Adaptive]:
    return [module for module in network.modules() if isinstance(module, Adaptive)]


def _measure(network: nn.Module) -> None:
    """Choose for each convolution the fastest method at the shape that it gets from images of the training set's size."""
    for module in _parts(network):
        if isinstance(module, AdaptiveConv) and (table := module.table("weight")) is not None and module.seen:
            shape = torch.Size((_MEASURED_BATCH, *module.seen[1:]))
            conv: Any = module.module
            module.eager_method, module.compiled_method = convolution.fastest(conv, table, shape)
