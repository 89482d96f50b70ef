"""The diffusion transformer: velocity(x, t) under text, image and audio (SPEC section 2).

What does not depend on x and t (`DiT.context`) is computed once per clip: embedded conditions and the keys and values
of every layer. `DiT.velocity` is what the sampler follows.

Axes: B batch, T latent frames, h w latent rows and columns, L tokens = T·(h/2)·(w/2), S context tokens, A audio
features, N heads, K head width, D width, C channels, p q r patch offsets; F video frames and W frames of a window in
the flash variant.

Shapes at full size, 81 frames of 480x832 (1.71 B parameters preview, 1.86 B flash):
  x          [B, 21, 60, 104, 16], given [B, 21, 60, 104, 4 + 16]
  tokens     [B, 32760, 1536] through 30 blocks of 12 heads x 128
  contexts   text [B, 512, 4096], image [B, 257, 1280], audio preview [B, 162, 768] or flash [B, 81, 5, 12, 768]
  keys       a layer: text [B, 512, 12, 128], image [B, 257, 12, 128], audio [B, 21, 17 or 32, 12, 128]
  velocity   [B, 21, 60, 104, 16]
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from emv3_jax import sharding
from emv3_jax.attention import self_attention
from emv3_jax.config import DiTConfig
from emv3_jax.layers import MLP, LayerNorm, RMSNorm, apply_rotary, gelu_exact, rotary_tables, sinusoidal_features
from emv3_jax.models.audio_tokens import audio_encoder
from emv3_jax.models.cdca import CDCA, KV, Branches, CrossKV, ModalityKV, by_frame

Rotary = tuple[jax.Array, jax.Array]


@struct.dataclass
class Conditions:
    """Everything the velocity is conditioned on; float32."""

    given: jax.Array  # [B, T, h, w, 4 + 16]: mask channels (1 = given), then masked latents; zeros for T2V
    text: jax.Array  # [B, text_len, text_width], zeros after the prompt's real length
    image: jax.Array  # [B, image_tokens, image_width]; zeros without an image
    audio: (
        jax.Array
    )  # preview [B, A, audio_width], 2 per video frame; flash [B, F, W, layers, audio_width]; 0 is silence
    face_mask: jax.Array  # [B, (h/2)·(w/2)] in {0, 1}: where the audio may act; flash: ones
    audio_scale: jax.Array  # [B], multiplies the audio branch


@struct.dataclass
class Context:
    """What `velocity` needs of the conditions, computed once."""

    given: jax.Array  # [B, T, h, w, 4 + 16]
    kv: ModalityKV  # leading layer axis
    text_share: jax.Array  # [B, P, T]: how much each prompt counts in each latent frame; one prompt: ones
    audio_gain: jax.Array  # [B, (h/2)·(w/2)]: face mask times audio scale


class PatchEmbed(nn.Module):
    """Convolution with kernel = stride = patch, as one matmul: [B, T, h, w, C] -> [B, L, D]."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.cfg
        shape = (*cfg.patch, cfg.in_channels, cfg.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2, 3)), shape)
        bias = self.param("bias", nn.initializers.zeros, (cfg.width,))
        x = x.reshape(x.shape[0], *_interleave(_grid(x.shape, cfg.patch), cfg.patch), cfg.in_channels)
        x, kernel = x.astype(cfg.dtype), kernel.astype(cfg.dtype)
        x = jnp.einsum("BTpHqWrC,pqrCD->BTHWD", x, kernel, preferred_element_type=jnp.float32)
        return (x + bias).reshape(x.shape[0], -1, cfg.width)


class ImageEmbed(nn.Module):
    """CLIP states [B, S, image_width] -> [B, S, D]: LN, linear, exact GELU, linear, LN."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        cfg = self.cfg
        x = LayerNorm(epsilon=1e-5, name="norm_in")(image)
        x = MLP(cfg.image_width, cfg.width, gelu_exact, cfg.dtype, name="mlp")(x)
        return LayerNorm(epsilon=1e-5, name="norm_out")(x)


class SelfAttention(nn.Module):
    """Full attention over the tokens with rotary positions: [B, L, D] -> [B, L, D]."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, x: jax.Array, rotary: Rotary) -> jax.Array:
        cfg = self.cfg
        heads = (*x.shape[:2], cfg.heads, cfg.head_width)
        q, k, v = (nn.Dense(cfg.width, dtype=cfg.dtype, name=name)(x) for name in ("query", "key", "value"))
        # The norm runs over the full width, before the split into heads.
        q, k = RMSNorm(epsilon=1e-6, name="query_norm")(q), RMSNorm(epsilon=1e-6, name="key_norm")(k)
        q, k = (apply_rotary(y.reshape(heads), rotary).astype(cfg.dtype) for y in (q, k))
        out = self_attention(q, k, v.reshape(heads))
        return nn.Dense(cfg.width, dtype=cfg.dtype, name="out")(out.reshape(x.shape))


# What is kept of a block for the backward pass; the rest is computed again.
REMAT = {
    "full": None,  # what goes into the block
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # and what comes out of its projections
}


class Block(nn.Module):
    """x += gate·SA(mod(LN x)); x += CDCA(LN x); x += gate·FFN(mod(LN x)). The residual stream is float32."""

    cfg: DiTConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, kv: ModalityKV, modulation: jax.Array, rotary: Rotary, branches: Branches
    ) -> tuple[jax.Array, None]:
        """x [B, L, D], kv of this layer, modulation [B, 6, D] float32 -> (x, nothing to stack)."""
        cfg = self.cfg
        table = self.param("modulation", nn.initializers.normal(cfg.width**-0.5), (6, cfg.width))
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = _vectors(table + modulation)
        h = _plain_norm(x, "self_norm") * (1 + scale_sa) + shift_sa
        x = x + gate_sa * SelfAttention(cfg, name="self_attention")(h, rotary)
        h = LayerNorm(epsilon=1e-6, name="cross_norm")(x)
        x = x + CDCA(cfg, name="cross_attention")(h, kv, branches)
        h = _plain_norm(x, "mlp_norm") * (1 + scale_ff) + shift_ff
        x = x + gate_ff * MLP(cfg.ffn, cfg.width, dtype=cfg.dtype, name="mlp")(h)
        return sharding.divide(x, sharding.BATCH, sharding.CONTEXT), None


class Head(nn.Module):
    """Tokens [B, L, D] and time embedding [B, D] -> patches [B, L, p·q·r·C]; starts at zero velocity."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        cfg = self.cfg
        table = self.param("modulation", nn.initializers.normal(cfg.width**-0.5), (2, cfg.width))
        shift, scale = _vectors(table + time[:, None])
        x = _plain_norm(x, "norm") * (1 + scale) + shift
        out = int(np.prod(cfg.patch)) * cfg.latent_channels
        return nn.Dense(out, kernel_init=nn.initializers.zeros, name="out")(x)


class DiT(nn.Module):
    """Predicts the velocity noise - x0 of video latents.

    A new model predicts zero velocity and its blocks are near the identity (adaLN gates near zero), so training starts
    calm. Parameters are float32 and stacked over layers on axis 0 (`blocks`, `cross_kv`).
    """

    cfg: DiTConfig

    def setup(self):
        cfg = self.cfg
        block = nn.remat(Block, prevent_cse=False, policy=REMAT[cfg.remat]) if cfg.remat else Block
        layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": cfg.layers}
        shared = nn.broadcast
        self.blocks = nn.scan(block, in_axes=(0, shared, shared, shared), **layers)(cfg)
        methods = ("text_kv", "image_kv", "audio_kv")
        self.cross_kv = nn.scan(CrossKV, in_axes=shared, methods=methods, **layers)(cfg)
        self.patch_embedding = PatchEmbed(cfg)
        self.text_embedding = MLP(cfg.width, cfg.width, dtype=cfg.dtype)
        self.image_embedding = ImageEmbed(cfg)
        self.audio_tokens = audio_encoder(cfg)
        self.time_embedding = MLP(cfg.width, cfg.width, nn.silu)
        self.time_projection = nn.Dense(6 * cfg.width, kernel_init=nn.initializers.zeros)
        self.head = Head(cfg)

    def __call__(
        self, x: jax.Array, t: jax.Array, cond: Conditions, modality_weights: jax.Array | None = None
    ) -> jax.Array:
        """velocity(x, t, context(cond)): x [B, T, h, w, 16], t [B] in [0, 1000] -> [B, T, h, w, 16]."""
        return self.velocity(x, t, self.context(cond), modality_weights)

    def context(self, cond: Conditions) -> Context:
        """Embeds the conditions and computes every layer's keys and values. Raises ValueError on a wrong shape."""
        _check_conditions(self.cfg, cond)
        batch, frames = cond.given.shape[:2]
        segments = self.audio_tokens.segments(cond.audio.shape[1], frames)  # refuses audio that does not fit
        kv = ModalityKV(
            text=jax.tree.map(lambda x: x[:, :, None], self.text_kv(cond.text)),
            image=self.image_kv(cond.image),
            audio=self.audio_kv(cond.audio, np.broadcast_to(segments, (batch, *segments.shape))),
        )
        share = jnp.ones((batch, 1, frames))
        return Context(given=cond.given, kv=kv, text_share=share, audio_gain=cond.face_mask * cond.audio_scale[:, None])

    def text_kv(self, text: jax.Array) -> KV:
        """Every layer's keys and values of prompts: text [B, text_len, text_width] -> [layers, B, S, N, K]."""
        return self.cross_kv.text_kv(None, self.text_embedding(text))[1]

    def image_kv(self, image: jax.Array) -> KV:
        """Every layer's keys and values of pictures: [B, image_tokens, image_width] -> [layers, B, S, N, K]."""
        return self.cross_kv.image_kv(None, self.image_embedding(image))[1]

    def audio_kv(self, audio: jax.Array, segments: jax.Array | np.ndarray) -> KV:
        """Every layer's keys and values of each latent frame's sound: [layers, B, T, S, N, K].

        audio as in Conditions, segments [B, T, S] (`audio_tokens`).
        """
        return by_frame(self.cross_kv.audio_kv(None, self.audio_tokens(audio))[1], segments)

    def velocity(
        self, x: jax.Array, t: jax.Array, context: Context, modality_weights: jax.Array | None = None
    ) -> jax.Array:
        """x [B, T, h, w, 16] at t [B] in [0, 1000] (1000 is pure noise) -> velocity, like x, float32.

        modality_weights [B, 3]: how much text, image and audio count at t (PhDA, paper eq. 2); default ones.
        """
        return self.velocity_and_residual(x, t, context, modality_weights)[0]

    def velocity_and_residual(
        self, x: jax.Array, t: jax.Array, context: Context, modality_weights: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """As `velocity`, and what the blocks added to the tokens [B, L, D], for `velocity_again`."""
        cfg = self.cfg
        before, grid = self._tokens(x, t, context)
        weights = jnp.ones((x.shape[0], 3)) if modality_weights is None else modality_weights
        text, image, audio = jnp.moveaxis(weights.astype(jnp.float32)[:, :, None, None, None], 1, 0)
        area = grid[1] * grid[2]
        share = jnp.repeat(context.text_share, area, axis=2)[..., None, None]
        gain = jnp.tile(context.audio_gain, (1, grid[0]))[:, :, None, None]  # the same for every latent frame
        parts = Branches(text[:, None] * share, image, audio * gain)
        rotary = rotary_tables(grid, cfg.head_width, cfg.rope_theta, cfg.riflex)
        after, _ = self.blocks(before, context.kv, self.modulation(t), rotary, parts)
        return self._velocity_of(after, t, grid), after - before

    def velocity_again(self, x: jax.Array, t: jax.Array, context: Context, residual: jax.Array) -> jax.Array:
        """The velocity with what the blocks added at an earlier step instead of running them (SPEC 4, TeaCache)."""
        before, grid = self._tokens(x, t, context)
        return self._velocity_of(before + residual, t, grid)

    def modulation(self, t: jax.Array) -> jax.Array:
        """t [B] -> the six vectors that modulate every block [B, 6, D], float32."""
        return self.time_projection(nn.silu(self._time(t))).reshape(-1, 6, self.cfg.width)

    def _time(self, t: jax.Array) -> jax.Array:
        return self.time_embedding(sinusoidal_features(t, self.cfg.time_features))

    def _tokens(self, x: jax.Array, t: jax.Array, context: Context) -> tuple[jax.Array, tuple[int, int, int]]:
        """The tokens that enter the blocks [B, L, D], and how many there are along time, height and width."""
        cfg = self.cfg
        if x.shape != (*context.given.shape[:-1], cfg.latent_channels) or t.shape != x.shape[:1]:
            raise ValueError(f"x {x.shape} and t {t.shape} do not fit conditions given as {context.given.shape}")
        grid = _grid(x.shape, cfg.patch)
        tokens = self.patch_embedding(jnp.concatenate([x, context.given], axis=-1))
        return sharding.divide(tokens, sharding.BATCH, sharding.CONTEXT), grid

    def _velocity_of(self, tokens: jax.Array, t: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
        """Tokens that leave the blocks -> velocity [B, T, h, w, 16]."""
        cfg = self.cfg
        patches = self.head(tokens, self._time(t)).reshape(-1, *grid, *cfg.patch, cfg.latent_channels)
        sides = (side * step for side, step in zip(grid, cfg.patch, strict=True))
        return jnp.einsum("BTHWpqrC->BTpHqWrC", patches).reshape(tokens.shape[0], *sides, cfg.latent_channels)


def forward_flops(cfg: DiTConfig, tokens: int) -> float:
    """Of the matmuls of one sample's forward, without the audio branch, which has a hundredth of them.

    tokens: of its latents, (T·h·w) / 4.
    """
    projections = 2 * tokens * (6 * cfg.width**2 + 2 * cfg.width * cfg.ffn)  # self, cross, MLP
    keys_and_values = 4 * (cfg.text_len + cfg.image_tokens) * cfg.width**2
    return float(cfg.layers * (projections + keys_and_values) + _attention_flops(cfg, tokens))


def recomputed_flops(cfg: DiTConfig, tokens: int) -> float:
    """What of `forward_flops` is computed once more in the backward pass (cfg.remat)."""
    return {"": 0.0, "full": forward_flops(cfg, tokens), "dots": _attention_flops(cfg, tokens)}[cfg.remat]


def _attention_flops(cfg: DiTConfig, tokens: int) -> float:
    """Of scores and sums of values, of self- and cross-attention."""
    return float(cfg.layers * 4 * tokens * cfg.width * (tokens + cfg.text_len + cfg.image_tokens))


def zero_inputs(cfg: DiTConfig, latent_frames: int = 1) -> tuple[jax.Array, jax.Array, Conditions]:
    """x, t and conditions of one sample of the smallest picture: what it takes to make parameters."""
    _, height, width = cfg.patch
    audio_len = 4 * (latent_frames - 1) + 1
    features = audio_len if cfg.audio_windows is not None else 2 * audio_len
    grid = (1, latent_frames, height, width)
    cond = Conditions(
        given=jnp.zeros((*grid, cfg.mask_channels + cfg.latent_channels)),
        text=jnp.zeros((1, cfg.text_len, cfg.text_width)),
        image=jnp.zeros((1, cfg.image_tokens, cfg.image_width)),
        audio=jnp.zeros((1, *audio_encoder(cfg, parent=None).audio_shape(features))),
        face_mask=jnp.zeros((1, 1)),
        audio_scale=jnp.ones(1),
    )
    return jnp.zeros((*grid, cfg.latent_channels)), jnp.zeros(1), cond


def _plain_norm(x: jax.Array, name: str) -> jax.Array:
    """LayerNorm without parameters, eps 1e-6."""
    return LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False, name=name)(x)


def _vectors(modulation: jax.Array) -> list[jax.Array]:
    """[B, n, D] -> n vectors [B, 1, D]."""
    return jnp.split(modulation, modulation.shape[1], axis=1)


def _grid(shape: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens along time, height and width for latents [B, T, h, w, C]; raises ValueError if patches do not fit."""
    if any(size % step for size, step in zip(shape[1:4], patch, strict=True)):
        raise ValueError(f"latents {shape} do not divide into patches {patch}; frame sides must be multiples of 16")
    t, h, w = (size // step for size, step in zip(shape[1:4], patch, strict=True))
    return t, h, w


def _interleave(grid: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for pair in zip(grid, patch, strict=True) for size in pair)


def _check_conditions(cfg: DiTConfig, cond: Conditions) -> None:
    batch, frames, height, width, _ = cond.given.shape
    spatial = height * width // int(np.prod(cfg.patch))
    expected = {
        "given": (batch, frames, height, width, cfg.mask_channels + cfg.latent_channels),
        "text": (batch, cfg.text_len, cfg.text_width),
        "image": (batch, cfg.image_tokens, cfg.image_width),
        "audio": (batch, *audio_encoder(cfg, parent=None).audio_shape(cond.audio.shape[1])),
        "face_mask": (batch, spatial),
        "audio_scale": (batch,),
    }
    wrong = [
        f"{name} is {tuple(value.shape)}, not {shape}"
        for name, shape in expected.items()
        if (value := getattr(cond, name)).shape != shape
    ]
    if wrong:
        raise ValueError("conditions do not fit the model: " + "; ".join(wrong))
