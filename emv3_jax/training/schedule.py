"""What a run trains on when: kinds of batches, and tasks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Stages = Sequence[tuple[int, Sequence[Any]]]


def _stage(stages: Stages, step: int) -> Sequence[Any]:
    """What ((last step, what), ...) says of a step; the last stage goes on for ever. step: 1 for the first."""
    return next((what for until, what in stages if step <= until), stages[-1][1])


def kind_of_batch(stages: Stages, step: int) -> Any:
    """The kind of batch of a step, of ((last step, kinds), ...): each stage takes its kinds in turn."""
    kinds = _stage(stages, step)
    return kinds[step % len(kinds)]


def soup(tasks: Stages, step: int) -> Sequence[tuple[str, float]]:
    """The tasks of a step and their shares, of ((last step, ((task, share), ...)), ...)."""
    return _stage(tasks, step)


def tasks_of_batch(tasks: Stages, step: int, size: int, seed: int) -> list[str]:
    """The task of each sample of a step's batch, of ((last step, ((task, share), ...)), ...).

    Shares are kept in every batch as nearly as its size allows, and which sample has which task is drawn: a batch of 8
    with shares of 3 to 1 has six and two.
    """
    names, shares = zip(*soup(tasks, step), strict=True)
    rng = np.random.default_rng([seed, step, 0x7A])
    edges = np.cumsum(shares) / np.sum(shares)
    places = (np.arange(size) + rng.uniform()) / size
    chosen = np.minimum(np.searchsorted(edges, places, side="right"), len(names) - 1)
    return [names[k] for k in rng.permutation(chosen)]


def joins(tasks: Stages, steps: int) -> tuple[int, ...]:
    """Steps after which other tasks join."""
    return tuple(until for until, _ in tasks[:-1] if until < steps)
