"""What a run trains on when, worked out by hand."""

import collections

from emv3_jax.training import schedule

TASKS = ((4, (("t2v", 1.0),)), (10, (("t2v", 1.0), ("i2v", 3.0))))


def test_kinds_are_taken_in_turn_and_the_last_stage_goes_on():
    stages = ((2, ("a",)), (5, ("b", "c")))
    assert [schedule.kind_of_batch(stages, step) for step in range(1, 8)] == ["a", "a", "c", "b", "c", "b", "c"]


def test_shares_are_kept_in_every_batch():
    for step in range(5, 40):
        names = schedule.tasks_of_batch(TASKS, step, 8, seed=0)
        assert collections.Counter(names) == {"t2v": 2, "i2v": 6}
    assert schedule.tasks_of_batch(TASKS, 4, 8, seed=0) == ["t2v"] * 8


def test_small_batches_keep_shares_on_the_whole():
    seen = collections.Counter(task for step in range(5, 1005) for task in schedule.tasks_of_batch(TASKS, step, 1, 0))
    assert 0.72 < seen["i2v"] / 1000 < 0.78


def test_which_sample_has_which_task_is_drawn_from_seed_and_step():
    first = schedule.tasks_of_batch(TASKS, 7, 8, seed=0)
    assert first == schedule.tasks_of_batch(TASKS, 7, 8, seed=0)
    others = {tuple(schedule.tasks_of_batch(TASKS, step, 8, seed)) for step in (7, 8, 9) for seed in (0, 1)}
    assert len(others) > 3


def test_tasks_join_after_every_stage_but_the_last():
    assert schedule.joins(TASKS, 10) == (4,) and schedule.joins(TASKS, 4) == ()
