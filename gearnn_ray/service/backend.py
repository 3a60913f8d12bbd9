"""What answers requests, as HTTP sees it: the networks of one or more bundles, behind a `Backend`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from gearnn_ray.core.errors import UserError
from gearnn_ray.knobs.wire import Advice, Head, Report
from gearnn_ray.service.stream_pages import LiveStreams
from gearnn_ray.serving.frames import Frame
from gearnn_ray.serving.level_estimation import LevelEstimate
from gearnn_ray.tasks.base import Task
from gearnn_ray.video.decoding import VideoFrame
from gearnn_ray.video.live import StreamState

__all__ = ["Backend", "BundleHealth", "Health", "Prediction", "UnknownBundleError"]


class UnknownBundleError(UserError):
    """A request names a bundle that is not served."""


@dataclass(frozen=True)
class Prediction:
    """A network's result for one frame, at the level used, by the release name@sha256:<hex>.

    content: `Task.content` of the media type asked for, or `Task.answer` for a frame of a stream. seconds: time in the "queue"
    and in the "network". class_names: of the release, possibly empty.
    """

    content: Any
    estimate: LevelEstimate
    release: str
    seconds: Mapping[str, float]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class BundleHealth:
    """The state of one bundle: its release (None while none could be loaded), and what went wrong at the last look-up.

    is_copy: the last good release is served from this node's copy, because neither the store's nor an older one could be loaded.
    """

    digest: str | None = None
    task: str | None = None
    levels: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    problem: str | None = None
    is_copy: bool = False


@dataclass(frozen=True)
class Health:
    """The state of a replica: degraded if any bundle has a problem. `bundles` is by reference, "name:tag" or "name@sha256:…"."""

    status: Literal["ok", "degraded"]
    device: str
    bundles: Mapping[str, BundleHealth]


class Cameras(LiveStreams, Protocol):
    """Cameras by name."""

    async def all(self) -> Mapping[str, StreamState]:
        """How every camera is now."""
        ...


class Backend(Protocol):
    """Answers requests with the networks of one or more bundles. A bundle of None is the default one.

    Every method that takes a bundle raises `UnknownBundleError` for one that is not served, and `CorruptStoreError` while it
    could not be loaded.
    """

    @property
    def cameras(self) -> "Cameras":
        """The cameras that the service keeps open."""
        ...

    def has_cameras(self, bundle: str | None) -> bool:
        """Whether the cameras are answered by this bundle."""
        ...

    def task(self, bundle: str | None) -> Task:
        """The task of a bundle's network."""
        ...

    def answer_bytes(self, bundle: str | None, media_type: str, height: int, width: int) -> int:
        """Size of the answer to a frame of this size, as far as it is known before the network runs (`Task.answer_bytes`)."""
        ...

    async def predict(
        self, frame: Frame, level: str | None, stream: str | None, bundle: str | None, media_type: str
    ) -> Prediction:
        """What an answer for one frame is made of. `level` None: estimated. Raises `UserError` for a level that is not served."""
        ...

    async def predict_next(self, frame: VideoFrame, stream: str, bundle: str | None) -> Prediction:
        """What the line of a stream's next frame is made of. The level is estimated before the first wait, so that frames may be
        processed at the same time, if they are given in their order.
        """
        ...

    async def advise(
        self, stream: str, bundle: str | None, frame: VideoFrame, estimate: LevelEstimate, head: Head, report: Report
    ) -> Advice:
        """The next knobs of a camera, from the last frame of its segment at the level used, and from what the camera says of the
        segment. Raises `WireError` where that does not fit together.
        """
        ...

    def count_line(self, bundle: str | None, level: str, status: int) -> None:
        """Count a line of a stream: of a frame at this level (status 200), or of an error."""
        ...

    def health(self) -> Health:
        """The state of this replica."""
        ...
