"""Training losses, all in float32. B batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from emv3_jax.diffusion.flow import velocity_target


def motion_weight(video: jax.Array, gain: float) -> jax.Array:
    """How much a pixel counts: 1 where nothing moves, up to 1 + gain where the picture changes in time.

    Small moving things (a mouth) are a small share of all pixels; unweighted, a codec spends nothing on them.

    Args:
      video: [B, F, H, W, 3] in [-1, 1].
    Returns:
      [B, F, H, W, 1].
    """
    change = jnp.max(jnp.abs(video - jnp.mean(video, axis=1, keepdims=True)), axis=-1, keepdims=True)
    window = (1, 1, 3, 3, 1)
    spread = jax.lax.reduce_window(change, -jnp.inf, jax.lax.max, window, (1,) * 5, "SAME")
    return 1.0 + gain * jnp.clip(2.0 * spread, 0.0, 1.0)


def gaussian_kl(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Mean over elements of KL(N(mean, exp(logvar)) || N(0, 1))."""
    return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)


def reconstruction(video: jax.Array, decoded: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """Weighted absolute and squared error, and the unweighted squared error, of decoded pixels in [-1, 1]."""
    error = decoded.astype(jnp.float32) - video
    return {
        "l1": jnp.mean(weight * jnp.abs(error)),
        "l2": jnp.mean(weight * jnp.square(error)),
        "mse": jnp.mean(jnp.square(error)),
    }


@struct.dataclass
class Mean:
    """A mean over samples of several batches, as a sum and a count: parts of different sizes add up."""

    total: jax.Array
    count: jax.Array

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def where(self, holds: jax.Array) -> "Mean":
        """It, or where `holds` is false the mean of nothing."""
        return Mean(jnp.where(holds, self.total, 0.0), jnp.where(holds, self.count, 0.0))


def mean_where(values: jax.Array, where: jax.Array) -> Mean:
    """Of those of values [B] for which where [B] holds."""
    return Mean(jnp.sum(jnp.where(where, values, 0.0)), jnp.sum(where.astype(jnp.float32)))


def velocity_errors(velocity: jax.Array, x0: jax.Array, noise: jax.Array, motion_gain: float = 0.0) -> jax.Array:
    """Mean squared error of each sample's velocity, [B]; latents that change in time count up to 1 + motion_gain times.

    Args:
      velocity, x0, noise: [B, T, h, w, C]; the target is noise - x0 (SPEC section 4).
    """
    squared = jnp.square(velocity.astype(jnp.float32) - velocity_target(x0, noise))
    if motion_gain:
        change = jnp.mean(jnp.abs(x0 - jnp.mean(x0, axis=1, keepdims=True)), axis=-1, keepdims=True)
        squared = squared * (1.0 + motion_gain * jnp.clip(change, 0.0, 1.0))
    return jnp.mean(squared, axis=(1, 2, 3, 4))


def negative_dpo(errors: jax.Array, reference: jax.Array, beta: float) -> jax.Array:
    """Negative DPO against the reference checkpoint: softplus(-beta·(err - err_ref)), mean over negatives [B].

    In flow matching log pi is -beta times the velocity's squared error up to a constant (SPEC section 5), so the odds
    of a negative against the reference's are exp(-beta·(err - err_ref)): the loss falls as errors rise, and no further
    once a negative has become unlikely.
    """
    return jnp.mean(jax.nn.softplus(-beta * (errors - reference)))


def negative_dpo_absolute(errors: jax.Array, reference: jax.Array, beta: float) -> jax.Array:
    """Negative DPO as the paper writes it (eq. 3), with its sign as prose has it: log(1 + pi), pi = exp(-beta·err)."""
    return jnp.mean(jnp.log1p(jnp.exp(-beta * errors)))


def paired_dpo(errors: jax.Array, reference: jax.Array, beta: float) -> jax.Array:
    """DPO on pairs: the first half of errors [2B] is of the preferred samples, the second of the others."""
    better, worse = jnp.split(errors - reference, 2)
    return jnp.mean(jax.nn.softplus(beta * (better - worse)))


Preference = Callable[[jax.Array, jax.Array, float], jax.Array]
PREFERENCES: dict[str, Preference] = {
    "ndpo": negative_dpo,
    "ndpo_absolute": negative_dpo_absolute,
    "dpo": paired_dpo,
}
