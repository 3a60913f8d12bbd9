"""Device, precision and threads of a job: decided once, by looking at all nodes."""

from collections.abc import Sequence

import pytest

from gearnn_ray.config.recipe import Recipe
from gearnn_ray.config.resources import ResourcesConfig
from gearnn_ray.offline.execution import Processor, decide
from gearnn_ray.offline.records import Execution

PLAIN, FAST = Processor(2, "float32", None), Processor(8, "bfloat16", None)
WITH_GPU = Processor(16, "float32", "bfloat16")


@pytest.mark.parametrize(
    ("processors", "gpus", "expected"),
    [
        ([FAST], 0, ("cpu", "bfloat16")),
        ([FAST, FAST], 0, ("cpu", "bfloat16")),
        ([FAST, PLAIN], 0, ("cpu", "float32")),  # wherever a task runs, the bits are the same
        ([PLAIN], 0, ("cpu", "float32")),
        ([WITH_GPU, PLAIN], 0.5, ("cuda", "bfloat16")),
        ([Processor(4, "bfloat16", "float32")], 1, ("cuda", "float32")),
        ([], 0, ("cpu", "float32")),
    ],
)
def test_auto_is_what_every_node_gains_from(processors: Sequence[Processor], gpus: float, expected: tuple[str, str]) -> None:
    found = decide(Recipe(), Recipe(), ResourcesConfig(gpus=gpus), processors)
    assert (found.levels.device, found.levels.precision) == expected
    assert (found.base.device, found.base.precision) == expected


def test_what_is_asked_for_is_what_is_done() -> None:
    found = decide(Recipe(precision="float32"), Recipe(precision="bfloat16"), ResourcesConfig(), [FAST, PLAIN])
    assert found.levels == Execution("cpu", "float32", 1)
    assert found.base == Execution("cpu", "bfloat16", 8)


@pytest.mark.parametrize(("cpus", "threads", "of_base"), [(1, 1, 8), (0.5, 1, 8), (4, 4, 8), (12, 12, 12)])
def test_a_level_has_the_threads_it_reserves_and_the_base_those_of_the_largest_node(
    cpus: float, threads: int, of_base: int
) -> None:
    found = decide(Recipe(), Recipe(), ResourcesConfig(cpus=cpus), [PLAIN, FAST])
    assert (found.levels.threads, found.base.threads) == (threads, of_base)
