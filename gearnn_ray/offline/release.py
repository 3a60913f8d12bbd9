"""Manifest, tables and summary rows of a release, as plain values from level results. Knows nothing of Ray."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import pyarrow as pa

from gearnn_ray.config.split import SplitConfig
from gearnn_ray.data.cache import ImageStatistics
from gearnn_ray.levels.level import codec_versions, parse_level
from gearnn_ray.offline.base import NetworkFacts
from gearnn_ray.offline.importance import IMPORTANCE
from gearnn_ray.offline.job_spec import JobSpec
from gearnn_ray.offline.level_run import LevelResult
from gearnn_ray.offline.sensitivity import table_row
from gearnn_ray.reporting.summary import NETWORKS, LayerChange, SummaryRow, accuracy_figure, weight_change_figure
from gearnn_ray.store import tables
from gearnn_ray.store.blobs import Blob
from gearnn_ray.store.manifest import (
    BudgetEntry,
    DataEntry,
    ExecutionEntry,
    LevelEntry,
    Manifest,
    ModelEntry,
    NormalisationEntry,
    ReferenceEntry,
    Scores,
    ShareChanged,
)

_PACKAGES = ("gearnn-ray", "torch", "torchvision", "ray", "ortools", "numpy", "pyarrow")


def summary_row(result: LevelResult, spec: JobSpec, model_floats: int) -> SummaryRow:
    """One level's row. An undistorted level is the base itself."""
    return SummaryRow(
        level=result.level,
        metric=spec.task.metrics[0],
        original=result.original,
        full=result.full,
        adaptor=result.original if result.adaptor is None else result.adaptor,
        adaptor_floats=result.floats,
        budget_floats=spec.budget,
        model_floats=model_floats,
        seconds_full=result.seconds_full,
        seconds_partial=result.seconds_partial,
        others={metric: _of_each_network(result, metric) for metric in spec.task.shown if metric in result.others_by_metric},
    )


def _of_each_network(result: LevelResult, metric: str) -> dict[str, float | None]:
    """A further metric of original, full fine-tune and adaptor. An undistorted level is the base itself."""
    scores = {network: result.others.get(network, {}).get(metric) for network in NETWORKS}
    return scores if result.adaptor is not None else scores | {"adaptor": scores["original"]}


def manifest_of(
    config: SplitConfig,
    spec: JobSpec,
    base: Blob,
    facts: NetworkFacts,
    images: Mapping[str, ImageStatistics],
    results: tuple[LevelResult, ...],
) -> Manifest:
    """The manifest. It holds no time and no place, so that the same job makes the same bytes. images: statistics of the training
    images of every level, and of the undistorted ones ("clean").
    """
    network, clean = spec.network, images["clean"]
    reference = ReferenceEntry(height=clean.height, width=clean.width, luma=clean.luma, luma_spread=clean.luma_spread)
    packages = {name: version(name) for name in _PACKAGES if _installed(name)}
    return Manifest(
        name=config.name,
        model=ModelEntry(
            name=network.name,
            num_classes=network.num_classes,
            class_names=spec.data.class_names,
            floats=facts.floats,
            task=network.task,
            normalisation=NormalisationEntry(**asdict(network.normalisation)),
            arguments=network.arguments,
            pad_to=network.pad_to,
            input_size=network.input_size,
        ),
        data=DataEntry(name=spec.data.name, train=spec.data.train.digest, val=spec.data.val.digest, reference=reference),
        base=base,
        levels={result.level: _level_entry(result, images[result.level], spec) for result in results},
        budget=BudgetEntry(asked=config.budget, floats=spec.budget),
        recipe=spec.recipe.model_dump(),
        seed=spec.seed,
        execution=ExecutionEntry(**asdict(spec.execution)),
        config=_config_to_keep(config),
        versions={"python": platform.python_version(), **packages, **codec_versions()},
    )


def _level_entry(result: LevelResult, images: ImageStatistics, spec: JobSpec) -> LevelEntry:
    share = None
    if result.full is not None:
        by_layer, by_weight = result.share_changed
        share = ShareChanged(by_layer=by_layer, by_weight=by_weight)
    full = None if result.full_digest is None else Blob(digest=result.full_digest, bytes=result.full_bytes)
    metric = spec.task.metrics[0]
    return LevelEntry(
        digest=result.digest,
        bytes=result.bytes,
        floats=result.floats,
        layers=result.layers,
        scores=Scores(
            metric=metric, original=result.original, full=result.full, adaptor=result.adaptor, others=result.others_by_metric
        ),
        luma=images.luma,
        qp=images.qp,
        storage_formats=result.storage_formats,
        share_above_2e_4=share,
        full=full,
    )


def _table_row(row: SummaryRow) -> Mapping[str, object]:
    return {name: value for name, value in asdict(row).items() if name != "others"}


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False  # only the working directory was shipped
    return True


def _config_to_keep(config: SplitConfig) -> Mapping[str, object]:
    """The configuration without where things lie (a store's URI may hold credentials) and how many machines did it."""
    return config.model_dump(mode="json", exclude={"store": True, "data": {"cache"}, "resources": True, "tags": True})


def figures_of(name: str, results: tuple[LevelResult, ...], summary: tuple[SummaryRow, ...]) -> dict[str, bytes]:
    """The release's figures as PNG, by path in the store."""
    trained = [r for r in results if not parse_level(r.level).is_clean]
    if not trained:
        return {}
    changes = {
        r.level: [LayerChange(s.layer, s.kind, s.index, s.mean_abs_change, s.layer in r.layers) for s in r.sensitivity]
        for r in trained
    }
    return {
        f"figures/{name}/accuracy.png": accuracy_figure(summary, f"{name}: accuracy over distortion"),
        f"figures/{name}/weight_change.png": weight_change_figure(changes, f"{name}: weight change per layer"),
    }


def tables_of(name: str, spec: JobSpec, results: tuple[LevelResult, ...], summary: tuple[SummaryRow, ...]) -> dict[str, pa.Table]:
    """The release's tables, by path in the store."""
    made = {f"tables/{name}/summary.parquet": tables.table(tables.SUMMARY, [_table_row(row) for row in summary])}
    further = [
        {"level": result.level, "network": network, "metric": metric, "value": value}
        for result in results
        for network, scores in result.others.items()
        for metric, value in scores.items()
    ]
    if further:
        made[f"tables/{name}/scores.parquet"] = tables.table(tables.SCORES, further)
    importance = IMPORTANCE[spec.criterion.importance]
    for result in results:
        if parse_level(result.level).is_clean:
            continue
        selection = result.selection
        assert selection is not None
        moved = [table_row(result.level, row) for row in result.sensitivity]
        picked = [
            {
                "level": result.level,
                "layer": row.layer,
                "numel": row.numel,
                "value": importance(compared.change),
                "selected": row.layer in selection.layers,
                "storage_format": selection.storage_formats.get(row.layer, "float32") if row.layer in selection.layers else None,
                "budget": spec.budget,
                "objective": selection.objective,
                "bound": selection.bound,
                "status": selection.status,
            }
            for row, compared in zip(result.sensitivity, result.compared, strict=True)
        ]
        made[f"tables/{name}/sensitivity/{result.level}.parquet"] = tables.table(tables.SENSITIVITY, moved)
        made[f"tables/{name}/selection/{result.level}.parquet"] = tables.table(tables.SELECTION, picked)
    return made
