"""What the stages of a job have to say while they work. Plain values: workers send them, reporters draw them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

StageName = Literal["images", "base", "original", "full", "measure", "selection", "partial"]
"""The split job's stages; an evaluation names its own."""


@dataclass(frozen=True)
class Event:
    """Something a stage has to say: `step` of `steps` while it works, then `finished` or `reused`."""

    kind: Literal["started", "progress", "finished", "reused"]
    stage: str
    level: str
    """a level's name, or "all" for what belongs to no single one"""
    step: int = 0
    steps: int = 0
    epoch: int = 0
    epochs: int = 0
    loss: float | None = None
    score: float | None = None
    seconds: float = 0.0
    time: float = field(default_factory=time.time)
    """when it happened, seconds since 1970 on the clock of the worker that says it"""


Emit = Callable[[Event], None]
