"""Tasks: what a network is trained for and scored by. Other rooms get one by name and know only `tasks.base.Task`."""

import copy

from gearnn_ray.core.errors import UserError
from gearnn_ray.data.dataset import AGREEMENT
from gearnn_ray.tasks.base import Task
from gearnn_ray.tasks.detection import Detection
from gearnn_ray.tasks.segmentation import Segmentation

_ALL: tuple[Task, ...] = (Segmentation(), Detection())
TASKS = {task.name: task for task in _ALL}


def task_by_name(name: str) -> Task:
    """Raises UserError for a task that this version does not have."""
    if name not in TASKS:
        raise UserError(f"the task is {name!r}, expected {' or '.join(TASKS)}: use a gearnn_ray that has this task")
    return TASKS[name]


def agreement(task: Task) -> Task:
    """The same task for images without labels, whose scores are named as what they are: the agreement with the base's own answers
    to the undistorted images.
    """
    named = copy.copy(task)
    named.metrics, named.shown = (tuple(f"{AGREEMENT} {metric}" for metric in each) for each in (task.metrics, task.shown))
    return named
