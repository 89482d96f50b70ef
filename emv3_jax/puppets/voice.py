"""Speech-like audio by source and filter: voiced vowels with formants, noise consonants, pauses.

A sentence is a list of syllables; a voice is a pitch, a vocal-tract length, a pace and a breathiness. Both follow from
(split, index), so that training and held-out sentences and voices never meet. 16 kHz mono throughout.
"""

import dataclasses

import numpy as np
from scipy.signal import lfilter

from emv3_jax.config import RATE
from emv3_jax.puppets.world import generator

# First three formants in Hz of an adult voice, and how open the vowel is (loudness).
VOWELS = {"a": (780, 1250, 2550, 1.0), "e": (520, 1850, 2550, 0.8), "i": (300, 2250, 2950, 0.6),
          "o": (480, 850, 2500, 0.85), "u": (320, 750, 2350, 0.6), "y": (310, 1800, 2300, 0.55),
          "x": (560, 1450, 2500, 0.7)}  # fmt: skip
# Centre and bandwidth in Hz of the noise, its loudness, and seconds it lasts; loudness 0 is a closure.
CONSONANTS = {"s": (5600, 2500, 0.16, 0.11), "sh": (3200, 1800, 0.20, 0.11), "f": (4500, 4500, 0.06, 0.09),
              "h": (1500, 2500, 0.07, 0.07), "t": (4000, 3500, 0.14, 0.05), "k": (2000, 1500, 0.12, 0.06),
              "p": (900, 1200, 0.08, 0.06), "m": (0, 0, 0.0, 0.07), "n": (0, 0, 0.0, 0.06)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Voice:
    """pitch in Hz; tract: formants are divided by it; pace: syllables are this much longer; breath in [0, 1]."""

    pitch: float
    tract: float
    pace: float
    breath: float
    lilt: float


def sample_voice(split: str, index: int) -> Voice:
    """The voice number `index` of a split."""
    rng = generator(split, "voice", index)
    pitch = float(np.exp(rng.uniform(np.log(85), np.log(290))))
    tract = float(np.clip(1.12 - 0.28 * (np.log(pitch / 85) / np.log(290 / 85)) + rng.normal(0, 0.05), 0.75, 1.2))
    return Voice(pitch, tract, float(rng.uniform(0.8, 1.3)), float(rng.uniform(0.01, 0.12)), float(rng.uniform(0.5, 2)))


def _resonate(x: np.ndarray, frequency: float, bandwidth: float) -> np.ndarray:
    """A two-pole resonance of unit gain at 0 Hz."""
    radius = np.exp(-np.pi * bandwidth / RATE)
    angle = 2 * np.pi * min(frequency, 0.45 * RATE) / RATE
    a = [1.0, -2 * radius * np.cos(angle), radius**2]
    return lfilter([sum(a)], a, x)


def _vowel(rng: np.random.Generator, voice: Voice, name: str, seconds: float, pitch: float) -> np.ndarray:
    """A vowel with rising and falling loudness."""
    n = int(seconds * RATE)
    t = np.arange(n) / n
    glide = pitch * (1.0 + 0.08 * voice.lilt * (0.3 - t) + 0.01 * np.sin(2 * np.pi * 5 * t * seconds))
    phase = np.cumsum(glide) / RATE + rng.uniform()
    pulses = np.diff(np.floor(phase), prepend=np.floor(phase[:1]))
    source = lfilter([1.0], [1.0, -0.96], pulses) + voice.breath * 0.3 * rng.standard_normal(n)
    *formants, loud = VOWELS[name]
    for frequency, bandwidth in zip(formants, (80.0, 110.0, 170.0), strict=True):
        source = _resonate(source, frequency / voice.tract, bandwidth)
    source = np.diff(source, prepend=0.0)
    rise = np.clip(np.minimum(t / 0.25, (1 - t) / 0.35), 0.0, 1.0)
    return loud * source / (np.sqrt(np.mean(source**2)) + 1e-9) * np.sin(0.5 * np.pi * rise)


def _consonant(rng: np.random.Generator, voice: Voice, name: str, pitch: float) -> np.ndarray:
    """Noise around a centre; m and n are a quiet hum."""
    centre, width, loud, seconds = CONSONANTS[name]
    n = int(seconds * voice.pace * RATE)
    if not loud:
        t = np.arange(n) / RATE
        return 0.16 * np.sin(2 * np.pi * pitch * t) * np.hanning(n)
    noise = _resonate(rng.standard_normal(n), centre / np.sqrt(voice.tract), width)
    noise = np.diff(noise, prepend=0.0)
    return loud * noise / (np.sqrt(np.mean(noise**2)) + 1e-9) * np.hanning(n)


def _add(wave: list[np.ndarray], piece: np.ndarray, overlap: float = 0.015) -> None:
    """Appends with a short overlap, so that sounds run into each other."""
    k = int(overlap * RATE)
    if wave and len(wave[-1]) > k and len(piece) > k:
        wave[-1][-k:] += piece[:k]
        piece = piece[k:]
    wave.append(np.array(piece))


def speak(split: str, sentence: int, voice: Voice, seconds: float) -> np.ndarray:
    """Speaks sentence number `sentence` of a split.

    Returns:
      wave [seconds * 16000] float32, peak below 1; sentences follow each other with pauses until the time is filled.
    """
    rng = generator(split, "sentence", sentence)
    wave: list[np.ndarray] = [1e-4 * rng.standard_normal(int(rng.uniform(0.02, 0.4) * RATE))]
    length = len(wave[0])
    while length < seconds * RATE:
        effort = rng.uniform(0.55, 1.0)
        for word in range(words := int(rng.integers(2, 6))):
            for _ in range(rng.integers(1, 4)):
                pitch = voice.pitch * (1.0 + 0.10 * voice.lilt * rng.normal() * 0.5 - 0.12 * word / words)
                stress = effort * rng.uniform(0.45, 1.0)
                if rng.uniform() < 0.75:
                    _add(wave, stress * _consonant(rng, voice, str(rng.choice(list(CONSONANTS))), pitch))
                vowel = str(rng.choice(list(VOWELS)))
                _add(wave, stress * _vowel(rng, voice, vowel, rng.uniform(0.09, 0.24) * voice.pace, pitch))
            if rng.uniform() < 0.35:
                _add(wave, 1e-4 * rng.standard_normal(int(rng.uniform(0.03, 0.12) * RATE)))
        _add(wave, 1e-4 * rng.standard_normal(int(rng.uniform(0.15, 0.7) * RATE)))
        length = sum(len(piece) for piece in wave)
    out = np.concatenate(wave)[: int(seconds * RATE)]
    out = out + 2e-4 * rng.standard_normal(len(out))
    return (0.7 * out / np.max(np.abs(out))).astype(np.float32)
