"""The frequency response against plain arithmetic: cosine sums for the DCT, finite differences for the gradient."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import IGNORED
from gearnn_ray.evaluation import frequency
from gearnn_ray.evaluation.frequency import block_dct, dct_matrix, high_frequency_share, inverse_block_dct, similarity
from gearnn_ray.tasks.base import Image
from tests.conftest import NORMALISATION, SEGMENTATION
from tests.nets import small


def frequency_response(
    model: nn.Module, images: Sequence[Image], labels: Sequence[Image], normalisation: Any = NORMALISATION
) -> NDArray[np.float64]:
    return frequency.frequency_response(SEGMENTATION, model, images, labels, normalisation)


def wave(v: int, u: int) -> NDArray[np.float64]:
    """What one coefficient stands for in a block [8, 8], as the JPEG standard writes it (ITU-T T.81, A.3.3)."""
    scale = math.prod(math.sqrt(0.5) if frequency == 0 else 1.0 for frequency in (v, u)) / 4
    return np.array(
        [
            [scale * math.cos((2 * y + 1) * v * math.pi / 16) * math.cos((2 * x + 1) * u * math.pi / 16) for x in range(8)]
            for y in range(8)
        ]
    )


class Smooth(nn.Module):
    """Without a kink, so that finite differences hold; logits at half the size, as real networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bn(self.conv(x))))


class BlockMeans(nn.Module):
    """Sees nothing of a block but its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.avg_pool2d(x, 8))


def network(kind: type[nn.Module] = Smooth) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def scene(height: int, width: int, seed: int = 0) -> tuple[Image, Image]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    label = rng.integers(0, 3, (height, width)).astype(np.uint8)
    label[rng.random(label.shape) < 0.2] = IGNORED
    return image, label


def by_finite_differences(model: nn.Module, image: Image, label: Image, step: float = 0.05) -> NDArray[np.float64]:
    """The map of one image in float64, each coefficient moved up and down; nothing under test takes part."""
    height, width = label.shape
    mean, std = (255 * torch.tensor(v).double().view(3, 1, 1) for v in (NORMALISATION.mean, NORMALISATION.std))
    pixels = torch.from_numpy(image).permute(2, 0, 1).double()
    y = torch.from_numpy(label).long()[None]
    places = [(c, i, j) for c in range(3) for i in range(0, height, 8) for j in range(0, width, 8)]
    response = np.zeros((8, 8))
    model.double()
    for v, u in np.ndindex(8, 8):
        for c, i, j in places:
            losses = []
            for sign in (1, -1):
                moved = pixels.clone()
                moved[c, i : i + 8, j : j + 8] += sign * step * torch.from_numpy(wave(v, u))
                with torch.no_grad():
                    logits = model(((moved - mean) / std)[None])
                logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
                losses.append(float(F.cross_entropy(logits, y, ignore_index=IGNORED)))
            response[v, u] += abs(losses[0] - losses[1]) / (2 * step) / len(places)
    model.float()
    return response


def test_the_dct_is_orthonormal_and_the_standards_own() -> None:
    dct = dct_matrix()
    assert torch.allclose(dct @ dct.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-14)
    x = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (2, 3, 16, 24)))
    coefficients = block_dct(x)
    assert coefficients.shape == (2, 3, 2, 3, 8, 8)
    for v, u in np.ndindex(8, 8):
        # the second row and third column of blocks, of the second image's last channel
        assert float(coefficients[1, 2, 1, 2, v, u]) == pytest.approx((x[1, 2, 8:, 16:].numpy() * wave(v, u)).sum())
    assert float((coefficients**2).sum()) == pytest.approx(float((x**2).sum()))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    scale=st.sampled_from([1e-3, 1.0, 255.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_blocks_come_back(shape: tuple[int, int, int, int], scale: float, seed: int) -> None:
    b, c, h, w = shape
    x = torch.from_numpy(np.random.default_rng(seed).uniform(-scale, scale, (b, c, 8 * h, 8 * w)))
    assert torch.allclose(inverse_block_dct(block_dct(x)), x, rtol=0, atol=1e-12 * scale)
    single = inverse_block_dct(block_dct(x.float()))
    assert single.dtype == torch.float32
    assert torch.allclose(single, x.float(), rtol=0, atol=1e-5 * scale)


def test_the_response_is_what_finite_differences_give() -> None:
    model = network()
    image, label = scene(16, 8)
    response = frequency_response(model, [image], [label])
    assert response.dtype == np.float64
    np.testing.assert_allclose(response, by_finite_differences(model, image, label), rtol=2e-4)


def test_images_count_alike_whatever_they_show() -> None:
    model = network()
    sizes = [(16, 16), (16, 16), (8, 24), (24, 8)]
    images, labels = zip(*(scene(*size, seed) for seed, size in enumerate(sizes)), strict=True)
    labels[1][:-1] = IGNORED  # few labelled pixels: in a common mean over pixels this image would weigh less
    alone = [frequency_response(model, [image], [label]) for image, label in zip(images, labels, strict=True)]
    np.testing.assert_allclose(frequency_response(model, images, labels), np.mean(alone, 0), rtol=1e-12)


def test_pixels_without_a_label_say_nothing() -> None:
    image, label = scene(8, 16)
    label[:, 8:] = IGNORED
    model = network(BlockMeans)
    response = frequency_response(model, [image], [label])
    # logits of one block reach the pixels of the other through bilinear resizing, so the right one is repeated further on
    wide = (np.concatenate([image, image[:, 8:], image[:, 8:]], 1), np.concatenate([label, label[:, 8:], label[:, 8:]], 1))
    np.testing.assert_allclose(frequency_response(model, [wide[0]], [wide[1]]), response / 2, rtol=1e-5)
    nothing = frequency_response(model, [image], [np.full_like(label, IGNORED)])
    np.testing.assert_array_equal(nothing, np.zeros((8, 8)))


def test_labels_are_resized_to_the_image_and_both_cropped_to_whole_blocks() -> None:
    model = network()
    image, label = scene(21, 30)
    expected = frequency_response(model, [image[:16, :24]], [label[:16, :24]])
    np.testing.assert_array_equal(frequency_response(model, [image], [label]), expected)
    doubled = label.repeat(2, 0).repeat(2, 1)  # by pixel centres, every second pixel is the image's own
    np.testing.assert_array_equal(frequency_response(model, [image], [doubled]), expected)


def test_a_network_that_sees_block_means_responds_there_alone() -> None:
    image, label = scene(16, 24)
    response = frequency_response(network(BlockMeans), [image], [label])
    assert response[0, 0] > 0
    np.testing.assert_allclose(response.ravel()[1:], 0, atol=1e-6 * response[0, 0])


def test_vertical_comes_first() -> None:
    model = network(BlockMeans)
    image, label = scene(8, 8)
    rows = torch.from_numpy(wave(3, 0)).float()
    # a view of the image through one vertical wave
    response = frequency_response(model, [image], [label], lambda x: NORMALISATION(x * rows))
    assert response[3, 0] > 0
    assert np.argmax(response) == 3 * 8


def test_the_network_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = small(3)
    model.train()
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    images, labels = zip(*(scene(16, 16, seed) for seed in range(2)), strict=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    response = frequency_response(model, images, labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    np.testing.assert_array_equal(response, frequency_response(model.eval(), images, labels))


def test_modes_come_back_even_where_the_network_breaks() -> None:
    model = network().train()
    with pytest.raises(RuntimeError):
        frequency_response(model, [np.zeros((8, 8, 4), np.uint8)], [np.zeros((8, 8), np.uint8)])
    assert all(module.training for module in model.modules())


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match="an image is 30 × 7 pixels"):
        frequency_response(network(), *([part] for part in scene(7, 30)))
    with pytest.raises(UserError, match="there is no image"):
        frequency_response(network(), [], [])


def test_high_frequencies_are_those_beyond_the_antidiagonal() -> None:
    assert high_frequency_share(np.ones((8, 8))) == 28 / 64
    edge = np.zeros((8, 8))
    edge[0, 7] = edge[3, 4] = edge[7, 1] = 1
    assert high_frequency_share(edge) == pytest.approx(1 / 3)
    assert high_frequency_share(np.zeros((8, 8))) == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-6, 1e6))
def test_similarity_is_of_direction_alone(seed: int, scale: float) -> None:
    a, b = np.random.default_rng(seed).normal(size=(2, 8, 8))
    assert similarity(a, scale * a) == pytest.approx(1)
    assert similarity(a, -scale * a) == pytest.approx(-1)
    assert similarity(a, b) == pytest.approx(similarity(b, scale * a))
    assert similarity(a, b) == pytest.approx(float(a.ravel() @ b.ravel() / math.sqrt((a**2).sum() * (b**2).sum())))
    assert similarity(a, np.zeros((8, 8))) == 0
