"""What an example holds is what the pipeline would be given: latents, masks, sound, words and pictures."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax import conditioning, tasks
from emv3_jax.config import AudioWindowConfig
from emv3_jax.data import examples
from emv3_jax.data.examples import GIVEN_TASKS, TRAINED_TASKS
from emv3_jax.data.extract import Extractor, encoder_hash
from emv3_jax.data.puppets import Puppets
from emv3_jax.errors import UserError
from emv3_jax.models import umt5
from emv3_jax.models import vae as vae_model
from emv3_jax.pipeline import expected_params

pytestmark = pytest.mark.usefixtures("quick_compile")
HALF = {"rtol": 2e-3, "atol": 2e-3}  # float16


@pytest.fixture(scope="module")
def extractor(tiny, tiny_pipeline):
    return Extractor(tiny, {"vae": tiny_pipeline.params["vae"]})


@pytest.fixture(scope="module")
def raw(clip):
    """Another mouth in every frame, and a face."""
    mouth = np.zeros((9, 32, 32), np.float32)
    for k in range(9):
        mouth[k, 12 + k : 20 + k, 8:24] = 1.0
    return clip(3, face=(3.0, 14.0, 2.0, 13.0), mouth=mouth, caption="A puppet nods and smiles.")


@pytest.fixture(scope="module")
def example(extractor, raw):
    return extractor.example(raw)


@pytest.fixture(scope="module")
def encode(tiny, tiny_pipeline):
    """Latents [1, T, h, w, 16] of a video [1, F, H, W, 3], in one piece."""
    vae = vae_model.WanVAE(tiny.vae)
    return jax.jit(lambda video: vae.apply({"params": tiny_pipeline.params["vae"]}, video, method="encode")[0])


def test_latents_are_those_of_the_vae(example, raw, encode):
    expected = encode(jnp.asarray(raw.video[None] / 127.5 - 1.0, jnp.float32))[0]
    assert example["latents"].shape == (3, 4, 4, 16)
    np.testing.assert_allclose(example["latents"], expected, **HALF)


@pytest.mark.parametrize("task", TRAINED_TASKS)
def test_what_a_task_is_given_is_what_tasks_computes(example, raw, encode, task):
    mask = tasks.pixel_mask(task, 9, 32, 32, raw.mouth)[None]
    video = jnp.asarray(raw.video[None] / 127.5 - 1.0, jnp.float32)
    masked = tasks.masked_latents(encode(tasks.masked_video(video, mask)), mask)
    expected = np.concatenate([tasks.mask_channels(mask), masked], axis=-1)[0]
    given = examples.given(example, task, 3)
    assert given.dtype == np.float32 and given.shape == (3, 4, 4, 20)
    np.testing.assert_allclose(given, expected, **HALF)
    np.testing.assert_array_equal(examples.given(example, task, 2), given[:2])
    if task == "t2v":
        assert not given.any()
    else:
        assert given[..., :4].any() and given[..., 4:].any()


def test_sound_face_and_picture_are_those_of_the_pipeline(example, raw, tiny):
    picture = raw.video[0] / 127.5 - 1.0
    prepared = conditioning.prepare(tiny, raw.caption, picture, raw.wave, 9, raw.face)
    np.testing.assert_allclose(example["audio"], prepared.audio, **HALF)
    np.testing.assert_array_equal(example["face_mask"], prepared.face_mask)
    assert example["face_mask"].tolist() == [1, 0, 0, 0]
    assert example["face_box"].tolist() == [3.0, 14.0, 2.0, 13.0]
    np.testing.assert_array_equal(example["image"], raw.video[0])
    np.testing.assert_allclose(example["wave"] / 32767, raw.wave, atol=1e-4)


def test_without_a_face_the_voice_acts_everywhere(extractor, clip, tiny, tiny_pipeline):
    example = extractor.example(clip(1))
    assert example["face_mask"].all() and not example["face_box"].any()
    flash = dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, audio_windows=AudioWindowConfig()))
    boxed = Extractor(flash, {"vae": tiny_pipeline.params["vae"]}).example(clip(1, face=(3.0, 14.0, 2.0, 13.0)))
    assert boxed["face_mask"].all()  # which takes no face mask
    assert boxed["face_box"].any()


def test_an_example_is_read_as_it_was_written(example, tiny):
    schema = examples.features(tiny)
    assert set(schema) == set(example)
    read = schema.deserialize_example_np(schema.serialize_example(example))
    for name, value in example.items():
        if isinstance(value, str):
            assert read[name].decode() == value
        else:
            assert read[name].dtype == value.dtype
            np.testing.assert_array_equal(read[name], value)


def test_a_batch_holds_what_the_loss_needs(extractor, example, raw, clip, tiny):
    some = [example, extractor.example(clip(5, caption="A puppet."))]
    whole = examples.batch(some, ["lipsync", "t2v"], 9, tiny)
    assert {name: value.shape for name, value in whole.items()} == {
        "latents": (2, 3, 4, 4, 16), "given": (2, 3, 4, 4, 20), "task": (2,), "has_image": (2,),
        "audio": (2, 18, tiny.dit.audio_width), "face_mask": (2, 4), "ids": (2, 24), "text_mask": (2, 24),
        "image": (2, 32, 32, 3),
    }  # fmt: skip
    assert all(value.dtype in (np.float32, np.int32) for value in whole.values())
    assert whole["task"].tolist() == [3, 0] and whole["has_image"].tolist() == [1.0, 0.0]
    np.testing.assert_array_equal(whole["given"][0], examples.given(example, "lipsync", 3))
    assert not whole["given"][1].any()
    ids, mask = conditioning.tokenizer(tiny).encode([raw.caption, "A puppet."])
    np.testing.assert_array_equal(whole["ids"], ids)
    np.testing.assert_array_equal(whole["text_mask"], mask)
    np.testing.assert_allclose(whole["image"][0], raw.video[0] / 127.5 - 1.0, atol=1e-6)
    cut = examples.batch(some, ["lipsync", "t2v"], 5, tiny)
    for name in ("latents", "given"):
        np.testing.assert_array_equal(cut[name], whole[name][:, :2])
    np.testing.assert_array_equal(cut["audio"], whole["audio"][:, :10])


def test_cut_short_a_given_last_frame_is_not_given(example):
    whole, cut = examples.given(example, "flf2v", 3), examples.given(example, "flf2v", 2)
    assert whole[-1, ..., :4].any() and not cut[1:, ..., :4].any()


class Letters:
    """A tokenizer for a preset without a vocabulary: a letter is a token."""

    def __init__(self, length):
        self.length = length

    def encode(self, texts):
        ids, mask = np.zeros((len(texts), self.length), np.int32), np.zeros((len(texts), self.length), np.float32)
        for row, text in enumerate(texts):
            tokens = [3 + ord(letter) % 40 for letter in text] + [1]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1.0
        return ids, mask


def test_states_of_frozen_encoders_are_kept(tiny, make_params, clip):
    frozen = dataclasses.replace(tiny, vocabulary=())
    shapes = expected_params(tiny)
    params = make_params({name: shapes[name] for name in ("vae", "text", "image")})
    words = Letters(frozen.dit.text_len)
    extractor = Extractor(frozen, params, words)
    some = [extractor.example(clip(k, caption="hello" * k)) for k in (1, 2)]
    ids, mask = words.encode(["hello", "hellohello"])
    states = jax.jit(umt5.UMT5Encoder(frozen.text).apply)({"params": params["text"]}, ids, mask) * mask[..., None]
    pixels = np.stack([clip(k).video[0] for k in (1, 2)]) / np.float32(127.5) - 1.0
    image = conditioning.encode_image(params, frozen, pixels, np.ones(2))
    assert [example["text"].shape for example in some] == [(6, 64), (11, 64)]
    assert set(examples.features(frozen)) == set(some[0])
    batch = examples.batch(some, ["i2v", "t2v"], 9, frozen)
    np.testing.assert_allclose(batch["text"], states, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(batch["image"], image, rtol=1e-3, atol=1e-4)
    assert batch["text"].shape == (2, 24, 64) and batch["image"].shape == (2, 17, 64)
    assert extractor.text("").shape == (1, 64)  # the end mark alone


def test_puppets_are_clips_like_others(extractor, tiny):
    source = Puppets("train", 3, 9, 32)
    rows = [row for k in range(len(source)) for row in source.clips(k)]
    assert [row.id for row in rows] == ["train/0", "train/1", "train/2"]
    assert [row.face is None for row in rows] == [True, False, True]
    example = extractor.example(rows[1])
    assert example["latents"].shape == (3, 4, 4, 16)
    assert np.isfinite(example["latents"]).all() and np.abs(example["wave"]).max() == 32767
    assert source.describe() == {"puppets": "train", "count": 3, "frames": 9, "size": 32}


def test_the_hash_is_of_what_latents_depend_on(tiny_pipeline):
    params = tiny_pipeline.params["vae"]
    hashed = encoder_hash(params)
    other = {**params, "decoder": jax.tree.map(lambda x: 2 * x, params["decoder"])}
    assert encoder_hash(other) == hashed
    other = {**params, "to_moments": jax.tree.map(lambda x: 2 * x, params["to_moments"])}
    assert encoder_hash(other) != hashed
    assert encoder_hash(jax.tree.map(lambda x: np.asarray(x, np.float16), params)) == hashed


def test_a_missing_package_is_told(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"training data needs the extra data: pip install -e '.\[data\]'"):
        examples.features(tiny)


def test_every_kept_mask_is_one_of_the_tasks():
    assert set(TRAINED_TASKS) <= set(tasks.TASKS) and set(GIVEN_TASKS) < set(TRAINED_TASKS)
