"""What differs when several processes train together: which rows each reads, and when they stop."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emv3_jax import sharding


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


def any_of(here: bool, now: bool = True) -> bool:
    """Whether it holds in any process. now: whether this is a moment at which they may wait for one another."""
    if jax.process_count() == 1:
        return here
    return bool(now and np.any(multihost_utils.process_allgather(np.asarray(here))))


def wait() -> None:
    """Until all processes are here: what the first one has written is there for the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("written")
