"""Mixtures by entropy: the share of two networks, its course over a stream, and the networks that are mixed."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gearnn_ray import AdaptiveModel, Release, UserError
from gearnn_ray.evaluation.entropy import MixedByEntropy
from gearnn_ray.models.detector import has_its_own_size
from gearnn_ray.models.registry import build_model
from gearnn_ray.serving import batch, mixing
from gearnn_ray.serving.batch import CompressedTable
from gearnn_ray.serving.level_estimation import LevelEstimate, LevelEstimator
from gearnn_ray.serving.mixing import STEPS, StreamShares, entropy_share, in_steps, smaller, uncertainties
from tests.conftest import NORMALISATION, SEGMENTATION
from tests.manifests import in_no_store
from tests.nets import TRUST
from tests.test_adaptive_model import MIXED, far, network_of, release_of, state_of
from tests.test_adaptive_stored import held, stored_variants

entropies = st.floats(0, 12)
shares = st.floats(0, 1)

# ── λ ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(entropies, entropies)
def test_the_share_is_that_of_the_paper_and_both_make_one(own: float, other: float) -> None:
    share = entropy_share(own, other)
    assert share == pytest.approx(math.exp(-other) / (math.exp(-own) + math.exp(-other)))
    assert share + entropy_share(other, own) == pytest.approx(1)
    assert (share > 0.5) <= (other < own)  # the more certain network has the larger part


@given(entropies, st.lists(entropies, min_size=2))
def test_a_more_certain_neighbour_never_has_a_smaller_share(own: float, others: list[float]) -> None:
    found = [entropy_share(own, other) for other in sorted(others)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("own", "other", "share"),
    [(0, 0, 0.5), (math.nan, 1, 0.5), (1, math.nan, 0.5), (math.inf, math.inf, 0.5), (1e6, 0, 1), (0, math.inf, 0)],
)
def test_a_share_is_a_number_whatever_networks_answer(own: float, other: float, share: float) -> None:
    assert entropy_share(own, other) == share


@given(shares)
def test_steps_are_near_and_below_one(share: float) -> None:
    step = in_steps(share)
    assert (step * STEPS).is_integer()
    assert 0 <= step < 1
    assert abs(step - share) <= 0.5 / STEPS or share > 1 - 0.5 / STEPS


# ── the copy ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_copy_has_half_the_sides_and_fits_the_same_strides(height: int, width: int) -> None:
    copy = smaller(torch.ones(1, 3, height, width))
    assert torch.allclose(copy, torch.ones(()))
    for side, full in zip(copy.shape[-2:], (height, width), strict=True):
        stride = math.gcd(full, 32)
        assert side % stride == 0
        assert full / 2 <= side < full / 2 + stride


def test_a_pixel_of_the_copy_is_the_mean_of_what_it_covers() -> None:
    x = torch.rand(2, 3, 64, 48)
    copy = smaller(x)
    assert copy.shape[-2:] == (32, 32)  # half of 48 would not be a multiple of 16
    assert torch.allclose(copy[..., 1, 2], x[..., 2:4, 3:5].mean((-1, -2)), atol=1e-6)


def test_a_network_of_one_size_sees_the_images_themselves() -> None:
    seen: list[tuple[int, ...]] = []

    def only_large(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[-2:]))
        if x.shape[-1] < 256:
            raise RuntimeError("the position embedding has another size")
        return x

    x = torch.randn(2, 3, 256, 256)
    found = uncertainties(SEGMENTATION, only_large, x, whole=False)
    assert found == [SEGMENTATION.uncertainty(each) for each in x]
    assert seen == [(128, 128), (256, 256)]
    assert uncertainties(SEGMENTATION, only_large, x, whole=True) == found
    assert seen[2:] == [(256, 256)]


# ── a stream ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def course(found: Sequence[float], stream: str | None = "a", pair: tuple[str, str] = ("jpeg-10", "jpeg-30")) -> list[float]:
    means = StreamShares()
    return [means.add(share, *pair, stream) for share in found]


@given(st.lists(shares, min_size=1))
def test_without_a_stream_each_frame_has_its_own_share(found: list[float]) -> None:
    assert course(found, None) == [in_steps(share) for share in found]


@given(shares, st.lists(st.floats(-0.02, 0.02), min_size=20, max_size=40))
def test_noise_moves_a_stream_by_two_steps_at_most(share: float, noise: list[float]) -> None:
    found = course([min(max(share + each, 0), 1) for each in noise])
    assert max(found) - min(found) <= 2 / STEPS


def test_a_lasting_change_is_followed() -> None:
    found = course([0.25] * 5 + [0.75] * 40)
    assert found[:5] == [0.25] * 5
    assert found[5:] == sorted(found[5:])
    assert 0.25 < found[5] < 0.35
    assert found[-1] == 0.75


@given(st.lists(st.tuples(st.floats(0.1, 0.9), st.booleans()), min_size=1))
def test_it_does_not_matter_which_of_the_two_is_the_level(frames: list[tuple[float, bool]]) -> None:
    """A frame that crosses the middle between both levels changes places with its neighbour."""
    means = StreamShares()
    levels = ("jpeg-10", "jpeg-30")
    found = []
    for share, swapped in frames:
        got = means.add(1 - share if swapped else share, *(levels[::-1] if swapped else levels), "a")
        found.append(1 - got if swapped else got)
    assert found == pytest.approx(course([share for share, _ in frames]), abs=1 / STEPS + 1e-9)


def test_streams_and_pairs_have_means_of_their_own_and_old_ones_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "_STREAMS", 2)
    means = StreamShares()
    assert means.add(0.25, "jpeg-10", "jpeg-30", "a") == 0.25
    assert means.add(0.75, "jpeg-10", "jpeg-30", "b") == 0.75
    assert means.add(0.25, "jpeg-10", "jpeg-30", "a") == 0.25
    assert means.add(0.5, "jpeg-30", "jpeg-50", "a") == 0.5  # drops stream b's
    assert means.add(0.25, "jpeg-10", "jpeg-30", "b") == 0.25
    assert len(means._means) == 2


# ── candidates ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_candidates_are_those_of_the_linear_mixture() -> None:
    linear, by_entropy = (LevelEstimator(["jpeg-10", "jpeg-30"], None, each) for each in ("interpolate", "entropy"))
    found = by_entropy.match("jpeg-15")
    assert (found.level, found.neighbour, found.weight) == ("jpeg-10", "jpeg-30", None)
    assert found.distance == linear.match("jpeg-15").distance
    assert by_entropy.match("jpeg-10") == linear.match("jpeg-10")  # a level of the release is no mixture
    assert by_entropy.match("jpeg-5") == linear.match("jpeg-5")  # nor is one beyond all others


# ── a model ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=["tests.nets:small", "torchvision.models.segmentation:lraspp_mobilenet_v3_large"])
def release(request: pytest.FixtureRequest) -> Release:
    return release_of(request.param)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def first(release: Release) -> AdaptiveModel:
    return AdaptiveModel(release, untrained="entropy", trust=TRUST)


@pytest.fixture
def model(first: AdaptiveModel) -> AdaptiveModel:
    """Has seen nothing yet."""
    return first.share()


def merged(release: Release, level: str, neighbour: str, share: float) -> dict[str, Tensor]:
    own, other = state_of(release, level), state_of(release, neighbour)
    return {n: torch.lerp(t, other[n], share) if t.is_floating_point() else t for n, t in own.items()}


def by_hand(release: Release, image: Tensor, level: str, neighbour: str) -> tuple[float, Tensor]:
    """The share in steps, and the answer of the plain network under the merged weights."""
    x = NORMALISATION(image[None])
    with torch.no_grad():
        own, other = (
            SEGMENTATION.uncertainty(SEGMENTATION.outputs(network_of(release, state_of(release, each))(smaller(x)))[0])
            for each in (level, neighbour)
        )
        share = in_steps(entropy_share(own, other))
        answer = SEGMENTATION.outputs(network_of(release, merged(release, level, neighbour, share))(x))
    return share, SEGMENTATION.at_frame_size(answer, *image.shape[-2:])[0]


BETWEEN = ["jpeg-15", "jpeg-45", "jpeg-15"]
PAIRS = [("jpeg-10", "jpeg-30"), ("jpeg-50", "jpeg-30"), ("jpeg-10", "jpeg-30")]


def test_every_image_has_its_own_mixture(release: Release, model: AdaptiveModel, images: Tensor) -> None:
    expected = [by_hand(release, image, *pair) for image, pair in zip(images, PAIRS, strict=True)]
    estimates = model.mixed(images, [model.level_estimator.match(level) for level in BETWEEN])
    assert [(e.level, e.neighbour) for e in estimates] == PAIRS
    assert [estimate.weight for estimate in estimates] == [share for share, _ in expected]
    for levels in (BETWEEN, estimates):
        answers = model(images, levels)
        assert all(far(answer, want) < 1e-5 for answer, (_, want) in zip(answers, expected, strict=True))
    # beside images of levels that the release has
    answers = model(images, ["jpeg-30", BETWEEN[1], "clean"])
    assert far(answers[1], expected[1][1]) < 1e-5
    assert far(answers[2:], model(images[2:], ["clean"])) < 1e-5


def test_one_mixture_for_all_is_the_plain_network_of_the_merged_weights_bit_for_bit(
    release: Release, model: AdaptiveModel, images: Tensor
) -> None:
    with torch.no_grad():
        raw = network_of(release, merged(release, "jpeg-10", "jpeg-30", 0.375))(NORMALISATION(images))
    want = SEGMENTATION.at_frame_size(SEGMENTATION.outputs(raw), *images.shape[-2:])
    assert torch.equal(model(images, [LevelEstimate("jpeg-10", "jpeg-30", 0.375)] * 3), want)


def test_both_networks_of_all_images_are_one_pass(model: AdaptiveModel, images: Tensor) -> None:
    sizes: list[tuple[int, ...]] = []
    model._network.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    model(images, BETWEEN)
    assert sizes == [(6, 3, 32, 64), (3, 3, 64, 96)]
    model(images, ["jpeg-10", "clean", "jpeg-30"])  # nothing lies between
    assert len(sizes) == 3


def test_a_stream_is_smoothed_and_a_twin_has_streams_of_its_own(images: Tensor) -> None:
    model = AdaptiveModel(release_of("tests.nets:small"), untrained="entropy", trust=TRUST)

    def share(of: AdaptiveModel, image: Tensor, stream: str | None) -> float:
        (found,) = of.mixed(image[None], [LevelEstimate("jpeg-10", "jpeg-30", None, stream=stream)])
        assert found.weight is not None
        return found.weight

    dark = images[0] // 8
    alone = [share(model, each, None) for each in (images[0], dark)]
    assert alone[0] != alone[1]
    assert share(model, images[0], "a") == alone[0]
    assert share(model, dark, "a") == pytest.approx(alone[0] + (alone[1] - alone[0]) / 8, abs=1.5 / STEPS)
    twin = model.share()
    assert share(twin, dark, "a") == alone[1]
    for _ in range(60):
        share(model, dark, "a")
    assert share(model, dark, "a") == pytest.approx(alone[1], abs=1 / STEPS)
    assert share(model, images[0], "b") == alone[0]


def test_wrong_estimates_are_refused(release: Release, model: AdaptiveModel, images: Tensor) -> None:
    unmixed = LevelEstimate("jpeg-10", "jpeg-30", None)
    for wrong in ([unmixed], [LevelEstimate("jpeg-10", "jpeg-31", None)] * 3):
        with pytest.raises(UserError):
            model.mixed(images, wrong)
    with pytest.raises(UserError, match="pull it with untrained='interpolate' or 'entropy'"):
        AdaptiveModel(release, trust=TRUST)(images, [unmixed] * 3)


def test_asking_changes_nothing_of_the_level_that_was_set(release: Release, model: AdaptiveModel, images: Tensor) -> None:
    model.set_level("jpeg-50")
    want = model(images)
    model.mixed(images, [model.level_estimator.match(level) for level in BETWEEN])
    assert torch.equal(model(images), want)
    model(images, BETWEEN)
    assert torch.equal(model(images), want)


@pytest.mark.usefixtures("no_recompile")
def test_a_compiled_network_answers_mixtures_with_its_one_graph(images: Tensor) -> None:
    release = release_of("tests.nets:small")
    model = AdaptiveModel(release, untrained="entropy", trust=TRUST)
    model.compile(backend="aot_eager")
    for levels in (BETWEEN, ["jpeg-15", "clean", "clean"]):
        answers = model(images, levels)
        assert far(answers[0], by_hand(release, images[0], "jpeg-10", "jpeg-30")[1]) < 1e-5
    assert not model._selection.kept()  # a graph merges by itself


def test_the_network_of_an_evaluation_is_that_of_the_service(images: Tensor) -> None:
    release = release_of("tests.nets:small")
    base = network_of(release, release.base_state())
    adaptors = [release.adaptor_state(level) for level in ("jpeg-10", "jpeg-30")]
    network = MixedByEntropy(SEGMENTATION, base, release.base_state(), *adaptors)
    for image in images:
        with torch.no_grad():
            assert far(network(NORMALISATION(image[None]))[0], by_hand(release, image, "jpeg-10", "jpeg-30")[1]) < 1e-5
    assert set(network._merged) == {by_hand(release, image, "jpeg-10", "jpeg-30")[0] for image in images}


def test_detectors_are_asked_too_and_those_with_a_size_of_their_own_see_whole_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def recorded(task: Any, network: Any, x: Tensor, whole: bool) -> list[float]:
        seen.append(whole)
        return uncertainties(task, network, x, whole)

    monkeypatch.setattr("gearnn_ray.serving.adaptive_model.uncertainties", recorded)
    torch.manual_seed(0)
    base = build_model("tests.nets:tiny_detector", 2).state_dict()
    base = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}
    adaptors = {level: {"head.bias": base["head.bias"] + more} for level, more in (("jpeg-10", 1.0), ("jpeg-30", 3.0))}
    manifest = in_no_store("tests.nets:tiny_detector", 2, {"clean": {}, **adaptors}, task="detection")
    model = AdaptiveModel(Release(manifest, "sha256:" + "1" * 64, base, adaptors), untrained="entropy", trust=TRUST)
    frame = torch.randint(0, 256, (1, 3, 64, 80), dtype=torch.uint8)
    (found,) = model.mixed(frame, [model.level_estimator.match("jpeg-15")])
    assert (found.level, found.neighbour) == ("jpeg-10", "jpeg-30")
    assert found.weight is not None
    assert found.weight > 0.5  # its scores are higher
    assert len(model(frame, [found])[0]["scores"])
    assert seen == [True]


@pytest.mark.parametrize(
    ("network", "own"),
    [
        ("tests.nets:small", False), ("centre_detector", False), ("tests.nets:tiny_detector", True),
        ("ssdlite320_mobilenet_v3_large", True),
    ],
)  # fmt: skip
def test_which_networks_scale_their_images(network: str, own: bool) -> None:
    assert has_its_own_size(build_model(network, 3)) == own


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────


def mixtures(weights: Sequence[float]) -> list[LevelEstimate]:
    return [LevelEstimate("jpeg-50", "jpeg-30", weight) for weight in weights]


def test_a_calm_stream_merges_once(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a release in storage formats, so that restoring is counted, too."""
    release = stored_variants(release_of("tests.nets:small"))
    model = AdaptiveModel(release, untrained="entropy", trust=TRUST)
    calls: list[int] = []
    restored = CompressedTable._restored

    def counted(table: CompressedTable, row: int) -> Tensor:
        calls.append(row)
        return restored(table, row)

    monkeypatch.setattr(CompressedTable, "_restored", counted)
    first = model(images, mixtures([0.25] * 3))
    kept, merges = model._selection.kept(), len(calls)
    assert merges
    assert model.weight_bytes == held(release) + sum(tensor.nbytes for tensor in kept)
    assert torch.equal(model(images, mixtures([0.25] * 3)), first)
    model(images, MIXED[:3])
    calls.clear()
    assert torch.equal(model(images, mixtures([0.25] * 3)), first)
    assert not calls
    assert model.share().weight_bytes == held(release)


def test_what_is_kept_is_bounded_and_the_least_recently_used_goes(images: Tensor) -> None:
    release = release_of("tests.nets:small")
    model = AdaptiveModel(release, untrained="interpolate", trust=TRUST)
    most = batch._MIXTURES
    weights = [(1 + number) / 16 for number in range(most + 1)]
    for weight in (*weights[:most], weights[0], weights[most]):
        model(images, mixtures([weight] * 3))
    assert [mixture.weight for mixture in model._selection.host.merged] == [*weights[2:most], weights[0], weights[most]]
    both = sum(t.nbytes for q in ("jpeg-30", "jpeg-50") for t in release.adaptor_state(q).values())
    assert sum(tensor.nbytes for tensor in model._selection.kept()) <= most * both


@pytest.mark.parametrize("more", [0, 1])
def test_a_batch_of_many_mixtures_is_right_whether_or_not_they_are_kept(more: int, images: Tensor) -> None:
    release = release_of("tests.nets:small")
    model = AdaptiveModel(release, untrained="interpolate", trust=TRUST)
    weights = [number / 16 for number in range(batch._MIXTURES + more + 1)]  # the first one is no mixture
    many = images[:1].expand(len(weights), -1, -1, -1)
    answers = model(many, mixtures(weights))
    for answer, weight in zip(answers, weights, strict=True):
        with torch.no_grad():
            want = network_of(release, merged(release, "jpeg-50", "jpeg-30", weight))(NORMALISATION(images[:1]))
        assert far(answer, SEGMENTATION.at_frame_size(want, *images.shape[-2:])[0]) < 1e-5
    assert len(model._selection.host.merged) == (0 if more else batch._MIXTURES)
