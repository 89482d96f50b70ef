"""What is trained: on a tiny preset every recipe makes batches, takes a step, is scored, and its weights come back."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from emv3_jax import checkpoint, command_line, conditioning
from emv3_jax.config import DEMO
from emv3_jax.data import puppet_latents
from emv3_jax.errors import UserError
from emv3_jax.models import vae as vae_model
from emv3_jax.pipeline import expected_params
from emv3_jax.puppets import clips
from emv3_jax.training import loop, recipes
from emv3_jax.training import state as train_state
from emv3_jax.training.dit_recipe import DiTRecipe
from emv3_jax.training.vae_recipe import VAERecipe

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def config(name: str, **changes) -> ml_collections.ConfigDict:
    """An experiment of configs/, with the sizes of a test."""
    cfg = ml_collections.ConfigDict(command_line.load_config(CONFIGS / name).to_dict())
    with cfg.unlocked():
        cfg.update(
            {"steps": 10, "warmup_steps": 1, "learning_rates": ((10, 1e-3),), "export_dtype": "float32", **changes}
        )
    return cfg


def arrays_equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    return all(jax.tree.leaves(same))


# VAE


@pytest.fixture(scope="module")
def vae(tiny) -> VAERecipe:
    stages = ((5, ((5, 16, 2),)), (10, ((5, 16, 2), (1, 32, 3))))
    return VAERecipe(config("demo_vae.py", picture=32, eval_clips=2, stages=stages), tiny)


@pytest.fixture(autouse=True)
def few_sentences(monkeypatch):
    """Training crops from one sentence in place of 64, which take seconds to speak."""
    whole = clips._bank
    monkeypatch.setattr(clips, "_bank", lambda split, identities, sentences: whole(split, identities, 1))


def test_vae_batches_follow_from_the_step(vae):
    np.testing.assert_array_equal(vae.batch(3), vae.batch(3))
    assert not np.array_equal(vae.batch(3), vae.batch(4))
    shapes = [vae.batch(step).shape for step in (5, 6, 7, 99)]
    assert shapes == [(2, 5, 16, 16, 3), (2, 5, 16, 16, 3), (3, 1, 32, 32, 3), (3, 1, 32, 32, 3)]


def test_vae_learns_in_the_loop(vae, tiny, tmp_path):
    """What train.py does, from fresh weights to exported ones."""
    cfg = config("demo_vae.py", **{**vae.cfg, "steps": 3, "eval_every": 9, "log_every": 1})
    assert loop.train(VAERecipe(cfg, tiny), cfg, tmp_path) == 0
    checkpoint.load_params(tmp_path / "weights" / "vae.safetensors", expected_params(tiny)["vae"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert rows[0]["noise"] < 0.2  # little noise in the latents at first
    assert 5 < rows[0]["psnr"] < 40


def losses_after(recipe, steps: int) -> tuple[float, float]:
    """Loss of one batch before and after so many steps on it."""
    cfg = config("demo_vae.py", steps=100, learning_rates=((100, 2e-3),))
    optimizer = train_state.make_optimizer(cfg)
    state = train_state.init_state(recipe.init(), optimizer)
    step = train_state.make_step(recipe.loss, optimizer, cfg.ema_decay, cfg.seed)
    loss = jax.jit(lambda params, batch: recipe.loss(params, batch, jax.random.key(7))[0])
    batch = recipe.batch(3)
    before = float(loss(state.params, batch))
    for _ in range(steps):
        state, _ = step(state, batch)
    return before, float(loss(state.params, batch))


def test_vae_learns(vae):
    before, after = losses_after(vae, 20)
    assert after < 0.4 * before  # 5.58 -> 1.11 when this was written


def test_vae_scores_are_of_held_out_puppets(vae, monkeypatch):
    monkeypatch.setitem(vae.__dict__, "_round_trip", lambda params, video: video)  # a perfect codec
    scores, pictures = vae.evaluate(None)
    assert scores["heldout_psnr"] > 90 and scores["heldout_sync"] > 0.9 and scores["heldout_motion"] == 1.0
    assert pictures["true_and_decoded"].shape == (4 * 32, 8 * 32, 3)


def test_vae_export_has_normal_latents_and_goes_on_as_a_start(vae, tiny, tiny_pipeline, tmp_path):
    vae.export(tiny_pipeline.params["vae"], tmp_path)
    params = checkpoint.load_params(tmp_path / "vae.safetensors", expected_params(tiny)["vae"])
    video = jnp.stack([clips.make_clip("train", i, 17).render(32) for i in range(8)])
    latents = jax.jit(lambda p, v: vae_model.WanVAE(tiny.vae).apply({"params": p}, v, method="encode")[0])(
        params, video
    )
    assert np.abs(np.mean(latents, axis=(0, 1, 2, 3))).max() < 0.5
    np.testing.assert_allclose(np.std(latents, axis=(0, 1, 2, 3)), 1.0, atol=0.4)
    again = VAERecipe(config("demo_vae.py", picture=32, init_from=str(tmp_path)), tiny)
    assert arrays_equal(again.init(), params)


def test_vae_of_another_size_is_no_start(tiny, tiny_pipeline, tmp_path):
    checkpoint.save_models(tmp_path, {"vae": tiny_pipeline.params["vae"]})
    wider = dataclasses.replace(tiny, vae=dataclasses.replace(tiny.vae, width=8))
    with pytest.raises(UserError, match="does not fit this model"):
        VAERecipe(config("demo_vae.py", picture=32, init_from=str(tmp_path)), wider).init()


# DiT


@pytest.fixture(scope="module")
def dit(tiny, tiny_pipeline, tmp_path_factory) -> DiTRecipe:
    """With four clips of nine frames, extracted by the first test that asks for a batch."""
    folder = tmp_path_factory.mktemp("dit")
    checkpoint.save_models(folder, {"vae": tiny_pipeline.params["vae"]})
    cfg = config(
        "demo_dit.py", vae_weights=str(folder / "vae.safetensors"), latents=str(folder / "latents"),
        clips=4, clip_frames=9, stages=((5, ((5, 3),)), (10, ((9, 2),))), eval_clips=2, eval_frames=13,
        sampling={"steps": 2, "shift": 3.0, "text_scale": 2.0, "audio_scale": 2.0},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(puppet_latents, "SHARD", 4)
        yield DiTRecipe(cfg, tiny)


def test_dit_batches_follow_from_the_step(dit, tiny):
    first, again, other = dit.batch(3), dit.batch(3), dit.batch(4)
    assert arrays_equal(first, again) and not arrays_equal(first, other)
    assert first["latents"].shape == (3, 2, 4, 4, 16) and first["latents"].dtype == np.float32
    later = dit.batch(7)
    assert later["latents"].shape == (2, 3, 4, 4, 16) and later["given"].shape == (2, 3, 4, 4, 20)
    assert later["prepared"].audio.shape == (2, 18, tiny.dit.audio_width)


def test_dit_and_its_encoders_learn(dit):
    optimizer = train_state.make_optimizer(dit.cfg)
    state = train_state.init_state(dit.init(), optimizer)
    before = jax.tree.map(np.array, state.params)
    step = train_state.make_step(dit.loss, optimizer, dit.cfg.ema_decay, dit.cfg.seed)
    for number in (1, 2, 3):  # fresh output layers are 0, and the warm-up's first step has a rate of 0
        state, metrics = step(state, dit.batch(number))
        assert metrics["finite"] == 1.0 and all(np.isfinite(float(value)) for value in metrics.values())
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state.params)
    assert changed.keys() == {"dit", "text", "image"}
    for name, tree in changed.items():
        assert np.mean(jax.tree.leaves(tree)) > 0.5, name


def test_dit_learns(dit):
    before, after = losses_after(dit, 30)
    assert after < 0.85 * before  # 15.1 -> 11.3 when this was written


def test_dropped_conditions_are_silence_and_the_empty_prompt(dit):
    prepared = dit.batch(7)["prepared"]
    with dit.cfg.unlocked():
        rates = dit.cfg.drop_both, dit.cfg.drop_audio
        dit.cfg.drop_both, dit.cfg.drop_audio = 1.0, 0.0
        no_text = dit._dropped(prepared, jax.random.key(0))
        dit.cfg.drop_both, dit.cfg.drop_audio = 0.0, 1.0
        no_audio = dit._dropped(prepared, jax.random.key(0))
        dit.cfg.drop_both, dit.cfg.drop_audio = rates
    ids, mask = conditioning.tokenizer(dit.preset).encode(["", ""])
    np.testing.assert_array_equal(no_text.ids, ids)
    np.testing.assert_array_equal(no_text.text_mask, mask)
    np.testing.assert_array_equal(no_text.audio, np.zeros_like(prepared.audio))
    np.testing.assert_array_equal(no_audio.ids, prepared.ids)
    assert not np.any(no_audio.audio)


def test_dit_is_scored_and_its_weights_come_back(dit, tiny, tiny_pipeline, tmp_path):
    params = {name: tiny_pipeline.params[name] for name in ("dit", "text", "image")}
    scores, pictures = dit.evaluate(params)
    assert {"heldout_sync", "heldout_sync_other", "heldout_motion", "heldout_psnr"} <= scores.keys()
    assert all(np.isfinite(value) for value in scores.values())
    assert pictures["true_and_made"].shape == (4 * 32, 8 * 32, 3)
    dit.export(params, tmp_path)
    restored = checkpoint.load_models(tmp_path, expected_params(tiny))
    assert arrays_equal(restored, {**params, "vae": dit.vae_params})
    assert arrays_equal(
        DiTRecipe(ml_collections.ConfigDict({**dit.cfg, "init_from": str(tmp_path)}), tiny).init(), params
    )


def test_latents_are_extracted_once_and_belong_to_their_vae(dit, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(puppet_latents, "SHARD", 4)
    load = lambda params: puppet_latents.load(tmp_path, tiny, params, "train", 3, 9)  # noqa: E731
    first = load(dit.vae_params)
    assert all(len(values) == 3 for values in first.values())
    assert "latents of train clips 0 to 3" in capsys.readouterr().out
    assert arrays_equal(first, load(dit.vae_params)) and capsys.readouterr().out == ""
    other = load({**dit.vae_params, "to_moments": jax.tree.map(lambda x: 2 * x, dit.vae_params["to_moments"])})
    np.testing.assert_allclose(other["latents"], 2 * first["latents"].astype(np.float32), rtol=0.01, atol=0.01)
    clip = clips.make_clip("train", 1, 9)
    np.testing.assert_allclose(first["image"][1], np.asarray(clip.render(32))[0], atol=1e-3)
    np.testing.assert_allclose(first["audio"][1], conditioning.audio_features(DEMO, clip.wave, 9), atol=0.02)


def test_every_other_clip_lets_the_voice_act_on_the_face_alone():
    clip = clips.make_clip("train", 1, 5)
    video = np.asarray(clip.render(64))
    rows = [puppet_latents.describe(clip, "i2v", DEMO, video, whole_face=whole) for whole in (True, False)]
    assert rows[0].face_mask.all()
    face = rows[1].face_mask.reshape(4, 4)
    assert face[1:3, 1:3].all() and not face.all()
    assert rows[0].has_image == 1.0
    assert puppet_latents.describe(clip, "t2v", DEMO, video, whole_face=True).has_image == 0.0


def test_tasks_of_the_clips_keep_their_shares():
    tasks = [puppet_latents.task_of("train", i) for i in range(1000)]
    for name, share in puppet_latents.TASK_SHARES.items():
        assert abs(tasks.count(name) / 1000 - share) < 0.03, name


def test_the_lip_sync_mask_hides_the_mouth_and_little_else():
    clip = clips.make_clip("train", 2, 9)
    mask = puppet_latents.task_mask("lipsync", clip, 64, 64)[..., 0]
    _, seen = clip.render(64, parts=True)
    mouth = np.asarray(seen)[..., clips.renderer.PARTS.index("mouth")]
    assert (mouth * (1 - mask)).max() < 0.01
    assert mask.mean() < 0.15


# Which recipe


@pytest.mark.parametrize(("key", "value"), [("recipe", "gan"), ("preset", "huge")])
def test_unknown_recipes_and_presets_are_told(key, value):
    with pytest.raises(UserError, match=f"config key {key}: '{value}' is none of "):
        recipes.build(config("demo_vae.py", **{key: value}))
