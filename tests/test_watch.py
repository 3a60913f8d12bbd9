"""Whether a worker hangs and whether its task is started again, decided over plain numbers."""

from gearnn_ray.core.events import Event
from gearnn_ray.ray_jobs.watch import SILENT_SECONDS, STEP_SECONDS, STEPS, Watched, Worker

WORKER, OTHER = Worker("a node", 12, 1.0), Worker("another node", 12, 2.0)


def step(number: int, of: int = 100, epoch: int = 1, stage: str = "full") -> Event:
    return Event("progress", stage, "jpeg-10", number, of, epoch, 4)


def test_a_task_that_waits_for_resources_never_hangs() -> None:
    assert Watched().hung(1e9) is None


def test_a_worker_without_a_sign_of_life_hangs() -> None:
    watched = Watched().sign(WORKER, 10)
    assert watched.hung(10 + SILENT_SECONDS) is None
    assert watched.hung(11 + SILENT_SECONDS) == "its process showed no sign of life for 91 s"
    assert watched.sign(WORKER, 50).hung(11 + SILENT_SECONDS) is None


def test_one_silent_worker_of_a_group_is_enough_unless_it_has_said_that_it_is_done() -> None:
    watched = Watched().sign(WORKER, 0).sign(OTHER, 0).sign(WORKER, 200)
    assert watched.hung(200) is not None
    assert watched.leave(OTHER).hung(200) is None
    assert watched.leave(OTHER).leave(WORKER).hung(1e9) is None


def test_a_worker_that_lives_and_makes_no_step_hangs() -> None:
    watched = Watched().report(step(1), 0).report(step(2), 2)
    now = 3 + STEP_SECONDS
    assert watched.sign(WORKER, now).hung(now - 2) is None
    assert watched.sign(WORKER, now).hung(now) == "its fine-tune made no step for 601 s"


def test_steps_that_take_long_may_take_long() -> None:
    watched = Watched().report(step(1), 0).report(step(2), 100)
    limit = 100 + STEPS * 100
    assert watched.sign(WORKER, limit).hung(limit) is None
    assert watched.sign(WORKER, limit + 1).hung(limit + 1) is not None


def test_outside_of_a_fine_tune_only_signs_of_life_count() -> None:
    """How long an evaluation takes has not been measured."""
    for event in (step(100, 100), Event("finished", "full", "jpeg-10"), Event("started", "partial", "jpeg-10")):
        assert Watched().report(step(99), 0).report(event, 1).sign(WORKER, 1e6).hung(1e6) is None


def test_limits_double_with_each_loss() -> None:
    watched = Watched().lost().lost().sign(WORKER, 0)
    assert watched.hung(4 * SILENT_SECONDS) is None
    assert watched.hung(4 * SILENT_SECONDS + 1) is not None


def test_nothing_of_a_lost_attempt_counts_for_the_next_one() -> None:
    watched = Watched().sign(WORKER, 0).report(step(1), 0).lost()
    assert watched.hung(1e9) is None


def test_a_task_is_given_up_when_it_is_lost_too_often_without_getting_further() -> None:
    watched, pauses = Watched(), []
    for _ in range(4):
        watched = watched.lost()
        pauses.append(watched.again(retries=3))
    assert pauses == [0, 5, 10, None]
    assert Watched().lost().again(retries=0) is None


def test_a_task_that_gets_further_survives_any_number_of_losses() -> None:
    watched = Watched()
    for epoch in range(1, 100):
        # each attempt does the epoch again in which the last one was lost, and reaches the next
        watched = watched.report(step(1, epoch=epoch), 0).report(step(50, epoch=epoch + 1), 1).lost()
        assert watched.again(retries=1) == 0
    assert watched.report(step(60, epoch=100), 2).lost().again(retries=1) is None  # it came no further than before


def test_an_epoch_that_ends_is_further_although_it_had_begun_before() -> None:
    """Its checkpoint is written, although the worker is lost again before it has begun the next one."""
    watched = Watched().report(step(26, epoch=2), 0).lost()
    assert watched.report(step(50, epoch=2), 1).lost().again(retries=1) == 0
    assert watched.report(step(49, epoch=2), 1).lost().again(retries=1) is None


def test_a_finished_stage_is_further_too_and_a_reused_one_is_not() -> None:
    lost = Watched().lost()
    assert lost.report(Event("finished", "selection", "jpeg-10"), 0).losses == 0
    assert lost.report(Event("reused", "selection", "jpeg-10"), 0).losses == 1
    assert lost.report(Event("started", "selection", "jpeg-10"), 0).losses == 1
    assert lost.report(Event("notice", "full", "jpeg-10", note="-"), 0).losses == 1
