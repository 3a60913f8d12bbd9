"""A video through the adaptive network: for each frame its level, the network's answer, a line of JSON and, if wanted, a picture.

    for line in gearnn_ray.video.watch("street.mp4", store="artifacts", release="drn22-scenes-jpeg:latest"):
        print(line["pts"], line["level"], line["distance"])

One thread reads and decodes, this one computes. Frames that wait are processed together, whatever their levels; frames of another
size are a pass of their own.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from gearnn_ray.config.watch import WatchConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.axes import LOSSLESS, UNDISTORTED, properties_of
from gearnn_ray.levels.level import CLEAN, parse_level
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.serving.frames import Limits
from gearnn_ray.serving.level_estimation import LevelEstimate
from gearnn_ray.tasks.base import Served
from gearnn_ray.video.decoding import VideoFrame
from gearnn_ray.video.drawing import Panel, enlargement, side_by_side
from gearnn_ray.video.generated import FRAMES_PER_SECOND, Clip
from gearnn_ray.video.lines import Line, line_of, name_of_stream, written
from gearnn_ray.video.live import LiveStream
from gearnn_ray.video.reading import Reader
from gearnn_ray.video.recording import Recorder
from gearnn_ray.video.sources import is_live
from gearnn_ray.video.stream_levels import StreamLevels

_ASK_SECONDS = 1.0  # between two looks whether a camera without frames is offline
_RATE_SECONDS = 2.0  # of the stream's time over which its bitrate is a mean
_SCORED_EVERY = 10  # frames between two running scores, which cost more the more frames there are


@dataclass
class Seen:
    """What was seen so far. scores: in percent by method ("original", "adapted"), where the labels are known; level_scores: of
    the frames of each level used. Both are there at the end. remarks: sentences on what the user should know.
    """

    frames: int = 0
    dropped: int = 0
    lost: int = 0
    changes: int = 0
    levels: dict[str, int] = field(default_factory=dict)
    metric: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    level_scores: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)


def watch(source: str | None = None, **options: Any) -> Generator[Line]:
    """The lines of a video's frames, in the order in which they are shown; options are those of `jobs/watch.py`
    (`config.watch.WatchConfig`). Files that are written are complete when the iterator ends or is closed.

    Raises UserError for a source, a release or an option that cannot be used.
    """
    from gearnn_ray.config.command_line import from_mapping

    return watched(from_mapping(WatchConfig, {"source": source, **options}, "watch"), Seen())


def watched(config: WatchConfig, seen: Seen, live: LiveStream | None = None) -> Generator[Line]:
    """As `watch`; `seen` and `live` are brought up to date with every line."""
    model = AdaptiveModel.pull(config.store, config.release, config.device, config.untrained, config.trust, config.precision)
    clip = None if config.source is not None else _clip_of(model)
    with ExitStack() as stack:
        reader = _reader(config, clip)
        stack.callback(reader.close)
        session = _Session(config, model, clip, seen, live)
        lines = None
        started = time.perf_counter()
        try:
            while (batch := reader.take(seconds=_ASK_SECONDS)) or not reader.ended:
                seen.dropped = reader.dropped
                if live is not None:
                    live.count(reader.dropped, seen.lost, reader.problem)
                if batch and not seen.frames:  # a source that gives nothing overwrites no file
                    lines, session.recorder = _outputs(config, clip, stack)
                for line in session.answered(batch):
                    if lines is not None:
                        lines.write(written(line))
                        lines.flush()
                    seen.seconds = time.perf_counter() - started
                    yield line
        finally:
            session.conclude(reader.refused)


def _outputs(config: WatchConfig, clip: Clip | None, stack: ExitStack) -> tuple[TextIO | None, Recorder | None]:
    """The files that are written until the stack is closed."""
    lines, recorder = None, None
    if config.ndjson:
        lines = stack.enter_context(open(config.ndjson, "w", encoding="utf-8"))  # noqa: SIM115
    if config.mp4:
        recorder = Recorder(Path(config.mp4), 1 / FRAMES_PER_SECOND if clip else 1 / 25)
        stack.callback(recorder.close)
    return lines, recorder


def stream_name(config: WatchConfig) -> str:
    """The name of the stream in what is written."""
    return name_of_stream(config.source, config.stream)


def _clip_of(model: AdaptiveModel) -> Clip:
    data = model.content.data
    reference = None if data is None else data.reference
    clip = Clip(model.task.name) if reference is None else Clip(model.task.name, reference.height, reference.width)
    if tuple(model.content.model.class_names) != clip.class_names:
        raise UserError(
            f"{model.name} was not trained on generated scenes, which is what is shown without a source: give a video, or a "
            "release of generated scenes"
        )
    return clip


def _reader(config: WatchConfig, clip: Clip | None) -> Reader:
    if clip is not None:
        return Reader(clip.name, "all", open_frames=clip.frames)
    assert config.source is not None
    live = is_live(config.source)
    slow = config.slow or ("newest" if live else "all")
    limits = Limits(pixels=int(config.megapixels * 1e6))
    return Reader(config.source, slow, again=live, limits=limits, hosts=config.hosts, hardware=config.hardware)


class _Session:
    """The frames of one source through one model."""

    def __init__(self, config: WatchConfig, model: AdaptiveModel, clip: Clip | None, seen: Seen, live: LiveStream | None) -> None:
        self._config, self._model, self._clip, self._seen = config, model, clip, seen
        self._live, self.stream = live, stream_name(config)
        self.recorder: Recorder | None = None
        self._levels = StreamLevels(model.level_estimator, self.stream)
        self._methods = ("adapted", "original") if config.compare else ("adapted",)
        self._evidence: dict[str, list[dict[str, torch.Tensor]]] = {method: [] for method in self._methods}
        self._recent: deque[tuple[float, int]] = deque()
        self._panel: tuple[int, int] | None = None
        self._shown: dict[str, float] = {}
        self._used: list[str] = []
        self._readable = any(map(_shows_in_video, model.levels))
        seen.metric = model.task.metrics[0] if clip else None
        if live is not None:
            live.score_metric = seen.metric

    def answered(self, batch: Sequence[VideoFrame]) -> Iterator[Line]:
        """The lines of frames that were taken together."""
        for _, group in itertools.groupby(batch, lambda frame: frame.pixels.shape):
            frames = list(group)
            start = time.perf_counter()
            estimates = [self._levels.estimate(frame.evidence) for frame in frames]
            estimating = (time.perf_counter() - start) / len(frames)
            start = time.perf_counter()
            estimates, answers = self._answers(frames, estimates)
            network = (time.perf_counter() - start) / len(frames)
            for number, (frame, estimate) in enumerate(zip(frames, estimates, strict=True)):
                milliseconds = {
                    "decode": 1000 * (frame.decode_seconds - frame.level_seconds),
                    "level": 1000 * (frame.level_seconds + estimating),
                    "network": 1000 * network,
                }
                yield self._line(frame, estimate, {method: answers[method][number] for method in answers}, milliseconds)

    def conclude(self, refused: Sequence[str]) -> None:
        """Say of the whole source what only its end shows."""
        seen = self._seen
        # Ctrl-C may come between two of them
        judged = min(len(self._used), *(len(each) for each in self._evidence.values()))
        if judged:
            seen.scores = self._scores(range(judged))
            for level in dict.fromkeys(self._used[:judged]):
                of_level = [number for number, used in enumerate(self._used[:judged]) if used == level]
                seen.level_scores[level] = self._scores(of_level)
        if refused:
            seen.remarks.append(
                f"the playlist names {refused[0]}, which was not opened: allow its host with --hosts, if it is to be trusted"
            )
        if seen.frames and set(seen.levels) == {CLEAN.name} and not self._readable:
            seen.remarks.append(
                f"{self._model.name} has only levels of JPEG quality, which this video does not show: make a release with levels "
                "of brightness, frame size or H.264, for example with jobs/split.py --preset video"
            )

    def _scores(self, numbers: Sequence[int]) -> dict[str, float]:
        """The first metric of each method over some of the frames, in percent."""
        task, found = self._model.task, {}
        for method in reversed(self._methods):
            chosen = [self._evidence[method][number] for number in numbers]
            stacked = {name: torch.stack([each[name] for each in chosen]) for name in chosen[0]}
            found[method] = float(task.first_metric(stacked, np.ones((1, len(chosen))))[0])
        return found

    @torch.inference_mode()
    def _answers(
        self, frames: Sequence[VideoFrame], estimates: Sequence[LevelEstimate]
    ) -> tuple[list[LevelEstimate], dict[str, list[Any]]]:
        """The levels with the shares that are used, and the predictions of each method, by one pass."""
        images_BCHW = torch.from_numpy(np.stack([frame.pixels for frame in frames])).permute(0, 3, 1, 2).contiguous()
        estimates = self._model.mixed(images_BCHW, estimates)
        levels: list[Any] = list(estimates)
        if self._config.compare:
            images_BCHW, levels = torch.cat([images_BCHW, images_BCHW]), [*levels, *[CLEAN.name] * len(frames)]
        predictions = list(self._model(images_BCHW, levels))
        parts = [predictions[start : start + len(frames)] for start in range(0, len(predictions), len(frames))]
        return estimates, dict(zip(self._methods, parts, strict=True))

    def _line(
        self, frame: VideoFrame, estimate: LevelEstimate, predictions: Mapping[str, Any], milliseconds: Mapping[str, float]
    ) -> Line:
        seen, task = self._seen, self._model.task
        number = seen.frames
        seen.frames += 1
        seen.lost += frame.lost
        seen.levels[estimate.level] = seen.levels.get(estimate.level, 0) + 1
        seen.changes = self._levels.changes
        self._readable |= frame.evidence.jpeg is not None
        if self._clip is not None:
            self._used.append(estimate.level)
            self._score(number, frame, predictions)
        served = {
            method: Served(frame.pixels, self._model.content.model.class_names, {}, self._config.score) for method in predictions
        }
        answers = {method: task.answer(prediction) for method, prediction in predictions.items()}
        described = task.described(answers["adapted"], served["adapted"])
        if "original" in answers:
            described["original"] = task.described(answers["original"], served["original"])
        if self._shown:
            described["score"] = {method: round(value, 2) for method, value in self._shown.items()}
        release = f"{self._model.name}@{self._model.digest}"
        line = line_of(self.stream, number, frame, estimate, release, milliseconds, described)

        def picture() -> NDArray[np.uint8]:
            return self._picture(frame, estimate, answers, served, milliseconds)

        if self.recorder is not None:
            self.recorder.add(picture(), frame.seconds)
        if self._live is not None:
            value = self._shown.get("adapted") if self._clip else self._confidence(predictions["adapted"])
            self._live.add(line, value, estimate.level, picture)
        return line

    def _confidence(self, prediction: Any) -> float:
        """exp(-H) of the answer's entropy H: 1 where the network is certain."""
        return math.exp(-self._model.task.uncertainty(prediction))

    def _score(self, number: int, frame: VideoFrame, predictions: Mapping[str, Any]) -> None:
        assert self._clip is not None
        target, classes = self._clip.target(number), len(self._model.content.model.class_names)
        for method, prediction in predictions.items():
            size = frame.evidence.height, frame.evidence.width
            self._evidence[method].append(self._model.task.evidence(prediction, target, size, classes))
        if number % _SCORED_EVERY == _SCORED_EVERY - 1:
            self._shown = self._scores(range(number + 1))

    def _picture(
        self, frame: VideoFrame, estimate: LevelEstimate, answers: Mapping[str, Any], served: Mapping[str, Served],
        milliseconds: Mapping[str, float],
    ) -> NDArray[np.uint8]:  # fmt: skip
        height, width = frame.pixels.shape[:2]
        scale = enlargement(height)
        if self._panel is None:
            self._panel = height * scale, width * scale
        said = {"adapted": f"adapted: {estimate.spelled}", "original": "original"}
        rate = self._kilobits(frame)
        panels = []
        for method in reversed(list(answers)):
            score = f"   {self._seen.metric} {self._shown[method]:.1f}" if method in self._shown else ""
            foot = (
                f"{width}×{height}  {rate}  {milliseconds['network']:.0f} ms"
                if method == "adapted"
                else f"found: {estimate.found}"
            )
            drawn = self._model.task.drawn(answers[method], served[method], scale)
            panels.append(Panel(drawn, said[method] + score, foot))
        return side_by_side(panels, *self._panel)

    def _kilobits(self, frame: VideoFrame) -> str:
        """The stream's bitrate over the last seconds."""
        now = frame.seconds if frame.seconds is not None else (self._recent[-1][0] if self._recent else 0.0) + 1 / 25
        if self._recent and not 0 <= now - self._recent[-1][0] < _RATE_SECONDS:
            self._recent.clear()  # the clock has jumped
        self._recent.append((now, frame.bytes))
        while now - self._recent[0][0] > _RATE_SECONDS:
            self._recent.popleft()
        span = now - self._recent[0][0]
        with suppress(ZeroDivisionError):
            return f"{sum(size for _, size in list(self._recent)[1:]) * 8 / span / 1000:,.0f} kbit/s"
        return ""


def _shows_in_video(level: str) -> bool:
    """Whether a level can be read off frames of a video, which show no JPEG quality."""
    return properties_of(parse_level(level))._replace(quality=LOSSLESS, unread=()) != UNDISTORTED
