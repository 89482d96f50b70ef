"""From files to what the preview and flash models are conditioned on: every step real, the weights random and tiny."""

import dataclasses

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from emv3_jax import audio_preprocessing, conditioning, config, media, render
from emv3_jax.errors import UserError
from emv3_jax.pipeline import (
    Pipeline,
    Request,
    SamplingOptions,
    expected_params,
    fitted_size,
    load_pipeline,
    read_request,
)
from emv3_jax.tokenizers import UMT5Tokenizer

SPEECH = config.Wav2Vec2Config(
    width=16, heads=2, layers=3, ffn=16, conv_width=8, positional_taps=4, positional_groups=2
)  # fmt: skip
WINDOWS = config.AudioWindowConfig(layers=3, hidden=8, tokens=5)
PREVIEW = dataclasses.replace(
    config.DEMO,
    name="preview",
    vae=dataclasses.replace(config.DEMO.vae, width=4),
    dit=dataclasses.replace(config.DEMO.dit, width=32, heads=2, layers=2, ffn=48, time_features=16, audio_width=16),
    text=dataclasses.replace(config.DEMO.text, layers=1, ffn=32),
    image=dataclasses.replace(config.DEMO.image, layers=2),
    height=48,
    width=48,
    max_frames=13,
    audio="wav2vec2",
    speech=SPEECH,
    vocabulary=(),
    keep_proportions=True,
    phda=False,
)
FLASH = dataclasses.replace(
    PREVIEW,
    name="flash",
    dit=dataclasses.replace(PREVIEW.dit, audio_windows=WINDOWS),
    audio="wav2vec2_windows",
)
FRAMES = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer as the released folder holds it, a picture and a recording."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("request")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁a", -1.0), ("▁woman", -2.0), ("▁talks", -2.5)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )  # fmt: skip
    tokenizer.save_pretrained(folder / "tokenizer")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 60, 3), dtype=np.uint8)).save(folder / "portrait.png")
    soundfile.write(folder / "speech.wav", 0.1 * rng.standard_normal(22050).astype(np.float32), 22050)
    return folder


def make(preset: config.Preset, folder, make_params) -> Pipeline:
    return Pipeline(preset, make_params(expected_params(preset)), words=UMT5Tokenizer(folder / "tokenizer", 24))


def request(folder, **changes) -> Request:
    fields = {"image": folder / "portrait.png", "audio": folder / "speech.wav", "prompt": "a woman talks"}
    return Request(**{**fields, "frames": FRAMES, **changes})


@pytest.fixture(scope="module")
def preview(folder, make_params) -> Pipeline:
    return make(PREVIEW, folder, make_params)


def test_pictures_keep_their_proportions_within_the_area():
    assert fitted_size(1280, 720, config.PREVIEW) == (1024, 576)
    assert fitted_size(500, 333, config.PREVIEW) == (512, 320)  # no larger area
    assert fitted_size(10000, 20, config.PREVIEW) == (10000, 16)
    sizes = {fitted_size(1600, width, config.PREVIEW) for width in range(900, 1601)}
    assert len(sizes) <= 12 and all(h % 32 == w % 32 == 0 and h * w <= 768 * 768 for h, w in sizes)
    as_released = config.released(config.PREVIEW)
    assert fitted_size(500, 333, as_released) == (496, 320)
    assert len({fitted_size(1600, width, as_released) for width in range(900, 1601)}) > 20
    assert fitted_size(1280, 720, config.DEMO) == (64, 64)
    assert {fitted_size(side, side, config.PREVIEW) for side in range(768, 10001)} == {(768, 768)}


def test_preview_from_files_to_conditions(preview, folder):
    ready = read_request(request(folder, face=(0, 45, 0, 60)), PREVIEW, preview.words)
    assert ready.image.shape == (48, 32, 3)  # 90 x 60 in an area of 48 x 48: 58.8 x 39.2, floored
    prepared, given = preview.prepare(ready)
    assert prepared.ids[0, :5].tolist() == [3, 4, 5, 1, 0] and prepared.text_mask.sum() == 4
    assert prepared.audio.shape == (1, 2 * FRAMES, 16)
    np.testing.assert_array_equal(prepared.face_mask, [[1, 1, 1, 1, 0, 0]])  # upper half, ends included
    assert given.shape == (1, 3, 6, 4, 20)
    np.testing.assert_array_equal(given[0, :, :, :, :4].min((1, 2, 3)), [1, 0, 0])
    cond = jax.jit(conditioning.encode, static_argnums=1)(preview.params, PREVIEW, prepared, given)
    assert cond.text.shape == (1, 24, 64) and not np.any(cond.text[0, 4:]) and np.all(np.any(cond.text[0, :4], -1))
    assert cond.image.shape == (1, 17, 64)


def test_a_speech_encoder_hears_the_whole_recording_not_what_the_video_keeps_of_it(preview, folder):
    ready = read_request(request(folder), PREVIEW, preview.words)
    whole, _ = media.load_audio(folder / "speech.wav", config.RATE)
    assert len(ready.wave) == FRAMES * 640 < len(whole)
    want = audio_preprocessing.preview_features(SPEECH, preview.params["speech"], whole, FRAMES)
    np.testing.assert_array_equal(preview.prepare(ready)[0].audio[0], want)


def test_in_released_mode_nothing_is_heard_after_the_sound(preview, folder, tmp_path):
    """The last feature of a sound as long as its video reaches past its end, and is missing."""
    wave = 0.1 * np.random.default_rng(1).standard_normal(FRAMES * 640).astype(np.float32)
    heard = {}
    for preset in (PREVIEW, config.released(PREVIEW)):
        pipe = Pipeline(preset, preview.params, words=preview.words)
        ready = read_request(request(folder, audio=wave), preset, pipe.words)
        run = render.Run(pipe, ready, SamplingOptions(steps=1), tmp_path / str(len(heard)))
        heard[len(run.features)] = run.features
        np.testing.assert_array_equal(pipe.prepare(ready)[0].audio[0], run.features)
    assert list(heard) == [2 * FRAMES, 2 * FRAMES - 1]


def test_flash_hears_windows_has_no_face_mask_and_says_so(folder, make_params):
    flash = make(FLASH, folder, make_params)
    ready = read_request(request(folder, face=(0, 45, 0, 60)), FLASH, flash.words)
    assert any("the face box is not used" in note for note in ready.notes)
    prepared, given = flash.prepare(ready)
    assert prepared.audio.shape == (1, FRAMES, 5, 3, 16)
    np.testing.assert_array_equal(prepared.face_mask, np.ones((1, 6)))
    x = flash.noise(0, FRAMES, ready.image.shape[:2])
    out = flash.sample_latents(prepared, given, x, options_of_one_step())
    assert out.shape == x.shape and np.isfinite(out).all()


def options_of_one_step():
    return SamplingOptions(steps=1, text_scale=1.0, audio_scale=2.0)


def test_flash_says_that_loudness_cannot_be_measured(folder):
    words = UMT5Tokenizer(folder / "tokenizer", 24)
    wave = np.zeros(FRAMES * 640, np.float32)
    ready = read_request(request(folder, audio=wave), FLASH, words)
    assert any("loudness" in note for note in ready.notes)


def test_a_prompt_too_long_is_refused_not_cut(preview):
    with pytest.raises(UserError, match="has 31 tokens and the model reads 24: shorten it"):
        preview.words.encode([" ".join(["a woman talks"] * 10)])


def test_a_face_box_may_be_a_file(preview, folder):
    np.save(folder / "face.npy", np.array([0, 90, 0, 120, 180, 120]))  # found in the picture at twice its size
    from_file, from_numbers = (
        read_request(request(folder, face=face), PREVIEW, preview.words).face
        for face in (folder / "face.npy", (0, 45, 0, 60))
    )
    assert from_file == from_numbers


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer that can be read .*: copy google/umt5-xxl"):
        UMT5Tokenizer(tmp_path, 24)
    with pytest.raises(UserError, match="no weights at .*: convert the released ones"):
        load_pipeline("preview")


def test_converted_released_files_make_a_pipeline(folder, make_params, monkeypatch, tmp_path):
    """Torch keys -> converter -> load_pipeline: each model's weights land where random ones were put, and it runs."""
    import shutil

    from convert import __main__ as command
    from convert import engine
    from convert.registry import MODELS
    from emv3_jax.checkpoint import write_safetensors
    from emv3_jax.command_line import run_main
    from emv3_jax.weight_files import CONVERTED

    params = make_params(expected_params(PREVIEW))
    sizes = {
        "dit": PREVIEW.dit, "text": PREVIEW.text, "image": PREVIEW.image, "vae": PREVIEW.vae, "speech": SPEECH
    }  # fmt: skip
    for role, cfg in sizes.items():
        name = CONVERTED[role].format("preview")
        monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], cfg=cfg))
        tensors = engine.to_torch(MODELS[name].naming("released").table(cfg), params[role])
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
        arguments = ["to-jax", tmp_path / f"{name}.safetensors", "--to", tmp_path / "weights"]
        assert run_main(command.main, [str(argument) for argument in arguments]) == 0
    shutil.copytree(folder / "tokenizer", tmp_path / "weights" / "tokenizer")
    monkeypatch.setitem(config.PRESETS, "preview", PREVIEW)
    pipe = load_pipeline("preview", tmp_path / "weights")
    assert pipe.preset.dit.dtype == ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, pipe.params, params)
    made = pipe.generate(request(folder, frames=5), options_of_one_step())
    assert made.frames.shape == (5, 48, 32, 3) and made.frames.std() > 0
    with pytest.raises(UserError, match="dtype must be float32 or bfloat16, got 'float16'"):
        load_pipeline("preview", tmp_path / "weights", dtype="float16")
    half = load_pipeline("preview", tmp_path / "weights", dtype="bfloat16")
    near = half.generate(request(folder, frames=5), options_of_one_step()).frames
    difference = np.abs(near.astype(int) - made.frames)
    assert 0 < difference.max() and difference.mean() < 4  # of 255
