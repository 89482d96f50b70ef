"""What training wrote, on its way to torch: exported weights, checkpoints, adapters."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from flax import traverse_util
from safetensors.torch import load_file

from convert import __main__ as command
from convert import engine
from convert.registry import MODELS
from emv3_jax import checkpoint
from emv3_jax.command_line import run_main
from emv3_jax.config import DEMO
from emv3_jax.pipeline import expected_params
from emv3_jax.training import adapters, checkpoints
from emv3_jax.training import state as train_state

pytestmark = pytest.mark.usefixtures("tiny_models")
DITS = ("dit-preview", "dit-flash")
SCALE = 0.3
ROOT = Path(__file__).parents[2]
FIELDS = ("width", "heads", "layers", "ffn", "time_features", "text_width", "image_width", "audio_width")


def run(*arguments) -> int:
    return run_main(command.main, [str(argument) for argument in arguments])


def params_of(name, seed=0):
    """Random parameters of a tiny model."""
    model, rng = MODELS[name], np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), model.tree(model.cfg))


def tensors_of(name, params):
    """Torch tensors of parameters, without the command line."""
    return engine.to_torch(MODELS[name].naming().table(MODELS[name].cfg), params)


def same(path, tensors) -> bool:
    found = load_file(path)
    assert found.keys() == tensors.keys()
    return all(np.array_equal(found[key].numpy(), value) for key, value in tensors.items())


def save(workdir, states):
    """Checkpoints as training.loop writes them: step -> (params, moving average)."""
    with checkpoints.opened(workdir) as kept:
        for step, (params, average) in states.items():
            state = train_state.init_state(params, optax.adamw(1e-3))
            kept.save(step, dataclasses.replace(state, step=jnp.int32(step), ema=jax.tree.map(jnp.asarray, average)))
    return workdir / "checkpoints"


def lines(capsys):
    """What was said on stderr, after checking that it is an error and no stack of calls."""
    text = capsys.readouterr().err
    assert text.startswith("error: ") and "Traceback" not in text
    return text.splitlines()


@pytest.mark.parametrize("name", DITS)
def test_exported_weights_are_recognised_and_go_out_whole(tmp_path, capsys, name):
    params = params_of(name)
    checkpoint.save_models(tmp_path / "weights", {"dit": params})
    assert run("to-torch", tmp_path / "weights", "--to", tmp_path / "out") == 0
    assert same(tmp_path / f"out/{name}.safetensors", tensors_of(name, params))
    file, narrow = tmp_path / "weights/dit.safetensors", tmp_path / "narrow.safetensors"
    assert run("to-torch", file, "--to", narrow, "--dtype", "bfloat16") == 0
    assert "values are rounded from float32 to bfloat16" in capsys.readouterr().out
    assert {str(value.dtype) for value in load_file(narrow).values()} == {"torch.bfloat16"}
    assert run("to-torch", file, "--to", narrow) == 2
    assert "exists: give --overwrite, or another output" in lines(capsys)[0]


def test_every_model_of_the_demo_is_recognised_by_its_presets_sizes(tmp_path, capsys):
    shapes = expected_params(DEMO)
    rng = np.random.default_rng(0)
    models = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float16), dict(shapes))
    checkpoint.save_models(tmp_path / "weights", models, "float16")
    assert run("to-torch", tmp_path / "weights", "--to", tmp_path / "out") == 0
    found = {path.stem: load_file(path) for path in (tmp_path / "out").iterdir()}
    assert found.keys() == {"dit-preview", "umt5", "clip", "vae"}
    head = found["dit-preview"]["head.head.weight"]
    assert head.dtype == torch.float16
    np.testing.assert_array_equal(head.numpy(), models["dit"]["head"]["out"]["kernel"].T)
    trained = {role: models[role] for role in ("dit", "text")}
    folder = save(tmp_path, {7: (trained, trained)})
    assert run("to-torch", folder, "--to", tmp_path / "again", "--dtype", "float32") == 0
    assert {path.stem for path in (tmp_path / "again").iterdir()} == {"dit-preview", "umt5"}
    capsys.readouterr()
    assert run("to-torch", folder, "--model", "clip", "--to", tmp_path / "one") == 2
    assert "--model, --set and --base are for one model" in lines(capsys)[0]
    assert run("to-torch", folder, "--to", tmp_path / "one.safetensors") == 2
    assert lines(capsys)[0].endswith("one.safetensors cannot hold 2 models: give a folder")


def test_of_a_checkpoint_the_average_or_the_weights_are_read_and_nothing_else(tmp_path, monkeypatch):
    trees = [{"dit": params_of("dit-flash", seed)} for seed in range(4)]
    folder = save(tmp_path, {3: (trees[0], trees[1]), 10: (trees[2], trees[3])})
    read = []
    plain = checkpoints.read_parameters
    monkeypatch.setattr(
        checkpoints, "read_parameters", lambda where, paths, *more: read.extend(paths) or plain(where, paths, *more)
    )
    asked = [
        ((folder,), trees[3], "ema"),  # the newest by number, not by name
        ((folder / "3",), trees[1], "ema"),
        ((folder, "--unaveraged"), trees[2], "params"),
        ((folder / "3", "--unaveraged"), trees[0], "params"),
    ]
    for number, (arguments, tree, field) in enumerate(asked):
        read.clear()
        assert run("to-torch", *arguments, "--to", tmp_path / f"out{number}") == 0
        assert same(tmp_path / f"out{number}/dit-flash.safetensors", tensors_of("dit-flash", tree["dit"]))
        assert read.pop(0) == "checksums"
        assert read and all(path.startswith(f"{field}/dit/") for path in read)


def test_parameters_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, capsys):
    params = params_of("dit-preview")
    flat = traverse_util.flatten_dict(params, sep="/")
    file, out = tmp_path / "weights/dit.safetensors", tmp_path / "out"
    cases = [
        ({k: v for k, v in flat.items() if k != "head/out/bias"}, "missing: head/out/bias"),
        (flat | {"head/more/bias": np.zeros(1, np.float32)}, "no rule leads to head/more/bias (unexpected parameter)"),
        (flat | {"audio_tokens/first_in/bias": np.zeros(1, np.float32)}, "no rule leads to audio_tokens/first_in/bias"),
        (flat | {"head/out/bias": np.zeros(3, np.float32)}, "mis-shaped: head/out/bias is [3], the model wants [64]"),
        (flat | {"head/out/bias": np.zeros(64, np.int32)}, "mis-typed: head/out/bias is int32"),
    ]
    for tensors, problem in cases:
        checkpoint.write_safetensors(file, tensors)
        assert run("to-torch", tmp_path / "weights", "--to", out) == 2
        said = lines(capsys)
        assert said[0].endswith("fit the model:") and "dit.safetensors: " in said[0] and problem in said[1]
    narrower = dict(flat, **{path: flat[path][..., :90] for path in ("blocks/mlp/up/kernel", "blocks/mlp/up/bias")})
    narrower["blocks/mlp/down/kernel"] = flat["blocks/mlp/down/kernel"][:, :90]
    checkpoint.write_safetensors(file, narrower)
    assert run("to-torch", file, "--to", out) == 2
    assert lines(capsys)[-1] == "The file has other sizes; if that is meant: --set ffn=90"
    assert not out.exists()
    assert run("to-torch", file, "--set", "ffn=90", "--to", out) == 0
    capsys.readouterr()
    assert run("to-torch", file, "--model", "vae", "--to", tmp_path / "vae") == 2
    assert "keys do not fit the model:" in lines(capsys)[0] and not (tmp_path / "vae").exists()


def test_what_holds_no_whole_model_is_refused_with_the_place_of_one(tmp_path, capsys):
    dit, leaf = params_of("dit-preview"), np.zeros((2, 2), np.float32)
    vae, pairs = {"encoder": {"conv_in": {"kernel": leaf}}}, {"head": {"out": {"down": leaf, "up": leaf}}}
    weights, out = tmp_path / "weights", tmp_path / "out"
    whole = save(tmp_path, {1: ({"dit": dit}, {"dit": dit})})
    checkpoint.save_models(weights, {"dit": dit})
    cases = [
        ((tmp_path,), f"{tmp_path} is what train.py worked in: give {weights} or {whole}"),
        ((weights, "--unaveraged"), f"{weights} is no training checkpoint, which --unaveraged is for"),
        ((save(tmp_path / "vae", {1: (vae, vae)}),), "latents are normalised where it is exported, give"),
        ((save(tmp_path / "lora", {1: (pairs, pairs)}),), f"give {tmp_path}/lora/weights/adapters, or {tmp_path}/lora"),
        ((tmp_path / "none",), "no converted weights at"),
    ]
    for arguments, words in cases:
        assert run("to-torch", *arguments, "--to", out) == 2
        (line,) = lines(capsys)
        assert words in line
    for data in (whole / "1/default").rglob("d/*"):
        data.write_bytes(data.read_bytes()[:20_000])
    sizes = [f"--set={field}={getattr(MODELS['dit-preview'].cfg, field)}" for field in FIELDS]
    words = [sys.executable, "-m", "convert", "to-torch", whole, *sizes, "--to", out]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)  # stderr whole, to its end
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "is damaged and cannot be read" in line and line.endswith("give another step")
    assert not out.exists() or not any(out.iterdir())
    (whole / "1/default/_METADATA").unlink()
    assert run("to-torch", whole, "--to", out) == 2
    assert "is damaged and cannot be read" in lines(capsys)[0]


def test_a_checkpoint_whose_bytes_changed_is_refused_and_so_is_one_without_checksums(tmp_path, capsys):
    tree, out = {"dit": params_of("dit-preview")}, tmp_path / "out"
    folder, line = save(tmp_path, {1: (tree, tree)}), ""
    files = {path: path.read_bytes() for path in (folder / "1/default/ocdbt.process_0/d").iterdir()}
    places = iter(np.arange(0.5, 20) / 20)  # in every file, for which array lies where is not the same each time
    while "is not what was saved" not in line:  # a place is of the average, and the value can be read
        at = next(places)
        for path, whole in files.items():
            changed = bytearray(whole)
            changed[int(at * len(whole))] ^= 1
            path.write_bytes(changed)
        if run("to-torch", folder, "--to", out, "--overwrite") == 2:
            (line,) = lines(capsys)
            assert f"{folder}/1" in line and "is damaged" in line and line.endswith("give another step")
        else:
            assert same(out / "dit-preview.safetensors", tensors_of("dit-preview", tree["dit"]))
            shutil.rmtree(out)
        assert not out.exists() or not any(out.iterdir())
    state = train_state.init_state(tree, optax.adamw(1e-3))
    with ocp.CheckpointManager(tmp_path / "old", item_handlers=ocp.StandardCheckpointHandler()) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
    assert run("to-torch", tmp_path / "old", "--to", out) == 2
    assert "saved by an earlier version of this program, without checksums" in lines(capsys)[0]


def export_adapters(folder, params, pattern, dtype="float32"):
    """A run's weights/ folder, as training.dit_recipe exports adapters of rank 3 that have learnt; the merged tree."""
    rng = np.random.default_rng(5)
    made = adapters.init(jax.random.key(0), params, 3, pattern)
    made = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), made)
    tree = {"scale": np.float32(SCALE), "adapters": made}
    checkpoint.save_params(folder / "adapters/dit.safetensors", tree, dtype)
    merged = adapters.merged(params, jax.tree.map(jnp.float32, made), SCALE)
    checkpoint.save_models(folder, {"dit": jax.tree.map(np.asarray, merged)})
    return folder


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("dit-preview", r"blocks/.*|cross_kv/.*|head/out|audio_tokens/proj|time_projection"),
        ("dit-flash", r"blocks/self_attention/(query|out)|cross_kv/audio/.*|audio_tokens/.*|text_embedding/up"),
    ],
)
def test_adapters_in_torch_are_the_merged_weights(tmp_path, capsys, name, pattern):
    """W + alpha/r·B·A of the base's torch weights is what the merged weights become in torch."""
    params = params_of(name)
    weights = export_adapters(tmp_path / "weights", params, pattern)
    assert run("to-torch", weights / "adapters", "--to", tmp_path / "out") == 0
    assert run("to-torch", weights, "--to", tmp_path / "out") == 0
    assert f"to have them alone, give {weights / 'adapters'}\n" in capsys.readouterr().out
    merged, base = load_file(tmp_path / f"out/{name}.safetensors"), tensors_of(name, params)
    lora = load_file(tmp_path / "out/dit-lora.safetensors")
    adapted = {key.removesuffix(".alpha") for key in lora if key.endswith(".alpha")}
    assert len(lora) == 3 * len(adapted)
    for key, weight in base.items():
        want, stem = torch.tensor(weight), "diffusion_model." + key.removesuffix(".weight")
        if key.endswith(".weight") and stem in adapted:
            down, up, alpha = (lora.pop(stem + end) for end in (".lora_A.weight", ".lora_B.weight", ".alpha"))
            assert down.shape == (3, weight.shape[1]) and up.shape == (weight.shape[0], 3) and alpha.shape == ()
            want = want + alpha / len(down) * (up @ down)
            torch.testing.assert_close(merged[key], want, rtol=1e-5, atol=1e-5)  # sums in another order
        else:
            assert torch.equal(merged[key], want)
    assert not lora


def test_adapters_of_any_variant_have_the_names_that_the_variants_share(tmp_path, capsys):
    """Blocks that both variants have: it makes no difference whose they are. Half precision comes out as it was."""
    file = export_adapters(tmp_path, params_of("dit-preview"), "blocks/mlp/up", "bfloat16") / "adapters/dit.safetensors"
    for model in ("dit-preview", "dit-flash", "dit-base"):
        assert run("to-torch", file, "--model", model, "--to", tmp_path / f"{model}.safetensors") == 0
    assert run("to-torch", file, "--to", tmp_path / "any.safetensors") == 0
    want = load_file(tmp_path / "any.safetensors")
    assert want["diffusion_model.blocks.1.ffn.0.alpha"] == torch.tensor(float(np.float32(SCALE)) * 3)
    assert want["diffusion_model.blocks.1.ffn.0.lora_A.weight"].dtype == torch.bfloat16
    assert len(want) == 6
    for model in ("dit-preview", "dit-flash", "dit-base"):
        found = load_file(tmp_path / f"{model}.safetensors")
        assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)
    stored = checkpoint.load_params(file)["adapters"]["blocks"]["mlp"]["up"]["down"]
    np.testing.assert_array_equal(
        want["diffusion_model.blocks.1.ffn.0.lora_A.weight"].float().numpy(), stored[1].T.astype(ml_dtypes.bfloat16)
    )
    assert run("to-torch", file, "--to", tmp_path / "wide.safetensors", "--dtype", "float32") == 0
    capsys.readouterr()


def test_adapters_that_no_lora_file_can_hold_are_refused(tmp_path, capsys):
    params, out = params_of("dit-preview"), tmp_path / "out"
    cases = [
        ("patch_embedding", (), "not linear: patch_embedding/kernel is conv3d in torch, a LoRA file holds linear"),
        ("audio_tokens/proj", ("--model", "dit-flash"), "unexpected: the model has no audio_tokens/proj/kernel"),
        ("head/out", ("--set", "width=96"), "mis-shaped: adapters/head/out/down is [48, 3], the model wants [96, r]"),
    ]
    for pattern, more, problem in cases:
        folder = export_adapters(tmp_path / pattern, params, pattern) / "adapters"
        assert run("to-torch", folder, *more, "--to", out) == 2
        said = lines(capsys)
        assert said[0].endswith("1 key does not fit the model:") and problem in said[1]
    folder = tmp_path / "head/out/adapters"
    assert run("to-torch", folder, "--naming", "diffusers", "--to", out) == 2
    assert "holds adapters, whose names are released ones" in lines(capsys)[0]
    tree = checkpoint.load_params(folder / "dit.safetensors")
    flat = {path: leaf.astype(np.float32) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    broken = [
        ({k: v for k, v in flat.items() if not k.endswith("/up")}, "missing: adapters/head/out/up"),
        (flat | {"colour": np.zeros(1, np.float32)}, "unexpected: colour"),
        (flat | {"scale": np.zeros(2, np.float32)}, "mis-shaped: scale is no single number"),
        (flat | {"adapters/head/out/up": np.zeros((3, 64), np.int32)}, "mis-typed: adapters/head/out/up is int32"),
    ]
    for tensors, problem in broken:
        checkpoint.write_safetensors(folder / "dit.safetensors", tensors)
        assert run("to-torch", folder, "--to", out) == 2
        assert problem in lines(capsys)[1]
    moved = {path.replace("head/out", "hat"): leaf for path, leaf in flat.items()}
    checkpoint.write_safetensors(folder / "dit.safetensors", moved)
    assert run("to-torch", folder, "--to", out) == 2
    assert lines(capsys)[0].endswith("no transformer (dit-preview, dit-flash, dit-base) has all of hat")
    assert run("to-torch", folder, "--model", "vae", "--to", out) == 2
    assert "holds adapters, and vae has none" in lines(capsys)[0]
    assert not out.exists()
