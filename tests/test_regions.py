"""torchvision's detectors with every image of a batch at its own level; in R-CNNs, every region at the level of its image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearnn_ray import AdaptiveModel, Release, Store, UserError
from gearnn_ray.models.layers import layers_of, network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.serving.regions import has_regions
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import Batch
from gearnn_ray.training.batch_norm import reestimate_statistics
from gearnn_ray.training.predict import Normalisation
from tests.manifests import CLEAN, RGB, level_entry, manifest_of

LEVELS = ("jpeg-10", "brightness-0.2")
MIXED = ["brightness-0.2", "clean", "jpeg-10", "brightness-0.2"]
CLASSES, SIZE = 2, (64, 80)
TASK = task_by_name("detection")


def changed(layer: str, kind: str) -> bool:
    """Norms, and what follows regions: linear layers and convolutions."""
    return kind in ("norm_weight", "norm_bias") or any(
        part in layer for part in ("predictor", "fc7", "mask_head.1", "cls_logits")
    )


def publish(folder: Path, name: str, arguments: Mapping[str, int]) -> Release:
    torch.manual_seed(0)
    model = build_model(name, CLASSES, arguments)
    with torch.no_grad():  # fresh classifiers are indifferent, and their order of scores would be one of rounding errors
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and any(
                part in path for part in ("cls_score", "cls_logits", "mask_fcn_logits")
            ):
                module.weight.normal_(0, 0.3 if "cls_logits" in path else 0.03)
    images = torch.randint(0, 255, (2, 3, *SIZE), dtype=torch.uint8)
    # with fresh statistics, the signals of deep networks would grow beyond all bounds
    reestimate_statistics(model, [Batch(images, None)], Normalisation(*map(tuple, RGB.values())), "float32")
    moved = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert moved
    assert all(
        norm.running_mean.abs().max() > 0 and not norm.training for norm in moved
    )  # also norms that `train()` does not reach
    state, store = network_state(model), Store(folder)
    levels: dict[str, Any] = {"clean": CLEAN}
    names = [tensor for layer in layers_of(model) if changed(layer.name, layer.kind) for tensor in layer.tensors]
    for seed, level in enumerate(LEVELS, 1):
        torch.manual_seed(seed)
        adaptor = {n: state[n] * (1 + 0.1 * torch.rand_like(state[n])) + 0.02 * torch.randn_like(state[n]) for n in names}
        blob = store.put_state(adaptor)
        levels[level] = level_entry(blob, sum(t.numel() for t in adaptor.values()), sorted(adaptor))
    reference = {"height": SIZE[0], "width": SIZE[1], "luma": 100.0, "luma_spread": 0.3}
    manifest = manifest_of(
        "regions", name, CLASSES, store.put_state(state), levels, reference, task="detection", arguments=dict(arguments)
    )
    store.publish(manifest, {})
    return store.pull("regions")


def alone(release: Release, level: str, image: Tensor) -> dict[str, Tensor]:
    """What the level's plain network finds in one image."""
    model = release.content.model
    network = build_model(model.name, model.num_classes, model.arguments).eval()
    adaptor = {} if level == "clean" else release.adaptor_state(level)
    network.load_state_dict({**release.base_state(), **adaptor}, strict=False)
    with torch.no_grad():
        found: dict[str, Tensor] = TASK.outputs(network(Normalisation(*map(tuple, RGB.values()))(image[None])))[0]
    return found


R50 = [
    pytest.param(name, {"min_size": 64}, id=name, marks=pytest.mark.slow)
    for name in ("fcos_resnet50_fpn", "retinanet_resnet50_fpn")
]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("light_maskrcnn", {"min_size": 64}, id="light_maskrcnn"),
        pytest.param("ssdlite320_mobilenet_v3_large", {}, id="ssdlite"),
        *R50,
        pytest.param("maskrcnn_resnet50_fpn", {"min_size": 64}, id="maskrcnn", marks=pytest.mark.slow),
    ],
)
def test_a_mixed_batch_equals_each_image_through_its_own_network(name: str, arguments: dict[str, int], tmp_path: Path) -> None:
    release = publish(tmp_path, name, arguments)
    model = AdaptiveModel(release)
    methods = model.methods()
    assert "" not in methods  # not the whole network once per level
    images = torch.randint(0, 255, (4, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    wanted = [alone(release, level, image) for level, image in zip(MIXED, images, strict=True)]
    assert all(len(each["scores"]) for each in wanted)
    mixed = model(images, levels=MIXED)
    assert TASK.close(mixed, wanted)
    assert not TASK.close(model(images, levels=["clean", "jpeg-10", "clean", "jpeg-10"]), wanted)
    for found, expected in zip(mixed, wanted, strict=True):
        assert found.keys() == expected.keys()
        if "masks" in found and len(found["scores"]) == len(expected["scores"]):
            assert (found["masks"] == expected["masks"]).float().mean() > 0.999
    model.set_level("jpeg-10")
    assert TASK.close(model(images[:2]), [alone(release, "jpeg-10", image) for image in images[:2]])
    twin = model.share()
    assert TASK.close(twin(images, levels=MIXED), wanted)
    assert TASK.close(model(images[:1]), [alone(release, "jpeg-10", images[0])])


def test_images_without_regions_are_answered(tmp_path: Path) -> None:
    release = publish(tmp_path, "light_maskrcnn", {"min_size": 64})
    model = AdaptiveModel(release)
    heads = [module for module in model.modules() if hasattr(module, "score_thresh")]
    assert heads
    for head in heads:
        head.score_thresh = 1.0  # type: ignore[assignment]
    images = torch.zeros(2, 3, *SIZE, dtype=torch.uint8)
    for found in (*model(images, levels=list(LEVELS)), *model(images, levels=["clean", "clean"])):
        assert len(found["scores"]) == 0
        assert found["masks"].shape == (0, *SIZE)


@pytest.mark.parametrize("untrained", ["interpolate", "entropy"])
def test_levels_of_regions_cannot_be_mixed(untrained: Any, tmp_path: Path) -> None:
    release = publish(tmp_path, "light_maskrcnn", {"min_size": 64})
    assert has_regions(build_model("light_maskrcnn", CLASSES))
    with pytest.raises(UserError, match="sees regions of its images, which cannot mix two levels: use untrained='nearest'"):
        AdaptiveModel(release, untrained=untrained)
