"""Whether a task's workers still work, and whether it is started again: decisions over plain numbers, without Ray.

A worker shows two things: a sign of life every few seconds, from a thread of its own, and the steps of its fine-tunes. The first
ends when the process is stopped, or its machine cut off; the second when the process lives and its work hangs.
"""

from dataclasses import dataclass, field, replace

from gearnn_ray.core.events import Event

SIGN_SECONDS = 3.0
"""Between a worker's signs of life."""

SILENT_SECONDS = 90.0
"""Without a sign of life: then the worker counts as hung."""

STEP_SECONDS = 600.0
"""Without a step in the middle of a fine-tune, at least; longer than a job waits for its store to take a checkpoint."""

STEPS = 20.0
"""Without a step for so many times the longest time that this fine-tune took for one report: then its work counts as hung."""

_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Worker:
    """A process that runs a task. started: in seconds since 1970, so that it is not taken for a later one with its number."""

    node: str
    pid: int
    started: float


@dataclass(frozen=True)
class Watched:
    """What is known of one task. losses: attempts that were lost since it last got further. reached: the places that it came to.
    signs: when each worker of this attempt last showed life. step: when its fine-tune last reported, None outside of one.
    longest: seconds between two reports of that fine-tune, at most.
    """

    losses: int = 0
    reached: frozenset[tuple[str, str, int]] = frozenset()
    signs: dict[Worker, float] = field(default_factory=dict)
    step: float | None = None
    longest: float = 0.0

    def sign(self, worker: Worker, now: float) -> "Watched":
        """After a sign of life."""
        return replace(self, signs={**self.signs, worker: now})

    def leave(self, worker: Worker) -> "Watched":
        """After a worker that is done has said so."""
        return replace(self, signs={each: seen for each, seen in self.signs.items() if each != worker})

    def report(self, event: Event, now: float) -> "Watched":
        """After an event. An epoch that the task begins or ends for the first time, or a finished stage, forgets the losses."""
        stepping = event.kind == "progress" and event.step < event.steps
        longest = max(self.longest, now - self.step) if stepping and self.step is not None else 0.0
        watched = replace(self, step=now if stepping else None, longest=longest)
        if (places := _places(event)) <= self.reached:
            return watched
        return replace(watched, losses=0, reached=self.reached | places)

    def lost(self) -> "Watched":
        """After the loss of an attempt."""
        return replace(self, losses=self.losses + 1, signs={}, step=None, longest=0.0)

    def hung(self, now: float) -> str | None:
        """Why this attempt counts as hung, if it does. Limits double with each loss, so that work that is only slow ends too. A
        task that waits for resources has no workers yet, and never counts as hung.
        """
        patience = 2.0**self.losses
        silent = now - min(self.signs.values(), default=now)
        if silent > patience * SILENT_SECONDS:
            return f"its process showed no sign of life for {silent:.0f} s"
        if self.signs and self.step is not None:
            waited, limit = now - self.step, max(STEP_SECONDS, STEPS * self.longest)
            if waited > patience * limit:
                return f"its fine-tune made no step for {waited:.0f} s"
        return None

    def again(self, retries: int) -> float | None:
        """Seconds until a task whose attempt was lost is started again; None if it was lost too often without getting further."""
        if self.losses > retries:
            return None
        return 0.0 if self.losses <= 1 else min(_LONGEST_PAUSE, 5.0 * 2 ** (self.losses - 2))


def _places(event: Event) -> frozenset[tuple[str, str, int]]:
    """Places that an event shows to be reached: of a stage, 2e - 1 where epoch e began, 2e where it ended, -2 where all ended."""
    numbers = set[int]()
    if event.kind == "progress":
        numbers = {2 * event.epoch - 1, 2 * (event.step * event.epochs // max(1, event.steps))}
    elif event.kind == "finished":
        numbers = {-2}
    return frozenset((event.level, event.stage, number) for number in numbers)
