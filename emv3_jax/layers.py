"""Parts that more than one model is built from: linear layers, norms, time features, rotary positions.

Axes: B batch, L tokens, N heads, K head width, D width, T latent frames, H W token rows and columns.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

# Norms always compute in float32. The two-pass variance costs nothing and keeps parity with the released program.
LayerNorm = partial(nn.LayerNorm, dtype=jnp.float32, use_fast_variance=False)
RMSNorm = partial(nn.RMSNorm, dtype=jnp.float32)

gelu_tanh = partial(nn.gelu, approximate=True)
gelu_exact = partial(nn.gelu, approximate=False)


class MLP(nn.Module):
    """Linear, activation, linear: [..., D_in] -> [..., out]; output in `dtype`."""

    hidden: int
    out: int
    activation: Callable[[jax.Array], jax.Array] = gelu_tanh
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.activation(nn.Dense(self.hidden, dtype=self.dtype, name="up")(x))
        return nn.Dense(self.out, dtype=self.dtype, name="down")(x)


def sinusoidal_features(t: jax.Array, width: int) -> jax.Array:
    """Time features [B, width] of t [B] in [0, 1000]: cosines, then sines, of t·10000^(-i/(width/2)).

    The released program computes the phases in float64. Here whole and fractional part of t are multiplied apart, in
    turns, with a frequency split in two, so that the large product is exact in float32 and its whole turns drop out
    before anything is rounded: phases are right to 1e-6 rad instead of 1e-4.
    """
    half = width // 2
    turns = np.power(10000.0, -np.arange(half) / half) / (2 * np.pi)
    mantissa, exponent = np.frexp(turns)
    high = np.ldexp(np.round(mantissa * 2**13) / 2**13, exponent)  # 13 bits: times an integer below 1024 is exact
    t = t.astype(jnp.float32)[:, None]
    whole = jnp.floor(t)
    phase = jnp.mod(whole * np.float32(high), 1.0)
    phase = phase + whole * np.float32(turns - high) + (t - whole) * np.float32(turns)
    phase = np.float32(2 * np.pi) * phase
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


RIFLEX_SHARE = 0.9  # of one turn of the slowed frequency that a whole video takes
RIFLEX_STRETCH = 4.886  # by which the released program slows it down further


def rotary_frequencies(count: int, theta: float, riflex: int = 0, frames: int = 1) -> np.ndarray:
    """Radians per position of `count` rotary pairs, float64.

    RIFLEx: the frequency number `riflex` (from 1) is slowed down so far that a video of `frames` latent frames never
    comes round to where it began, and so does not repeat itself (SPEC section 2). 0 is off.
    """
    frequencies = np.power(theta, -np.arange(count) / count)
    if riflex:
        frequencies[riflex - 1] = RIFLEX_SHARE * 2 * np.pi / frames / RIFLEX_STRETCH
    return frequencies


def temporal_frequencies(head_width: int) -> int:
    """How many of a head's rotary frequencies belong to time: 22 of 64."""
    return head_width // 2 - 2 * (head_width // 6)


def rotary_tables(
    grid: tuple[int, int, int], head_width: int, theta: float, riflex: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each [T·H·W, K/2] float32, of the rotary angles on a (T, H, W) token grid.

    Of the K/2 frequencies of a head, height and width get K//6 each and time the rest (22, 21, 21 of 64). Angles are
    computed in float64, one axis at a time; only the small per-axis tables become constants of the program.
    `riflex`: see `rotary_frequencies`; of the axis of time.
    """
    side = head_width // 6
    tables = []
    for axis, (size, count) in enumerate(zip(grid, (temporal_frequencies(head_width), side, side), strict=True)):
        frequencies = rotary_frequencies(count, theta, riflex if axis == 0 else 0, grid[0])
        shape = [1, 1, 1, count]
        shape[axis] = size
        tables.append(np.outer(np.arange(size), frequencies).reshape(shape))

    def spread(f: Callable[[np.ndarray], np.ndarray]) -> jax.Array:
        parts = [jnp.broadcast_to(f(a).astype(np.float32), (*grid, a.shape[-1])) for a in tables]
        return jnp.concatenate(parts, axis=-1).reshape(-1, head_width // 2)

    return spread(np.cos), spread(np.sin)


def apply_rotary(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the adjacent pairs (2i, 2i+1) of x [B, L, N, K] by the angles of `tables`; float32 in and out."""
    cos, sin = (table[None, :, None, :] for table in tables)
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
