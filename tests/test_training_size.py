"""`model.input training-size`: frames are scaled to the size of the training images, and answers come back at their own."""

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gearnn_ray import AdaptiveModel, Store, UserError
from gearnn_ray.cli.main import run_evaluate, run_split
from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.config.split import ModelConfig
from gearnn_ray.data.cache import level_images
from gearnn_ray.data.dataset import Dataset, open_dataset
from gearnn_ray.evaluation import measurements
from gearnn_ray.levels.level import parse_level
from gearnn_ray.models.registry import build_model
from gearnn_ray.offline.base import check_network, network_of, training_size
from gearnn_ray.offline.job_spec import JobSpec, Network
from gearnn_ray.offline.level_run import run_level
from gearnn_ray.service.bundles import Bundle, Item, group_of, predict, values_of
from gearnn_ray.serving.export import export_level
from gearnn_ray.serving.frames import Evidence, Frame, evidence_of
from gearnn_ray.serving.level_estimation import LevelEstimate
from gearnn_ray.store.manifest import Manifest, read_manifest
from gearnn_ray.tasks.base import Served
from gearnn_ray.tasks.detection import Detection
from gearnn_ray.training.predict import at_size, image_at_size
from gearnn_ray.training.sampling import AtSize, training_batches
from tests import served, tiny
from tests.conftest import NORMALISATION, SEGMENTATION
from tests.nets import TRUST

SIZE = (64, 80)  # of the training images of `served`'s release
SIZES = ((32, 40), (16, 20), (64, 80), (48, 96), (128, 100))


def frame_of(size: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    return served.picture(seed, *size)


def tensor_of(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


# The step itself


def test_images_of_the_size_stay_the_very_same() -> None:
    x = torch.zeros(1, 3, *SIZE, dtype=torch.uint8)
    assert at_size(x, SIZE) is x
    assert at_size(x, None) is x
    image = frame_of(SIZE)
    assert image_at_size(image, SIZE) is image


@pytest.mark.parametrize("size", SIZES)
def test_scaling_is_bilinear_and_antialiased_as_pillow_does_it(size: tuple[int, int]) -> None:
    image = frame_of(size)
    scaled = image_at_size(image, SIZE)
    with_pillow = np.asarray(Image.fromarray(image).resize(SIZE[::-1], Image.Resampling.BILINEAR))
    assert scaled.dtype == np.uint8
    assert np.abs(scaled.astype(int) - with_pillow).max() <= 1


def test_a_frame_is_scaled_to_the_same_bits_alone_in_a_batch_and_in_a_job() -> None:
    images = [frame_of((32, 40), seed) for seed in range(3)]
    together = at_size(torch.stack([tensor_of(image) for image in images]), SIZE)
    for image, own in zip(images, together, strict=True):
        assert torch.equal(at_size(tensor_of(image)[None], SIZE)[0], own)
        assert np.array_equal(image_at_size(image, SIZE), own.permute(1, 2, 0).numpy())


def test_gradients_flow_to_the_pixels_of_the_frame() -> None:
    x = torch.rand(1, 3, 32, 40, requires_grad=True)
    at_size(x, SIZE).sum().backward()
    assert x.grad is not None
    assert float(x.grad.sum()) == pytest.approx(3 * 64 * 80, rel=1e-5)


# Jobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("street")
    tiny.write_folder(root / "data")
    tiny.write_weights(root / "weights.safetensors")
    return root


@pytest.fixture(scope="module")
def data(folder: Path) -> Dataset:
    return open_dataset("folder", str(folder / "data"), num_classes=tiny.CLASSES)


@pytest.fixture(scope="module")
def spec(folder: Path, data: Dataset) -> JobSpec:
    network = Network("tests.nets:small", tiny.CLASSES, NORMALISATION, input_size=(32, 40))
    recipe = Recipe(epochs=1, learning_rate=0.05, batch_size=4, crop=24)
    return tiny.job_spec(folder, network=network, data=data, recipe=recipe, budget=300)


def own_size(spec: JobSpec) -> JobSpec:
    return replace(spec, network=replace(spec.network, input_size=None))


def test_keys_without_the_option_are_those_of_before(spec: JobSpec) -> None:
    assert "input_size" not in own_size(spec).network.inputs()
    assert spec.network.inputs() == {**own_size(spec).network.inputs(), "input_size": (32, 40)}
    assert spec.key("full") != own_size(spec).key("full")


@pytest.mark.parametrize("level", ["h264-20x16", "brightness-0.4+h264-20x16", "h264-20x16+jpeg-30", "jpeg-10"])
def test_jobs_read_every_level_at_training_size(spec: JobSpec, level: str) -> None:
    for images, targets in (spec.training_data(level), spec.validation_data(level)):
        assert {image.shape for image in images} == {(32, 40, 3)}
        assert {target.shape for target in targets} == {(32, 40)}
    arrived = level_images(spec.data.train, parse_level(level), Path(spec.cache))
    found, _ = spec.training_data(level)
    assert np.array_equal(found[3], image_at_size(arrived[3], (32, 40)))


def test_a_crop_is_one_of_the_scaled_image_and_its_label_is_not_resampled() -> None:
    small, label = frame_of((16, 20)), np.arange(64 * 80, dtype=np.uint8).reshape(64, 80) % 3
    (batch,) = training_batches(SEGMENTATION, AtSize([small], SIZE), [label], 1, (24, 24), (0,))
    whole = image_at_size(small, SIZE)
    windows = np.lib.stride_tricks.sliding_window_view(whole, (24, 24), (0, 1))
    crop, its_label = batch.images[0].numpy(), batch.targets[0].numpy()
    places = [
        (top, left, mirrored)
        for mirrored in (False, True)
        for top, left in np.argwhere((windows == (crop[:, :, ::-1] if mirrored else crop)).all((2, 3, 4)))
    ]
    assert any(
        np.array_equal(its_label, (part := label[top : top + 24, left : left + 24])[:, ::-1] if mirrored else part)
        for top, left, mirrored in places
    )


def test_algorithm_1_at_a_small_frame_size_judges_what_it_stores(spec: JobSpec) -> None:
    result = run_level(spec, "h264-20x16", lambda _: None)
    assert result.digest is not None
    state = {**Store(spec.store).get_state(spec.base), **Store(spec.store).get_state(result.digest)}
    assert tiny.score_of(spec, state, "h264-20x16") == pytest.approx(result.adaptor)


def test_the_original_at_training_size_is_a_rival_where_frames_have_another(spec: JobSpec) -> None:
    own = own_size(spec)
    rival = measurements.evaluate_scaled(own, "h264-20x16", lambda _: None)
    assert rival is not None
    assert rival.score == pytest.approx(run_level(spec, "h264-20x16", lambda _: None).original)
    assert measurements.evaluate_scaled(own, "jpeg-10", lambda _: None) is None, "its frames have the size already"


def test_the_base_is_no_rival_of_its_own_answers_to_frames_of_another_size(
    spec: JobSpec, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    for path in (tmp_path / "data/val").rglob("*.png"):
        Image.open(path).resize((60, 48), Image.Resampling.NEAREST).save(path)
    data = open_dataset("folder", str(tmp_path / "data"), num_classes=tiny.CLASSES)
    other = replace(own_size(spec), data=data, cache=str(tmp_path / "cache"))
    assert measurements.evaluate_scaled(other, "h264-20x16", lambda _: None) is not None
    monkeypatch.setattr(type(data), "labelled", False)
    assert measurements.evaluate_scaled(other, "h264-20x16", lambda _: None) is None


def test_training_images_of_several_sizes_are_refused_in_one_sentence(tmp_path: Path, spec: JobSpec, data: Dataset) -> None:
    tiny.write_folder(tmp_path / "data")
    for part in ("images", "labels"):
        path = tmp_path / "data/train" / part / "003.png"
        Image.open(path).crop((0, 0, 40, 24)).save(path)
    several = open_dataset("folder", str(tmp_path / "data"), num_classes=tiny.CLASSES)
    with pytest.raises(
        UserError, match=r"have 2 sizes, 40x32 in 11 of 12, and model.input training-size needs one.*or own-size$"
    ):
        training_size(several, str(tmp_path / "cache"))
    assert training_size(data, spec.cache) == (32, 40)
    here = replace(own_size(spec), data=several, cache=str(tmp_path / "cache"))
    assert measurements.evaluate_scaled(here, "h264-20x16", lambda _: None) is None


def test_a_detector_that_scales_by_itself_is_refused() -> None:
    network = replace(network_of(ModelConfig(name="tests.nets:tiny_detector"), 3, "detection"), input_size=SIZE)
    with pytest.raises(
        UserError, match=r"tiny_detector itself scales images of any size to one of its own: leave model.input out"
    ):
        check_network(network, None)


# The manifest


def test_the_manifest_keeps_the_size_and_old_ones_have_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    served.publish(store, "scaled", input_size=SIZE)
    served.publish(store, "own")
    contents: dict[str, Manifest] = {name: store.manifest(name)[1] for name in ("scaled", "own")}
    assert contents["scaled"].model.input_size == SIZE
    assert contents["own"].model.input_size is None
    assert contents["scaled"].as_json()["model"]["input_size"] == [64, 80]
    assert "input_size" not in contents["own"].as_json()["model"]
    for content in contents.values():
        assert read_manifest(json.dumps(content.as_json()).encode(), "sha256:0") == content


@pytest.mark.parametrize("size", [[0, 80], [64], [64, 10**9], "64x80"])
def test_a_manifest_with_an_impossible_size_is_refused(tmp_path: Path, size: Any) -> None:
    served.publish(Store(tmp_path), input_size=SIZE)
    content = Store(tmp_path).manifest("tiny")[1].as_json()
    content["model"]["input_size"] = size
    with pytest.raises(UserError, match=r"not valid at model.input_size"):
        read_manifest(json.dumps(content).encode(), "sha256:0")


# Serving


@pytest.fixture(scope="module")
def scaling(tmp_path_factory: pytest.TempPathFactory) -> AdaptiveModel:
    store = tmp_path_factory.mktemp("store")
    served.publish(Store(store), level_names=("jpeg-10", "h264-20x16"), input_size=SIZE)
    return AdaptiveModel.pull(str(store), "tiny", trust=TRUST)


def by_hand(model: AdaptiveModel, frame: NDArray[np.uint8], level: str) -> Tensor:
    """Logits [K, H, W] of the level's own network for the frame, scaled to it and back without any code of serving."""
    x = F.interpolate(tensor_of(frame)[None].float(), size=SIZE, mode="bilinear", antialias=True).round() / 255
    x = (x - torch.tensor(served.MEAN).view(1, 3, 1, 1)) / torch.tensor(served.STD).view(1, 3, 1, 1)
    model.set_level(level)
    try:
        logits: Tensor = model(x)
    finally:
        model.set_level(None)
    return F.interpolate(logits, size=frame.shape[:2], mode="bilinear", align_corners=False)[0]


def test_frames_of_several_sizes_and_levels_share_one_pass_and_each_gets_its_own_answer(scaling: AdaptiveModel) -> None:
    frames = [frame_of(size, seed) for seed, size in enumerate(SIZES)]
    levels = ["jpeg-10", "clean", "h264-20x16", "jpeg-10", "clean"]
    passes: list[torch.Size] = []
    handle = scaling._network.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape))
    answers = scaling([tensor_of(frame) for frame in frames], levels)
    handle.remove()
    assert passes == [(5, 3, *SIZE)]
    for frame, level, answer in zip(frames, levels, answers, strict=True):
        assert answer.shape[1:] == frame.shape[:2]
        want = by_hand(scaling, frame, level)
        assert float((answer - want).abs().max() / want.abs().max()) < 1e-5
        alone = scaling(tensor_of(frame)[None], [level])[0]
        assert float((answer - alone).abs().max() / want.abs().max()) < 1e-5


def test_the_level_is_that_of_the_frame_as_it_came(scaling: AdaptiveModel) -> None:
    frames = [tensor_of(frame_of(size)) for size in ((16, 20), SIZE)]
    assert [estimate.level for estimate in scaling.estimate_levels(frames)] == ["h264-20x16", "clean"]
    evidence = evidence_of(frame_of((16, 20)), None)
    assert (evidence.height, evidence.width) == (16, 20)


def test_gradients_have_the_size_of_the_frame(scaling: AdaptiveModel) -> None:
    x = tensor_of(frame_of((32, 40)))[None].float().requires_grad_()
    scaling.task.utility(scaling.forward_at(["jpeg-10"]), x).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.shape == (1, 3, 32, 40)
    assert float(x.grad.abs().sum()) > 0


def test_gradients_go_through_the_network_at_its_own_size(scaling: AdaptiveModel) -> None:
    frame = tensor_of(frame_of((32, 40)))[None]
    assert torch.equal(scaling.forward_at(["clean"])(frame), scaling.forward_at(["clean"])(at_size(frame, SIZE)))
    assert scaling.forward_at(["clean"])(frame).shape[-2:] == SIZE


@pytest.mark.parametrize(
    ("images", "found"), [([], "a list"), ([torch.zeros(1, 8, 8)], r"a tensor \[1, 1, 8, 8\]"), ([3], "a int")]
)
def test_what_is_no_image_is_refused(scaling: AdaptiveModel, images: Sequence[Any], found: str) -> None:
    with pytest.raises(UserError, match=f"the images are {found}: expected a tensor"):
        scaling(images, ["clean"] * len(images))


def test_a_release_at_own_size_takes_no_list(tmp_path: Path) -> None:
    served.publish(Store(tmp_path))
    model = AdaptiveModel.pull(str(tmp_path), "tiny", trust=TRUST)
    with pytest.raises(UserError, match=r"the images are a list: expected a tensor \[B, 3, H, W\]"):
        model([tensor_of(frame_of(size)) for size in SIZES], ["clean"] * len(SIZES))


def item_of(model: AdaptiveModel, size: tuple[int, int], kind: str = "image/png") -> Item:
    return Item(model, Frame(frame_of(size), Evidence(*size, 0.0)), LevelEstimate("jpeg-10"), kind, 0.0)


def test_a_service_answers_frames_of_several_sizes_in_one_pass_each_at_its_own(tmp_path: Path) -> None:
    served.publish(Store(tmp_path), input_size=SIZE)
    config = ServeConfig(store=str(tmp_path), bundles=("tiny:latest",), device="cpu", trust=TRUST, cache=str(tmp_path / "copies"))
    bundle = Bundle("tiny:latest", config)
    bundle.refresh()
    model = bundle.model()
    items = [item_of(model, size, kind) for size in SIZES for kind in ("image/png", "application/x-npy")]
    for item, prediction in zip(items, predict(items), strict=True):
        body = model.task.encode(prediction.content, str(item.media_type), Served(item.frame.pixels, (), {}))
        size = Image.open(io.BytesIO(body)).size[::-1] if item.media_type == "image/png" else np.load(io.BytesIO(body)).shape[1:]
        assert size == item.frame.pixels.shape[:2]


def test_frames_share_a_pass_up_to_the_pixels_that_one_frame_may_have(tmp_path: Path, scaling: AdaptiveModel) -> None:
    groups = {size: group_of(item_of(scaling, size), 8, 4 * 64 * 80) for size in (*SIZES, (128, 160), (256, 320))}
    small = {groups[size].key for size in ((32, 40), (16, 20), (64, 80), (48, 96))}
    assert len(small) == 1
    assert groups[64, 80].most == 4
    assert groups[128, 100].key == groups[128, 160].key != groups[64, 80].key
    assert (groups[128, 160].most, groups[256, 320].most) == (1, 1)
    assert values_of(scaling, item_of(scaling, (16, 20)).frame) == 3 * 64 * 80

    served.publish(Store(tmp_path))
    own = AdaptiveModel.pull(str(tmp_path), "tiny", trust=TRUST)
    assert len({group_of(item_of(own, size), 8, 4 * 64 * 80).key for size in SIZES}) == len(SIZES)


# Detection


def test_boxes_and_masks_come_back_in_pixels_of_the_frame() -> None:
    masks = torch.zeros(1, 40, 60, dtype=torch.bool)
    masks[:, 10:20, 30:60] = True
    found = {"boxes": torch.tensor([[30.0, 10, 60, 20]]), "scores": torch.ones(1), "labels": torch.zeros(1), "masks": masks}
    (own,) = Detection().at_frame_size([found], 20, 120, (40, 60))
    assert own["boxes"].tolist() == [[60.0, 5, 120, 10]]
    assert own["masks"].shape == (1, 20, 120)
    assert own["masks"][0, 5:10, 60:].all()
    assert int(own["masks"].sum()) == 5 * 60
    assert Detection().at_frame_size([found], 40, 60, (40, 60)) == [found]
    nothing = {name: part[:0] for name, part in found.items()}
    assert Detection().at_frame_size([nothing], 20, 120, (40, 60))[0]["masks"].shape == (0, 20, 120)


def test_a_detector_answers_frames_of_several_sizes_in_their_own_pixels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, store = build_model("centre_detector", 3), Store(tmp_path)
    base = store.put_state(dict(network.state_dict()))
    content: dict[str, Any] = {
        "name": "boxes", "base": base, "levels": {"clean": {"digest": None, "bytes": 0, "floats": 0, "layers": [], "scores": {}}},
        "model": {
            "name": "centre_detector", "num_classes": 3, "floats": 1, "task": "detection", "input_size": SIZE,
            "normalisation": {"mean": served.MEAN, "std": served.STD},
        },
        "data": {"reference": {"height": 64, "width": 80, "luma": 100.0}}, "budget": {}, "recipe": {}, "versions": {},
    }  # fmt: skip
    store.publish(Manifest.model_validate(content), {})
    model = AdaptiveModel.pull(str(tmp_path), "boxes")
    frame = frame_of(SIZE)
    half = np.asarray(Image.fromarray(frame).resize((40, 128), Image.Resampling.BILINEAR))
    first, second = model([tensor_of(frame), tensor_of(half)], ["clean", "clean"])
    (again,) = model(at_size(tensor_of(half)[None], SIZE), ["clean"])
    assert len(first["boxes"])
    assert len(second["boxes"])
    assert torch.allclose(second["boxes"], again["boxes"] * torch.tensor([0.5, 2, 0.5, 2]), atol=1e-3)


# Files for other runtimes


def test_a_file_takes_frames_at_training_size_alone_and_says_so(tmp_path: Path) -> None:
    served.publish(Store(tmp_path / "store"), input_size=SIZE)
    release = Store(tmp_path / "store").pull("tiny")
    path = export_level(release, "jpeg-10", tmp_path / "net.pt2", trust=TRUST)
    about = {"gearnn_ray": ""}
    network = torch.export.load(path, extra_files=about).module()
    assert json.loads(about["gearnn_ray"])["input_size"] == [64, 80]
    assert network(torch.zeros(3, 3, *SIZE)).shape == (3, 3, *SIZE)
    with pytest.raises(Exception, match=r"(?i)guard|shape|size"):
        network(torch.zeros(1, 3, 32, 40))
    with pytest.raises(UserError, match=r"image_size is \(32, 40\).*takes frames at \(64, 80\) alone: leave image_size out"):
        export_level(release, "jpeg-10", tmp_path / "net.onnx", (32, 40), trust=TRUST)


# From the command to the release, on Ray


@pytest.mark.usefixtures("ray_cluster", "no_figures")
def test_the_option_is_part_of_the_release_and_an_evaluation_keeps_it(folder: Path) -> None:
    store, level = folder / "jobs", "h264-20x16"
    assert run_split(tiny.options(folder, store=store, levels=[level], **{"model.input": "training-size"})) == 0
    manifest = Store(store).manifest("tiny")[1]
    assert manifest.model.input_size == (32, 40)
    model = AdaptiveModel.pull(str(store), "tiny", trust=TRUST)
    assert [answer.shape[1:] for answer in model([tensor_of(frame_of(size)) for size in SIZES], [level] * 5)] == [*SIZES]

    given = {
        "store": store,
        "release": "tiny",
        "trust": "tests",
        "data.cache": folder / "cache",
        "methods": "bn-statistics",
        "budgets": "30%",
    }
    assert run_evaluate([part for name, value in given.items() for part in (f"--{name}", str(value))]) == 0
    rows = Store(store).get_table("tables/tiny/accuracy.parquet").to_pylist()
    assert "original-scaled" not in {row["method"] for row in rows}
    original = next(row["value"] for row in rows if (row["method"], row["level"]) == ("original", level))
    assert original == pytest.approx(manifest.levels[level].scores.original)
