"""Batches by step, made ahead of their use."""

from collections.abc import Callable, Iterator
from typing import Any

from emv3_jax.data import extra


def ahead(make: Callable[[int], Any], first: int, last: int, count: int) -> Iterator[Any]:
    """make(first), ..., make(last), in order; `count` of them are made by as many threads (grain) before they are used.

    Errors of `make` are raised when their turn comes. count 0: each is made when it is asked for.

    Raises:
      UserError: grain is not installed.
    """
    if count == 0:
        yield from map(make, range(first, last + 1))
        return
    grain = extra.load("grain")

    class Steps:
        """Batches as what grain takes for a source of data."""

        def __len__(self) -> int:
            return max(last - first + 1, 0)

        def __getitem__(self, number: Any) -> Any:
            return make(first + int(number))

    if last < first:
        return
    options = grain.ReadOptions(num_threads=count, prefetch_buffer_size=count)
    yield from grain.MapDataset.source(Steps()).to_iter_dataset(options)
