"""The law of the small world: what the mouth does, computed from the waveform alone.

Mouth height follows the smoothed loudness, mouth width the spectral brightness. Any recording has a true answer.
"""

import numpy as np

from emv3_jax.config import FPS, RATE
from emv3_jax.models.log_mel import normalise

QUIET_DB, LOUD_DB = -22.0, 6.0  # of a waveform of unit variance: mouth closed, mouth wide open
DARK_HZ, BRIGHT_HZ = 450.0, 2200.0  # spectral centroids of the narrowest and the widest mouth
SMOOTH_FRAMES = 1.4  # standard deviation of the smoothing, in video frames
_HOP = RATE // 100
_WINDOW = 4 * _HOP


def _smooth(x: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian smoothing over axis 0, edges held."""
    reach = int(4 * deviation) + 1
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    padded = np.pad(x, (reach, reach), mode="edge")
    return np.convolve(padded, kernel / kernel.sum(), mode="valid")


def mouth_law(wave: np.ndarray, frames: int, fps: float = FPS) -> np.ndarray:
    """What the mouth of a puppet does while it says `wave`.

    Args:
      wave: [n] at 16 kHz, any level.
      frames: how many video frames; those past the end of the wave are silent.
      fps: frames per second.
    Returns:
      [frames, 2] mouth height and mouth width, each in [0, 1].
    """
    wave = normalise(wave)
    steps = int(np.ceil(frames / fps * 100)) + 1
    wave = np.pad(wave, (_WINDOW // 2, max(0, steps * _HOP + _WINDOW - len(wave))))
    index = np.arange(steps)[:, None] * _HOP + np.arange(_WINDOW)
    windows = wave[index] * np.hanning(_WINDOW).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft(windows))) / np.sum(np.hanning(_WINDOW) ** 2) / _WINDOW * 2
    hertz = np.fft.rfftfreq(_WINDOW, 1 / RATE)
    band = (hertz > 80) & (hertz < 7000)
    energy = power[:, band].sum(-1)
    loudness = 10 * np.log10(energy + 1e-7)
    height = np.clip((loudness - QUIET_DB) / (LOUD_DB - QUIET_DB), 0.0, 1.0)
    centroid = (power[:, band] * hertz[band]).sum(-1) / (energy + 1e-7)
    bright = np.log(np.clip(centroid, DARK_HZ, BRIGHT_HZ) / DARK_HZ) / np.log(BRIGHT_HZ / DARK_HZ)
    deviation = SMOOTH_FRAMES * 100 / fps
    weight = _smooth(height, deviation) + 0.1
    width = (_smooth(height * bright, deviation) + 0.1 * 0.5) / weight
    at = np.minimum(np.round(np.arange(frames) / fps * 100).astype(int), steps - 1)
    height = _smooth(height, deviation)[at]
    return np.clip(np.stack([height, width[at]], -1), 0.0, 1.0).astype(np.float32)
