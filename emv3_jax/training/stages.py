"""What a run trains on when: stages of steps, and the kinds of batches that each stage takes in turn."""

from collections.abc import Sequence
from typing import Any


def kind_of_batch(stages: Sequence[tuple[int, Sequence[Any]]], step: int) -> Any:
    """The kind of batch of a step.

    Args:
      stages: (last step, kinds) in order; the last stage goes on for ever.
      step: 1 for the first.
    """
    kinds = next((kinds for until, kinds in stages if step <= until), stages[-1][1])
    return kinds[step % len(kinds)]
