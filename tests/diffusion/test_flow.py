"""Noise, velocity and time grids against hand-worked numbers and the released scheduler's tables."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax.diffusion import flow
from emv3_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"


def test_add_noise_is_a_straight_line():
    x0 = jnp.full((3, 2, 2), 4.0)
    noise = jnp.full((3, 2, 2), -2.0)
    x = flow.add_noise(x0, noise, jnp.array([0.0, 250.0, 1000.0]))
    np.testing.assert_allclose(x[:, 0, 0], [4.0, 2.5, -2.0])


def test_velocity_leads_back_to_the_data():
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    x0, noise = jax.random.normal(k1, (4, 6)), jax.random.normal(k2, (4, 6))
    t = flow.sample_timesteps(k3, 4)
    back = flow.x0_from_velocity(flow.add_noise(x0, noise, t), flow.velocity_target(x0, noise), t)
    np.testing.assert_allclose(back, x0, atol=1e-6)


def test_velocity_is_the_slope_in_sigma():
    x0, noise = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, -3.0]])
    slope = (flow.add_noise(x0, noise, jnp.array([600.0])) - flow.add_noise(x0, noise, jnp.array([400.0]))) / 0.2
    np.testing.assert_allclose(slope, flow.velocity_target(x0, noise), atol=1e-5)


def test_shift_keeps_the_ends_and_moves_the_middle():
    np.testing.assert_allclose(flow.shift_sigma(np.array([0.0, 0.5, 1.0]), 5.0), [0.0, 2.5 / 3.0, 1.0])
    np.testing.assert_allclose(flow.shift_sigma(np.array([0.0, 0.3, 1.0]), 1.0), [0.0, 0.3, 1.0])


@pytest.mark.parametrize("steps", [5, 8, 25])
def test_grid_is_the_released_one(steps):
    golden = np.load(GOLDEN / "schedulers.npz")
    grid = flow.flow_grid(steps, shift=5.0)
    assert grid.steps == steps and grid.timesteps.dtype == grid.sigmas.dtype == np.float32
    np.testing.assert_array_equal(grid.timesteps, golden[f"flow{steps}_timesteps"])
    np.testing.assert_array_equal(grid.sigmas, golden[f"flow{steps}_sigmas"])


def test_one_step_goes_all_the_way():
    grid = flow.flow_grid(1)
    np.testing.assert_array_equal(grid.timesteps, [1000.0])
    np.testing.assert_array_equal(grid.sigmas, [1.0, 0.0])


@pytest.mark.parametrize(("steps", "shift", "words"), [(0, 5.0, "at least one step"), (4, 0.0, "must be positive")])
def test_impossible_grids_say_why(steps, shift, words):
    with pytest.raises(UserError, match=words):
        flow.flow_grid(steps, shift)


def test_uniform_timesteps_have_the_shifted_median():
    t = flow.sample_timesteps(jax.random.key(1), 20_000, shift=5.0)
    chex.assert_shape(t, (20_000,))
    assert t.dtype == jnp.float32 and 0.0 <= t.min() and t.max() <= 1000.0
    np.testing.assert_allclose(np.quantile(t, [0.25, 0.5, 0.75]), 1000 * np.array([0.625, 5 / 6, 0.9375]), atol=10)


def test_logit_normal_timesteps_prefer_the_middle():
    t = flow.sample_timesteps(jax.random.key(2), 20_000, shift=1.0, distribution="logit_normal")
    # The quartiles of a standard normal are -+0.6745; sigmoid of that is 0.3375 and 0.6625.
    np.testing.assert_allclose(np.quantile(t, [0.25, 0.5, 0.75]), [337.5, 500.0, 662.5], atol=10)


def test_unknown_distribution_says_what_there_is():
    with pytest.raises(UserError, match="uniform.*logit_normal"):
        flow.sample_timesteps(jax.random.key(0), 1, distribution="cosine")  # type: ignore[arg-type]
