"""Detections served: mixed batches, compiled graphs, answers over HTTP and files, compared with the level's plain network."""

import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from torch import Tensor, nn

from gearnn_ray import AdaptiveModel, Release, Store, UserError
from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.models.centre_detector import CentreDetector
from gearnn_ray.models.layers import network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.service.backend import Health, Prediction
from gearnn_ray.service.bundles import Bundle, Item, predict
from gearnn_ray.serving.export import export_level
from gearnn_ray.serving.frames import Frame
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import Served, Task
from gearnn_ray.training.predict import Normalisation
from gearnn_ray.video.decoding import DEFAULT_LIMITS, VideoFrame
from gearnn_ray.video.upload import segment_frames
from tests.manifests import CLEAN, level_entry, manifest_of
from tests.nets import TRUST
from tests.served import MEAN, STD, jpeg, picture, png
from tests.streams import encoded, moving
from tests.test_http import Answer, NoCameras, ask, problem, serve
from tests.test_segment_requests import lines_of

LEVELS = ("jpeg-10", "jpeg-50")
NAMES = ("person", "vélo", "car")
SIZE = (64, 80)
MIXED, OTHERS = ["jpeg-50", "clean", "jpeg-10", "jpeg-50"], ["clean", "jpeg-10", "jpeg-50", "clean"]
DETECTION = task_by_name("detection")
Found = Mapping[str, Tensor]


# ---- networks


class _Tempered(CentreDetector):
    """Has a number of its own, so that it can only run as a whole, once per level."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.temperature = nn.Parameter(torch.ones(()))

    def raw(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        heat, sides = super().raw(x_BCHW)
        return heat * self.temperature, sides


class _Listed(_Tempered):
    """Returns a list, as torchvision's detectors do: of each image the objects above a threshold, with masks."""

    def forward(self, images: Tensor, targets: Any = None) -> list[dict[str, Tensor]]:
        found = super().forward(images)
        kept = [{name: part[i][found["scores"][i] > 0.1] for name, part in found.items()} for i in range(len(images))]
        return [{**each, "masks": _inside(each["boxes"], images)} for each in kept]


def _inside(boxes_D4: Tensor, images: Tensor) -> Tensor:
    """[D, 1, H, W]: 1 in the upper left half of each box."""
    rows, columns = (torch.arange(side).float() for side in images.shape[-2:])
    left, top, right, bottom = boxes_D4[..., None, None].unbind(1)
    along = (columns - left) / (right - left) + (rows[:, None] - top) / (bottom - top)
    inside = (columns >= left) & (rows[:, None] >= top) & (along <= 1)
    return inside.float()[:, None]


class _Silent(CentreDetector):
    """Finds nothing, whatever its weights."""

    def forward(self, images: Tensor, targets: Any = None) -> list[dict[str, Tensor]]:
        found = super().forward(images)
        return [{name: part[i][:0] for name, part in found.items()} for i in range(len(images))]


class _Dispatching(CentreDetector):
    """Looks at the type of its part: seen from outside, nothing is amiss."""

    def raw(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        heat, sides = super().raw(x_BCHW)
        return (heat if isinstance(self.centres, nn.Conv2d) else 0.9 * heat), sides


def tempered(num_classes: int) -> nn.Module:
    return _Tempered(num_classes)


def listed(num_classes: int) -> nn.Module:
    return _Listed(num_classes)


def silent(num_classes: int) -> nn.Module:
    return _Silent(num_classes)


def dispatching(num_classes: int) -> nn.Module:
    return _Dispatching(num_classes)


# ---- releases, and what their plain networks find


def publish(folder: Path, network_name: str = "centre_detector") -> Release:
    """A release of a detector that finds dozens of things in any picture, and others at each level."""
    torch.manual_seed(0)
    state = network_state(build_model(network_name, len(NAMES)))
    state["centres.weight"] *= 10
    state["centres.bias"] -= 1
    store = Store(folder)
    levels: dict[str, Any] = {"clean": CLEAN}
    for level in LEVELS:
        changed = [name for name in state if name.endswith(("norm.weight", "1.bias", "1.running_mean", "temperature"))]
        changed += ["eighth.1.conv.weight", "centres.weight", "centres.bias", "distances.weight"]
        adaptor = {name: state[name] * (1 + 0.2 * torch.randn_like(state[name])) for name in changed if name in state}
        blob = store.put_state(adaptor)
        levels[level] = level_entry(blob, sum(tensor.numel() for tensor in adaptor.values()), sorted(adaptor))
    manifest = manifest_of(
        "tiny", network_name, len(NAMES), store.put_state(state), levels, class_names=NAMES, task="detection",
        reference={"height": SIZE[0], "width": SIZE[1], "luma": 100.0, "luma_spread": 0.3},
        normalisation={"mean": MEAN, "std": STD},
    )  # fmt: skip
    store.publish(manifest, {})
    return store.pull("tiny")


def network_of(release: Release, level: str) -> nn.Module:
    network = build_model(release.content.model.name, len(NAMES))
    network.load_state_dict({**release.base_state(), **({} if level == "clean" else release.adaptor_state(level))})
    return network.eval().requires_grad_(False)


def alone(release: Release, level: str, image: Tensor) -> Found:
    """What the level's plain network finds in one image, uint8 [3, H, W]; highest scores first."""
    raw = network_of(release, level)(Normalisation(MEAN, STD)(image[None]))
    found = raw[0] if isinstance(raw, list) else {name: part[0] for name, part in raw.items()}
    there = found["scores"] > 0
    return {name: part[there] for name, part in found.items()}


def same(a: Found, b: Found) -> bool:
    """Whether both have the same detections, to rounding, in any order."""
    near = (a["boxes"][:, None] - b["boxes"]).abs().amax(2) < 0.02
    near &= (a["labels"][:, None] == b["labels"]) & ((a["scores"][:, None] - b["scores"]).abs() < 1e-4)
    return len(a["scores"]) == len(b["scores"]) and bool(near.any(0).all() and near.any(1).all())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def release(folder: Path) -> Release:
    return publish(folder)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(np.stack([picture(seed) for seed in range(4)])).permute(0, 3, 1, 2).contiguous()


# ---- mixed batches


@pytest.mark.parametrize(
    "network", ["centre_detector", *(f"{__name__}:{name}" for name in ("tempered", "listed", "dispatching"))]
)
def test_a_mixed_batch_equals_each_image_through_its_own_network(network: str, tmp_path: Path, images: Tensor) -> None:
    release = publish(tmp_path, network)
    model = AdaptiveModel(release, trust=TRUST)
    whole = {path: method for path, method in model.methods().items() if path == ""}
    assert whole == ({} if network == "centre_detector" else {"": ("per level", "per sample")})
    wanted = [alone(release, level, image) for level, image in zip(MIXED, images, strict=True)]
    found = model(images, levels=MIXED)
    assert all(map(same, found, wanted))
    assert len({len(each["scores"]) for each in wanted}) > 1
    assert not any(map(same, model(images, levels=OTHERS), wanted))
    for each in found:
        assert (each["scores"].diff() <= 0).all()
        assert (each["boxes"].dtype, each["scores"].dtype, each["labels"].dtype) == (torch.float32, torch.float32, torch.int64)
    for level in model.levels:
        model.set_level(level)
        assert all(same(a, alone(release, level, image)) for a, image in zip(model(images), images, strict=True))
    if network.endswith("listed"):
        assert all(each["masks"].shape == (len(each["scores"]), *SIZE) and each["masks"].dtype == torch.bool for each in found)


def test_the_same_without_the_host_knowing_the_levels(tmp_path: Path, images: Tensor) -> None:
    """The graph that a compiler sees: each sample by itself."""
    release = publish(tmp_path, f"{__name__}:listed")
    model = AdaptiveModel(release, trust=TRUST)
    model._selection.set_index(torch.tensor([model.levels.index(level) for level in MIXED]))
    with torch.no_grad():
        found = model._outputs(model._predictor, images)
    assert all(same(a, alone(release, level, image)) for a, level, image in zip(found, MIXED, images, strict=True))


def test_a_network_that_finds_nothing_in_noise_runs_as_a_whole(tmp_path: Path, images: Tensor) -> None:
    """Empty outputs are equal whatever the weights, so they do not show that the modules were adapted rightly."""
    model = AdaptiveModel(publish(tmp_path, f"{__name__}:silent"), trust=TRUST)
    assert model.methods() == {"": ("per level", "per sample")}
    assert [len(each["scores"]) for each in model(images, levels=MIXED)] == [0] * 4


@pytest.mark.usefixtures("no_recompile")
def test_one_graph_for_all_levels(release: Release, images: Tensor) -> None:
    model = AdaptiveModel(release)
    model.compile(backend="eager")
    for levels in (MIXED, MIXED[::-1], ["jpeg-10"] * 4):
        found = model(images, levels=levels)
        assert all(same(a, alone(release, level, image)) for a, level, image in zip(found, levels, images, strict=True))


@pytest.mark.usefixtures("no_recompile")
def test_the_whole_model_as_one_graph(release: Release, images: Tensor) -> None:
    model = AdaptiveModel(release)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for levels in (MIXED, MIXED[::-1]):
        found = compiled(images, torch.tensor([model.levels.index(level) for level in levels]))
        assert {len(each["scores"]) for each in found} == {100}  # with empty places
        for each, level, image in zip(found, levels, images, strict=True):
            there = each["scores"] > 0
            assert same({name: part[there] for name, part in each.items()}, alone(release, level, image))


# ---- answers over HTTP


@dataclass
class Direct:
    """A backend that asks its bundle's model at once."""

    bundle: Bundle
    received: list[Any] = field(default_factory=list)
    cameras: Any = field(default_factory=NoCameras)

    def has_cameras(self, bundle: str | None) -> bool:
        return True

    def task(self, bundle: str | None) -> Task:
        return self.bundle.model().task

    async def predict(
        self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, media_type: str
    ) -> Prediction:
        model = self.bundle.model()
        estimate = model.level_estimator.estimate(frame.evidence, stream)
        if level is not None:
            estimate = replace(model.level_estimator.match(level), found=estimate.found)
        return predict([Item(model, frame, estimate, media_type, time.perf_counter())])[0]

    def answer_bytes(self, bundle: str | None, media_type: str, height: int, width: int) -> int:
        return 0

    async def predict_next(self, frame: VideoFrame, stream: str, bundle: str | None) -> Prediction:
        model, estimate = self.bundle.level_of_next(stream, frame.evidence)
        return predict([Item(model, frame, estimate, None, time.perf_counter())])[0]

    def count_line(self, bundle: str | None, level: str, status: int) -> None: ...

    def health(self) -> Health:
        return Health("ok", "cpu", {self.bundle.ref: self.bundle.health()})


def bundle_of(folder: Path) -> Bundle:
    copies = str(folder.with_name("copies"))
    config = ServeConfig(store=str(folder), bundles=("tiny:latest",), device="cpu", trust=TRUST, cache=copies)
    bundle = Bundle("tiny:latest", config)
    bundle.refresh()
    return bundle


@pytest.fixture(scope="module")
def port(release: Release, folder: Path) -> Iterator[int]:
    with serve(Direct(bundle_of(folder))) as port:
        yield port


def body_of(answer: Answer) -> Any:
    """The JSON of an answer, which must fit the documented schema."""
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    schema = json.loads(resources.files("gearnn_ray.service").joinpath("detections.schema.json").read_bytes())
    said = json.loads(answer.body)
    pytest.importorskip("jsonschema").Draft202012Validator(schema).validate(said)
    return said


def as_found(said: Any) -> Found:
    """The detections of an answer."""
    each = said["detections"]
    boxes = torch.tensor([d["bbox"] for d in each], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([d["category_id"] for d in each], dtype=torch.int64)
    return {"boxes": boxes.float(), "scores": torch.tensor([d["score"] for d in each]), "labels": labels}


FRAME = picture(0)


@pytest.mark.parametrize("level", ["clean", *LEVELS])
def test_json_has_the_detections_of_the_levels_network_score_by_score(port: int, release: Release, level: str) -> None:
    answer = ask(port, "POST", "/predict", png(FRAME), x_gearnn_level=level, x_gearnn_score="0")
    said, wanted = body_of(answer), alone(release, level, torch.from_numpy(FRAME.copy()).permute(2, 0, 1))
    assert same(as_found(said), wanted)
    scores = [each["score"] for each in said["detections"]]
    assert scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(scores, wanted["scores"].sort(descending=True).values, rtol=1e-4)
    assert [each["category"] for each in said["detections"]] == [NAMES[each["category_id"]] for each in said["detections"]]
    assert all("segmentation" not in each for each in said["detections"])
    # without a header, those that are worth it
    few = [each["score"] for each in body_of(ask(port, "POST", "/predict", png(FRAME), x_gearnn_level=level))["detections"]]
    assert few == [score for score in scores if score >= 0.05]
    assert 0 < len(few) < len(scores)


def test_json_says_of_the_frame_what_the_headers_say(port: int, release: Release) -> None:
    answer = ask(port, "POST", "/predict", jpeg(FRAME, 12))
    said = body_of(answer)
    assert said["image"] == {"width": SIZE[1], "height": SIZE[0]}
    assert (said["level"], said["found"]) == ("jpeg-10", "jpeg-12")
    for name in ("level", "found", "release"):
        assert said[name] == answer.headers[f"x-gearnn-{name}"]
    assert said["distance"] == float(answer.headers["x-gearnn-distance"]) > 0
    assert said["release"] == f"tiny@{release.digest}"
    timing = dict(part.strip().split(";dur=") for part in answer.headers["server-timing"].split(","))
    assert list(timing) == ["decode", "queue", "network", "encode"]
    assert said["milliseconds"] == {name: float(timing[name]) for name in ("decode", "queue", "network")}


def test_a_line_of_a_segment_has_the_detections_of_its_frame(port: int) -> None:
    segment = encoded(moving(3, *SIZE), "libvpx-vp9", "webm", crf=4)
    lines = lines_of(ask(port, "POST", "/streams/camera/segments", segment, x_gearnn_score="0"))
    few = lines_of(ask(port, "POST", "/streams/camera/segments", segment))
    for number, frame in enumerate(segment_frames(segment, DEFAULT_LIMITS, 10)):
        whole = body_of(ask(port, "POST", "/predict", png(frame.pixels), x_gearnn_score="0"))
        assert lines[number]["detections"] == whole["detections"]
        assert few[number]["detections"] == [each for each in whole["detections"] if each["score"] >= 0.05]


def test_a_picture_shows_the_detections_above_a_score(port: int) -> None:
    shown = {}
    for score in (None, "0", "0.3", "1.0"):
        headers = {} if score is None else {"x_gearnn_score": score}
        answer = ask(port, "POST", "/predict", png(FRAME), accept="image/png", **headers)
        assert (answer.status, answer.headers["content-type"], answer.headers["x-gearnn-level"]) == (200, "image/png", "clean")
        image = Image.open(io.BytesIO(answer.body))
        assert image.mode == "RGB"
        shown[score] = np.asarray(image)
        assert shown[score].shape == FRAME.shape
    assert np.array_equal(shown["1.0"], FRAME)
    assert np.array_equal(shown[None], shown["0.3"])
    assert 0 < (shown[None] != FRAME).mean() < (shown["0"] != FRAME).mean()


def test_masks_are_in_the_json_and_in_the_picture(tmp_path: Path) -> None:
    release = publish(tmp_path, f"{__name__}:listed")
    wanted = alone(release, "jpeg-10", torch.from_numpy(FRAME.copy()).permute(2, 0, 1))
    order = wanted["scores"].argsort(descending=True, stable=True)
    with serve(Direct(bundle_of(tmp_path))) as port:
        said = body_of(ask(port, "POST", "/predict", png(FRAME), x_gearnn_level="jpeg-10", x_gearnn_score="0"))
        drawn = ask(port, "POST", "/predict", png(FRAME), x_gearnn_level="jpeg-10", accept="image/png", x_gearnn_score="0")
    masks = np.stack([coco_masks.decode(each["segmentation"]) for each in said["detections"]])
    assert len(masks) > 3
    assert {tuple(each["segmentation"]["size"]) for each in said["detections"]} == {SIZE}
    # the boxes of a mixed batch differ from those of a single image by rounding, which moves a mask's edge by a pixel
    assert (masks != wanted["masks"][order, 0].numpy()).mean() < 0.01
    painted = (np.asarray(Image.open(io.BytesIO(drawn.body))) != FRAME).any(2)
    assert painted[masks.any(0) > 0].mean() > 0.95


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("application/json;q=0.5, image/png", "image/png"),
        ("application/json, image/png;q=0.9", "application/json"),
        ("application/x-npy", None),
        ("text/html", None),
    ],
)
def test_the_answer_has_the_accepted_type(port: int, accept: str, expected: str | None) -> None:
    answer = ask(port, "POST", "/predict", png(FRAME), accept=accept)
    if expected is None:
        assert problem(answer) == (406, f"The accept header is {accept}: expected application/json or image/png.")
    else:
        assert (answer.status, answer.headers["content-type"]) == (200, expected)


@pytest.mark.parametrize("score", ["", "high", "1.5", "-0.1", "nan", "1e-3", "0.3; 0.4"])
def test_a_score_is_a_number_from_0_to_1(port: int, score: str) -> None:
    status, sentence = problem(ask(port, "POST", "/predict", png(FRAME), x_gearnn_score=score))
    assert status == 400
    assert "expected a number from 0 to 1" in sentence


def test_health_names_the_task(port: int) -> None:
    bundle = json.loads(ask(port, "GET", "/health").body)["bundles"]["tiny:latest"]
    assert (bundle["task"], bundle["class_names"], bundle["levels"]) == ("detection", [*NAMES], ["clean", *LEVELS])


def test_classes_without_names_and_a_frame_without_detections() -> None:
    content = {name: np.zeros(shape, kind) for name, shape, kind in (
        ("boxes", (1, 4), np.float32), ("scores", (1,), np.float32), ("labels", (1,), np.int64))}  # fmt: skip
    served = Served(FRAME, (), {}, 0.0)
    assert json.loads(DETECTION.encode(content, "application/json", served))["detections"] == [
        {"category_id": 0, "category": "class 0", "bbox": [0.0] * 4, "score": 0.0}
    ]
    assert json.loads(DETECTION.encode(content, "application/json", Served(FRAME, (), {})))["detections"] == []
    empty = {name: part[:0] for name, part in content.items()} | {"masks": np.zeros((0, *SIZE), np.bool_)}
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(DETECTION.encode(empty, "image/png", served)))), FRAME)
    many = {name: np.repeat(part, 150, 0) for name, part in content.items()}
    assert len(json.loads(DETECTION.encode(many, "application/json", served))["detections"]) == 100


# ---- exported files


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_graph_gives_named_tensors_of_fixed_shape(release: Release, tmp_path: Path, suffix: str) -> None:
    path = export_level(release, "jpeg-10", tmp_path / f"level{suffix}")
    names = ["boxes", "scores", "labels"]
    if suffix == ".pt2":
        run = torch.export.load(path).module()
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [each.name for each in session.get_outputs()] == names

        def run(images: Tensor) -> dict[str, Tensor]:
            return dict(zip(names, map(torch.from_numpy, session.run(names, {"images": images.numpy()})), strict=True))

    network = network_of(release, "jpeg-10")
    for batch in (1, 3):
        images = torch.randn(batch, 3, *SIZE)
        with torch.no_grad():
            found, wanted = run(images), network(images)
        assert [*found] == names
        assert {name: (part.shape, part.dtype) for name, part in found.items()} == {
            name: (part.shape, part.dtype) for name, part in wanted.items()
        }
        torch.testing.assert_close(found["scores"], wanted["scores"], rtol=1e-4, atol=1e-4)
        for a, b in zip(DETECTION.outputs(found), DETECTION.outputs(wanted), strict=True):
            assert same(a, b)
        assert not torch.allclose(found["scores"], network_of(release, "clean")(images)["scores"], rtol=1e-2)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_network_that_returns_a_list_is_written_as_a_state_dict_only(tmp_path: Path, suffix: str) -> None:
    release = publish(tmp_path / "store", f"{__name__}:listed")
    with pytest.raises(UserError, match=r"returns a list .* use \.safetensors") as caught:
        export_level(release, "jpeg-10", tmp_path / f"level{suffix}", trust=TRUST)
    assert "\n" not in str(caught.value)
    assert export_level(release, "jpeg-10", tmp_path / "level.safetensors").exists()
