"""torchvision's detectors against torchvision itself: the same losses, names and detections, in any mode."""

import copy
import pickle
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import FrozenBatchNorm2d

from gearnn_ray.adaptors.bn_folding import foldable
from gearnn_ray.config.catalogue import TORCHVISION_DETECTORS
from gearnn_ray.core.errors import UserError
from gearnn_ray.models import torchvision_detectors
from gearnn_ray.models.detector import Found, Target, Terms, collected_candidates
from gearnn_ray.models.layers import alternatives_of, layers_of, set_trainable
from gearnn_ray.models.registry import build_model
from gearnn_ray.models.torchvision_detectors import FixedBatchNorm2d, build, renamed_published
from gearnn_ray.tasks import task_by_name

K, H, W = 2, 64, 96
MASKS, BOXES, SMALLEST = "maskrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"
FAMILIES = (MASKS, BOXES, "retinanet_resnet50_fpn", "fcos_resnet50_fpn", SMALLEST)
OLD_NAMES = {MASKS: 26, BOXES: 10, "retinanet_resnet50_fpn": 28, "fcos_resnet50_fpn": 12, SMALLEST: 0}


@cache
def _built(name: str) -> Any:
    torch.manual_seed(0)
    sizes = {} if name == SMALLEST else {"min_size": H, "max_size": 2 * W}
    model: Any = build_model(name, K, sizes)
    if name in (MASKS, BOXES):  # few regions, because each costs as much as an image
        model.rpn._post_nms_top_n = {"training": 24, "testing": 24}
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 12
        model.roi_heads.detections_per_img = 4
    else:
        model.score_thresh, model.topk_candidates = 0.0, 8  # an untrained network is sure of nothing
    return model


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> Any:
    return _built(name).train()


def target(*boxes: Sequence[float]) -> Target:
    """Objects of classes 0, 1, 0, …, each with a mask that fills its box."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), H, W, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, corners.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    return {"boxes": corners, "labels": torch.arange(len(boxes)) % K, "masks": masks, "crowd": torch.zeros(0, 4)}


IMAGES = torch.randn(4, 3, H, W, generator=torch.Generator().manual_seed(0))
TARGETS = [
    target((4, 6, 60, 50), (40, 10, 90, 60)),
    target((10, 10, 50, 40)),
    target((0, 0, 33, 60), (50, 20, 95, 63), (8, 8, 40, 40)),
    target(),
]


def seeded(model: Any, *inputs: Any) -> Any:
    torch.manual_seed(7)
    return model(*inputs)


def quotients(terms: Terms) -> dict[str, Tensor]:
    return {name: total / count.clamp(min=1) for name, (total, count) in terms.items()}


def torchvisions(model: Any) -> Any:
    """A copy whose modules have torchvision's own classes."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if type(module).__module__ == torchvision_detectors.__name__:
            module.__class__ = type(module).__bases__[-1]
    for part in (plain.rpn, plain.roi_heads) if hasattr(plain, "rpn") else ():
        part.fg_bg_sampler.__class__ = BalancedPositiveNegativeSampler
    return plain


def torchvisions_losses(model: Any, targets: Sequence[Target]) -> dict[str, Tensor]:
    """What torchvision's own classes compute for as many images, with the same draws."""
    plain = torchvisions(model).train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    theirs = [{**each, "labels": each["labels"] + 1} for each in targets]
    losses: dict[str, Tensor] = seeded(plain, list(IMAGES[: len(targets)]), theirs)
    return losses


def assert_same(a: Sequence[Found], b: Sequence[Found]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for part in one:
            torch.testing.assert_close(one[part], other[part])


# ── what is built ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", TORCHVISION_DETECTORS)
def test_names_and_shapes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        own = build(name, K).state_dict()
        theirs = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=K + 1).state_dict()
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in theirs.items()}


def test_sizes(model: Any) -> None:
    if isinstance(model, torchvision_detectors.SSD):
        with pytest.raises(UserError, match="scales every image to 320x320: leave out min_size and max_size"):
            build(SMALLEST, K, max_size=640)
    else:
        assert (model.transform.min_size, model.transform.max_size) == ((H,), 2 * W)
    x_BCHW = torch.full((1, 3, H, W), 0.7)
    assert torch.equal(model.transform.normalize(x_BCHW[0]), x_BCHW[0])  # the package normalises


def test_coco_has_the_published_outputs() -> None:
    model: Any = build(SMALLEST, 80)
    ids = detection.FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    named = [label for label, category in enumerate(ids) if category not in ("__background__", "N/A")]
    assert model.their_labels.tolist() == named
    assert model.our_labels[model.their_labels].tolist() == list(range(80))
    assert (model.our_labels >= 0).sum() == 80
    assert model.state_dict()["head.classification_head.module_list.0.1.bias"].numel() % 91 == 0
    # the highest score for an id that is not in use, and the next for the last class
    for head in model.head.classification_head.module_list:
        nn.init.zeros_(head[1].weight)
        bias = nn.init.zeros_(head[1].bias).detach().view(-1, 91)
        bias[:, 12], bias[:, 90] = 9.0, 8.0
    model.score_thresh = 0.2
    with torch.no_grad():
        (found,) = model(IMAGES[:1])
    assert len(found["labels"]) == len(found["boxes"]) == len(found["scores"]) > 0
    assert set(found["labels"].tolist()) == {79}


# ── detections ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_detections_in_any_mode(name: str, model: Any) -> None:
    with torch.no_grad():
        found = model(IMAGES[:2])
        assert model.training
        plain = torchvisions(model).eval()(list(IMAGES[:2]))
        # RetinaNet and FCOS have an output for the background, too, which no training asks for
        plain = [{part: tensor[each["labels"] > 0] for part, tensor in each.items()} for each in plain]
        assert_same(found, [{**each, "labels": each["labels"] - 1} for each in plain])
        if name in (MASKS, SMALLEST):
            assert_same(model.eval()(list(IMAGES[:2])), found)
            assert not model.training
    for each in found:
        D = len(each["boxes"])
        assert D > 0
        assert each["boxes"].shape == (D, 4)
        assert each["scores"].shape == each["labels"].shape == (D,)
        assert each["scores"].dtype == torch.float32
        assert 0 <= each["labels"].min() <= each["labels"].max() < K
        assert (each["boxes"] <= torch.tensor([W, H, W, H]) + 1e-3).all()  # of the image, not of the network's input
        if name == MASKS:
            assert each["masks"].shape == (D, 1, H, W)


def test_images_of_different_sizes() -> None:
    model = _built(BOXES)
    with torch.no_grad():
        found = model([IMAGES[0], IMAGES[1][:, :50, :70]])
    assert (found[1]["boxes"] <= torch.tensor([70, 50, 70, 50]) + 1e-3).all()
    assert task_by_name("detection").outputs(found)[0]["boxes"].shape[1] == 4


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_losses_are_torchvisions_in_any_mode(name: str, model: Any) -> None:
    terms = seeded(model.eval(), IMAGES, TARGETS)
    assert not model.rpn.training if hasattr(model, "rpn") else not model.training
    for total, count in terms.values():
        assert total.requires_grad
        assert not count.requires_grad
        assert count > 0
    expected, found = torchvisions_losses(model, TARGETS), quotients(terms)
    assert found.keys() == expected.keys()
    for part in expected:
        torch.testing.assert_close(found[part], expected[part])
    again = seeded(model.train(), list(IMAGES), TARGETS)
    assert model.training
    torch.testing.assert_close(quotients(again), found)


def test_halves_of_a_batch_add_up(name: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (model.rpn, model.roi_heads) if name in (MASKS, BOXES) else ():  # draw everything there is
        monkeypatch.setattr(part.fg_bg_sampler, "batch_size_per_image", 1_000_000)
        monkeypatch.setattr(part.fg_bg_sampler, "positive_fraction", 0.5)
    with torch.no_grad():
        whole, first, second = (model(IMAGES[part], TARGETS[part]) for part in (slice(4), slice(3), slice(3, 4)))
    for term, (total, count) in whole.items():
        assert first[term][1] + second[term][1] == count
        torch.testing.assert_close(first[term][0] + second[term][0], total, rtol=1e-4, atol=1e-4)


def test_images_without_objects(model: Any) -> None:
    found = quotients(seeded(model, IMAGES[:2], [target(), target()]))
    for part, expected in torchvisions_losses(model, [target(), target()]).items():
        torch.testing.assert_close(found[part], expected, rtol=1e-5, atol=0)  # FCOS has only a thousandth left
    torch.stack(list(found.values())).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_modes_come_back_after_an_error(model: Any) -> None:
    model.eval()
    with pytest.raises(AssertionError):
        model(IMAGES[:1], [{**TARGETS[0], "boxes": torch.zeros(1, 5)}])
    assert not any(module.training for module in model.modules())


def test_masks_are_needed() -> None:
    boxes = {part: tensor for part, tensor in TARGETS[0].items() if part != "masks"}
    with pytest.raises(UserError, match="give a data set with masks"):
        _built(MASKS)(IMAGES[:1], [boxes])
    assert "loss_mask" not in _built(BOXES)(IMAGES[:1], [boxes])


@pytest.mark.parametrize("name", [BOXES, SMALLEST])
def test_answers_and_losses_are_float32_under_autocast(name: str, model: Any) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, terms = model(IMAGES[:1])[0], model(IMAGES[:1], TARGETS[:1])
    assert {part.dtype for key, part in found.items() if key != "labels"} == {torch.float32}
    assert {total.dtype for total, _ in terms.values()} == {torch.float32}
    # coordinates have more digits than bfloat16
    assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float())


def test_other_heads_are_float32_under_autocast() -> None:
    x_BCHW = torch.randn(1, 256, 2, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        heads = [_built(name).head([x_BCHW]) for name in ("retinanet_resnet50_fpn", "fcos_resnet50_fpn")]
        heads.append({"masks": _built(MASKS).roi_heads.mask_predictor(x_BCHW)})
    assert {tensor.dtype for outputs in heads for tensor in outputs.values()} == {torch.float32}


# ── copies, and normalisations ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [BOXES, SMALLEST])
def test_copies_compute_the_same(name: str, model: Any) -> None:
    with torch.no_grad():
        model(IMAGES[:1], TARGETS[:1])
        found = model(IMAGES[:1])
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(copied) is type(model)
            assert_same(copied(IMAGES[:1]), found)


def test_running_statistics_do_not_move() -> None:
    model = build(BOXES, K, H, W)
    norms = {path: module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name or "tracked" in name}
    trainable = dict(set_trainable(model, None))
    loss = torch.stack(list(quotients(model(IMAGES[:2], TARGETS[:2])).values())).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert norms
    for path, norm in norms.items():
        assert type(norm) is FixedBatchNorm2d
        assert not norm.training
        assert trainable[f"{path}.weight"].grad is not None
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_normalisations_are_known_as_such(model: Any) -> None:
    norms = {path: module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {each.weight: each.eps for each in foldable(model).values()} == {f"{p}.weight": m.eps for p, m in norms.items()}
    kinds = {layer.name: layer.kind for layer in layers_of(model)}
    assert all(kinds[f"{path}.running_stats"] == "norm_statistics" for path in norms)
    pairs = [group for group in alternatives_of(model, "module") if len(group) == 2]
    assert len(pairs) == len(norms)  # every normalisation belongs to a convolution


# ── published files ──────────────────────────────────────────────────────────────────────────────────────────────────


def _old(name: str) -> str:
    """The name of a tensor before torchvision 0.13."""
    name = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.0\.(weight|bias)$", r"\1.\2", name)
    name = re.sub(r"^rpn\.head\.conv\.0\.0\.", "rpn.head.conv.", name)
    name = re.sub(r"mask_head\.(\d)\.0\.", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}.", name)
    return re.sub(r"(_head\.conv)\.(\d)\.0\.(weight|bias)$", lambda match: f"{match[1]}.{2 * int(match[2])}.{match[3]}", name)


def old_state(model: nn.Module) -> dict[str, Tensor]:
    is_retinanet = isinstance(model, torchvision_detectors.RetinaNet)
    return {_old(n) if is_retinanet or "_head.conv." not in n else n: t for n, t in model.state_dict().items()}


def test_old_names(name: str, model: Any) -> None:
    state, old = model.state_dict(), old_state(model)
    assert len(old.keys() - state.keys()) == OLD_NAMES[name]
    copy.deepcopy(torchvisions(model)).load_state_dict(dict(old), strict=True)  # torchvision knows them, too
    renamed = renamed_published(model, old)
    assert renamed.keys() == state.keys()
    assert all(torch.equal(renamed[n], state[n]) for n in state)
    assert old.keys() == old_state(model).keys()
    assert renamed_published(model, state) == state
    assert renamed_published(model, {**state, "more": torch.zeros(1)}).keys() == {*state, "more"}


def test_a_tensor_under_both_names() -> None:
    model = _built(BOXES)
    both = {**model.state_dict(), "rpn.head.conv.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"hold 'rpn\.head\.conv\.0\.0\.weight' twice"):
        renamed_published(model, both)


def _with_frozen_norms(model: Any, eps: float, state: Mapping[str, Tensor]) -> Any:
    """torchvision's own network with these weights, as its builder makes it for a published file."""
    plain = torchvisions(model)
    for path, module in list(plain.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, leaf = path.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, FrozenBatchNorm2d(module.num_features, eps))
    plain.load_state_dict(dict(state), strict=True)
    return plain.eval()


@pytest.mark.parametrize(("name", "eps"), [(MASKS, 0.0), ("retinanet_resnet50_fpn", 0.0), (BOXES, 1e-5)])
def test_published_files_compute_as_with_torchvision(name: str, eps: float, model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    published = {n: t.clone() for n, t in old_state(model).items() if not n.endswith("num_batches_tracked")}
    for n, tensor in published.items():
        if n.endswith("running_var"):  # some variances are far below eps
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            tensor[0] = 1e-7
            published[n.replace("running_var", "weight")][0] = 1e-4
    theirs = _with_frozen_norms(model, eps, published)
    ours = copy.deepcopy(model)
    missing, extra = ours.load_state_dict(renamed_published(model, published), strict=False)
    assert not extra
    assert all(n.endswith("num_batches_tracked") for n in missing)
    with torch.no_grad():
        expected, found = theirs.backbone(IMAGES[:1]), ours.backbone(IMAGES[:1])
    for part in expected:
        torch.testing.assert_close(found[part], expected[part], rtol=1e-3, atol=1e-3)
    # weights saved by this package have today's names, and are not changed a second time
    saved = {n: t for n, t in ours.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert all(torch.equal(t, saved[n]) for n, t in renamed_published(ours, saved).items())


def test_candidates_are_the_scores_before_the_threshold(model: Any) -> None:
    """Of every place and class, in our labels, and with a gradient to the pixels."""
    x = IMAGES[:2].clone().requires_grad_()
    with collected_candidates() as collected:
        found = model(x)
    (candidates,) = (each.reshape(-1, K) for each in collected)
    assert len(candidates) > sum(len(each["labels"]) for each in found)
    for each in found:
        for score, label in zip(each["scores"], each["labels"], strict=True):
            assert (candidates[:, label] - score).abs().min() < 1e-6
    (gradient,) = torch.autograd.grad(candidates.sum(), x)
    assert all(gradient.abs().sum((1, 2, 3)) > 0)
