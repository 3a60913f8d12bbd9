"""How coarsely an H.264 stream was quantised, read off its headers: nothing is decoded.

Parses what ITU-T H.264 (clause numbers below are its) puts before a slice's data: parameter sets and slice headers
up to `slice_qp_delta`, and the text that x264 leaves in its streams. Any profile, entropy coder, chroma format, frame
or field, number of slices. Scalable and multiview layers are passed over: their base view is read.

Knows nothing about pixels, levels or containers; a demuxer's or encoder's packets are what it reads.
"""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from gearnn_ray.core.errors import UserError

__all__ = ["H264Reader", "H264Stream", "Picture", "read_h264"]

_START = b"\0\0\1"
_SLICE, _PARTITION_A, _IDR, _SEI, _SPS, _PPS = 1, 2, 5, 6, 7, 8
_HEADER_BYTES = 8192  # of a slice, more than any header has; the rest of it is not looked at
_MOST_BLOCKS = 139_264  # macroblocks of a picture at level 6.2, Table A-1
_WINDOW = 64  # pictures: I, P and B pictures differ by several QP, so a mean wants a few of each
_HIGH_PROFILES = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}
_X264 = bytes.fromhex("dc45e9bde6d948b7962cd820d923eeef")  # the UUID of its SEI message


@dataclass(frozen=True)
class Picture:
    """One coded picture: a frame, or one field where a stream codes fields apart."""

    qp: float
    """Mean luma QP of its slices' headers, up to 51; macroblocks vary about it."""
    slice_type: str
    """I, P or B: what its freest slice may refer to."""
    slices: int


@dataclass(frozen=True)
class H264Stream:
    """What the headers of a whole stream say."""

    height: int
    width: int
    pictures: tuple[Picture, ...]
    """In the order of the stream, which is not that of display; at least one."""
    crf: float | None
    """The constant rate factor that x264 wrote into the stream, the last one where there are several."""

    @property
    def mean_qp(self) -> float:
        """Mean luma QP over pictures."""
        return math.fsum(picture.qp for picture in self.pictures) / len(self.pictures)


def read_h264(data: bytes, extradata: bytes = b"") -> H264Stream:
    """Read a whole stream: Annex B (start codes) or length-prefixed NAL units as in MP4.

    `extradata` is what a container keeps apart: an `avcC` record, or parameter sets in Annex B. Raises `UserError`
    where the data is damaged, is no H.264, or has no picture with its parameter sets.
    """
    reader = H264Reader(extradata)
    pictures = reader.feed(data)
    if not pictures:
        raise UserError(
            f"{len(data)} bytes hold no H.264 picture with its parameter sets: send a stream from its start, "
            "or the container's avcC record with it."
        )
    return H264Stream(reader.height, reader.width, pictures, reader.crf)


class H264Reader:
    """Reads a stream packet by packet, in memory that does not grow.

    A packet is what a demuxer or an encoder hands out: whole pictures, Annex B or length-prefixed. Raises
    `UserError` for an `extradata` that is no `avcC` record and no Annex B.
    """

    def __init__(self, extradata: bytes = b"") -> None:
        self.height = 0
        """Of the latest picture, cropped, in pixels; 0 before the first."""
        self.width = 0
        self.crf: float | None = None
        """The constant rate factor that x264 wrote into the stream."""
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._sps: dict[int, _Sps] = {}
        self._pps: dict[int, _Pps] = {}
        self._length_bytes = 0  # 0: found out for each packet
        if extradata[:1] == b"\1":
            self._length_bytes, sets = _read_avcc(extradata)
            for nal in sets:
                self._parameters(nal)
        elif extradata:
            self.feed(extradata)

    @property
    def mean_qp(self) -> float | None:
        """Mean luma QP of the latest pictures, 64 at most; None before the first."""
        return math.fsum(self._recent) / len(self._recent) if self._recent else None

    def feed(self, packet: bytes) -> tuple[Picture, ...]:
        """The pictures of one packet: usually one, and none before the parameter sets that they need.

        Raises `UserError` where the packet is damaged; the next one can be fed all the same.
        """
        pictures: list[list[_Slice]] = []
        last: tuple[int, ...] | None = None
        for nal in _nal_units(packet, self._length_bytes):
            if nal[0] & 31 not in (_SLICE, _PARTITION_A, _IDR):
                self._parameters(nal)
            elif (found := self._slice(nal)) is not None:
                if found.picture != last:
                    pictures.append([])
                    last = found.picture
                pictures[-1].append(found)
        finished = tuple(_picture(slices) for slices in pictures)
        self._recent.extend(picture.qp for picture in finished)
        return finished

    def _parameters(self, nal: bytes) -> None:
        """Take in a parameter set or x264's message; other NAL units say nothing we need."""
        kind = nal[0] & 31
        if kind == _SPS:
            number, sps = _read_sps(_Bits(_payload(nal)))
            if self._sps.get(number, sps) != sps:  # another encoding: what was known of the last is void
                self.crf = None
                self._recent.clear()
            self._sps[number] = sps
        elif kind == _PPS:
            number, pps = _read_pps(_Bits(_payload(nal)))
            self._pps[number] = pps
        elif kind == _SEI:
            options = _x264_options(_payload(nal))
            if options is not None:
                self.crf = _crf(options)

    def _slice(self, nal: bytes) -> "_Slice | None":
        bits = _Bits(_payload(nal[:_HEADER_BYTES]))
        bits.ue("first_mb_in_slice", _MOST_BLOCKS)
        kind = bits.ue("slice_type", 9) % 5
        number = bits.ue("pic_parameter_set_id", 255)
        pps = self._pps.get(number)
        sps = self._sps.get(pps.sps) if pps else None
        if pps is None or sps is None:
            return None
        self.height, self.width = sps.height, sps.width
        return _read_slice(bits, nal[0], kind, number, pps, sps)


@dataclass(frozen=True)
class _Sps:
    """What slice headers and users need of a sequence parameter set, 7.3.2.1.1."""

    height: int
    width: int
    separate_planes: bool
    chroma: bool  # ChromaArrayType is not 0
    least_qp: int  # below 0 with more than 8 bits
    frame_num_bits: int
    order_type: int
    order_bits: int
    order_deltas: bool
    frames_only: bool


@dataclass(frozen=True)
class _Pps:
    """What slice headers need of a picture parameter set, 7.3.2.2."""

    sps: int
    cabac: bool
    order_in_frame: bool
    references: tuple[int, int]  # num_ref_idx_l0/l1_default_active
    weighted: bool
    weighted_b: bool
    qp: int
    redundant: bool


@dataclass(frozen=True)
class _Slice:
    qp: int
    kind: int
    picture: tuple[int, ...]
    """7.4.1.2.4: where any of these differs from the slice before, another picture begins."""


class _Bits:
    """Reads the bits of a raw byte sequence payload, 7.2 and 9.1."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._at = 0

    def u(self, bits: int) -> int:
        """An unsigned number of so many bits, 32 at most."""
        end = self._at + bits
        if end > 8 * len(self._payload):
            raise UserError("an H.264 header ends in the middle, expected a whole one: send whole packets.")
        window = int.from_bytes(self._payload[self._at >> 3 : (end + 7) >> 3])
        self._at = end
        return (window >> (-end & 7)) & ((1 << bits) - 1)

    def flag(self) -> bool:
        return self.u(1) == 1

    def ue(self, name: str, most: int) -> int:
        """An unsigned Exp-Golomb code."""
        zeros = 0
        while not self.u(1):
            zeros += 1
            if zeros > 32:
                raise _damaged(name, "no Exp-Golomb code")
        value = (1 << zeros) - 1 + self.u(zeros)
        if value > most:
            raise _damaged(name, f"{value} where {most} is the most")
        return value

    def se(self, name: str, most: int = 2**31) -> int:
        """A signed Exp-Golomb code."""
        code = self.ue(name, 2 * most)
        return (code + 1) // 2 if code % 2 else -(code // 2)


def _damaged(name: str, found: str) -> UserError:
    return UserError(f"an H.264 stream has {found} in {name}: it is damaged, or no H.264; encode it anew.")


def _nal_units(data: bytes, length_bytes: int) -> Iterator[bytes]:
    """The NAL units, none of them empty: after lengths of so many bytes each, or 0: find out how they are parted."""
    units = _after_lengths(data, length_bytes or 4)
    if units is None and length_bytes == 0:
        before, *rest = data.split(_START)
        units = [unit.rstrip(b"\0") for unit in rest] if not before.strip(b"\0") else None
    if units is None:
        expected = f"lengths of {length_bytes} bytes each" if length_bytes else "start codes or lengths of 4 bytes"
        raise UserError(f"{len(data)} bytes are no H.264, expected NAL units after {expected}: send a whole packet.")
    for unit in filter(None, units):
        if unit[0] & 0x80:
            raise _damaged("forbidden_zero_bit", "a 1")
        yield unit


def _after_lengths(data: bytes, length_bytes: int) -> list[bytes] | None:
    """The units, where every length leads to the next one and the last to the end.

    The four bytes of an Annex B start code would be a length too, but lead nowhere.
    """
    units, at = [], 0
    while at < len(data):
        start = at + length_bytes
        at = start + int.from_bytes(data[at:start])
        if at > len(data) or start > len(data):
            return None
        units.append(data[start:at])
    return units


def _read_avcc(record: bytes) -> tuple[int, list[bytes]]:
    """ISO/IEC 14496-15, 5.3.3.1: bytes of a length, and the parameter sets."""
    sets, at = [], 5
    for mask in (31, 255):  # of the number of SPS, of PPS
        count, at = (record[at] & mask if at < len(record) else 0), at + 1
        for _ in range(count):
            start = at + 2
            at = start + int.from_bytes(record[at:start])
            sets.append(record[start:at])
    if at > len(record) or not all(sets):
        raise UserError(f"an avcC record of {len(record)} bytes ends too early: take it from the container again.")
    return (record[4] & 3) + 1, sets


def _payload(nal: bytes) -> bytes:
    """The bytes after the header of one byte, without emulation prevention (7.3.1)."""
    return nal[1:].replace(b"\0\0\3", b"\0\0")


def _read_sps(bits: _Bits) -> tuple[int, _Sps]:
    profile = bits.u(8)
    bits.u(16)
    number = bits.ue("seq_parameter_set_id", 31)
    chroma_format, separate_planes, depth = 1, False, 8
    if profile in _HIGH_PROFILES:
        chroma_format = bits.ue("chroma_format_idc", 3)
        separate_planes = chroma_format == 3 and bits.flag()
        depth = 8 + bits.ue("bit_depth_luma_minus8", 6)
        bits.ue("bit_depth_chroma_minus8", 6)
        bits.flag()
        if bits.flag():
            for matrix in range(12 if chroma_format == 3 else 8):
                if bits.flag():
                    _skip_scaling_list(bits, 16 if matrix < 6 else 64)
    frame_num_bits = 4 + bits.ue("log2_max_frame_num_minus4", 12)
    order_type, order_bits, order_deltas = bits.ue("pic_order_cnt_type", 2), 0, False
    if order_type == 0:
        order_bits = 4 + bits.ue("log2_max_pic_order_cnt_lsb_minus4", 12)
    elif order_type == 1:
        order_deltas = not bits.flag()
        bits.se("offset_for_non_ref_pic")
        bits.se("offset_for_top_to_bottom_field")
        for _ in range(bits.ue("num_ref_frames_in_pic_order_cnt_cycle", 255)):
            bits.se("offset_for_ref_frame")
    bits.ue("max_num_ref_frames", 16)
    bits.flag()
    across = 1 + bits.ue("pic_width_in_mbs_minus1", _MOST_BLOCKS)
    down = 1 + bits.ue("pic_height_in_map_units_minus1", _MOST_BLOCKS)
    frames_only = bits.flag()
    fields = 1 if frames_only else 2
    if across * down * fields > _MOST_BLOCKS:
        raise _damaged("pic_width_in_mbs_minus1", f"a picture of {16 * across} x {16 * down * fields} pixels")
    if not frames_only:
        bits.flag()
    bits.flag()
    chroma = chroma_format != 0 and not separate_planes
    width, height = 16 * across, 16 * down * fields
    if bits.flag():
        unit_x = 2 if chroma and chroma_format in (1, 2) else 1
        unit_y = (2 if chroma and chroma_format == 1 else 1) * fields
        left, right, top, bottom = (
            bits.ue(f"frame_crop_{side}_offset", 2**16) for side in ("left", "right", "top", "bottom")
        )
        width -= unit_x * (left + right)
        height -= unit_y * (top + bottom)
    if min(width, height) < 1:
        raise _damaged("frame_cropping", "nothing left of the picture")
    return number, _Sps(
        height=height,
        width=width,
        separate_planes=separate_planes,
        chroma=chroma,
        least_qp=-6 * (depth - 8),
        frame_num_bits=frame_num_bits,
        order_type=order_type,
        order_bits=order_bits,
        order_deltas=order_deltas,
        frames_only=frames_only,
    )


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    """7.3.2.1.1.1: a next scale of 0 repeats the last one to the end."""
    scale = 8
    for _ in range(size):
        scale = (scale + bits.se("delta_scale", 128)) % 256
        if scale == 0:
            return


def _read_pps(bits: _Bits) -> tuple[int, _Pps]:
    number = bits.ue("pic_parameter_set_id", 255)
    sps = bits.ue("seq_parameter_set_id", 31)
    cabac = bits.flag()
    order_in_frame = bits.flag()
    groups = 1 + bits.ue("num_slice_groups_minus1", 7)
    if groups > 1:
        _skip_slice_groups(bits, groups)
    references = (1 + bits.ue("num_ref_idx_l0_default", 31), 1 + bits.ue("num_ref_idx_l1_default", 31))
    weighted, weighted_b = bits.flag(), bits.u(2) == 1
    qp = 26 + bits.se("pic_init_qp_minus26", 62)
    bits.se("pic_init_qs_minus26", 26)
    bits.se("chroma_qp_index_offset", 12)
    bits.flag()
    bits.flag()
    redundant = bits.flag()
    return number, _Pps(sps, cabac, order_in_frame, references, weighted, weighted_b, qp, redundant)


def _skip_slice_groups(bits: _Bits, groups: int) -> None:
    match bits.ue("slice_group_map_type", 6):
        case 0:
            for _ in range(groups):
                bits.ue("run_length_minus1", _MOST_BLOCKS)
        case 2:
            for _ in range(2 * (groups - 1)):
                bits.ue("top_left or bottom_right", _MOST_BLOCKS)
        case 3 | 4 | 5:
            bits.flag()
            bits.ue("slice_group_change_rate_minus1", _MOST_BLOCKS)
        case 6:
            for _ in range(1 + bits.ue("pic_size_in_map_units_minus1", _MOST_BLOCKS)):
                bits.u((groups - 1).bit_length())


def _read_slice(bits: _Bits, header: int, kind: int, number: int, pps: _Pps, sps: _Sps) -> _Slice | None:
    """A slice header, 7.3.3, from after pic_parameter_set_id. None: a redundant copy of another slice."""
    reference, idr = header >> 5 & 3, header & 31 == _IDR
    is_p, is_b = kind in (0, 3), kind == 1
    if sps.separate_planes:
        bits.u(2)
    frame_num = bits.u(sps.frame_num_bits)
    field = bottom = False
    if not sps.frames_only:
        field = bits.flag()
        bottom = field and bits.flag()
    idr_id = bits.ue("idr_pic_id", 65535) if idr else -1
    order = [0, 0]
    if sps.order_type == 0:
        order[0] = bits.u(sps.order_bits)
        if pps.order_in_frame and not field:
            order[1] = bits.se("delta_pic_order_cnt_bottom")
    elif sps.order_deltas:
        order[0] = bits.se("delta_pic_order_cnt[0]")
        if pps.order_in_frame and not field:
            order[1] = bits.se("delta_pic_order_cnt[1]")
    if pps.redundant and bits.ue("redundant_pic_cnt", 127):
        return None
    if is_b:
        bits.flag()
    references = pps.references[: 1 + is_b] if is_p or is_b else ()
    if references and bits.flag():
        references = tuple(1 + bits.ue("num_ref_idx_active_minus1", 31) for _ in references)
    for _ in references:
        _skip_list_modification(bits)
    if (pps.weighted and is_p) or (pps.weighted_b and is_b):
        _skip_weights(bits, references, sps.chroma)
    if reference:
        _skip_marking(bits, idr)
    if pps.cabac and references:
        bits.ue("cabac_init_idc", 2)
    qp = pps.qp + bits.se("slice_qp_delta", 51 + 62)
    if not sps.least_qp <= qp <= 51:
        raise _damaged("slice_qp_delta", f"a QP of {qp}")
    return _Slice(qp, kind, (frame_num, number, field, bottom, reference == 0, idr, idr_id, *order))


def _skip_list_modification(bits: _Bits) -> None:
    """7.3.3.1"""
    if bits.flag():
        while bits.ue("modification_of_pic_nums_idc", 3) != 3:
            bits.ue("abs_diff_pic_num_minus1", 2**17)


def _skip_weights(bits: _Bits, references: tuple[int, ...], chroma: bool) -> None:
    """7.3.3.2"""
    bits.ue("luma_log2_weight_denom", 7)
    if chroma:
        bits.ue("chroma_log2_weight_denom", 7)
    for _ in range(sum(references)):
        for numbers in (2, 4) if chroma else (2,):
            if bits.flag():
                for _ in range(numbers):
                    bits.se("weight or offset", 128)


def _skip_marking(bits: _Bits, idr: bool) -> None:
    """7.3.3.3"""
    if idr:
        bits.u(2)
    elif bits.flag():
        while (operation := bits.ue("memory_management_control_operation", 6)) != 0:
            for _ in range({3: 2, 5: 0}.get(operation, 1)):
                bits.ue("memory_management_control_operation", 2**17)


def _x264_options(payload: bytes) -> bytes | None:
    """What x264 says of itself in a user_data_unregistered SEI message, 7.3.2.3.1 and D.1.7."""
    at = 0
    while at + 2 < len(payload):  # the last byte holds the trailing bits
        kind, at = _sei_number(payload, at)
        size, at = _sei_number(payload, at)
        if kind == 5 and payload[at : at + 16] == _X264:
            return payload[at + 16 : at + size]
        at += size
    return None


def _sei_number(payload: bytes, at: int) -> tuple[int, int]:
    """A sum of bytes up to the first that is not 255, and where it ends."""
    value = 0
    while at < len(payload):
        value, at = value + payload[at], at + 1
        if payload[at - 1] != 255:
            break
    return value, at


def _crf(text: bytes) -> float | None:
    """The constant rate factor. With a VBV it only bounds the quality, and the slices' QP says more."""
    options = dict(word.partition("=")[::2] for word in text.decode("latin-1").rstrip("\0").split())
    if options.get("rc") != "crf" or "vbv_maxrate" in options:
        return None
    with suppress(ValueError, KeyError):
        crf = float(options["crf"])
        return crf if abs(crf) < 100 else None
    return None


def _picture(slices: list[_Slice]) -> Picture:
    kinds = {part.kind for part in slices}
    slice_type = "B" if 1 in kinds else "P" if kinds & {0, 3} else "I"
    return Picture(math.fsum(part.qp for part in slices) / len(slices), slice_type, len(slices))
