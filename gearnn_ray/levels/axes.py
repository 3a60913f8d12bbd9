"""The axes that levels are placed on: coordinates, neighbours and titles for estimation, evaluation, plots and mixing.

Four properties of a level can be read off a frame. Each one is an axis, with the name of the level family that changes it alone:

    axis         coordinate                                   undistorted   unit of distance
    brightness   ln(brightness factor)                        0             spread of ln(mean luma) over images
    h264-size    ln(pixels of a frame / original pixels)      0             0.05, about 5% of the pixels
    h264-crf     H.264 constant rate factor                   17.5          1
    jpeg         libjpeg quality, 1 to 100                    101           5

All other families (noise, blur, fog, gamma, low light, WebP, H.265, AV1, and levels of the user's own) are not read off frames:
such a level is used where it is named. Their coordinate is the number in their names.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from gearnn_ray.levels.level import Brightness, H264Crf, H264Size, Jpeg, Level, parse_level

__all__ = [
    "AXES", "AXIS_TITLES", "LOSSLESS", "UNDISTORTED", "Neighbours", "Properties", "axes_of", "coordinate",
    "coordinates", "neighbours", "properties_of", "short_name", "units",
]  # fmt: skip

AXES = ("brightness", "h264-size", "h264-crf", "jpeg")  # in the order of `Properties`, `coordinates` and `units`

AXIS_TITLES: dict[str, str] = {  # by family of levels, for plots, tables and messages
    "brightness": "brightness factor",
    "h264-size": "frame size (H.264)",
    "h264-crf": "H.264 rate factor (CRF)",
    "jpeg": "JPEG quality",
    "webp": "WebP quality",
    "hevc-crf": "H.265 rate factor (CRF)",
    "av1-crf": "AV1 rate factor (CRF)",
    "gamma": "gamma exponent",
    "low-light": "share of the light",
    "gaussian-noise": "noise (standard deviation)",
    "motion-blur": "motion blur (pixels)",
    "defocus": "defocus (radius in pixels)",
    "fog": "fog density",
    "combination": "combined distortions",
    "clean": "undistorted",
}

LOSSLESS = 101.0  # JPEG coordinate of an image that was never a JPEG: one above 100, to differ from quality 100

UNDISTORTED_CRF = (
    17.5  # the eye sees no loss from about 18 down; not a whole number, so that no level's own is as near to a frame's
)

_SPREAD = 0.25  # of ln(mean luma) over images of street scenes by day, used where a release does not record it
_LEAST_SPREAD = 0.05  # with images of one fixed scene, brightness would otherwise outweigh every other axis


class Properties(NamedTuple):
    """What a level changes: its value on each axis, in the order of `AXES`. `size` is width and height in pixels, None for the
    original size. `crf` is None without H.264, and at the fixed rate of `h264-WxH` levels. `unread`: names of the level's parts
    that are on no axis.
    """

    factor: float = 1.0
    size: tuple[int, int] | None = None
    crf: float | None = None
    quality: float = LOSSLESS
    unread: tuple[str, ...] = ()

    def differs_only_on(self, axis: int, other: "Properties") -> bool:
        """Whether the two differ on this axis, an index into `AXES`, and on no other."""
        pairs = enumerate(zip(self, other, strict=True))
        return all((mine != theirs) == (number == axis) for number, (mine, theirs) in pairs)


UNDISTORTED = Properties()


def properties_of(level: Level) -> Properties:
    """The properties of a level. In a combination brightness factors multiply; otherwise the last part on an axis counts."""
    properties = UNDISTORTED
    for part in level.parts:
        match part:
            case Brightness(factor):
                properties = properties._replace(factor=properties.factor * factor)
            case H264Size(width, height):
                properties = properties._replace(size=(width, height))
            case H264Crf(crf):
                properties = properties._replace(crf=float(crf))
            case Jpeg(quality):
                properties = properties._replace(quality=float(quality))
            case _ if not part.is_clean:
                properties = properties._replace(unread=(*properties.unread, part.name))
    return properties


def coordinates(properties: Properties, pixels: int | None) -> tuple[float, float, float, float]:
    """Coordinates in the order of `AXES`. `pixels`: of an original frame; None, unknown: the size's coordinate is 0."""
    size = math.log(math.prod(properties.size) / pixels) if properties.size and pixels else 0.0
    return math.log(properties.factor), size, UNDISTORTED_CRF if properties.crf is None else properties.crf, properties.quality


def units(luma_spread: float) -> tuple[float, float, float, float]:
    """The unit of distance per axis, as in `AXES`. `luma_spread`: standard deviation of ln(mean luma), 0 if unknown."""
    return max(luma_spread or _SPREAD, _LEAST_SPREAD), 0.05, 1.0, 5.0


def coordinate(level: Level) -> float | None:
    """The coordinate of a level on its family's axis, a frame size as ln(pixels); None for clean and combinations."""
    if level.family not in AXES:
        return level.value
    return coordinates(properties_of(level), pixels=1)[AXES.index(level.family)]


def axes_of(levels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group level names by family, each group sorted by coordinate; combinations keep their order. `clean` is the largest frame
    size and brightness factor 1, a member of these two axes; where neither is present, it is a group of its own.
    """
    axes: dict[str, list[str]] = {}
    for name in levels:
        axes.setdefault(parse_level(name).family, []).append(name)
    clean = axes.pop("clean", [])
    ends = [axes[axis] for axis in ("h264-size", "brightness") if axis in axes and "brightness-1.0" not in axes[axis]]
    for members in ends:
        members += clean
    if clean and not ends:
        axes["clean"] = clean
    return {axis: tuple(sorted(members, key=partial(_position, axis=axis))) for axis, members in axes.items()}


def _position(name: str, axis: str) -> float:
    level = parse_level(name)
    if level.is_clean and axis == "h264-size":
        return math.inf
    return coordinate(level) or 0.0


@dataclass(frozen=True)
class Neighbours:
    """The trained levels on both sides of an untrained one. `share`: weight of `upper` in their linear mixture, 0 to 1."""

    lower: str
    upper: str
    share: float

    @property
    def nearest(self) -> str:
        """The nearer of the two; the lower one if their distances are equal."""
        return self.upper if self.share > 0.5 else self.lower


def neighbours(level: str, trained: Iterable[str]) -> Neighbours | None:
    """The trained levels nearest to `level` on both sides of its axis, or None. Their shares are linear in the coordinate."""
    wanted = parse_level(level)
    target = coordinate(wanted)
    if target is None:
        return None
    others = [other for other in map(parse_level, trained) if other.family == wanted.family and other != wanted]
    points = sorted((coordinate(other) or 0.0, other.name) for other in others)
    for (low, lower), (high, upper) in itertools.pairwise(points):
        if low < target < high:
            return Neighbours(lower, upper, (target - low) / (high - low))
    return None


def short_name(level: Level) -> str:
    """The level's name where a title names its axis already: `10` for `jpeg-10`, `480×360` for `h264-480x360`."""
    if isinstance(level, H264Size):
        return f"{level.width}×{level.height}"
    return level.name if level.value is None else f"{level.value:g}"
