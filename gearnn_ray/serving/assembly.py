"""Builds the network of an `AdaptiveModel`: the network of a release, with tables in place of the tensors that levels change.

`assemble` loads the base, makes the tables (`batch.py`) and puts adaptive modules (`modules.py`) over them. It then checks the
result: a run on empty images finds modules that cannot be adapted alone, and a comparison with the plain network finds what no
inspection can. Whatever fails runs as a whole, once per level. At last it measures the methods of each convolution.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from gearnn_ray.adaptors.storage_formats import parts_of
from gearnn_ray.core.errors import UserError
from gearnn_ray.models.registry import build_released_model
from gearnn_ray.serving import convolution
from gearnn_ray.serving.batch import CompressedTable, Mixture, Selection, Table, Vectors
from gearnn_ray.serving.kinds import kind_of
from gearnn_ray.serving.level_estimation import Reference
from gearnn_ray.serving.modules import Adaptive, AdaptiveConv, NeedsParentError, PerLevel
from gearnn_ray.serving.regions import has_regions, with_regions
from gearnn_ray.store.manifest import Manifest
from gearnn_ray.store.releases import Release
from gearnn_ray.tasks import task_by_name
from gearnn_ray.training.predict import Normalisation, Predictor

_DRY_BATCH = 3  # images; unlike 1 or 2, hardly any layer has this as its first dimension by chance
_MEASURED_BATCH = 4
_LEAST_SIDE = 256  # pixels: images at least this large are first tried at a quarter of each side
_USUAL_SIZE = (360, 480)  # height and width, if the release does not give the size of its training images

_Parts = Mapping[str, Tensor]
_Adaptors = Mapping[str, Mapping[str, tuple[str, _Parts]]]  # by level and tensor: storage format and stored parts


def released_network(release: Release, state: Mapping[str, Tensor], trust: Collection[str]) -> nn.Module:
    """The network that a release names, in evaluation mode, with these weights. Raises UserError if they do not fit."""
    model = release.content.model
    network = build_released_model(model.name, model.num_classes, trust, model.arguments, model.pad_to)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"the network {model.name!r} does not fit the weights of {release.name} ({first}): "
            "use the version of the network that the release was made with"
        ) from error
    return network.eval()


def predictor(manifest: Manifest, network: Callable[[Tensor], Any]) -> Predictor:
    """The forward pass of a release's network, in float32; images keep their memory format."""
    normalisation = manifest.model.normalisation
    return Predictor(network, Normalisation(normalisation.mean, normalisation.std), memory_format=None)


def assemble(
    release: Release, levels: Sequence[str], device: torch.device, mixes: bool, trust: Collection[str]
) -> tuple[nn.Module, Selection]:
    """The adaptive network of a release on a device, and the selection of levels that its modules read.

    levels: their positions are the numbers of the levels; the first is the base. mixes: whether a sample may mix two levels.
    trust: modules whose networks the release may name beside the built-in ones. Raises UserError if the network is not trusted,
    cannot be built, does not fit its weights, or takes no batch of images.
    """
    network = _base_network(release, device, trust)
    if mixes and has_regions(network):
        raise UserError(
            f"the network of {release.name} sees regions of its images, which cannot mix two levels: use untrained='nearest'"
        )
    source = _source_levels(release, levels)
    adaptors = {level: parts_of(release.stored_state(level)) for level in source.values() if level in release.levels}
    adapted = [name for name in network.state_dict() if any(name in adaptor for adaptor in adaptors.values())]
    stored_variants = {name: _by_format(name, adaptors) for name in adapted}
    rows = {name: _rows(stored_variants[name], list(source.values())) for name in adapted}
    maps = list(dict.fromkeys(rows.values())) or [(0,) * len(levels)]
    selection = Selection(maps, mixes, device)
    tensors = network.state_dict(keep_vars=True)
    tables: dict[str, Table] = {}
    made: dict[int, Table] = {}  # by tensor, because tied tensors share a table
    for name in adapted:
        base = tensors[name]
        if id(base) not in made:
            made[id(base)] = _table(name, base.detach(), stored_variants[name], maps.index(rows[name]), selection)
        tables[name] = made[id(base)]
    _side_by_side(list(made.values()), selection)
    for name, table in tables.items():
        tensors[name].data = table.row(0)  # the plain network uses this row, so that no tensor is held twice
    whole: set[str] = set()  # paths of modules that run as a whole, once per level
    while True:
        built = _with_tables(network, tables, whole)
        if not isinstance(built, PerLevel):
            built = with_regions(built, selection)
        try:
            _dry_run(release, built)
        except NeedsParentError as error:
            if not error.path:
                raise UserError(
                    f"{release.name} cannot be served: its network does not take a batch of images [B, 3, H, W]"
                ) from error
            whole.add(_parent(network, error.path))
            continue
        if "" in whole or _agrees(release, network, built, selection, tables):
            break
        whole.add("")
    _measure(built)
    return built, selection


def weights_of(network: nn.Module) -> list[Tensor]:
    """All parameters and buffers of the network, without the indices of a `Selection`."""
    indices = {id(t) for m in network.modules() if isinstance(m, Selection) for t in m.buffers()}
    return [t for t in (*network.parameters(), *network.buffers()) if id(t) not in indices]


def _base_network(release: Release, device: torch.device, trust: Collection[str]) -> nn.Module:
    network = released_network(release, release.base_state(), trust)
    for module in network.modules():
        if isinstance(module, _NormBase):
            module.num_batches_tracked = None  # used only in training
    return network.requires_grad_(False).to(device)


def _source_levels(release: Release, levels: Sequence[str]) -> dict[str, str]:
    """For each level the first level with the same adaptor, because an adaptor that levels share is held once."""
    first: dict[str, str] = {}
    adaptor_of = {level: release.content.levels[level].digest or level for level in release.levels}
    for level, adaptor in adaptor_of.items():
        first.setdefault(adaptor, level)
    return {level: first[adaptor_of[level]] if level in adaptor_of else level for level in levels}


def _by_format(name: str, adaptors: _Adaptors) -> dict[str, dict[str, _Parts]]:
    """By storage format (float32 first) and level: the stored parts of the tensor `name`, from each adaptor that has it."""
    stored_variants: dict[str, dict[str, _Parts]] = {"float32": {}}
    for level, adaptor in adaptors.items():
        if name in adaptor:
            storage_format, parts = adaptor[name]
            stored_variants.setdefault(storage_format, {})[level] = parts
    return stored_variants


def _rows(stored_variants: Mapping[str, Mapping[str, _Parts]], levels: Sequence[str]) -> tuple[int, ...]:
    """The row of the table that each level uses: 0, the base's, if the level's adaptor does not have the tensor."""
    holding = [level for variants in stored_variants.values() for level in variants]
    return tuple(holding.index(level) + 1 if level in holding else 0 for level in levels)


def _table(
    name: str, base: Tensor, stored_variants: Mapping[str, Mapping[str, _Parts]], map_index: int, selection: Selection
) -> Table:
    """The table of the base's tensor `name`, on the device of that tensor."""
    stacked = {
        storage_format: {
            part: torch.stack([parts[part].to(base.device) for parts in variants.values()])
            for part in next(iter(variants.values()))
        }
        for storage_format, variants in stored_variants.items()
        if storage_format != "float32"
    }
    values = torch.stack([base, *(parts[""].to(base.device) for parts in stored_variants["float32"].values())])
    if not stacked:
        return Table(values, map_index, selection)
    return CompressedTable(values, stacked, name, map_index, selection)


def _side_by_side(tables: Sequence[Table], selection: Selection) -> None:
    """Let the batch's rows of all vectors be gathered at once. Compressed and mixed rows are restored or merged one by one."""
    vectors = [table for table in tables if type(table) is Table and table.values.dim() == 2]
    if vectors and not selection.mixes:
        selection.vectors = Vectors(vectors)


def _parent(network: nn.Module, path: str) -> str:
    """The path of the module that contains this one. Lists and dicts of modules are skipped: nobody calls them."""
    path = path.rpartition(".")[0]
    while isinstance(network.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
        path = path.rpartition(".")[0]
    return path


def _with_tables(network: nn.Module, tables: Mapping[str, Table], whole: set[str]) -> nn.Module:
    """A copy of the modules, but not of the tensors, of `network`, with adaptive modules over the tables.

    whole: paths of modules that must run as a whole, once per level.
    """
    whole = whole | {path for name in tables if kind_of(network.get_submodule(path := name.rpartition(".")[0])) is PerLevel}
    owners: dict[str, dict[str, Table]] = {}
    for name, table in tables.items():
        path = name.rpartition(".")[0]
        # a module that runs as a whole takes the tables of all modules inside it
        outer = [p for p in sorted(whole, key=len) if p == path or not p or path.startswith(f"{p}.")]
        path = outer[0] if outer else path
        owners.setdefault(path, {})[name.removeprefix(f"{path}.") if path else name] = table
    if "" in whole:
        return PerLevel(network, owners[""], "")  # not a copy, whose hooks might still refer to the original
    built = copy.deepcopy(network, {id(tensor): tensor for tensor in weights_of(network)})
    for path, own_tables in owners.items():
        module = built.get_submodule(path)
        if isinstance(module, Adaptive):
            continue  # the same module under another name
        wrapped = (PerLevel if path in whole else kind_of(module))(module, own_tables, path)
        parent, _, leaf = path.rpartition(".")
        setattr(built.get_submodule(parent), leaf, wrapped)
    return built


def _outputs(release: Release, network: Callable[[Tensor], Any], x_BCHW: Tensor) -> Any:
    """The outputs of the release's task for normalised images."""
    return task_by_name(release.content.model.task).outputs(predictor(release.content, network).normalised(x_BCHW))


def _trial_sizes(release: Release) -> list[tuple[int, int, int]]:
    """Divisor, height and width to try in turn. A quarter of each side is cheap, but some networks take only the full size."""
    reference = Reference.of_manifest(release.content)
    usual = _USUAL_SIZE if reference is None else (reference.height, reference.width)
    height, width = release.content.model.input_size or usual
    divisors = (4, 1) if min(height, width) >= _LEAST_SIDE else (1,)
    return [(divisor, height // divisor, width // divisor) for divisor in divisors]


def _dry_run(release: Release, network: nn.Module) -> None:
    """Run empty images through the network: finds modules that cannot be adapted alone, and the input size of each convolution.

    Raises NeedsParentError. (Torch's meta device would compute only shapes, but takes seconds to import.)
    """
    device = next(tensor for tensor in (*network.parameters(), *network.buffers())).device
    parts = _adaptive_modules(network)
    selections = [module for module in network.modules() if isinstance(module, Selection)]
    for selection in selections:
        selection.set_all(0)
        if not has_regions(network):  # else every region would get weights of its own
            selection.forget()
    for part in parts:
        part.check_batch = _DRY_BATCH
    try:
        for divisor, height, width in _trial_sizes(release):
            try:
                with torch.no_grad():
                    _outputs(release, network, torch.zeros(_DRY_BATCH, 3, height, width, device=device))
            except NeedsParentError:
                raise
            except Exception as error:
                failure = error
                continue
            for part in parts:
                if isinstance(part, AdaptiveConv) and part.seen is not None:
                    part.seen = torch.Size((*part.seen[:2], *(divisor * side for side in part.seen[2:])))
            return
    finally:
        for part in parts:
            part.check_batch = None
        for selection in selections:
            selection.set_all(0)
    if isinstance(network, PerLevel):
        raise UserError(
            f"the network of {release.name} does not run on images of {width}x{height} "
            f"({type(failure).__name__}: {failure}): use the version of the network that the release was made with"
        ) from failure
    raise NeedsParentError("network") from failure  # as a whole it computes what the plain network computes


def _agrees(release: Release, network: nn.Module, built: nn.Module, selection: Selection, tables: Mapping[str, Table]) -> bool:
    """Whether the adaptive network gives what the plain one gives with each level's tensors, mixed and alone.

    A network may use its modules in ways that no inspection shows; three images of different levels show them. Two empty outputs
    are equal whatever the weights, and a detector with a threshold finds nothing in noise: torchvision's thresholds are set to 0
    meanwhile. Where nothing is found even so, the task does not call the outputs close, and the network runs as a whole.
    """
    levels = [0, *range(1, len(selection.maps[0]))][:_DRY_BATCH]
    levels += levels[-1:] * (_DRY_BATCH - len(levels))
    task = task_by_name(release.content.model.task)

    def plain(level: int, image: Tensor) -> Any:
        picked = {table: table.row(selection.row(table.map_index, level)) for table in tables.values()}
        state = {name: picked[table] for name, table in tables.items()}
        return _outputs(release, lambda x: functional_call(network, state, (x,)), image)

    for _, height, width in _trial_sizes(release):
        images = torch.randn(_DRY_BATCH, 3, height, width).to(selection.maps.device)
        try:
            with torch.no_grad(), _without_thresholds(network, built):
                expected = [plain(level, images[[sample]]) for sample, level in enumerate(levels)]
                selection.set_each([Mixture(level) for level in levels])
                mixed = _outputs(release, built, images)
                selection.set_all(levels[-1])
                alone = _outputs(release, built, images[-1:])
        except Exception:
            continue  # some networks take only images of one size
        finally:
            selection.set_all(0)
        found = [*(mixed[i : i + 1] for i in range(_DRY_BATCH)), alone]
        if not all(task.close(a, b) for a, b in zip(found, [*expected, expected[-1]], strict=True)):
            return False
    return True


@contextmanager
def _without_thresholds(*networks: nn.Module) -> Iterator[None]:
    """Let torchvision's detectors return what they are least sure of, too."""
    found = {
        module: module.score_thresh for network in networks for module in network.modules() if hasattr(module, "score_thresh")
    }
    try:
        for module in found:
            module.score_thresh = 0.0  # type: ignore[assignment]
        yield
    finally:
        for module, threshold in found.items():
            module.score_thresh = threshold


def _adaptive_modules(network: nn.Module) -> list[Adaptive]:
    return [module for module in network.modules() if isinstance(module, Adaptive)]


def _measure(network: nn.Module) -> None:
    """Choose the fastest method of each convolution, for the input that it gets from images of the training size."""
    for module in _adaptive_modules(network):
        if isinstance(module, AdaptiveConv) and (table := module.table("weight")) is not None and module.seen:
            shape = torch.Size((_MEASURED_BATCH, *module.seen[1:]))
            conv: Any = module.module
            module.eager_method, module.compiled_method = convolution.fastest(conv, table, shape)
