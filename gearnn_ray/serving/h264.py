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

import math
import re
from collections import deque
from collections.abc import Iterator
from typing import Final, cast

import av
import numpy as np
from av.sidedata.encparams import VideoEncParams
from av.sidedata.sidedata import SideData, SideDataContainer, Type

from gearnn_ray.core.errors import UserError

__all__ = ["DECODER_OPTIONS", "H264Quality", "picture_qp", "read_h264", "x264_crf"]

DECODER_OPTIONS: Final = {"export_side_data": "venc_params"}
"""Options of a PyAV decoder that exports QPs. Assign them to `codec_context.options` before the first frame."""
_X264 = bytes.fromhex("dc45e9bde6d948b7962cd820d923eeef")  # UUID of the SEI message that holds x264's settings
_WINDOW = 64  # pictures: I, P and B pictures differ by several QP, so the mean needs some of each
_DELTA_QP = 4  # index of delta_qp among the int32 fields of FFmpeg's AVVideoBlockParams: x, y, width, height, delta_qp


class H264Quality:
    """The rate factor and the mean QP of one stream, from the frames added so far.

    Args:
        pictures: number of latest pictures that the mean covers; None for all.
    """

    def __init__(self, pictures: int | None = _WINDOW) -> None:
        self.crf: float | None = None
        """The constant rate factor that x264 wrote into the stream; None if there is none."""
        self._settings: bytes | None = None
        self._recent: deque[float] = deque(maxlen=pictures)

    @property
    def mean_qp(self) -> float | None:
        """Mean macroblock QP of the latest pictures; None before the first."""
        return math.fsum(self._recent) / len(self._recent) if self._recent else None

    def add(self, frame: av.VideoFrame) -> None:
        """Add the next frame. Other settings of x264 begin a new encoding, and earlier pictures no longer count."""
        settings = _x264_settings(frame)
        if settings is not None and settings != self._settings:
            self._settings, self.crf = settings, _crf(settings)
            self._recent.clear()
        if (qp := picture_qp(frame)) is not None:
            self._recent.append(qp)


def picture_qp(frame: av.VideoFrame) -> float | None:
    """Mean luma QP of a frame's macroblocks, at most 51. A skipped macroblock has the QP of the one coded before it.

    None if the frame has no QPs (no H.264, or decoded without `DECODER_OPTIONS`) or if FFmpeg concealed damage in it.
    """
    for params in _side_data(frame):
        if isinstance(params, VideoEncParams) and params.nb_blocks and not frame.is_corrupt:
            ints = params.block_size // 4
            blocks = np.frombuffer(memoryview(params), np.int32, params.nb_blocks * ints, params.blocks_offset)
            # FFmpeg counts from 0, but QPs start at -6 for each bit above 8
            return float(params.qp + blocks[_DELTA_QP::ints].mean()) - 6 * (frame.format.components[0].bits - 8)
    return None


def x264_crf(frame: av.VideoFrame) -> float | None:
    """The constant rate factor in x264's settings, which are attached to the first frame of an encoding; else None.

    Also None for an encoding with a VBV, because there the rate factor is only an upper bound of the quality.
    """
    settings = _x264_settings(frame)
    return None if settings is None else _crf(settings)


def read_h264(data: bytes) -> H264Quality:
    """Decode a whole Annex B stream and return its rate factor and the mean QP of all pictures.

    Raises `UserError` if the data is damaged, is no H.264, or has no picture with its parameter sets.
    """
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    # without the transforms the pixels are wrong, but the QPs are right and decoding is faster
    decoder.options = {**DECODER_OPTIONS, "skip_loop_filter": "all", "skip_idct": "all"}
    quality = H264Quality(pictures=None)
    try:
        for packet in (*decoder.parse(data), *decoder.parse(), None):
            for frame in decoder.decode(packet):
                quality.add(frame)
                if frame.is_corrupt:
                    raise UserError(f"a picture in these {len(data)} bytes of H.264 is damaged: encode the stream again.")
    except av.FFmpegError as error:
        raise UserError(f"{len(data)} bytes are not H.264, or are damaged: send a whole Annex B stream.") from error
    if quality.mean_qp is None:
        raise UserError(f"{len(data)} bytes contain no H.264 picture: send a whole Annex B stream.")
    return quality


def _x264_settings(frame: av.VideoFrame) -> bytes | None:
    for message in _side_data(frame):
        if message.type is Type.SEI_UNREGISTERED and (text := bytes(message)).startswith(_X264):
            return text[len(_X264) :]
    return None


def _crf(settings: bytes) -> float | None:
    crf = re.search(rb" crf=(-?\d{1,2}(?:\.\d+)?)[ \0]", settings + b" ")
    return float(crf[1]) if crf and b" rc=crf " in settings and b" vbv_maxrate=" not in settings else None


def _side_data(frame: av.VideoFrame) -> Iterator[SideData]:
    """All side data of a frame. PyAV's type stubs name motion vectors only."""
    return iter(cast(SideDataContainer, frame.side_data))
