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
from collections.abc import Mapping, Sequence
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

_Typed = tuple[int, float]  # a picture's type and QP


class H264Quality:
    """The rate factor and the mean QP of one stream, from the frames added so far.

    Both follow a stream that changes on the keyframe where it does so: other settings of x264, another frame size, or a QP that
    differs from the mean by more than the types of the pictures explain. Earlier pictures then no longer count.
    """

    def __init__(self) -> None:
        self.crf: float | None = None
        """The constant rate factor that x264 wrote into the stream; None if there is none."""
        self._settings: bytes | None = None
        self._size: tuple[int, int] | None = None
        self._recent: deque[_Typed] = deque(maxlen=_WINDOW)  # since the last change
        self._types: deque[int] = deque(maxlen=_WINDOW)  # also of pictures before it: the mix that the mean stands for
        self._offsets: Mapping[int, float] = _OFFSETS

    @property
    def mean_qp(self) -> float | None:
        """Mean macroblock QP of the latest 64 pictures; None before the first.

        After a change it is what the pictures since then would have had with the types of the latest 64.
        """
        if not self._recent:
            return None
        if len(self._recent) == len(self._types):
            return statistics.fmean(qp for _, qp in self._recent)
        offsets = _offsets(self._recent, self._offsets)
        return _as_p(self._recent, offsets) + statistics.fmean(offsets.get(kind, 0.0) for kind in self._types)

    def add(self, frame: av.VideoFrame) -> None:
        """Add the next frame, in display order."""
        settings, size, qp = _x264_settings(frame), (frame.height, frame.width), picture_qp(frame)
        resized = self._size not in (None, size)
        if settings is None and not resized:  # only an encoding's first frame has them
            settings = self._settings
        picture = None if qp is None else (int(frame.pict_type), qp)
        if resized or settings != self._settings or (frame.key_frame and picture and self._jumps(picture)):
            self._offsets = _offsets(self._recent, self._offsets)
            self._recent.clear()
        if settings != self._settings:
            self._settings, self.crf = settings, None if settings is None else _crf(settings)
        self._size = size
        if picture:
            self._recent.append(picture)
            self._types.append(picture[0])

    def _jumps(self, picture: _Typed) -> bool:
        offsets = _offsets(self._recent, self._offsets)
        return bool(self._recent) and abs(_as_p([picture], offsets) - _as_p(self._recent, offsets)) > _JUMP


def _as_p(pictures: Sequence[_Typed], offsets: Mapping[int, float]) -> float:
    """The mean QP that these pictures would have as P pictures."""
    return statistics.fmean(qp - offsets.get(kind, 0.0) for kind, qp in pictures)


def _offsets(pictures: Sequence[_Typed], usual: Mapping[int, float]) -> dict[int, float]:
    """How much the QPs of I and B pictures are above those of P pictures: as measured on these, drawn to the usual values."""
    qps = {kind: [qp for other, qp in pictures if other == kind] for kind in (_I, _P, _B)}
    offsets = dict(usual)
    for kind in usual:
        if count := min(len(qps[kind]), len(qps[_P])):
            measured = statistics.fmean(qps[kind]) - statistics.fmean(qps[_P])
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
