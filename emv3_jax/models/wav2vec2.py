"""wav2vec2-base speech encoder: a wave at 16 kHz in, 50 features a second out (SPEC sections 1 to 3).

Axes: B batch, n samples, A audio features, F video frames, N heads, K head width, D width, C width of the convolutions.

At full size (94 million parameters), for one second of sound:
  wave           [B, 16000]        zero mean, unit variance
  conv features  [B, 49, 512]      7 convolutions: 400 samples (25 ms) a feature, one every 320 (20 ms)
  resampled      [B, 25, 512]      flash only: one feature per video frame
  hidden states  [B, 12, 49, 768]  after each of 12 post-norm blocks, 12 heads of 64 (flash: [B, 12, 25, 768])
  read by        preview: the last block's states; flash: all twelve

Everything computes in float32; weights may be stored in bfloat16 and are widened where they are used.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from emv3_jax.attention import attention
from emv3_jax.config import Wav2Vec2Config
from emv3_jax.layers import MLP, LayerNorm, gelu_exact

NORM_EPS = 1e-5


def feature_count(cfg: Wav2Vec2Config, samples: int) -> int:
    """How many features a wave of `samples` samples gives: 0 below 400 samples at full size."""
    for kernel, stride in zip(cfg.conv_kernels, cfg.conv_strides, strict=True):
        samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
    return samples


def sample_count(cfg: Wav2Vec2Config, features: int) -> int:
    """Length of the shortest wave that gives `features` (at least one) features."""
    for kernel, stride in zip(reversed(cfg.conv_kernels), reversed(cfg.conv_strides), strict=True):
        features = (features - 1) * stride + kernel
    return features


def resample_features(features: jax.Array, steps: int) -> jax.Array:
    """features [B, A, C] -> [B, steps, C], linear in time; the first and the last stay what they are (SPEC 2, flash).

    Step i lies at feature i·(A - 1)/(steps - 1) (align_corners); a single step is the first feature. Positions are
    computed in whole numbers, so that both ends are exact however long the sound is.
    """
    length = features.shape[1]
    parts = max(steps - 1, 1)
    left, rest = np.divmod(np.arange(steps) * (length - 1), parts)
    right = np.minimum(left + 1, length - 1)
    weight = jnp.asarray(rest / parts, features.dtype)[None, :, None]
    return features[:, left] * (1 - weight) + features[:, right] * weight


class ConvFeatures(nn.Module):
    """Strided convolutions without bias, each followed by GELU; the first is normed per channel over all of time."""

    cfg: Wav2Vec2Config

    @nn.compact
    def __call__(self, wave: jax.Array) -> jax.Array:
        """wave [B, n] -> [B, A, C]."""
        cfg = self.cfg
        # As many groups as channels; two-pass variance as in all norms here.
        group_norm = partial(
            nn.GroupNorm, None, group_size=1, epsilon=NORM_EPS, dtype=jnp.float32, use_fast_variance=False
        )
        x = wave.astype(jnp.float32)[:, :, None]
        for i, (kernel, stride) in enumerate(zip(cfg.conv_kernels, cfg.conv_strides, strict=True)):
            x = nn.Conv(cfg.conv_width, (kernel,), (stride,), "VALID", use_bias=False, name=f"conv{i}")(x)
            if i == 0:
                x = group_norm(name="norm")(x)
            x = gelu_exact(x)
        return x


class PositionalConv(nn.Module):
    """Where a feature stands, heard from its neighbours: a wide grouped convolution, then GELU.

    Its weight is stored as direction v [taps, D/groups, D] and size g [taps, 1, 1] of each tap (weight norm), as in the
    released files. Output a is centred on feature a; of an even number of taps the extra one is before it.
    """

    cfg: Wav2Vec2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, A, D] -> [B, A, D]."""
        taps, groups, width = self.cfg.positional_taps, self.cfg.positional_groups, self.cfg.width
        v = self.param("v", nn.initializers.normal(1.0), (taps, width // groups, width)).astype(jnp.float32)
        g = self.param("g", nn.initializers.ones, (taps, 1, 1)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,))
        kernel = v * (g / jnp.sqrt(jnp.sum(jnp.square(v), axis=(1, 2), keepdims=True)))
        x = jax.lax.conv_general_dilated(
            x, kernel, (1,), [(taps // 2, (taps - 1) // 2)], dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )  # fmt: skip
        return gelu_exact(x + bias)


class SelfAttention(nn.Module):
    """Full attention over the features of one clip."""

    cfg: Wav2Vec2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, A, D] -> [B, A, D]."""
        heads, width = self.cfg.heads, self.cfg.width
        q, k, v = (nn.Dense(width, name=name)(x).reshape(*x.shape[:2], heads, width // heads) for name in "qkv")
        return nn.Dense(width, name="o")(attention(q, k, v).reshape(x.shape))


class Block(nn.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x)), exact GELU."""

    cfg: Wav2Vec2Config

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, jax.Array]:
        cfg = self.cfg
        x = LayerNorm(epsilon=NORM_EPS, name="norm1")(x + SelfAttention(cfg, name="attention")(x))
        x = LayerNorm(epsilon=NORM_EPS, name="norm2")(x + MLP(cfg.ffn, cfg.width, gelu_exact, name="mlp")(x))
        return x, x  # (carry, this layer's row of the stack), as nn.scan wants it


class Encoder(nn.Module):
    """Projection, positions and the blocks, which are scanned: their parameters are stacked on axis 0."""

    cfg: Wav2Vec2Config

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """features [B, A, C] -> states after each block, [B, layers, A, D]."""
        cfg = self.cfg
        x = nn.Dense(cfg.width, name="proj")(LayerNorm(epsilon=NORM_EPS, name="proj_norm")(features))
        x = LayerNorm(epsilon=NORM_EPS, name="norm")(x + PositionalConv(cfg, name="positions")(x))
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, out_axes=1, length=cfg.layers)
        return blocks(cfg, name="blocks")(x, None)[1]


class Wav2Vec2(nn.Module):
    """wav2vec2-base without its heads. Every clip of a batch is taken whole: the files were trained without a mask."""

    cfg: Wav2Vec2Config

    def setup(self) -> None:
        self.features = ConvFeatures(self.cfg)
        self.encoder = Encoder(self.cfg)
        # Stands for hidden features in the encoder's own pretraining. Nothing reads it; files that go back out hold it.
        self.masked_spec_embed = self.param("masked_spec_embed", nn.initializers.uniform(1.0), (self.cfg.width,))

    def conv_features(self, wave: jax.Array) -> jax.Array:
        """wave [B, n] at 16 kHz, zero mean and unit variance -> float32 [B, A, C], A = `feature_count(cfg, n)`.

        Raises ValueError for another shape, or a wave too short for one feature.
        """
        if wave.ndim != 2 or feature_count(self.cfg, wave.shape[1]) < 1:
            shortest = sample_count(self.cfg, 1)
            raise ValueError(f"wave must be [B, n] with n at least {shortest}; got {wave.shape}")
        return self.features(wave)

    def encode(self, features: jax.Array) -> jax.Array:
        """features [B, A, C], from `conv_features`, resampled or not -> states after each block, [B, layers, A, D]."""
        if features.ndim != 3 or features.shape[2] != self.cfg.conv_width:
            raise ValueError(f"features must be [B, A, {self.cfg.conv_width}]; got {features.shape}")
        return self.encoder(features)

    def frame_states(self, wave: jax.Array, frames: int) -> jax.Array:
        """wave [B, n] -> states after each block with one feature per video frame, [B, layers, frames, D] (flash)."""
        return self.encode(resample_features(self.conv_features(wave), frames))

    def __call__(self, wave: jax.Array) -> jax.Array:
        """wave [B, n] -> states after the last block, float32 [B, A, D] (preview)."""
        return self.encode(self.conv_features(wave))[:, -1]
