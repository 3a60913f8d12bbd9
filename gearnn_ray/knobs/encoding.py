"""Encodes a segment as its settings say, in memory, and shows what a network will see of it.

    encoded = encode(frames, Settings(crf=30))
    seen = shown(encoded, frames)

`encode` is a pure function on one thread, which leaves the interpreter to other threads while x264 works: a segment's probes can
run in threads (`encode_all`), processes or Ray tasks.
"""

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.frame_filter import frames_to_send
from gearnn_ray.knobs.settings import Image, Settings
from gearnn_ray.knobs.tiles import TILE
from gearnn_ray.levels import h264_codec
from gearnn_ray.levels.h264_codec import LEVEL_RATE, equal_sizes, padded_to_even, rgb_to_yuv, x264_encoder

if TYPE_CHECKING:
    from av import VideoFrame

__all__ = ["Encoded", "decode", "encode", "encode_all", "shown"]

_QPS = 51  # `addroi` counts offsets of the quantisation parameter in shares of its range
_VERSION_NOTE: Final = re.compile(rb"\0{2,3}\x01\x06\x05.*?(?=\0{2,3}\x01)", re.DOTALL)
"""The 600 bytes of user data in which x264 names its version and options, at the start of every stream."""


@dataclass(frozen=True)
class Encoded:
    """A segment as it is sent. It can be decoded alone.

    codec: "h264" (Annex B, 4:2:0, BT.709) or "jpeg" (one after the other). packets: one for each frame sent, in decoding order.
    sent: indices of these frames among the segment's, in the order in which they are shown. size: (height, width) of the frames
    sent, without the row and column that pad odd sides of H.264.
    """

    codec: Literal["h264", "jpeg"]
    packets: tuple[bytes, ...]
    sent: tuple[int, ...]
    size: tuple[int, int]

    @property
    def data(self) -> bytes:
        """All packets: the bytes that a camera sends."""
        return b"".join(self.packets)

    def __len__(self) -> int:
        """The number of bytes sent."""
        return sum(map(len, self.packets))


def encode(frames: Sequence[Image], settings: Settings) -> Encoded:
    """Encode one segment of RGB frames of one size; the same arguments give the same bytes.

    The encoder is told the 25 frames a second of H.264 levels whatever the true rate is, because x264 makes frames that are shown
    longer better: a rate factor then means the quality of the level with its name, also where frames are left out. Raises
    UserError for a segment without frames or with frames of different sizes, for frames whose size the codec refuses, and where
    this PyAV has no libx264.
    """
    if not len(frames):
        raise UserError("the segment has no frames: expected one at least")
    pristine = list(equal_sizes(frames))
    sent = frames_to_send(pristine, settings.every, settings.frame_filter)
    size = _size(pristine[0].shape[:2], settings.size)
    images = [_scaled(_changed(pristine[index], settings), size) for index in sent]
    if settings.jpeg_quality is not None:
        return Encoded("jpeg", tuple(_jpeg(image, settings.jpeg_quality) for image in images), sent, size)
    return Encoded("h264", _h264(images, settings, pristine[0].shape[:2]), sent, size)


def encode_all(frames: Sequence[Image], many: Sequence[Settings], threads: int = 1) -> list[Encoded]:
    """`encode` with each of the settings, on so many threads. Equal settings are encoded once."""
    different = list(dict.fromkeys(many))
    with ThreadPoolExecutor(max(1, min(threads, len(different)))) as pool:
        done = dict(zip(different, pool.map(lambda settings: encode(frames, settings), different), strict=True))
    return [done[settings] for settings in many]


def decode(encoded: Encoded) -> list[Image]:
    """The frames that were sent, RGB uint8 of `encoded.size`, in the order in which they are shown. Raises UserError if one
    cannot be decoded.
    """
    height, width = encoded.size
    if encoded.codec == "jpeg":
        images = [np.asarray(PIL.Image.open(io.BytesIO(packet)).convert("RGB")) for packet in encoded.packets]
    else:
        import av

        pictures = h264_codec.decode(av.Packet(packet) for packet in encoded.packets)
        images = [np.ascontiguousarray(picture.pixels[:height, :width]) for picture in pictures]
    if len(images) != len(encoded.sent):
        raise UserError(f"{len(images)} of the segment's {len(encoded.sent)} frames can be decoded: send it again")
    return images


def shown(encoded: Encoded, frames: Sequence[Image]) -> NDArray[np.uint8]:
    """What is seen in place of each pristine frame, RGB [T, H, W, 3] of their size: the last frame sent, scaled back."""
    seen = [_scaled(image, frames[0].shape[:2]) for image in decode(encoded)]
    shows = np.searchsorted(encoded.sent, np.arange(len(frames)), "right") - 1
    return np.stack([seen[index] for index in shows])


def _changed(frame: Image, settings: Settings) -> Image:
    """The frame after the user's own changes."""
    for change in settings.before:
        changed = change(frame)
        if not isinstance(changed, np.ndarray) or changed.shape != frame.shape or changed.dtype != np.uint8:
            found = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, np.ndarray) else type(changed).__name__
            raise UserError(f"a knob of your own made {found} of a frame: expected uint8 {list(frame.shape)}")
        frame = changed
    return frame


def _size(own: tuple[int, ...], size: float | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the frames sent, with even sides where it is not the frames' own."""
    if isinstance(size, tuple):
        return size
    height, width = (side if size == 1 else max(2, 2 * round(side * size / 2)) for side in own)
    return height, width


def _scaled(image: Image, size: Sequence[int]) -> Image:
    """As H.264 levels scale."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(PIL.Image.fromarray(image).resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC))


def _jpeg(image: Image, quality: int) -> bytes:
    """As JPEG levels compress."""
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _h264(images: Sequence[Image], settings: Settings, pristine: tuple[int, ...]) -> tuple[bytes, ...]:
    """The packets of images, in decoding order. pristine: (height, width) of the frames that have the tiles."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    padded = [padded_to_even(image) for image in images]
    height, width, _ = padded[0].shape
    quality = {"crf": f"{settings.crf:g}"} if settings.qp is None else {"qp": str(settings.qp)}
    # regions need aq-mode, which the preset ultrafast switches off; always on, regions change nothing else
    encoder = x264_encoder(
        (height, width), LEVEL_RATE, {"preset": settings.preset, **quality}, {"aq-mode": "1", **dict(settings.options)}
    )
    encoder.colorspace, encoder.color_range = Colorspace.ITU709, ColorRange.MPEG
    convert = rgb_to_yuv()
    marked = _Regions(settings.tiles, (height, width), pristine) if settings.tiles else None
    packets: list[bytes] = []
    try:
        for time, image in enumerate(padded):
            frame = convert(image)
            frame.pts = time
            packets += map(bytes, encoder.encode(frame if marked is None else marked.add(frame)))
        packets += map(bytes, encoder.encode(None))
    except av.FFmpegError as error:
        told = ", ".join(f"{name} {value}" for name, value in (*quality.items(), ("preset", settings.preset), *settings.options))
        raise UserError(f"x264 refuses frames of {width} × {height} pixels with {told}: choose another size or option") from error
    return (_VERSION_NOTE.sub(b"", packets[0], 1), *packets[1:])


class _Regions:
    """FFmpeg's `addroi`: puts offsets of the quantisation parameter beside each frame, for the encoder."""

    def __init__(self, tiles: tuple[tuple[float, ...], ...], size: tuple[int, int], pristine: tuple[int, ...]) -> None:
        from av import VideoFormat
        from av.filter import Graph

        height, width = size
        self._graph = Graph()
        last: Any = self._graph.add_buffer(width=width, height=height, format=VideoFormat("yuv420p"), time_base=1 / LEVEL_RATE)
        for top, left, bottom, right, offset in _rectangles(_per_macroblock(np.array(tiles), size, pristine)):
            box = f"x={left * TILE}:y={top * TILE}:w={(right - left) * TILE}:h={(bottom - top) * TILE}"
            region = self._graph.add("addroi", f"{box}:qoffset={max(-1.0, min(offset / _QPS, 1.0)):.6f}")
            last.link_to(region)
            last = region
        last.link_to(self._graph.add("buffersink"))
        self._graph.configure()

    def add(self, frame: "VideoFrame") -> "VideoFrame":
        self._graph.push(frame)
        marked: VideoFrame = self._graph.pull()  # type: ignore[assignment]
        marked.pts = frame.pts
        return marked


def _per_macroblock(tiles: NDArray[np.float64], size: tuple[int, int], pristine: tuple[int, ...]) -> NDArray[np.float64]:
    """The offset of each macroblock of encoded frames: that of the tile with its centre. The last tiles reach to the edge."""
    rows, columns = (
        np.minimum(((np.arange(-(-side // TILE)) + 0.5) * own / side).astype(np.intp), count - 1)
        for side, own, count in zip(size, pristine, tiles.shape, strict=True)
    )
    return np.asarray(tiles[rows[:, None], columns])


def _rectangles(offsets: NDArray[np.float64]) -> Iterator[tuple[int, int, int, int, float]]:
    """Rectangles (top, left, bottom, right, offset) that cover all macroblocks whose offset is not 0, each once."""
    open_: dict[tuple[int, int, float], int] = {}  # of the rows above: columns and offset of a rectangle, and its first row
    for row, line in enumerate([*offsets.tolist(), []]):
        runs, column = set(), 0
        for offset, group in itertools.groupby(line):
            end = column + len(list(group))
            if offset:
                runs.add((column, end, offset))
            column = end
        for run in [run for run in open_ if run not in runs]:
            yield open_.pop(run), run[0], row, run[1], run[2]
        open_.update({run: row for run in sorted(runs) if run not in open_})
