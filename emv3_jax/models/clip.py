"""CLIP vision tower, read out one block before the last, and the pixels it wants (SPEC sections 2 and 3).

Axes: B batch, H W pixels (h w after a resize), L tokens (class token first, then patches row by row),
N heads, K head width, D width, C channels.

Shapes at full size (ViT-H/14, 0.6 billion parameters):
  picture  [B, H, W, 3]       in [-1, 1]
  pixels   [B, 224, 224, 3]   bicubic, normalised
  patches  [B, 256, 1280]     of 14 x 14 pixels
  states   [B, 257, 1280]     through 31 of 32 blocks: 16 heads of 80, MLP of 5120
  out      [B, 257, 1280]

The checkpoint's last block, final norm and projection head take no part in the read-out, so the model does not have
them: `CLIPConfig.layers` counts the checkpoint's blocks, and `layers - 1` of them exist here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from emv3_jax.attention import attention
from emv3_jax.config import CLIPConfig
from emv3_jax.layers import MLP, LayerNorm, gelu_exact

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], from CLIP's own training data
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
NORM_EPS = 1e-5


def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """Bicubic interpolation along one axis as a matrix, [target, source] float32; rows sum to 1.

    Cubic convolution with a = -0.75, pixel centres at half integers (align_corners false), edge pixels repeated, no
    anti-aliasing when shrinking: the rule of the released program.
    """
    a = -0.75
    position = (np.arange(target) + 0.5) * (source / target) - 0.5
    left = np.floor(position)
    matrix = np.zeros((target, source))
    for tap in (-1, 0, 1, 2):
        distance = np.abs(position - (left + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1  # |distance| <= 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)  # 1 < |distance| < 2
        column = np.clip(left + tap, 0, source - 1).astype(int)
        np.add.at(matrix, (np.arange(target), column), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


def resize_bicubic(images: jax.Array, size: int) -> jax.Array:
    """images [B, H, W, C] -> [B, size, size, C] float32; the aspect ratio is not kept, overshoot is not clipped."""
    rows = bicubic_matrix(images.shape[1], size)
    columns = bicubic_matrix(images.shape[2], size)
    # Full precision: these are pixels, and an accelerator's default would round them to bfloat16.
    highest = jax.lax.Precision.HIGHEST
    images = jnp.einsum("hH,BHWC->BhWC", rows, images.astype(jnp.float32), precision=highest)
    return jnp.einsum("wW,BhWC->BhwC", columns, images, precision=highest)


def preprocess(images: jax.Array, image_size: int) -> jax.Array:
    """images [B, H, W, 3] in [-1, 1] -> CLIP-normalised pixels [B, image_size, image_size, 3] float32."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be [B, H, W, 3]; got {images.shape}")
    unit = resize_bicubic(images, image_size) * 0.5 + 0.5
    return (unit - np.asarray(PIXEL_MEAN, np.float32)) / np.asarray(PIXEL_STD, np.float32)


class SelfAttention(nn.Module):
    """Full attention over the tokens of one image; q, k and v come from one projection."""

    cfg: CLIPConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, L, D] -> [B, L, D]."""
        cfg = self.cfg
        batch, tokens, width = x.shape
        qkv = nn.Dense(3 * width, name="qkv")(x).reshape(batch, tokens, 3, cfg.heads, width // cfg.heads)
        out = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return nn.Dense(width, name="out")(out.reshape(batch, tokens, width))


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), exact GELU."""

    cfg: CLIPConfig

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        cfg = self.cfg
        x = x + SelfAttention(cfg, name="attention")(LayerNorm(epsilon=NORM_EPS, name="norm1")(x))
        mlp = MLP(cfg.mlp_ratio * cfg.width, cfg.width, gelu_exact, name="mlp")
        x = x + mlp(LayerNorm(epsilon=NORM_EPS, name="norm2")(x))
        return x, None  # (carry, nothing stacked), as nn.scan wants it


class CLIPVision(nn.Module):
    """Vision transformer without last block, final norm and head. Blocks are scanned: parameters stacked on axis 0."""

    cfg: CLIPConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """States of all tokens after the last block but one.

        pixels [B, image_size, image_size, 3], CLIP-normalised (see `preprocess`). Returns float32 [B, tokens, D].
        """
        cfg = self.cfg
        expected = (cfg.image_size, cfg.image_size, 3)
        if pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise ValueError(f"pixels must be [B, {', '.join(map(str, expected))}]; got {pixels.shape}")
        small = nn.initializers.normal(cfg.width**-0.5)
        patches = nn.Conv(
            cfg.width, (cfg.patch, cfg.patch), (cfg.patch, cfg.patch), "VALID", use_bias=False, name="patch_embedding"
        )(pixels)
        patches = patches.reshape(pixels.shape[0], -1, cfg.width)
        class_token = self.param("class_embedding", small, (1, cfg.width))
        positions = self.param("position_embedding", small, (cfg.tokens, cfg.width))
        class_tokens = jnp.broadcast_to(class_token, (pixels.shape[0], 1, cfg.width))
        x = jnp.concatenate([class_tokens, patches], axis=1) + positions
        x = LayerNorm(epsilon=NORM_EPS, name="pre_norm")(x.astype(jnp.float32))
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=cfg.layers - 1)
        x, _ = blocks(cfg, name="blocks")(x, None)
        return x
