"""The split job on a real Ray: what it publishes, reuses and refuses, and what happens where a level fails."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from moto.server import ThreadedMotoServer
from PIL import Image
from torch import Tensor, nn

from gearnn_ray.cli.main import run_split
from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.core.errors import CorruptStoreError, TrainingFailedError, UserError
from gearnn_ray.core.events import Emit
from gearnn_ray.models.layers import layers_of, network_state, same_bits
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline import pipeline
from gearnn_ray.offline.execution import Processor
from gearnn_ray.ray_jobs.board import discard
from gearnn_ray.ray_jobs.resources import autoscaler_ceiling, check_resources, groups_that_fit
from gearnn_ray.ray_jobs.run_tasks import TaskRunner
from gearnn_ray.store.releases import Store
from tests import tiny
from tests.nets import Small

pytestmark = pytest.mark.usefixtures("ray_cluster")

Options = Callable[..., list[str]]


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """The command line of a small job, with changes."""
    tiny.write_folder(tmp_path / "data")
    tiny.write_weights(tmp_path / "weights.safetensors")
    return lambda **changes: tiny.options(tmp_path, **changes)


def run(arguments: list[str], capsys: pytest.CaptureFixture[str], figures: bool = False) -> tuple[int, list[dict[str, Any]], str]:
    with nullcontext() if figures else tiny.without_figures():
        code = run_split([*arguments, "--json"])
    out = capsys.readouterr()
    return code, tiny.events(out.out), out.err


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_from_weights_to_a_release(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = ["clean", "jpeg-10", "h264-32x24", "brightness-0.4+jpeg-30"]
    code, lines, _ = run(options(levels=levels), capsys, figures=True)
    assert code == 0
    store = Store(tmp_path / "store")
    release = store.pull("tiny:latest")
    assert sorted(release.levels) == sorted(levels)
    assert release.digest == lines[-1]["release"]
    assert release.adaptor_state("clean") == {}
    assert {"schema", "name", "created", "model", "base", "levels", "budget", "recipe", "versions"} <= release.manifest.keys()
    assert release.manifest["config"]["recipe"]["epochs"] == 3
    assert str(tmp_path / "store") not in json.dumps(release.manifest)

    # what a server compares frames with: the training images, undistorted and at each level
    pictures = [np.asarray(Image.open(p).convert("L")) for p in (tmp_path / "data/train/images").iterdir()]
    lumas = np.array([picture.mean() for picture in pictures])
    reference = release.manifest["data"]["reference"]
    assert (reference["height"], reference["width"]) == (32, 40)
    assert reference["luma"] == pytest.approx(lumas.mean(), abs=0.001)
    assert reference["luma_spread"] == pytest.approx(np.log(lumas).std(), abs=0.0001)
    found = {level: entry["luma"] for level, entry in release.manifest["levels"].items()}
    assert found["clean"] == reference["luma"]
    assert found["jpeg-10"] == pytest.approx(reference["luma"], rel=0.02)
    assert found["brightness-0.4+jpeg-30"] == pytest.approx(0.4 * reference["luma"], rel=0.05)
    qps = {level: entry["qp"] for level, entry in release.manifest["levels"].items() if "qp" in entry}
    assert qps == {"h264-32x24": pytest.approx(18 + 7, abs=5)}, "7 above the rate factor, as still images are"
    assert "qp" not in reference

    model = build_model("tests.nets:small", tiny.CLASSES)
    given = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    base = release.base_state()
    assert all(torch.equal(base[name], tensor.float()) for name, tensor in given.items())
    budget = 20 * release.manifest["model"]["floats"] // 100
    for level in levels[1:]:
        adaptor = release.adaptor_state(level)
        assert 0 < sum(t.numel() for t in adaptor.values()) <= budget
        model.load_state_dict({**base, **adaptor})
        state = network_state(model)
        assert all(same_bits(state[name], base[name]) for name in base if name not in adaptor)
        assert any(not same_bits(tensor, base[name]) for name, tensor in adaptor.items())

    summary = store.get_table("tables/tiny/summary.parquet")
    assert summary.column_names == [
        "level", "metric", "original", "full", "adaptor", "adaptor_floats", "budget_floats", "model_floats",
        "seconds_full", "seconds_partial",
    ]  # fmt: skip
    assert summary["level"].to_pylist() == levels
    assert summary["budget_floats"].to_pylist() == [budget] * 4
    assert all(row["adaptor"] > row["original"] for row in summary.to_pylist() if row["level"] != "clean")
    sensitivity = pq.read_table(tmp_path / "store/tables/tiny/sensitivity/jpeg-10.parquet")
    assert sensitivity.column_names == [
        "level", "layer", "kind", "index", "numel", "mean_abs_change", "max_abs_change", "l2_change", "l2_weight",
        "share_above_2e_4", "sum_abs_change", "relative_change", "first_order_change", "fisher_change",
    ]  # fmt: skip
    assert sensitivity["layer"].to_pylist() == [layer.name for layer in layers_of(model)]
    assert set(sensitivity["level"].to_pylist()) == {"jpeg-10"}
    selection = pq.read_table(tmp_path / "store/tables/tiny/selection/brightness-0.4+jpeg-30.parquet")
    assert selection.column_names == [
        "level", "layer", "numel", "value", "selected", "budget", "objective", "bound", "status", "storage_format",
    ]  # fmt: skip
    rows = selection.to_pylist()
    assert {row["status"] for row in rows} == {"OPTIMAL"}
    assert sum(row["value"] for row in rows if row["selected"]) == pytest.approx(rows[0]["objective"])
    assert [r["layer"] for r in rows if r["selected"]] == release.manifest["levels"]["brightness-0.4+jpeg-30"]["layers"]
    for table in (summary, sensitivity, selection):
        assert table.schema.metadata[b"gearnn_ray.schema"] == b"1"
        assert all(table.schema.field(name).metadata[b"description"] for name in table.column_names)
    assert len(lines[-1]["figures"]) == 2
    assert all(Image.open(tmp_path / "store" / figure).size[0] > 500 for figure in lines[-1]["figures"])


def test_running_again_computes_nothing_and_adds_nothing(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(options(), capsys, figures=True)[0] == 0
    before = files(tmp_path / "store")
    code, lines, _ = run(options(), capsys, figures=True)
    assert code == 0
    assert files(tmp_path / "store") == before
    assert tiny.epochs_run(lines) == 0
    assert {e["event"] for e in lines if e["event"] != "result" and e["stage"] != "images"} == {"reused"}


def test_another_budget_reuses_every_full_fine_tune(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(options(), capsys)[1]
    code, lines, _ = run(options(budget="40"), capsys)
    assert code == 0
    fulls = [e for e in lines if e.get("stage") == "full"]
    assert {e["event"] for e in fulls} == {"reused"}
    assert {e["event"] for e in lines if e.get("stage") == "partial"} == {"started", "progress", "finished"}
    release = Store(tmp_path / "store").pull("tiny")
    assert all(level["floats"] <= 40 for level in release.manifest["levels"].values())
    # the first one is still there, under its digest, and comes back with its budget
    assert Store(tmp_path / "store").pull(f"tiny@{first[-1]['release']}").manifest["budget"]["asked"] == "20%"
    assert run(options(), capsys)[1][-1]["release"] == first[-1]["release"]


def test_full_fine_tunes_are_kept_on_request(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(options(levels=["jpeg-10"]), capsys)
    code, lines, _ = run(options(levels=["jpeg-10"], **{"keep-full": "True"}), capsys)
    assert code == 0
    assert any(e.get("stage") == "full" and e["event"] == "finished" for e in lines)  # it had not been kept
    store = Store(tmp_path / "store")
    entry = store.pull("tiny").manifest["levels"]["jpeg-10"]["full"]
    full, base = store.get_state(entry["digest"]), store.pull("tiny").base_state()
    assert full.keys() == base.keys()
    assert not same_bits(full["conv1.weight"], base["conv1.weight"])


def test_the_base_is_trained_where_no_weights_are_given(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(
        levels=["jpeg-30"],
        **{"model.weights": None, "base-recipe.epochs": 6, "base-recipe.crop": 24, "base-recipe.batch-size": 4},
    )
    code, lines, _ = run(arguments, capsys)
    assert code == 0
    assert next(e["event"] for e in lines if e.get("stage") == "base") == "started"
    assert lines[-1]["summary"][0]["original"] > 40
    assert [e["event"] for e in run(arguments, capsys)[1] if e.get("stage") == "base"] == ["reused"]


@pytest.mark.usefixtures("no_figures")
def test_a_failed_level_takes_no_other_down(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options(levels=["brightness-0.01", "jpeg-20"], **{"model.name": "tests.nets:afraid_of_the_dark"})
    code, lines, _ = run(arguments, capsys)
    assert code == 1
    assert list(lines[-1]["failed"]) == ["brightness-0.01"]
    assert "the loss became nan in epoch 1 of 3" in lines[-1]["failed"]["brightness-0.01"]
    assert Store(tmp_path / "store").pull("tiny:partial").levels == ("jpeg-20",)
    assert run_split(arguments) == 1
    assert "brightness-0.01 failed: the loss became nan" in capsys.readouterr().out


# all processes of these tests read it from the environment
FAILING = Path(os.environ.setdefault("GEARNN_TEST_FAILING", f"{tempfile.gettempdir()}/gearnn-failing-{os.getpid()}"))


class _FailsOnDemand(Small):
    """Its logits are NaN in training on dark images while the file FAILING exists."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits * float("nan") if torch.is_grad_enabled() and x.mean() < -1.0 and FAILING.exists() else logits


def fails_on_demand(num_classes: int) -> nn.Module:
    return _FailsOnDemand(num_classes)


@pytest.mark.usefixtures("no_figures")
def test_latest_moves_only_when_every_level_is_published(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, store = {"model.name": "tests.test_pipeline:fails_on_demand"}, Store(tmp_path / "store")
    assert run(options(levels=["jpeg-20"], **network), capsys)[0] == 0
    first = store.tag_digest("tiny", "latest")
    both = options(levels=["brightness-0.01", "jpeg-20"], tags=["v2"], **network)
    FAILING.touch()
    try:
        code, lines, _ = run(both, capsys)
        assert run_split(both) == 1
    finally:
        FAILING.unlink()
    assert (code, lines[-1]["tag"], list(lines[-1]["failed"])) == (1, "partial", ["brightness-0.01"])
    assert store.tags("tiny") == {"latest": first, "partial": lines[-1]["release"]}
    assert store.pull("tiny:partial").levels == ("jpeg-20",)
    said = capsys.readouterr().out
    assert "the release has the tag partial and tiny:latest stays as it was" in said
    assert "To finish it, run the same command again: it computes only what is missing." in said
    assert "bundle:   tiny:partial" in said

    # the reason is gone, and the same command is run again
    code, lines, _ = run(both, capsys)
    assert (code, lines[-1]["tag"], lines[-1]["failed"]) == (0, "latest", {})
    assert {e["level"] for e in lines if e["event"] == "finished" and e["stage"] != "images"} == {"brightness-0.01"}
    assert store.tags("tiny")["latest"] == store.tags("tiny")["v2"] == lines[-1]["release"] != first
    assert store.pull("tiny").levels == ("brightness-0.01", "jpeg-20")


def test_corrupt_blobs_are_computed_again(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One byte is flipped in the blob of the trained base, of an adaptor, and of a full fine-tune that was kept."""
    arguments = options(
        levels=["jpeg-10"],
        **{"keep-full": "True", "model.weights": None},
        **{"base-recipe.epochs": 1, "base-recipe.crop": 24, "base-recipe.batch-size": 4},
    )
    code, lines, _ = run(arguments, capsys)
    assert code == 0
    store, release = Store(tmp_path / "store"), lines[-1]["release"]
    content = store.pull("tiny").content
    entry = content.levels["jpeg-10"]
    assert entry.full is not None
    for digest, stage in ((content.base.digest, "base"), (entry.digest, "partial"), (entry.full.digest, "full")):
        assert digest is not None
        path = tmp_path / "store/blobs/sha256" / digest.removeprefix("sha256:")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        if stage != "full":  # the full fine-tune is no part of what is served
            with pytest.raises(CorruptStoreError, match=digest):
                store.pull("tiny")
        code, lines, _ = run(arguments, capsys)
        assert code == 0
        assert {e["stage"] for e in lines if e["event"] == "finished"} == {"images", stage}
        assert store.is_intact(digest)
        assert store.pull("tiny").digest == lines[-1]["release"] == release


def _small_processor(cpus: int) -> Processor:
    return Processor(2, "float32", None)


def _large_processor(cpus: int) -> Processor:
    return Processor(64, "bfloat16", "bfloat16")


def test_a_job_keeps_the_precision_and_the_threads_that_it_began_with(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = {"recipe.precision": "auto", "base-recipe.precision": "auto"}
    short = {"recipe.epochs": 1, "base-recipe.epochs": 1, "base-recipe.crop": 24, "base-recipe.batch-size": 4}
    arguments = options(levels=["jpeg-10"], **{"model.weights": None}, **auto, **short)
    monkeypatch.setattr(pipeline, "look_at_processor", _small_processor)
    code, first, _ = run(arguments, capsys)
    assert code == 0
    store = Store(tmp_path / "store")
    assert store.pull("tiny").manifest["execution"] == {"device": "cpu", "precision": "float32", "threads": 1}

    # it continues where the largest node has more CPUs, all of them with another fastest precision
    monkeypatch.setattr(pipeline, "look_at_processor", _large_processor)
    code, again, _ = run(arguments, capsys)
    assert code == 0
    assert {e["event"] for e in again if e["event"] != "result" and e["stage"] != "images"} == {"reused"}
    assert again[-1]["release"] == first[-1]["release"]

    # another job, here with another seed, uses what that machine has
    code, other, _ = run([*arguments, "--seed", "1"], capsys)
    assert code == 0
    assert {e["stage"] for e in other if e["event"] == "finished"} >= {"base", "full", "partial"}
    assert store.pull("tiny").manifest["execution"] == {"device": "cpu", "precision": "bfloat16", "threads": 1}


@pytest.mark.usefixtures("no_figures")
def test_results_of_another_version_of_torch_are_reused_and_the_output_names_it(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(levels=["jpeg-10"], **{"recipe.epochs": 1})
    assert run(arguments, capsys)[0] == 0
    store = Store(tmp_path / "store")
    release, changed = store.tag_digest("tiny", "latest"), 0
    for path in (tmp_path / "store/stages").iterdir():
        record = store.get_record(path.stem)
        assert record is not None
        if "versions" in record:
            store.put_record(path.stem, {**record, "versions": {**record["versions"], "torch": "1.13.1"}})
            changed += 1
    assert changed >= 4
    assert run_split(arguments) == 0
    said = capsys.readouterr().out
    for stage in ("evaluating the original", "full fine-tune", "selection", "partial fine-tune"):
        (line,) = [line for line in said.splitlines() if f"jpeg-10 {stage}: " in line]
        assert "already in the store" in line
        assert "(made with torch 1.13.1)" in line
    assert store.tag_digest("tiny", "latest") == release


def test_changes_against_the_undistorted_fine_tune_which_is_made_once(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    against = {"selection.against": "clean", "selection.granularity": "module"}
    code, lines, _ = run(options(**against), capsys)
    assert code == 0
    fulls = [e["level"] for e in lines if e.get("stage") == "full" and e["event"] == "finished"]
    assert sorted(fulls) == ["brightness-0.4", "clean", "jpeg-10"]
    store = Store(tmp_path / "store")
    release = store.pull("tiny")
    assert set(release.levels) == {"brightness-0.4", "jpeg-10"}, "no level of its own"
    assert release.manifest["config"]["selection"]["against"] == "clean"
    assert not any("running" in name for level in release.levels for name in release.adaptor_state(level))
    # another budget finds it and all else that does not depend on one; the same budget everything
    code, lines, _ = run(options(budget="40", **against), capsys)
    assert code == 0
    assert {e["stage"] for e in lines if e["event"] == "finished"} == {"images", "selection", "partial"}
    code, lines, _ = run(options(**against), capsys)
    assert (code, tiny.epochs_run(lines), lines[-1]["release"]) == (0, 0, release.digest)

    # where it cannot be had, no level can be chosen for; what was there stays
    before = {name: data for name, data in files(tmp_path / "store").items() if not name.startswith("stages")}
    levels = ["brightness-0.3", "brightness-0.4"]
    arguments = options(levels=levels, **against, **{"model.name": "tests.nets:afraid_of_the_light"})
    code, lines, _ = run(arguments, capsys)
    assert code == 1
    (reason,) = set(lines[-1]["failed"].values())
    assert sorted(lines[-1]["failed"]) == levels
    assert reason.startswith("the fine-tune on undistorted images, which changes are measured against: the loss became nan")
    assert "\n" not in reason
    assert before.items() <= files(tmp_path / "store").items()
    assert store.pull("tiny").digest == release.digest


def test_where_every_level_fails_nothing_is_published(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(levels=["brightness-0.01"], **{"model.name": "tests.nets:afraid_of_the_dark"})
    assert run(arguments, capsys)[0] == 1
    assert not (tmp_path / "store" / "refs").exists()


def test_one_fine_tune_over_two_workers(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options(levels=["jpeg-10"], **{"resources.workers-per-level": 2})
    code, lines, err = run(arguments, capsys)
    assert code == 0, err
    assert {e["stage"] for e in lines if e["event"] == "finished"} >= {"original", "full", "selection", "partial"}
    release = Store(tmp_path / "store").pull("tiny")
    base, adaptor = release.base_state(), release.adaptor_state("jpeg-10")
    assert adaptor
    assert all(not same_bits(tensor, base[name]) for name, tensor in adaptor.items())
    code, lines, _ = run(arguments, capsys)
    assert code == 0
    assert tiny.epochs_run(lines) == 0


def test_a_job_on_s3(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="bucket")
        uri = f"s3://bucket/artifacts?scheme=http&endpoint_override={host}:{port}"
        code, lines, err = run(options(levels=["jpeg-10"], store=uri), capsys)
        assert code == 0, err
        release = Store(uri).pull("tiny")
        run(options(levels=["jpeg-10"]), capsys)
        local = Store(tmp_path / "store").pull("tiny")
        # the same bytes wherever they are published
        of_its_time = {"created": "", "tables": {}, "figures": {}}  # tables hold seconds
        assert {**release.manifest, **of_its_time} == {**local.manifest, **of_its_time}
        code, lines, _ = run(options(levels=["jpeg-10"], store=uri), capsys)
        assert (code, tiny.epochs_run(lines)) == (0, 0)
    finally:
        server.stop()


def test_a_worker_that_fails_ends_the_others_of_its_level_and_says_why() -> None:
    def train(level: str, emit: Emit) -> None:
        if dist.get_rank() == 0:
            raise TrainingFailedError(f"the loss became nan at {level}")
        dist.barrier()

    def look_up(level: str, emit: Emit) -> None:
        return None

    tasks = TaskRunner(ResourcesConfig(workers_per_level=2, retries=0), discard)
    tasks.start("a level", train, "jpeg-10", look_up=look_up)
    tasks.settle()
    assert tasks.failed == {"a level": "the loss became nan at jpeg-10"}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _label_outside(folder: Path) -> None:
    path = folder / "data/val/labels/002.png"
    label = np.array(Image.open(path))
    label[0, 0] = 7
    Image.fromarray(label).save(path)


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = safetensors.torch.load_file(folder / "weights.safetensors")
    change(state)
    safetensors.torch.save_file(state, folder / "weights.safetensors")


def _pickle(folder: Path) -> None:
    torch.save({"model": build_model}, folder / "weights.pt")


BAD: dict[str, tuple[dict[str, Any], Callable[[Path], object] | None, str]] = {
    "unknown option": ({"recipe.speed": 3}, None, "recipe.speed"),
    "unknown level": ({"levels": ["jpg-10"]}, None, "jpg-10"),
    "quality 0": ({"levels": ["jpeg-0"]}, None, "jpeg-0"),
    "quality 101": ({"levels": ["jpeg-101"]}, None, "jpeg-101"),
    "a level twice": ({"levels": ["jpeg-10", "jpeg-10"]}, None, "given twice"),
    "a budget that fits no layer": ({"budget": "2"}, None, "fits no layer"),
    "no budget": ({"budget": "lots"}, None, "'lots'"),
    "an unsafe name": ({"name": "../tiny"}, None, "../tiny"),
    "missing tensor": ({}, lambda f: _weights(f, lambda s: s.pop("conv1.weight")), "lacks 'conv1.weight'"),
    "extra tensor": ({}, lambda f: _weights(f, lambda s: s.update(more=torch.zeros(2))), "has 'more'"),
    "misshapen tensor": (
        {}, lambda f: _weights(f, lambda s: s.update({"head.bias": torch.zeros(9)})), "'head.bias'",
    ),
    "a pickle": ({"model.weights": "weights.pt"}, _pickle, "not opened"),
    "no weights": ({"model.weights": "nowhere.pt"}, None, "there is no weights file"),
    "label outside the classes": ({}, _label_outside, "002"),
    "image without label": ({}, lambda f: (f / "data/train/labels/003.png").unlink(), "003"),
    "truncated image": ({}, lambda f: _truncate(f / "data/train/images/005.png"), "005.png"),
    "truncated label": ({}, lambda f: _truncate(f / "data/val/labels/001.png"), "001.png"),
    "no data": ({"data.path": "nowhere"}, None, "nowhere"),
    "no such network": ({"model.name": "tests.nets:large"}, None, "cannot be imported"),
    "a store that cannot be written": ({"store": "/proc/nowhere"}, None, "/proc/nowhere"),
    "more GPUs than there will ever be": ({"resources.gpus": 3}, None, "3 GPU"),
    "more CPUs than there will ever be": ({"resources.cpus": 64}, None, "64 CPU"),
    "more workers than there will ever be": (
        {"resources.workers-per-level": 9, "recipe.batch-size": 9}, None, "9 workers",
    ),
    "more workers than images in a batch": (
        {"resources.workers-per-level": 5, "resources.cpus": 0.1}, None,
        "resources.workers_per_level is 5 and recipe.batch_size 4",
    ),
    "more workers than images": (
        {"resources.workers-per-level": 13, "resources.cpus": 0.1, "recipe.batch-size": 16}, None,
        "resources.workers_per_level is 13 and there are 12 training images",
    ),
    "more workers than images while some are held back": (
        {"resources.workers-per-level": 7, "resources.cpus": 0.1, "recipe.batch-size": 16, "selection.held-back": 0.5}, None,
        "resources.workers_per_level is 7 and there are 6 training images beside those that are held back",
    ),
    "fewer images than can be held back": (
        {"selection.held-back": 0.01}, None, "selection.held_back is 0.01 of 12 training images, which leaves none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_leaves_the_store_as_it_was(
    what: str, options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], published: Path
) -> None:
    changes, damage, found = BAD[what]
    shutil.copytree(published, tmp_path / "store")
    before = files(tmp_path / "store")
    if damage is not None:
        damage(tmp_path)
    changes = {k: tmp_path / v if k in ("model.weights", "data.path") else v for k, v in changes.items()}
    code, lines, err = run(options(**changes), capsys)
    assert code == 2
    assert found in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not [e for e in lines if e["stage"] != "images"]
    assert files(tmp_path / "store") == before


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Path:
    """A store with a release in it."""
    folder = tmp_path_factory.mktemp("published")
    tiny.write_folder(folder / "data")
    tiny.write_weights(folder / "weights.safetensors")
    with tiny.without_figures():
        assert run_split([*tiny.options(folder, levels=["jpeg-50"], **{"recipe.epochs": 1}), "--json"]) == 0
    return folder / "store"


def test_what_a_cluster_will_ever_have() -> None:
    head, worker = {"CPU": 0.0}, {"CPU": 4.0, "GPU": 1.0}
    check_resources(ResourcesConfig(cpus=4, gpus=0.25), [head, worker], None)
    check_resources(ResourcesConfig(gpus=1, workers_per_level=2), [worker, worker], None)
    with pytest.raises(UserError, match="2 GPU but the cluster will never have more than 2"):
        check_resources(ResourcesConfig(gpus=2), [worker, worker], None)  # no node has two
    with pytest.raises(UserError, match="1 GPU by 3 workers"):
        check_resources(ResourcesConfig(gpus=1, workers_per_level=3), [worker, worker], None)
    check_resources(ResourcesConfig(gpus=2), [head], {"CPU": 40.0, "GPU": 10.0})  # none there yet, but they can come
    with pytest.raises(UserError, match="will never have more than 10"):
        check_resources(ResourcesConfig(gpus=11), [head], {"CPU": 40.0, "GPU": 10.0})


def test_worker_groups_start_only_where_they_fit() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]
    assert groups_that_fit(ResourcesConfig(cpus=1, gpus=1, workers_per_level=2), nodes, None) == 2
    assert groups_that_fit(ResourcesConfig(cpus=4, workers_per_level=2), nodes, None) == 2
    assert groups_that_fit(ResourcesConfig(cpus=1, gpus=1, workers_per_level=2), [], {"CPU": 40, "GPU": 10}) == 5
    assert groups_that_fit(ResourcesConfig(cpus=1, gpus=1, workers_per_level=2), [], None) == 1


def test_the_ceiling_a_launcher_file_states() -> None:
    launcher = {
        "max_workers": 7,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 5},
            "other": {"resources": {"CPU": 2}},
        },
    }
    assert autoscaler_ceiling(launcher) == {"CPU": 34, "GPU": 5}
    assert autoscaler_ceiling({}) is None
    assert autoscaler_ceiling(None) is None
