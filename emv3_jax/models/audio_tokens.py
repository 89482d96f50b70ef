"""Audio features -> tokens of the transformer, and which of them each latent frame may hear.

Preview: one token a feature, and a segment of 17 neighbouring ones for each latent frame (`AudioTokens`).
Flash: 32 tokens a latent frame, made of the features around its four video frames (`AudioWindows`).
`audio_encoder(cfg)` is the one that a config asks for.

Axes: B batch, A audio features (2 per video frame), F video frames, D width, T latent frames, S tokens of one segment,
n neighbours on either side of a video frame, W = 2n + 1 video frames of a window.

Shapes at full size, 81 video frames (T = 21):
  preview  features [B, 162, 768] -> tokens [B, 162, 1536], segments [21, 17]
  flash    windows [B, 81, 5, 12, 768] -> tokens [B, 672, 1536], segments [21, 32]
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from emv3_jax.config import AudioWindowConfig, DiTConfig
from emv3_jax.layers import LayerNorm

EXPAND = 4  # audio tokens by which every segment is widened at both ends
TEMPORAL_FACTOR = 4  # video frames per latent frame
LEAD = 12  # preview: features before a window's first latent frame that its segment may reach


@dataclasses.dataclass(frozen=True)
class Piece:
    """The stretch of a long sound that belongs to a window of latent frames.

    first, length: of the features; indices outside the sound (first may be negative) are to be filled with zeros.
    segments: int [T, S], which tokens of the stretch each latent frame attends to; `length` stands for a zero vector.
    """

    first: int
    length: int
    segments: np.ndarray

    def cut(self, features: np.ndarray) -> np.ndarray:
        """Its features [length, ...] of the whole sound's [A, ...]."""
        before, after = max(0, -self.first), max(0, self.first + self.length - len(features))
        inside = features[max(0, self.first) : max(0, self.first + self.length)]
        return np.pad(inside, ((before, after), *((0, 0),) * (features.ndim - 1)))[: self.length]


class AudioTokens(nn.Module):
    """One token per audio feature: linear without bias, then LayerNorm (SPEC 2, preview)."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, audio: jax.Array) -> jax.Array:
        """audio [B, A, audio_width] -> tokens [B, A, D] float32."""
        x = nn.Dense(self.cfg.width, use_bias=False, dtype=self.cfg.dtype, name="proj")(audio)
        return LayerNorm(epsilon=1e-5, name="norm")(x)

    @nn.nowrap
    def audio_shape(self, audio_len: int) -> tuple[int, ...]:
        """Shape of one sample's features; any number of them will do."""
        return audio_len, self.cfg.audio_width

    @nn.nowrap
    def segments(self, audio_len: int, latent_frames: int) -> np.ndarray:
        """See `audio_segments`."""
        return audio_segments(audio_len, latent_frames)

    @nn.nowrap
    def piece(self, audio_len: int, start: int, count: int, alone: bool = False) -> Piece:
        """What `count` latent frames from number `start` on hear of a sound of `audio_len` features.

        They hear what they would hear in a video of the whole length. alone: nothing of what lies outside the window's
        own 8 features a latent frame, as in the released loop (SPEC section 4, long video). So does a window of the
        whole sound: where the sound lacks a feature, the rate of its segments is the released one.
        """
        per_frame = 2 * TEMPORAL_FACTOR
        first, length = per_frame * start - LEAD, per_frame * count + LEAD
        own = per_frame * start, min(audio_len, per_frame * (start + count))
        alone = alone or own == (0, audio_len)
        heard = max(2, own[1] - own[0]) if alone else per_frame * count
        audible = own if alone else (0, audio_len)
        ranges = audio_ranges(heard, count) + per_frame * start
        return Piece(first, length, _segments(ranges, audible, first, length))


class AudioWindows(nn.Module):
    """A fixed number of tokens per latent frame from the windows of its video frames: four linear layers, ReLU between,
    then LayerNorm (SPEC 2, flash).

    Of the 4 video frames of a latent frame the first gives the front half of its window, the last the back half, and
    the two between only themselves, so that each video frame is heard once. The first latent frame is one video frame,
    and its whole window has a first layer of its own.
    """

    cfg: DiTConfig

    @property
    def _sizes(self) -> AudioWindowConfig:
        assert self.cfg.audio_windows is not None
        return self.cfg.audio_windows

    @nn.compact
    def __call__(self, audio: jax.Array) -> jax.Array:
        """audio [B, F, W, layers, audio_width] -> tokens [B, T·S, D] float32."""
        cfg, sizes = self.cfg, self._sizes
        batch, frames, window = audio.shape[:3]
        audio = audio.reshape(batch, frames, window, -1)
        n, count = sizes.neighbours, (frames - 1) // TEMPORAL_FACTOR
        groups = audio[:, 1:].reshape(batch, count, TEMPORAL_FACTOR, window, audio.shape[-1])
        heard = [groups[:, :, 0, : n + 1], groups[:, :, 1:-1, n], groups[:, :, -1, n:]]
        later = jnp.concatenate(heard, axis=2)
        later = later.reshape(batch, count, later.shape[2] * later.shape[3])
        first = audio[:, :1].reshape(batch, 1, window * audio.shape[-1])
        dense = lambda width, name: nn.Dense(width, dtype=cfg.dtype, name=name)  # noqa: E731
        x = jnp.concatenate([dense(sizes.hidden, "first_in")(first), dense(sizes.hidden, "later_in")(later)], axis=1)
        x = nn.relu(dense(sizes.hidden, "middle")(nn.relu(x)))
        x = dense(sizes.tokens * cfg.width, "out")(x)
        return LayerNorm(epsilon=1e-5, name="norm")(x.reshape(batch, -1, cfg.width))

    @nn.nowrap
    def audio_shape(self, audio_len: int) -> tuple[int, ...]:
        """Shape of one sample's windows for `audio_len` video frames."""
        sizes = self._sizes
        return audio_len, 2 * sizes.neighbours + 1, sizes.layers, self.cfg.audio_width

    @nn.nowrap
    def segments(self, audio_len: int, latent_frames: int) -> np.ndarray:
        """Token indices that each latent frame attends to: its own, int [T, S].

        Raises ValueError unless the audio lasts just as many video frames.
        """
        if audio_len != (latent_frames - 1) * TEMPORAL_FACTOR + 1:
            raise ValueError(f"audio of {audio_len} video frames does not fit {latent_frames} latent frames")
        return np.arange(latent_frames * self._sizes.tokens).reshape(latent_frames, -1)

    @nn.nowrap
    def piece(self, audio_len: int, start: int, count: int, alone: bool = False) -> Piece:
        """What `count` latent frames from number `start` on hear: their own video frames, with or without others."""
        length = (count - 1) * TEMPORAL_FACTOR + 1
        return Piece(TEMPORAL_FACTOR * start, length, self.segments(length, count))


def audio_encoder(cfg: DiTConfig, **kwargs) -> AudioTokens | AudioWindows:
    """The module of a config's variant."""
    return (AudioTokens if cfg.audio_windows is None else AudioWindows)(cfg, **kwargs)


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
    return _segments(audio_ranges(audio_len, latent_frames), (0, audio_len), 0, audio_len)


def _segments(ranges: np.ndarray, audible: tuple[int, int], first: int, zero: int) -> np.ndarray:
    """Ranges [T, 2] widened -> indices [T, S] counted from token `first`; tokens that are not audible become `zero`."""
    ranges = ranges + np.array([-EXPAND, EXPAND])
    length = int((ranges[:, 1] - ranges[:, 0]).max()) + 1
    table = np.full((len(ranges), length), zero, dtype=np.int64)
    for row, (start, end) in zip(table, ranges, strict=True):
        inside = np.arange(max(start, audible[0]), min(end, audible[1] - 1) + 1)
        row[: len(inside)] = inside - first
    return table
