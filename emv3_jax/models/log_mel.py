"""The demo's ear: log-mel features in place of wav2vec2, two a video frame.

Like wav2vec2's features they know their neighbours and where they stand: each holds the spectra of three moments and
the phases of slow clocks. Without positions the cross-attention, which does not order its keys, could not tell the
moments of a segment apart.
"""

import functools

import numpy as np

from emv3_jax.config import RATE

HOP = 320  # 50 features a second
WINDOW = 640
BANDS = 24
PERIODS = (8, 16, 32, 64)  # of the clocks, in features; a latent frame is 8
WIDTH = 3 * BANDS + 2 * len(PERIODS)
SILENCE = 1e-3  # deviation of a waveform in [-1, 1] below which nothing is amplified to speech


def normalise(wave: np.ndarray) -> np.ndarray:
    """[n] waveform -> zero mean, unit variance (SPEC section 3, Audio); silence, dithered or not, stays silent."""
    wave = np.asarray(wave, np.float32) - np.float32(np.mean(wave))
    return wave / np.float32(max(np.sqrt(np.mean(np.square(wave, dtype=np.float64))), SILENCE))


@functools.lru_cache(maxsize=1)
def _filters() -> np.ndarray:
    """[WINDOW/2 + 1, BANDS] triangles, evenly spaced on the mel scale from 60 to 7600 Hz."""
    mel = lambda hertz: np.log1p(hertz / 700.0)  # noqa: E731
    corners = 700.0 * np.expm1(np.linspace(mel(60.0), mel(7600.0), BANDS + 2))
    hertz = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    rise = (hertz - corners[:-2]) / (corners[1:-1] - corners[:-2])
    fall = (corners[2:] - hertz) / (corners[2:] - corners[1:-1])
    return np.clip(np.minimum(rise, fall), 0.0, 1.0)


def log_mel_features(wave: np.ndarray, frames: int) -> np.ndarray:
    """wave [n] at 16 kHz, zero mean and unit variance (`normalise`) -> [2·frames, WIDTH] float32.

    Feature k is centred on second k/50; the wave is continued with silence.
    """
    count = 2 * frames
    needed = (count + 2) * HOP + WINDOW
    padded = np.pad(np.asarray(wave, np.float32), (HOP + WINDOW // 2, max(0, needed - len(wave))))
    index = np.arange(count + 2)[:, None] * HOP + np.arange(WINDOW)
    power = np.square(np.abs(np.fft.rfft(padded[index] * np.hanning(WINDOW)))) / WINDOW
    mel = (np.log10(power @ _filters() + 1e-4) + 1.5) / 1.5
    near = np.concatenate([mel[:-2], mel[1:-1], mel[2:]], axis=-1)
    turns = np.arange(count)[:, None] / np.array(PERIODS)
    clocks = np.concatenate([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], axis=-1)
    return np.concatenate([near, clocks], axis=-1).astype(np.float32)
