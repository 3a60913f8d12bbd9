"""The lines of the campaign of `benchmarks/chaos.py`, a module for each kind of fault."""

from benchmarks.faults import clusters, frames, hostile, jobs, long_service, s3, service, store
from benchmarks.faults.campaign import Line

LINES: tuple[Line, ...] = (
    *jobs.LINES,
    *clusters.LINES,
    *store.LINES,
    *hostile.LINES,
    *s3.LINES,
    *frames.LINES,
    *service.LINES,
    *long_service.LINES,
)
