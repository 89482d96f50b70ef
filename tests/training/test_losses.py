"""Losses whose values are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax.training import losses, pictures


def test_motion_weight_is_one_where_nothing_moves():
    video = jnp.broadcast_to(jax.random.uniform(jax.random.key(0), (1, 1, 8, 8, 3)), (1, 5, 8, 8, 3))
    np.testing.assert_allclose(losses.motion_weight(video, 4.0), 1.0, rtol=1e-5)


def test_motion_weight_grows_around_what_moves_and_is_bounded():
    video = jnp.zeros((1, 4, 9, 9, 3)).at[0, :2, 4, 4, 1].set(1.0)  # half the time, so half from the mean
    weight = np.asarray(losses.motion_weight(video, 4.0))
    assert weight.shape == (1, 4, 9, 9, 1)
    np.testing.assert_allclose(weight[0, :, 3:6, 3:6], 5.0)
    assert weight[0, :, :2].max() == weight[0, :, :, 7:].max() == 1.0


def test_kl_of_a_standard_normal_is_zero_and_of_others_by_hand():
    zero = jnp.zeros((2, 3))
    assert losses.gaussian_kl(zero, zero) == 0.0
    np.testing.assert_allclose(losses.gaussian_kl(zero + 2.0, zero), 2.0)
    np.testing.assert_allclose(losses.gaussian_kl(zero, zero + jnp.log(4.0)), 0.5 * (4 - 1 - np.log(4)), rtol=1e-6)


def test_reconstruction_weighs_the_errors_that_are_learnt_from_and_not_the_one_that_is_told():
    errors = losses.reconstruction(jnp.zeros((1, 2, 2, 2, 3)), jnp.full((1, 2, 2, 2, 3), 0.5), jnp.float32(3.0))
    np.testing.assert_allclose([errors["l1"], errors["l2"], errors["mse"]], [1.5, 0.75, 0.25])


def test_the_exact_velocity_alone_has_no_error():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 3, 3, 4, 4, 16))
    np.testing.assert_array_equal(losses.velocity_errors(noise - x0, x0, noise, 2.0), 0.0)
    assert np.all(np.asarray(losses.velocity_errors(x0 - noise, x0, noise, 2.0)) > 1.0)
    wrong = (noise - x0).at[1].add(2.0)
    np.testing.assert_allclose(losses.velocity_errors(wrong, x0, noise), [0.0, 4.0, 0.0], atol=1e-5)


def test_moving_latents_count_more():
    still = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 1, 4, 4, 16)), (1, 3, 4, 4, 16))
    moving = still.at[:, 1].add(9.0)
    np.testing.assert_allclose(losses.velocity_errors(-still + 1.0, still, 0 * still, 2.0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(losses.velocity_errors(-moving + 1.0, moving, 0 * moving, 2.0), 3.0, rtol=1e-6)
    np.testing.assert_allclose(losses.velocity_errors(-moving + 1.0, moving, 0 * moving, 0.0), 1.0, rtol=1e-6)


def test_means_of_parts_add_up():
    part = losses.mean_where(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False]))
    whole = part + losses.mean_where(jnp.array([6.0]), jnp.array([True]))
    assert float(whole.total / whole.count) == 3.0
    none = losses.mean_where(jnp.array([jnp.nan]), jnp.array([False]))
    assert float(none.count) == 0.0 and float((whole + none).total) == 9.0


def test_negative_dpo_by_hand():
    errors, reference = jnp.array([0.5, 0.7]), jnp.array([0.5, 0.6])
    value = losses.negative_dpo(errors, reference, 10.0)
    np.testing.assert_allclose(value, (np.log(2) + np.log1p(np.exp(-1.0))) / 2, rtol=1e-6)
    absolute = losses.negative_dpo_absolute(errors, reference, 10.0)
    np.testing.assert_allclose(absolute, np.mean(np.log1p(np.exp([-5.0, -7.0]))), rtol=1e-6)


@pytest.mark.parametrize("name", ["ndpo", "ndpo_absolute"])
def test_negative_dpo_pushes_away_and_stops_pushing(name):
    """The gradient raises the errors of negatives; once they are unlikely it fades."""
    near, far = (
        jax.grad(lambda e: losses.PREFERENCES[name](e, jnp.zeros(1), 10.0))(jnp.array([error])) for error in (0.0, 2.0)
    )
    assert near[0] < -1.0 and -1e-3 < far[0] < 0


def test_paired_dpo_by_hand():
    """Better than the reference on the preferred by 0.1, worse on the other by 0.2."""
    value = losses.paired_dpo(jnp.array([0.4, 0.7]), jnp.array([0.5, 0.5]), 10.0)
    np.testing.assert_allclose(value, np.log1p(np.exp(-3.0)), rtol=1e-6)
    assert losses.paired_dpo(jnp.array([0.7, 0.4]), jnp.array([0.5, 0.5]), 10.0) > 3.0


def test_film_strip():
    videos = [np.linspace(-1, 1, 9)[:, None, None, None] * np.ones((1, 2, 3, 3)), -np.ones((9, 2, 3, 3))]
    strip = pictures.film_strip(videos, columns=5)
    assert strip.shape == (4, 15, 3) and strip.dtype == np.uint8
    np.testing.assert_array_equal(strip[0, ::3, 0], [0, 64, 128, 191, 255])
    assert not strip[2:].any()
