"""Data sets on disk: tiny trees in the true formats, what they open as, and the sentence for each mistake."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gearnn_ray.config.catalogue import BUILT_IN
from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import IGNORED, KINDS, Dataset, Split, open_dataset
from tests.conftest import ROOT

H, W = 6, 8
CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"


def some_picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


def some_ids(seed: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (H, W), np.uint8)


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)


def make_camvid(root: Path, *, lists: bool = True) -> Path:
    for split, frames in {
        "train": ["0001TP_006690", "0001TP_006720", "0016E5_00001"],
        "val": ["0016E5_07959", "0016E5_07963"],
    }.items():
        for seed, frame in enumerate(frames):
            save(root / split / f"{frame}.png", some_picture(seed))
            save(root / f"{split}annot" / f"{frame}.png", some_ids(seed, 12))
        if lists:
            (root / f"{split}.txt").write_text(
                "".join(f"/SegNet/CamVid/{split}/{f}.png /SegNet/CamVid/{split}annot/{f}.png\n" for f in frames)
            )
    return root


def make_cityscapes(root: Path, kind: str = "labelIds", high: int = 34) -> Path:
    for split, frames in {
        "train": ["aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313", "bochum_000000_000600"],
        "val": ["lindau_000000_000019"],
    }.items():
        for seed, frame in enumerate(frames):
            city = frame.partition("_")[0]
            save(root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png", some_picture(seed))
            save(root / "gtFine" / split / city / f"{frame}_gtFine_{kind}.png", some_ids(seed, high))
            save(root / "gtFine" / split / city / f"{frame}_gtFine_color.png", some_picture(seed))
            (root / "gtFine" / split / city / f"{frame}_gtFine_polygons.json").write_text("{}")
    return root


def make_folder(root: Path, *names: str) -> Path:
    for split in ("train", "val"):
        for seed, name in enumerate(names or ("a.png", "b.jpg", "c.jpeg")):
            save(root / split / "images" / name, some_picture(seed))
            save((root / split / "labels" / name).with_suffix(".png"), some_ids(seed, 5))
    return root


def open_folder_of_5(root: Path) -> Dataset:
    return open_dataset("folder", str(root), num_classes=5)


def sentence(kind: str, path: object, **own: object) -> str:
    """What opening says, held to the form of one plain sentence."""
    with pytest.raises(UserError) as caught:
        open_dataset(kind, None if path is None else str(path), **own)
    return plain(caught.value)


def plain(error: UserError) -> str:
    text = str(error)
    assert text.endswith(".")
    assert not text.endswith("..")
    assert "\n" not in text
    assert "0x" not in text  # no object of ours shows
    return text


MAKERS: dict[str, Callable[[Path], Path]] = {"camvid": make_camvid, "cityscapes": make_cityscapes, "folder": make_folder}


def open_tree(kind: str, root: Path) -> Dataset:
    return open_folder_of_5(root) if kind == "folder" else open_dataset(kind, str(root))


# ── every kind ──


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_keeps_the_contract_of_a_split(kind: str, tmp_path: Path) -> None:
    data = open_tree(kind, MAKERS[kind](tmp_path))
    assert data.name == kind
    assert data.num_classes == len(data.class_names)
    for name, split in (("train", data.train), ("val", data.val)):
        typed: Split = split
        assert typed.name == name
        assert len(split) == len(split.ids) == len(set(split.ids)) == len(split.clips) > 0
        for i in range(len(split)):
            image, label = split.image(i), split.target(i)
            assert (image.dtype, image.shape) == (np.uint8, (H, W, 3))
            assert (label.dtype, label.shape) == (np.uint8, (H, W))
            assert set(np.unique(label)) <= {*range(data.num_classes), IGNORED}
        assert re.fullmatch("[0-9a-f]{64}", split.digest)


@pytest.mark.parametrize("kind", MAKERS)
def test_splits_are_pickled_and_work_elsewhere(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = open_tree(kind, MAKERS[kind](Path("tree")))
    before = data.train.image(1), data.train.digest
    monkeypatch.chdir("/")
    copy = pickle.loads(pickle.dumps(data))
    assert copy == data
    np.testing.assert_array_equal(copy.train.image(1), before[0])
    assert copy.train.digest == before[1]


def test_opening_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    """A job judges its data set before it starts a Ray, and must not take seconds for it."""
    make_folder(tmp_path)
    program = f"""
import sys
from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.models.names import check_name
open_dataset("folder", {str(tmp_path)!r}, num_classes=5)
open_dataset("scenes")
for refused in (lambda: open_dataset("camvid", "/nowhere"), lambda: check_name("drn_d_99")):
    try:
        refused()
    except UserError as error:
        print(error)
print(sorted({{"torch", "ray", "pyarrow", "pydantic"}} & sys.modules.keys()))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    no_folder, no_network, imported = found.stdout.splitlines()
    assert no_folder == "/nowhere does not exist: expected a folder of camvid data, so correct the path."
    assert no_network.startswith(f"there is no network 'drn_d_99': expected {', '.join(BUILT_IN)}, a network of a library")
    assert imported == "[]"


@pytest.mark.parametrize("kind", MAKERS)
def test_opening_reads_no_file_of_pixels(kind: str, tmp_path: Path) -> None:
    data = open_tree(kind, MAKERS[kind](tmp_path))
    for path in (*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jp*g")):
        path.unlink()
        path.touch()
    assert open_tree(kind, tmp_path) == data


@pytest.mark.parametrize("kind", MAKERS)
def test_digest_is_that_of_the_content_not_of_the_place(kind: str, tmp_path: Path) -> None:
    here = open_tree(kind, MAKERS[kind](tmp_path / "here"))
    there = open_tree(kind, MAKERS[kind](tmp_path / "there" / "deeper"))
    assert here.train.digest == there.train.digest
    assert here.val.digest == there.val.digest
    assert here.train.digest != here.val.digest


@pytest.mark.parametrize("what", ["images", "labels"])
def test_digest_changes_with_any_byte(what: str, tmp_path: Path) -> None:
    data = open_folder_of_5(make_folder(tmp_path))
    seen = {data.train.digest}
    for path in getattr(data.train, what):
        path.write_bytes(path.read_bytes() + b"\0")
        seen.add(open_folder_of_5(tmp_path).train.digest)
    assert len(seen) == 4


def test_digest_changes_with_name_class_count_and_clip(tmp_path: Path) -> None:
    data = open_folder_of_5(make_folder(tmp_path / "flat", "a.png", "b.png"))
    renamed = open_folder_of_5(make_folder(tmp_path / "renamed", "a.png", "c.png"))
    more = open_dataset("folder", str(tmp_path / "flat"), num_classes=6)
    clips = replace(data.train, clips=(".", "x"))
    assert len({split.digest for split in (data.train, renamed.train, more.train, clips)}) == 4


def test_digest_changes_where_image_bytes_move_into_the_label(tmp_path: Path) -> None:
    data = open_folder_of_5(make_folder(tmp_path, "a.png"))
    before, image, label = data.train.digest, data.train.images[0], data.train.labels[0]
    content = image.read_bytes()
    image.write_bytes(content[:-1])
    label.write_bytes(content[-1:] + label.read_bytes())
    assert open_folder_of_5(tmp_path).train.digest != before


def test_digest_of_a_file_gone_since_is_refused(tmp_path: Path) -> None:
    data = open_folder_of_5(make_folder(tmp_path))
    data.train.labels[1].unlink()
    with pytest.raises(UserError, match=r"labels/b\.png cannot be read \(No such file"):
        _ = data.train.digest


# ── CamVid ──


@pytest.mark.parametrize("lists", [True, False])
def test_camvid(lists: bool, tmp_path: Path) -> None:
    data = open_dataset("camvid", str(make_camvid(tmp_path, lists=lists)))
    assert data.class_names[0] == "Sky"
    assert data.class_names[10] == "Bicyclist"
    assert data.num_classes == 11
    assert data.train.ids == ("0001TP_006690", "0001TP_006720", "0016E5_00001")
    assert data.train.clips == ("0001TP", "0001TP", "0016E5")
    assert data.val.clips == ("0016E5", "0016E5")
    for i in range(3):
        np.testing.assert_array_equal(data.train.image(i), some_picture(i))
        raw = some_ids(i, 12)
        np.testing.assert_array_equal(data.train.target(i), np.where(raw == 11, 255, raw))


def test_camvid_hands_on_ids_that_mean_nothing(tmp_path: Path) -> None:
    make_camvid(tmp_path)
    save(tmp_path / "valannot" / "0016E5_07959.png", np.array([[10, 11, 12, 254, 255]], np.uint8))
    label = open_dataset("camvid", str(tmp_path)).val.target(0)
    assert label.tolist() == [[10, 255, 12, 254, 255]]


def test_camvid_list_decides_membership_and_frames_are_in_order_of_time(tmp_path: Path) -> None:
    make_camvid(tmp_path)
    listing = tmp_path / "train.txt"
    lines = listing.read_text().splitlines()
    listing.write_text("\ufeff" + "\r\n".join([lines[2], lines[0]]) + "\r\n\r\n", encoding="utf-8")
    assert open_dataset("camvid", str(tmp_path)).train.ids == ("0001TP_006690", "0016E5_00001")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/a/train/0001TP_006690.png", "line 4 of .*train.txt is '/a/train/0001TP_006690.png'"),
        ("a/train/x.png a/trainannot/x.png more", "line 4 of .*train.txt"),
        ("train/0016E5_00001.png trainannot/0016E5_00001.png", "line 4 of .*train.txt repeats 0016E5_00001"),
        ("train/x.png trainannot/x.png", "2 of the images and labels listed in .* the first is .*train/x.png"),
    ],
)
def test_camvid_refuses_a_line_of_a_list(line: str, said: str, tmp_path: Path) -> None:
    with (make_camvid(tmp_path) / "train.txt").open("a") as listing:
        listing.write(line)
    assert re.search(said, sentence("camvid", tmp_path))


def test_camvid_refuses_a_list_that_is_empty_or_no_text(tmp_path: Path) -> None:
    make_camvid(tmp_path)
    (tmp_path / "val.txt").write_text("\n")
    assert "the val split of the camvid data is empty" in sentence("camvid", tmp_path)
    (tmp_path / "val.txt").write_bytes(b"\xff\xfe\x00")
    assert "val.txt is not text" in sentence("camvid", tmp_path)


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"the real CamVid is not at {CAMVID}")
def test_the_real_camvid() -> None:
    data = open_dataset("camvid", str(CAMVID))
    assert (len(data.train), len(data.val)) == (367, 101)
    assert set(data.train.clips) == {"0001TP", "0006R0", "0016E5"}
    assert data.val.image(0).shape == (360, 480, 3)
    assert set(np.unique(data.val.target(0))) <= {*range(11), 255}


# ── Cityscapes ──


def test_cityscapes(tmp_path: Path) -> None:
    data = open_dataset("cityscapes", str(make_cityscapes(tmp_path)))
    assert data.num_classes == 19
    assert data.train.ids[0] == "aachen/aachen_000000_000019"
    assert len(set(data.train.clips)) == 4  # bochum_000000 too is no clip: its frames are seconds apart
    np.testing.assert_array_equal(data.train.image(3), some_picture(3))


def test_cityscapes_label_ids_become_train_ids(tmp_path: Path) -> None:
    # id by id from labels.py of cityscapesScripts; 34 and more are no label ids and are left to the check
    train_ids = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    train_ids += [255, 255, 16, 17, 18]
    make_cityscapes(tmp_path)
    save(
        tmp_path / "gtFine" / "val" / "lindau" / "lindau_000000_000019_gtFine_labelIds.png", np.arange(256, dtype=np.uint8)[None]
    )
    data = open_dataset("cityscapes", str(tmp_path))
    assert data.val.target(0)[0].tolist() == train_ids + list(range(34, 256))
    names = {data.class_names[t]: i for i, t in enumerate(train_ids) if t != 255}
    assert names["road"] == 7
    assert names["vegetation"] == 21
    assert names["train"] == 31
    assert names["bicycle"] == 33


def test_cityscapes_with_prepared_train_ids(tmp_path: Path) -> None:
    data = open_dataset("cityscapes", str(make_cityscapes(tmp_path, "labelTrainIds", 19)))
    np.testing.assert_array_equal(data.train.target(2), some_ids(2, 19))


def test_label_ids_and_train_ids_have_different_digests(tmp_path: Path) -> None:
    label_ids = open_dataset("cityscapes", str(make_cityscapes(tmp_path / "a", "labelIds", 19)))
    train_ids = open_dataset("cityscapes", str(make_cityscapes(tmp_path / "b", "labelTrainIds", 19)))
    assert label_ids.train.digest != train_ids.train.digest


def test_cityscapes_refuses_what_is_missing(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    (tmp_path / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png").unlink()
    said = sentence("cityscapes", tmp_path)
    assert "1 of 4 train images have no label, the first is " in said
    assert "aachen_000001_000019_leftImg8bit.png" in said
    shutil.rmtree(tmp_path / "leftImg8bit" / "train")
    assert "leftImg8bit/train is not a folder" in sentence("cityscapes", tmp_path)


# ── a folder of one's own ──


def test_folder(tmp_path: Path) -> None:
    data = open_folder_of_5(make_folder(tmp_path))
    (tmp_path / "train" / "images" / ".a.png").touch()
    (tmp_path / "train" / "images" / "notes.txt").touch()
    assert open_folder_of_5(tmp_path) == data
    assert data.class_names == ("class 0", "class 1", "class 2", "class 3", "class 4")
    assert data.train.ids == ("a", "b", "c")
    assert len(set(data.train.clips)) == 1
    np.testing.assert_array_equal(data.train.image(0), some_picture(0))
    np.testing.assert_array_equal(data.train.target(1), some_ids(1, 5))


def test_folder_with_a_clip_per_sub_folder(tmp_path: Path) -> None:
    data = open_folder_of_5(make_folder(tmp_path, "ride-2/1.png", "b.png", "ride/1.png", "ride/0.PNG"))
    assert data.train.ids == ("b", "ride/0", "ride/1", "ride-2/1")
    assert [data.train.clips.count(clip) for clip in data.train.clips] == [1, 2, 2, 1]
    np.testing.assert_array_equal(data.train.image(1), some_picture(3))
    np.testing.assert_array_equal(data.train.target(1), some_ids(3, 5))


def test_folder_through_a_link(tmp_path: Path) -> None:
    before = open_folder_of_5(make_folder(tmp_path / "a", "ride/0.png")).train.digest
    shutil.move(tmp_path / "a" / "train" / "images" / "ride", tmp_path / "elsewhere")
    (tmp_path / "a" / "train" / "images" / "ride").symlink_to(tmp_path / "elsewhere")
    assert open_folder_of_5(tmp_path / "a").train.digest == before


def test_classes_txt_names_the_classes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("\ufeffroad\r\n the sky \ncar\nman\ntree\n\n", "utf-8")
    data = open_dataset("folder", str(tmp_path))
    assert data.class_names == ("road", "the sky", "car", "man", "tree")
    assert open_folder_of_5(tmp_path) == data
    assert "num_classes is 4 but" in sentence("folder", tmp_path, num_classes=4)


@pytest.mark.parametrize(("text", "said"), [("", "holds 0 lines"), ("a\n\nb\n", "holds 3 lines, 1 of them blank")])
def test_classes_txt_with_no_names_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (make_folder(tmp_path) / "classes.txt").write_text(text)
    assert said in sentence("folder", tmp_path)


def test_num_classes_is_asked_for(tmp_path: Path) -> None:
    make_folder(tmp_path)
    assert "there is neither num_classes nor a file" in sentence("folder", tmp_path)
    assert "there is neither num_classes nor a file" in sentence("folder", tmp_path, num_classes=None)
    for wrong in (0, 256, True, 2.5, "5"):
        assert f"num_classes is {wrong!r}: expected" in sentence("folder", tmp_path, num_classes=wrong)


def test_folder_refuses_files_that_do_not_pair_up(tmp_path: Path) -> None:
    make_folder(tmp_path)
    stray = tmp_path / "val" / "labels" / "z.png"
    save(stray, some_ids(0, 5))
    said = sentence("folder", tmp_path, num_classes=5)
    assert f"1 of 4 val labels have no image, the first is {stray}" in said
    stray.unlink()
    for name in ("b", "c"):
        (tmp_path / "val" / "labels" / f"{name}.png").unlink()
    said = sentence("folder", tmp_path, num_classes=5)
    assert f"2 of 3 val images have no label, the first is {tmp_path / 'val' / 'images' / 'b.jpg'}" in said


def test_folder_refuses_two_images_of_one_name(tmp_path: Path) -> None:
    save(make_folder(tmp_path) / "train" / "images" / "a.jpg", some_picture(0))
    said = sentence("folder", tmp_path, num_classes=5)
    assert "images/a.jpg and " in said
    assert "images/a.png share a name" in said


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    for file in (*(make_folder(tmp_path) / "val").rglob("*.*"),):
        file.unlink()
    assert "the val split of the folder data is empty" in sentence("folder", tmp_path, num_classes=5)


# ── what was asked for ──


def test_an_unknown_kind_is_answered_with_those_there_are(tmp_path: Path) -> None:
    said = sentence("kitti", tmp_path)
    assert "'kitti'" in said
    assert all(kind in said for kind in KINDS)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_wrong_path_is_refused(kind: str, tmp_path: Path) -> None:
    assert f"data of kind {kind} needs a path" in sentence(kind, None)
    assert f"data of kind {kind} needs a path" in sentence(kind, "")
    own = {"num_classes": 5} if kind == "folder" else {}
    assert f"{tmp_path / 'no'} does not exist" in sentence(kind, tmp_path / "no", **own)
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is a file" in sentence(kind, tmp_path / "file", **own)
    assert "is not a folder" in sentence(kind, tmp_path, **own)


def test_generated_scenes_take_no_path(tmp_path: Path) -> None:
    assert f"a path was given ({tmp_path})" in sentence("scenes", tmp_path)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_option_a_kind_does_not_have_is_refused(kind: str, tmp_path: Path) -> None:
    assert f"data of kind {kind} has no option 'holdout'" in sentence(kind, tmp_path, holdout=0.1)
    with pytest.raises(UserError, match="is not a folder"):  # None is not given
        open_dataset(kind, str(tmp_path), holdout=None, **({"num_classes": 5} if kind == "folder" else {}))


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = make_folder(tmp_path, "a.png", "ride/0.png") / "train" / "images" / "ride"
    scandir = os.scandir

    def guarded(path: str) -> object:  # file modes do not hold back root, whom tests may run as
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert f"{closed} cannot be read (Permission denied)" in sentence("folder", tmp_path, num_classes=5)


def test_links_in_a_circle_end_with_a_sentence(tmp_path: Path) -> None:
    images = make_folder(tmp_path) / "train" / "images"
    (images / "loop").symlink_to(images)
    assert "train images have no label, the first is " in sentence("folder", tmp_path, num_classes=5)


def test_the_scenes_refuse_an_option_that_is_none_of_theirs() -> None:
    with pytest.raises(UserError, match="scenes has no option 'num_classes'"):
        open_dataset("scenes", num_classes=3)
