"""What is trained: on a tiny preset every recipe makes batches, takes a step, is scored, and its weights come back."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import arrays_equal, config

from emv3_jax import checkpoint, conditioning, pipeline, sharding, weight_files
from emv3_jax.config import DEMO, PRESETS
from emv3_jax.data.examples import TRAINED_TASKS
from emv3_jax.diffusion.phda import EVEN, PhDAConfig
from emv3_jax.errors import UserError
from emv3_jax.models import vae as vae_model
from emv3_jax.pipeline import expected_params, load_pipeline
from emv3_jax.puppets import clips, requests
from emv3_jax.training import loop, negatives, recipes, starts, verdicts
from emv3_jax.training import state as train_state
from emv3_jax.training.dit_recipe import DiTRecipe
from emv3_jax.training.vae_recipe import VAERecipe

pytestmark = pytest.mark.usefixtures("quick_compile")


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


def losses_after(recipe, steps: int, rate: float) -> tuple[float, float]:
    """Loss of one batch before and after so many steps on it, each of the length `rate` against the gradient."""
    gradient = jax.jit(jax.value_and_grad(lambda *args: recipe.loss(*args, jax.random.key(7))[0]))
    params, constants, batch = recipe.init(), recipe.constants(), recipe.batch(3)
    seen = []
    for _ in range(steps + 1):
        loss, grads = gradient(params, constants, batch)
        seen.append(float(loss))
        scale = -rate / np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
        params = optax.apply_updates(params, optax.tree.scale(scale, grads))
    return seen[0], seen[-1]


def test_vae_learns(vae):
    before, after = losses_after(vae, 20, 0.3)
    assert after < 0.4 * before  # 5.58 -> 1.11 when this was written


def test_vae_scores_are_of_held_out_puppets(vae, monkeypatch):
    monkeypatch.setitem(vae.__dict__, "_round_trip", lambda params, video: video)  # a perfect codec
    scores, pictures = vae.evaluate(None, {})
    assert scores["heldout_psnr"] > 90 and scores["heldout_sync"] > 0.9 and scores["heldout_motion"] == 1.0
    assert pictures["true_and_decoded"].shape == (4 * 32, 8 * 32, 3)


def test_vae_export_has_normal_latents_and_goes_on_as_a_start(vae, tiny, tiny_pipeline, tmp_path):
    vae.export(tiny_pipeline.params["vae"], {}, tmp_path)
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
def dit(make) -> DiTRecipe:
    return make()


def test_dit_batches_follow_from_the_step(dit, tiny):
    first, again, other = dit.batch(3), dit.batch(3), dit.batch(4)
    assert arrays_equal(first, again) and not arrays_equal(first, other)
    assert first["latents"].shape == (3, 2, 4, 4, 16) and first["latents"].dtype == np.float32
    assert dit.batch_size(3) == 3 and len(dit.ids(3)) == 3 and dit.ids(3)[0].startswith("train/")
    later = dit.batch(7)
    assert later["latents"].shape == (2, 3, 4, 4, 16) and later["given"].shape == (2, 3, 4, 4, 20)
    assert later["audio"].shape == (2, 18, tiny.dit.audio_width)
    assert sorted(later["task"]) == [TRAINED_TASKS.index("t2v"), TRAINED_TASKS.index("i2v")]
    np.testing.assert_array_equal(later["has_image"], later["task"] == TRAINED_TASKS.index("i2v"))


def test_rows_of_a_batch_are_those_of_the_whole_one(dit):
    whole, part = dit.batch(3), dit.batch(3, np.array([0, 2]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[[0, 2]], b), whole, part)


def test_gradients_reach_the_dit_and_its_encoders(dit, tiny_pipeline):
    params = {name: tiny_pipeline.params[name] for name in dit.trained}
    gradient = jax.jit(jax.value_and_grad(dit.loss, has_aux=True))
    (loss, metrics), grads = gradient(params, {}, dit.batch(3), jax.random.key(0))
    assert np.isfinite(float(loss))
    assert float(metrics["mse"].count) == 3.0 and float(metrics["mse_lipsync"].count) == 0.0
    bands = sum(float(metrics[f"mse_{name}"].total) for name in ("early", "middle", "late"))
    np.testing.assert_allclose(bands, float(metrics["mse"].total), rtol=1e-5)
    assert grads.keys() == {"dit", "text", "image"}
    for name, tree in grads.items():
        assert np.mean([bool(np.any(leaf)) for leaf in jax.tree.leaves(tree)]) > 0.5, name


def test_dit_learns(dit):
    before, after = losses_after(dit, 30, 0.3)
    assert after < 0.85 * before  # 15.1 -> 11.3 when this was written


def test_dropped_conditions_are_silence_and_the_empty_prompt(make, tiny_pipeline):
    batch, key, weights = make().batch(7), jax.random.key(0), tiny_pipeline.params
    whole = make().conditions(weights, batch)
    no_text = make(drop_both=1.0, drop_audio=0.0).conditions(weights, batch, key)
    no_audio = make(drop_both=0.0, drop_audio=1.0).conditions(weights, batch, key)
    ids, mask = conditioning.tokenizer(make().preset).encode(["", ""])
    np.testing.assert_allclose(no_text.text, conditioning.encode_text(weights, make().preset, ids, mask), atol=1e-6)
    assert not np.any(no_text.audio) and not np.any(no_audio.audio) and np.any(whole.audio)
    np.testing.assert_allclose(no_audio.text, whole.text, atol=1e-6)
    np.testing.assert_array_equal(no_text.image, whole.image)


def test_dit_is_scored_and_its_weights_come_back(dit, make, tiny, tiny_pipeline, tmp_path):
    params = {name: tiny_pipeline.params[name] for name in ("dit", "text", "image")}
    scores, pictures = dit.evaluate(params, {})
    assert {"heldout_sync", "heldout_sync_other", "heldout_motion", "heldout_psnr"} <= scores.keys()
    assert all(np.isfinite(value) for value in scores.values())
    assert pictures["true_and_made"].shape == (4 * 32, 8 * 32, 3) and pictures["made"].shape == (13, 32, 64, 3)
    dit.export(params, {}, tmp_path)
    restored = checkpoint.load_models(tmp_path, expected_params(tiny))
    assert arrays_equal(restored, {**params, "vae": tiny_pipeline.params["vae"]})
    assert arrays_equal(make(init_from=str(tmp_path)).init(), params)


def test_weights_on_a_mesh_are_scored_on_it(make, weights):
    """Adapters and what they stand beside, and models that are not trained."""
    lora = make(init_from=str(weights), adapters={"rank": 2, "scale": 4.0, "on": "blocks/.*/(query|out)"})
    mesh, given = sharding.make_mesh(), (lora.init(), lora.constants())
    placed = jax.device_put(given, train_state.tree_shardings(given, mesh))
    pipe = lora.make_pipeline(lora.weights(*placed))
    assert pipe.mesh == mesh
    for role in ("dit", "text", "image", "vae"):
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(pipe.params[role])), role
    assert lora.make_pipeline(lora.weights(*given)).mesh is None


def test_trained_weights_know_their_sizes_and_their_phases(make, tiny, tmp_path, monkeypatch):
    """load_pipeline needs no config for them, whatever the preset's own sizes are."""
    recipe = make(phda={"audio": (500.0, 600.0, 1.0, 0.0)})
    recipe.export(recipe.init(), {}, tmp_path)
    larger = dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, layers=5, dtype="bfloat16"))
    monkeypatch.setitem(PRESETS, "tiny", larger)
    recipe.export(recipe.init(), {}, tmp_path)
    pipe = load_pipeline("tiny", tmp_path, dtype="float32")
    assert pipe.preset.dit == tiny.dit
    np.testing.assert_allclose(pipe.velocity().weights(jnp.array([900.0])), [[1.0, 1.0, 0.0]])
    (tmp_path / "trained.json").write_text('{"model": {"layers')
    with pytest.raises(UserError, match="trained.json is damaged"):
        load_pipeline("tiny", tmp_path)


def test_weights_that_go_on_with_other_phases_are_told(make, tiny, tmp_path, capsys):
    phases = PhDAConfig(text=None, image=None, audio=(500.0, 600.0, 1.0, 0.0))
    weight_files.record_training(tmp_path, tiny, phases)
    make(init_from=str(tmp_path)).open()  # with the phases of demo_dit.py
    now = "image 166.667-333.333, audio 500-666.667"
    note = f"the weights in {tmp_path} were trained with PhDA of audio 500-600-1-0, and go on with that of {now}"
    assert capsys.readouterr().out == f"note: {note} (config key phda)\n"
    assert starts.notes(tiny, str(tmp_path), phases) == starts.notes(tiny, "", EVEN) == []
    assert "go on with that of no modality" in starts.notes(tiny, str(tmp_path), EVEN)[0]


@pytest.fixture
def half_frozen(make, tiny, weights, tmp_path, monkeypatch) -> pathlib.Path:
    """Exported weights of a transformer whose encoders were not trained: trained/, beside what it needs in base/."""
    frozen = dataclasses.replace(tiny, vocabulary=())
    monkeypatch.setitem(PRESETS, "tiny", frozen)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base" / "tokenizer").mkdir(parents=True)
    for role in ("dit", "text", "image", "vae"):
        shutil.copy(weights / f"{role}.safetensors", tmp_path / "base")
    recipe = DiTRecipe(make(frozen_weights="base", init_from="base").cfg, frozen)
    recipe.export({"dit": jax.tree.map(lambda leaf: leaf + 1, recipe.init()["dit"])}, {}, tmp_path / "trained")
    return tmp_path / "trained"


def test_what_was_frozen_is_read_from_where_the_run_read_it(half_frozen, weights, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(conditioning, "tokenizer", lambda preset, folder=None: read.append(folder))
    assert [path.name for path in half_frozen.glob("*.safetensors")] == ["dit.safetensors"]
    preset = PRESETS["tiny"]
    monkeypatch.chdir("/")
    weight_files.load_tokenizer(preset, half_frozen)
    assert read == [tmp_path / "base" / "tokenizer"]
    params = pipeline.load_models(preset, half_frozen, ("dit", "text", "image", "vae"))
    assert arrays_equal(params["vae"], checkpoint.load_params(weights / "vae.safetensors"))
    assert not arrays_equal(params["dit"], checkpoint.load_params(weights / "dit.safetensors"))
    trained, base = (weight_files.weight_hashes("tiny", folder) for folder in (half_frozen, tmp_path / "base"))
    assert [role for role in base if base[role] != trained[role]] == ["dit"]
    shutil.copytree(half_frozen, tmp_path / "further")  # trained in turn beside trained weights
    weight_files.record_training(tmp_path / "further", preset, EVEN, str(half_frozen), ("text", "image", "vae"))
    assert weight_files.weight_hashes("tiny", tmp_path / "further") == trained


def test_frozen_models_that_are_gone_are_told(half_frozen, tmp_path, monkeypatch):
    preset = PRESETS["tiny"]
    (tmp_path / "moved").mkdir()
    (tmp_path / "base").rename(tmp_path / "moved" / "base")
    told = f"trained beside those of {tmp_path}/base, which is gone: put it back, or name the folder with "
    with pytest.raises(UserError, match=told + "tokenizer in .*trained.json"):
        weight_files.load_tokenizer(preset, half_frozen)
    with pytest.raises(UserError, match=told + "text"):
        pipeline.load_models(preset, half_frozen, ("dit", "text"))
    assert dict(pipeline.load_models(preset, half_frozen, ("dit",)))  # which needs nothing else
    monkeypatch.chdir(tmp_path / "moved")  # with the project that the folder was given in
    assert weight_files.locate(half_frozen, "vae", preset) == pathlib.Path("base/vae.safetensors")
    (half_frozen / "dit.safetensors").unlink()
    with pytest.raises(UserError, match="no converted weights at .*trained/dit-tiny"):  # never those it started from
        dict(pipeline.load_models(preset, half_frozen, ("dit",)))


def test_flf2v_without_its_last_frame_is_told(make, capsys):
    for tasks, cut in ((("i2v", "flf2v"), True), (("i2v", "lipsync"), False)):
        make(steps=10, tasks=((10, tuple((name, 1.0) for name in tasks)),)).open()
        said = "note: clips have up to 9 frames, of which batches of 5 take the first: the last one is not given there"
        assert (said in capsys.readouterr().out) == cut
    make(steps=10, stages=((10, ((9, 2),)),), tasks=((10, (("flf2v", 1.0),)),)).open()
    assert "FLF2V" not in capsys.readouterr().out


def test_data_of_another_vae_is_refused(make, tiny_pipeline, tmp_path):
    vae = tiny_pipeline.params["vae"]
    moved = {**vae, "to_moments": jax.tree.map(lambda x: 2 * x, vae["to_moments"])}
    checkpoint.save_models(tmp_path, {**tiny_pipeline.params, "vae": moved})
    with pytest.raises(UserError, match="was made with another VAE than that of"):
        make(frozen_weights=str(tmp_path)).batch(1)


def test_data_that_is_not_there(make, tmp_path):
    with pytest.raises(UserError, match="is not there; make it with python -m emv3_jax.data.prepare"):
        make(data=str(tmp_path / "nothing")).batch(1)


def test_adapters_alone_are_trained_and_leave_as_whole_weights(make, weights, tiny, tmp_path):
    lora = make(init_from=str(weights), adapters={"rank": 2, "scale": 4.0, "on": "blocks/.*/(query|out)"})
    params, constants = lora.init(), lora.constants()
    start = checkpoint.load_params(weights / "dit.safetensors")
    assert arrays_equal(lora.weights(params, constants)["dit"], start)  # new adapters change nothing
    before, after = losses_after(lora, 6, 0.1)
    assert after < before
    moved = jax.tree.map(lambda leaf: leaf + 0.1, params)
    lora.export(moved, constants, tmp_path)
    merged = checkpoint.load_params(tmp_path / "dit.safetensors", expected_params(tiny)["dit"])
    kernel = lambda tree: tree["blocks"]["self_attention"]["query"]["kernel"]  # noqa: E731
    pair = moved["blocks"]["self_attention"]["query"]
    np.testing.assert_allclose(kernel(merged), kernel(start) + 2.0 * pair["down"] @ pair["up"], rtol=1e-5, atol=1e-6)
    assert np.array_equal(merged["blocks"]["mlp"]["up"]["kernel"], start["blocks"]["mlp"]["up"]["kernel"])
    kept = checkpoint.load_params(tmp_path / "adapters" / "dit.safetensors")
    assert float(kept["scale"]) == 2.0 and arrays_equal(kept["adapters"], moved)


def test_a_model_that_heard_nothing_starts_silent(make, weights, tiny):
    recipe = make(init_from=str(weights), silent_audio=True)
    params, batch = recipe.init(), recipe.batch(7)
    start = checkpoint.load_params(weights / "dit.safetensors")
    assert not np.any(params["dit"]["cross_kv"]["audio"]["value"]["kernel"])
    assert arrays_equal(params["dit"]["blocks"], start["blocks"])
    t = jnp.array([300.0, 700.0])
    heard = recipe.dit.apply({"params": params["dit"]}, batch["latents"], t, recipe.conditions(params, batch))
    silence = {**batch, "audio": np.zeros_like(batch["audio"])}
    silent = recipe.dit.apply({"params": params["dit"]}, batch["latents"], t, recipe.conditions(params, silence))
    np.testing.assert_array_equal(heard, silent)


# Preferences


@pytest.mark.parametrize("objective", ["ndpo", "ndpo_absolute", "dpo"])
def test_preferences_make_negatives_less_likely(make, weights, review, objective):
    keys = {"init_from": str(weights), "negatives": str(review), "objective": objective, "beta": 4.0}
    recipe = make(**keys, stages=((10, ((9, 2),)),))
    assert recipe.batch(1)["latents"].shape[0] == recipe.batch_size(1) == (4 if objective == "dpo" else 2)
    params, constants = recipe.init(), recipe.constants()
    value, metrics = jax.jit(recipe.loss)(params, constants, recipe.batch(3), jax.random.key(7))
    assert float(metrics["error_over_reference"].total) == pytest.approx(0.0, abs=1e-5)
    preference = float(metrics["preference"].total / metrics["preference"].count)
    assert float(value) == pytest.approx(preference / 4.0, rel=1e-5)  # gradients have the size of the errors'
    if objective != "ndpo_absolute":
        assert preference == pytest.approx(np.log(2), rel=1e-4)  # the model is its own reference
    if objective == "ndpo":
        before, after = losses_after(recipe, 2, 0.1)
        assert after < before


def test_parts_of_a_batch_of_pairs_hold_whole_pairs(make, weights, review):
    """True clips in the first half and their negatives in the second, seen at one time with one noise."""
    keys = {"init_from": str(weights), "negatives": str(review), "objective": "dpo", "beta": 1.0}
    recipe = make(**keys, stages=((10, ((9, 2),)),))
    batch, seen = recipe.batch(3), []
    clips_of = {row["id"]: np.load(review / f"{row['id']}.npz") for row in verdicts.read_clips(review)}
    for name, latents in zip(recipe.ids(3), train_state.parts_of(batch, 2)["latents"], strict=True):
        np.testing.assert_array_equal(latents[0], clips_of[name][negatives.TRUE].astype(np.float32))
        np.testing.assert_array_equal(latents[1], clips_of[name]["latents"].astype(np.float32))
    recipe.dit = Recording(seen)
    recipe.loss(recipe.init(), recipe.constants(), {**batch, "latents": np.zeros_like(batch["latents"])},
                jax.random.key(0))  # fmt: skip
    for x, t, modal in seen:
        for some in (x, t, modal):
            np.testing.assert_array_equal(*np.split(some, 2))
            assert np.any(some[0] != some[1]) or some is modal


@pytest.fixture
def unlearn(make, weights, review):
    """A recipe of a preference on the clips of a review folder, by default those of `review`."""

    def unlearn(folder=review, **changes) -> DiTRecipe:
        keys = {"init_from": str(weights), "negatives": str(folder), "objective": "ndpo", "stages": ((10, ((9, 4),)),)}
        return make(**{**keys, **changes})

    return unlearn


def widened(row: dict) -> dict:
    """An example of pictures half as wide again."""
    grids = {name: value for name, value in row.items() if np.shape(value)[:3] == row["latents"].shape[:3]}
    wide = {name: np.concatenate([value, value[:, :, :2]], axis=2) for name, value in grids.items()}
    picture = np.concatenate([row["image"], row["image"][:, :16]], axis=1)
    return {**row, **wide, "image": picture, "face_mask": np.resize(row["face_mask"], 6)}


def test_negatives_of_several_sizes_are_unlearnt_a_size_at_a_time(unlearn, review):
    """As often as there are clips of a size: one in four here, which is repeated in a batch of more."""
    row = negatives.Negatives.read(str(review), "lips").rows[0]
    some = negatives.Negatives([row, widened(row), row, row], ["i2v"] * 4, ["a", "wide", "b", "c"])
    for objective in ("ndpo", "dpo"):
        recipe, widths = unlearn(objective=objective), []
        recipe.__dict__["_negatives"] = some
        for step in range(1, 61):
            ids, latents = recipe.ids(step), recipe.batch(step)["latents"]
            assert len(latents) == recipe.batch_size(step) == len(ids) * (2 if objective == "dpo" else 1)
            assert latents.shape[2] == latents.shape[3] + (0 if ids[0] != "wide" else -2)
            assert ids == ["wide"] * 4 or set(ids) <= {"a", "b", "c"}
            assert arrays_equal(recipe.batch(step, np.array([1]))["latents"], latents[1:2])
            widths.append(latents.shape[3])
        assert 5 < widths.count(6) < 25


def test_negatives_are_cut_to_a_batch_or_taken_whole(unlearn, weights, review, tiny, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    for frames, taken in ((5, 2), (9, 3), (13, 3)):
        recipe = unlearn(stages=((5, ((5, 4),)), (10, ((frames, 4),))))
        assert recipe.batch(7)["latents"].shape[1] == taken
        recipe.open()
        told = "2 of the 2 rejected clips are shorter than the 13 frames of a batch, down to 9: they are taken whole"
        assert (told in capsys.readouterr().out) == (frames == 13)


def test_clips_of_other_weights_than_those_that_unlearn_are_told(
    unlearn, weights, review, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    unlearn().open()
    words = f"the clips in {review} were made by other weights of dit and text and image than those in {weights}, which"
    assert f"note: {words} are to unlearn them" in capsys.readouterr().out
    folder = shutil.copytree(review, tmp_path / "review")
    hashes = weight_files.weight_hashes("tiny", weights, ("dit", "text", "image"))
    own = {"preset": "tiny", **{f"weights of {role}": value for role, value in hashes.items()}}
    for plan, said in (
        (json.dumps(own), ""),
        (json.dumps({**own, "weights of text": "0"}), "made by other weights of text than those in"),
        (None, f"note: {folder} has no plan.json, so nothing says whether the weights in {weights} made its clips"),
    ):
        (folder / "plan.json").unlink()
        if plan:
            (folder / "plan.json").write_text(plan)
        unlearn(folder).open()
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)
        (folder / "plan.json").touch()
    with pytest.raises(UserError, match=r"plan.json is damaged \(.*\): delete it if you know that the weights in"):
        unlearn(folder).open()
    (folder / "plan.json").write_text(json.dumps({**own, "preset": "flash"}))
    with pytest.raises(UserError, match=f"the clips in {folder} are of the preset flash, not of tiny: give others"):
        unlearn(folder).open()


def test_a_reference_that_is_not_there_is_told(unlearn, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    with pytest.raises(UserError, match=f"weights {tmp_path}/dit.safetensors does not exist"):
        unlearn(init_from=str(tmp_path)).open()


class Recording:
    """In place of a transformer: notes what it is asked for."""

    def __init__(self, seen: list):
        self.seen = seen

    def apply(self, variables, x, t, cond, modal):
        self.seen.append((np.asarray(x), np.asarray(t), np.asarray(modal)))
        return x


def test_tasks_join_where_weights_restart(make):
    tasks = ((4, (("t2v", 1.0),)), (7, (("i2v", 1.0),)), (10, (("i2v", 1.0),)))
    assert make(tasks=tasks, inter_task_ema=True).restarts() == (4, 7)
    assert make(tasks=tasks).restarts() == ()


# Puppets as requests


def test_every_other_clip_lets_the_voice_act_on_the_face_alone():
    clip = clips.make_clip("train", 1, 5)
    video = np.asarray(clip.render(64))
    rows = [requests.describe(clip, "i2v", DEMO, video, whole_face=whole) for whole in (True, False)]
    assert rows[0].face_mask.all()
    face = rows[1].face_mask.reshape(4, 4)
    assert face[1:3, 1:3].all() and not face.all()
    assert rows[0].has_image == 1.0
    assert requests.describe(clip, "t2v", DEMO, video, whole_face=True).has_image == 0.0


def test_the_lip_sync_mask_hides_the_mouth_and_little_else():
    clip = clips.make_clip("train", 2, 9)
    mask = requests.task_mask("lipsync", clip, 64, 64)[..., 0]
    _, seen = clip.render(64, parts=True)
    mouth = np.asarray(seen)[..., clips.renderer.PARTS.index("mouth")]
    assert (mouth * (1 - mask)).max() < 0.01
    assert mask.mean() < 0.15


# Which recipe


@pytest.mark.parametrize(("key", "value"), [("recipe", "gan"), ("preset", "huge")])
def test_unknown_recipes_and_presets_are_told(key, value):
    with pytest.raises(UserError, match=f"config key {key}: '{value}' is none of "):
        recipes.build(config("demo_vae.py", **{key: value}))
