"""How a release records its selections, and that it can be continued, pulled and served. No Ray."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gearnn_ray.adaptors.bn_folding import fold, foldable
from gearnn_ray.config.budget import budget_floats
from gearnn_ray.config.command_line import from_mapping
from gearnn_ray.config.release_jobs import ReleaseDataConfig, SweepConfig
from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.data.cache import level_statistics
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.levels.level import parse_level
from gearnn_ray.models.layers import layers_of
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.base import check_network, publish_given_base
from gearnn_ray.offline.importance import FOLDED
from gearnn_ray.offline.job_spec import JobSpec, Network
from gearnn_ray.offline.level_run import LevelResult, fine_tune_fully, run_level
from gearnn_ray.offline.records import Execution
from gearnn_ray.offline.release import figures_of, manifest_of, summary_row, tables_of
from gearnn_ray.offline.release_context import open_release_context
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.store.manifest import SCHEMA
from gearnn_ray.store.releases import Store
from tests import tiny
from tests.conftest import NORMALISATION
from tests.nets import TRUST

LEVELS = ("clean", "jpeg-10", "brightness-0.4")
AGAINST = {"against": "clean", "granularity": "module", "importance": "l2"}
SELECTIONS = {"papers": {}, "modules": AGAINST, "coded modules": AGAINST | {"storage_formats": ["int8", "bfloat16", "float32"]}}


@dataclass(frozen=True)
class Made:
    config: SplitConfig
    spec: JobSpec
    results: tuple[LevelResult, ...]


@pytest.fixture(scope="module", params=SELECTIONS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A release as the split job publishes it, made here."""
    folder = tmp_path_factory.mktemp("release")
    tiny.write_folder(folder / "data")
    weights = str(tiny.write_weights(folder / "weights.safetensors"))
    told = {
        "name": "tiny", "store": str(folder / "store"), "levels": LEVELS, "budget": "20%", "seed": 5,
        "data": {
            "kind": "folder", "path": str(folder / "data"), "num_classes": tiny.CLASSES, "cache": str(folder / "cache"),
        },
        "model": {
            "name": "tests.nets:small", "weights": weights, "mean": NORMALISATION.mean, "std": NORMALISATION.std,
        },
        "recipe": {"epochs": 1, "learning_rate": 0.1, "batch_size": 4, "crop": 24, "precision": "float32"},
        "selection": SELECTIONS[request.param],
    }  # fmt: skip
    config = from_mapping(SplitConfig, told, "the test")
    network = Network(config.model.name, tiny.CLASSES, NORMALISATION)
    facts = check_network(network, weights)
    base = publish_given_base(config.store, network, weights)
    spec = JobSpec(
        store=config.store, cache=config.data.cache, network=network, base=base.digest, recipe=config.recipe,
        data=open_dataset("folder", config.data.path, num_classes=tiny.CLASSES), seed=config.seed,
        budget=budget_floats(config.budget, facts.floats), criterion=config.selection.criterion,
        execution=Execution("cpu", "float32", 1),
    )  # fmt: skip
    results = tuple(run_level(spec, level, lambda _: None) for level in LEVELS)
    images = {level: level_statistics(spec.data.train, parse_level(level), Path(spec.cache)) for level in LEVELS}
    summary = tuple(summary_row(result, spec, facts.floats) for result in results)
    Store(config.store).publish(
        manifest_of(config, spec, base, facts, images, results),
        tables_of(config.name, spec, results, summary),
        figures=figures_of(config.name, results, summary),
        stages=[key for result in results for key in result.stages],
    )
    return Made(config, spec, results)


def test_the_manifest_records_the_selection(made: Made) -> None:
    release = Store(made.spec.store).pull("tiny")
    manifest = release.manifest
    kept = manifest["config"]["selection"]
    assert type(made.config.selection)(**kept) == made.config.selection
    assert kept["against"] == made.spec.criterion.against
    assert manifest["schema"] == SCHEMA
    assert manifest["execution"] == {"device": "cpu", "precision": "float32", "threads": 1}
    for result in made.results[1:]:
        entry = release.content.levels[result.level]
        assert FOLDED not in entry.storage_formats.values()
        assert entry.layers == result.layers


def test_tables_have_eq_1_against_the_base_and_the_values_that_were_compared(made: Made) -> None:
    store, spec = Store(made.spec.store), made.spec
    model = build_model(spec.network.name, tiny.CLASSES)
    layers = layers_of(model)
    base = store.get_state(spec.base)
    for result in made.results[1:]:
        full, control = (
            store.get_state(fine_tune_fully(replace(spec, keep_full=True), level, lambda _: None).digest)
            for level in (result.level, "clean")
        )
        moved = store.get_table(f"tables/tiny/sensitivity/{result.level}.parquet").to_pylist()
        rows = store.get_table(f"tables/tiny/selection/{result.level}.parquet").to_pylist()
        assert [row["layer"] for row in moved] == [row["layer"] for row in rows] == [layer.name for layer in layers]
        sides = [full, base]
        if spec.criterion.against == "clean":
            sides = [fold(foldable(model).values(), base, state) for state in (full, control)]
        for layer, change, row in zip(layers, moved, rows, strict=True):
            plain, compared = (
                torch.cat([(a[name].double() - b[name].double()).reshape(-1) for name in layer.tensors])
                for a, b in ((full, base), sides)
            )
            assert change["numel"] == row["numel"] == plain.numel()
            assert change["mean_abs_change"] == pytest.approx(float(plain.abs().mean()), rel=1e-9)
            assert change["l2_change"] == pytest.approx(float(plain.norm()), rel=1e-9)
            want = compared.abs().mean() if spec.criterion.importance == "mean-abs" else compared.norm()
            assert row["value"] == pytest.approx(float(want), rel=1e-9)
        assert [row["layer"] for row in rows if row["selected"]] == list(result.layers)
        statistics = {row["storage_format"] for row in rows if row["selected"] and row["layer"].endswith("running_stats")}
        assert statistics <= ({"float32"} if spec.criterion.granularity == "tensor" else {FOLDED})


class _TasksHere(SimpleNamespace):
    """Runs checks in this process instead of on Ray."""

    def check(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def test_the_release_context_has_the_spec_that_the_release_was_made_with(made: Made) -> None:
    data, tasks = ReleaseDataConfig(cache=made.spec.cache), _TasksHere(resources=ResourcesConfig())
    config = SweepConfig(store=made.spec.store, release="tiny", data=data, trust=TRUST)
    again = open_release_context(Store(made.spec.store), config, tasks)  # type: ignore[arg-type]
    assert again.config.selection == made.config.selection
    assert again.spec == replace(made.spec, data=again.spec.data)
    said: list[str] = []
    found = [run_level(again.spec, level, lambda event: said.append(event.kind)) for level in LEVELS]
    assert set(said) == {"reused"}
    assert [(r.digest, r.selection) for r in found] == [(r.digest, r.selection) for r in made.results]


def test_the_manifest_lists_tables_and_figures_and_they_are_what_lies_at_their_paths(made: Made) -> None:
    store = Store(made.spec.store)
    manifest = store.manifest("tiny")[1]
    files = {str(path.relative_to(store.uri)) for kind in ("tables", "figures") for path in Path(store.uri, kind).rglob("*.*")}
    assert {path for path in files if "/." not in path} == manifest.files.keys()
    assert "figures/tiny/accuracy.png" in manifest.figures
    assert store.verify() == []


def test_a_collector_leaves_every_stage_that_the_release_was_made_from(made: Made) -> None:
    store = Store(made.spec.store)
    other = replace(made.spec, seed=6)
    run_level(other, "clean", lambda _: None)  # of another job, which published nothing
    unused = store.put_blob(b"unused")
    for path in Path(store.uri).rglob("*"):
        os.utime(path, (time.time() - 86_400,) * 2)
    gone = {line.partition(":")[0] for line in store.gc(3600, dry_run=False)}
    assert f"blobs/sha256/{unused[7:]}" in gone
    assert all(path.startswith(("stages/", "blobs/")) for path in gone)
    assert store.verify() == []
    said: list[str] = []
    for level in LEVELS:
        run_level(made.spec, level, lambda event: said.append(event.kind))
    assert set(said) == {"reused"}


def test_it_is_served_as_the_network_that_is_restored(made: Made) -> None:
    release = Store(made.spec.store).pull("tiny")
    served = AdaptiveModel.pull(made.spec.store, "tiny", trust=TRUST)
    stored = [release.base_state(), *map(release.stored_state, LEVELS)]
    assert served.weight_bytes == sum(tensor.nbytes for state in stored for tensor in state.values())
    images = torch.randint(0, 256, (3, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    plain = build_model(made.spec.network.name, tiny.CLASSES).eval()
    for level in LEVELS:
        plain.load_state_dict({**release.base_state(), **release.adaptor_state(level)})
        served.set_level(level)
        with torch.no_grad():
            assert torch.equal(served(images), plain(NORMALISATION(images)))
        if made.spec.criterion.granularity == "module":
            assert not any("running" in name for name in release.stored_state(level))
    assert sum(any(t.numel() for t in release.adaptor_state(level).values()) for level in LEVELS) == len(LEVELS) - 1
