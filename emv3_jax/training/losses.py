"""Training losses, all in float32."""

import jax
import jax.numpy as jnp

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


def flow_matching(velocity: jax.Array, x0: jax.Array, noise: jax.Array, motion_gain: float) -> jax.Array:
    """Mean squared error of the velocity; latents that change in time count up to 1 + motion_gain times.

    Args:
      velocity, x0, noise: [B, T, h, w, C]; the target is noise - x0 (SPEC section 4).
    """
    change = jnp.mean(jnp.abs(x0 - jnp.mean(x0, axis=1, keepdims=True)), axis=-1, keepdims=True)
    weight = 1.0 + motion_gain * jnp.clip(change, 0.0, 1.0)
    return jnp.mean(weight * jnp.square(velocity.astype(jnp.float32) - velocity_target(x0, noise)))
