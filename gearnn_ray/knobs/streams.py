"""What a camera sees, in segments of pristine frames: a video file, a folder of frames and perhaps labels, generated streets."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import IGNORED
from gearnn_ray.data.files import AS_IS, file_split, find_files, read_image
from gearnn_ray.knobs.settings import Image
from gearnn_ray.store.manifest import Manifest
from gearnn_ray.tasks.base import Task
from gearnn_ray.video.decoding import decoded
from gearnn_ray.video.generated import FRAMES_PER_SECOND, TUNNEL, Clip
from gearnn_ray.video.sources import is_live, open_source

_IMAGES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive frames of one size, [H, W, 3] each, and where they are known, their targets. rate: frames a second."""

    frames: tuple[Image, ...]
    rate: float
    targets: tuple[Any, ...] | None = None

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.rate

    def digest(self, task: Task) -> str:
        """Hex SHA-256 of all pixels and targets."""
        whole = hashlib.sha256(repr((self.frames[0].shape, len(self.frames), self.targets is None)).encode())
        for frame in self.frames:
            whole.update(np.ascontiguousarray(frame).data)
        for target in self.targets or ():
            whole.update(np.ascontiguousarray(task.store(target)).data)
        return whole.hexdigest()


@dataclass(frozen=True)
class Stream:
    """One camera. segments: opens it, and gives whole segments; a rest of less is left out. has_labels: else the targets are the
    network's own answers. changes: where they are known, what changes (`cut`, `light`) with a frame, by its number.
    """

    name: str
    segments: Callable[[], Iterator[Segment]]
    has_labels: bool = False
    changes: Mapping[int, str] = field(default_factory=dict)


class Stretch(NamedTuple):
    """The segments from `first` up to `end`, before which `kind` changed; the stream's beginning is no change."""

    kind: str | None
    first: int
    end: int


def stretches_of(changes: Mapping[int, str], length: int, segments: int) -> tuple[Stretch, ...]:
    """The stretches of a stream of so many segments of `length` frames. changes: the kind by the first frame behind each change.
    Segments with frames of both sides of a change belong to no stretch.
    """
    starts = sorted({0: None, **changes}.items())
    ends = [frame for frame, _ in starts[1:]] + [segments * length]
    pairs = zip(starts, ends, strict=True)
    found = [Stretch(kind, -(-frame // length), min(end // length, segments)) for (frame, kind), end in pairs]
    return tuple(each for each in found if each.first < each.end)


def generated_stream(manifest: Manifest, length: int, seed: int = 0) -> Stream:
    """Generated streets for a release that was trained on such, others for each seed. Raises UserError for any other release."""
    task, reference = manifest.model.task, None if manifest.data is None else manifest.data.reference
    sides = {} if reference is None else {"height": reference.height, "width": reference.width}
    clip = Clip(task, seed=seed, shots=TUNNEL, **sides)
    if tuple(manifest.model.class_names) != clip.class_names:
        raise UserError(
            f"{manifest.name} was not trained on generated scenes, which are what is seen without a source: give a video, or a "
            "release of generated scenes"
        )

    def segments() -> Iterator[Segment]:
        frames = ((clip.pristine(number), clip.target(number)) for number in range(len(clip)))
        return _segments(frames, FRAMES_PER_SECOND, length)

    return Stream(clip.name, segments, True, clip.changes)


def video_stream(source: str, rate: float, length: int) -> Stream:
    """A video file, of which so many frames a second are taken, or all it has. Raises UserError where it cannot be opened or is
    shorter than a segment.
    """
    if is_live(source):
        raise UserError(f"{source} is a camera, and every method must see the same frames: record it, and give the file")

    def segments() -> Iterator[Segment]:
        opened = open_source(source)
        try:
            own = opened.container.streams.video[0].average_rate if opened.container.streams.video else None
            taken = min(rate, float(own)) if own else rate
            yield from _segments(((pixels, None) for pixels in _thinned(decoded(opened.container), rate)), taken, length)
        finally:
            opened.close()

    return _checked(Stream(Path(urlsplit(source).path).stem or source, segments), source, length)


def folder_stream(folder: Path, labels: Path | None, rate: float, length: int, num_classes: int) -> Stream:
    """A folder of frames in the order of their names, with label images of the same names. Label values that are no class are
    ignored. Raises UserError for a folder without images, or a frame without its label.
    """
    images = find_files(folder, *_IMAGES)
    if not images:
        raise UserError(f"there are no frames in {folder}: expected *.png or *.jpg in the order of their names")
    paths = [images[key] for key in sorted(images)]

    def segments() -> Iterator[Segment]:
        return _segments(((read_image(path), None) for path in paths), rate, length)

    if labels is None:
        return _checked(Stream(folder.resolve().name, segments), str(folder), length)
    classes = AS_IS[:num_classes] + bytes([IGNORED]) * (256 - num_classes)
    split = file_split(
        "labelled", folder.name, images, find_files(labels, ".png"), num_classes=num_classes, class_map=classes,
        clip=lambda _: folder.name, expected=f"*.png in {folder}",
    )  # fmt: skip

    def labelled() -> Iterator[Segment]:
        return _segments(((split.image(number), split.target(number)) for number in range(len(split))), rate, length)

    return _checked(Stream(folder.resolve().name, labelled, True), str(folder), length)


def _thinned(frames: Iterable[Any], rate: float) -> Iterator[NDArray[np.uint8]]:
    """The pixels of so many frames a second by their presentation times; of frames without times, all."""
    start, taken = None, 0
    for frame in frames:
        if frame.seconds is not None:
            start = frame.seconds if start is None else start
            if frame.seconds - start < taken / rate - 1e-3:
                continue
        taken += 1
        yield frame.pixels


def _segments(frames: Iterable[tuple[Image, Any]], rate: float, length: int) -> Iterator[Segment]:
    """Whole segments. A frame of another size begins a new one."""
    for _, group in itertools.groupby(frames, lambda each: each[0].shape):
        while len(part := list(itertools.islice(group, length))) == length:
            images, targets = zip(*part, strict=True)
            yield Segment(images, rate, None if targets[0] is None else targets)


def _checked(stream: Stream, source: str, length: int) -> Stream:
    if next(stream.segments(), None) is None:
        raise UserError(f"{source} has fewer than the {length} frames of a segment: give a longer video, or a smaller --length")
    return stream
