"""Tasks on Ray whose workers are lost: they are started again, and end with their result."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import ray

from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.core.events import Emit, Event
from gearnn_ray.ray_jobs import watch
from gearnn_ray.ray_jobs.run_tasks import TaskRunner, shown_name

pytestmark = pytest.mark.usefixtures("ray_cluster")


def tried_before(folder: Path) -> int:
    """How many attempts there were; this one is noted with its process."""
    before = len(list(folder.iterdir()))
    (folder / str(before)).write_text(str(os.getpid()))
    return before


def stop_once(folder: Path, emit: Emit) -> str:
    if tried_before(folder) == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    return "done"


def stop_once_in_a_check(folder: Path, again: bool) -> bool:
    if again and tried_before(folder) == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    return again


def die_in_each_epoch(folder: Path, emit: Emit) -> str:
    epoch = tried_before(folder) + 1
    emit(Event("progress", "full", "jpeg-10", 4 * epoch, 16, epoch, 4))
    if epoch < 4:
        time.sleep(1)  # the event is on its way
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def killed(folder: Path) -> bool:
    """Whether the process of the first attempt has ended."""
    try:
        process = psutil.Process(int((folder / "0").read_text()))
        process.wait(10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        process.kill()  # it is ours, and stopped
        return False
    return True


def test_a_stopped_worker_is_ended_and_its_task_done_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENT_SECONDS", 8.0)
    seen, results = list[Event](), list[object]()
    tasks = TaskRunner(ResourcesConfig(retries=1), seen.append)
    tasks.start("jpeg-10", stop_once, tmp_path, then=results.append)
    tasks.settle()
    assert results == ["done"]
    assert tasks.failed == {}
    (notice,) = [event.note for event in seen if event.kind == "notice"]
    assert notice.startswith("jpeg-10 is started again, from its last checkpoint: its process showed no sign of life for")
    assert killed(tmp_path)


def test_tasks_are_named_by_level_and_step_in_rays_dashboard() -> None:
    def _own_name(emit: Emit) -> str:
        name: str = ray.get_runtime_context().get_task_name()
        return name

    results, tasks = list[str](), TaskRunner(ResourcesConfig(), lambda _: None)
    tasks.start("jpeg-10", _own_name, then=results.append)
    tasks.settle()
    assert results == ["jpeg-10: own name"]
    assert shown_name("base", partial(partial(_own_name), 1)) == "base: own name"


def test_a_worker_that_stops_while_it_makes_images_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENT_SECONDS", 8.0)
    tasks = TaskRunner(ResourcesConfig(retries=1), lambda _: None)
    assert list(tasks.check_all(stop_once_in_a_check, [(tmp_path, False), (tmp_path, True)])) == [False, True]
    assert killed(tmp_path)


def test_a_task_that_gets_further_survives_more_losses_than_it_has_retries(tmp_path: Path) -> None:
    results = list[object]()
    tasks = TaskRunner(ResourcesConfig(retries=1), lambda _: None)
    tasks.start("jpeg-10", die_in_each_epoch, tmp_path, then=results.append)
    tasks.settle()
    assert (results, tasks.failed) == (["done"], {})


def test_a_task_that_gets_nowhere_is_given_up_with_the_reason(tmp_path: Path) -> None:
    def die(emit: Emit) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    tasks = TaskRunner(ResourcesConfig(retries=1), lambda _: None)
    tasks.start("jpeg-10", die)
    tasks.settle()
    assert "died" in tasks.failed["jpeg-10"]
