"""A video from a stranger: recognises its container by the first bytes, checks what it claims, and opens it.

    container = open_segment(body, limits, most_frames=3000)     # a whole segment, checked to its end
    for frame in decoded(container, limits): ...

FFmpeg is told which container it is, opens nothing but these bytes, and has no decoder while it looks for streams: there it would
decode pictures of any size. Everything that is refused is refused with one sentence and an HTTP status.
"""

import io
import re
import struct
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, NoReturn, cast

import av
from av.container import InputContainer

from gearnn_ray.serving.frames import Limits
from gearnn_ray.video.decoding import first_video, packets_of
from gearnn_ray.video.sources import SourceError, sentence_of

__all__ = ["HEAD_BYTES", "Mp4Tables", "SegmentError", "container_of", "open_container", "open_segment"]

HEAD_BYTES: Final = 2 * 188 + 1
"""So many first bytes show what container it is, if there are as many."""
CODECS: Final = {"h264": "H.264", "hevc": "H.265", "vp9": "VP9", "av1": "AV1"}
_SEND = f"send {', '.join(CODECS.values())} in MP4, MPEG-TS, Matroska, WebM, IVF or as Annex B"
_OPTIONS = {
    "codec_whitelist": "none",  # of what looks for streams; `decoded` has a decoder of its own
    "fpsprobesize": "0",
    "analyzeduration": "100000",  # microseconds: a stream that still arrives is not awaited for long
    "max_streams": "64",
}
_MOST_SAMPLES = 1_000_000  # of all tracks of an MP4, and one more for every 8 bytes of it: FFmpeg keeps 60 bytes for each
_MOST_OVERLAP = 4  # how often the packets of a container may use the same bytes


class SegmentError(SourceError):
    """The bytes are not a segment that can be processed. `status` is the matching HTTP status.

    400: damaged; 413: too large; 415: of another type; 422: a video that cannot be used, such as one without a keyframe.
    """

    def __init__(self, sentence: str, status: int = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(sentence)
        self.status = int(status)


def container_of(head: bytes) -> str:
    """FFmpeg's name of the container that begins with these bytes (`HEAD_BYTES` of them, or all). Raises SegmentError (415)."""
    if head[4:8] in (b"ftyp", b"styp", b"moov", b"moof"):
        return "mov"
    if len(head) >= HEAD_BYTES and not head[:HEAD_BYTES:188].strip(b"\x47"):
        return "mpegts"
    for container, signature in (("matroska", b"\x1aE\xdf\xa3"), ("ivf", b"DKIF"), ("obu", b"\x12\x00")):
        if head.startswith(signature):
            return container
    if start := re.match(rb"\0{2,3}\x01(?=..)", head, re.DOTALL):
        return _annex_b(*head[start.end() : start.end() + 2])
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith((b"#EXTM3U", b"<MPD")) or (text.startswith(b"<?xml") and b"<MPD" in text):
        kind = "HLS" if text.startswith(b"#") else "DASH"
        _refuse(f"the body is a playlist ({kind}), and no address is opened here: send the bytes of its segments", 415)
    raise _unknown(f"{head[:8].hex(' ')}, which is no video container")


def _annex_b(first: int, second: int) -> str:
    """The codec whose first NAL unit has a header of these bytes."""
    if second == 1 and first >> 1 in (*range(16, 22), *range(32, 36), 39):  # its pictures that begin a stream, parameters, SEI
        return "hevc"
    if first < 0x80 and first & 31 in (1, 5, 6, 7, 8, 9):
        return "h264"
    raise _unknown(f"a start code and {first:02x}, which is neither H.264 nor H.265")


def open_segment(data: bytes, limits: Limits, most_frames: int) -> InputContainer:
    """A whole segment, opened after all its packets were looked at; nothing of it is decoded here.

    limits: `pixels` and `shortest_side` of a frame. Raises SegmentError, or another SourceError, where the segment is empty, is
    no video, ends before what its container declares, has more frames, or larger ones, or does not begin with a keyframe.
    """
    if not data:
        raise SegmentError("the body is empty: expected a segment of a video")
    container = container_of(data[:HEAD_BYTES])
    _check_complete(data, container)
    if container == "mov":
        Mp4Tables().add(data)
    with open_container(io.BytesIO(data), container, limits) as opened:
        _check_packets(opened, len(data), most_frames)
    return open_container(io.BytesIO(data), container, limits)


def open_container(file: Any, container: str, limits: Limits) -> InputContainer:
    """Open a file object as this container (`container_of`). Raises SegmentError, or another SourceError, for anything but a
    video of a known codec and of an allowed size, as far as the container says.
    """

    def refuse(url: str, flags: int, options: dict[str, str]) -> NoReturn:
        raise PermissionError(f"{url} may not be opened")

    try:
        opened = cast(InputContainer, av.open(file, format=container, options=_OPTIONS, io_open=refuse))
    except (av.FFmpegError, OSError, ValueError) as error:
        whole = ", or its index is missing" if container == "mov" else ""
        raise SegmentError(f"the video cannot be opened ({sentence_of(error)}): it is damaged{whole}") from error
    try:
        _check_codec(opened)
        first_video(opened, limits)
    except BaseException:
        opened.close()
        raise
    return opened


def _check_codec(container: InputContainer) -> None:
    if not container.streams.video:
        raise SegmentError("there is no video in the segment: send one with a video stream", HTTPStatus.UNPROCESSABLE_ENTITY)
    context = container.streams.video[0].codec_context
    codec = "an unknown codec" if context is None else context.codec.canonical_name
    if codec not in CODECS:
        raise SegmentError(f"the video is coded as {codec}: {_SEND}", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)


def _check_packets(container: InputContainer, size: int, most_frames: int) -> None:
    """Read all packets without decoding them."""
    frames = used = 0
    try:
        for packet in packets_of(container):
            if not packet.size:
                continue
            if not frames and not packet.is_keyframe:
                _refuse("the segment does not begin with a keyframe: cut the stream where one is", 422)
            frames, used = frames + 1, used + packet.size
            if frames > most_frames:
                _refuse(f"the segment has more than the {most_frames} frames allowed here: send shorter ones", 413)
            if packet.is_corrupt:
                raise SegmentError(f"the packet of frame {frames - 1} is damaged or cut short: send the whole segment")
            if used > _MOST_OVERLAP * size:
                raise SegmentError(
                    f"the first {frames} packets claim {used} bytes, and the segment has {size}: its index is wrong"
                )
    except (av.FFmpegError, OSError) as error:
        raise SegmentError(f"the segment cannot be read to its end ({sentence_of(error)}): it is damaged") from error
    if not frames:
        raise SegmentError("the segment has no frame, or ends before its first one: send all of it")


def _check_complete(data: bytes, container: str) -> None:
    """Raise SegmentError unless the last element that the container declares ends where the data end."""
    if container not in _SIZES:
        return
    first, size_at = _SIZES[container]
    place = first
    try:
        while place < len(data):
            place += size_at(data, place)
    except (struct.error, IndexError):
        place = len(data) + 1
    if place != len(data):
        raise SegmentError(f"the segment ends within what its container declares, after {len(data)} bytes: send all of it")


def _box_size(data: bytes, place: int) -> int:
    """MP4: of a box on the top level, at least 8."""
    size = int(struct.unpack_from(">I", data, place)[0])
    if size == 1:
        size = int(struct.unpack_from(">Q", data, place + 8)[0])
    return max(size, 8) if size else len(data) - place


def _element_size(data: bytes, place: int) -> int:
    """Matroska: of an element; of one of unknown size its head alone, so that its children follow."""
    name = 9 - data[place].bit_length()
    length = 9 - data[place + name].bit_length()
    if name > 4 or length > 8:
        raise IndexError
    size = int.from_bytes(data[place + name : place + name + length]) & ((1 << 7 * length) - 1)
    unknown = size == (1 << 7 * length) - 1
    return name + length + (0 if unknown else size)


def _ivf_size(data: bytes, place: int) -> int:
    return 12 + int(struct.unpack_from("<I", data, place)[0])


def _obu_size(data: bytes, place: int) -> int:
    """AV1: of an OBU with a size field (LEB128)."""
    header = 2 if data[place] & 4 else 1
    if not data[place] & 2:
        raise IndexError
    size = 0
    for digit in range(8):
        byte = data[place + header + digit]
        size |= (byte & 127) << 7 * digit
        if byte < 128:
            return header + digit + 1 + size
    raise IndexError


# container: where its first element begins, and the size of the element at a place
_SIZES: dict[str, tuple[int, Callable[[bytes, int], int]]] = {
    "mov": (0, _box_size),
    "mpegts": (0, lambda data, place: 188),
    "matroska": (0, _element_size),
    "ivf": (32, _ivf_size),
    "obu": (0, _obu_size),
}


class Mp4Tables:
    """Follows the bytes of an MP4 as they arrive, and refuses tables that claim more samples than any segment has: FFmpeg
    allocates memory for all of them, gigabytes for a table of 20 bytes.
    """

    _TABLES = re.compile(rb"(?:stsz|stz2)(?=.{8}(?P<samples>.{4}))|trun(?=.{4}(?P<run>.{4}))|(?P<packed>cmov)", re.DOTALL)
    _KEPT = 15  # one byte less than a table's name and count

    def __init__(self, seekable: bool = True) -> None:
        """seekable: whether the index may follow the frames, because FFmpeg can go back to them."""
        self._first: tuple[bytes, ...] = (b"moof",) if seekable else (b"moof", b"mdat")  # may not come before the index
        self._bytes = self._samples = 0
        self._head = b""  # of the box whose size is not known yet
        self._left = 0  # bytes of the current box that are still to come
        self._scanned = False
        self._tail = b""

    def add(self, data: bytes) -> None:
        """The next bytes. Raises SegmentError."""
        self._bytes += len(data)
        place = 0
        while place < len(data):
            if not self._left:
                place += self._begin(data[place : place + 16])
                continue
            part = data[place : place + self._left]
            self._left -= len(part)
            place += len(part)
            if self._scanned:
                self._scan(part)

    def _begin(self, data: bytes) -> int:
        """Take of these bytes what belongs to the head of the next box; return how many."""
        wanted = 16 if self._head[:4] == b"\0\0\0\1" else 8
        taken = data[: wanted - len(self._head)]
        self._head += taken
        if len(self._head) == 8 and self._head[:4] == b"\0\0\0\1":
            return len(taken)
        if len(self._head) == wanted:
            size, kind = int.from_bytes(self._head[8:16] or self._head[:4]), self._head[4:8]
            self._left = max(size - wanted, 0) if size else 1 << 63  # 0: to the end
            self._scanned = kind != b"mdat"
            self._tail = self._head = b""
            if kind in self._first:
                _refuse("the MP4 has no index (moov) before its frames: begin with it, as a fragmented MP4 does", 422)
            self._first = () if kind == b"moov" else self._first
        return len(taken)

    def _scan(self, part: bytes) -> None:
        """Find tables by their names, wherever they are: FFmpeg finds them in boxes within boxes of many kinds."""
        text, counted = self._tail + part, 0
        for table in self._TABLES.finditer(text):
            if table["packed"]:
                _refuse("the MP4 has a compressed index: write it without", 422)
            counted = table.end()
            self._samples += int.from_bytes(table["samples"] or table["run"])
            if self._samples > (most := _MOST_SAMPLES + self._bytes // 8):
                _refuse(f"the MP4 claims {self._samples} frames and samples, expected at most {most}: send less at once", 413)
        self._tail = text[max(counted, len(text) - self._KEPT) :]


def _unknown(found: str) -> SegmentError:
    return SegmentError(f"the body begins with {found}: {_SEND}", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)


def _refuse(sentence: str, status: int) -> NoReturn:
    raise SegmentError(sentence, status)
