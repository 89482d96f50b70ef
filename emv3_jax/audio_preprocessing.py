"""From a recording to what the transformer hears: the released variants' audio inputs (SPEC sections 2 and 3).

  preview   zero mean, unit variance -> wav2vec2 -> last states                 [2F, 768]       two a video frame
  flash     -23 LUFS, cut, zero mean, unit variance -> wav2vec2 at 25 a second  [F, 5, 12, 768] neighbours, layers

The waves are prepared in NumPy; the encoder runs compiled, once per `padded_length`: a sound is padded to one of few
lengths, and what it is padded with is not heard. On the host grow, with every second of sound, the features (preview
150 KB; flash 0.9 MB, of which the windows are a view), the wave and its copies.
Axes: n samples at 16 kHz, F video frames at 25 a second, A features of wav2vec2 (50 a second), D width.
"""

from collections.abc import Mapping
from functools import partial

import jax
import numpy as np

from emv3_jax.config import FPS, RATE, Wav2Vec2Config
from emv3_jax.errors import UserError
from emv3_jax.models.wav2vec2 import PIECE, Wav2Vec2, feature_count, resample_features, sample_count

FEATURES_PER_FRAME = 2
LOUDNESS = -23.0  # LUFS
MIN_SECONDS = 0.4  # one gating block of the loudness measure (ITU-R BS.1770)
VARIANCE_FLOOR = 1e-7  # inside the square root, as in the feature extractor that belongs to the released encoders


def normalise(wave: np.ndarray) -> np.ndarray:
    """wave [n] at any level -> float32 [n], zero mean and unit variance (SPEC 3, Audio); zeros stay zeros.

    All of it in float32: the same numbers, bit by bit, as transformers' Wav2Vec2FeatureExtractor gives. Raises
    UserError for anything but finite samples [n].
    """
    wave = _checked(wave)
    return (wave - wave.mean()) / np.sqrt(wave.var() + np.float32(VARIANCE_FLOOR))


def normalise_loudness(wave: np.ndarray, target: float = LOUDNESS) -> tuple[np.ndarray, list[str]]:
    """wave [n] at 16 kHz -> float32 [n] at `target` LUFS, not clipped, and notes where that could not be done.

    Integrated loudness after ITU-R BS.1770, measured by pyloudnorm as in the released program. A recording shorter than
    one block (0.4 s), or with no block above -70 LUFS, has no loudness: it comes back as it is, with a note. Little
    hangs on it, since zero mean and unit variance follow: it lifts what is so quiet that VARIANCE_FLOOR would count.
    """
    import pyloudnorm

    wave = _checked(wave)
    if len(wave) < MIN_SECONDS * RATE:
        seconds = len(wave) / RATE
        return wave, [f"the sound lasts {seconds:.2f} s, too short to measure its loudness: its level is left alone"]
    loudness = pyloudnorm.Meter(RATE).integrated_loudness(wave)
    if not np.isfinite(loudness):
        return wave, ["the sound is too quiet to measure its loudness: its level is left alone"]
    return wave * np.float32(10 ** ((target - loudness) / 20)), []


def preview_features(
    cfg: Wav2Vec2Config, params: Mapping, wave: np.ndarray, frames: int, fill: bool = True
) -> np.ndarray:
    """What the preview transformer hears of a recording: last states of wav2vec2, float32 [2·frames, D] (SPEC 2).

    The recording is normalised and encoded whole, and the features past the video's end are cut off, as in the
    released program. Where there are too few, silence is put after the normalised wave until there are enough. That
    happens even where sound and video are equally long: a feature hears 25 ms and starts every 20, so the last one
    reaches 5 ms past the end. The released program adds nothing: the last feature is then missing, and so is its token
    in the audio segments (fill=False).

    Args:
      cfg, params: the encoder; `params` as the converter gives them.
      wave: [n] at 16 kHz, any level.
      frames: video frames F, at least 1.
      fill: add silence where features are missing.
    Raises:
      UserError: for a wave that is not finite samples [n]; with fill=False, for one too short for a single feature.
    """
    wave = normalise(wave)
    count = FEATURES_PER_FRAME * _checked_frames(frames)
    if fill:
        wave = _pad(wave, sample_count(cfg, count))
    elif len(wave) < (shortest := sample_count(cfg, 1)):
        raise UserError(f"the sound has {len(wave)} samples, the encoder needs {shortest}: give a longer recording")
    features, heard = _conv_features(cfg, params, wave)
    states = np.asarray(_encode(cfg, params, features, np.int32(heard), False))
    return states[0, : min(count, heard)].copy()  # of its own, so that the rest can go


def flash_windows(
    cfg: Wav2Vec2Config, params: Mapping, wave: np.ndarray, frames: int, neighbours: int = 2
) -> tuple[np.ndarray, list[str]]:
    """What the flash transformer hears of a recording: windows [frames, 2·neighbours + 1, layers, D], and notes.

    The windows are a view that cannot be written to, of memory for [frames + 2·neighbours, layers, D].
    As in the released program: loudness is measured on the whole recording, which is then cut to the video's length and
    only then normalised; conv features are resampled to one per video frame before the blocks of wav2vec2, and the
    states of all blocks are kept. A recording shorter than the video is continued with silence. The arguments and
    errors are those of `preview_features`; the notes are those of `normalise_loudness`.
    """
    samples = _checked_frames(frames) * RATE // FPS
    wave, notes = normalise_loudness(wave)
    wave = _pad(normalise(wave[:samples]), samples)
    convolved, heard = _conv_features(cfg, params, wave)
    resampled = np.asarray(resample_features(np.asarray(convolved)[:, :heard], frames))
    features = np.pad(resampled, ((0, 0), (0, padded_length(frames) - frames), (0, 0)))
    states = np.asarray(_encode(cfg, params, features, np.int32(frames), True))
    return frame_windows(states[0, :, :frames], neighbours), notes


def frame_windows(states: np.ndarray, neighbours: int = 2) -> np.ndarray:
    """states [layers, F, D] -> [F, 2·neighbours + 1, layers, D]: each frame with the frames around it (SPEC 2, flash).

    Before the first frame stands the first, after the last the last. Neighbours are not copied: the result is a view,
    which cannot be written to, of one array [F + 2·neighbours, layers, D].
    """
    by_frame = np.pad(states.swapaxes(0, 1), ((neighbours, neighbours), (0, 0), (0, 0)), mode="edge")
    return np.moveaxis(np.lib.stride_tricks.sliding_window_view(by_frame, 2 * neighbours + 1, axis=0), -1, 1)


def padded_length(features: int) -> int:
    """So many features are encoded in place of `features`: whole pieces, and of long sounds at most a quarter more.

    There are few such lengths, four each time the sound doubles, so that a new recording seldom needs a new compile.
    """
    step = max(PIECE, 2 ** (features.bit_length() - 3))
    return -(-features // step) * step


def _conv_features(cfg: Wav2Vec2Config, params: Mapping, wave: np.ndarray) -> tuple[jax.Array, int]:
    """wave [n], at least one feature long -> conv features [1, padded, C], and how many of them are the wave's."""
    count = feature_count(cfg, len(wave))
    longest = sample_count(cfg, padded_length(count) + 1) - 1  # of the waves with so many features
    return _convolve(cfg, params, _pad(wave, longest)[None], np.int32(len(wave))), count


@partial(jax.jit, static_argnums=0)
def _convolve(cfg: Wav2Vec2Config, params: Mapping, wave: jax.Array, samples: jax.Array) -> jax.Array:
    return Wav2Vec2(cfg).apply({"params": params}, wave, samples, method="conv_features")


@partial(jax.jit, static_argnums=(0, 4))
def _encode(
    cfg: Wav2Vec2Config, params: Mapping, features: jax.Array, count: jax.Array, every_layer: bool
) -> jax.Array:
    return Wav2Vec2(cfg).apply({"params": params}, features, count, every_layer, method="encode")


def _pad(wave: np.ndarray, samples: int) -> np.ndarray:
    """Silence after the wave, up to `samples`."""
    return np.pad(wave, (0, max(0, samples - len(wave))))


def _checked(wave: np.ndarray) -> np.ndarray:
    wave = np.asarray(wave)
    if wave.dtype.kind != "f" or wave.ndim != 1 or not wave.size or not np.isfinite(wave).all():
        raise UserError(f"sound must be finite floats [n] at 16 kHz; got {wave.dtype} {list(wave.shape)}")
    return wave.astype(np.float32)


def _checked_frames(frames: int) -> int:
    if frames < 1:
        raise UserError(f"a video has at least 1 frame; got {frames}")
    return frames
