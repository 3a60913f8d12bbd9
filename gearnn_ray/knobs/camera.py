"""A camera that encodes in real time with the knobs that the service chooses.

    frames at their own pace ─► segments ─► encoded with the knobs as they are now ─► posted ─► answers, and the next knobs
            thread "capture"    8 may wait       thread "send"    └─► probes, in a thread of their own, while it is posted

A segment never waits for a decision: when its last frame is there and the link is free, it is encoded with the knobs of the last
answer. While the link is too slow or the service is away, segments wait as the camera saw them, so that they have the latest
knobs, too; the oldest is dropped. Needs no torch.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from gearnn_ray.config.camera import CameraConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.controller import Controller, Trade
from gearnn_ray.knobs.encoding import Encoded, encode, shown
from gearnn_ray.knobs.knob import Knob, Value, knobs_of, settings_of
from gearnn_ray.knobs.objective import tile_errors
from gearnn_ray.knobs.regions import Regions
from gearnn_ray.knobs.settings import Image
from gearnn_ray.knobs.uplink import PIECE, Answer, AwayError, Buffer, RefusedError, TokenBucket, pieces_of, post
from gearnn_ray.knobs.wire import Advice, Head, Probe, Report, Tiles, check_knobs, parsed
from gearnn_ray.video.generated import FRAMES_PER_SECOND, TUNNEL, Clip
from gearnn_ray.video.lines import Line, name_of_stream
from gearnn_ray.video.reading import Reader, pauses
from gearnn_ray.video.sources import SourceError, is_live

__all__ = ["Filmed", "film"]

_WAITING = 8  # segments, of ten frames of 1080p 60 MB each
_LONGEST_PAUSE = 8.0  # seconds: about as long as segments can wait
_BURST_SECONDS = 0.1  # of the link's rate
_ASK_SECONDS = 1.0  # between two looks whether a camera without frames is offline
_LEAST_SECONDS, _MOST_SECONDS = 1e-3, 3600.0  # of a segment, whatever a stream says
Timed = tuple[Image, float]  # a frame, and its time in seconds


@dataclass
class Filmed:
    """What has become of the segments so far. bytes: that were sent and answered. seconds: of the segments that were."""

    segments: int = 0
    answered: int = 0
    refused: int = 0
    dropped: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Chosen:
    """The value of each knob, and of each the one to be probed."""

    values: Mapping[str, Value]
    probes: Mapping[str, Value]


@dataclass(frozen=True, eq=False)
class Segment:
    """What the camera saw. start: in seconds of the stream. taken: when its last frame was there, by time.monotonic."""

    number: int
    frames: tuple[Image, ...]
    start: float
    seconds: float
    taken: float


@dataclass(frozen=True, eq=False)
class _Ready:
    """An encoded segment. report: None where there is no time for probes. until: when it must be there, by time.monotonic."""

    head: Head
    data: bytes
    report: "Future[Report] | None"
    until: float

    def reported(self) -> Report:
        """What is known of the probes now, or soon enough for the next segment."""
        if self.report is None:
            return Report()
        try:
            return self.report.result(max(0.0, self.until - time.monotonic()))
        except TimeoutError:
            return Report()


class _Body:
    """All that is sent of a segment, at the link's rate. bytes: that were sent so far."""

    def __init__(self, ready: _Ready, bucket: TokenBucket | None) -> None:
        self._ready, self._bucket, self.bytes = ready, bucket, 0

    def __iter__(self) -> Iterator[bytes]:
        yield from self._at_rate(self._ready.head.line() + self._ready.data)
        yield from self._at_rate(self._ready.reported().line())

    def _at_rate(self, data: bytes) -> Iterator[bytes]:
        for piece in pieces_of(data):
            if self._bucket is not None:
                time.sleep(self._bucket.take(len(piece), time.monotonic()))
            self.bytes += len(piece)
            yield piece


def attempts() -> Iterator[float]:
    """Seconds before each further attempt to reach the service: 1, 2, 4, 8, 8, …"""
    return (min(pause, _LONGEST_PAUSE) for pause in pauses())


def film(config: CameraConfig, filmed: Filmed, waits: Callable[[], Iterator[float]] = attempts) -> Generator[Line]:
    """A line for each segment, when it is answered, refused or dropped, and one when the service or the source goes away.

    `filmed` is brought up to date with every line. waits: as `attempts`, which are counted anew after each answer. Raises
    UserError for knobs that cannot be used, and SourceError where the source fails, after its last segments were sent.
    """
    with ExitStack() as stack:
        ndjson = stack.enter_context(open(config.ndjson, "wb")) if config.ndjson else None
        camera = _Camera(config, filmed, waits, ndjson)
        stack.callback(camera.close)
        yield from camera.lines()


class _Camera:
    """One camera. Its methods behind `lines` belong to the thread of their title."""

    def __init__(
        self, config: CameraConfig, filmed: Filmed, waits: Callable[[], Iterator[float]], ndjson: BinaryIO | None
    ) -> None:
        """ndjson: gets the service's lines."""
        self._config, self._filmed, self._waits, self._ndjson = config, filmed, waits, ndjson
        self._knobs = _knobs(config.knobs)
        self._stream = name_of_stream(config.source, config.stream)
        first = Controller(self._knobs, Trade())
        self._chosen = Chosen(first.deployed, first.probes)
        rate = None if config.link_rate is None else config.link_rate / 8
        self._bucket = None if rate is None else TokenBucket(rate, max(PIECE, _BURST_SECONDS * rate))
        self._waiting: Buffer[Segment] = Buffer(_WAITING)
        self._prober = ThreadPoolExecutor(1, "probe")
        self._report: Future[Report] | None = None
        self._events: queue.SimpleQueue[Line | Exception | None] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._stopped = threading.Event()

    def lines(self) -> Iterator[Line]:
        """All lines, as `film` gives them."""
        for work in (self._capture, self._send):
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True).start()
        failed: SourceError | None = None
        while (event := self._events.get()) is not None:
            if isinstance(event, SourceError):  # what was captured before is still sent
                failed = event
            elif isinstance(event, Exception):
                raise event
            else:
                yield event
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Stop all threads, without waiting for the service."""
        self._stopped.set()
        self._waiting.close()
        self._prober.shutdown(wait=False, cancel_futures=True)

    # ---- capture

    def _capture(self) -> None:
        try:
            for segment in _segments(self._seen(), self._config.segment_frames):
                with self._counting:
                    self._filmed.segments += 1
                if (dropped := self._waiting.put(segment)) is not None:
                    self._note_dropped(dropped)
            if not self._filmed.segments and not self._stopped.is_set():
                found = f"{self._config.source} has fewer than the {self._config.segment_frames} frames of a segment"
                raise SourceError(f"{found}: give a longer video, or a smaller --segment-frames")
        except Exception as error:  # whoever iterates over the lines raises it
            self._events.put(error)
        finally:
            self._waiting.close()

    def _seen(self) -> Iterator[Timed]:
        source = self._config.source
        if source is None:
            clip = Clip("detection", shots=TUNNEL)
            yield from self._paced((clip.pristine(number), number / FRAMES_PER_SECOND) for number in range(len(clip)))
        elif is_live(source):
            yield from self._read(source, live=True)
        else:
            yield from self._paced(self._read(source, live=False))

    def _read(self, source: str, live: bool) -> Iterator[Timed]:
        reader, offline = Reader(source, "newest" if live else "all", again=live), None
        try:
            while (batch := reader.take(seconds=_ASK_SECONDS)) or not reader.ended:
                for frame in batch:
                    yield frame.pixels, time.monotonic() if live or frame.seconds is None else frame.seconds
                if self._stopped.is_set():
                    return
                if reader.problem != offline:
                    offline = reader.problem
                    self._events.put({"state": "source", "problem": offline})
        finally:
            reader.close()

    def _paced(self, frames: Iterator[Timed]) -> Iterator[Timed]:
        """Each frame at its time."""
        began: float | None = None
        for pixels, seconds in frames:
            began = time.monotonic() - seconds if began is None else began
            if self._stopped.wait(max(0.0, began + seconds - time.monotonic())):
                return
            yield pixels, seconds

    # ---- encode and send

    def _send(self) -> None:
        try:
            pause = self._waits()
            while (segment := self._waiting.take()) is not None and not self._stopped.is_set():
                try:
                    self._tell(segment, self._sent(segment))
                    pause = self._waits()
                except AwayError as error:
                    self._wait(segment, error, next(pause))
        except Exception as error:
            self._events.put(error)
        finally:
            self._events.put(None)

    def _sent(self, segment: Segment) -> Line:
        """What is to be said of a segment that was sent. Raises AwayError."""
        ready = self._encoded(segment)
        body = _Body(ready, self._bucket)
        try:
            line = self._answered(ready, post(self._config.server, self._stream, body), body.bytes)
        except RefusedError as error:
            with self._counting:
                self._filmed.refused += 1
            line = {"state": "refused", "problem": str(error)}
        seconds = round(time.monotonic() - segment.taken, 3)
        told = {"knobs": dict(ready.head.values), "frames": ready.head.frames, "sent": len(ready.head.sent)}
        return {**told, **line, "bytes": body.bytes, "seconds": seconds}

    def _wait(self, segment: Segment, away: AwayError, seconds: float) -> None:
        """Wait for the service, and keep this segment for it; behind the end of the source, nobody waits any more."""
        self._events.put({"state": "away", "problem": str(away), "again_in": seconds})
        ended = self._waiting.wait_closed(0)
        if ended or not self._waiting.give_back(segment):
            self._note_dropped(segment)
        while ended and (left := self._waiting.take()) is not None:
            self._note_dropped(left)
        self._waiting.wait_closed(seconds)

    def _encoded(self, segment: Segment) -> _Ready:
        """A segment with the knobs as they are now; its probes begin, unless those of an earlier one still take their time."""
        chosen, report = self._chosen, None
        encoded = encode(segment.frames, settings_of(self._knobs, chosen.values))
        if self._report is None or self._report.done():
            self._report = report = self._prober.submit(report_of, segment.frames, self._knobs, chosen, encoded)
        head = head_of(segment, self._knobs, chosen.values, encoded, self._config)
        return _Ready(head, encoded.data, report, segment.taken + segment.seconds)

    def _answered(self, ready: _Ready, answer: Answer, sent: int) -> Line:
        """What is to be said of an answer; takes the next knobs from it. Raises RefusedError for an answer without an end."""
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            raise RefusedError(f"the service ended its answer: {str(json.loads(answer.last)['error'])[:300]}")
        with self._counting:
            self._filmed.answered += 1
            self._filmed.bytes += sent
            self._filmed.seconds += ready.head.seconds
        if self._ndjson is not None:
            self._ndjson.writelines(each + b"\n" for each in answer.lines)
            self._ndjson.flush()
        line: Line = {"state": "answered", "level": None}
        with suppress(ValueError, TypeError, KeyError, IndexError, RecursionError):
            line["level"] = str(json.loads(answer.lines[-1])["level"])
        try:
            advice = parsed(Advice, answer.last, "the last line")
            self._chosen = usable(advice, self._knobs)
        except UserError as error:
            return {**line, "problem": f"the service's knobs cannot be used, and the last ones stay: {error}"}
        problem = {} if advice.problem is None else {"problem": advice.problem}
        return {**line, "next": dict(self._chosen.values), "price": advice.price, **problem}

    def _note_dropped(self, segment: Segment) -> None:
        with self._counting:
            self._filmed.dropped += 1
        self._tell(segment, {"state": "dropped"})

    def _tell(self, segment: Segment, line: Line) -> None:
        told = {"segment": segment.number, **line}
        self._events.put({**told, "dropped": self._filmed.dropped, "waiting": len(self._waiting)})


def head_of(
    segment: Segment, knobs: Sequence[Knob], values: Mapping[str, Value], encoded: Encoded, config: CameraConfig | None = None
) -> Head:
    """What the service is told of a segment that was encoded with these values. config: for the goal, and what weighs errors."""
    config = config or CameraConfig()
    settings, (height, width, _) = settings_of(knobs, values), segment.frames[0].shape
    is_video = encoded.codec == "h264"
    return Head(
        codec=encoded.codec,
        bytes=len(encoded),
        packets=() if is_video else tuple(map(len, encoded.packets)),
        size=encoded.size,
        frame=(height, width),
        frames=len(segment.frames),
        sent=encoded.sent,
        start=segment.start,
        seconds=segment.seconds,
        crf=settings.crf if is_video and settings.qp is None else None,
        qp=settings.qp if is_video else None,
        knobs={knob.name: knob.values for knob in knobs},
        values=dict(values),
        gradient=config.gradient,
        price=config.price,
        ceiling=config.ceiling_rate,
    )


def report_of(frames: Sequence[Image], knobs: Sequence[Knob], chosen: Chosen, encoded: Encoded) -> Report:
    """What a segment has lost, and what it would lose with each knob at the value that is to be probed."""
    pristine, seen = np.stack(frames), shown(encoded, frames)
    probes = {}
    for name, value in chosen.probes.items():
        probe = encode(frames, settings_of(knobs, {**chosen.values, name: value}))
        pixels = shown(probe, frames)
        errors = None if np.array_equal(pixels, seen) else Tiles.of(tile_errors(pristine, pixels))
        probes[name] = Probe(value=value, bytes=len(probe), errors=errors)
    return Report(errors=Tiles.of(tile_errors(pristine, seen)), probes=probes)


def usable(advice: Advice, knobs: Sequence[Knob]) -> Chosen:
    """The advised values, if these knobs have them. Raises UserError."""
    if missing := [knob.name for knob in knobs if knob.name not in advice.knobs]:
        raise UserError(f"nothing is said of the knob {missing[0]}")
    settings_of(knobs, advice.knobs)
    for name, value in advice.probes.items():
        settings_of(knobs, {name: value})
    return Chosen(advice.knobs, advice.probes)


def _knobs(specs: Sequence[str]) -> tuple[Knob, ...]:
    knobs = knobs_of(specs)
    if regions := next((knob for knob in knobs if isinstance(knob, Regions)), None):
        raise UserError(f"a camera has no knob {regions.name}, because the service does not send it the saliency: leave it out")
    check_knobs(knobs)
    return knobs


def _segments(frames: Iterator[Timed], length: int) -> Iterator[Segment]:
    """Segments of so many frames; fewer before a frame of another size, and behind the first segment at the end."""
    number, group, times, step = 0, list[Image](), list[float](), 1 / FRAMES_PER_SECOND
    origin: float | None = None

    def segment() -> Segment:
        nonlocal number, group, times, step, origin
        origin = times[0] if origin is None else origin
        if len(times) > 1 and times[-1] > times[0]:
            step = (times[-1] - times[0]) / (len(times) - 1)
        seconds = min(max(step * len(times), _LEAST_SECONDS), _MOST_SECONDS)
        made = Segment(number, tuple(group), times[0] - origin, seconds, time.monotonic())
        number, group, times = number + 1, [], []
        return made

    for pixels, seconds in frames:
        if group and pixels.shape != group[0].shape:
            yield segment()
        group.append(pixels)
        times.append(seconds)
        if len(group) == length:
            yield segment()
    if group and number:
        yield segment()
