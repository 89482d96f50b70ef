"""Solvers: how to move x along a velocity, knowing nothing of the model that gives it.

A solver is a table, computed before the loop with one row for every step, and two pure functions that read it.
What a solver must remember between steps (earlier predictions, for a multistep method) is its state, a pytree of
arrays of unchanging shape, so that the loop can be a `jax.lax.scan`. Euler remembers nothing: its state is ().

Multistep solvers work on x0 predictions m_i = x_i - sigma_i v_i, along lambda = log((1 - sigma) / sigma). All of their
formulas are linear in x and the m's, so a step is one row of numbers, computed in float64.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from emv3_jax.diffusion.flow import TimeGrid, dpmpp_grid, flow_grid, unipc_grid
from emv3_jax.errors import UserError

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


def _lambdas(sigmas: np.ndarray) -> np.ndarray:
    """log((1 - sigma) / sigma): minus infinity at pure noise, infinity at clean latents."""
    with np.errstate(divide="ignore"):
        return np.log1p(-sigmas) - np.log(sigmas)


def _predictor_row(sigmas: np.ndarray, lambdas: np.ndarray, i: int) -> tuple[float, float, float]:
    """(a, b, c) of x_{i+1} = a x_i + b m_i + c m_{i-1}: exact for the exponential part, second order in m.

    The first step has no m_{i-1}; the last, to sigma 0, is first order, as in the released program.
    """
    weight = (1 - sigmas[i + 1]) * -np.expm1(lambdas[i] - lambdas[i + 1])
    slope = 0.0
    if 0 < i < len(sigmas) - 2:
        # How far m's change over the step before reaches over half of this one; 0 where that step came from sigma 1.
        slope = 0.5 * weight * (lambdas[i + 1] - lambdas[i]) / (lambdas[i] - lambdas[i - 1])
    return sigmas[i + 1] / sigmas[i], weight + slope, -slope


def _m(x: jax.Array, v: jax.Array, sigma: jax.Array) -> jax.Array:
    """The x0 that v points to."""
    return x - sigma * v


def _one_m(x: jax.Array) -> State:
    return jnp.zeros_like(x)


def _dpmpp_step(row: Row, state: State, x: jax.Array, v: jax.Array) -> tuple[jax.Array, State]:
    a, b, c, sigma = row
    m = _m(x, v, sigma)
    return a * x + b * m + c * state, m


def dpmpp(grid: TimeGrid) -> Solver:
    """DPM-Solver++, second-order multistep (Lu et al. 2022); remembers one x0 prediction."""
    sigmas = np.asarray(grid.sigmas, np.float64)
    lambdas = _lambdas(sigmas)
    rows = np.array([_predictor_row(sigmas, lambdas, i) for i in range(grid.steps)])
    table = tuple(column.astype(np.float32) for column in (*rows.T, sigmas[:-1]))
    return Solver(table=table, start=_one_m, advance=_dpmpp_step)


def _corrector_row(sigmas: np.ndarray, lambdas: np.ndarray, i: int) -> tuple[float, float, float, float, float]:
    """(k, a, b, c, d) of the corrected x_i = k x_i + a x_{i-1} + b m_{i-1} + c m_{i-2} + d m_i.

    UniC with B(h) = e^-h - 1 (Zhao et al. 2023): the step that led to x_i, done again now that m_i is known, of the
    order that the prediction had. Before the first step there is nothing to correct.
    """
    if i == 0:
        return 1.0, 0.0, 0.0, 0.0, 0.0
    h = lambdas[i] - lambdas[i - 1]
    weight = (1 - sigmas[i]) * -np.expm1(-h)
    if i == 1:
        return 0.0, sigmas[i] / sigmas[i - 1], 0.5 * weight, 0.0, 0.5 * weight
    r = (lambdas[i - 2] - lambdas[i - 1]) / h
    first = (np.expm1(-h) / -h - 1) / np.expm1(-h)
    second = 2 * ((np.expm1(-h) / -h - 1) / -h - 0.5) / np.expm1(-h)
    past, now = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [first, second])
    return 0.0, sigmas[i] / sigmas[i - 1], weight * (1 - past / r - now), weight * past / r, weight * now


def _unipc_start(x: jax.Array) -> State:
    return x, jnp.zeros_like(x), jnp.zeros_like(x)


def _unipc_step(row: Row, state: State, x: jax.Array, v: jax.Array) -> tuple[jax.Array, State]:
    (keep, a, b, c, d), (p, q, r), sigma = row
    last, m1, m2 = state
    m = _m(x, v, sigma)
    x = keep * x + a * last + b * m1 + c * m2 + d * m
    return p * x + q * m + r * m1, (x, m, m1)


def unipc(grid: TimeGrid) -> Solver:
    """UniPC, order 2, bh2 (Zhao et al. 2023): predicts like DPM-Solver++, then corrects with the next velocity.

    Remembers the last corrected x and two x0 predictions. The grid must start below sigma 1 (`unipc_grid` does).

    Raises:
      UserError: it starts at sigma 1, where the corrector is not defined.
    """
    sigmas = np.asarray(grid.sigmas, np.float64)
    if sigmas[0] >= 1 and grid.steps > 1:
        raise UserError("the sampler unipc needs a time grid that starts below sigma 1: give a smaller shift")
    lambdas = _lambdas(sigmas)
    correct = np.array([_corrector_row(sigmas, lambdas, i) for i in range(grid.steps)], np.float32)
    predict = np.array([_predictor_row(sigmas, lambdas, i) for i in range(grid.steps)], np.float32)
    table = (tuple(correct.T), tuple(predict.T), sigmas[:-1].astype(np.float32))
    return Solver(table=table, start=_unipc_start, advance=_unipc_step)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A solver with the grid that the released program gives it: grid(steps, shift), solver(grid)."""

    grid: Callable[[int, float], TimeGrid]
    solver: Callable[[TimeGrid], Solver]


SAMPLERS = {
    "flow": Sampler(flow_grid, euler), "unipc": Sampler(unipc_grid, unipc), "dpmpp": Sampler(dpmpp_grid, dpmpp)
}  # fmt: skip


def sampler_named(name: str) -> Sampler:
    """The entry of SAMPLERS; raises UserError if there is none."""
    if name not in SAMPLERS:
        raise UserError(f"there is no sampler {name!r}: one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


@functools.cache
def make(name: str, steps: int, shift: float) -> tuple[TimeGrid, Solver]:
    """The grid of a sampler, and the solver with its table.

    Raises:
      UserError: there is no such sampler, or rounding leaves it no grid, or no table, that it can follow.
    """
    sampler = sampler_named(name)
    with np.errstate(all="ignore"):  # what goes wrong shows in the numbers
        grid = sampler.grid(steps, shift)
        falls = bool(np.all(np.diff(grid.sigmas) < 0))
        solver = sampler.solver(grid) if falls else None
    if solver is None or not all(np.isfinite(column).all() for column in jax.tree.leaves(solver.table)):
        raise UserError(
            f"the sampler {name} cannot make {steps} steps with shift {shift:g}, where neighbouring times are the same"
            " number: give a shift nearer to 1, or fewer steps"
        )
    return grid, solver
