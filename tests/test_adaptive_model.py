"""Every sample of a mixed batch gets what its own level's network gives, whatever the network is made of."""

import threading
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from gearnn_ray import AdaptiveModel, Release, UserError
from gearnn_ray.models.layers import network_state
from gearnn_ray.models.registry import build_model
from gearnn_ray.serving.level_estimation import LevelEstimate
from gearnn_ray.training.predict import Normalisation
from tests.conftest import NORMALISATION
from tests.manifests import in_no_store
from tests.nets import TRUST

CLASSES = 4
SIZE = (32, 48)
LEVELS = ("jpeg-10", "jpeg-30", "jpeg-50", "brightness-0.4")


def release_of(network: str, share: float = 0.7) -> Release:
    """Levels that each change about a `share` of the tensors, every one of them changed by some level."""
    torch.manual_seed(1)
    model = build_model(network, CLASSES)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and "running" in name:
            tensor.normal_(std=0.2)
    base = network_state(model)
    first: dict[int, str] = {}  # tensors that have several names have the same values under each
    names = {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}
    adaptors: dict[str, dict[str, Tensor]] = {"clean": {}}
    for number, level in enumerate(LEVELS):
        adaptors[level] = {
            name: tensor + 0.3 * torch.rand_like(tensor)
            for index, (name, tensor) in enumerate(base.items())
            if tensor.is_floating_point() and (torch.rand(()) < share or index % len(LEVELS) == number)
        }
        for name, of in names.items():
            if of in adaptors[level]:
                adaptors[level][name] = adaptors[level][of]
            else:
                adaptors[level].pop(name, None)
    reference = {"height": SIZE[0], "width": SIZE[1], "luma": 110.0, "luma_spread": 0.2}
    manifest = in_no_store(network, CLASSES, adaptors, reference=reference, normalisation=asdict(NORMALISATION))
    return Release(manifest, "sha256:" + "1" * 64, base, adaptors)


def network_of(release: Release, state: dict[str, Tensor]) -> nn.Module:
    network = build_model(release.content.model.name, CLASSES).eval().requires_grad_(False)
    network.load_state_dict(state, strict=False)
    return network


def state_of(release: Release, level: str) -> dict[str, Tensor]:
    return {**release.base_state(), **release.adaptor_state(level)}


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


NETWORKS = ("tests.nets:small", "tests.zoo:zoo", "torchvision.models.segmentation:lraspp_mobilenet_v3_large")


@pytest.fixture(scope="module", params=NETWORKS)
def release(request: pytest.FixtureRequest) -> Release:
    return release_of(request.param)


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 256, (7, 3, *SIZE), dtype=torch.uint8)


@pytest.fixture(scope="module")
def model(release: Release) -> AdaptiveModel:
    return AdaptiveModel(release, trust=TRUST)


def wanted(release: Release, images: Tensor, levels: list[str]) -> Tensor:
    """Each image alone through its own level's network."""
    x = NORMALISATION(images)
    with torch.no_grad():
        outputs = [network_of(release, state_of(release, level))(x[[i]]) for i, level in enumerate(levels)]
    outputs = [output["out"] if isinstance(output, dict) else output for output in outputs]
    return torch.cat([nn.functional.interpolate(o, size=SIZE, mode="bilinear") for o in outputs])


MIXED = ["jpeg-10", "clean", "brightness-0.4", "jpeg-50", "jpeg-10", "jpeg-30", "clean"]


def test_a_mixed_batch_equals_each_image_through_its_own_network(release: Release, model: AdaptiveModel, images: Tensor) -> None:
    want = wanted(release, images, MIXED)
    got = model(images, levels=MIXED)
    assert got.dtype == torch.float32
    assert got.shape == want.shape == (7, CLASSES, *SIZE)
    assert far(got, want) < 1e-5
    # the levels do differ: another order of them is another answer
    assert far(model(images, levels=MIXED[::-1]), want) > 1e-2


def test_the_same_without_the_host_knowing_the_levels(release: Release, model: AdaptiveModel, images: Tensor) -> None:
    """The graph that a compiler sees."""
    numbers = torch.tensor([model.levels.index(level) for level in MIXED])
    model._selection.set_index(numbers)
    with torch.no_grad():
        assert far(model._outputs(model._predictor, images), wanted(release, images, MIXED)) < 1e-5


@pytest.mark.parametrize(
    "network",
    ["encoder", "asks_for_features", "standardised", "twice", "adds_constant", "hooked", "tied_names", "windows", "dispatches"],
)
def test_networks_that_use_their_modules_in_ways_of_their_own(network: str, images: Tensor) -> None:
    """Each has misled a version of this: what a dry run cannot see is compared with the plain network at load."""
    for share in (0.7, 0.0):
        release = release_of(f"tests.zoo:{network}", share)
        model = AdaptiveModel(release, trust=TRUST)
        assert far(model(images, levels=MIXED), wanted(release, images, MIXED)) < 1e-5
        for level in model.levels:
            model.set_level(level)
            assert far(model(images), wanted(release, images, [level] * 7)) < 1e-5
        tensors = [*release.base_state().values(), *(t for q in LEVELS for t in release.adaptor_state(q).values())]
        assert model.weight_bytes <= sum(tensor.nbytes for tensor in tensors)  # tied tensors are held once


def test_frames_that_are_folded_into_the_batch_are_refused_not_mixed_up() -> None:
    release = release_of("tests.zoo:windows", 0.0)
    model = AdaptiveModel(release, trust=TRUST)
    large = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    refused = ""
    try:
        got = model(large, levels=["jpeg-10", "jpeg-50"])
    except UserError as error:
        refused = str(error)
    if refused:
        assert "folds" in refused
    else:
        want = [network_of(release, state_of(release, q))(NORMALISATION(large[[i]])) for i, q in enumerate(LEVELS[:3:2])]
        want = [nn.functional.interpolate(each, size=(96, 96), mode="bilinear") for each in want]
        assert far(got, torch.cat(want)) < 1e-5
    # one level for all of them is what it always was
    model.set_level("jpeg-10")
    want = network_of(release, state_of(release, "jpeg-10"))(NORMALISATION(large))
    assert far(model(large), nn.functional.interpolate(want, size=(96, 96), mode="bilinear")) < 1e-5


def test_one_level_for_all_is_its_network_bit_for_bit(release: Release, model: AdaptiveModel, images: Tensor) -> None:
    x = NORMALISATION(images)
    for level in model.levels:
        model.set_level(level)
        with torch.no_grad():
            want = network_of(release, state_of(release, level))(x)
        want = want["out"] if isinstance(want, dict) else want
        want = nn.functional.interpolate(want, size=SIZE, mode="bilinear") if want.shape[-2:] != SIZE else want
        # torchvision's frozen batch normalisation rounds otherwise than torch's kernel, which serves it here
        assert torch.equal(model(images), want) or (
            release.content.model.name == "tests.zoo:zoo" and far(model(images), want) < 1e-6
        )
    model.set_level(None)


def test_it_holds_the_base_and_the_adaptors_to_the_byte(release: Release, model: AdaptiveModel) -> None:
    tensors = [*release.base_state().values(), *(t for q in LEVELS for t in release.adaptor_state(q).values())]
    assert model.weight_bytes == sum(tensor.nbytes for tensor in tensors)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    indices = sum(t.nbytes for t in model._selection.buffers())
    assert sum(held.values()) == model.weight_bytes + indices
    assert indices < 64 * 8 * 200


def test_shared_models_hold_one_copy_and_a_level_each(release: Release, model: AdaptiveModel, images: Tensor) -> None:
    other = model.share()
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for each in (model, other)
        for t in [*each._network.parameters(), *each._network.buffers()]
    }
    indices = 2 * sum(t.nbytes for t in model._selection.buffers())
    assert sum(held.values()) == model.weight_bytes + indices
    model.set_level("jpeg-10")
    other.set_level("brightness-0.4")
    assert far(model(images), wanted(release, images, ["jpeg-10"] * 7)) < 1e-5
    assert far(other(images), wanted(release, images, ["brightness-0.4"] * 7)) < 1e-5
    model.set_level(None)


def test_threads_do_not_disturb_each_other(release: Release, model: AdaptiveModel, images: Tensor) -> None:
    wants = {level: wanted(release, images, [level] * 7) for level in LEVELS}
    wrong: list[str] = []

    def run(level: str) -> None:
        for _ in range(3):
            if far(model(images, levels=[level] * 7), wants[level]) > 1e-5:
                wrong.append(level)

    threads = [threading.Thread(target=run, args=(level,)) for level in LEVELS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_between_two_levels(release: Release, images: Tensor) -> None:
    model = AdaptiveModel(release, untrained="interpolate", trust=TRUST)
    base, low, high = (state_of(release, level) for level in ("clean", "jpeg-10", "jpeg-30"))
    state = {n: torch.lerp(low[n], high[n], 0.25) if t.is_floating_point() else t for n, t in base.items()}
    with torch.no_grad():
        want = network_of(release, state)(NORMALISATION(images))
    want = want["out"] if isinstance(want, dict) else want
    want = nn.functional.interpolate(want, size=SIZE, mode="bilinear")
    assert far(model(images, levels=["jpeg-15"] * 7), want) < 1e-5
    mixed = model(images, levels=["jpeg-15", *MIXED[1:]])
    assert far(mixed, torch.cat([want[:1], wanted(release, images, MIXED)[1:]])) < 1e-5
    assert far(model(images, levels=MIXED), wanted(release, images, MIXED)) < 1e-5


@pytest.mark.usefixtures("no_recompile")
@pytest.mark.parametrize("network", ["tests.nets:small", "tests.zoo:zoo"])
def test_one_graph_for_all_levels(network: str, images: Tensor) -> None:
    release = release_of(network)
    model = AdaptiveModel(release, trust=TRUST)
    model.compile(backend="aot_eager")
    few = images[:3]
    for levels in (MIXED[:3], MIXED[-3:], ["jpeg-10"] * 3, ["clean"] * 3):
        assert far(model(few, levels=levels), wanted(release, few, levels)) < 1e-5
    for level in model.levels:
        model.set_level(level)
        assert far(model(few), wanted(release, few, [level] * 3)) < 1e-5


@pytest.mark.usefixtures("no_recompile")
def test_the_whole_model_as_one_graph(images: Tensor) -> None:
    release = release_of("tests.nets:small")
    model = AdaptiveModel(release, trust=TRUST)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for levels in (MIXED, MIXED[::-1], ["jpeg-10"] * 7):
        numbers = torch.tensor([model.levels.index(level) for level in levels])
        assert far(compiled(images, numbers), wanted(release, images, levels)) < 1e-5


def test_the_level_of_each_frame_is_estimated(images: Tensor) -> None:
    release = release_of("tests.nets:small")
    model = AdaptiveModel(release, trust=TRUST)
    noise = torch.rand(2, 3, *SIZE) * 60
    frames = torch.stack([80 + noise[0], 0.4 * (80 + noise[1])]).to(torch.uint8)
    assert [estimate.level for estimate in model.estimate_levels(frames)] == ["clean", "brightness-0.4"]
    assert torch.equal(model(frames), model(frames, levels=["clean", "brightness-0.4"]))
    normalised = NORMALISATION(frames)
    assert torch.equal(model(normalised), model(frames))
    model.set_level("jpeg-10")
    assert torch.equal(model(frames), model(frames, levels=["jpeg-10"] * 2))
    # a given level comes first, and the one that was set stays
    assert far(model(frames, levels=["clean"] * 2), wanted(release, frames, ["clean"] * 2)) < 1e-5
    assert torch.equal(model(frames), model(frames, levels=["jpeg-10"] * 2))


def test_a_batch_larger_than_any_before(images: Tensor) -> None:
    release = release_of("tests.nets:small")
    model = AdaptiveModel(release, trust=TRUST)
    many = images[:1].expand(200, -1, -1, -1)
    model.set_level("jpeg-30")
    assert far(model(many), wanted(release, images[:1], ["jpeg-30"])) < 1e-5
    levels = [MIXED[i % 7] for i in range(500)]
    got = model(images[:1].expand(500, -1, -1, -1), levels=levels)
    assert far(got[-7:], wanted(release, images[:1].expand(7, -1, -1, -1), levels[-7:])) < 1e-5


def test_wrong_arguments_are_refused_in_one_sentence(images: Tensor) -> None:
    release = release_of("tests.nets:small")
    model = AdaptiveModel(release, trust=TRUST)
    seven = len(images)
    wrong: list[tuple[object, object]] = [
        (images[0], None),
        (images.int(), None),
        (images[:, :2], None),
        (images[:0], None),
        (images.numpy(), None),
        (images, ["clean"]),
        (images, "clean"),
        (images, ["no-level"] * seven),
        (images, ["h264-crf24"] * seven),
        (images, [1] * seven),
        (images, [LevelEstimate("jpeg-77")] * seven),
        (images, [LevelEstimate("jpeg-10", "jpeg-30", 0.5)] * seven),
        (images, torch.tensor([1])),
        (images, torch.full((seven,), 99)),
        (images, torch.full((seven,), -1)),
    ]
    model.set_level("jpeg-30")
    for given, levels in wrong:
        with pytest.raises(UserError) as error:
            model(given, levels)
        assert "\n" not in str(error.value)
    assert far(model(images), wanted(release, images, ["jpeg-30"] * seven)) < 1e-5  # as it was set before
    with pytest.raises(UserError, match="device="):
        model.to(torch.float64)
    with pytest.raises(UserError, match="jpeg-10"):
        model.set_level("jpeg-11")
    with pytest.raises(UserError, match="cannot be used here"):
        AdaptiveModel(release, device="cuda:77", trust=TRUST)
    other = in_no_store("tests.nets:small", CLASSES + 1, ["clean"])
    with pytest.raises(UserError, match="does not fit"):
        AdaptiveModel(Release(other, release.digest, release.base_state(), {"clean": {}}), trust=TRUST)


def test_levels_as_positions_do_not_change_the_level_that_was_set(images: Tensor) -> None:
    release = release_of("tests.nets:small")
    model = AdaptiveModel(release, trust=TRUST)
    model.set_level("jpeg-10")
    many = images[:1].expand(70, -1, -1, -1)
    assert far(model(many, levels=torch.full((70,), 3))[:1], wanted(release, images[:1], ["jpeg-50"])) < 1e-5
    assert far(model(images), wanted(release, images, ["jpeg-10"] * 7)) < 1e-5


def test_made_and_grown_in_inference_mode(images: Tensor) -> None:
    release = release_of("tests.nets:small")
    with torch.inference_mode():
        model = AdaptiveModel(release, trust=TRUST)
        model(images[:1].expand(70, -1, -1, -1), levels=["jpeg-10"] * 70)
    assert far(model(images, levels=MIXED), wanted(release, images, MIXED)) < 1e-5


def test_a_release_of_the_base_alone(images: Tensor) -> None:
    release = release_of("tests.nets:small")
    alone = Release(release.content, release.digest, release.base_state(), {"clean": {}})
    model = AdaptiveModel(alone, trust=TRUST).share()
    assert far(model(images), wanted(release, images, ["clean"] * 7)) < 1e-5


def test_loading_leaves_the_random_numbers_alone() -> None:
    release = release_of("tests.nets:small")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    AdaptiveModel(release, trust=TRUST)
    assert torch.equal(torch.rand(3), expected)


def test_normalisation_is_that_of_the_training(images: Tensor) -> None:
    model = AdaptiveModel(release_of("tests.nets:small"), trust=TRUST)
    normalise = Normalisation(NORMALISATION.mean, NORMALISATION.std)
    model.set_level("jpeg-10")
    assert torch.equal(model(images), model(normalise(images)))
