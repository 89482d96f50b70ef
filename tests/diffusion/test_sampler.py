"""The loop on fields whose end point is known, in both of its forms."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import dit as dit_table
from convert.engine import to_jax
from convert.golden_loops import LOOPS, replay
from emv3_jax.config import DiTConfig
from emv3_jax.diffusion.flow import flow_grid
from emv3_jax.diffusion.guidance import guide, stack_branches
from emv3_jax.diffusion.sampler import sample
from emv3_jax.diffusion.solvers import euler

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = DiTConfig(
    width=48, heads=4, layers=2, ffn=96, time_features=32, text_width=24, text_len=12, audio_width=10, image_width=20
)


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


@pytest.fixture(scope="module")
def tiny_params():
    """The golden stand-in weights of the tiny preview transformer, through the converter."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    manifest = json.loads((GOLDEN / "manifests" / "dit_preview_tiny.json").read_text())
    tensors = {key: weights.tensor_for(key, shape) for key, shape in manifest.items()}
    return to_jax(dit_table.PREVIEW, tensors, dit_table.target_tree(TINY), "stand-in weights")


@pytest.mark.parametrize(("name", "together"), [(name, True) for name in LOOPS] + [("flow_plain", False)])
def test_whole_loop_ends_where_the_released_one_does(tiny_params, name, together):
    with jax.default_matmul_precision("highest"):
        got, wanted = replay(name, np.load(GOLDEN / "loop_preview.npz"), TINY, tiny_params, together)
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
