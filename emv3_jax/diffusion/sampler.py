"""The sampling loop: follow velocity(x, t, i) from noise to clean latents.

The loop knows neither the model nor its conditions: guidance, windows and caches are inside `velocity`, the
arithmetic of a step is inside `solver`, and every number that depends on the step alone stands in their tables.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from emv3_jax.diffusion.flow import TimeGrid
from emv3_jax.diffusion.solvers import Solver, State

Velocity = Any  # velocity(x, t, i) -> v, or an object with start(x) -> memory, advance(x, t, i, memory) -> (v, memory)
Carry = tuple[jax.Array, State, Any]
OnStep = Callable[[int, int], None]  # on_step(steps done, steps in all)


def as_pytree(function: Callable) -> Callable:
    """A function that can be an argument of a jitted one: itself if it is a pytree, else wrapped into one."""
    return jax.tree_util.Partial(function) if jax.tree_util.all_leaves([function]) else function


@struct.dataclass
class Stateless:
    """velocity(x, t, i), as one that has nothing to remember."""

    velocity: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

    def start(self, x: jax.Array) -> tuple:
        del x
        return ()

    def advance(self, x: jax.Array, t: jax.Array, i: jax.Array, memory: tuple) -> tuple[jax.Array, tuple]:
        return self.velocity(x, t, i), memory


def _advance(velocity: Velocity, solver: Solver, grid: TimeGrid, carry: Carry, i: jax.Array) -> Carry:
    """Step i: the whole of the loop's logic, for both ways of running it."""
    x, state, memory = carry
    t = jnp.full(x.shape[:1], jnp.asarray(grid.timesteps)[i])
    v, memory = velocity.advance(x, t, i, memory)
    return *solver.step(state, x, v, i), memory


def _follow(velocity: Velocity, solver: Solver, grid: TimeGrid, carry: Carry) -> Carry:
    def body(carry: Carry, i: jax.Array) -> tuple[Carry, None]:
        return _advance(velocity, solver, grid, carry, i), None

    return jax.lax.scan(body, carry, jnp.arange(grid.steps))[0]


# Compiled once per kind of velocity and shape, for the life of the program: velocity, solver and grid are pytrees.
_one_step: Any = jax.jit(_advance)
_all_steps: Any = jax.jit(_follow)


def sample(
    velocity: Velocity,
    solver: Solver,
    grid: TimeGrid,
    noise: jax.Array,
    on_step: OnStep | None = None,
) -> jax.Array:
    """Follows the velocity from noise (t = 1000) to clean latents (t = 0).

    Args:
      velocity: velocity(x [B, ...], t [B] in [0, 1000], i) -> [B, ...]; i is the number of the step, from 0. A pytree
        (`guidance.guide` makes one) is compiled once and its arrays stay arguments; a plain function is compiled at
        every call, with what it closes over as constants. One that remembers (a step cache) has the methods start and
        advance instead.
      solver: made from the same grid, e.g. `euler(grid)`.
      grid: the times to visit.
      noise: where to start, float32 [B, ...]; normally standard normal.
      on_step: called as on_step(steps done, steps in all) after each finished step. Without it the loop is one
        compiled program; with it, one compiled step that Python repeats. Both give the same latents.

    Raises:
      ValueError: the solver was made from a grid of another length.
    """
    if solver.steps != grid.steps:
        raise ValueError(f"the solver was made for {solver.steps} steps, the grid has {grid.steps}")
    if not hasattr(velocity, "advance"):
        velocity = Stateless(as_pytree(velocity))
    carry = (noise, solver.init(noise), velocity.start(noise))
    if on_step is None:
        return _all_steps(velocity, solver, grid, carry)[0]
    for i in range(grid.steps):
        carry = jax.block_until_ready(_one_step(velocity, solver, grid, carry, jnp.int32(i)))
        on_step(i + 1, grid.steps)
    return carry[0]
