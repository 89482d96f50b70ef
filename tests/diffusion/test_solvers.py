"""Solvers against hand-worked numbers and the released scheduler's own trajectory."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax.diffusion.flow import TimeGrid, flow_grid
from emv3_jax.diffusion.solvers import euler

GOLDEN = Path(__file__).parents[1] / "golden"


def test_euler_moves_by_the_change_in_sigma():
    grid = TimeGrid(timesteps=np.float32([1000, 400]), sigmas=np.float32([1.0, 0.4, 0.0]))
    solver = euler(grid)
    x, v = jnp.array([10.0]), jnp.array([5.0])
    x, state = solver.step(solver.init(x), x, v, 0)
    np.testing.assert_allclose(x, 7.0)  # 10 - 0.6 * 5
    x, state = solver.step(state, x, v, 1)
    np.testing.assert_allclose(x, 5.0)  # 7 - 0.4 * 5


def test_euler_remembers_nothing():
    assert jax.tree.leaves(euler(flow_grid(3)).init(jnp.ones(2))) == []


@pytest.mark.parametrize("steps", [5, 8, 25])
def test_euler_follows_the_released_trajectory(steps):
    """v(x, t) = sin(1.7 x + t / 300) + 0.3 x, every row; 1e-5 because t enters a sine in float32."""
    golden = np.load(GOLDEN / "schedulers.npz")
    rows = golden[f"flow{steps}_x"]
    grid = flow_grid(steps)
    solver = euler(grid)
    x = jnp.asarray(rows[0])
    state = solver.init(x)
    for i in range(steps):
        v = jnp.sin(1.7 * x + grid.timesteps[i] / 300) + 0.3 * x
        x, state = solver.step(state, x, v, i)
        np.testing.assert_allclose(x, rows[i + 1], atol=1e-5)


def test_step_number_may_be_traced():
    solver = euler(flow_grid(4))
    x, v = jnp.ones((2, 3)), jnp.full((2, 3), 2.0)
    traced = jax.jit(lambda i: solver.step((), x, v, i)[0])
    for i in range(4):
        np.testing.assert_allclose(traced(i), solver.step((), x, v, i)[0], rtol=1e-6)
