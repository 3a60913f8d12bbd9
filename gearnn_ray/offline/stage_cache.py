"""Results of stages, kept in the store under their keys: the whole resume mechanism. A stage is a pure function of its key's
inputs: a repeated job verifies existing results and computes the others. Under `torch.distributed`, only rank 0 uses the store.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch.distributed as dist

from gearnn_ray.core.errors import StoreUnavailableError
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.offline.records import ResultT, StageResult, from_json, to_json
from gearnn_ray.store.releases import Store
from gearnn_ray.training.trainer import Progress

T = TypeVar("T")


class NotCachedError(Exception):
    """A stage is not in the store, and only looking was allowed."""


class StoredCheckpoint:
    """An unfinished fine-tune's state, in the store: a node that is lost takes no finished epoch with it. A state that cannot be
    written is passed to `warn` as a sentence, because only the loss of the process makes it matter.
    """

    def __init__(self, store: Store, key: str, warn: Callable[[str], None]) -> None:
        self._store, self._key, self._warn = store, key, warn

    def load(self) -> bytes | None:
        return self._store.get_checkpoint(self._key)

    def save(self, data: bytes) -> None:
        try:
            self._store.put_checkpoint(self._key, data)
        except (OSError, StoreUnavailableError) as error:
            self._warn(f"a checkpoint could not be written; the fine-tune goes on, and its next epoch writes another: {error}")


class StageCache:
    """Looks up the stages of one level and computes the missing ones; with `only_cached` it raises NotCachedError instead."""

    def __init__(self, store: Store, level: str, emit: Emit, only_cached: bool = False) -> None:
        self.store, self.level, self.emit, self.only_cached = store, level, emit, only_cached
        self._distributed = dist.is_initialized() and dist.get_world_size() > 1
        self.leads = not self._distributed or dist.get_rank() == 0
        """Whether this process is the one that reads and writes."""
        self.used: set[str] = set()
        """The keys of all results so far, found or computed."""

    def result(
        self,
        kind: type[ResultT],
        key: str,
        compute: Callable[[], ResultT | None],
        intact: Callable[[ResultT], bool] = lambda _: True,
        label: str = "",
        metric: str = "",
    ) -> ResultT:
        """The stage's result on every rank: the stored one if it is intact, else a new one. compute: may return None on ranks
        that do not lead. label: the stage's name in events, by default `kind.stage`. metric: the name of the result's `score`.
        """

        def compute_it(keys: Sequence[str]) -> list[ResultT | None]:
            del keys
            return [compute()]

        return self.results(kind, [key], compute_it, intact, label, metric)[0]

    def results(
        self,
        kind: type[ResultT],
        keys: Sequence[str],
        compute: Callable[[Sequence[str]], Sequence[ResultT | None]],
        intact: Callable[[ResultT], bool] = lambda _: True,
        label: str = "",
        metric: str = "",
    ) -> list[ResultT]:
        """Like `result`, for results computed together. compute: gets the missing keys, and returns results in their order."""
        label = label or kind.stage
        self.used |= set(keys)
        found = {key: self._look_up(kind, key, intact) for key in keys} if self.leads else {}
        known = self._agree({key: each for key, each in found.items() if each is not None}) or {}
        results = {key: result for key, (result, _) in known.items()}
        missing = [key for key in dict.fromkeys(keys) if key not in known]
        if not missing:
            remarks = dict.fromkeys(remark for _, remark in known.values() if remark)
            self.emit(replace(self._event("reused", label, results, metric), note="; ".join(remarks)))
            return [results[key] for key in keys]
        if self.only_cached:
            raise NotCachedError
        self.emit(Event("started", label, self.level))
        started = time.perf_counter()
        computed = self._agree([*compute(missing)]) or []
        for key, result in zip(missing, computed, strict=True):
            assert result is not None
            results[key] = result
            if self.leads:
                record = to_json(result)
                self.store.put_record(key, {**record, "blobs": self.store.blobs_in(record)})
                self.store.drop_checkpoint(key)
        seconds = time.perf_counter() - started
        self.emit(replace(self._event("finished", label, results, metric), seconds=seconds))
        return [results[key] for key in keys]

    def checkpoint(self, key: str, label: str) -> StoredCheckpoint:
        """Where the stage `label` keeps its state while it is unfinished."""
        return StoredCheckpoint(self.store, key, lambda note: self.emit(Event("notice", label, self.level, note=note)))

    def progress(self, label: str) -> Callable[[Progress], None]:
        """What a fine-tune reports, as events of its stage."""

        def report(p: Progress) -> None:
            self.emit(Event("progress", label, self.level, p.step, p.steps, p.epoch + 1, p.epochs, p.loss))

        return report

    def _look_up(self, kind: type[ResultT], key: str, intact: Callable[[ResultT], bool]) -> tuple[ResultT, str] | None:
        record = self.store.get_record(key)
        found = None if record is None else from_json(kind, record)
        return found if found is not None and intact(found[0]) else None

    def _event(self, what: str, label: str, results: Mapping[str, StageResult], metric: str) -> Event:
        only = next(iter(results.values())) if len(results) == 1 else None
        score, seconds = getattr(only, "score", None), getattr(only, "seconds", 0.0)
        return Event(what, label, self.level, score=score, seconds=seconds, metric=metric)  # type: ignore[arg-type]

    def _agree(self, value: T | None) -> T | None:
        """Rank 0's value, on every rank."""
        if not self._distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
