"""Speech-like sound: follows from seeds, and sounds of different splits never meet."""

import numpy as np
import pytest

from emv3_jax.config import RATE
from emv3_jax.puppets import law, voice


def speak(split="train", sentence=0, speaker=0, seconds=1.5):
    return voice.speak(split, sentence, voice.sample_voice("train", speaker), seconds)


def test_the_same_numbers_say_the_same():
    np.testing.assert_array_equal(speak(), speak())


@pytest.mark.parametrize("seconds", [0.2, 1.0, 1.24])
def test_length_peak_and_type(seconds):
    wave = speak(seconds=seconds)
    assert wave.shape == (round(seconds * RATE),) and wave.dtype == np.float32
    np.testing.assert_allclose(np.abs(wave).max(), 0.7, rtol=1e-5)


@pytest.mark.parametrize("change", [{"split": "heldout"}, {"sentence": 1}, {"speaker": 1}])
def test_split_sentence_and_speaker_all_matter(change):
    mouths = [law.mouth_law(speak(**kwargs, seconds=4.0), 100)[:, 0] for kwargs in ({}, change)]
    assert np.abs(mouths[0] - mouths[1]).max() > 0.2


def test_voices_of_the_splits_differ_and_are_human():
    voices = [voice.sample_voice(split, i) for split in ("train", "heldout") for i in range(100)]
    assert len({v.pitch for v in voices}) == 200
    assert all(85 <= v.pitch <= 290 and 0.75 <= v.tract <= 1.2 for v in voices)


@pytest.mark.parametrize("index", range(6))
def test_every_voice_makes_the_mouth_open_and_close(index):
    wave = voice.speak("heldout", index, voice.sample_voice("heldout", index), 6.0)
    mouth = law.mouth_law(wave, 150)
    assert mouth[:, 0].min() < 0.1 and mouth[:, 0].max() > 0.7
    assert np.ptp(mouth[:, 1]) > 0.3


@pytest.mark.parametrize("pitch", [100.0, 150.0])
def test_pitch_is_heard(pitch):
    """Speech repeats itself most of all after the period of its voice; within a sentence the pitch falls by 12%."""
    speaker = voice.Voice(pitch=pitch, tract=1.0, pace=1.2, breath=0.0, lilt=0.0)
    wave = voice.speak("train", 0, speaker, 4.0)
    lags = np.arange(80, 190)
    period = lags[np.argmax([wave[lag:] @ wave[:-lag] for lag in lags])] / RATE
    assert 0.95 < period * pitch < 1.15
