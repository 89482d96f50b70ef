"""The loop on fields whose end point is known, in both of its forms."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.golden_loops import LOOPS, replay
from convert.parity import LOOP_MODELS, Golden, dit_params, relative_error
from emv3_jax.diffusion.flow import flow_grid
from emv3_jax.diffusion.guidance import guide, stack_branches
from emv3_jax.diffusion.sampler import sample
from emv3_jax.diffusion.solvers import euler

GOLDEN = Path(__file__).parents[1] / "golden"


def test_constant_field_ends_exactly_one_velocity_below():
    """sigma goes from 1 to 0, so x ends at noise - v however many steps are taken."""
    noise = jnp.arange(6.0).reshape(2, 3)
    for steps in (1, 7):
        grid = flow_grid(steps)
        end = sample(lambda x, t, i: jnp.full_like(x, 2.0), euler(grid), grid, noise)
        np.testing.assert_allclose(end, noise - 2.0, atol=1e-5)


def test_true_velocity_field_leads_to_the_data():
    """For one known x0 the field is (x - x0) / sigma; its paths are straight, so Euler lands on x0 exactly."""
    x0 = jax.random.normal(jax.random.key(0), (2, 4))
    noise = jax.random.normal(jax.random.key(1), (2, 4))
    grid = flow_grid(5)
    end = sample(lambda x, t, i: (x - x0) / (t / 1000)[:, None], euler(grid), grid, noise)
    np.testing.assert_allclose(end, x0, atol=1e-5)


def test_velocity_sees_every_timestep_and_its_number():
    grid = flow_grid(4)
    end = sample(lambda x, t, i: (1000 * i + t)[:, None] * jnp.ones_like(x), euler(grid), grid, jnp.zeros((1, 1)))
    steps = np.diff(grid.sigmas) * (1000 * np.arange(4) + grid.timesteps)
    np.testing.assert_allclose(end[0, 0], steps.sum(), rtol=1e-5)


def _wavy(x, t, i):
    return jnp.sin(1.7 * x + t[:, None] / 300 + 0.1 * i) + 0.3 * x


def test_scan_equals_stepwise():
    grid = flow_grid(8)
    noise = jax.random.normal(jax.random.key(2), (2, 5))
    done = []
    stepwise = sample(_wavy, euler(grid), grid, noise, on_step=lambda i, n: done.append((i, n)))
    np.testing.assert_allclose(stepwise, sample(_wavy, euler(grid), grid, noise), atol=1e-6)
    assert done == [(i, 8) for i in range(1, 9)]


def test_sampling_inside_a_jitted_function():
    grid = flow_grid(3)
    noise = jnp.ones((1, 2))
    inside = jax.jit(lambda noise: sample(_wavy, euler(grid), grid, noise))(noise)
    np.testing.assert_allclose(inside, sample(_wavy, euler(grid), grid, noise), atol=1e-6)


def test_second_run_compiles_nothing_and_uses_the_new_weights():
    traces = []

    def model(x, t, context):
        traces.append(1)
        return context * jnp.ones_like(x)

    grid = flow_grid(3)
    ends = []
    for answer in (1.0, 5.0):
        context = stack_branches([jnp.full((1, 1), answer)])
        ends.append(sample(guide(model, context), euler(grid), grid, jnp.zeros((1, 2)))[0, 0])
    np.testing.assert_allclose(ends, [-1.0, -5.0], rtol=1e-5)
    assert len(traces) == 1


def test_solver_of_another_length_is_refused():
    with pytest.raises(ValueError, match="made for 5 steps, the grid has 4"):
        sample(_wavy, euler(flow_grid(5)), flow_grid(4), jnp.zeros((1, 1)))


@pytest.mark.parametrize(("name", "together"), [(name, True) for name in LOOPS] + [("flow_plain", False)])
def test_whole_loop_ends_where_the_released_one_does(name, together):
    golden, file = Golden(GOLDEN), LOOPS[name].file
    manifest, cfg = LOOP_MODELS[file]
    with jax.default_matmul_precision("highest"):
        params = dit_params(golden, manifest, cfg)
        got, wanted = replay(name, golden.arrays(file), cfg, params, together)
    assert relative_error(got, wanted) <= 1e-4
