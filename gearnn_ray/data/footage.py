"""Videos and images without labels: a folder with any of both, at any depth. Every video is a clip, and so are the images of one
folder if they all have one size; images of different sizes are photographs, each a clip of its own.

Every fifth clip validates, counted from the last one by name, so at least one; the others are trained on. Of a video, `rate`
frames a second are looked at. Left out, and counted, are frames that are black, blurred, or nearly the one kept before in their
clip.
"""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import IGNORED, Dataset
from gearnn_ray.data.files import class_names, digest_of, find_files, image_size, read_image
from gearnn_ray.data.objects import Objects
from gearnn_ray.data.video_files import SUFFIXES, Shot, rgb_of, shots_of, versions

_VERSION = 1  # part of every digest: raise it if the same files would give other frames
_IMAGES = (".png", ".jpg", ".jpeg")
_VALIDATES = 5  # every fifth clip
_SEEN_AT = 256  # pixels of the longer side at which frames are looked at
_GRID = 16  # blocks along each side in which frames are compared
_BLACK = 32  # luma, 0 to 255, that hardly any pixel of a black frame exceeds
_SHARP = 0.1  # least sharpness: frames of four recordings have 0.16 and more, under a blur of 4 pixels in 480 at most 0.11
_CHANGED = 6.0  # luma by which the mean of at least one block differs between two frames that are not nearly the same


class Clip(NamedTuple):
    """A recording: one video, or images in order."""

    name: str
    paths: tuple[Path, ...]

    @property
    def is_video(self) -> bool:
        return self.paths[0].suffix.lower() in SUFFIXES


class Frame(NamedTuple):
    """One frame. number: in its video, None for an image file."""

    id: str
    clip: str
    path: Path
    number: int | None


class Look(NamedTuple):
    """What a frame looks like, as far as it decides whether the frame is used."""

    black: bool
    sharpness: float
    blocks: NDArray[np.float32]  # mean luma [_GRID, _GRID]

    @classmethod
    def at(cls, pixels: NDArray[np.uint8]) -> "Look":
        """Of an RGB image. Sharpness: the lower of the standard deviations of both second derivatives, as a share of that of
        luma, so that neither contrast nor a motion along one axis hides a blur.
        """
        grey = Image.fromarray(pixels).convert("L")
        shrunk = min(1.0, _SEEN_AT / max(grey.size))
        small = grey.resize((max(3, round(grey.width * shrunk)), max(3, round(grey.height * shrunk))), Image.Resampling.BOX)
        luma = np.asarray(small, np.float32)
        across, down = (np.diff(luma, 2, axis).std() for axis in (1, 0))
        blocks = np.asarray(grey.resize((_GRID, _GRID), Image.Resampling.BOX), np.float32)
        return cls(bool(np.percentile(luma, 99) < _BLACK), float(min(across, down) / max(luma.std(), 1.0)), blocks)

    def refused(self, kept: "Look | None") -> str | None:
        """Why the frame is left out; None if it is used. kept: the last frame of the clip that is used."""
        if self.black:
            return "black"
        if self.sharpness < _SHARP:
            return "blurred"
        if kept is not None and float(np.abs(self.blocks - kept.blocks).max()) < _CHANGED:
            return "nearly the same as the one before"
        return None


@dataclass(frozen=True)
class Choice:
    """The frames of a split that are used, and how many were left out for which reason."""

    frames: tuple[Frame, ...]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class FootageSplit:
    """A `gearnn_ray.data.dataset.Split` without labels. Its frames are chosen when they are first asked for, which decodes every
    video once. task: decides what a target that says nothing looks like.
    """

    name: str
    task: str
    rate: float
    recordings: tuple[Clip, ...]

    @cached_property
    def choice(self) -> Choice:
        """Raises `UserError` for a file that cannot be read, and where no frame can be used."""
        frames, left_out = list[Frame](), Counter[str]()
        for clip in self.recordings:
            kept: Look | None = None
            for frame, pixels in _frames(clip, self.rate):
                look = Look.at(pixels)
                reason = look.refused(kept)
                if reason is None:
                    kept = look
                    frames.append(frame)
                else:
                    left_out[reason] += 1
        if not frames:
            clips = " to ".join(dict.fromkeys((self.recordings[0].name, self.recordings[-1].name)))
            found = f"the {self.name} footage ({clips}) has no frame that can be used ({_listed(left_out)})"
            raise UserError(f"{found}: add recordings that are neither black nor blurred.")
        return Choice(tuple(frames), dict(left_out))

    def __len__(self) -> int:
        return len(self.choice.frames)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(frame.id for frame in self.choice.frames)

    @property
    def clips(self) -> tuple[str, ...]:
        return tuple(frame.clip for frame in self.choice.frames)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of names, frames and the files' bytes, and of the decoder's version where there are videos."""
        used = {path: digest_of(path).hex() for path in dict.fromkeys(frame.path for frame in self.choice.frames)}
        frames = [(frame.id, frame.clip, frame.number, used[frame.path]) for frame in self.choice.frames]
        decoder = versions() if any(clip.is_video for clip in self.recordings) else {}
        return hashlib.sha256(json.dumps(["footage", _VERSION, self.name, decoder, frames]).encode()).hexdigest()

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB image [H, W, 3]. Frames of a video that are read in order decode it once. Raises `UserError` for a damaged file."""
        _, _, path, number = self.choice.frames[index]
        return read_image(path) if number is None else self._reader.frame(path, number)

    def target(self, index: int) -> Any:
        """A target that says nothing: every pixel ignored, or no objects."""
        height, width = self.image(index).shape[:2]
        if self.task == "segmentation":
            return np.full((height, width), IGNORED, np.uint8)
        none = np.zeros(0)
        return Objects(
            np.zeros((0, 4), np.float32), none.astype(np.int64), none.astype(np.float32), none.astype(np.bool_), (height, width)
        )

    @cached_property
    def _reader(self) -> "_Reader":
        return _Reader()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}  # an open file stays in its process


class Footage(Dataset):
    """A data set without labels."""

    labelled: ClassVar[bool] = False
    train: FootageSplit
    val: FootageSplit

    @property
    def remark(self) -> str:
        """How many frames are used and how many are not."""
        left_out = Counter(self.train.choice.left_out) + Counter(self.val.choice.left_out)
        counts = (f"{len(split)} frames of {_clips(len(set(split.clips)))}" for split in (self.train, self.val))
        return "{} to train on, {} to validate; left out: {}".format(*counts, _listed(left_out) if left_out else "none")


class _Reader:
    """Frames of videos by number; goes on decoding where it stopped, as long as numbers rise."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._shots: Iterator[Shot] = iter(())
        self._last: tuple[int, NDArray[np.uint8]] | None = None

    def frame(self, path: Path, number: int) -> NDArray[np.uint8]:
        from av.video.reformatter import VideoReformatter

        if path != self._path or self._last is None or number < self._last[0]:
            self._path, self._shots, self._last = path, shots_of(path), None
        if self._last is None or number > self._last[0]:
            shot = next((shot for shot in self._shots if shot.number == number), None)
            if shot is None:
                self._path = None
                raise UserError(f"{path} has no frame {number} any more: restore the file, or run the job again.")
            self._last = number, rgb_of(shot.picture, VideoReformatter())
        return self._last[1]


def open_footage(root: Path, task: str = "segmentation", num_classes: int | None = None, rate: float = 1.0) -> Footage:
    """The footage in this folder, with `num_classes` classes or those in its classes.txt, one name per line. rate: frames that
    are looked at per second of video. Raises `UserError` if there is no image or video, or a single clip.
    """
    names, clips = class_names(root / "classes.txt", num_classes), _recordings(root)
    if not clips:
        raise UserError(f"{root} has neither videos nor images: expected *{SUFFIXES[0]}, *.jpg or *.png in it, so add some.")
    if len(clips) == 1:
        raise UserError(
            f"{root} has a single clip, {clips[0].name}, whose frames cannot both train and validate: add a second recording, or "
            "cut this one into two files or folders."
        )
    validating = clips[::-1][::_VALIDATES]
    trained_on = [clip for clip in clips if clip not in validating]
    splits = (("train", trained_on), ("val", validating[::-1]))
    return Footage("footage", names, *(FootageSplit(name, task, rate, tuple(own)) for name, own in splits))


def _recordings(root: Path) -> list[Clip]:
    """Every clip, by name."""
    files = find_files(root, *_IMAGES, *SUFFIXES)
    videos = [Clip(key, (path,)) for key, path in files.items() if path.suffix.lower() in SUFFIXES]
    images = sorted((key, path) for key, path in files.items() if path.suffix.lower() in _IMAGES)
    clips = list(videos)
    for folder, group in itertools.groupby(images, key=lambda item: item[0].rpartition("/")[0]):
        members = list(group)
        if len({image_size(path) for _, path in members}) == 1:
            clips.append(Clip(folder or ".", tuple(path for _, path in members)))
        else:
            clips += [Clip(key, (path,)) for key, path in members]
    return sorted(clips)


def _frames(clip: Clip, rate: float) -> Iterator[tuple[Frame, NDArray[np.uint8]]]:
    """The frames of a clip that are looked at. Raises UserError for a file that cannot be read."""
    if not clip.is_video:
        for path in clip.paths:
            name = clip.name if len(clip.paths) == 1 else f"{clip.name}/{path.stem}".removeprefix("./")
            yield Frame(name, clip.name, path, None), read_image(path)
        return
    from av.video.reformatter import VideoReformatter

    (path,), convert, due, shot = clip.paths, VideoReformatter(), 0.0, None
    for shot in shots_of(path):
        if shot.seconds >= due - 1e-6:
            due = (math.floor(shot.seconds * rate + 1e-6) + 1) / rate
            yield Frame(f"{clip.name}/{shot.number:06d}", clip.name, path, shot.number), rgb_of(shot.picture, convert)
    if shot is None:
        raise UserError(f"{path} has no frame that can be decoded: replace it, or take it out.")


def _clips(count: int) -> str:
    return f"{count} clip" if count == 1 else f"{count} clips"


def _listed(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
