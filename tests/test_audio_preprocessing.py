import warnings
from functools import partial

import jax
import numpy as np
import pytest

from convert import wav2vec2
from emv3_jax import audio_preprocessing
from emv3_jax.audio_preprocessing import (
    flash_windows,
    frame_windows,
    normalise,
    normalise_loudness,
    padded_length,
    preview_features,
)
from emv3_jax.config import Wav2Vec2Config
from emv3_jax.errors import UserError
from emv3_jax.models import wav2vec2 as wav2vec2_model
from emv3_jax.models.audio_tokens import audio_ranges
from emv3_jax.models.wav2vec2 import Wav2Vec2
from tests.conftest import random_params

RATE = audio_preprocessing.RATE
TINY = Wav2Vec2Config(width=16, heads=2, layers=2, ffn=24, conv_width=8, positional_taps=6, positional_groups=2)


pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params():
    return random_params(wav2vec2.target_tree(TINY))


@partial(jax.jit, static_argnames="frames")
def encoded(params, wave, frames=None):
    """wave [n] -> last states [A, D], or with `frames` the states of all layers [layers, frames, D]."""
    model, variables = Wav2Vec2(TINY), {"params": params}
    if frames is None:
        return model.apply(variables, wave[None])[0]
    return model.apply(variables, wave[None], frames, method="frame_states")[0]


def speech(samples: int, seed: int = 0) -> np.ndarray:
    """Noise whose level rises and falls."""
    noise = np.random.default_rng(seed).standard_normal(samples)
    return (0.05 * noise * (1.1 + np.sin(np.arange(samples) / 900)) + 0.01).astype(np.float32)


def test_normalise():
    wave = normalise(speech(5001))
    assert wave.dtype == np.float32 and abs(wave.mean()) < 1e-6 and abs(wave.std() - 1) < 1e-4
    np.testing.assert_array_equal(normalise(np.zeros(700)), np.zeros(700))
    faint = normalise(1e-6 * speech(5000))  # silence with dither: not blown up to speech
    assert np.abs(faint).max() < 2e-3


def test_normalise_agrees_with_the_released_feature_extractor():
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' feature extractor")
    extractor = transformers.Wav2Vec2FeatureExtractor()
    for wave in (speech(16_000), 1e-4 * speech(4001), np.zeros(500, np.float32), speech(901).astype(np.float64)):
        expected = np.asarray(extractor(wave, sampling_rate=RATE).input_values[0])
        np.testing.assert_array_equal(normalise(wave), expected)


@pytest.mark.parametrize(
    "wave", [np.zeros(0), np.zeros((2, 8)), np.array([0.0, np.nan]), np.array([np.inf]), np.zeros(9, np.int16)]
)
def test_what_is_no_sound_is_refused(wave):
    with pytest.raises(UserError, match=r"sound must be finite floats \[n\] at 16 kHz; got"):
        normalise(wave)
    with pytest.raises(UserError, match=r"sound must be finite floats"):
        normalise_loudness(wave)


def test_loudness_of_a_tone():
    """BS.1770: a 997 Hz sine of full scale in one channel is at -3.01 LUFS, so one of amplitude 0.1 at -23.01."""
    tone = np.sin(2 * np.pi * 997 * np.arange(2 * RATE) / RATE)
    for amplitude in (0.001, 0.1, 1.0):
        wave, notes = normalise_loudness(amplitude * tone)
        assert not notes and wave.dtype == np.float32
        assert np.abs(wave).max() == pytest.approx(0.1, rel=0.02)


def test_loudness_that_cannot_be_measured_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wave, reason in (
            (speech(6399), "too short to measure"),
            (np.zeros(RATE, np.float32), "too quiet to measure"),
            (1e-5 * speech(RATE), "too quiet to measure"),
        ):
            same, notes = normalise_loudness(wave)
            np.testing.assert_array_equal(same, wave)
            assert len(notes) == 1 and reason in notes[0]
        assert normalise_loudness(speech(6400))[1] == []


def test_frame_windows():
    states = np.arange(2 * 6 * 1).reshape(2, 6, 1)  # frame f of layer 0 is f, of layer 1 is 6 + f
    windows = frame_windows(states)
    assert windows.shape == (6, 5, 2, 1)
    assert windows[:, :, 0, 0].tolist() == [
        [0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [2, 3, 4, 5, 5], [3, 4, 5, 5, 5],
    ]  # fmt: skip
    np.testing.assert_array_equal(windows[:, :, 1], windows[:, :, 0] + 6)
    assert frame_windows(states[:, :1], neighbours=3)[:, :, 0, 0].tolist() == [[0] * 7]
    assert np.shares_memory(windows[2, 3], windows[3, 2])  # the same frame is kept once
    first, last = np.lib.array_utils.byte_bounds(windows)
    assert last - first == (6 + 4) * 2 * states.itemsize


def test_padded_lengths_are_few():
    assert [padded_length(n) for n in (1, 2, 256, 257, 1500, 2049, 30_000)] == [256, 256, 256, 512, 1536, 2560, 32_768]
    hour = np.array([padded_length(n) for n in range(1, 180_001)])
    assert len(set(hour)) < 40
    lengths = np.arange(1, 180_001)
    assert (hour >= lengths).all() and (hour - lengths <= np.maximum(256, lengths / 4)).all()


def test_long_sounds_in_pieces_and_one_compile_for_many_lengths(params, monkeypatch):
    """Pieces of eight features: what is heard is the whole clip, without what fills the last pieces."""
    waves = {frames: speech(640 * frames + 79, seed=frames) for frames in (13, 14)}
    at_once = {n: encoded(params, normalise(wave)) for n, wave in waves.items()}
    loud = {n: normalise(normalise_loudness(wave)[0][: 640 * n]) for n, wave in waves.items()}
    windows_at_once = {n: frame_windows(np.asarray(encoded(params, wave, n))) for n, wave in loud.items()}
    traced = []
    monkeypatch.setattr(audio_preprocessing, "Wav2Vec2", lambda cfg: traced.append(cfg) or Wav2Vec2(cfg))
    for module in (audio_preprocessing, wav2vec2_model):
        monkeypatch.setattr(module, "PIECE", 8)
    for frames, wave in waves.items():
        features = preview_features(TINY, params, wave, frames, fill=False)
        np.testing.assert_allclose(features, at_once[frames], atol=1e-5)
        windows, _ = flash_windows(TINY, params, wave, frames)
        np.testing.assert_allclose(windows, windows_at_once[frames], atol=1e-5)
    assert len(traced) == 3  # convolutions, blocks of preview, blocks of flash


@pytest.mark.parametrize("frames,samples", [(1, 123), (13, 123), (13, 640 * 13), (13, 640 * 13 + 79)])
def test_preview_features_are_two_a_frame(params, frames, samples):
    wave = speech(samples)
    features = preview_features(TINY, params, wave, frames)
    assert features.shape == (2 * frames, 16) and features.dtype == np.float32
    with_silence = np.pad(normalise(wave), (0, 640 * frames + 80 - samples))
    np.testing.assert_allclose(features, encoded(params, with_silence), atol=1e-5)


def test_preview_cuts_features_of_the_whole_recording(params):
    """As the released program does: what comes after the video still counts in the level and is heard by attention."""
    wave = speech(16_000)
    features = preview_features(TINY, params, wave, 9)
    np.testing.assert_allclose(features, encoded(params, normalise(wave))[:18], atol=1e-5)
    np.testing.assert_array_equal(preview_features(TINY, params, wave, 9, fill=False), features)
    np.testing.assert_allclose(preview_features(TINY, params, 3 * wave, 9), features, atol=1e-3)  # at any level


def test_preview_without_filling_lacks_the_last_feature(params):
    wave = speech(640 * 13)
    short = preview_features(TINY, params, wave, 13, fill=False)
    assert short.shape == (25, 16)
    np.testing.assert_allclose(short, encoded(params, normalise(wave)), atol=1e-5)
    # The missing feature moves no audio segment.
    np.testing.assert_array_equal(audio_ranges(2 * 113 - 1, 29), audio_ranges(2 * 113, 29))
    with pytest.raises(UserError, match="the sound has 300 samples, the encoder needs 400"):
        preview_features(TINY, params, speech(300), 13, fill=False)


def test_flash_windows(params):
    wave = speech(640 * 13)
    windows, notes = flash_windows(TINY, params, wave, 13)
    assert windows.shape == (13, 5, 2, 16) and windows.dtype == np.float32 and notes == []
    expected = encoded(params, normalise(normalise_loudness(wave)[0]), 13)
    np.testing.assert_allclose(windows, frame_windows(np.asarray(expected)), atol=1e-5)


def test_flash_does_not_hear_what_follows_the_video(params):
    wave = speech(640 * 13)
    windows, _ = flash_windows(TINY, params, wave, 13)
    longer = np.concatenate([wave, 5 * speech(16_000, seed=1)])
    again, _ = flash_windows(TINY, params, longer, 13)
    # The other sound moves the level, which normalisation takes back but for VARIANCE_FLOOR.
    np.testing.assert_allclose(windows, again, atol=1e-3)


@pytest.mark.parametrize("frames", [1, 13])
def test_flash_continues_a_short_recording_with_silence(params, frames):
    wave = speech(300)
    windows, notes = flash_windows(TINY, params, wave, frames)
    assert windows.shape == (frames, 5, 2, 16) and len(notes) == 1  # too short for its loudness
    padded = np.pad(normalise(wave), (0, 640 * frames - 300))
    states = np.asarray(encoded(params, padded, frames))
    np.testing.assert_allclose(windows[:, 2], states.swapaxes(0, 1), atol=1e-5)


def test_silence_stays_finite(params):
    silence = np.zeros(640 * 13, np.float32)
    assert np.isfinite(preview_features(TINY, params, silence, 13)).all()
    windows, notes = flash_windows(TINY, params, silence, 13)
    assert np.isfinite(windows).all() and len(notes) == 1


def test_no_frames_are_refused(params):
    for features in (preview_features, flash_windows):
        with pytest.raises(UserError, match="a video has at least 1 frame; got 0"):
            features(TINY, params, speech(8000), 0)
