"""What differs when several processes train together: how they meet, which rows each reads, when they stop, and who
speaks."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emv3_jax import sharding
from emv3_jax.errors import UserError

PATIENCE = 300  # seconds in which all processes of a run must have started
WEEK = 7 * 24 * 3600


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Finds the other processes, before anything else is asked of JAX; without arguments as the cluster tells.

    Raises:
      UserError: they are not there.
    """
    # It would take SIGTERM for itself and do nothing; `training.loop` stops all processes together.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # JAX's own patience ends the program without a word that helps; ours ends before.
        there = _done_within(
            PATIENCE,
            lambda: jax.distributed.initialize(coordinator, processes, process, initialization_timeout=2 * PATIENCE),
        )
    except Exception as error:  # of whatever tells who is who
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"the processes did not find one another: {lines[0]}") from error
    if not there:
        raise UserError(
            f"the processes did not find one another within {PATIENCE} s: start all of them, and let --coordinator name"
            " a host and port of the first one that the others can reach"
        )
    if jax.default_backend() == "cpu":
        # XLA forgets in which order the collectives of a program belong that it reads from the cache: the processes
        # come to different ones, and wait for ever.
        jax.config.update("jax_enable_compilation_cache", False)


def _done_within(seconds: float, work: Callable[[], None]) -> bool:
    """work() in a thread of its own, so that a signal ends the wait for it; raises what it raises."""
    failed: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    return not thread.is_alive()


def _batch_sharding(size: int, mesh: Mesh) -> NamedSharding:
    with jax.set_mesh(mesh):
        return NamedSharding(mesh, PartitionSpec(sharding.batch_axes(size)))


def undivided(sizes: Iterable[int], mesh: Mesh | None) -> list[str]:
    """A note for every size of batch that does not divide over all groups of devices of a mesh that it could."""
    if mesh is None:
        return []
    groups = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
    with jax.set_mesh(mesh):
        over = {size: sharding.batch_groups(size) for size in sorted(set(sizes))}
    return [
        f"note: batches of {size} samples are divided over {count} of {groups} groups of devices, so some work on the"
        f" same samples: let {groups} divide the clips that stages say"
        for size, count in over.items()
        if count < groups
    ]


def rows_here(size: int, mesh: Mesh) -> np.ndarray | None:
    """The rows of a batch that this process's devices hold, in order; None: all of them."""
    if jax.process_count() == 1:
        return None
    places = _batch_sharding(size, mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in places if place is not None]))


def place_batch(batch: Any, mesh: Mesh, size: int, rows: np.ndarray | None = None) -> Any:
    """A batch on the devices of a mesh, its samples divided over them as far as they divide evenly.

    Args:
      batch: arrays of the rows `rows` of a batch of `size`; None: of all.
    """
    place = _batch_sharding(size, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    if rows is None:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, place if np.ndim(leaf) else whole), batch)

    def put(leaf: Any) -> jax.Array:
        part = np.asarray(leaf)

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            return part[np.searchsorted(rows, np.arange(size)[index[0]])]

        return jax.make_array_from_callback((size, *part.shape[1:]), place, piece)

    return jax.tree.map(put, batch)


def to_host(tree: Any) -> Any:
    """Whole arrays in the memory of every process; all of them must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda leaf: np.asarray(multihost_utils.process_allgather(leaf, tiled=True)), tree)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh over which the arrays of a tree are divided; None: they are whole."""
    place = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return place.mesh if isinstance(place, NamedSharding) else None


def local_mesh() -> Mesh | None:
    """This process's own devices, on which it may work alone; None if it has one."""
    devices = jax.local_devices()
    return sharding.make_mesh(devices, context=len(devices)) if len(devices) > 1 else None


def any_of(here: bool) -> bool:
    """Whether it holds in any process; all of them must call it."""
    return bool(largest(int(here)))


def largest(here: int) -> int:
    """The largest of what the processes have; all of them must call it."""
    if jax.process_count() == 1:
        return here
    return int(np.max(multihost_utils.process_allgather(np.asarray(here))))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What every process does inside alone, or one of them, is done afterwards, however long it takes; where it fails
    in one it fails in all, so that none waits for it.

    Raises:
      UserError: it failed in another process.
    """
    try:
        yield
    except Exception as error:  # whatever it is, the others are told, and it goes on
        if jax.process_count() > 1:
            print(f"note: process {jax.process_index()} waits for the others, and ends then: {error}", flush=True)
        _meet()
        any_of(True)
        raise
    _meet()
    if any_of(False):
        raise UserError("another process could not do its part: see what it says")


def _meet() -> None:
    """Until all processes are here; not by their devices, which may not wait for minutes."""
    if jax.process_count() > 1:
        barrier = ocp.multihost.get_barrier_sync_fn()
        _done_within(WEEK, lambda: barrier(key="together", timeout_ms=1000 * WEEK))


def of_first(values: Any) -> np.ndarray:
    """An array that the first process has; all of them must call it."""
    if jax.process_count() == 1:
        return np.asarray(values)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(values)))


class Stopping:
    """Whether processes that train together stop: after the same step, whichever of them is asked to.

    They ask one another every few seconds, since that waits for the steps before, and a machine that is taken back has
    half a minute. After how many steps that is follows from the slowest one's clock, which all of them know.

    Args:
      step: the one before the first.
      at_most: they ask one another after so many steps, however quick those are.
    """

    SECONDS = 2.0

    def __init__(self, step: int, at_most: int):
        self.signal = 0  # that any of them has got
        self._at_most, self._due = at_most, step
        self._last = step, time.monotonic()

    def agreed(self, step: int, signal: int, out_of_time: bool, made: Any = None) -> bool:
        """Whether they stop after a step.

        Args:
          signal: that this process has got, or 0.
          made: arrays of the step. They are waited for: on a CPU what the processes ask one another could overtake the
            step's own collectives in one of them, and both would wait for ever.
        """
        if jax.process_count() == 1:
            self.signal = signal
            return bool(signal) or out_of_time
        if step < self._due:
            return False
        jax.block_until_ready(made)
        before, since = self._last
        here = np.array([signal, out_of_time, (time.monotonic() - since) / max(step - before, 1)], np.float32)
        signal_of_any, late, seconds = np.max(multihost_utils.process_allgather(here), axis=0)
        steps = int(self.SECONDS / max(float(seconds), 1e-6)) if step > before else 1
        self._due, self._last = step + max(1, min(steps, self._at_most)), (step, time.monotonic())
        self.signal = int(signal_of_any)
        return bool(self.signal) or bool(late)


def say(line: str) -> None:
    """Prints a line, of one process of many."""
    if jax.process_index() == 0:
        print(line, flush=True)


def wait() -> None:
    """Until all processes are here: what the first one has written is there for the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("written")
