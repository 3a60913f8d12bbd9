"""What the stages of a job report while they run. Plain values: workers send them, reporters print them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Event:
    """A report of one stage: `step` of `steps` while it runs, then `finished` or `reused`; a `notice` has only its note to tell.
    `level` is a level's name, or "all" for a stage that serves several. `score` is in percent, and `metric` names it, such as
    mIoU. `seconds` is how long the stage took, `time` when it reported, in seconds since 1970 by the worker's clock, and `note` a
    remark for the reader.
    """

    kind: Literal["started", "progress", "finished", "reused", "notice"]
    stage: str
    level: str
    step: int = 0
    steps: int = 0
    epoch: int = 0
    epochs: int = 0
    loss: float | None = None
    score: float | None = None
    seconds: float = 0.0
    time: float = field(default_factory=time.time)
    metric: str = ""
    note: str = ""


Emit = Callable[[Event], None]
