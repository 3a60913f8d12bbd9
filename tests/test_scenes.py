"""The generated street scenes: always the same ones, and hard in the way they are meant to be."""

import hashlib
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import IGNORED, open_dataset
from gearnn_ray.data.objects import boxes_of
from gearnn_ray.data.scenes import (
    BRICK,
    CLASS_NAMES,
    HEDGE,
    PAVEMENT,
    ROAD,
    THINGS,
    TIMBER,
    TREE,
    TWINS,
    ScenesSplit,
    open_scenes,
)  # fmt: skip
from gearnn_ray.levels.level import parse_level

H, W = 96, 128
SMALL = ScenesSplit("train", 3, 48, 64, 0)


@pytest.fixture(scope="module")
def scenes() -> tuple[list[np.ndarray], list[np.ndarray]]:
    split = open_scenes(train=96).train
    return [split.image(i) for i in range(24)], [split.target(i) for i in range(24)]


def test_the_default_set_is_what_the_data_kind_opens() -> None:
    dataset = open_dataset("scenes", None)
    assert dataset == open_scenes()
    assert (dataset.name, dataset.num_classes) == ("scenes", len(CLASS_NAMES))
    assert (len(dataset.train), len(dataset.val)) == (192, 32)
    for split in (dataset.train, dataset.val):
        assert len(set(split.ids)) == len(set(split.clips)) == len(split), "every image is a clip of its own"
        assert split.image(0).shape == (H, W, 3)
        assert split.target(0).shape == (H, W)
        assert split.image(0).dtype == split.target(0).dtype == np.uint8


def test_pixels_change_only_with_the_version() -> None:
    # another result here means: raise VERSION in scenes.py, or stores would mix up two sets under one digest
    split = open_scenes(train=96).train
    pixels = hashlib.sha256(split.image(0).tobytes() + split.target(0).tobytes()).hexdigest()
    assert pixels[:16] == "479dfcebb5cda6cb"
    assert split.digest[:16] == "c8c7ac6a9b420c17"


def test_an_image_depends_on_nothing_but_its_own_number() -> None:
    expected = SMALL.image(2), SMALL.target(2)
    np.random.seed(1)
    for split in (SMALL, replace(SMALL, count=99), pickle.loads(pickle.dumps(SMALL))):
        split.image(0)
        np.testing.assert_array_equal(split.image(2), expected[0])
        np.testing.assert_array_equal(split.target(2), expected[1])


def test_every_parameter_changes_the_digest_and_index_seed_and_split_the_picture() -> None:
    others = [replace(SMALL, **change) for change in ({"name": "val"}, {"seed": 1}, {"count": 4}, {"height": 56}, {"width": 72})]
    assert len({split.digest for split in (SMALL, *others)}) == 6
    pictures = {s.image(i).tobytes() for s in (SMALL, others[0], others[1]) for i in range(3)}
    assert len(pictures) == 9


def test_an_index_outside_is_refused() -> None:
    for index in (-1, 3):
        with pytest.raises(IndexError, match="of train"):
            SMALL.image(index)


def test_every_class_occurs_often_and_labels_stay_within(scenes: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    labels = np.stack(scenes[1])
    assert set(np.unique(labels)) <= {*range(len(CLASS_NAMES)), IGNORED}
    for what, name in enumerate(CLASS_NAMES):
        assert (labels == what).mean() > 0.01, name
        assert (labels == what).any((1, 2)).sum() >= 12, f"{name} is missing from most images"


@pytest.mark.parametrize(("height", "width"), [(48, 48), (48, 400), (400, 48), (101, 67)])
def test_any_size_in_range_can_be_painted(height: int, width: int) -> None:
    split = open_scenes(height=height, width=width).val
    with np.errstate(all="raise"):
        assert split.image(0).shape == (height, width, 3)
    assert len(np.unique(split.target(0))) >= 4


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({"height": 47}, "height of the scenes is 47: expected a whole number from 48"),
        ({"width": 4096}, "width of the scenes is 4096"),
        ({"width": 128.0}, "width of the scenes is 128.0"),
        ({"train": 0}, "train of the scenes is 0: expected a whole number from 1"),
        ({"val": -3}, "val of the scenes is -3"),
        ({"seed": -1}, "seed of the scenes is -1"),
        ({"seed": True}, "seed of the scenes is True"),
    ],
)
def test_a_set_that_cannot_be_is_refused_in_a_sentence(own: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=found):
        open_scenes(**own)


# steps (down, right): the second twin repeats itself over the one and changes over the other
STEPS = {(ROAD, PAVEMENT): ((2, 0), (1, 0)), (BRICK, TIMBER): ((1, 0), (0, 1)), (TREE, HEDGE): ((1, -1), (0, 1))}


def change(image: np.ndarray, label: np.ndarray, what: int, step: tuple[int, int]) -> float:
    """Mean change of grey over this step between two pixels of the class; NaN where there are few."""
    grey = image.astype(np.float64).mean(2)
    inside = (slice(2, None), slice(1, -1))
    both = ((label == what) & (np.roll(label, step, (0, 1)) == what))[inside]
    return float(np.abs(grey - np.roll(grey, step, (0, 1)))[inside][both].mean()) if both.sum() > 100 else np.nan


def pattern(image: np.ndarray, label: np.ndarray, what: int, twins: tuple[int, int]) -> float:
    """A high-pass statistic, in grey levels: how strongly the class shows the pattern of the second twin."""
    repeats, changes = STEPS[twins]
    return change(image, label, what, changes) - change(image, label, what, repeats)


def gap(images: list[np.ndarray], labels: list[np.ndarray], twins: tuple[int, int]) -> tuple[float, float]:
    """How far the twins' textures are apart over all images, in grey levels, and the share of image pairs told apart."""
    first, second = (np.array([pattern(*pair, what, twins) for pair in zip(images, labels, strict=True)]) for what in twins)
    first, second = first[~np.isnan(first)], second[~np.isnan(second)]
    return float(second.mean() - first.mean()), float((second[:, None] > first).mean())


@pytest.mark.parametrize("twins", TWINS)
def test_only_fine_texture_tells_twins_apart_and_distortion_takes_it_away(
    twins: tuple[int, int], scenes: tuple[list[np.ndarray], list[np.ndarray]]
) -> None:
    images, labels = scenes
    colours = np.array(
        [
            [image[label == what].mean(0) for what in twins]
            for image, label in zip(images, labels, strict=True)
            if all((label == what).sum() > 100 for what in twins)
        ]
    )
    assert len(colours) >= 8
    between_images = colours.std(0).mean()
    assert np.abs(np.diff(colours.mean(0), axis=0)).max() < between_images / 2, "colour gives the class away"

    clean, told_apart = gap(images, labels, twins)
    assert told_apart > 0.95
    kept = {
        name: gap(parse_level(name).apply(images), labels, twins)[0] / clean for name in ("jpeg-80", "jpeg-10", "brightness-0.2")
    }
    assert kept["jpeg-80"] > 0.8, kept
    assert kept["jpeg-10"] < 0.4, kept
    assert kept["brightness-0.2"] < 0.25, kept


# ── cars and people ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_tasks_have_the_same_images_and_digests_of_their_own() -> None:
    labelled, boxed = open_dataset("scenes"), open_dataset("scenes", task="detection")
    assert boxed.class_names == ("car", "person")
    assert labelled.train.digest != boxed.train.digest
    np.testing.assert_array_equal(labelled.val.image(3), boxed.val.image(3))


@pytest.mark.parametrize("split", [open_scenes(train=24).train, open_scenes(val=4, height=200, width=90).val])
def test_objects_are_the_cars_and_people_of_the_label(split: ScenesSplit) -> None:
    for index in range(len(split)):
        label, objects = split.target(index), replace(split, task="detection").target(index)
        masks = objects.masks()
        assert masks.sum(0).max(initial=0) <= 1, "a pixel belongs to one object"
        for number, what in enumerate(THINGS):
            np.testing.assert_array_equal(masks[objects.labels == number].any(0), label == what)
        np.testing.assert_array_equal(objects.areas, masks.sum((1, 2)))
        for (left, top, right, bottom), mask in zip(objects.boxes.astype(int), masks, strict=True):
            inside = mask[top:bottom, left:right]
            assert inside.sum() == mask.sum()
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()  # noqa: PT018


def test_most_objects_are_visible_and_those_that_are_not_are_marked() -> None:
    split = open_scenes(train=64, task="detection").train
    every = [split.target(i) for i in range(len(split))]
    crowd, areas = (np.concatenate([getattr(each, name) for each in every]) for name in ("crowd", "areas"))
    assert 3 < len(crowd) / len(split) < 7
    assert 0.02 < crowd.mean() < 0.2
    assert areas[~crowd].min() >= 12
    for number in range(len(THINGS)):
        assert sum(int((each.labels == number).any()) for each in every) > 0.9 * len(split)


def test_the_boxes_of_no_masks_are_empty() -> None:
    empty = boxes_of(np.zeros((0, 5, 7), np.bool_))
    assert empty.shape == (0, 4)
    assert empty.dtype == np.float32


def test_frames_of_one_scene_are_a_pan_over_it() -> None:
    stills, panned = (open_scenes(train=8, val=8, frames=frames).val for frames in (1, 4))
    assert panned.clips == ("val-00000",) * 4 + ("val-00004",) * 4
    assert stills.clips == stills.ids
    assert panned.digest != stills.digest
    for scene in (0, 4):
        first, last = panned.target(scene), panned.target(scene + 3)
        assert np.array_equal(first[:, 6:], last[:, :-6])
        assert np.array_equal(panned.image(scene)[:, 6:], panned.image(scene + 3)[:, :-6])


def test_objects_of_a_pan_are_those_that_are_seen() -> None:
    wide = open_scenes(train=1, val=8, frames=8, task="detection").val
    for index in range(8):
        found = wide.target(index)
        masks = found.masks()
        assert found.size == masks.shape[1:] == (96, 128)
        assert masks.any((1, 2)).all()
        assert np.array_equal(found.boxes, boxes_of(masks))
        assert np.array_equal(found.areas, masks.sum((1, 2)))
        assert found.crowd[found.areas < 12].all()
