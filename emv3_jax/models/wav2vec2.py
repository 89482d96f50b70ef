"""wav2vec2-base speech encoder: a wave at 16 kHz in, 50 features a second out (SPEC sections 1 to 3).

Axes: B batch, n samples, A audio features, F video frames, N heads, K head width, D width, C width of the convolutions.

At full size (94 million parameters), for one second of sound:
  wave           [B, 16000]        zero mean, unit variance
  conv features  [B, 49, 512]      7 convolutions: 400 samples (25 ms) a feature, one every 320 (20 ms)
  resampled      [B, 25, 512]      flash only: one feature per video frame
  hidden states  [B, 12, 49, 768]  after each of 12 post-norm blocks, 12 heads of 64 (flash: [B, 12, 25, 768])
  read by        preview: the last block's states; flash: all twelve

Everything computes in float32; weights may be stored in bfloat16 and are widened where they are used.

Every clip is heard whole: the first norm is over all of its time, and every feature attends to every other. Yet the
work is done a stretch of `PIECE` features at a time, so that memory beyond a stretch's own grows with the sound only by
some float32 states [A, 768] (150 KB a second of sound each; flash 75 KB) and the attention of one stretch to the whole,
a head at a time. Sounds may be padded to a common length, which changes nothing: `samples` and `count` then say how
much of them is real.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from emv3_jax.attention import chunked_attention
from emv3_jax.config import Wav2Vec2Config
from emv3_jax.layers import MLP, LayerNorm, gelu_exact

NORM_EPS = 1e-5
PIECE = 256  # features computed at a time: 5 s of sound


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


def resample_features(features: jax.Array | np.ndarray, steps: int) -> jax.Array | np.ndarray:
    """features [B, A, C] -> [B, steps, C], linear in time; the first and the last stay what they are (SPEC 2, flash).

    Step i lies at feature i·(A - 1)/(steps - 1) (align_corners); a single step is the first feature. Positions are
    computed in whole numbers, so that both ends are exact however long the sound is.
    """
    length = features.shape[1]
    parts = max(steps - 1, 1)
    left, rest = np.divmod(np.arange(steps) * (length - 1), parts)
    right = np.minimum(left + 1, length - 1)
    weight = (rest / parts).astype(features.dtype)[None, :, None]
    return features[:, left] * (1 - weight) + features[:, right] * weight


def even_pieces(length: int, longest: int) -> tuple[int, int]:
    """(count, size) of the fewest equal pieces, none longer than `longest`, that cover `length`."""
    count = -(-length // longest)
    return count, -(-length // count)


def by_pieces(rows: Callable, module: nn.Module, count: int) -> jax.Array:
    """rows(module, i) -> [B, size, D], of the pieces i < count one after another, laid end to end: [B, count·size, D].

    `rows` reaches the module's parts through its argument only, as nn.scan wants it.
    """

    def step(module: nn.Module, _: None, i: jax.Array) -> tuple[None, jax.Array]:
        return None, rows(module, i)

    scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, out_axes=1)
    out = scan(module, None, jnp.arange(count))[1]
    return out.reshape(out.shape[0], -1, out.shape[-1])


def piece_of(x: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    """x [B, n, ...] -> [B, size, ...]; the piece must lie inside."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def lengthened(x: jax.Array, length: int, before: int = 0) -> jax.Array:
    """Zeros around x [B, n, ...]: `before` of them first, then behind it until there are `length` in all."""
    return jnp.pad(x, ((0, 0), (before, length - before - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


class NormOverTime(nn.Module):
    """Scale and shift per channel after a norm whose mean and variance are given: a group norm, done in two passes."""

    @nn.compact
    def __call__(self, x: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
        """x [B, n, C]; mean, variance [B, 1, C] over all of time."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return (x - mean) * (jax.lax.rsqrt(variance + NORM_EPS) * scale) + bias


class ConvFeatures(nn.Module):
    """Strided convolutions without bias, each followed by GELU; the first is normed per channel over all of time.

    The first convolution is therefore run twice, for its statistics and for what follows; both times by pieces of the
    wave, which overlap as far as a feature hears.
    """

    cfg: Wav2Vec2Config

    def setup(self) -> None:
        cfg = self.cfg
        self.convs = [
            nn.Conv(cfg.conv_width, (kernel,), (stride,), "VALID", use_bias=False, name=f"conv{i}")
            for i, (kernel, stride) in enumerate(zip(cfg.conv_kernels, cfg.conv_strides, strict=True))
        ]
        self.norm = NormOverTime()

    def __call__(self, wave: jax.Array, samples: jax.Array | int) -> jax.Array:
        """wave [B, n], of which `samples` are real -> [B, A, C]."""
        cfg, length = self.cfg, wave.shape[1]
        wave = wave.astype(jnp.float32)
        count, size = even_pieces(feature_count(cfg, length), PIECE)
        mean, variance = self.statistics(wave, samples, size)

        step, heard = size * math.prod(cfg.conv_strides), sample_count(cfg, size)
        padded = lengthened(wave, max(length, (count - 1) * step + heard))

        def features(module: ConvFeatures, i: jax.Array) -> jax.Array:
            first, *others = module.convs
            x = gelu_exact(module.norm(first(piece_of(padded, i * step, heard)[..., None]), mean, variance))
            for conv in others:
                x = gelu_exact(conv(x))
            return x

        return by_pieces(features, self, count)[:, : feature_count(cfg, length)]

    def statistics(self, wave: jax.Array, samples: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array]:
        """Mean and variance [B, 1, C] of the first convolution of a wave [B, n], of which `samples` are real.

        Every piece, of as many samples as `size` features begin in, gives its own mean and its mean square around that;
        these are then put together. No difference of large sums is taken, so float32 is enough.
        """
        kernel, stride = self.cfg.conv_kernels[0], self.cfg.conv_strides[0]
        size = size * math.prod(self.cfg.conv_strides[1:])
        count = -(-((wave.shape[1] - kernel) // stride + 1) // size)
        step, heard = size * stride, (size - 1) * stride + kernel
        padded = lengthened(wave, max(wave.shape[1], (count - 1) * step + heard))
        total = (samples - kernel) // stride + 1

        def moments(module: ConvFeatures, i: jax.Array) -> jax.Array:
            x = module.convs[0](piece_of(padded, i * step, heard)[..., None])
            real = (i * size + jnp.arange(size) < total)[:, None]
            share = 1 / jnp.maximum(real.sum(), 1)
            mean = jnp.sum(x * real, axis=1, keepdims=True) * share
            return jnp.concatenate([mean, jnp.sum(jnp.square(x - mean) * real, axis=1, keepdims=True) * share], axis=1)

        means, variances = jnp.split(by_pieces(moments, self, count).reshape(len(wave), count, 2, -1), 2, axis=2)
        weights = jnp.clip(total - size * jnp.arange(count), 0, size)[:, None, None] / total
        mean = jnp.sum(weights * means, axis=1)
        return mean, jnp.sum(weights * (variances + jnp.square(means - mean[:, None])), axis=1)


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
        count, size = even_pieces(x.shape[1], PIECE)
        padded = lengthened(x, count * size + taps - 1, before=taps // 2)

        def rows(_: PositionalConv, i: jax.Array) -> jax.Array:
            heard = piece_of(padded, i * size, size + taps - 1)
            out = jax.lax.conv_general_dilated(
                heard, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
            )
            return gelu_exact(out + bias)

        return by_pieces(rows, self, count)[:, : x.shape[1]]


class SelfAttention(nn.Module):
    """Attention of some features to all features of one clip."""

    cfg: Wav2Vec2Config

    def setup(self) -> None:
        self.q, self.k, self.v, self.o = (nn.Dense(self.cfg.width) for _ in range(4))

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, A, D] -> keys and values [B, A, N, K]."""
        return self._by_head(self.k(x)), self._by_head(self.v(x))

    def __call__(self, x: jax.Array, keys: jax.Array, values: jax.Array, real: jax.Array) -> jax.Array:
        """x [B, any, D] -> the same shape; real [A]: which keys and values count."""
        return self.o(chunked_attention(self._by_head(self.q(x)), keys, values, mask=real).reshape(x.shape))

    def _by_head(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.cfg.heads, -1)


class Block(nn.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x)), exact GELU."""

    cfg: Wav2Vec2Config
    kept: bool = True

    def setup(self) -> None:
        self.attention = SelfAttention(self.cfg)
        self.mlp = MLP(self.cfg.ffn, self.cfg.width, gelu_exact)
        self.norm1, self.norm2 = LayerNorm(epsilon=NORM_EPS), LayerNorm(epsilon=NORM_EPS)

    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """x [B, A, D], real [A] False at padding -> (carry, this layer's row of the stack if kept), for nn.scan."""
        count, size = even_pieces(x.shape[1], PIECE)
        keys, values = self.attention.keys_values(x)
        padded = lengthened(x, count * size)

        def rows(block: Block, i: jax.Array) -> jax.Array:
            x = piece_of(padded, i * size, size)
            x = block.norm1(x + block.attention(x, keys, values, real))
            return block.norm2(x + block.mlp(x))

        x = by_pieces(rows, self, count)[:, : x.shape[1]]
        return x, (x if self.kept else None)


class Encoder(nn.Module):
    """Projection, positions and the blocks, which are scanned: their parameters are stacked on axis 0."""

    cfg: Wav2Vec2Config

    @nn.compact
    def __call__(self, features: jax.Array, count: jax.Array | int, every_layer: bool) -> jax.Array:
        """features [B, A, C], `count` of them real -> states after each block [B, layers, A, D], or the last [B, A, D].

        Padding is nothing to the real ones: the positional convolution sees zeros there, as past the end of a sound,
        and attention does not see it.
        """
        cfg = self.cfg
        real = jnp.arange(features.shape[1]) < count
        x = nn.Dense(cfg.width, name="proj")(LayerNorm(epsilon=NORM_EPS, name="proj_norm")(features))
        x = jnp.where(real[:, None], x, 0)
        x = LayerNorm(epsilon=NORM_EPS, name="norm")(x + PositionalConv(cfg, name="positions")(x))
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, out_axes=1,
            length=cfg.layers,
        )  # fmt: skip
        x, states = blocks(cfg, kept=every_layer, name="blocks")(x, real)
        return states if every_layer else x


class Wav2Vec2(nn.Module):
    """wav2vec2-base without its heads. Every clip of a batch has the same length: the files were trained without a
    mask, and none hears what another is padded with."""

    cfg: Wav2Vec2Config

    def setup(self) -> None:
        self.features = ConvFeatures(self.cfg)
        self.encoder = Encoder(self.cfg)
        # Stands for hidden features in the encoder's own pretraining. Nothing reads it; files that go back out hold it.
        self.masked_spec_embed = self.param("masked_spec_embed", nn.initializers.uniform(1.0), (self.cfg.width,))

    def conv_features(self, wave: jax.Array, samples: jax.Array | int | None = None) -> jax.Array:
        """wave [B, n] at 16 kHz, zero mean and unit variance -> float32 [B, A, C], A = `feature_count(cfg, n)`.

        samples: how many of n are the clip's, where others follow; the features of those first
        `feature_count(cfg, samples)`, at least one, are then the clip's, and the rest mean nothing. Default: all of n.
        Raises ValueError for another shape, or a wave too short for one feature.
        """
        if wave.ndim != 2 or feature_count(self.cfg, wave.shape[1]) < 1:
            shortest = sample_count(self.cfg, 1)
            raise ValueError(f"wave must be [B, n] with n at least {shortest}; got {wave.shape}")
        return self.features(wave, wave.shape[1] if samples is None else samples)

    def encode(self, features: jax.Array, count: jax.Array | int | None = None, every_layer: bool = True) -> jax.Array:
        """features [B, A, C], from `conv_features`, resampled or not -> states after each block, [B, layers, A, D].

        count: how many of A are the clip's, where others follow; their states mean nothing. Default: all of A.
        every_layer: False for the states after the last block alone, [B, A, D].
        """
        if features.ndim != 3 or features.shape[2] != self.cfg.conv_width:
            raise ValueError(f"features must be [B, A, {self.cfg.conv_width}]; got {features.shape}")
        return self.encoder(features, features.shape[1] if count is None else count, every_layer)

    def frame_states(self, wave: jax.Array, frames: int) -> jax.Array:
        """wave [B, n] -> states after each block with one feature per video frame, [B, layers, frames, D] (flash)."""
        return self.encode(resample_features(self.conv_features(wave), frames))

    def __call__(self, wave: jax.Array) -> jax.Array:
        """wave [B, n] -> states after the last block, float32 [B, A, D] (preview)."""
        return self.encode(self.conv_features(wave), every_layer=False)
