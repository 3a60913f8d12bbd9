"""Reads how strongly an H.264 stream was compressed, from the side data of decoded frames.

With `DECODER_OPTIONS`, PyAV attaches the quantisation parameters (QP) of the macroblocks to every frame. x264 also writes
its settings into the stream, which gives the constant rate factor (CRF) exactly:

    with av.open("film.mp4") as container:
        container.streams.video[0].codec_context.options = DECODER_OPTIONS
        quality = H264Quality()
        for frame in container.decode(video=0):
            quality.add(frame)
            evidence = evidence_of(frame.to_ndarray(format="rgb24"), qp=quality.mean_qp, crf=quality.crf)

Works for every container, profile and bit depth that FFmpeg decodes on the CPU; hardware decoders export no QPs. The QP in
slice headers would need no decoding, but it is the QP of a slice's first macroblock and not of the picture.
"""

import re
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import av
from av.sidedata.sidedata import Type
from av.video.frame import PictureType

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.h264_codec import DECODER_OPTIONS, picture_qp, side_data

__all__ = ["DECODER_OPTIONS", "H264Quality", "StreamQuality", "picture_qp", "read_h264", "x264_crf"]

_X264 = bytes.fromhex("dc45e9bde6d948b7962cd820d923eeef")  # UUID of the SEI message that holds x264's settings
_WINDOW = 64  # pictures: I, P and B pictures differ by several QP, so the mean needs some of each
_I, _P, _B = (int(kind) for kind in (PictureType.I, PictureType.P, PictureType.B))
_OFFSETS: Final = {_I: -2.9, _B: 2.3}  # QP above that of P pictures, from x264's default ratios 1.4 and 1.3: 6 log2(ratio)
_TRUSTED = 4  # pictures of a type that count as much as x264's default ratios
_JUMP = 3.5  # QP between a keyframe and the mean, both as P pictures: more than within one encoding of one scene (docs/log.md)

_ALL = 16  # pictures after a change that are all read: reading one takes a tenth of the time of decoding 768×432 pixels...
_EVERY = 7  # ... and later only one of so many is: a prime, so that it meets all pictures of the usual patterns of types

_Typed = tuple[int, float]  # a picture's type and QP
_Sums = dict[int, tuple[int, float]]  # by type of picture


class H264Quality:
    """The rate factor and the mean QP of one stream, from the frames added so far.

    Both follow a stream that changes on the keyframe where it does so: other settings of x264, another frame size, or a QP that
    differs from the mean by more than the types of the pictures explain. Earlier pictures then no longer count. The QPs of the
    first 16 pictures after a change are read, then those of keyframes and of every seventh picture, or none of these where the
    rate factor is known.
    """

    def __init__(self) -> None:
        self.crf: float | None = None
        """The constant rate factor that x264 wrote into the stream; None if there is none."""
        self.mean_qp: float | None = None
        """Mean macroblock QP of the latest 64 pictures, from those that were read; None before the first.

        After a change it is what the pictures since then would have had with the types of the latest 64.
        """
        self._settings: bytes | None = None
        self._size: tuple[int, int] | None = None
        self._pictures = 0  # since the last change
        self._recent: deque[_Typed | None] = deque(maxlen=_WINDOW)  # since the last change; None for those that were not read
        self._types: deque[int] = deque(maxlen=_WINDOW)  # also of pictures before it: the mix that the mean stands for
        self._offsets: Mapping[int, float] = _OFFSETS

    def add(self, frame: av.VideoFrame) -> None:
        """Add the next frame, in display order."""
        size, keyframe = (frame.height, frame.width), frame.key_frame
        due = self._pictures < _ALL or (self.crf is None and (keyframe or self._pictures % _EVERY == 0))
        if due or keyframe or size != self._size:
            self._read(frame, size, keyframe, due)
        else:
            self._skip(frame)
        self._pictures += 1

    def _read(self, frame: av.VideoFrame, size: tuple[int, int], keyframe: bool, due: bool) -> None:
        """due: whether the QP is read even where nothing has changed."""
        resized, settings = size != self._size, self._settings
        if keyframe or resized or self._pictures < _ALL:
            # only an encoding's first frame has them
            settings = _x264_settings(frame) or (None if resized else settings)
        changed = resized or settings != self._settings
        qp = picture_qp(frame) if due or changed else None
        picture = None if qp is None else (int(frame.pict_type), qp)
        if changed or (keyframe and picture and self._jumps(picture)):
            self._offsets = _offsets(_sums(self._recent), self._offsets)
            self._recent.clear()
            self._pictures, self.mean_qp = 0, None
        if settings != self._settings:
            self._settings, self.crf = settings, None if settings is None else _crf(settings)
        self._size = size
        if picture:
            self._recent.append(picture)
            self._types.append(picture[0])
            self.mean_qp = self._mean()
        elif not due:
            self._skip(frame)

    def _skip(self, frame: av.VideoFrame) -> None:
        self._recent.append(None)
        self._types.append(int(frame.pict_type))

    def _jumps(self, picture: _Typed) -> bool:
        sums = _sums(self._recent)
        offsets = _offsets(sums, self._offsets)
        return bool(sums) and abs(_as_p(_sums([picture]), offsets) - _as_p(sums, offsets)) > _JUMP

    def _mean(self) -> float:
        sums = _sums(self._recent)
        if None not in self._recent and len(self._recent) == len(self._types):
            return _as_p(sums, {})
        offsets = _offsets(sums, self._offsets)
        mix = sum(offset * self._types.count(kind) for kind, offset in offsets.items()) / len(self._types)
        return _as_p(sums, offsets) + mix


def _sums(pictures: Iterable[_Typed | None]) -> _Sums:
    """How many pictures of each type there are, and the sum of their QPs.

    One that was not read, which is no keyframe, counts as the last one that was read and not intra coded.
    """
    sums: _Sums = {}
    last = None
    for read in pictures:
        if picture := read or last:
            kind, qp = picture
            count, total = sums.get(kind, (0, 0.0))
            sums[kind] = count + 1, total + qp
            if kind != _I:
                last = picture
    return sums


def _as_p(sums: _Sums, offsets: Mapping[int, float]) -> float:
    """The mean QP that these pictures would have as P pictures."""
    total = sum(total - count * offsets.get(kind, 0.0) for kind, (count, total) in sums.items())
    return total / sum(count for count, _ in sums.values())


def _offsets(sums: _Sums, usual: Mapping[int, float]) -> dict[int, float]:
    """How much the QPs of I and B pictures are above those of P pictures: as measured on these, drawn to the usual values."""
    offsets = dict(usual)
    if _P not in sums:
        return offsets
    of_p, total_of_p = sums[_P]
    for kind in usual.keys() & sums.keys():
        of_kind, total = sums[kind]
        count, measured = min(of_kind, of_p), total / of_kind - total_of_p / of_p
        offsets[kind] = (_TRUSTED * usual[kind] + count * measured) / (_TRUSTED + count)
    return offsets


class StreamQuality(NamedTuple):
    """Of a whole stream: the last rate factor that x264 wrote into it, if any, and the mean macroblock QP of all pictures."""

    crf: float | None
    mean_qp: float


def x264_crf(frame: av.VideoFrame) -> float | None:
    """The constant rate factor in x264's settings, which are attached to the first frame of an encoding; else None.

    Also None for an encoding with a VBV, because there the rate factor is only an upper bound of the quality.
    """
    settings = _x264_settings(frame)
    return None if settings is None else _crf(settings)


def read_h264(data: bytes) -> StreamQuality:
    """Decode a whole Annex B stream and return its rate factor and the mean QP of all pictures.

    Raises `UserError` if the data is damaged, is no H.264, or has no picture with its parameter sets.
    """
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    # without the transforms the pixels are wrong, but the QPs are right and decoding is faster
    decoder.options = {**DECODER_OPTIONS, "skip_loop_filter": "all", "skip_idct": "all"}
    crf, qps = None, list[float]()
    try:
        for packet in (*decoder.parse(data), *decoder.parse(), None):
            for frame in decoder.decode(packet):
                if (settings := _x264_settings(frame)) is not None:
                    crf = _crf(settings)
                if (qp := picture_qp(frame)) is not None:
                    qps.append(qp)
                if frame.is_corrupt:
                    raise UserError(f"a picture in these {len(data)} bytes of H.264 is damaged: encode the stream again.")
    except av.FFmpegError as error:
        raise UserError(f"{len(data)} bytes are not H.264, or are damaged: send a whole Annex B stream.") from error
    if not qps:
        raise UserError(f"{len(data)} bytes contain no H.264 picture: send a whole Annex B stream.")
    return StreamQuality(crf, statistics.fmean(qps))


def _x264_settings(frame: av.VideoFrame) -> bytes | None:
    for message in side_data(frame):
        if message.type is Type.SEI_UNREGISTERED and (text := bytes(message)).startswith(_X264):
            return text[len(_X264) :]
    return None


def _crf(settings: bytes) -> float | None:
    crf = re.search(rb" crf=(-?\d{1,2}(?:\.\d+)?)[ \0]", settings + b" ")
    return float(crf[1]) if crf and b" rc=crf " in settings and b" vbv_maxrate=" not in settings else None
