"""Batches made ahead: in order, errors at their turn, no more of them than asked for."""

import sys
import threading
import time

import pytest

from emv3_jax.data import batches
from emv3_jax.errors import UserError


@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches_come_in_their_order(count):
    def make(step):
        time.sleep(0.01 * (step % 3))  # later ones are finished before earlier ones
        return step

    assert list(batches.ahead(make, 5, 14, count)) == list(range(5, 15))


@pytest.mark.parametrize("count", [0, 2])
def test_no_steps_are_left(count):
    assert list(batches.ahead(lambda step: step, 4, 3, count)) == []


def test_without_threads_a_batch_is_made_when_it_is_asked_for():
    made = []
    waiting = batches.ahead(lambda step: made.append(step) or step, 1, 5, 0)
    assert made == []
    assert next(waiting) == 1 and made == [1]
    assert next(waiting) == 2 and made == [1, 2]


def test_threads_make_some_ahead_and_not_all():
    made, both = set(), threading.Event()

    def make(step):
        made.add((step, threading.current_thread().name))
        if len(made) > 1:
            both.set()
        return step

    waiting = batches.ahead(make, 1, 100, 2)
    assert next(waiting) == 1
    assert both.wait(60)
    time.sleep(0.2)
    assert len(made) <= 6
    assert threading.main_thread().name not in {name for _, name in list(made)}
    waiting.close()


@pytest.mark.parametrize("count", [0, 2])
def test_errors_are_raised_at_their_turn(count):
    def make(step):
        if step == 3:
            raise UserError("step 3 cannot be made")
        return step

    seen = []
    with pytest.raises(UserError, match="step 3 cannot be made"):
        for step in batches.ahead(make, 1, 9, count):
            seen.append(step)
            time.sleep(0.02)  # others have failed by now
    assert seen == [1, 2]


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    assert list(batches.ahead(str, 1, 2, 0)) == ["1", "2"]
    with pytest.raises(UserError, match=r"training data needs the extra data: pip install -e '.\[data\]'"):
        next(batches.ahead(str, 1, 2, 1))
