"""PhDA: how much each modality counts at each phase of the denoising (paper eq. 2).

A weight is 0.5 below B1, rises linearly to 1 at B2 and stays there; large t is the early phase. Text counts the same
throughout, the image most in the early and middle phases, audio most in the early phase.

Axes: B batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from emv3_jax.diffusion.flow import T_MAX
from emv3_jax.errors import UserError

MODALITIES = ("text", "image", "audio")
# (B1, B2), B1 < B2, both in [0, 1000]; or (B1, B2, below, above): other weights than 0.5 below B1 and 1 above B2.
Bounds = tuple[float, ...]


def phda_weight(
    t: jax.Array, b1: jax.Array | float, b2: jax.Array | float, below: float = 0.5, above: float = 1.0
) -> jax.Array:
    """Weight at t in [0, 1000]; t, b1 < b2 broadcast. Written m·t + b, with m = (above - below) / (b2 - b1)."""
    return below + (above - below) * jnp.clip((t - b1) / (b2 - b1), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class PhDAConfig:
    """Boundaries (B1, B2) per modality; None is a constant 1. Call it with t [B] for the weights [B, 3].

    The paper names phases, not numbers. With the phases as thirds of [0, 1000], a weight is 1 throughout the phases
    in which its modality matters and rises in the half phase before them. Other weights than the paper's 0.5 and 1 are
    for what it compares with: (B1, B2, 1.0, 0.0) leaves a modality out of the early phase. Raises UserError unless
    0 <= B1 < B2 <= 1000 and weights and jitter are in [0, 1] and [0, 1000].
    """

    text: Bounds | None = None
    image: Bounds | None = (T_MAX / 6, T_MAX / 3)
    audio: Bounds | None = (T_MAX / 2, T_MAX * 2 / 3)
    jitter: float = 100.0  # training: how far `sample` moves both boundaries of a modality, at most

    def __post_init__(self):
        for name, bounds in zip(MODALITIES, self._bounds, strict=True):
            if bounds is None:
                continue
            if len(bounds) not in (2, 4) or not 0 <= bounds[0] < bounds[1] <= T_MAX:
                raise UserError(f"PhDA boundaries of {name} are {bounds}; they must satisfy 0 <= B1 < B2 <= {T_MAX:g}")
            if not all(0 <= weight <= 1 for weight in bounds[2:]):
                raise UserError(f"PhDA weights of {name} are {bounds[2:]}; they must be from 0 to 1")
        if not 0 <= self.jitter <= T_MAX:
            raise UserError(f"PhDA's jitter is {self.jitter}; it must be from 0 to {T_MAX:g}")

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> "PhDAConfig":
        """Of a config's section {text, image, audio: boundaries, or () for a constant 1; jitter}.

        Raises:
          UserError: as the class; a key that there is not.
        """
        if unknown := sorted(set(section) - {*MODALITIES, "jitter"}):
            raise UserError(f"config key phda: {unknown[0]!r} is none of {', '.join(MODALITIES)}, jitter")
        bounds = {name: tuple(section[name]) or None for name in MODALITIES if name in section}
        return cls(**bounds, **({"jitter": float(section["jitter"])} if "jitter" in section else {}))

    @property
    def _bounds(self) -> tuple[Bounds | None, Bounds | None, Bounds | None]:
        return self.text, self.image, self.audio

    def __call__(self, t: jax.Array) -> jax.Array:
        """t [B] in [0, 1000] -> weights [B, 3] of text, image and audio, float32."""
        return self._weights(t, jnp.zeros((*t.shape, 3)))

    def sample(self, key: jax.Array, t: jax.Array) -> jax.Array:
        """Like a call, with boundaries drawn per sample and modality (the paper's meta distribution; training)."""
        return self._weights(t, jax.random.uniform(key, (*t.shape, 3), minval=-self.jitter, maxval=self.jitter))

    def _weights(self, t: jax.Array, moved: jax.Array) -> jax.Array:
        t = t.astype(jnp.float32)
        columns = [
            jnp.ones_like(t) if bounds is None else phda_weight(t - moved[..., i], *bounds)
            for i, bounds in enumerate(self._bounds)
        ]
        return jnp.stack(columns, axis=-1)


EVEN = PhDAConfig(None, None, None)  # every modality counts the same throughout
