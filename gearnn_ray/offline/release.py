"""What a release is made of: the manifest, the tables, one summary row per level. Plain values from level results.

Knows nothing of Ray or of how the results came about.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gearnn_ray.config.recipe import Coupling
from gearnn_ray.config.schema import SplitConfig
from gearnn_ray.levels.level import codec_versions, parse_level
from gearnn_ray.offline.base import NetworkFacts
from gearnn_ray.offline.importance import VALUES
from gearnn_ray.offline.job_spec import ImageStatistics, JobSpec
from gearnn_ray.offline.level_run import LevelResult
from gearnn_ray.offline.sensitivity import Sensitivity, table_row
from gearnn_ray.store import tables
from gearnn_ray.store.releases import SCHEMA, Blob
from gearnn_ray.tasks.segmentation import METRIC

_PACKAGES = ("gearnn-ray", "torch", "torchvision", "ray", "ortools", "numpy", "pyarrow")


def summary_row(result: LevelResult, budget: int, model_floats: int) -> dict[str, Any]:
    return {
        "level": result.level,
        "metric": METRIC,
        "original": result.original,
        "full": result.full,
        # an undistorted level is the base itself
        "adaptor": result.original if result.adaptor is None else result.adaptor,
        "adaptor_floats": result.floats,
        "budget_floats": budget,
        "model_floats": model_floats,
        "seconds_full": result.seconds_full,
        "seconds_partial": result.seconds_partial,
    }


def manifest_of(
    config: SplitConfig,
    spec: JobSpec,
    base: Blob,
    facts: NetworkFacts,
    images: Mapping[str, ImageStatistics],
    results: tuple[LevelResult, ...],
) -> dict[str, Any]:
    """Everything a reader must know of the release; no time and no place, so that the same work makes the same bytes.

    `images`: of the training images of every level, and of the undistorted ones ("clean").
    """
    levels: dict[str, Any] = {}
    for result in results:
        scores = {
            "metric": METRIC,
            "original": result.original,
            "full": result.full,
            "adaptor": result.adaptor,
        }
        levels[result.level] = {
            "digest": result.digest,
            "bytes": result.bytes,
            "floats": result.floats,
            "layers": list(result.layers),
            "luma": images[result.level].luma,
            "scores": {name: score for name, score in scores.items() if score is not None},
        }
        if result.storage_formats:
            levels[result.level]["storage_formats"] = result.storage_formats
        if result.full is not None:
            by_layer, by_weight = result.share_changed
            # the paper's Fig. 5 fact, of the full fine-tune: floats in layers whose mean moved by more, floats that did
            levels[result.level]["share_above_2e_4"] = {"by_layer": by_layer, "by_weight": by_weight}
        if result.full_digest is not None:
            levels[result.level]["full"] = {"digest": result.full_digest, "bytes": result.full_bytes}
    packages = {name: version(name) for name in _PACKAGES if _installed(name)}
    return {
        "schema": SCHEMA,
        "name": config.name,
        "model": {
            "name": spec.network.name,
            "num_classes": spec.network.num_classes,
            "class_names": list(spec.data.class_names),
            "floats": facts.floats,
            "task": "segmentation",
            "normalisation": {k: list(v) for k, v in asdict(spec.network.normalisation).items()},
        },
        "data": {
            "name": spec.data.name,
            "train": spec.data.train.digest,
            "val": spec.data.val.digest,
            "reference": asdict(images["clean"]),
        },
        "base": asdict(base),
        "levels": levels,
        "budget": {"asked": config.budget, "floats": spec.budget},
        "recipe": spec.recipe.model_dump(),
        "seed": spec.seed,
        "config": _config_to_keep(config),
        "versions": {"python": platform.python_version(), **packages, **codec_versions()},
    }


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False  # only the working directory was shipped
    return True


def _config_to_keep(config: SplitConfig) -> dict[str, Any]:
    """The configuration without where things lie (a store's URI may hold credentials) and how many machines did it."""
    # where levels are chosen apart, releases are the bytes that they were before there was anything else
    later = set(config.selection.criterion.model_dump()) - set(config.selection.criterion.inputs())
    apart = {"selection": later | (set() if config.selection.is_joint else set(Coupling.model_fields))}
    where: dict[str, Any] = {"store": True, "data": {"cache"}, "resources": True, "tags": True}
    return config.model_dump(mode="json", exclude=where | apart)


def tables_of(
    name: str, spec: JobSpec, results: tuple[LevelResult, ...], summary: tuple[dict[str, Any], ...]
) -> dict[str, Any]:
    made = {f"tables/{name}/summary.parquet": tables.table(tables.SUMMARY, summary)}
    for result in results:
        if parse_level(result.level).is_clean:
            continue
        chosen = set(result.layers)
        rows, judged = ([Sensitivity(**row) for row in each] for each in (result.sensitivity, result.judged))
        moved = [table_row(result.level, row) for row in rows]
        picked = [
            {
                "level": result.level,
                "layer": row.layer,
                "numel": row.numel,
                "value": VALUES[spec.criterion.importance](own.change),
                "selected": row.layer in chosen,
                "storage_format": result.selection.get("storage_formats", {}).get(row.layer, "float32")
                if row.layer in chosen
                else None,
                "budget": spec.budget,
                **{k: result.selection[k] for k in ("objective", "bound", "status")},
            }
            for row, own in zip(rows, judged, strict=True)
        ]
        made[f"tables/{name}/sensitivity/{result.level}.parquet"] = tables.table(tables.SENSITIVITY, moved)
        made[f"tables/{name}/selection/{result.level}.parquet"] = tables.table(tables.SELECTION, picked)
    return made
