from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert import parity
from emv3_jax.layers import apply_rotary, rotary_tables, sinusoidal_features


def test_sinusoidal_features_match_float64():
    t = np.array([0.0, 1.0, 24.414066, 417.0, 834.7121, 999.99994, 1000.0], np.float32)
    angles = np.outer(t.astype(np.float64), 10000.0 ** (-np.arange(128) / 128))
    want = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(sinusoidal_features(jnp.asarray(t), 256), want, atol=2e-6)


def test_rotary_equals_complex_rotation():
    grid, width = (3, 4, 5), 128
    x = np.random.default_rng(0).standard_normal((2, 60, 3, width)).astype(np.float32)
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3)
    angles = np.concatenate(
        [np.outer(places[:, axis], 10000.0 ** (-np.arange(n) / n)) for axis, n in enumerate((22, 21, 21))], axis=-1
    )
    pairs = x.astype(np.float64).view(np.complex128) * np.exp(1j * angles)[None, :, None]
    got = apply_rotary(jnp.asarray(x), rotary_tables(grid, width, 10000.0))
    np.testing.assert_allclose(got, pairs.view(np.float64), atol=2e-6)


def test_riflex_slows_one_temporal_frequency_down():
    assert parity.relative_error(*parity.riflex(parity.Golden(Path(__file__).parent / "golden"))) < 1e-6
    plain, slowed = (rotary_tables((29, 2, 2), 128, 10000.0, riflex=k)[1] for k in (0, 6))
    different = np.flatnonzero(np.abs(plain - slowed).max(0) > 1e-6)
    np.testing.assert_array_equal(different, [5])  # of time; height and width keep theirs
    turns = np.unwrap(2 * np.arcsin(np.clip(np.asarray(slowed)[::4, 5], -1, 1)) / 2)
    assert turns[-1] < 2 * np.pi  # no moment looks like another
