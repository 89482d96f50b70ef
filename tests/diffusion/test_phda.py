import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax.diffusion.phda import EVEN, PhDAConfig, phda_weight
from emv3_jax.errors import UserError


def test_weight_by_hand():
    t = jnp.asarray([0.0, 200.0, 300.0, 350.0, 400.0, 1000.0])
    np.testing.assert_allclose(phda_weight(t, 200.0, 400.0), [0.5, 0.5, 0.75, 0.875, 1.0, 1.0], rtol=1e-6)


def test_weight_is_the_line_of_the_paper():
    b1, b2 = 120.0, 870.0
    m = 0.5 / (b2 - b1)
    t = np.linspace(b1, b2, 9)
    np.testing.assert_allclose(phda_weight(jnp.asarray(t), b1, b2), m * t + (1 - m * b2), rtol=1e-6)


def test_phases_of_the_modalities():
    """Early is large t: everything counts there; audio fades first, then the image, text never."""
    early, middle, late = PhDAConfig()(jnp.asarray([900.0, 500.0, 50.0]))
    np.testing.assert_allclose(early, [1.0, 1.0, 1.0])
    np.testing.assert_allclose(middle, [1.0, 1.0, 0.5])
    np.testing.assert_allclose(late, [1.0, 0.5, 0.5])


def test_sampled_boundaries_move_but_not_the_constant():
    cfg = PhDAConfig(image=(400.0, 600.0), audio=(400.0, 600.0), jitter=50.0)
    t = jnp.full(200, 500.0)
    weights = np.asarray(cfg.sample(jax.random.key(0), t))
    np.testing.assert_array_equal(weights[:, 0], 1.0)
    # At the middle of the ramp a move of ±50 changes the weight 0.75 by at most 50 · 0.5 / 200.
    assert np.abs(weights[:, 1:] - 0.75).max() <= 0.125 + 1e-6
    assert weights[:, 1:].std() > 0.05
    assert not np.array_equal(weights[:, 1], weights[:, 2])
    assert hash(cfg) == hash(PhDAConfig(image=(400.0, 600.0), audio=(400.0, 600.0), jitter=50.0))


def test_allocations_that_the_paper_compares_with():
    """Sound left out of the early phase, and text counting half throughout the late one."""
    cfg = PhDAConfig.from_config({"audio": (500.0, 600.0, 1.0, 0.0), "text": (100.0, 200.0), "image": ()})
    early, between, late = cfg(jnp.asarray([900.0, 550.0, 50.0]))
    np.testing.assert_allclose(early, [1.0, 1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(between, [1.0, 1.0, 0.5], atol=1e-6)
    np.testing.assert_allclose(late, [0.5, 1.0, 1.0], atol=1e-6)
    np.testing.assert_array_equal(EVEN(jnp.asarray([900.0, 50.0])), 1.0)


def test_impossible_sections():
    with pytest.raises(UserError, match="config key phda: 'sound' is none of text, image, audio, jitter"):
        PhDAConfig.from_config({"sound": ()})
    with pytest.raises(UserError, match="PhDA weights of audio are .* must be from 0 to 1"):
        PhDAConfig.from_config({"audio": (500.0, 600.0, 1.0, -0.5)})


@pytest.mark.parametrize(
    "bounds", [(500.0, 500.0, 1.0), (500.0, 500.0), (600.0, 500.0), (-1.0, 500.0), (500.0, 1001.0)]
)
def test_impossible_boundaries(bounds):
    with pytest.raises(UserError, match="PhDA boundaries of audio"):
        PhDAConfig(audio=bounds)
