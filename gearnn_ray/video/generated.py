"""A minute of generated streets as a real H.264 stream whose bitrate, size and light fall and rise again; its labels are known.

Each shot is a street that was painted wider than the frame, and the camera pans over it. Every shot is encoded on its own, as the
renditions of an adaptive-bitrate stream are, and all of them follow each other in one MPEG transport stream.
"""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from gearnn_ray.data.scenes import CLASS_NAMES, THINGS, ScenesSplit
from gearnn_ray.levels.h264_codec import x264_encoder
from gearnn_ray.levels.level import Brightness
from gearnn_ray.serving.frames import Limits
from gearnn_ray.video.decoding import VideoFrame, decoded

__all__ = ["FRAMES_PER_SECOND", "TUNNEL", "Clip", "Shot"]

FRAMES_PER_SECOND = 10
_SHOT_FRAMES = 50
_FIRST_SCENE = 50_000  # of the validation scenes: far behind those that a release was judged on


@dataclass(frozen=True)
class Shot:
    """What a shot is encoded with. crf: constant rate factor. scale: of the frame's sides. light: brightness factor."""

    crf: int = 18
    scale: float = 1.0
    light: float = 1.0


SHOTS = (
    Shot(), Shot(crf=36), Shot(crf=44), Shot(crf=28, scale=0.5), Shot(crf=36, scale=0.5), Shot(),
    Shot(light=0.5), Shot(light=0.2), Shot(light=0.1), Shot(crf=36, light=0.2), Shot(light=0.5), Shot(),
)  # fmt: skip
TUNNEL = (*[Shot()] * 4, Shot(light=0.5), Shot(light=0.2), Shot(light=0.5), *[Shot()] * 5)
"""Shots of pristine frames, between which the scene is cut; in their middle it becomes dark."""


@dataclass(frozen=True)
class Clip:
    """The generated clip for a release: `task` and the size of the frames are the release's."""

    task: str = "segmentation"
    height: int = 96
    width: int = 128
    seed: int = 0
    shots: tuple[Shot, ...] = SHOTS
    shot_frames: int = _SHOT_FRAMES

    def __len__(self) -> int:
        return len(self.shots) * self.shot_frames

    @property
    def name(self) -> str:
        return f"generated-{self.seed}" if self.seed else "generated"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels, by class id."""
        return CLASS_NAMES if self.task == "segmentation" else tuple(CLASS_NAMES[what] for what in THINGS)

    @property
    def changes(self) -> dict[int, str]:
        """What changes with the first frame of each shot but the first, by its number: `light`, or `cut` for the scene alone."""
        pairs = enumerate(itertools.pairwise(self.shots), 1)
        return {number * self.shot_frames: "cut" if shot.light == before.light else "light" for number, (before, shot) in pairs}

    def frames(self) -> Iterator[VideoFrame]:
        """The decoded frames, with what their bitstream says."""
        with av.open(io.BytesIO(self.stream), format="mpegts") as container:
            yield from decoded(cast(InputContainer, container), Limits())

    def target(self, number: int) -> Any:
        """The labels of a frame, of the size before scaling: class ids [H, W], or the objects."""
        if not 0 <= number < len(self):
            raise IndexError(f"there is no frame {number} among the {len(self)} of the clip")
        return self._scenes.target(_FIRST_SCENE * self.shot_frames + number)

    def pristine(self, number: int) -> NDArray[np.uint8]:
        """A frame in the light of its shot, before it is scaled and encoded: RGB [H, W, 3]."""
        light = Brightness(self.shots[number // self.shot_frames].light)
        return next(light.stream([self._scenes.image(_FIRST_SCENE * self.shot_frames + number)]))

    @cached_property
    def stream(self) -> bytes:
        """The clip as an MPEG transport stream of H.264."""
        file = io.BytesIO()
        with av.open(file, "w", format="mpegts") as container:
            video = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
            video.height, video.width, video.pix_fmt = self.height, self.width, "yuv420p"
            for number, shot in enumerate(self.shots):
                first = number * self.shot_frames
                for packet in self._encoded(number, shot):
                    packet.pts, packet.dts = packet.pts + first, packet.dts + first
                    packet.stream = video
                    container.mux(packet)
        return file.getvalue()

    def _encoded(self, number: int, shot: Shot) -> Iterator[Any]:
        height, width = (2 * round(side * shot.scale / 2) for side in (self.height, self.width))
        encoder = x264_encoder((height, width), Fraction(FRAMES_PER_SECOND), {"preset": "medium", "crf": str(shot.crf)})
        encoder.colorspace, encoder.color_range = Colorspace.ITU709, ColorRange.MPEG
        convert, light = VideoReformatter(), Brightness(shot.light)
        first = (_FIRST_SCENE + number) * self.shot_frames
        for step in range(self.shot_frames):
            pixels = _scaled(next(light.stream([self._scenes.image(first + step)])), height, width)
            frame = convert.reformat(
                av.VideoFrame.from_ndarray(pixels, format="rgb24"), format="yuv420p", dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG, dst_color_range=ColorRange.MPEG, threads=1,
            )  # fmt: skip
            frame.pts = step
            yield from encoder.encode(frame)
        yield from encoder.encode(None)

    @cached_property
    def _scenes(self) -> ScenesSplit:
        frames = (_FIRST_SCENE + len(self.shots)) * self.shot_frames
        return ScenesSplit("val", frames, self.height, self.width, self.seed, self.task, self.shot_frames)


def _scaled(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
