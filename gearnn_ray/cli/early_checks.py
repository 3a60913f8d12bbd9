"""Checks of a job's configuration that need no cluster: they refuse it before Ray is started, within a few seconds.

Paths and modules are only checked where this process starts the cluster itself, on this machine. On another cluster they may
exist on its nodes alone, and the job's workers check them. Imports neither torch nor Ray, which take seconds.
"""

import importlib.util
import os
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path

from gearnn_ray.config.adapt import AdaptConfig
from gearnn_ray.config.camera import CameraConfig
from gearnn_ray.config.catalogue import BUILT_IN, LIBRARIES, NEEDS_WEIGHTS, library_of, missing_library
from gearnn_ray.config.command_line import from_mapping
from gearnn_ray.config.release_jobs import EvaluateConfig, SweepConfig
from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.config.split import DataConfig, SplitConfig
from gearnn_ray.config.watch import WatchConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.levels.level import parse_level
from gearnn_ray.levels.own import Own
from gearnn_ray.models.names import check_name, check_released_levels, check_released_name, check_weights_path
from gearnn_ray.store.releases import Store

_VIDEO_RELEASE = "centre-video"
"""The release that `jobs/split.py --preset video` makes."""


def check_split(config: SplitConfig) -> None:
    """Raise UserError for a data set, network, weights file or store that the split job cannot use."""
    check_name(config.model.name)
    if config.model.name in NEEDS_WEIGHTS and config.model.weights is None and config.model.start is None:
        raise UserError(
            f"{config.model.name} does not learn from random weights, because its batch normalisations stay as they are: give "
            "model.weights, or model.start with a pretrained network or backbone"
        )
    if config.data.kind == "footage" and config.model.weights is None:
        raise UserError("data.kind is footage, without labels to train a base on: give the base with model.weights")
    if starts_own_cluster():
        _check_module(config.model.name)
        _check_levels(config.levels)
        for path in (config.model.weights, config.model.start):
            if path is not None:
                check_weights_path(Path(path))
        _check_data(config)
    Store(config.store).check_writable()


def check_release_job(config: EvaluateConfig | SweepConfig) -> None:
    """Raise UserError for a release, its data set or a store that an evaluation or a sweep cannot use."""
    store = Store(config.store)
    _, manifest = store.manifest(config.release)
    check_released_name(manifest.model.name, config.trust)
    check_released_levels(manifest.levels, config.trust)
    if not manifest.config:
        raise UserError(f"{config.release} does not record how it was made: name a release of jobs/split.py")
    store.check_writable()
    made_by = from_mapping(SplitConfig, manifest.config, f"the configuration in {config.release}")
    if starts_own_cluster():
        _check_module(manifest.model.name)
        _check_levels(manifest.levels)
        data: DataConfig = made_by.data.model_copy(update={"path": config.data.path or made_by.data.path})
        _check_data(made_by.model_copy(update={"data": data}))


def check_bundles(config: ServeConfig) -> None:
    """Raise UserError for a release that is not in the store or not signed as required, or whose network is not trusted."""
    store = Store(config.store)
    for ref in config.bundles:
        check_released_name(store.manifest(ref, config.require_signature)[1].model.name, config.trust)


def check_watch(config: WatchConfig) -> None:
    """Raise UserError for a release that is not in the store, whose network is not trusted, or a file that cannot be written."""
    check_released_name(Store(config.store).manifest(config.release)[1].model.name, config.trust)
    _check_written(config.source, config.ndjson, config.mp4)


def check_adapt(config: AdaptConfig) -> None:
    """Raise UserError for a release that is not in the store, or whose network is not trusted."""
    store = Store(config.store)
    if config.release.startswith(_VIDEO_RELEASE) and _VIDEO_RELEASE not in store.names():
        raise UserError(f"there is no release {_VIDEO_RELEASE} in {store.uri}: make it with jobs/split.py --preset video")
    check_released_name(store.manifest(config.release)[1].model.name, config.trust)


def check_camera(config: CameraConfig) -> None:
    """Raise UserError for a file that cannot be written."""
    _check_written(config.source, config.ndjson)


def starts_own_cluster() -> bool:
    """Whether the job will start a Ray on this machine: `ray_jobs.local_ray.address_to_join`, without importing Ray."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS", "")  # set in every submitted job too
    # written by `ray start`, and removed by `ray stop`
    running = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    return address == "local" or (not address and not running.is_file())


def _check_written(source: str | None, *paths: str | None) -> None:
    """Raise UserError for a file that cannot be written, or is the source."""
    for path in filter(None, paths):
        folder = Path(path).resolve().parent
        if not folder.is_dir():
            raise UserError(f"the folder {folder} does not exist: create it, or write {Path(path).name} elsewhere")
        if source and Path(source).exists() and Path(path).resolve() == Path(source).resolve():
            raise UserError(f"{path} is the source itself, which would be overwritten: write to another file")


def _check_data(config: SplitConfig) -> None:
    open_dataset(config.data.kind, config.data.path, config.task, **config.resolved_data_options())


def _check_module(network: str) -> None:
    """Raise UserError if the module of an import path, or the library of a prefix, does not exist. Imports no module."""
    if network in BUILT_IN:
        return
    if prefix := library_of(network):
        if importlib.util.find_spec(LIBRARIES[prefix]) is None:
            raise missing_library(network)
        return
    module = network.partition(":")[0]
    first, *inner = module.split(".")
    # Ray's workers also look in the working directory
    spec = importlib.util.find_spec(first) or PathFinder.find_spec(first, [os.getcwd()])
    for part in inner:
        if spec is not None:
            spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations or [])
    if spec is None:
        raise UserError(f"the network {network!r} is in the module {module}, which Python does not find: check the path")


def _check_levels(levels: Iterable[str]) -> None:
    """Raise UserError for a level of the user's own that cannot be imported or distorts no frame."""
    own = [part for level in levels for part in parse_level(level).parts if isinstance(part, Own)]
    if own and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as Ray's workers do
    for part in own:
        part.check()
