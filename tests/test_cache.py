"""The image cache: entries are made once, complete or not at all, and read as views of the file; statistics of their images."""

import json
import math
import multiprocessing
import os
import pickle
import resource
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gearnn_ray.core.errors import CorruptStoreError, UserError
from gearnn_ray.data import cache as images
from gearnn_ray.data.cache import ImageStatistics, PackedImages, level_images, level_statistics, split_targets
from gearnn_ray.levels.h264_codec import Picture
from gearnn_ray.levels.level import CLEAN, Level, parse_level
from tests.conftest import SEGMENTATION

H, W, CLASSES = 48, 64, 4
JPEG = parse_level("jpeg-10")
H264 = parse_level("h264-32x48")
processes = multiprocessing.get_context("fork")  # spawned ones would import torch by way of the package first


@dataclass(frozen=True)
class TinySplit:
    """Five synthetic samples of two clips; every image that is read leaves a line in `log`."""

    log: Path
    name: str = "val"
    digest: str = "0" * 64
    ids: tuple[str, ...] = ("a/0", "a/1", "a/2", "b/0", "b/1")
    clips: tuple[str, ...] = ("a", "a", "a", "b", "b")
    heights: tuple[int, ...] = (H,) * 5
    seconds_per_image: float = 0
    killed_at: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> np.ndarray:
        if index == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds_per_image)
        with self.log.open("a") as log:
            log.write(f"{index}\n")
        noise = np.random.default_rng(index).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(noise).resize((W, self.heights[index]), Image.Resampling.BICUBIC))

    def target(self, index: int) -> np.ndarray:
        label = np.full((self.heights[index], W), index % CLASSES, np.uint8)
        label[:4] = 255
        return label

    def reads(self) -> int:
        return len(self.log.read_text().split()) if self.log.exists() else 0


@pytest.fixture
def split(tmp_path: Path) -> TinySplit:
    return TinySplit(tmp_path / "reads.log")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "not" / "yet" / "there"


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def originals(split: TinySplit) -> list[np.ndarray]:
    return [split.image(index) for index in range(len(split))]


def same(got: PackedImages, expected: list[np.ndarray]) -> bool:
    return len(got) == len(expected) and all(map(np.array_equal, got, expected))


def test_images_of_a_level_are_made_once(split: TinySplit, cache: Path) -> None:
    first = level_images(split, JPEG, cache)
    assert split.reads() == len(split)
    again = level_images(split, JPEG, cache)
    assert split.reads() == len(split)
    expected = JPEG.apply(originals(split))
    assert same(first, expected)
    assert same(again, expected)


def test_clean_images_and_labels_are_those_of_the_split(split: TinySplit, cache: Path) -> None:
    labels = split_targets(split, CLASSES, cache, SEGMENTATION)
    assert split.reads() == len(split)  # the validation pass looks at every image once
    split_targets(split, CLASSES, cache, SEGMENTATION)
    assert split.reads() == len(split)
    assert same(labels, [split.target(index) for index in range(len(split))])
    assert same(level_images(split, CLEAN, cache), originals(split))


def made(level: Level, split: TinySplit) -> list[Picture]:
    """The pictures of a level, clip by clip."""
    frames = originals(split)
    return [*level.pictures(frames[:3]), *level.pictures(frames[3:])]


def directly(pictures: list[np.ndarray], qp: float | None = None) -> ImageStatistics:
    """The statistics of these images, computed as their definition says."""
    lumas = [float(np.asarray(Image.fromarray(picture).convert("L")).mean()) for picture in pictures]
    (height, width), _ = Counter(picture.shape[:2] for picture in pictures).most_common(1)[0]
    spread = statistics.pstdev(math.log(max(luma, 1.0)) for luma in lumas)
    return ImageStatistics(height, width, round(statistics.fmean(lumas), 3), round(spread, 4), qp)


@pytest.mark.parametrize("free", [10**9, 60_000], ids=["raw", "png"])
@pytest.mark.parametrize("level", [JPEG, parse_level("brightness-0.01"), H264], ids=str)
def test_statistics_come_with_the_images(
    split: TinySplit, cache: Path, level: Level, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_free_bytes", lambda _: free)
    pictures = made(level, split)
    qps = [qp for _, qp in pictures if qp is not None]
    assert len(qps) == (5 if level == H264 else 0)
    expected = directly([pixels for pixels, _ in pictures], round(statistics.fmean(qps), 3) if qps else None)
    split.log.unlink()
    assert level_statistics(split, level, cache) == expected
    assert level_images(split, level, cache).statistics() == expected
    assert level_statistics(split, level, cache) == expected
    assert split.reads() == len(split), "one pass made the images and the statistics"


def test_qps_of_all_pictures_count(split: TinySplit, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come with the encoding of all images, while luma is measured on some."""
    monkeypatch.setattr(images, "_MEASURED_IMAGES", 2)

    class StillSplit(TinySplit):
        def image(self, index: int) -> np.ndarray:
            return super().image(0)

    still = StillSplit(split.log)
    qps = [qp for _, qp in made(H264, still)]
    assert len(qps) == 5
    assert len(set(qps)) > 1, "the first picture of a clip has another QP than its repetitions"
    assert level_statistics(still, H264, cache).qp == pytest.approx(np.mean(qps), abs=0.001)


def test_the_most_frequent_size_counts(split: TinySplit, cache: Path) -> None:
    odd = replace(split, heights=(40, 48, 33, 48, 20))
    measured = level_statistics(odd, JPEG, cache)
    assert measured == directly(JPEG.apply(originals(odd)))
    assert (measured.height, measured.width) == (48, W)


@pytest.mark.parametrize("level", [CLEAN, JPEG], ids=str)
def test_at_most_200_evenly_spaced_images_are_measured(
    split: TinySplit, cache: Path, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert images._measured_positions(200) == list(range(200))
    assert images._measured_positions(500) == [i * 500 // 200 for i in range(200)]
    monkeypatch.setattr(images, "_MEASURED_IMAGES", 3)
    expected = directly(level.apply([split.image(i) for i in (0, 1, 3)]))
    assert level_statistics(split, level, cache) == expected


def test_undistorted_images_are_not_cached_to_be_measured(split: TinySplit, cache: Path) -> None:
    expected = directly(originals(split))
    split.log.unlink()
    assert level_statistics(split, CLEAN, cache) == expected
    assert split.reads() == len(split)
    assert not cache.exists()
    level_images(split, CLEAN, cache)
    split.log.unlink()
    assert level_statistics(split, CLEAN, cache) == expected
    assert split.reads() == 0, "they are in the cache now"


def test_a_video_level_is_given_whole_clips(split: TinySplit, cache: Path) -> None:
    level = parse_level("h264-crf40")
    frames = originals(split)
    assert same(level_images(split, level, cache), level.apply(frames[:3]) + level.apply(frames[3:]))


def test_images_may_differ_in_size(split: TinySplit, cache: Path) -> None:
    odd = replace(split, heights=(40, 48, 33, 48, 20))
    assert same(level_images(odd, CLEAN, cache), originals(odd))
    with pytest.raises(UserError, match=r"frame 1 .*expected equal ones"):
        level_images(odd, parse_level("h264-crf20"), cache)


@pytest.mark.parametrize("free", [10**9, 60_000], ids=["raw", "png"])
def test_a_packed_image_is_a_read_only_sequence(
    split: TinySplit, cache: Path, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_free_bytes", lambda _: free)
    packed = level_images(split, CLEAN, cache)
    assert len(packed) == 5
    assert packed[1].dtype == np.uint8
    assert packed[1].shape == (H, W, 3)
    assert np.array_equal(packed[-1], packed[4])
    assert [image.tobytes() for image in packed[1:3]] == [packed[1].tobytes(), packed[2].tobytes()]
    for outside in (5, -6):
        with pytest.raises(IndexError):
            packed[outside]
    with pytest.raises(ValueError, match="read-only"):
        packed[0][0, 0] = 1


def test_raw_images_are_views_of_the_file(split: TinySplit, cache: Path) -> None:
    packed = level_images(split, CLEAN, cache)
    assert packed.encoding == "raw"
    assert np.shares_memory(packed[2], packed[2])
    with (packed.folder / "data.bin").open("r+b") as data:
        data.seek(2 * H * W * 3)
        data.write(bytes([1, 2, 3]))
    assert packed[2][0, 0].tolist() == [1, 2, 3]


def test_png_takes_the_place_of_raw_where_space_is_short(split: TinySplit, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = 5 * H * W * 3
    monkeypatch.setattr(images, "_free_bytes", lambda _: 2 * raw)
    assert level_images(split, CLEAN, cache).encoding == "raw"
    monkeypatch.setattr(images, "_free_bytes", lambda _: 2 * raw - 1)
    packed = level_images(split, JPEG, cache)
    assert packed.encoding == "png"
    assert same(packed, JPEG.apply(originals(split)))
    labels = split_targets(split, CLASSES, cache, SEGMENTATION)
    assert same(labels, [split.target(index) for index in range(len(split))])


def test_too_little_space_is_refused_naming_the_sizes(split: TinySplit, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match=r"0\.0 MB free, but 5 images need about 0\.0 MB as PNG and 0\.1 MB"):
        level_images(split, CLEAN, cache)
    assert entries(cache) == []


def test_a_packed_image_is_pickled_by_path(split: TinySplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packed = level_images(split, CLEAN, Path("relative"))
    pickled = pickle.dumps(packed)
    assert len(pickled) < 1000
    monkeypatch.chdir("/")
    assert same(pickle.loads(pickled), originals(split))


def test_the_key_is_what_decides_the_pixels(split: TinySplit, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {
        level_images(split, CLEAN, cache).folder,
        level_images(split, JPEG, cache).folder,
        level_images(split, parse_level("jpeg-11"), cache).folder,
        level_images(replace(split, digest="1" * 64), CLEAN, cache).folder,
        level_images(replace(split, name="train"), CLEAN, cache).folder,
        split_targets(split, CLASSES, cache, SEGMENTATION).packed.folder,
        split_targets(split, CLASSES + 1, cache, SEGMENTATION).packed.folder,
    }
    assert len(folders) == 7
    monkeypatch.setattr(images, "LEVELS_VERSION", 10**6)
    assert level_images(split, CLEAN, cache).folder not in folders
    monkeypatch.setattr(images, "codec_versions", lambda level: {"pillow": "another"})
    assert level_images(split, CLEAN, cache).folder not in folders
    assert len(entries(cache)) == 9


def flip_a_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)


OF_DATA = ("short data", "long data", "no data", "zeroed pixels", "flipped bit")
OF_INDEX = ("torn index", "no index", "odd index", "flipped index")


@pytest.mark.parametrize("damage", [*OF_DATA, *OF_INDEX])
def test_a_damaged_entry_is_made_again_with_a_warning(
    split: TinySplit, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = level_images(split, CLEAN, cache).folder
    data, index = folder / "data.bin", folder / "index.json"
    if damage == "short data":
        os.truncate(data, 1000)
    elif damage == "long data":
        os.truncate(data, 10**6)
    elif damage == "torn index":
        os.truncate(index, 20)
    elif damage == "odd index":
        index.write_text(json.dumps([1, 2]))
    elif damage == "zeroed pixels":
        with data.open("r+b") as file:
            file.seek(4096)
            file.write(bytes(512))
    elif damage == "flipped bit":
        flip_a_bit(data, data.stat().st_size // 2)
    elif damage == "flipped index":
        flip_a_bit(index, index.read_bytes().index(b"lumas") + 9)
    else:
        (data if damage == "no data" else index).unlink()
    with pytest.raises(CorruptStoreError, match=folder.name):
        PackedImages(folder)
    assert same(level_images(split, CLEAN, cache), originals(split))
    (record,) = caplog.records
    assert f"in {folder} are damaged" in record.message
    assert record.message.endswith("and are made again")


def test_each_process_checks_an_entry_once(split: TinySplit, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, digest = list[int](), images._digest

    def counted(data: np.ndarray) -> object:
        checked.append(len(data))
        return digest(data)

    folder = level_images(split, CLEAN, cache).folder
    monkeypatch.setattr(images, "_digest", counted)
    for _ in range(3):
        level_images(split, CLEAN, cache)
        PackedImages(folder)
    assert checked == []  # once, when it was made
    monkeypatch.setattr(images, "_intact", {})  # as another process
    for _ in range(3):
        PackedImages(folder)
    assert checked == [5 * H * W * 3]


def test_images_of_a_version_without_digests_are_made_again(split: TinySplit, cache: Path) -> None:
    folder = level_images(split, JPEG, cache).folder
    index = json.loads((folder / "index.json").read_bytes())["body"]
    (folder / "index.json").write_text(json.dumps({name: value for name, value in index.items() if name != "digest"}))
    split.log.unlink()
    assert same(level_images(split, JPEG, cache), JPEG.apply(originals(split)))
    assert entries(cache) == [folder]


def test_two_builders_at_once_make_it_once_and_both_succeed(split: TinySplit, cache: Path) -> None:
    slow = replace(split, seconds_per_image=0.05)
    builders = [processes.Process(target=level_images, args=(slow, JPEG, cache)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert split.reads() == len(split)
    assert len(entries(cache)) == 1
    assert same(level_images(split, JPEG, cache), JPEG.apply(originals(split)))


def test_where_locks_do_not_reach_the_first_to_finish_wins(
    split: TinySplit, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class OvertakenSplit(TinySplit):
        def image(self, index: int) -> np.ndarray:
            if index == 4:  # another host, whose locks we do not see, is quicker
                monkeypatch.setattr(images.fcntl, "flock", lambda *_: None)
                monkeypatch.setattr(images.socket, "gethostname", lambda: "another")
                overtaker.append(inode(level_images(split, CLEAN, cache)))
            return super().image(index)

    def inode(packed: PackedImages) -> int:
        return (packed.folder / "data.bin").stat().st_ino

    overtaker: list[int] = []
    packed = level_images(OvertakenSplit(split.log), CLEAN, cache)
    assert entries(cache) == [packed.folder]
    assert overtaker == [inode(packed)]
    assert same(packed, originals(split))


def test_a_killed_builder_leaves_nothing_that_is_taken_for_an_entry(split: TinySplit, cache: Path) -> None:
    builder = processes.Process(target=level_images, args=(replace(split, killed_at=3), CLEAN, cache))
    builder.start()
    builder.join(60)
    assert builder.exitcode == -signal.SIGKILL
    [half] = entries(cache)
    assert half.name.endswith(".building")
    packed = level_images(split, CLEAN, cache)
    assert same(packed, originals(split))
    assert entries(cache) == [packed.folder]  # and the half of the dead one is gone


def test_a_builder_that_fails_leaves_nothing(split: TinySplit, cache: Path) -> None:
    class TruncatedSplit(TinySplit):
        def image(self, index: int) -> np.ndarray:
            if index == 3:
                raise UserError("b/0.png is truncated")
            return super().image(index)

    with pytest.raises(UserError, match="is truncated"):
        level_images(TruncatedSplit(split.log), JPEG, cache)
    assert entries(cache) == []


def test_a_level_that_loses_a_frame_is_no_entry(split: TinySplit, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(JPEG), "pictures", lambda level, frames: map(Picture, list(frames)[1:]))
    with pytest.raises(RuntimeError, match="3 images were made of 5"):
        level_images(split, JPEG, cache)
    assert entries(cache) == []


def test_a_disk_that_fills_up_is_a_user_error(split: TinySplit, cache: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * H * W, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
            split_targets(split, CLASSES, cache, SEGMENTATION)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(cache) == []


def test_a_cache_that_cannot_be_made_is_a_user_error(split: TinySplit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cache folder {cache} cannot be written"):
            level_images(split, CLEAN, cache)
    assert split.reads() == 0


def test_a_split_without_images_is_refused(split: TinySplit, cache: Path) -> None:
    with pytest.raises(UserError, match="has no images"):
        level_images(replace(split, ids=(), clips=()), CLEAN, cache)


@pytest.mark.parametrize("wrong", [CLASSES, 200, 254])
def test_a_label_outside_the_classes_is_refused(split: TinySplit, cache: Path, wrong: int) -> None:
    class WrongSplit(TinySplit):
        def target(self, index: int) -> np.ndarray:
            label = super().target(index)
            label[-1, -1] = wrong if index == 3 else 0
            return label

    with pytest.raises(UserError, match=f"val sample 'b/0' has the class id {wrong} .* below {CLASSES}, or 255"):
        split_targets(WrongSplit(split.log), CLASSES, cache, SEGMENTATION)
    assert entries(cache) == []


def test_a_label_of_another_size_than_its_image_is_refused(split: TinySplit, cache: Path) -> None:
    class CroppedSplit(TinySplit):
        def target(self, index: int) -> np.ndarray:
            return super().target(index)[: H - 8 * (index == 2)]

    with pytest.raises(UserError, match="val sample 'a/2' has a label of 64x40 for an image of 64x48"):
        split_targets(CroppedSplit(split.log), CLASSES, cache, SEGMENTATION)
