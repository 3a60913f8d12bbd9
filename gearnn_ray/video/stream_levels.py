"""The level of every frame of a stream: changes at once where the stream says that it changes, and calm everywhere else.

Size, rate factor and codec are known exactly, and a new coding of a stream begins with a keyframe: there a new level is taken on
that very frame. Brightness and QP drift with the content of the scene: a level in use is kept until another one is nearer by
`_MARGIN`, so that two levels at equal distance do not alternate.
"""

from gearnn_ray.serving.frames import Evidence
from gearnn_ray.serving.level_estimation import LevelEstimate, LevelEstimator

__all__ = ["StreamLevels"]

_MARGIN = 0.5  # units of distance: half of what the axes call one step


class StreamLevels:
    """Estimates the levels of one stream's frames, in order. A release that is replaced needs a new one."""

    def __init__(self, estimator: LevelEstimator, stream: str) -> None:
        self._estimator, self._stream = estimator, stream
        self._coding: tuple[float | None, ...] = ()
        self._level: str | None = None
        self.changes = 0
        """how often the level has changed"""

    def estimate(self, evidence: Evidence) -> LevelEstimate:
        """The level of the next frame."""
        jpeg = evidence.jpeg
        # what the bitstream says exactly
        coding = (evidence.height, evidence.width, evidence.crf, None if jpeg is None else jpeg.quality)
        held = self._level if coding == self._coding else None
        estimate = self._estimator.estimate(evidence, self._stream, held=held, margin=_MARGIN)
        self.changes += self._level is not None and estimate.level != self._level
        self._coding, self._level = coding, estimate.level
        return estimate
