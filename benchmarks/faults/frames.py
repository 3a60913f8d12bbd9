"""Frames and segments that were damaged on their way: an answer or one sentence, in bounded time and memory."""

import functools
import io
import multiprocessing
import random
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.faults.campaign import Line, Outcome
from benchmarks.faults.memory import peak_reset, peak_since
from gearnn_ray.core.errors import UserError
from gearnn_ray.serving.frames import Limits, read_frame
from gearnn_ray.serving.h264 import read_h264
from gearnn_ray.video.upload import segment_frames
from tests.streams import access_units, encoded, moving

BATCH = 1000
LIMITS = Limits(body_bytes=2**20, pixels=2**18)  # half a megapixel in RGB is 0.75 MiB
MOST_SECONDS, MOST_BYTES = 1.0, 64 * 2**20
"""Of one mutation: its CPU time (a real one takes up to 10 ms), and what it holds beyond what the process held before."""
_ANSWER_SECONDS = 300  # for a batch, on a busy machine; then a mutation hangs


def check_frame(data: bytes) -> None:
    frame = read_frame(data, None, LIMITS)
    height, width, channels = frame.pixels.shape
    assert frame.pixels.dtype == np.uint8
    assert channels == 3
    assert height * width <= LIMITS.pixels
    assert (frame.evidence.height, frame.evidence.width) == (height, width)
    assert 0 <= frame.evidence.luma <= 255.01


def check_png(data: bytes) -> None:
    """With right checksums, so that what they guard is reached."""
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + length]
        parts.append(struct.pack(">I", len(content)) + kind + content + zlib.crc32(kind + content).to_bytes(4))
        place += 12 + length
    check_frame(b"".join(parts))


def check_segment(data: bytes) -> None:
    for frame in segment_frames(data, LIMITS, 100):
        height, width, _ = frame.pixels.shape
        assert height * width <= LIMITS.pixels
        assert 0 <= frame.evidence.luma <= 255.01


def check_stream(data: bytes) -> None:
    assert -36 <= read_h264(data).mean_qp <= 51


@dataclass(frozen=True)
class Kind:
    """A whole file, and how one is read; `check` raises UserError for a refusal, AssertionError for a wrong answer."""

    data: bytes
    check: Callable[[bytes], None]


@functools.cache
def kinds() -> dict[str, Kind]:
    """A file of each kind, made in memory."""
    still, frames = moving(1, 48, 64)[0], moving(6, 48, 64)

    def image(kind: str, **options: object) -> bytes:
        file = io.BytesIO()
        Image.fromarray(still).save(file, kind, **options)
        return file.getvalue()

    array = io.BytesIO()
    np.save(array, still)
    fragmented = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    annex_b = b"".join(access_units(frames))
    stills = {
        "JPEG": image("JPEG", quality=60),
        "progressive JPEG": image("JPEG", quality=60, progressive=True),
        "PNG": image("PNG"),
        "array": array.getvalue(),
    }
    segments = {
        "MP4": encoded(frames),
        "fragmented MP4": encoded(frames, muxing=fragmented),
        "transport stream": encoded(frames, container="mpegts"),
        "Annex B": annex_b,
    }
    found = {name: Kind(data, check_frame) for name, data in stills.items()}
    found |= {name: Kind(data, check_segment) for name, data in segments.items()}
    return found | {"PNG with checksums": Kind(stills["PNG"], check_png), "H.264 pictures": Kind(annex_b, check_stream)}


def mutated(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """A file that was damaged: bits flipped, bytes replaced, removed, repeated, put in or cut off, parts of another file."""
    damaged = bytearray(data)
    early = draw.random() < 0.5  # half of the time in the first bytes, where damage does the most
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        size = max(1, min(len(damaged), 600) if early else len(damaged))
        place, length = draw.randrange(size), draw.choice((1, 2, 4, 32, 400))
        match draw.randrange(8):
            case 0 if damaged:
                damaged[min(place, len(damaged) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                damaged[place : place + length] = draw.randbytes(length)
            case 2:
                del damaged[place : place + length]
            case 3:
                damaged[place:place] = damaged[place : place + length] * draw.choice((1, 2, 50))
            case 4:
                del damaged[place:]
            case 5:
                extreme = draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)).to_bytes(4)
                damaged[place : place + 4] = draw.choice((extreme, extreme[::-1], extreme[2:]))
            case 6:
                start = draw.randrange(len(other))
                damaged[place : place + length] = other[start : start + length]
            case _:
                damaged[place : place + length] = bytes([draw.choice((0, 255, 0x47))]) * length
    return bytes(damaged)


def batch(state: object, count: int) -> dict[str, float]:
    """So many mutations; what they cost. Raises AssertionError, naming the mutation, for what must not happen."""
    draw = random.Random()
    draw.setstate(state)  # type: ignore[arg-type]
    names = sorted(kinds())
    for kind in kinds().values():  # whole ones, so that what is loaded once is loaded
        kind.check(kind.data)
    refused, slowest, most = 0, 0.0, 0
    for number in range(count):
        name = draw.choice(names)
        data = mutated(kinds()[name].data, draw, kinds()[draw.choice(names)].data)
        what, started, held = f"mutation {number} (of {name})", time.process_time(), peak_reset()
        try:
            kinds()[name].check(data)
        except UserError as error:
            refused += 1
            if "\n" in (sentence := str(error)) or not sentence:
                raise AssertionError(f"{what}: this is no sentence: {error!r}") from error
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        seconds, memory = time.process_time() - started, peak_since(held)
        slowest, most = max(slowest, seconds), max(most, memory)
        assert seconds <= MOST_SECONDS, f"{what} took {seconds:.1f} s of CPU"
        assert memory <= MOST_BYTES, f"{what} took {memory / 2**20:.0f} MiB"
    return {"mutations": count, "refused": refused, "slowest, ms of CPU": slowest * 1000, "most memory, MiB": most / 2**20}


_pools: list[ProcessPoolExecutor] = []


def bad_frames(draw: random.Random, folder: Path, count: int = BATCH) -> Outcome:
    """A batch in another process: FFmpeg or a decoder of images could take this one with it, or never come back."""
    del folder
    if not _pools:
        _pools.append(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
    try:
        return Outcome(figures=_pools[0].submit(batch, draw.getstate(), count).result(_ANSWER_SECONDS))
    except (BrokenProcessPool, TimeoutError) as error:
        pool = _pools.pop()
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False)
        raise AssertionError(
            "a mutation ended the process" if isinstance(error, BrokenProcessPool) else "a mutation hangs"
        ) from error


LINES: tuple[Line, ...] = (Line("bad-frames", "frames and segments that were damaged, 1,000 in a run", 100, bad_frames),)
