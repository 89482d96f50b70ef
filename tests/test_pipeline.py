"""From a request to frames, on a tiny preset with random weights: what must matter matters, and nothing else."""

import dataclasses
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from emv3_jax import checkpoint, command_line, conditioning, config, options, pipeline, render
from emv3_jax.config import DEMO
from emv3_jax.errors import UserError
from emv3_jax.models import log_mel
from emv3_jax.models import vae as vae_model
from emv3_jax.pipeline import FPS, RATE, Request, SamplingOptions, load_pipeline, read_request

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (32, 32, 3), np.uint8)
WAVE = (0.1 * RNG.standard_normal(RATE)).astype(np.float32)
PROMPT = "A puppet nods."
GUIDED = SamplingOptions(steps=2, text_scale=2.0, audio_scale=2.0)


def request(**changes) -> Request:
    return dataclasses.replace(Request(IMAGE, WAVE[: 5 * 640], PROMPT, frames=5), **changes)


# Frames


@pytest.fixture(scope="module")
def frames(tiny_pipeline) -> np.ndarray:
    return tiny_pipeline.generate(request(), GUIDED).frames


def test_frames_come_as_they_are_decoded(tiny_pipeline, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    steps = []
    ready = read_request(request(frames=9), tiny)
    pieces = list(tiny_pipeline.stream(ready, GUIDED, on_step=lambda done, total: steps.append((done, total))))
    assert [piece.shape for piece in pieces] == [(1, 32, 32, 3), (4, 32, 32, 3), (4, 32, 32, 3)]
    assert all(piece.dtype == np.uint8 for piece in pieces)
    assert np.concatenate(pieces).std() > 10
    assert steps == [(1, 2), (2, 2)]
    assert not any(tmp_path.iterdir())  # a folder that nobody named is removed


def test_the_same_request_gives_the_same_video(tiny_pipeline, frames):
    result = tiny_pipeline.generate(request(), GUIDED)
    assert result.frames.shape == (5, 32, 32, 3)
    np.testing.assert_array_equal(result.frames, frames)
    np.testing.assert_array_equal(result.wave, WAVE[: 5 * 640])


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"seed": 2**32 - 1},
        {"prompt": "A puppet waves."},
        {"audio": WAVE[5 * 640 : 10 * 640]},
        {"image": 255 - IMAGE},
    ],
    ids=["seed", "largest seed", "prompt", "audio", "image"],
)
def test_everything_that_is_asked_for_matters(tiny_pipeline, frames, change):
    other = tiny_pipeline.generate(request(**change), GUIDED).frames
    assert np.abs(other.astype(int) - frames).max() > 2


def test_the_face_box_limits_where_the_voice_acts(tiny_pipeline, tiny):
    """Tokens outside the box do not hear: with a box, another voice changes less of the first velocity."""

    def change(face) -> float:
        one_step = SamplingOptions(steps=1)
        a, b = (
            tiny_pipeline.generate(request(audio=wave, face=face), one_step).frames.astype(int)
            for wave in (WAVE[: 5 * 640], WAVE[5 * 640 : 10 * 640])
        )
        return float(np.abs(a - b).mean())

    assert change((0, 15, 0, 15)) < 0.9 * change(None)


def test_guidance_scales_of_one_are_the_single_branch(tiny_pipeline, frames):
    """u + 1 (d - u) + 1 (c - d) is c. A scale that is 1 but for rounding still runs all three branches."""
    single = tiny_pipeline.generate(request(), dataclasses.replace(GUIDED, text_scale=1.0, audio_scale=1.0)).frames
    chain = tiny_pipeline.generate(request(), dataclasses.replace(GUIDED, text_scale=1 + 1e-9, audio_scale=1.0)).frames
    assert np.abs(single.astype(int) - chain).max() <= 2  # of 255; the sums round differently
    assert np.abs(single.astype(int) - frames).max() > 2


def test_the_negative_prompt_matters_to_guidance(tiny_pipeline, frames):
    other = tiny_pipeline.generate(request(), dataclasses.replace(GUIDED, negative_prompt="A puppet frowns.")).frames
    assert np.abs(other.astype(int) - frames).max() > 2


def test_what_is_given_to_the_model_is_the_picture_and_nothing_after_it(tiny_pipeline, tiny):
    video = np.broadcast_to(IMAGE.astype(np.float32) / 127.5 - 1, (1, 9, 32, 32, 3))
    mask = np.ones((1, 9, 32, 32, 1), np.float32)
    mask[:, 0] = 0
    given = np.asarray(tiny_pipeline.given_latents(video, mask))
    assert given.shape == (1, 3, 4, 4, 20)
    assert given[:, 0, ..., :4].all() and not given[:, 1:, ..., :4].any()
    encode = jax.jit(lambda p, v: vae_model.encode_chunked(tiny_pipeline.vae, p, v)[0])
    first = encode(tiny_pipeline.params["vae"], video * (mask == 0))
    np.testing.assert_allclose(given[:, 0, ..., 4:], first[:, 0], atol=1e-4)
    changed = np.array(video)
    changed[:, 1:] = 0.5
    np.testing.assert_array_equal(tiny_pipeline.given_latents(changed, mask), given)


def test_noise_is_standard_normal_and_follows_the_seed(tiny_pipeline):
    noise = np.asarray(tiny_pipeline.noise(3, 13))
    assert noise.shape == (1, 4, 4, 4, 16)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    np.testing.assert_array_equal(noise, tiny_pipeline.noise(3, 13))


# Weights


def test_a_pipeline_loads_the_weights_that_were_saved(tiny, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(pipeline.PRESETS, "tiny", tiny)
    with pytest.raises(UserError, match=f"no weights at {tmp_path}"):
        pipeline.load_pipeline("tiny", tmp_path)
    checkpoint.save_models(tmp_path, tiny_pipeline.params)
    loaded = pipeline.load_pipeline("tiny", str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, tiny_pipeline.params)
    with pytest.raises(UserError, match="dit.safetensors does not fit this model"):
        pipeline.load_pipeline("demo", tmp_path)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(UserError, match="there is no preset 'huge': one of demo"):
        pipeline.load_pipeline("huge")


def test_untrained_weights_have_the_expected_shapes(tiny):
    params = jax.jit(lambda key: {"text": pipeline.init_params(tiny, key)["text"]})(jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes["text"] == jax.tree.map(lambda leaf: leaf.shape, pipeline.expected_params(tiny)["text"])


# Requests


def test_a_request_that_fits_needs_no_note():
    ready = read_request(Request(np.zeros((64, 64, 3), np.uint8), WAVE[: 13 * 640], PROMPT), DEMO)
    assert ready.notes == () and ready.frames == 13
    np.testing.assert_array_equal(ready.wave, WAVE[: 13 * 640])


def test_files_are_read_and_what_was_done_is_told(tmp_path, tiny):
    Image.fromarray(np.full((50, 100, 3), 200, np.uint8)).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", np.tile(WAVE, 2), RATE)
    ready = read_request(Request(tmp_path / "a.png", str(tmp_path / "a.wav"), "A puppet flies and nods."), tiny)
    assert ready.image.shape == (32, 32, 3) and ready.image.dtype == np.uint8
    assert ready.frames == 49 and ready.wave.shape == (49 * 640,)
    text = "\n".join(ready.notes)
    assert "does not know the words flies; it knows" in text
    assert "image 100x50 is scaled to 32x32" in text
    assert "the sound lasts 2.00 s; the video ends after 1.96 s (49 frames)" in text


def test_a_short_sound_is_filled_up_with_silence(tiny):
    ready = read_request(request(audio=WAVE[:1000]), tiny)
    assert ready.frames == 5 and ready.wave.shape == (3200,)
    assert not ready.wave[1000:].any()
    assert ready.notes == ("the sound lasts 0.06 s; silence was added up to 0.20 s",)


@pytest.mark.parametrize("frames", range(5, 126, 4))
def test_a_sound_as_long_as_a_video_is_not_cut(frames):
    assert pipeline.frames_for(round(frames / FPS * RATE) / RATE) == frames


@pytest.mark.parametrize(("seconds", "frames"), [(0.0, 5), (0.1, 5), (0.35, 5), (0.36, 9), (4.99, 121), (60.0, 1497)])
def test_frames_for_is_what_the_sound_fills(seconds, frames):
    assert pipeline.frames_for(seconds) == frames


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "nods " * 24}, "has 24 words and the model reads 23"),
        ({"frames": 8}, "frames must be 4k . 1 and at least 5, got 8"),
        ({"frames": 1}, "at least 5, got 1"),
        ({"frames": -3}, "at least 5, got -3"),
        ({"face": (10, 10, 0, 20)}, "face box .* is empty or outside the 32 x 32 image"),
        ({"face": (0, 33, 0, 20)}, "face box .* is empty or outside"),
        ({"face": (float("nan"), 10, 0, 20)}, "face box .* is empty or outside"),
        ({"image": np.zeros((32, 32, 3), np.float32)}, "image must be a path or uint8 .* got float32 .32, 32, 3."),
        ({"image": IMAGE[..., 0]}, "image must be a path or uint8"),
        ({"image": "none.png"}, "image none.png does not exist"),
        ({"audio": "none.wav"}, "recording none.wav does not exist"),
        ({"audio": np.full(100, np.nan, np.float32)}, "audio must be a path or finite floats"),
        ({"audio": np.zeros(0, np.float32)}, "audio must be a path or finite floats .* got float32 .0,."),
        ({"audio": np.zeros((100, 2), np.float32)}, "audio must be a path or finite floats"),
        ({"audio": np.zeros(100, np.int16)}, "audio must be a path or finite floats .* got int16"),
    ],
)
def test_what_cannot_be_used_is_told(tiny, change, message):
    with pytest.raises(UserError, match=message):
        read_request(request(**change), tiny)


def test_a_face_box_follows_its_image():
    fit = pipeline.fit_box
    assert fit((10, 20, 30, 40), 64, 64, 64, 64) == (10, 20, 30, 40)
    assert fit((10, 20, 30, 40), 128, 128, 64, 64) == (5, 10, 15, 20)
    assert fit((0, 100, 50, 150), 100, 200, 50, 50) == (0, 50, 0, 50)  # the sides are cut off; ends are not included
    with pytest.raises(UserError, match="lies in the part of the 100 x 200 image that is cut off"):
        fit((0, 100, 0, 50), 100, 200, 50, 50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "magic"}, "there is no sampler 'magic': one of flow, unipc, dpmpp"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"shift": float("nan")}, "shift must be a number above 0"),
        ({"text_scale": -1.0}, "text_scale must be a number of 0 or more, got -1.0"),
        ({"audio_scale": float("inf")}, "audio_scale must be a number"),
        ({"sampler": "unipc", "shift": 1e5}, "unipc needs a time grid that starts below sigma 1"),
        ({"sampler": "dpmpp", "shift": 1e9}, "dpmpp cannot make 12 steps with shift"),
        ({"negative_low": 700.0}, "negative_low and negative_high must satisfy .*, got 700 and 666.667"),
        ({"neg_growth": "fast"}, "there is no neg_growth 'fast'"),
    ],
)
def test_sampling_options_out_of_range(changes, message):
    with pytest.raises(UserError, match=message):
        SamplingOptions(**changes)


# Conditioning


def test_face_tokens():
    assert conditioning.face_tokens(None, 64, 64).tolist() == [1.0] * 16
    mask = conditioning.face_tokens((16, 40, 0, 15), 64, 64).reshape(4, 4)
    np.testing.assert_array_equal(mask, [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert conditioning.face_tokens((0, 63, 0, 31), 64, 32).shape == (8,)


def test_audio_features_of_silence_are_the_clocks_alone():
    silent = conditioning.audio_features(DEMO, np.zeros(9 * 640, np.float32), 9)
    assert silent.shape == (18, log_mel.WIDTH) and silent.dtype == np.float32
    assert np.ptp(silent[:, : 3 * log_mel.BANDS]) < 1e-6
    assert len({row.tobytes() for row in silent}) == 18


def test_audio_features_do_not_depend_on_the_level():
    features = [conditioning.audio_features(DEMO, gain * WAVE[: 9 * 640], 9) for gain in (1.0, 0.05)]
    np.testing.assert_allclose(*features, atol=1e-3)
    assert DEMO.dit.audio_width == log_mel.WIDTH


@pytest.mark.parametrize("second", [0.1, 0.36, 0.7])
def test_a_click_lights_the_feature_of_its_second(second):
    """Feature k hears the moments k - 1, k and k + 1 of 50 a second, in this order."""
    wave = np.zeros(RATE, np.float32)
    wave[round(second * RATE)] = 1.0
    features = log_mel.log_mel_features(log_mel.normalise(wave), 25)
    assert features.shape == (50, log_mel.WIDTH)
    before, now, after = (features[:, i * log_mel.BANDS : (i + 1) * log_mel.BANDS].sum(1) for i in range(3))
    moment = round(50 * second)
    assert (int(before.argmax()), int(now.argmax()), int(after.argmax())) == (moment + 1, moment, moment - 1)


def test_log_mel_continues_a_short_wave_with_silence_and_ignores_what_comes_later():
    wave = log_mel.normalise(WAVE)
    whole = log_mel.log_mel_features(wave, 25)
    np.testing.assert_array_equal(log_mel.log_mel_features(wave, 5), whole[:10])
    padded = log_mel.log_mel_features(np.pad(wave, (0, RATE)), 40)
    np.testing.assert_array_equal(log_mel.log_mel_features(wave, 40), padded)


def test_weights_are_told_apart_by_their_files_without_reading_them(tiny, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(config.PRESETS, "tiny", tiny)
    checkpoint.save_models(tmp_path / "a", tiny_pipeline.params)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = jax.tree.map(lambda x: x.at[..., -1].add(1), tiny_pipeline.params["text"])
    checkpoint.save_models(tmp_path / "c", {**tiny_pipeline.params, "text": other})
    monkeypatch.setattr(pipeline, "_load_model", lambda *args: pytest.fail("a model was read"))
    a, b, c = (load_pipeline("tiny", tmp_path / name, low_memory=True).marks for name in "abc")
    assert a == b and {role for role in a if a[role] != c[role]} == {"text"}
    shutil.copy(tmp_path / "c" / "text.safetensors", tmp_path / "b")
    assert load_pipeline("tiny", tmp_path / "b", low_memory=True).marks == c


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("preview", {"sampler": "flow", "steps": 25, "text_scale": 4.0, "audio_scale": 2.9, "cache_threshold": 0.0}),
        ("flash", {"sampler": "unipc", "steps": 8, "audio_scale": 3.0, "cache_threshold": 0.1, "cache_start": 5}),
    ],
)
def test_presets_carry_the_values_of_the_released_demos(name, values):
    sampling = command_line.load_config(CONFIGS / f"{name}.py").sampling
    assert {key: sampling[key] for key in values} == values and sampling.shift == 5.0
    assert sampling.negative_prompt.startswith("Gesture is bad.") == (name == "preview")


@pytest.mark.parametrize("name", ["demo", "preview", "flash"])
def test_a_preset_has_the_options_of_its_config(name):
    sampling = command_line.load_config(CONFIGS / f"{name}.py").sampling
    assert set(sampling) == {field.name for field in dataclasses.fields(SamplingOptions)}
    assert SamplingOptions(**sampling) == SamplingOptions.for_preset(name)
    assert SamplingOptions.for_preset(name, steps=3) == dataclasses.replace(SamplingOptions(**sampling), steps=3)


def test_without_options_those_of_the_preset_are_taken(tiny, monkeypatch):
    taken = []

    def stream(pipe, ready, options, *rest, **more):
        taken.append(options)
        yield np.zeros((1, 32, 32, 3), np.uint8)

    monkeypatch.setattr(render, "stream", stream)
    monkeypatch.setitem(options.PRESET_VALUES, "tiny", {"steps": 3, "shift": 7.0})
    pipe = pipeline.Pipeline(tiny, {})
    pipe.generate(request())
    list(pipe.stream(read_request(request(), tiny)))
    assert taken == [SamplingOptions(steps=3, shift=7.0)] * 2


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({}, []),
        ({"text_scale": 2.0, "negative_motion": "A puppet nods.", "neg_scale": 2.0}, []),
        (
            {"text_scale": 2.0, "negative_prompt": "blurred", "negative_motion": "A puppet nods."},
            ["the demo does not know the words blurred; it knows a, and"],
        ),
        ({"negative_motion": "A puppet nods."}, ["negative_motion is not used: text_scale is 1; give --config.samp"]),
        (
            {"negative_prompt": "blurred", "negative_detail": "sad", "neg_scale": 1.5},
            ["negative_prompt, negative_detail, neg_scale are not used: text_scale is 1"],
        ),
        ({"negative_prompt": "sad", "text_dynamic": True}, []),  # falls below 1
    ],
)
def test_negative_prompts_are_used_or_it_is_told(changes, notes):
    told = pipeline.negative_notes(SamplingOptions(**changes), conditioning.tokenizer(DEMO))
    assert len(told) == len(notes) and all(text.startswith(note) for text, note in zip(told, notes, strict=True))


def test_what_is_told_of_the_options_stands_in_the_result(tiny, monkeypatch):
    monkeypatch.setattr(render, "stream", lambda *args, **more: iter([np.zeros((1, 32, 32, 3), np.uint8)]))
    made = pipeline.Pipeline(tiny, {}).generate(request(), SamplingOptions(neg_scale=2.0))
    assert made.notes[-1].startswith("neg_scale is not used")
