"""Which frames of a segment are sent: one of so many, and of these only what differs from the last one sent.

The differences are Reducto's (Li et al., SIGCOMM 2020) with its constants, each a share of the frame's pixels, and computed with
NumPy alone: `pixel` counts pixels whose brightness has changed, `area` is the largest connected area of such pixels in blurred
frames, grown by a pixel, and `edge` counts pixels that have become or ceased to be part of an edge. Reducto takes the outline of
an area and Canny's edges; here holes in an area do not count, and an edge is a steep gradient.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gearnn_ray.knobs.settings import Feature, FrameFilter, Image

__all__ = ["difference", "frames_to_send"]

Plane = NDArray[np.float32]  # [H, W]
Mask = NDArray[np.bool_]  # [H, W]

_CHANGED = 21  # of 255 levels: what is more counts as a change
_BLUR = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 2.0**2)).astype(np.float32)  # 11 pixels wide, OpenCV's sigma for that
_BLUR /= _BLUR.sum()
_STEEP = 101  # Sobel's gradient |x| + |y| of the brightness: the lower threshold of Reducto's edges
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)


def frames_to_send(frames: Sequence[Image], every: int = 1, frame_filter: FrameFilter | None = None) -> tuple[int, ...]:
    """Indices of the frames that are sent, in order. The first frame always is."""
    candidates = range(0, len(frames), every)
    if frame_filter is None or frame_filter.threshold <= 0:
        return tuple(candidates)
    feature, difference_of = _FEATURES[frame_filter.feature]
    sent: list[int] = []
    last: Plane = np.empty(0, np.float32)
    for index in candidates:
        features = feature(frames[index])
        if not sent or difference_of(features, last) >= frame_filter.threshold:
            sent.append(index)
            last = features
    return tuple(sent)


def difference(feature: Feature, frame: Image, other: Image) -> float:
    """By how much two frames of one size differ in a feature: a share of the frame's pixels, 0 to 1."""
    features, difference_of = _FEATURES[feature]
    return difference_of(features(frame), features(other))


def _brightness(frame: Image) -> Plane:
    return np.asarray(frame @ _LUMA, np.float32)


def _blurred(frame: Image) -> Plane:
    plane = np.pad(_brightness(frame), len(_BLUR) // 2, "reflect" if min(frame.shape[:2]) > len(_BLUR) // 2 else "edge")
    rows = np.lib.stride_tricks.sliding_window_view(plane, len(_BLUR), 0) @ _BLUR
    return np.asarray(np.lib.stride_tricks.sliding_window_view(rows, len(_BLUR), 1) @ _BLUR, np.float32)


def _edges(frame: Image) -> Plane:
    """1 where the blurred brightness is steep, else 0."""
    p = np.pad(_blurred(frame), 1, "edge")
    smooth_y = p[:-2] + 2 * p[1:-1] + p[2:]
    smooth_x = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    steepness = np.abs(smooth_y[:, 2:] - smooth_y[:, :-2]) + np.abs(smooth_x[2:] - smooth_x[:-2])
    return np.asarray(steepness > _STEEP, np.float32)


def _changed_share(a: Plane, b: Plane) -> float:
    return float(np.mean(np.abs(a - b) > _CHANGED))


def _largest_area(a: Plane, b: Plane) -> float:
    changed = np.pad(np.abs(a - b) > _CHANGED, 1)
    grown = np.zeros_like(changed[1:-1, 1:-1])
    for y in range(3):
        for x in range(3):
            grown |= changed[y : y + grown.shape[0], x : x + grown.shape[1]]
    return _largest_component(grown) / grown.size


def _largest_component(mask: Mask) -> int:
    """Pixels of the largest area whose pixels touch at a side or corner."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)  # runs of pixels within a row, from start to before end
    ends = np.nonzero(edges == -1)[1]
    parents = np.arange(len(rows))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    first_of_row = np.searchsorted(rows, np.arange(mask.shape[0] + 1))
    for row in range(1, mask.shape[0]):
        above, here, last = int(first_of_row[row - 1]), int(first_of_row[row]), int(first_of_row[row + 1])
        first = here
        while above < first and here < last:
            if starts[above] <= ends[here] and starts[here] <= ends[above]:
                parents[root(here)] = root(above)
            if ends[above] < ends[here]:
                above += 1
            else:
                here += 1
    if not len(rows):
        return 0
    return int(np.bincount([root(run) for run in range(len(rows))], ends - starts).max())


def _edge_share(a: Plane, b: Plane) -> float:
    return float(np.mean(a != b))


_FEATURES: Final[dict[Feature, tuple[Callable[[Image], Plane], Callable[[Plane, Plane], float]]]] = {
    "pixel": (_brightness, _changed_share),
    "area": (_blurred, _largest_area),
    "edge": (_edges, _edge_share),
}
