"""The Wan 2.1 causal video VAE: 8x in space, 4x in time, the first frame alone (SPEC section 3).

Axes: B batch, T latent frames, F frames, H W pixels, h w latent grid (H/8, W/8), P = h·w, C channels. Channels last.

Shapes at full size (0.13 billion parameters), 81 frames of 480x832:
  video    [B, 81, 480, 832, 3]   in [-1, 1]
  encoder  [B, 81, 480, 832, 96] -> [B, 81, 240, 416, 96] -> [B, 41, 120, 208, 192] -> [B, 21, 60, 104, 384]
  moments  [B, 21, 60, 104, 32]   mean and logvar, 16 channels each
  latents  [B, 21, 60, 104, 16]   normalised by channel
  decoder  the same way back, one latent frame (1 or 4 frames of video) at a time

Every layer that looks back in time takes a cache and returns the next one. No cache means that the clip starts here, so
one network serves three forms: the whole clip at once (`WanVAE.encode`, `WanVAE.decode`; what training differentiates),
the chunked form by scan (`encode_chunked`, `decode_chunked`; memory does not grow with length), and the streaming form
(`decode_first`, `decode_next`; one latent frame in, its pixels out). All three give the same numbers.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax.config import VAEConfig
from emv3_jax.errors import UserError

Cache = Any  # nested dict by submodule name; the leaves are the last frames that a layer has seen
Params = Any

LOOK_BACK = 2  # frames of the past that a kernel of three taps sees


def conv_2d(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, H, W, C], kernel [3, 3, C, D] or [1, 1, C, D] -> [B, H, W, D]."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def causal_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, 2 + F, H, W, C], kernel [3, 3, 3, C, D] or [3, 1, 1, C, D] -> [B, F, H, W, D]; height and width are kept.

    The three taps in time stand side by side as channels of one 2-D convolution over all frames. On CPU, gradients
    included, that is 4.6 times as fast as a 3-D convolution at 16 channels and twice as fast at 64.
    """
    frames = x.shape[1] - LOOK_BACK
    taps = jnp.concatenate([x[:, i : i + frames] for i in range(3)], axis=-1)
    flat = taps.reshape((-1, *taps.shape[2:]))
    flat_kernel = kernel.transpose(1, 2, 0, 3, 4).reshape((*kernel.shape[1:3], -1, kernel.shape[-1]))
    out = conv_2d(flat, flat_kernel)
    return out.reshape((x.shape[0], frames, *out.shape[1:]))


def per_frame(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Apply fn, which knows [B, H, W, C] only, to every frame of x [B, F, H, W, C]."""
    out = fn(x.reshape((-1, *x.shape[2:])))
    return out.reshape((*x.shape[:2], *out.shape[1:]))


def run_chain(layers: Sequence[nn.Module], x: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
    """Apply layers that take and return a cache one after another; the caches are filed under the layers' names."""
    after = {}
    for layer in layers:
        x, after[layer.name] = layer(x, None if cache is None else cache[layer.name])
    return x, after


class ChannelNorm(nn.Module):
    """x / |x| · sqrt(C) · gamma over the channels; |x| is kept above 1e-12."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        # The floor stands inside the root: at x = 0 the gradient is then finite.
        inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
        return x * inverse * (gamma * np.sqrt(x.shape[-1], dtype=np.float32))


def present_init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Kernel [3, 3, 3, C, D] that starts as a convolution of the present frame alone: the past has weight zero.

    With `repeat_init` in the layers that change the number of frames, a network trained on single pictures first, which
    is cheap, is a codec of standing video from the first step on: it sends every fourth frame and shows it four times.
    """
    present = nn.initializers.lecun_normal()(key, tuple(shape[1:]), dtype)
    return jnp.zeros(shape, dtype).at[-1].set(present)


def repeat_init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Kernel [3, ..., C, n*C] that starts as n copies of the present frame. The key is not needed."""
    copies = jnp.tile(jnp.eye(shape[-2], dtype=dtype), shape[-1] // shape[-2])
    return jnp.zeros(shape, dtype).at[-1].set(copies.reshape(shape[1:]))


class CausalConv(nn.Module):
    """Convolution whose output frame f sees input frames f-2, f-1 and f; frames before the clip are zero."""

    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    kernel_init: nn.initializers.Initializer = present_init

    @nn.compact
    def __call__(self, x: jax.Array, cache: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """x [B, F, H, W, C], cache [B, 2, H, W, C] -> [B, F, H, W, D], the next cache."""
        kernel = self.param("kernel", self.kernel_init, (*self.kernel, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        starts, single = cache is None, x.shape[1] == 1
        if starts:
            cache = jnp.zeros((x.shape[0], LOOK_BACK, *x.shape[2:]), x.dtype)
        x = jnp.concatenate([cache, x], axis=1)
        if starts and single:  # a third of the work: there is no past to look at
            return per_frame(lambda y: conv_2d(y, kernel[-1]), x[:, -1:]) + bias, x[:, -LOOK_BACK:]
        return causal_conv(x, kernel) + bias, x[:, -LOOK_BACK:]


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut that is a linear map where the channels change."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        cache = cache or {}
        shortcut = x if x.shape[-1] == self.features else nn.Dense(self.features, name="shortcut")(x)
        y = nn.silu(ChannelNorm(name="norm_1")(x))
        y, cache_1 = CausalConv(self.features, name="conv_1")(y, cache.get("conv_1"))
        y = nn.silu(ChannelNorm(name="norm_2")(y))
        y, cache_2 = CausalConv(self.features, name="conv_2")(y, cache.get("conv_2"))
        return shortcut + y, {"conv_1": cache_1, "conv_2": cache_2}


class FrameAttention(nn.Module):
    """Single-head attention among the positions of one frame; nothing to cache."""

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        b, f, h, w, c = x.shape
        y = ChannelNorm(name="norm")(x).reshape(b * f, h * w, c)
        q, k, v = jnp.split(nn.Dense(3 * c, name="qkv")(y), 3, axis=-1)
        scores = jnp.einsum("BPC,BQC->BPQ", q, k) / np.sqrt(c, dtype=np.float32)
        y = jnp.einsum("BPQ,BQC->BPC", jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(v.dtype), v)
        y = nn.Dense(c, kernel_init=nn.initializers.zeros, name="proj")(y)
        return x + y.reshape(x.shape), {}


class Downsample(nn.Module):
    """Half the height and width; with `time`, frames 1.. are halved in number too and frame 0 stands alone."""

    time: bool

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        c = x.shape[-1]
        conv = nn.Conv(c, (3, 3), strides=2, padding=((0, 1), (0, 1)), name="conv")
        x = per_frame(conv, x)
        if not self.time:
            return x, {}
        kernel = self.param("time_kernel", repeat_init, (3, c, c))
        bias = self.param("time_bias", nn.initializers.zeros, (c,))
        seen = x if cache is None else jnp.concatenate([cache["last"], x], axis=1)
        n = (seen.shape[1] - 1) // 2
        taps = jnp.concatenate([seen[:, i : i + 2 * n : 2] for i in range(3)], axis=-1)
        y = taps @ kernel.reshape(3 * c, c) + bias
        if cache is None:
            y = jnp.concatenate([x[:, :1], y], axis=1)
        return y, {"last": x[:, -1:]}


class Upsample(nn.Module):
    """Twice the height and width, half the channels; with `time`, two frames for each frame but the clip's first."""

    time: bool

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        b, _, h, w, c = x.shape
        after = {}
        if self.time:
            # The clip's first frame passes as it is, and the time convolution never sees it: zeros stand in its place.
            first, rest = (x[:, :1], x[:, 1:]) if cache is None else (x[:, :0], x)
            y, after["time_conv"] = CausalConv(2 * c, (3, 1, 1), repeat_init, name="time_conv")(
                rest, (cache or {}).get("time_conv")
            )
            y = y.reshape(b, -1, h, w, 2, c).transpose(0, 1, 4, 2, 3, 5).reshape(b, -1, h, w, c)
            x = jnp.concatenate([first, y], axis=1)
        conv = nn.Conv(c // 2, (3, 3), padding="SAME", name="conv")
        return per_frame(lambda y: conv(jnp.repeat(jnp.repeat(y, 2, axis=1), 2, axis=2)), x), after


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        c = x.shape[-1]
        layers = [ResBlock(c, name="res_0"), FrameAttention(name="attention"), ResBlock(c, name="res_1")]
        return run_chain(layers, x, cache)


class Level(nn.Module):
    """Residual blocks at one resolution, then the step to the next one: "down", "up" or none."""

    features: int
    blocks: int
    step: str | None
    time: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        layers: list[nn.Module] = [ResBlock(self.features, name=f"res_{i}") for i in range(self.blocks)]
        if self.step == "down":
            layers.append(Downsample(self.time, name="downsample"))
        elif self.step == "up":
            layers.append(Upsample(self.time, name="upsample"))
        return run_chain(layers, x, cache)


class Head(nn.Module):
    """Norm, SiLU, convolution to the output channels."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        x = nn.silu(ChannelNorm(name="norm")(x))
        x, after = CausalConv(self.features, name="conv")(x, (cache or {}).get("conv"))
        return x, {"conv": after}


class Encoder(nn.Module):
    """video [B, F, H, W, 3] -> features [B, T, h, w, 2·latent_channels]."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        cfg = self.cfg
        layers: list[nn.Module] = [CausalConv(cfg.width, name="conv_in")]
        for i, (multiplier, time) in enumerate(zip(cfg.multipliers, (*cfg.temporal_down, None), strict=True)):
            step = None if time is None else "down"
            layers.append(Level(cfg.width * multiplier, cfg.res_blocks, step, bool(time), name=f"down_{i}"))
        layers += [Middle(name="mid"), Head(2 * cfg.latent_channels, name="head")]
        return run_chain(layers, x, cache)


class Decoder(nn.Module):
    """features [B, T, h, w, latent_channels] -> video [B, F, H, W, 3], not clamped."""

    cfg: VAEConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        cfg = self.cfg
        multipliers = cfg.multipliers[::-1]
        layers: list[nn.Module] = [CausalConv(cfg.width * multipliers[0], name="conv_in"), Middle(name="mid")]
        for i, (multiplier, time) in enumerate(zip(multipliers, (*cfg.temporal_down[::-1], None), strict=True)):
            step = None if time is None else "up"
            layers.append(Level(cfg.width * multiplier, cfg.res_blocks + 1, step, bool(time), name=f"up_{i}"))
        layers.append(Head(3, name="head"))
        return run_chain(layers, x, cache)


class WanVAE(nn.Module):
    """video [B, F, H, W, 3] in [-1, 1], F = 4k+1 <-> normalised latents [B, T, h, w, 16], T = k+1."""

    cfg: VAEConfig

    def setup(self) -> None:
        self.encoder = Encoder(self.cfg)
        self.decoder = Decoder(self.cfg)
        self.to_moments = nn.Dense(2 * self.cfg.latent_channels)
        self.from_latents = nn.Dense(self.cfg.latent_channels)

    def encode(self, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whole clip -> (mean, logvar), both [B, T, h, w, C]; the mean is the encoding.

        As in the released program the mean is normalised by the latents' statistics and the logvar is not.
        """
        mean, logvar, _ = self.encode_chunk(video)
        return mean, logvar

    def decode(self, latents: jax.Array, clamp: bool = True) -> jax.Array:
        """Normalised latents -> video in [-1, 1]; clamp=False leaves the range open, which keeps a loss's gradient."""
        return self.decode_chunk(latents, clamp=clamp)[0]

    def encode_chunk(self, video: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, jax.Array, Cache]:
        """The next frames -> (mean, logvar, next cache). No cache: the clip's first 4k+1 frames; else 4k more."""
        check_video_shape(self.cfg, video.shape, starts=cache is None)
        features, cache = self.encoder(video, cache)
        mean, logvar = jnp.split(self.to_moments(features), 2, axis=-1)
        shift, scale = latent_stats(self.cfg)
        return (mean - shift) / scale, logvar, cache

    def decode_chunk(
        self, latents: jax.Array, cache: Cache | None = None, clamp: bool = True
    ) -> tuple[jax.Array, Cache]:
        """The clip's next latents -> (video, next cache). k latents give 4k frames, 4k-3 where no cache is given."""
        check_latents_shape(self.cfg, latents.shape)
        shift, scale = latent_stats(self.cfg)
        video, cache = self.decoder(self.from_latents(latents * scale + shift), cache)
        return (jnp.clip(video, -1.0, 1.0) if clamp else video), cache

    def __call__(self, video: jax.Array) -> jax.Array:
        """There and back through the mean; touches every parameter, for init."""
        return self.decode(self.encode(video)[0])


def latent_stats(cfg: VAEConfig) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) [C] of the raw latents."""
    return np.asarray(cfg.latent_mean, np.float32), np.asarray(cfg.latent_std, np.float32)


def check_video_shape(cfg: VAEConfig, shape: Sequence[int], starts: bool = True) -> None:
    """Raise UserError unless shape is [B, F, H, W, 3] with F = 4k+1 (4k where the clip goes on), H and W in eights."""
    space, time = cfg.spatial_factor, cfg.temporal_factor
    if len(shape) != 5 or shape[-1] != 3:
        raise UserError(f"video must have shape [batch, frames, height, width, 3], got {tuple(shape)}")
    _, frames, height, width, _ = shape
    if frames < 1 or frames % time != int(starts) % time:
        wanted = f"{time}k+1 (1, {time + 1}, {2 * time + 1}, ...)" if starts else f"a multiple of {time}"
        raise UserError(f"number of video frames must be {wanted}, got {frames}: cut or extend the video")
    if height % space or width % space:
        raise UserError(
            f"height and width must be multiples of {space}, got {height}x{width}: resize or crop the video"
        )


def check_latents_shape(cfg: VAEConfig, shape: Sequence[int]) -> None:
    """Raise UserError unless shape is [B, T, h, w, C] with at least one latent frame."""
    if len(shape) != 5 or shape[-1] != cfg.latent_channels or shape[1] < 1:
        wanted = f"[batch, frames >= 1, height, width, {cfg.latent_channels}]"
        raise UserError(f"latents must have shape {wanted}, got {tuple(shape)}")


def encode_first(model: WanVAE, params: Params, frame: jax.Array) -> tuple[jax.Array, jax.Array, Cache]:
    """The clip's first frame [B, 1, H, W, 3] -> (mean, logvar) [B, 1, h, w, C] and the cache for `encode_next`."""
    return model.apply({"params": params}, frame, method="encode_chunk")


def encode_next(model: WanVAE, params: Params, frames: jax.Array, cache: Cache) -> tuple[jax.Array, jax.Array, Cache]:
    """The clip's next four frames [B, 4, H, W, 3] -> (mean, logvar) [B, 1, h, w, C], next cache."""
    return model.apply({"params": params}, frames, cache, method="encode_chunk")


def decode_first(model: WanVAE, params: Params, latent: jax.Array) -> tuple[jax.Array, Cache]:
    """The clip's first latent frame [B, 1, h, w, C] -> its one frame [B, 1, H, W, 3], the cache for `decode_next`."""
    return model.apply({"params": params}, latent, method="decode_chunk")


def decode_next(model: WanVAE, params: Params, latent: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """The clip's next latent frame [B, 1, h, w, C] -> its four frames [B, 4, H, W, 3], next cache."""
    return model.apply({"params": params}, latent, cache, method="decode_chunk")


def encode_chunked(model: WanVAE, params: Params, video: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`WanVAE.encode` in constant working memory: frame 0, then a scan over groups of four frames."""
    check_video_shape(model.cfg, video.shape)

    def body(cache: Cache, frames: jax.Array) -> tuple[Cache, tuple[jax.Array, jax.Array]]:
        mean, logvar, cache = encode_next(model, params, frames, cache)
        return cache, (mean, logvar)

    mean, logvar, cache = encode_first(model, params, video[:, :1])
    _, (means, logvars) = jax.lax.scan(body, cache, _split_chunks(video[:, 1:], model.cfg.temporal_factor))
    return _join_chunks(mean, means), _join_chunks(logvar, logvars)


def decode_chunked(model: WanVAE, params: Params, latents: jax.Array) -> jax.Array:
    """`WanVAE.decode` in constant working memory: a scan over latent frames."""
    check_latents_shape(model.cfg, latents.shape)

    def body(cache: Cache, latent: jax.Array) -> tuple[Cache, jax.Array]:
        frames, cache = decode_next(model, params, latent, cache)
        return cache, frames

    frame, cache = decode_first(model, params, latents[:, :1])
    _, frames = jax.lax.scan(body, cache, _split_chunks(latents[:, 1:], 1))
    return _join_chunks(frame, frames)


def _split_chunks(x: jax.Array, size: int) -> jax.Array:
    """[B, n·size, ...] -> [n, B, size, ...], for a scan; n may be 0."""
    n = x.shape[1] // size
    return jnp.moveaxis(x.reshape((x.shape[0], n, size, *x.shape[2:])), 1, 0)


def _join_chunks(first: jax.Array, rest: jax.Array) -> jax.Array:
    """first [B, f0, ...] and the stacked outputs of a scan [n, B, f, ...] -> [B, f0 + n·f, ...]."""
    n, b, f, *other = rest.shape
    return jnp.concatenate([first, jnp.moveaxis(rest, 0, 1).reshape((b, n * f, *other))], axis=1)


# The model is static (its config is its identity), and the old cache makes room for the new one.
_jit_encode_first = functools.partial(jax.jit, static_argnums=0)(encode_first)
_jit_encode_next = functools.partial(jax.jit, static_argnums=0, donate_argnums=3)(encode_next)
_jit_decode_first = functools.partial(jax.jit, static_argnums=0)(decode_first)
_jit_decode_next = functools.partial(jax.jit, static_argnums=0, donate_argnums=3)(decode_next)


def encode_stream(model: WanVAE, params: Params, groups: Iterable[jax.Array]) -> Iterator[jax.Array]:
    """Yields the latents [B, 1, h, w, C] of one group of video frames after another: [B, 1, H, W, 3], then 4 each."""
    cache = None
    for group in groups:
        if cache is None:
            mean, _, cache = _jit_encode_first(model, params, group)
        else:
            mean, _, cache = _jit_encode_next(model, params, group, cache)
        yield mean


def decode_stream(model: WanVAE, params: Params, latents: Iterable[jax.Array]) -> Iterator[jax.Array]:
    """Yields the pixels of one latent frame [B, 1, h, w, C] after another: [B, 1, H, W, 3], then [B, 4, H, W, 3] each.

    For writing a file while decoding; only one group of frames is on the device at a time.
    """
    cache = None
    for latent in latents:
        check_latents_shape(model.cfg, latent.shape)
        if cache is None:
            frames, cache = _jit_decode_first(model, params, latent)
        else:
            frames, cache = _jit_decode_next(model, params, latent, cache)
        yield frames


def frame_by_frame(latents: jax.Array) -> Iterator[jax.Array]:
    """[B, T, ...] -> T pieces [B, 1, ...]."""
    return (latents[:, i : i + 1] for i in range(latents.shape[1]))


def fold_latent_stats(params: Params, mean: jax.Array, std: jax.Array) -> Params:
    """Move the raw latents to mean 0 and deviation 1 without changing what decode(encode(video)) gives.

    `mean` and `std` [C] are those of the raw latents now. They go into the two pointwise layers beside the latents, and
    the result belongs to a config with latent_mean 0 and latent_std 1. The logvar becomes that of the new latents.
    Raises UserError where they are not C numbers each, or a deviation is not positive.
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    channels = params["from_latents"]["bias"].shape[0]
    if mean.shape != (channels,) or std.shape != (channels,) or not bool(jnp.all(std > 0)):
        raise UserError(f"latent statistics must be {channels} means and {channels} positive deviations")
    moments, latents = params["to_moments"], params["from_latents"]
    kernel, bias = jnp.asarray(moments["kernel"]), jnp.asarray(moments["bias"])
    return {
        **params,
        "to_moments": {
            "kernel": kernel.at[:, :channels].divide(std),
            "bias": jnp.concatenate([(bias[:channels] - mean) / std, bias[channels:] - 2 * jnp.log(std)]),
        },
        "from_latents": {
            "kernel": latents["kernel"] * std[:, None],
            "bias": latents["bias"] + jnp.matmul(mean, latents["kernel"], precision="highest"),
        },
    }
