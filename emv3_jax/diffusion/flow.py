"""Flow matching: a straight line from noise to data, and the times at which it is visited.

t runs from 1000 (pure noise) to 0 (clean) and sigma = t / 1000:  x_t = (1 - sigma) x0 + sigma noise.
The model predicts the slope of that line, the velocity  noise - x0.
"""

from typing import Literal

import jax
import numpy as np
from flax import struct

from emv3_jax.errors import UserError

T_MAX = 1000.0  # t of pure noise


def _sigma_like(t: jax.Array, x: jax.Array) -> jax.Array:
    """t [B] -> sigma [B, 1, 1, ...], ready to be multiplied with x [B, ...]."""
    return (t / T_MAX).reshape(t.shape + (1,) * (x.ndim - t.ndim))


def add_noise(x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """The point x_t between data and noise.

    Args:
      x0: clean latents [B, ...].
      noise: standard normal, same shape.
      t: [B] in [0, 1000]; 1000 gives the noise itself.
    """
    sigma = _sigma_like(t, x0)
    return (1.0 - sigma) * x0 + sigma * noise


def velocity_target(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """What the model learns to predict; the same at every t."""
    return noise - x0


def x0_from_velocity(x: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    """The clean latents that a velocity v [B, ...] at x_t [B, ...] and t [B] points to."""
    return x - _sigma_like(t, x) * v


def shift_sigma(sigma, shift: float):
    """Moves sigma in [0, 1] towards 1 (noise) for shift > 1; 0 and 1 stay. Array or number, NumPy or JAX."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def sample_timesteps(
    key: jax.Array,
    batch: int,
    shift: float = 5.0,
    distribution: Literal["uniform", "logit_normal"] = "uniform",
) -> jax.Array:
    """Training timesteps t [B] in [0, 1000], float32.

    sigma is drawn uniformly, or as the sigmoid of a standard normal (more of the middle), and then shifted.

    Raises:
      UserError: for any other distribution.
    """
    if distribution == "uniform":
        sigma = jax.random.uniform(key, (batch,))
    elif distribution == "logit_normal":
        sigma = jax.nn.sigmoid(jax.random.normal(key, (batch,)))
    else:
        raise UserError(f"timestep distribution {distribution!r} is unknown; use 'uniform' or 'logit_normal'")
    return T_MAX * shift_sigma(sigma, shift)


@struct.dataclass
class TimeGrid:
    """Where a sampler evaluates the velocity, and how noisy the latents are there.

    Attributes:
      timesteps: float32 [n], falling from 1000; the t given to the model at each step.
      sigmas: float32 [n + 1]; the noise level before each step, and 0 after the last.
    """

    timesteps: np.ndarray | jax.Array
    sigmas: np.ndarray | jax.Array

    @property
    def steps(self) -> int:
        return self.timesteps.shape[0]


def flow_grid(steps: int, shift: float = 5.0) -> TimeGrid:
    """The released Flow (Euler) grid: sigma evenly spaced from 1 to the lowest shifted level, shifted, then 0.

    The lowest level is that of t = 1, so the shift acts twice on it: at shift 5 the last evaluation is at
    t = 24.4, and the last step goes from there to 0 (SPEC section 4).

    Raises:
      UserError: fewer than one step, or a shift that is not positive.
    """
    _check_grid(steps, shift)
    # The released scheduler keeps its 1000-entry table in float32 and the grid in float64; so does this line.
    lowest = shift_sigma(np.float32(1.0 / T_MAX), shift)
    sigmas = shift_sigma(np.linspace(T_MAX, T_MAX * float(lowest), steps) / T_MAX, shift).astype(np.float32)
    return TimeGrid(timesteps=sigmas * np.float32(T_MAX), sigmas=np.append(sigmas, np.float32(0.0)))


def dpmpp_grid(steps: int, shift: float = 5.0) -> TimeGrid:
    """The released DPM++ grid: sigma evenly spaced from 1 to 0, shifted; timesteps are cut to whole numbers (SPEC 4).

    Raises:
      UserError: as `flow_grid`.
    """
    return _even_grid(steps, shift, 1.0)


def unipc_grid(steps: int, shift: float = 5.0) -> TimeGrid:
    """The released UniPC grid: as DPM++'s, but from 0.999, since UniPC's formulas fail at sigma 1 (SPEC section 4).

    Raises:
      UserError: as `flow_grid`.
    """
    return _even_grid(steps, shift, 1.0 - 1.0 / T_MAX)


def _even_grid(steps: int, shift: float, highest: float) -> TimeGrid:
    _check_grid(steps, shift)
    sigmas = shift_sigma(np.linspace(highest, 0.0, steps + 1), shift)
    return TimeGrid(timesteps=np.floor(sigmas[:-1] * T_MAX).astype(np.float32), sigmas=sigmas.astype(np.float32))


def _check_grid(steps: int, shift: float) -> None:
    if steps < 1:
        raise UserError(f"a sampler needs at least one step, got {steps}")
    if shift <= 0:
        raise UserError(f"the timestep shift must be positive, got {shift}")
