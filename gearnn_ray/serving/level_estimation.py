"""Finds the level whose network should process a frame, from the evidence that `gearnn_ray.serving.frames` reads.

Levels and frames are points on the four axes of `gearnn_ray.levels.axes`, which also defines the unit of distance on
each axis. A frame is assigned the level with the smallest sum of distances. A frame's coordinates are:

    brightness   ln(mean luma / mean luma of undistorted frames)
    frame size   ln(pixels / pixels of the training images)
    H.264        constant rate factor of the encoder, or else the one that the levels' own QPs give for the mean macroblock QP
    JPEG         quality, or 101 if the frame was not a JPEG

An axis counts only if some level differs from undistorted images on it. An axis that cannot be read (H.264 without a
bitstream, brightness or size without a reference) adds nothing to a distance. Between levels that are otherwise
equally near, the level that is least distorted on such an axis wins. Between levels at exactly the same distance,
the most distorted one wins.

Levels of other families (noise, blur, fog, …) cannot be read off a frame: they are never estimated, only matched by name.
"""

import bisect
import functools
import math
import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np

from gearnn_ray.config.serve import Untrained
from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.axes import (
    AXES,
    AXIS_TITLES,
    LOSSLESS,
    UNDISTORTED,
    Properties,
    coordinate,
    coordinates,
    properties_of,
    units,
)
from gearnn_ray.levels.level import CLEAN, SIZE_CRF, parse_level
from gearnn_ray.serving.stream_table import StreamTable

if TYPE_CHECKING:
    from gearnn_ray.serving.frames import Evidence
    from gearnn_ray.store.manifest import Manifest

__all__ = ["LevelEstimate", "LevelEstimator", "Reference"]

_BRIGHTNESS, _SIZE, _H264, _JPEG = range(len(AXES))

_TABLES_UNIT = 0.2  # mean |ln| between libjpeg's tables five steps of quality apart, from quality 10 to 90
_QP_OFFSET = 5.0  # of libx264's mean macroblock QP from its CRF, where a release does not record QPs: 5.2 ± 0.7 on CamVid
_LEAST_LUMA = 0.5  # keeps the logarithm of a black frame's luma finite
_UNREAD = 0.01  # weight of an axis that was not read: it decides only between levels that are otherwise equally near
_Points = list[list[float]]  # coordinates [level][axis]
_CODINGS = 256  # whose distances are remembered
_MEMORY = 8  # frames: time constant of a stream's mean brightness
_JUMP = 1.5  # units: a larger change of brightness is not explained by the content of the scene...
_LASTING = 3  # ... and is accepted once this many frames in a row show it


@dataclass(frozen=True)
class Reference:
    """Statistics of the training images that a release was made with, without distortion and at each level.

    luma: mean Rec. 601 luma, above 0 to 255. luma_spread: standard deviation of ln(mean luma) over images; 0 where it is unknown.
    level_luma, level_qp: mean luma of the images, and mean macroblock QP of their H.264 pictures, by level.
    """

    height: int
    width: int
    luma: float
    luma_spread: float
    level_luma: Mapping[str, float] = field(default_factory=dict)
    level_qp: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_manifest(cls, manifest: "Manifest") -> "Reference | None":
        """The training images of a release, or None if its manifest does not describe them."""
        if manifest.data is None or (given := manifest.data.reference) is None:
            return None
        levels = manifest.levels.items()
        return cls(
            height=given.height,
            width=given.width,
            luma=given.luma,
            luma_spread=given.luma_spread or 0.0,
            level_luma={name: entry.luma for name, entry in levels if entry.luma is not None},
            level_qp={name: entry.qp for name, entry in levels if entry.qp is not None},
        )


@dataclass(frozen=True)
class LevelEstimate:
    """The level to use for a frame, and how well it fits.

    level: of the release, or "clean": the base, which every release has. neighbour: if levels are mixed, the level on the other
    side of the frame's coordinate. weight: share of `neighbour` in the mixture, 0 <= weight < 1; None where both networks'
    answers to the frame decide (`AdaptiveModel.mixed`), smoothed over the frames of `stream`. distance: sum over axes of the
    distance between the frame and `level`, in the units of `gearnn_ray.levels.axes`; quantisation tables that libjpeg does not
    write add their own, a mean |ln| of 0.2 as one unit. found: the frame's own properties, spelled as a level ("jpeg-34",
    "brightness-0.55+jpeg-30", "clean"), on the axes that count, in the order brightness, size, rate factor, JPEG. A size may have
    odd sides.
    """

    level: str
    neighbour: str | None = None
    weight: float | None = 0.0
    distance: float = 0.0
    found: str = CLEAN.name
    stream: str | None = None

    @property
    def spelled(self) -> str:
        """The level, or a mixture's two levels with their shares: "jpeg-30*0.60, jpeg-40*0.40"."""
        if self.neighbour is None or not self.weight:
            return self.level
        return f"{self.level}*{1 - self.weight:.2f}, {self.neighbour}*{self.weight:.2f}"


class LevelEstimator:
    """Estimates the level of frames. Threads may share one estimator.

    Args:
        levels: names of the release's levels; "clean" may be left out.
        reference: statistics of the training images; None if the release has none.
        untrained: the answer for a frame between two levels: the "nearest" one, or a mixture of both, by the frame's coordinate
            ("interpolate") or by how certain both networks are of it ("entropy").
        cameras: mean luma of a stream's undistorted frames, by stream; other streams use the training images'.

    Raises `UserError` for an invalid level name, luma or value of `untrained`.
    """

    def __init__(
        self,
        levels: Sequence[str],
        reference: Reference | None,
        untrained: Untrained = "nearest",
        cameras: Mapping[str, float] | None = None,
    ) -> None:
        if untrained not in get_args(Untrained):
            raise UserError(f"untrained is {untrained!r}: expected 'nearest', 'interpolate' or 'entropy'.")
        self._mixes, self._asks_networks = untrained != "nearest", untrained == "entropy"
        self._reference = reference
        self._pixels = reference.height * reference.width if reference else None
        self._luma = max(reference.luma, _LEAST_LUMA) if reference else None
        self._cameras = dict(cameras or {})
        for camera, luma in self._cameras.items():
            if not 0 < luma <= 255:
                raise UserError(f"camera {camera!r} has a mean luma of {luma}: expected above 0 and at most 255.")
        self._units = units(reference.luma_spread if reference else 0.0)

        everything = {name: properties_of(parse_level(name)) for name in (CLEAN.name, *levels)}
        self._unread = [name for name, values in everything.items() if values.unread]
        properties = {name: values for name, values in everything.items() if not values.unread}
        counts = [len({values[axis] for values in properties.values()}) > 1 for axis in range(len(AXES))]
        counts[_SIZE] = counts[_SIZE] and reference is not None
        self._counts = tuple(counts)
        properties = {name: self._with_crf(values) for name, values in properties.items()}
        points = {name: self._point(name, values) for name, values in properties.items()}
        origin = np.array(points[CLEAN.name])
        self._origin = tuple(origin.tolist())
        # The most distorted level comes first, because the search takes the first of several equally near levels
        self._names = sorted(points, key=lambda name: -np.abs(points[name] - origin).sum())
        ordered = [properties[name] for name in self._names]
        self._only_on = [
            [[other for other, theirs in enumerate(ordered) if mine.differs_only_on(axis, theirs)] for axis in range(4)]
            for mine in ordered
        ]

        # Frames with a known rate factor are compared with levels by rate factor. For the others, whose rate factor follows from
        # the QP, a level has the one that follows from its own QP: light and frame size, which it may change too, move the QP
        qps = reference.level_qp if reference else {}
        coded = {name: qps[name] for name, values in properties.items() if values.crf is not None and name in qps}
        self._qp_knots = _qp_knots([(properties[name], qp) for name, qp in coded.items()])
        self._by_crf: _Points = [list(points[name]) for name in self._names]
        self._by_qp: _Points = [list(points[name]) for name in self._names]
        for row, name in enumerate(self._names):
            if name in coded:
                self._by_qp[row][_H264] = _along(coded[name], *self._qp_knots, 1.0)
        self._brightnesses = [level[_BRIGHTNESS] for level in self._by_crf]
        self._rows: dict[str | None, int] = {name: row for row, name in enumerate(self._names)}
        # A coding is the same for many frames of a stream
        self._coding = functools.lru_cache(_CODINGS)(self._read_coding)

        # ln(factor) and the measured coordinate differ because bright pixels saturate: these knots convert between
        # them. Where several levels have the same factor, the one with the shortest name, brightness alone, counts
        shortest_last = sorted(properties, key=len, reverse=True)
        factors = {math.log(properties[name].factor): points[name][_BRIGHTNESS] for name in shortest_last}
        self._knots = knots, _ = sorted(factors.values()), sorted(factors)
        # Brightness is named where a level other than undistorted is nearer, or where the scene hardly explains it
        self._dim = max([-1.0, *(knot / 2 for knot in knots if knot < 0)])
        self._bright = min([1.0, *(knot / 2 for knot in knots if knot > 0)])

        self._streams: StreamTable[_Stream] = StreamTable()
        self._lock = threading.Lock()

    def estimate(
        self, evidence: "Evidence", stream: str | None = None, held: str | None = None, margin: float = 0.0
    ) -> LevelEstimate:
        """Estimate the level of one frame.

        Brightness is smoothed over the frames of `stream`: a camera's name, which may be followed by a slash and something that
        tells cameras of the same name apart. If it is None, only this frame's brightness counts. `held`, the level in use, stays
        the answer unless another level is nearer by more than `margin` units of distance, so that a frame about halfway between
        two levels does not change the answer to and fro. A level that the release does not have is not held. Raises
        `TooManyStreamsError` for a new stream while too many are in use.
        """
        jpeg = evidence.jpeg
        coding = self._coding(evidence.height, evidence.width, evidence.crf, evidence.qp, None if jpeg is None else jpeg.quality)
        brightness = self._brightness(evidence.luma, stream)
        level, neighbour, weight, distance = self._nearest(brightness, coding, held, margin)
        if self._counts[_JPEG] and jpeg is not None:
            distance += jpeg.distance / _TABLES_UNIT
        found, smoothed_over = self._spell(brightness, coding), stream if weight is None else None
        return LevelEstimate(level, neighbour, weight, distance, found, smoothed_over)

    def match(self, level: str) -> LevelEstimate:
        """Find the release's level for the name of any level: the level itself if the release has it.

        Raises `UserError` if the name is invalid, or if the level has a kind of distortion that no level of the
        release has.
        """
        if level in self._rows or level in self._unread:
            return LevelEstimate(level, found=level)
        if properties_of(parse_level(level)).unread:
            return self._match_unread(level)
        properties = self._with_crf(properties_of(parse_level(level)))
        for axis, counts in enumerate(self._counts):
            if not counts and properties[axis] != UNDISTORTED[axis]:
                raise UserError(
                    f"level {level!r} is not in the release, whose levels do not show which is nearest in "
                    f"{AXIS_TITLES[AXES[axis]]}: use one of {', '.join(sorted([*self._names, *self._unread]))}."
                )
        point = list(self._point(level, properties))
        logarithms, brightnesses = self._knots[::-1]
        slope = 1 / self._units[_BRIGHTNESS]
        point[_BRIGHTNESS] = _along(math.log(properties.factor), logarithms, brightnesses, slope)
        brightness, *others = point
        return LevelEstimate(*self._nearest(brightness, self._measured(others, by_qp=False)), found=level)

    def _match_unread(self, level: str) -> LevelEstimate:
        """The level of the same family that is nearest in the number in its name, the lower one of two."""
        wanted = parse_level(level)
        target, own = coordinate(wanted), [(coordinate(each), each.name) for each in map(parse_level, self._unread)]
        alike = [(at, name) for at, name in own if at is not None and parse_level(name).family == wanted.family]
        if target is None or not alike:
            trained = ", ".join(sorted([*self._names, *self._unread]))
            raise UserError(f"level {level!r} is not in the release, and no level of its kind is: use one of {trained}.")
        distance, _, nearest = min((abs(at - target), at, name) for at, name in alike)
        return LevelEstimate(nearest, distance=round(distance, 6), found=level)

    @property
    def sees_jpeg(self) -> bool:
        """Whether `Evidence.jpeg` can change an estimate."""
        return self._counts[_JPEG]

    def _nearest(
        self, brightness: float | None, coding: "_Coding", held: str | None = None, margin: float = 0.0
    ) -> tuple[str, str | None, float | None, float]:
        """The level nearest to a point, or the held one, its neighbour, the neighbour's share (as in `LevelEstimate`), and the
        level's distance.
        """
        value, share_of_axis = brightness, 1.0
        if value is None:
            value, share_of_axis = self._origin[_BRIGHTNESS], _UNREAD if self._counts[_BRIGHTNESS] else 0.0
        row, nearest, distances = 0, math.inf, []
        for other, (own, distance) in enumerate(zip(self._brightnesses, coding.distances, strict=True)):
            distance += share_of_axis * abs(value - own)
            distances.append(distance)
            if distance < nearest - 1e-6:
                row, nearest = other, distance
        if (held_row := self._rows.get(held)) is not None and distances[held_row] <= nearest + margin:
            row = held_row
        read = (brightness, *coding.read)
        deviations = [0.0 if value is None else value - own for value, own in zip(read, coding.levels[row], strict=True)]
        neighbour, weight = self._neighbour(coding.levels, row, deviations) if self._mixes else (None, 0.0)
        share = None if neighbour and self._asks_networks else weight
        return self._names[row], neighbour, share, round(sum(map(abs, deviations)), 6)

    def _measured(self, read: Sequence[float | None], by_qp: bool, spelled: str = "") -> "_Coding":
        """The distances to the levels of a frame at these coordinates of size, rate factor and JPEG quality; None: not read."""
        levels = self._by_qp if by_qp else self._by_crf
        size, crf, jpeg = read
        if crf is not None:
            crf = max(crf, min(level[_H264] for level in levels))  # better than any level is as good as the best one
        # Python floats take a third of NumPy's time for so few numbers
        axes = [
            (axis, self._origin[axis] if value is None else value, _UNREAD if value is None else 1.0)
            for axis, value in ((_SIZE, size), (_H264, crf), (_JPEG, jpeg))
            if self._counts[axis]
        ]
        distances = [sum([weight * abs(value - level[axis]) for axis, value, weight in axes]) for level in levels]
        return _Coding(levels, distances, (size, crf, jpeg), spelled)

    def _with_crf(self, properties: Properties) -> Properties:
        """Add the fixed rate factor of `h264-WxH` levels, if the release also has levels of other rate factors."""
        fixed = self._counts[_H264] and properties.size and properties.crf is None
        return properties._replace(crf=float(SIZE_CRF)) if fixed else properties

    def _point(self, name: str, properties: Properties) -> tuple[float, ...]:
        """The coordinates of a level in units of distance, its brightness as measured on the training images."""
        brightness, *others = coordinates(properties, self._pixels)
        reference = self._reference
        if self._luma and reference and properties.factor != 1 and name in reference.level_luma:
            brightness = math.log(max(reference.level_luma[name], _LEAST_LUMA) / self._luma)
        return tuple(value / unit for value, unit in zip((brightness, *others), self._units, strict=True))

    def _brightness(self, luma: float, stream: str | None) -> float | None:
        """The brightness of a frame in units of distance; None if the axis does not count or has no reference."""
        undistorted = self._cameras.get((stream or "").partition("/")[0], self._luma) if self._counts[_BRIGHTNESS] else None
        if undistorted is None:
            return None
        brightness = math.log(max(luma, _LEAST_LUMA) / undistorted) / self._units[_BRIGHTNESS]
        return brightness if stream is None else self._smooth(stream, brightness)

    def _read_coding(self, height: int, width: int, crf: float | None, qp: float | None, quality: int | None) -> "_Coding":
        """What is exactly known of a frame, compared with the levels."""
        size = h264 = jpeg = None
        spelled = []
        if self._pixels and self._counts[_SIZE]:
            size = math.log(height * width / self._pixels) / self._units[_SIZE]
            spelled += [f"h264-{width}x{height}"] if size else []
        if self._counts[_H264]:
            h264 = _along(qp, *self._qp_knots, 1.0) if crf is None and qp is not None else crf
            spelled += [] if h264 is None else [f"h264-crf{min(max(round(h264), 0), 51)}"]
        if self._counts[_JPEG]:
            jpeg = (LOSSLESS if quality is None else quality) / self._units[_JPEG]
            spelled += [] if quality is None else [f"jpeg-{quality}"]
        return self._measured((size, h264, jpeg), crf is None and qp is not None, "+".join(spelled))

    def _smooth(self, stream: str, brightness: float) -> float:
        """Return the stream's mean brightness after this frame."""
        with self._lock:
            state = self._streams.state(stream, lambda: _Stream(brightness))
            state.add(brightness)
            return state.mean

    def _neighbour(self, levels: _Points, row: int, deviations: Sequence[float]) -> tuple[str | None, float]:
        """The closest level beyond the frame that differs from level `row` on one axis alone, and its share.

        Axes are tried in the order of their deviations, the largest first. The share is linear in the coordinate.
        """
        for axis in sorted(filter(deviations.__getitem__, range(4)), key=lambda axis: -abs(deviations[axis])):
            here = levels[row][axis]
            gaps = [(levels[other][axis] - here, other) for other in self._only_on[row][axis]]
            gaps = [(abs(gap), other) for gap, other in gaps if gap * deviations[axis] > 0]
            gap, other = min(gaps, default=(0.0, row))
            if gap and 0 < (share := abs(deviations[axis]) / gap) < 1:  # a deviation of 1e-300 gives 0
                return self._names[other], share
        return None, 0.0

    def _spell(self, brightness: float | None, coding: "_Coding") -> str:
        """Spell the coordinates of a frame as a level."""
        if brightness is None or self._dim <= brightness <= self._bright:
            return coding.spelled or CLEAN.name
        spelled = f"brightness-{self._factor(brightness)}"
        return f"{spelled}+{coding.spelled}" if coding.spelled else spelled

    def _factor(self, brightness: float) -> float:
        """The factor that makes undistorted images this bright, rounded as `found` spells it."""
        factor = math.exp(_along(brightness, *self._knots, self._units[_BRIGHTNESS]))
        return min(max(round(factor, 2), 0.01), 10.0)


class _Coding(NamedTuple):
    """A frame's size, rate factor and JPEG quality beside the levels.

    levels: coordinates [level][axis]. distances: weighted distance to each level without brightness. read: the frame's own
    coordinates on these three axes; None where one was not read. spelled: the three as a level; "" without distortion.
    """

    levels: _Points
    distances: list[float]
    read: tuple[float | None, float | None, float | None]
    spelled: str


@dataclass
class _Stream:
    """The running mean of a stream's brightness, in units of distance.

    Smoothing keeps flicker of the scene's content from switching the level to and fro. A lasting jump, such as a lamp
    that is switched on, restarts the mean. A single flash or black frame is ignored.
    """

    mean: float
    outliers: int = 0
    """Consecutive frames that differ from the mean by more than `_JUMP`."""

    def add(self, brightness: float) -> None:
        self.outliers = self.outliers + 1 if abs(brightness - self.mean) > _JUMP else 0
        if self.outliers == _LASTING:
            self.mean, self.outliers = brightness, 0
        elif self.outliers == 0:
            self.mean += (brightness - self.mean) / _MEMORY


def _qp_knots(levels: Sequence[tuple[Properties, float]]) -> tuple[list[float], list[float]]:
    """Ascending QPs and the rate factors that they stand for, from the properties and mean macroblock QPs of levels.

    Levels that change the rate factor alone count, or all where there is none such. Levels of one rate factor count by their mean
    QP, and a rate factor whose QP is not above those of lower ones is left out. Without any level, libx264's usual offset holds.
    """
    alone = [(properties, qp) for properties, qp in levels if properties.differs_only_on(_H264, UNDISTORTED)]
    by_crf: dict[float, list[float]] = {}
    for properties, qp in alone or levels:
        by_crf.setdefault(properties.crf or 0.0, []).append(qp)
    knots: dict[float, float] = {}
    for crf, qps in sorted(by_crf.items()):
        if (qp := statistics.fmean(qps)) > max(knots, default=-math.inf):
            knots[qp] = crf
    return (list(knots), list(knots.values())) if knots else ([_QP_OFFSET], [0.0])


def _along(x: float, xs: Sequence[float], ys: Sequence[float], slope: float) -> float:
    """Piecewise linear interpolation through the points (xs, ys), `xs` ascending, with this slope beyond them."""
    right = bisect.bisect(xs, x)
    if 0 < right < len(xs):
        share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
        return ys[right - 1] + share * (ys[right] - ys[right - 1])
    end = min(right, len(xs) - 1)
    return ys[end] + slope * (x - xs[end])
