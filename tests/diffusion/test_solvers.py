"""Solvers against hand-worked numbers and the released scheduler's own trajectory."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax.diffusion.flow import TimeGrid, flow_grid
from emv3_jax.diffusion.sampler import sample
from emv3_jax.diffusion.solvers import SAMPLERS, euler, make, sampler_named, unipc
from emv3_jax.errors import UserError

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


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [5, 8, 25])
def test_the_released_grid_and_trajectory(name, steps):
    """v(x, t) = sin(1.7 x + t / 300) + 0.3 x, every row; 1e-5 because t enters a sine in float32."""
    golden = np.load(GOLDEN / "schedulers.npz")
    rows, sampler = golden[f"{name}{steps}_x"], sampler_named(name)
    grid = sampler.grid(steps, 5.0)
    np.testing.assert_array_equal(grid.timesteps, golden[f"{name}{steps}_timesteps"])
    np.testing.assert_allclose(grid.sigmas, golden[f"{name}{steps}_sigmas"], atol=1e-7)
    solver = sampler.solver(grid)
    x = jnp.asarray(rows[0])
    state = solver.init(x)
    for i in range(steps):
        v = jnp.sin(1.7 * x + grid.timesteps[i] / 300) + 0.3 * x
        x, state = solver.step(state, x, v, i)
        np.testing.assert_allclose(x, rows[i + 1], atol=1e-5)


def straight(x, t, i):
    """Velocity that leads to 3 from wherever x is: x0 = x - sigma v = 3."""
    return (x - 3.0) / (t[:, None] / 1000)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_constant_x0_is_reached_in_any_number_of_steps(name, steps):
    sampler = SAMPLERS[name]
    grid = sampler.grid(steps, 1.0)
    grid = TimeGrid(timesteps=grid.sigmas[:-1] * 1000, sigmas=grid.sigmas)  # not cut to whole numbers
    np.testing.assert_allclose(sample(straight, sampler.solver(grid), grid, jnp.full((1, 2), 9.0)), 3.0, rtol=1e-4)


def error(name: str, steps: int) -> float:
    """At sigma 0.2, of the flow dx/dsigma = x - sigma from sigma 0.8, whose solution is 1 + sigma + c e^sigma."""
    sigmas = np.append(np.linspace(0.8, 0.2, steps), 0.0)
    solver = SAMPLERS[name].solver(TimeGrid(timesteps=1000 * sigmas[:-1], sigmas=sigmas))
    x, c = np.float64(2.0), (2.0 - 1.8) * np.exp(-0.8)
    state = solver.init(x)
    for i in range(steps - 1):
        x, state = solver.step(state, x, x - sigmas[i], i)
    return abs(float(x) - (1.2 + c * np.exp(0.2)))


def test_multistep_solvers_are_of_second_order_and_euler_of_first():
    orders = {name: np.log2(error(name, 9) / error(name, 17)) for name in SAMPLERS}
    assert 0.8 < orders["flow"] < 1.2
    assert orders["dpmpp"] > 1.8 and orders["unipc"] > 1.8
    assert max(error("unipc", 17), error("dpmpp", 17)) < 0.05 * error("flow", 17)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_scan_gives_what_the_loop_gives(name):
    grid = SAMPLERS[name].grid(6, 5.0)
    noise, solver = jax.random.normal(jax.random.key(0), (1, 5)), SAMPLERS[name].solver(grid)
    velocity = lambda x, t, i: jnp.sin(x) + t[:, None] / 1000  # noqa: E731
    whole = sample(velocity, solver, grid, noise)
    stepped = sample(velocity, solver, grid, noise, on_step=lambda done, total: None)
    np.testing.assert_allclose(whole, stepped, rtol=1e-5)


def test_unipc_refuses_a_grid_from_pure_noise():
    with pytest.raises(UserError, match="starts below sigma 1"):
        unipc(flow_grid(4))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shift", [1e-3, 1.0, 12.0, 100.0])
def test_a_solver_comes_with_its_grid(name, shift):
    grid, solver = make(name, 25, shift)
    assert grid.steps == solver.steps == 25


@pytest.mark.parametrize(
    ("name", "steps", "shift", "message"),
    [
        ("unipc", 8, 1e5, "unipc needs a time grid that starts below sigma 1: give a smaller shift"),
        ("unipc", 8, 1e9, "the sampler unipc cannot make 8 steps with shift 1e.09"),
        ("dpmpp", 8, 1e9, "the sampler dpmpp cannot make 8 steps with shift 1e.09, .*: give a shift nearer to 1"),
        ("flow", 8, 1e9, "the sampler flow cannot make 8 steps"),
        ("flow", 8, 1e-44, "the sampler flow cannot make 8 steps"),
        ("dpmpp", 8, 1e-44, "the sampler dpmpp cannot make 8 steps"),
    ],
)
def test_what_rounding_leaves_no_solver_for(name, steps, shift, message):
    with pytest.raises(UserError, match=message):
        make(name, steps, shift)


def test_unknown_samplers_are_named_with_those_that_exist():
    with pytest.raises(UserError, match="there is no sampler 'heun': one of flow, unipc, dpmpp"):
        sampler_named("heun")


def test_step_number_may_be_traced():
    solver = euler(flow_grid(4))
    x, v = jnp.ones((2, 3)), jnp.full((2, 3), 2.0)
    traced = jax.jit(lambda i: solver.step((), x, v, i)[0])
    for i in range(4):
        np.testing.assert_allclose(traced(i), solver.step((), x, v, i)[0], rtol=1e-6)
