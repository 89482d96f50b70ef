"""Solvers: how to move x along a velocity, knowing nothing of the model that gives it.

A solver is a table, computed before the loop with one row for every step, and two pure functions that read it.
What a solver must remember between steps (earlier predictions, for a multistep method) is its state, a pytree of
arrays of unchanging shape, so that the loop can be a `jax.lax.scan`. Euler remembers nothing: its state is ().
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from emv3_jax.diffusion.flow import TimeGrid

State = Any  # a pytree of arrays; () for a solver without memory
Row = Any  # row i of the table


@struct.dataclass
class Solver:
    """A state machine over the steps of one time grid; itself a pytree, so it passes through `jax.jit`.

    Attributes:
      table: pytree of arrays [n, ...], one row a step.
      start: start(x) -> state before the first step.
      advance: advance(row, state, x, v) -> (x after the step, state).
    """

    table: Any
    start: Callable[[jax.Array], State] = struct.field(pytree_node=False)
    advance: Callable[[Row, State, jax.Array, jax.Array], tuple[jax.Array, State]] = struct.field(pytree_node=False)

    @property
    def steps(self) -> int:
        return jax.tree.leaves(self.table)[0].shape[0]

    def init(self, x: jax.Array) -> State:
        """State before the first step; x is the noise that sampling starts from."""
        return self.start(x)

    def step(self, state: State, x: jax.Array, v: jax.Array, i: jax.Array | int) -> tuple[jax.Array, State]:
        """One step: x at sigma_i and the velocity v there, same shape -> x at sigma_{i+1}, and the new state."""
        row = jax.tree.map(lambda column: jnp.asarray(column)[i], self.table)
        return self.advance(row, state, x, v)


def _remember_nothing(x: jax.Array) -> State:
    del x
    return ()


def _euler_step(dsigma: jax.Array, state: State, x: jax.Array, v: jax.Array) -> tuple[jax.Array, State]:
    return x + dsigma * v, state


def euler(grid: TimeGrid) -> Solver:
    """First order, no memory: x moves straight along v, by the change in sigma (negative)."""
    return Solver(table=np.diff(grid.sigmas), start=_remember_nothing, advance=_euler_step)
