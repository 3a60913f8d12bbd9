"""Metrics of a replica. Knows nothing about requests."""

from typing import Any

from ray.serve import metrics

__all__ = ["Metrics"]

_LATENCIES = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
# boundaries between whole numbers, because Ray computes a histogram's sum from the centres of its buckets
_COUNTS = [0.5, 1.5, 2.5, 4.5, 8.5, 16.5, 32.5, 64.5, 128.5]
_DISTANCES = [0.01, 0.5, 1, 2, 4, 8, 16, 32]


class Metrics:
    """Metrics of one replica for Prometheus, beside Serve's own. No tag has a value that a client chooses freely."""

    def __init__(self) -> None:
        def keys(*names: str) -> Any:
            return names  # Ray's annotation allows one key only

        self.seconds = metrics.Histogram("gearnn_request_seconds", "Time from request to answer.", _LATENCIES)
        self.requests = metrics.Counter(
            "gearnn_requests", "Answers of /predict, by the level used.", keys("bundle", "level", "status")
        )
        self.lines = metrics.Counter(
            "gearnn_lines", "Lines about frames of streams (200), and errors.", keys("bundle", "level", "status")
        )
        self.batch_size = metrics.Histogram("gearnn_batch_size", "Frames of one pass.", _COUNTS)
        self.batch_levels = metrics.Histogram("gearnn_batch_levels", "Different levels of one pass.", _COUNTS)
        self.distance = metrics.Histogram(
            "gearnn_level_distance", "Distance from a frame to the level used.", _DISTANCES, keys("bundle")
        )
        self.release = metrics.Gauge("gearnn_release", "1: served now, 0: served before.", keys("bundle", "digest"))
        self.copy = metrics.Gauge(
            "gearnn_release_copy", "1: served from this node's copy of the last good release.", keys("bundle")
        )
