"""umT5 text encoder: token ids in, one state per token out (SPEC sections 1 and 2).

Axes: B batch, S query tokens, T key tokens (same length), N heads, K head width, D width.

Shapes at full size (umT5-XXL's encoder, 5.7 billion parameters):
  ids, mask  [B, 512]          padded; the mask is 1 up to the end mark
  tokens     [B, 512, 4096]    rows of a table of 256384
  states     [B, 512, 4096]    through 24 blocks: 64 heads of 64, gated MLP of 10240
  biases     [24, 32, 64]      of 32 distances, for each block and head
  out        [B, 512, 4096]    after the last norm

Unlike T5, every block owns its table of relative-position biases. As in T5, attention logits are not scaled by
1/sqrt(K). Everything computes in float32; weights may be stored in bfloat16 and are widened where they are used.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from emv3_jax.config import UMT5Config
from emv3_jax.layers import RMSNorm, gelu_tanh

NORM_EPS = 1e-6
Params = Any


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket number of every (query, key) distance, [length, length] int32.

    Bidirectional T5 rule: the upper half of the buckets is for keys after the query; in each half the first half
    holds exact distances and the rest grow logarithmically up to `max_distance`. The logarithm is taken in float32
    because the released program does so, and distances on a bucket's edge depend on it.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), exact).astype(np.float32)  # clipped where `exact` distances are used instead
    log_steps = np.log(far / np.float32(exact)) / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far_bucket = np.minimum(exact + log_steps.astype(np.int32), half - 1)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), far_bucket)
    return (bucket + half * (distance > 0)).astype(np.int32)


def _projection(features: int, std: float, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, kernel_init=nn.initializers.normal(std), name=name)


class SelfAttention(nn.Module):
    """Unscaled attention with this block's own relative-position bias."""

    cfg: UMT5Config

    @nn.compact
    def __call__(self, x: jax.Array, keep: jax.Array) -> jax.Array:
        """x [B, S, D] float32, keep [B, S] bool (True = a real token) -> [B, S, D]."""
        cfg = self.cfg
        length, heads, head_width = x.shape[1], cfg.heads, cfg.attention_width // cfg.heads
        # With unit-variance x this makes q.k of unit variance too, which is why the logits need no 1/sqrt(K).
        q = _projection(cfg.attention_width, (cfg.width * head_width) ** -0.5, "q")(x)
        k = _projection(cfg.attention_width, cfg.width**-0.5, "k")(x)
        v = _projection(cfg.attention_width, cfg.width**-0.5, "v")(x)
        q, k, v = (y.reshape(*y.shape[:2], heads, head_width) for y in (q, k, v))

        table = self.param(
            "position_bias", nn.initializers.normal((2 * cfg.buckets * heads) ** -0.5), (cfg.buckets, heads)
        )
        bias = table[relative_buckets(length, cfg.buckets, cfg.max_distance)]  # [S, T, N]
        logits = jnp.einsum("BSNK,BTNK->BNST", q, k, preferred_element_type=jnp.float32)
        logits = logits + jnp.transpose(bias, (2, 0, 1)).astype(jnp.float32)
        logits = jnp.where(keep[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        out = jnp.einsum("BNST,BTNK->BSNK", jax.nn.softmax(logits, axis=-1), v)
        return _projection(cfg.width, cfg.attention_width**-0.5, "o")(out.reshape(*out.shape[:2], -1))


class FeedForward(nn.Module):
    """fc2(fc1(x) * gelu_tanh(gate(x)))."""

    cfg: UMT5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.cfg
        gate = gelu_tanh(_projection(cfg.ffn, cfg.width**-0.5, "gate")(x))
        up = _projection(cfg.ffn, cfg.width**-0.5, "fc1")(x)
        return _projection(cfg.width, cfg.ffn**-0.5, "fc2")(up * gate)


class Block(nn.Module):
    """x += attention(norm(x)); x += ffn(norm(x))."""

    cfg: UMT5Config

    @nn.compact
    def __call__(self, x: jax.Array, keep: jax.Array) -> tuple[jax.Array, None]:
        x = x + SelfAttention(self.cfg, name="attention")(RMSNorm(epsilon=NORM_EPS, name="norm1")(x), keep)
        x = x + FeedForward(self.cfg, name="ffn")(RMSNorm(epsilon=NORM_EPS, name="norm2")(x))
        return x, None  # (carry, nothing stacked), as nn.scan wants it


class UMT5Encoder(nn.Module):
    """Encoder half of umT5. Blocks are scanned: their parameters are stacked on axis 0."""

    cfg: UMT5Config

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """States of a padded batch of prompts.

        ids [B, S] int in [0, vocab); mask [B, S], nonzero = a real token. Returns float32 [B, S, D]. States at padded
        positions are numbers without meaning (as in the released program): cut or zero them before use.
        """
        cfg = self.cfg
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise ValueError(f"ids and mask must both be [B, S]; got {ids.shape} and {mask.shape}")
        embed = nn.Embed(cfg.vocab, cfg.width, embedding_init=nn.initializers.normal(1.0), name="tokens")
        x = embed(ids).astype(jnp.float32)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.layers,
        )
        x, _ = blocks(cfg, name="blocks")(x, mask > 0)
        return RMSNorm(epsilon=NORM_EPS, name="norm")(x)


def encode_by_layer(cfg: UMT5Config, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """`UMT5Encoder` of ids and mask [B, S], a layer at a time: the same numbers in the memory of one layer.

    A compiled program of all layers widens the stored bfloat16 weights of all of them at once on a CPU: 23 GB at full
    size, where this needs the 11 GB that the weights take, and one layer.
    """
    x = jnp.take(params["tokens"]["embedding"], jnp.asarray(ids), axis=0).astype(jnp.float32)
    for i in range(cfg.layers):
        layer = jax.tree.map(operator.itemgetter(i), params["blocks"])
        x = _one_block(cfg, layer, x, jnp.asarray(mask) > 0)
    return RMSNorm(epsilon=NORM_EPS).apply({"params": params["norm"]}, x)


@functools.partial(jax.jit, static_argnums=0)
def _one_block(cfg: UMT5Config, params: Params, x: jax.Array, keep: jax.Array) -> jax.Array:
    return Block(cfg).apply({"params": params}, x, keep)[0]
