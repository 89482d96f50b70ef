"""The law between sound and mouth, on sounds whose answer is known."""

import numpy as np
import pytest
from scipy.signal import butter, sosfilt

from emv3_jax.config import FPS, RATE
from emv3_jax.models.log_mel import normalise
from emv3_jax.puppets import law

FRAMES = 50
NOISE = np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32)
TIME = np.arange(2 * RATE) / RATE


def test_silence_closes_the_mouth():
    mouth = law.mouth_law(np.zeros(2 * RATE), FRAMES)
    assert mouth.shape == (FRAMES, 2) and mouth.dtype == np.float32
    np.testing.assert_array_equal(mouth[:, 0], 0.0)
    np.testing.assert_allclose(mouth[:, 1], 0.5, atol=1e-6)


def test_dither_is_silence():
    assert law.mouth_law(1e-5 * NOISE, FRAMES)[:, 0].max() < 0.01


def test_louder_opens_wider():
    steps = np.repeat([0.02, 0.1, 0.4, 1.0], RATE // 2)
    heights = law.mouth_law(steps * NOISE, FRAMES)[[6, 18, 31, 44], 0]
    assert np.all(np.diff(heights) > 0.1) and heights[-1] > 0.9


@pytest.mark.parametrize("kind", ["noise", "tone"])
def test_brighter_sound_makes_a_wider_mouth(kind):
    if kind == "noise":
        dull, bright = (sosfilt(butter(4, 1000, way, fs=RATE, output="sos"), NOISE) for way in ("low", "high"))
    else:
        dull, bright = (np.sin(2 * np.pi * hertz * TIME) for hertz in (400, 2500))
    dull, bright = (law.mouth_law(wave, FRAMES)[10:40, 1] for wave in (dull, bright))
    assert dull.max() < 0.45 and bright.min() > 0.8


@pytest.mark.parametrize("gain", [0.01, 30.0])
def test_the_level_of_a_recording_does_not_matter(gain):
    wave = NOISE * np.abs(np.sin(3 * TIME))
    np.testing.assert_allclose(law.mouth_law(gain * wave, FRAMES), law.mouth_law(wave, FRAMES), atol=1e-3)


def test_a_constant_offset_does_not_matter():
    wave = NOISE * np.abs(np.sin(3 * TIME))
    np.testing.assert_allclose(law.mouth_law(wave + 0.5, FRAMES), law.mouth_law(wave, FRAMES), atol=1e-3)


def test_frames_past_the_end_of_the_sound_are_silent():
    mouth = law.mouth_law(NOISE[: RATE // 2], FRAMES)
    assert mouth.shape == (FRAMES, 2)
    assert mouth[:10, 0].min() > 0.6
    np.testing.assert_allclose(mouth[20:, 0], 0.0, atol=1e-6)


def test_a_click_opens_the_mouth_when_it_sounds():
    wave = 1e-3 * NOISE
    wave[int(1.2 * RATE) : int(1.26 * RATE)] += 1.0 * NOISE[: int(0.06 * RATE)]
    assert abs(int(np.argmax(law.mouth_law(wave, FRAMES)[:, 0])) - 1.23 * FPS) <= 1


def test_a_recording_of_almost_nothing_has_an_answer():
    mouth = law.mouth_law(NOISE[:16], 5)
    assert mouth.shape == (5, 2) and np.isfinite(mouth).all()


def test_normalise():
    wave = normalise(0.01 * NOISE + 3.0)
    assert wave.dtype == np.float32
    np.testing.assert_allclose([wave.mean(), wave.std()], [0.0, 1.0], atol=1e-3)
    np.testing.assert_array_equal(normalise(np.zeros(9)), 0.0)
