"""From what can be read off a frame to the level whose network should answer it.

Levels are points on up to four axes: brightness, frame size, H.264 rate factor, JPEG quality. A frame is a point
there too, and the nearest level wins. Every axis has a unit, so that axes can be added up:

    brightness   ln of (mean luma / the undistorted mean luma)   one spread of it over the training images
    size         ln of (pixels / the training set's pixels)      0.05, that is 5% of the pixels
    H.264        constant rate factor, or mean QP                1 QP; undistorted stands at 0
    JPEG         quality, 1 to 100                               5 steps; undistorted stands at 101

Undistorted stands at 0, 0, 0 and 101. A frame that was no JPEG stands at 101 as well, so a file of quality 100 is
nearer to jpeg-100 than a lossless one is. An axis counts only if some level differs from undistorted on it. One that
cannot be read (H.264 without a bitstream, brightness or size without a reference) adds nothing to any distance, but
between levels otherwise equally near the one wins that claims the least distortion there. Where two levels are
exactly as near, the more distorted one wins.

Knows nothing about networks, files or servers: `gearnn_ray.serving.frames` makes the evidence.
"""

import bisect
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.core.errors import UserError
from gearnn_ray.levels.level import CLEAN, Brightness, Combination, H264Crf, H264Size, Jpeg, parse_level

if TYPE_CHECKING:
    from gearnn_ray.serving.frames import Evidence

__all__ = ["LevelEstimate", "LevelEstimator", "Reference"]

_BRIGHTNESS, _SIZE, _H264, _JPEG = range(4)
_AXES = ("brightness", "frame size", "H.264 rate factor", "JPEG quality")

_SPREAD = 0.25  # of ln(mean luma) over images, where a release does not say: street scenes by day
_LEAST_SPREAD = 0.05  # images of one fixed scene would make brightness outweigh every other axis
_SIZE_UNIT = 0.05
_JPEG_UNIT = 5.0
_JPEG_NONE = 101.0
_TABLES_UNIT = 0.2  # five steps of quality change libjpeg's tables by this much: mean |ln| over 10 to 90
_QP_SHIFT = (
    4.5  # of libx264's mean slice QP above its CRF: 4.48 from CRF 15 to 36 on street scenes, if a release does not say
)
_SIZE_CRF = 18.0  # what `h264-WxH` levels are encoded at
_LEAST_LUMA = 0.5  # ln of a black frame's luma must be finite
_UNREAD = 0.01  # weight of an axis that was not read: decides between levels otherwise (about) equally near
_STREAMS = 4096
_MEMORY = 8  # frames: time constant of a stream's mean brightness
_JUMP = 3.0  # spreads: brightness so far off is no noise of the scene...
_LASTING = 3  # ... but believed only in this many frames in a row


@dataclass(frozen=True)
class Reference:
    """The undistorted training images, and what each level made of them: as far as a release's manifest says."""

    height: int
    width: int
    luma: float
    """Mean Rec. 601 luma, above 0 to 255."""
    luma_spread: float
    """Standard deviation of ln(mean luma) over images; 0 where unknown."""
    level_luma: Mapping[str, float] = field(default_factory=dict)
    """Mean luma of a level's images."""
    level_qp: Mapping[str, float] = field(default_factory=dict)
    """Mean slice QP of a level's H.264 pictures."""

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> "Reference | None":
        """What a release says of its training images; None where it is older and says nothing."""
        said = manifest.get("data", {}).get("reference")
        if said is None:
            return None
        levels = manifest.get("levels", {}).items()
        return cls(
            height=int(said["height"]),
            width=int(said["width"]),
            luma=float(said["luma"]),
            luma_spread=float(said.get("luma_spread") or 0.0),
            level_luma={name: float(entry["luma"]) for name, entry in levels if entry.get("luma") is not None},
            level_qp={name: float(entry["qp"]) for name, entry in levels if entry.get("qp") is not None},
        )


@dataclass(frozen=True)
class LevelEstimate:
    """The level to use for a frame, and how well it fits."""

    level: str
    """A level of the release, or "clean": the base, always there."""
    neighbour: str | None = None
    """Interpolating: the level on the other side of what was read."""
    weight: float = 0.0
    """Share of `neighbour` in the mixture, 0 <= weight < 1."""
    distance: float = 0.0
    """Sum over axes of how far `level` is from what was read, in the units of the module's table; 0: exactly there.

    JPEG tables that libjpeg does not write add their own distance, 0.2 of it (about five steps of quality) as one unit.
    """
    found: str = CLEAN.name
    """What was read on the axes that count, spelled as a level: "jpeg-34", "brightness-0.55+jpeg-30", "clean".

    Parts stand in the order brightness, size, rate factor, JPEG. A frame size is named as it is, odd sides too.
    """


class LevelEstimator:
    """Finds the level of frames. Safe to share between threads.

    `levels` are a release's; "clean" need not be among them. `untrained` says what answers a frame between two
    levels: the "nearest" of them, or a mixture of both ("interpolate"). `cameras` gives a stream's own mean luma
    of undistorted frames, in place of the training set's. Raises `UserError` for names that are no levels.
    """

    def __init__(
        self,
        levels: Sequence[str],
        reference: Reference | None,
        untrained: Literal["nearest", "interpolate"] = "nearest",
        cameras: Mapping[str, float] | None = None,
    ) -> None:
        if untrained not in ("nearest", "interpolate"):
            raise UserError(f"untrained levels are {untrained!r}, expected 'nearest' or 'interpolate': write one.")
        self._interpolates = untrained == "interpolate"
        self._reference = reference
        self._luma = max(reference.luma, _LEAST_LUMA) if reference else None
        self._cameras = dict(cameras or {})
        for camera, luma in self._cameras.items():
            if not 0 < luma <= 255:
                raise UserError(f"camera {camera!r} has a mean luma of {luma}, expected above 0 to 255: measure it.")
        spread = (reference.luma_spread if reference else 0.0) or _SPREAD
        self._luma_unit = max(spread, _LEAST_SPREAD)

        traits = {name: _traits(name) for name in (CLEAN.name, *levels)}
        counts = [len({trait[axis] for trait in traits.values()}) > 1 for axis in range(4)]
        counts[_SIZE] = counts[_SIZE] and reference is not None
        self._counts = tuple(counts)
        traits = {name: self._with_crf(trait) for name, trait in traits.items()}
        qps = reference.level_qp if reference else {}
        shifts = [qps[name] - trait.crf for name, trait in traits.items() if trait.crf is not None and name in qps]
        self._qp_shift = math.fsum(shifts) / len(shifts) if shifts else _QP_SHIFT
        points = {name: self._point(name, trait) for name, trait in traits.items()}
        origin = np.array(points[CLEAN.name])
        # the most distorted first: argmin takes the first of those equally near
        self._names = sorted(points, key=lambda name: -np.abs(points[name] - origin).sum())
        ordered = [traits[name] for name in self._names]
        self._by_crf = np.array([points[name] for name in self._names])
        self._by_qp = self._by_crf.copy()
        for row, (name, trait) in enumerate(zip(self._names, ordered, strict=True)):
            if trait.crf is not None:
                self._by_qp[row, _H264] = qps.get(name, trait.crf + self._qp_shift)
        self._by_crf_rows, self._by_qp_rows = self._by_crf.tolist(), self._by_qp.tolist()
        self._axes = [axis for axis in range(4) if self._counts[axis]]
        self._origin = tuple(origin.tolist())

        self._beside = [
            [[other for other, theirs in enumerate(ordered) if mine.differs_only_on(axis, theirs)] for axis in range(4)]
            for mine in ordered
        ]

        # the same brightness as a coordinate and as ln of the factor: bright pixels saturate, so they are not alike
        shortest_last = sorted(traits, key=len, reverse=True)  # a level of brightness alone says it best
        factors = {math.log(traits[name].factor): points[name][_BRIGHTNESS] for name in shortest_last}
        self._knots = knots, _ = sorted(factors.values()), sorted(factors)
        # brightness is named where a level other than undistorted is nearer, or where the scene hardly explains it
        self._dim = max([-1.0, *(knot / 2 for knot in knots if knot < 0)])
        self._bright = min([1.0, *(knot / 2 for knot in knots if knot > 0)])

        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        self._lock = threading.Lock()

    def estimate(self, evidence: "Evidence", stream: str | None = None) -> LevelEstimate:
        """The level of one frame.

        `stream` names whose brightness is smoothed over its frames; None takes this frame alone.
        """
        read = self._read(evidence, stream)
        level, neighbour, weight, distance = self._nearest(read, evidence.crf is None and evidence.qp is not None)
        if self._counts[_JPEG] and evidence.jpeg is not None:
            distance += evidence.jpeg.distance / _TABLES_UNIT
        return LevelEstimate(level, neighbour, weight, distance, self._found(evidence, read))

    def match(self, level: str) -> LevelEstimate:
        """What stands in for a level by name: itself where the release has it.

        Raises `UserError` where this is no level, or distorts in a way that none of the release's does.
        """
        if level in self._names:
            return LevelEstimate(level, found=level)
        traits = self._with_crf(_traits(level))
        for axis, counts in enumerate(self._counts):
            if not counts and traits[axis] != _UNDISTORTED[axis]:
                raise UserError(
                    f"level {level!r} is not in the release, and nothing says which is nearest in {_AXES[axis]}: "
                    f"use one of {', '.join(sorted(self._names))}."
                )
        point = list(self._point(level, traits))
        logarithms, coordinates = self._knots[::-1]
        point[_BRIGHTNESS] = _along(math.log(traits.factor), logarithms, coordinates, 1 / self._luma_unit)
        return LevelEstimate(*self._nearest(point, by_qp=False), found=level)

    @property
    def sees_jpeg(self) -> bool:
        """Whether `Evidence.jpeg` makes a difference."""
        return self._counts[_JPEG]

    def _nearest(self, read: Sequence[float | None], by_qp: bool) -> tuple[str, str | None, float, float]:
        """The level nearest to what was read, its neighbour, the neighbour's share, and the level's distance."""
        levels = self._by_qp if by_qp else self._by_crf
        point = [origin if value is None else value for value, origin in zip(read, self._origin, strict=True)]
        # plain floats: a third of what NumPy costs on so few numbers, in caches that a decoder has just emptied
        axes = [(axis, point[axis], _UNREAD if read[axis] is None else 1.0) for axis in self._axes]
        row, nearest = 0, math.inf
        for other, place in enumerate(self._by_qp_rows if by_qp else self._by_crf_rows):
            away = 0.0
            for axis, value, weight in axes:
                away += weight * abs(value - place[axis])
            if away < nearest - 1e-6:
                row, nearest = other, away
        deviations = [
            0.0 if value is None else value - place for value, place in zip(read, levels[row].tolist(), strict=True)
        ]
        neighbour, weight = self._neighbour(levels, row, deviations) if self._interpolates else (None, 0.0)
        return self._names[row], neighbour, weight, round(sum(map(abs, deviations)), 6)

    def _with_crf(self, traits: "_Traits") -> "_Traits":
        """The rate factor that sizes are encoded at is a difference only beside levels with others."""
        sized = self._counts[_H264] and traits.size and traits.crf is None
        return traits._replace(crf=_SIZE_CRF) if sized else traits

    def _point(self, name: str, trait: "_Traits") -> tuple[float, float, float, float]:
        """Where a level stands on the axes, in their units."""
        reference = self._reference
        brightness = math.log(trait.factor)
        if self._luma and reference and trait.factor != 1 and name in reference.level_luma:
            brightness = math.log(max(reference.level_luma[name], _LEAST_LUMA) / self._luma)
        size = (
            math.log(math.prod(trait.size) / (reference.height * reference.width)) if trait.size and reference else 0.0
        )
        return brightness / self._luma_unit, size / _SIZE_UNIT, trait.crf or 0.0, trait.quality / _JPEG_UNIT

    def _read(self, evidence: "Evidence", stream: str | None) -> tuple[float | None, ...]:
        """Where a frame stands on the axes, in their units; None where it cannot be read or does not count."""
        brightness = size = h264 = jpeg = None
        reference = self._reference
        if self._counts[_BRIGHTNESS]:
            undistorted = self._cameras.get(stream or "", self._luma)
            if undistorted is not None:
                brightness = math.log(max(evidence.luma, _LEAST_LUMA) / undistorted) / self._luma_unit
                brightness = brightness if stream is None else self._smooth(stream, brightness)
        if reference and self._counts[_SIZE]:
            size = math.log(evidence.height * evidence.width / (reference.height * reference.width)) / _SIZE_UNIT
        if self._counts[_H264]:
            h264 = evidence.qp if evidence.crf is None else evidence.crf
        if self._counts[_JPEG]:
            jpeg = (evidence.jpeg.quality if evidence.jpeg else _JPEG_NONE) / _JPEG_UNIT
        return brightness, size, h264, jpeg

    def _smooth(self, stream: str, brightness: float) -> float:
        """The stream's mean brightness after this frame.

        Light fades over many frames and a scene's own content flickers, so a running mean over `_MEMORY` frames
        keeps the level from changing to and fro. A lamp that is switched on must not take that long: a jump
        starts the mean anew, but only once it lasts, or a single flash or black frame would throw the level off twice.
        """
        with self._lock:
            state = self._streams.setdefault(stream, _Stream(brightness))
            self._streams.move_to_end(stream)
            if len(self._streams) > _STREAMS:
                self._streams.popitem(last=False)
            state.add(brightness)
            return state.mean

    def _neighbour(
        self, levels: NDArray[np.float64], row: int, deviations: Sequence[float]
    ) -> tuple[str | None, float]:
        """The closest level on the other side of what was read that differs from `row` on that axis alone.

        Tried on the axis with the largest deviation first. Returns its name and its share, linear on the axis.
        """
        for axis in sorted(filter(deviations.__getitem__, range(4)), key=lambda axis: -abs(deviations[axis])):
            here = levels[row, axis]
            gaps = [(levels[other, axis] - here, other) for other in self._beside[row][axis]]
            gaps = [(abs(gap), other) for gap, other in gaps if gap * deviations[axis] > 0]
            gap, other = min(gaps, default=(0.0, row))
            if gap and 0 < (share := float(abs(deviations[axis]) / gap)) < 1:  # a deviation of 1e-300 is none
                return self._names[other], share
        return None, 0.0

    def _found(self, evidence: "Evidence", read: Sequence[float | None]) -> str:
        brightness, size, h264, _ = read
        parts = []
        if brightness is not None and not self._dim <= brightness <= self._bright:
            parts.append(f"brightness-{self._factor(brightness)}")
        if size:
            parts.append(f"h264-{evidence.width}x{evidence.height}")
        if h264 is not None:
            crf = h264 if evidence.crf is not None else h264 - self._qp_shift
            parts.append(f"h264-crf{min(max(round(crf), 0), 51)}")
        if self._counts[_JPEG] and evidence.jpeg:
            parts.append(f"jpeg-{evidence.jpeg.quality}")
        return "+".join(parts) or CLEAN.name

    def _factor(self, brightness: float) -> float:
        """The factor that makes undistorted images this bright, as levels spell it."""
        factor = math.exp(_along(brightness, *self._knots, self._luma_unit))
        return min(max(round(factor, 2), 0.01), 10.0)


class _Traits(NamedTuple):
    """What a level does to a frame, axis by axis, as its name says it; in the order of the axes."""

    factor: float
    size: tuple[int, int] | None
    crf: float | None
    quality: float

    def differs_only_on(self, axis: int, other: "_Traits") -> bool:
        return all(
            (mine != theirs) == (number == axis) for number, (mine, theirs) in enumerate(zip(self, other, strict=True))
        )


_UNDISTORTED = _Traits(1.0, None, None, _JPEG_NONE)


@dataclass
class _Stream:
    """Mean brightness of a stream, in units of the axis, and for how many frames it has been far off."""

    mean: float
    off: int = 0

    def add(self, brightness: float) -> None:
        self.off = self.off + 1 if abs(brightness - self.mean) > _JUMP else 0
        if self.off == _LASTING:
            self.mean, self.off = brightness, 0
        elif self.off == 0:
            self.mean += (brightness - self.mean) / _MEMORY


def _traits(name: str) -> _Traits:
    level = parse_level(name)
    traits = _UNDISTORTED
    for part in level.parts if isinstance(level, Combination) else (level,):
        match part:
            case Brightness(factor):
                traits = traits._replace(factor=traits.factor * factor)
            case H264Size(width, height):
                traits = traits._replace(size=(width, height))
            case H264Crf(crf):
                traits = traits._replace(crf=float(crf))
            case Jpeg(quality):
                traits = traits._replace(quality=float(quality))
    return traits


def _along(x: float, xs: Sequence[float], ys: Sequence[float], slope: float) -> float:
    """Linear between the points (xs, ys), xs rising, and of this slope beyond them."""
    right = bisect.bisect(xs, x)
    if 0 < right < len(xs):
        share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
        return ys[right - 1] + share * (ys[right] - ys[right - 1])
    end = min(right, len(xs) - 1)
    return ys[end] + slope * (x - xs[end])
