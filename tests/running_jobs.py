"""Split jobs that are watched while they run, in this process or in one of their own; and the processes that belong to them.

As a program it is a driver: `python -m tests.running_jobs SETTINGS ARGUMENT…`, where SETTINGS is a JSON object: `cpus` of a Ray
of its own (0: it joins the one of its environment), and `lease`, the seconds that its lease lasts. Its events are JSON lines.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from gearnn_ray.cli.main import run_split
from gearnn_ray.config.command_line import parse_command_line
from gearnn_ray.config.split import SplitConfig
from gearnn_ray.core.events import Event
from gearnn_ray.offline import pipeline
from gearnn_ray.ray_jobs.local_ray import local_ray
from gearnn_ray.store import leases
from tests import tiny
from tests.conftest import ROOT

Line = dict[str, Any]
# every process of these tests and of their jobs reads it from the environment
GATES = Path(os.environ.setdefault("GEARNN_TEST_GATES", f"{tempfile.gettempdir()}/gearnn-gates-{os.getpid()}"))


@contextlib.contextmanager
def closed(*gates: int) -> Iterator[None]:
    """While the context lasts, networks with gates wait before the training steps of these numbers."""
    GATES.mkdir()
    try:
        for gate in gates:
            (GATES / str(gate)).touch()
        yield
    finally:
        shutil.rmtree(GATES)


class Job:
    """A running job whose events can be watched while it works."""

    def __init__(self, process: "subprocess.Popen[str]", see: Callable[[Line], object] = lambda _: None) -> None:
        self.process = process
        self.lines: list[Line] = []
        self.errors = ""
        self._see = see
        self._readers = [threading.Thread(target=self._read, daemon=True), threading.Thread(target=self._stderr, daemon=True)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            for line in tiny.events(text):
                self.lines.append(line)
                self._see(line)

    def _stderr(self) -> None:
        assert self.process.stderr is not None
        self.errors = self.process.stderr.read()

    def tell(self, text: str) -> None:
        """A line on its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def wait_for(self, seen: Callable[[list[Line]], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not seen(list(self.lines)):
            assert self.process.poll() is None, f"the job ended first:\n{self.errors}"
            assert time.monotonic() < deadline, f"not seen within {seconds} s in {self.lines[-3:]}"
            time.sleep(0.05)

    def end(self, seconds: float = 180) -> int:
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(10)
        return code


def start_program(
    module: str,
    *arguments: str,
    see: Callable[[Line], object] = lambda _: None,
    environment: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
) -> Job:
    """`before… python -m module arguments`, which reads and prints lines."""
    process = subprocess.Popen(
        [*before, sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
    )  # fmt: skip
    return Job(process, see)


def run_here(arguments: list[str], see: Callable[[Line], object] = lambda _: None) -> list[Line]:
    """Run a job on the Ray of this process; its events, of which each is shown to `see`."""
    lines: list[Line] = []

    def emit(event: Event) -> None:
        lines.append({"event": event.kind, **asdict(event)})
        see(lines[-1])

    config, _ = parse_command_line(SplitConfig, arguments, "")
    failed = pipeline.split(config, emit).failed
    assert not failed, f"levels failed: {dict(failed)}"
    return lines


def at_work(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Ray's workers that run a task of a job, whose title is "ray::LABEL: WHAT" (`ray_jobs.run_tasks.shown_name`)."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):  # some come and go
            if re.match(r"ray::.*: ", " ".join(process.cmdline())):
                found.append(process)
    return found


def named(processes: Iterable[psutil.Process], *names: str) -> list[psutil.Process]:
    """Those whose command line contains one of the names."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):  # some come and go
            line = " ".join(process.cmdline())
            if any(name in line for name in names):
                found.append(process)
    return found


def descendants(pid: int) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The workers of a driver that run a level, and Ray's other processes."""
    processes = psutil.Process(pid).children(recursive=True)
    workers = at_work(processes)
    return workers, [process for process in processes if process not in workers]


def wait_until_gone(workers: list[psutil.Process], others: list[psutil.Process]) -> None:
    """Workers follow their driver within seconds; Ray's agents linger, and are ended here, by id."""
    still_working = psutil.wait_procs(workers, timeout=30)[1]
    kill_all(psutil.wait_procs(others, timeout=0.5)[1])
    assert not still_working


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    given = list(processes)
    for process in given:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(given, timeout=30)


def same_release(store: Path, other: Path, earlier: frozenset[str] = frozenset()) -> bool:
    """Whether two stores hold the same weights and the same release `tiny`, but for its time, tables and figures."""
    from gearnn_ray.store.releases import Store

    ours, theirs = (Store(each).pull("tiny").manifest for each in (store, other))
    of_its_time = {"created": "", "tables": {}, "figures": {}}
    return tiny.blobs(store) == tiny.blobs(other) | earlier and {**ours, **of_its_time} == {**theirs, **of_its_time}


def main() -> int:
    settings, *arguments = sys.argv[1:]
    chosen = json.loads(settings)
    leases.LEASE_SECONDS = chosen.get("lease", leases.LEASE_SECONDS)
    cpus = chosen.get("cpus", 0)
    own = local_ray(num_cpus=cpus, log_to_driver=False, logging_level="error") if cpus else contextlib.nullcontext()
    with tiny.without_figures(tiny.SPLIT_FIGURES), own:
        return run_split([*arguments, "--json"])


if __name__ == "__main__":
    sys.exit(main())
