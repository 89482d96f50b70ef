"""Audio features -> tokens of the transformer, and which of them each latent frame may hear.

Axes: B batch, A audio features (2 per video frame), D width, T latent frames, S tokens of one segment.
"""

import jax
import numpy as np
from flax import linen as nn

from emv3_jax.config import DiTConfig
from emv3_jax.layers import LayerNorm

EXPAND = 4  # audio tokens by which every segment is widened at both ends
TEMPORAL_FACTOR = 4  # video frames per latent frame


class AudioTokens(nn.Module):
    """One token per audio feature: linear without bias, then LayerNorm (SPEC 2, preview)."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, audio: jax.Array) -> jax.Array:
        """audio [B, A, audio_width] -> tokens [B, A, D] float32."""
        x = nn.Dense(self.cfg.width, use_bias=False, dtype=self.cfg.dtype, name="proj")(audio)
        return LayerNorm(epsilon=1e-5, name="norm")(x)


def audio_ranges(audio_len: int, latent_frames: int) -> np.ndarray:
    """First and last token, both included, of each latent frame before widening: int [T, 2] (SPEC 2, audio segments).

    Raises ValueError when there is less than one video frame of audio.
    """
    video_frames = audio_len // 2
    if video_frames < 1:
        raise ValueError(f"audio of {audio_len} features is shorter than one video frame; give at least 2")
    rate = audio_len / video_frames
    half = int(rate * 4 / 2)

    def segment(i: int) -> tuple[int, int]:
        left = rate * ((i - 1) * TEMPORAL_FACTOR + 1) - 4
        right = rate * (i * TEMPORAL_FACTOR + 1) + 4
        centre = int((left + right) / 2) - 1
        return centre - half, centre + half

    first = segment(1)[0]
    ranges = [(-(2 * half - first), first)] + [segment(i) for i in range(1, latent_frames)]
    return np.array(ranges, dtype=np.int64)


def audio_segments(audio_len: int, latent_frames: int) -> np.ndarray:
    """Token indices that each latent frame attends to: int [T, S], where `audio_len` stands for a zero vector.

    Indices outside the audio become zero vectors at the *end* of the segment, front ones too, and stay in the
    softmax, as in the released program. K and V have no bias there, so the zeros may be put in after the projection.
    """
    ranges = audio_ranges(audio_len, latent_frames) + np.array([-EXPAND, EXPAND])
    length = int((ranges[:, 1] - ranges[:, 0]).max()) + 1
    table = np.full((latent_frames, length), audio_len, dtype=np.int64)
    for row, (start, end) in zip(table, ranges, strict=True):
        inside = np.arange(max(start, 0), min(end, audio_len - 1) + 1)
        row[: len(inside)] = inside
    return table
