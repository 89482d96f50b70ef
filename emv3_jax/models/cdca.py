"""Coupled-decoupled cross-attention (paper eq. 1): one query, and keys and values of their own for each modality.

out = Wo( text(q) + image(q) + audio(q) ), q = RMS(Wq x). Keys and values do not depend on the noisy latents, so
they are computed once per clip (`CrossKV`) and reused by every sampling step (`CDCA`).

Axes: B batch, L tokens, P prompts, S context tokens, T latent frames, N heads, K head width, D width.

Shapes at full size, 81 frames of 480x832, a layer:
  x, query  [B, 32760, 1536] -> [B, 32760, 12, 128]
  text      keys and values [B, P, 512, 12, 128] of P prompts, usually one
  image     keys and values [B, 257, 12, 128]
  audio     keys and values [B, 21, 17, 12, 128] (flash 32), each heard by the 1560 tokens of its latent frame
  out       [B, 32760, 1536]
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from emv3_jax.attention import attention, cross_attention
from emv3_jax.config import DiTConfig
from emv3_jax.layers import RMSNorm


@struct.dataclass
class KV:
    """Keys and values [..., S, N, K] of one modality, in the matmul dtype; a leading layer axis where stacked."""

    key: jax.Array
    value: jax.Array


@struct.dataclass
class ModalityKV:
    """Text [B, P, S, N, K], image [B, S, N, K], audio [B, T, S, N, K] (one segment per latent frame)."""

    text: KV
    image: KV
    audio: KV


@struct.dataclass
class Branches:
    """How much each branch counts: text [B, P, L, 1, 1], image [B, 1, 1, 1], audio [B, L, 1, 1]; float32."""

    text: jax.Array
    image: jax.Array
    audio: jax.Array


class KeysValues(nn.Module):
    """RMS-normed keys and plain values of one modality: states [B, S, D] -> KV [B, S, N, K]."""

    cfg: DiTConfig
    use_bias: bool = True

    @nn.compact
    def __call__(self, states: jax.Array) -> KV:
        cfg = self.cfg
        key = nn.Dense(cfg.width, use_bias=self.use_bias, dtype=cfg.dtype, name="key")(states)
        key = RMSNorm(epsilon=1e-6, name="key_norm")(key).astype(cfg.dtype)
        value = nn.Dense(cfg.width, use_bias=self.use_bias, dtype=cfg.dtype, name="value")(states)
        heads = (*states.shape[:-1], cfg.heads, cfg.head_width)
        return KV(key.reshape(heads), value.reshape(heads))


class CrossKV(nn.Module):
    """Keys and values of one layer, a method a modality: (None, states [B, S, D]) -> (None, KV), for nn.scan."""

    cfg: DiTConfig

    def setup(self):
        self.text = KeysValues(self.cfg)
        self.image = KeysValues(self.cfg)
        self.audio = KeysValues(self.cfg, use_bias=self.cfg.audio_windows is not None)

    def text_kv(self, carry: None, states: jax.Array) -> tuple[None, KV]:
        return carry, self.text(states)

    def image_kv(self, carry: None, states: jax.Array) -> tuple[None, KV]:
        return carry, self.image(states)

    def audio_kv(self, carry: None, states: jax.Array) -> tuple[None, KV]:
        return carry, self.audio(states)


def by_frame(kv: KV, segments: jax.Array | np.ndarray) -> KV:
    """Keys and values of audio tokens [..., B, A, N, K] -> of each latent frame's segment [..., B, T, S, N, K].

    segments [B, T, S] indexes the tokens of each sample, one past the last being a zero vector.
    """

    def pick(tokens: jax.Array, table: jax.Array) -> jax.Array:
        # mode="fill" turns the index past the end into zeros.
        return jnp.take(tokens, table, axis=-3, mode="fill", fill_value=0)

    return jax.tree.map(lambda x: jax.vmap(pick, (-4, 0), -5)(x, jnp.asarray(segments)), kv)


class CDCA(nn.Module):
    """Cross-attention of one layer: x [B, L, D], keys and values, branch weights -> [B, L, D]."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, x: jax.Array, kv: ModalityKV, branches: Branches) -> jax.Array:
        cfg = self.cfg
        batch, tokens, _ = x.shape
        q = nn.Dense(cfg.width, dtype=cfg.dtype, name="query")(x)
        if cfg.audio_windows is not None:
            # Released flash weights hold a query of audio's own, and their program throws its result away (SPEC 2). It
            # is kept so that weights go out as they came in; the compiler drops it.
            nn.Dense(cfg.width, dtype=cfg.dtype, name="unused_audio_query")(x)
        q = RMSNorm(epsilon=1e-6, name="query_norm")(q).astype(cfg.dtype)
        q = q.reshape(batch, tokens, cfg.heads, cfg.head_width)
        out = sum(
            branches.text[:, p] * cross_attention(q, kv.text.key[:, p], kv.text.value[:, p])
            for p in range(kv.text.key.shape[1])
        )
        out = out + branches.image * cross_attention(q, kv.image.key, kv.image.value)
        out = out + branches.audio * _attention_by_frame(q, kv.audio)
        out = out.reshape(batch, tokens, cfg.width)
        return nn.Dense(cfg.width, dtype=cfg.dtype, name="out")(out)


def _attention_by_frame(q: jax.Array, kv: KV) -> jax.Array:
    """Tokens of latent frame i attend to segment i alone: q [B, T·P, N, K], kv [B, T, S, N, K] -> like q."""
    batch, frames = kv.key.shape[:2]
    flat = q.reshape(batch * frames, -1, *q.shape[2:])
    key, value = (x.reshape(batch * frames, *x.shape[2:]) for x in (kv.key, kv.value))
    return attention(flat, key, value).reshape(q.shape)
