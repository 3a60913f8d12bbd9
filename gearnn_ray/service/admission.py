"""What one replica admits at a time. Whoever comes when it is full is refused at once, so that nobody waits for a slow client.

Used on one event loop, without locks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.service.origins import Hosts
from gearnn_ray.serving.frames import Limits

__all__ = ["Admission", "BusyError", "Quota", "Reservation"]

_MIB = 2**20
_WAITING = 128  # requests that wait beside those of two batches


class BusyError(UserError):
    """The service has no room for this request now. 503."""

    status = 503


class Quota:
    """A number of things that may be in use at the same time; name: of them, in the sentence of a refusal."""

    def __init__(self, most: int, name: str) -> None:
        self.most, self._name, self.used = most, name, 0

    @contextmanager
    def reserved(self, amount: int = 0) -> Iterator["Reservation"]:
        """A part of the quota, which is given back at the end of the context. Raises BusyError where it is used up."""
        reservation = Reservation(self)
        try:
            reservation.add(amount)
            yield reservation
        finally:
            self.used -= reservation.amount

    def _take(self, amount: int) -> None:
        if amount > 0 and self.used + amount > self.most:
            raise BusyError(f"the service is busy with {self._name}, at most {self.most:,}: try again in a few seconds")
        self.used += amount


class Reservation:
    """What one request uses of a quota."""

    def __init__(self, quota: Quota) -> None:
        self._quota, self.amount = quota, 0

    def add(self, amount: int) -> None:
        """Use more, or less where it is negative. Raises BusyError where there is no more."""
        self._quota._take(amount)
        self.amount += amount


@dataclass(frozen=True, eq=False)
class Admission:
    """The limits of one replica, and what is in use of them.

    frame: of a body and a frame. body_seconds: within which a whole body arrives, and an upload brings its next frame.
    answer_bytes: of an answer. segment_frames: of a whole segment. requests: that wait or are processed. streams: segments and
    uploads that are processed. memory: bytes of bodies, decoded frames and answers. hosts: to which requests may be sent.
    """

    frame: Limits
    body_seconds: float
    answer_bytes: int
    segment_frames: int
    requests: Quota
    streams: Quota
    memory: Quota
    hosts: Hosts = field(default_factory=Hosts)

    @classmethod
    def of_config(cls, config: ServeConfig) -> "Admission":
        """As the operator has configured it."""
        limits = config.limits
        return cls(
            Limits(int(limits.body_mib * _MIB), int(limits.megapixels * 1e6)),
            limits.body_seconds,
            int(limits.answer_mib * _MIB),
            limits.segment_frames,
            Quota(2 * config.max_batch + _WAITING, "requests"),
            Quota(limits.streams, "streams"),
            Quota(int(limits.in_flight_mib * _MIB), "bytes of requests"),
            Hosts(config.host, config.allowed_hosts),
        )
