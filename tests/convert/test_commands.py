"""The command line, from torch files to Orbax folders and back."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from convert import __main__ as command
from convert import writers
from convert.registry import MODELS
from convert.sources import open_source
from emv3_jax.command_line import run_main
from emv3_jax.converted import RECORD, load_converted, read_record
from emv3_jax.errors import UserError

ROOT = Path(__file__).parents[2]
VAE_SIZES = ["--set", "width=4", "--set", "res_blocks=1"]


def run(*arguments: object) -> int:
    return run_main(command.main, [str(argument) for argument in arguments])


def same(path: Path, tensors: dict[str, np.ndarray]) -> bool:
    source = open_source(path)
    assert source.header.keys() == tensors.keys()
    return all(
        source.header[key].dtype == value.dtype and source.read(key).tobytes() == value.tobytes()
        for key, value in tensors.items()
    )


FORMS = [(name, naming.name, form) for name in MODELS for naming in MODELS[name].namings for form in naming.forms]


@pytest.mark.parametrize(("model", "naming", "form"), FORMS)
def test_there_and_back_byte_for_byte(tiny_models, tensors_of, write, tmp_path, model, naming, form):
    tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors_of(model, naming, form).items()}
    source = write(tmp_path / "a.safetensors", tensors)
    assert run("to-jax", source, "--to", tmp_path / "out") == 0
    assert read_record(tmp_path / "out" / model).dtype == "bfloat16"
    recorded = read_record(tmp_path / "out" / model).naming
    assert run("to-torch", tmp_path / "out" / model, "--naming", recorded, "--to", tmp_path / "b.safetensors") == 0
    assert same(tmp_path / "b.safetensors", tensors)


def test_one_safetensors_file_instead_of_a_folder(tensors_of, write, tmp_path, capsys):
    """The positions of the arguments that earlier versions had still work."""
    source, middle, back = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    tensors = tensors_of("vae")
    write(source, tensors)
    assert run("to-jax", "--model", "vae", *VAE_SIZES, source, middle) == 0
    assert open_source(middle).header["encoder/conv_in/kernel"].shape == (3, 3, 3, 3, 4)
    assert run("to-torch", middle, back) == 0  # model and sizes stand in the file's own header
    assert same(back, tensors)
    assert run("inspect", middle) == 0
    assert "vae: Wan 2.1 video VAE, converted" in capsys.readouterr().out


def released(root: Path, tensors_of, write, dtype=np.float32) -> Path:
    """The folders of the preview variant as users have them, and some files that have no part in it."""
    base = root / "Wan2.1-Fun-V1.1-1.3B-InP"
    files = {
        base / "diffusion_pytorch_model.safetensors": tensors_of("dit-base"),
        base / "Wan2.1_VAE.safetensors": tensors_of("vae"),
        base / "models_t5_umt5-xxl-enc-bf16.safetensors": tensors_of("umt5"),
        base / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors": tensors_of("clip")
        | {"textual.x": np.zeros(3, np.float32), "visual.post_norm.weight": np.ones(2, np.float32)},
        root / "transformer" / "diffusion_pytorch_model.safetensors": tensors_of("dit-preview"),
        root / "wav2vec2-base-960h" / "model.safetensors": tensors_of("wav2vec2"),
    }
    for path, tensors in files.items():
        write(path, {key: value.astype(dtype) for key, value in tensors.items()})
    (root / "wav2vec2-base-960h" / "pytorch_model.bin").write_bytes(b"the same as a pickle")
    (base / "google/umt5-xxl").mkdir(parents=True)
    (base / "google/umt5-xxl/spiece.model").write_bytes(b"pieces")
    return root


PREVIEW = ("dit-preview", "vae", "umt5", "clip", "wav2vec2")


def test_all_released_folders_in_one_go(tiny_models, tensors_of, write, tmp_path, capsys):
    root, out = released(tmp_path / "released", tensors_of, write), tmp_path / "out"
    assert run("to-jax", "--from", root, "--variant", "preview", "--to", out, "--dtype", "bfloat16") == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted((*PREVIEW, "tokenizer"))
    assert (out / "tokenizer" / "spiece.model").read_bytes() == b"pieces"
    for line in (
        f"found     vae: {root}/Wan2.1-Fun-V1.1-1.3B-InP/Wan2.1_VAE.safetensors",
        "pytorch_model.bin: model.safetensors is taken",
        "diffusion_pytorch_model.safetensors: the Wan-Fun base transformer, without audio, which",
        "clip: 1 tensors left out: textual (1) (the text tower; prompts go through umT5)",
        "vae: values are rounded from float32 to bfloat16",
    ):
        assert line in printed
    for name in PREVIEW:
        model = MODELS[name]
        params = load_converted(out / name, model.tree(model.cfg))
        assert params and read_record(out / name).sources[0]["sha256"]

    # Once more: nothing is written anew. With other weights: refused, unless asked for.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run("to-jax", "--from", root, "--variant", "preview", "--to", out, "--dtype", "bfloat16") == 0
    assert capsys.readouterr().out.count("unchanged") == 6
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run("to-jax", "--from", root, "--variant", "preview", "--to", out) == 2
    assert "exists and holds something else: give --overwrite, or another output" in capsys.readouterr().err
    assert run("to-jax", "--from", root, "--variant", "preview", "--to", out, "--overwrite") == 0
    assert read_record(out / "vae").dtype == "float32"

    # And all the way back.
    assert run("to-torch", out, "--to", tmp_path / "torch") == 0
    printed = capsys.readouterr().out
    assert "clip: not written, as the model does not hold it: the text tower" in printed
    for name in PREVIEW:
        assert same(tmp_path / "torch" / f"{name}.safetensors", tensors_of(name))
    original = root / "Wan2.1-Fun-V1.1-1.3B-InP/models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"
    assert run("to-torch", out / "clip", "--to", tmp_path / "whole.safetensors", "--base", original) == 0
    assert open_source(tmp_path / "whole.safetensors").header == dict(open_source(original).header)


def test_what_is_missing_or_does_not_fit_is_said_before_anything_is_written(
    tiny_models, tensors_of, write, tmp_path, capsys
):
    root, out = released(tmp_path / "released", tensors_of, write), tmp_path / "out"
    assert run("to-jax", "--from", root, "--variant", "flash", "--to", out) == 2
    error = capsys.readouterr().err
    assert "lacks 2 parts: dit-flash: diffusion_pytorch_model.safetensors of the flash transformer; wav2vec2: " in error
    vae, wav2vec2 = tensors_of("vae"), tensors_of("wav2vec2")
    del vae["conv1.bias"]
    write(root / "Wan2.1-Fun-V1.1-1.3B-InP/Wan2.1_VAE.safetensors", vae)
    write(root / "wav2vec2-base-960h/model.safetensors", wav2vec2 | {"more": np.zeros(1, np.float32)})
    assert run("to-jax", "--from", root, "--variant", "preview", "--to", out) == 2
    error = capsys.readouterr().err
    assert "Wan2.1_VAE.safetensors: 1 key does not fit the model:\n  missing: conv1.bias\n" in error
    assert "model.safetensors: 1 key does not fit the model:\n  unexpected: more\n" in error
    assert not out.exists()
    write(root / "other" / "diffusion_pytorch_model.safetensors", tensors_of("dit-preview"))
    assert run("to-jax", "--from", root, "--variant", "preview", "--to", out) == 2
    assert "dit-preview is there 2 times, keep one" in capsys.readouterr().err


def test_all_new_outputs_together_must_find_room(tiny_models, tensors_of, write, tmp_path, capsys, monkeypatch):
    root, out = released(tmp_path / "released", tensors_of, write), tmp_path / "out"
    arguments = ["to-jax", "--from", root, "--variant", "preview", "--to", out]
    sizes = {name: sum(value.nbytes for value in tensors_of(name).values()) for name in PREVIEW}
    free = SimpleNamespace(free=sum(sizes.values()) - 1)
    monkeypatch.setattr(writers.shutil, "disk_usage", lambda folder: free)
    assert run(*arguments) == 2
    assert "make room there" in capsys.readouterr().err and not any(out.iterdir())
    vae = root / "Wan2.1-Fun-V1.1-1.3B-InP/Wan2.1_VAE.safetensors"
    assert run("to-jax", vae, "--to", out) == 0
    free.free -= sizes["vae"] - 1  # now just enough for the others
    assert run(*arguments) == 0


def test_flash_with_the_weights_that_its_file_lacks_from_a_base(tiny_models, tensors_of, write, tmp_path, capsys):
    """A fine-tune among the released folders, with its base elsewhere; the base's own ignored keys are named."""
    root, out = released(tmp_path / "released", tensors_of, write), tmp_path / "out"
    (root / "wav2vec2-base-960h").rename(root / "chinese-wav2vec2-base")
    tuned = tensors_of("dit-flash", seed=1)
    tuned = {key: value for key, value in tuned.items() if not key.startswith("head.")}
    write(root / "flash/diffusion_pytorch_model.safetensors", tuned)
    arguments = ["to-jax", "--from", root, "--variant", "flash", "--to", out]
    assert run(*arguments) == 2
    assert "missing: head.head.weight" in capsys.readouterr().err and not out.exists()
    base = tensors_of("dit-base")
    assert run(*arguments, "--base", write(tmp_path / "base.safetensors", base)) == 0
    assert "tensors stay from the base" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted((*PREVIEW[1:], "dit-flash", "tokenizer"))
    assert run("to-torch", out / "dit-flash", "--to", tmp_path / "back.safetensors") == 0
    assert same(tmp_path / "back.safetensors", tuned | {key: base[key] for key in base if key.startswith("head.")})


def test_what_the_base_holds_in_vain_is_said(tiny_models, tensors_of, write, tmp_path, capsys):
    whole = tensors_of("clip")
    top = write(tmp_path / "a.safetensors", {key: value for key, value in whole.items() if "pre_norm" in key})
    base = write(tmp_path / "b.safetensors", whole | {"textual.x": np.zeros(3, np.float32)})
    assert run("to-jax", top, "--model", "clip", "--base", base, "--to", tmp_path / "out") == 0
    assert f"clip: 1 tensors of the base {base} left out: textual (1) (the text tower" in capsys.readouterr().out


def test_the_original_may_have_another_form_and_both_names_of_a_tensor(
    tiny_models, tensors_of, write, tmp_path, capsys
):
    """--base of to-torch: the form is that of the file itself, and copied tensors are rounded as the others are."""

    def back(model: str, tensors: dict, *more: object) -> Path:
        name = f"{model}-{len(list(tmp_path.iterdir()))}.safetensors"
        original = write(tmp_path / name, tensors)
        words = ["--naming", "huggingface", "--base", original, "--to", tmp_path / f"back-{name}", *more]
        assert run("to-torch", tmp_path / "out" / model, *words) == 0
        return tmp_path / f"back-{name}"

    umt5 = tensors_of("umt5", "huggingface")
    assert run("to-jax", write(tmp_path / "umt5.safetensors", umt5), "--to", tmp_path / "out") == 0
    assert same(back("umt5", umt5 | {"encoder.embed_tokens.weight": umt5["shared.weight"]}), umt5)

    clip, bare = (tensors_of("clip", "huggingface", form) for form in ("vision_model.", "without prefix"))
    assert run("to-jax", write(tmp_path / "clip.safetensors", clip), "--to", tmp_path / "out") == 0
    extra = {"post_layernorm.weight": np.ones(32, np.float32)}
    assert same(back("clip", bare | extra), bare | extra)
    capsys.readouterr()
    narrow = {key: value.astype(ml_dtypes.bfloat16) for key, value in (bare | extra).items()}
    assert same(back("clip", bare | extra, "--dtype", "bfloat16"), narrow)
    assert "clip: values are rounded from float32 to bfloat16\n" in capsys.readouterr().out
    # Wide values first, whatever they are: readers map the file, and want every tensor at a multiple of its width.
    assert run("to-jax", tmp_path / "clip.safetensors", "--to", tmp_path / "out", "--dtype", "bfloat16",
               "--overwrite") == 0  # fmt: skip
    mixed = back("clip", bare | extra)
    assert list(open_source(mixed).header)[0] == "post_layernorm.weight"


def test_a_fine_tune_is_laid_over_its_base(tiny_models, tensors_of, write, tmp_path, capsys):
    tuned = tensors_of("dit-preview", seed=1)
    tuned = {key: value for key, value in tuned.items() if "audio" in key or "self_attn.q" in key}
    top = write(tmp_path / "tuned.safetensors", tuned)
    tensors = tensors_of("dit-base")
    arguments = ["to-jax", top, "--model", "dit-preview", "--to"]
    assert run(*arguments, tmp_path / "none") == 2
    assert capsys.readouterr().err.endswith("lay it over the others with --base FILE.\n")
    for naming in ("released", "diffusers"):
        base = write(tmp_path / f"{naming}.safetensors", tensors_of("dit-base", naming))
        out = tmp_path / naming
        assert run(*arguments, out, "--base", base) == 0
        printed = capsys.readouterr().out
        replaced = sum("audio" not in key for key in tuned)
        assert f"{len(tensors) - replaced} tensors stay from the base {base}: " in printed
        assert f"{replaced} of its tensors are replaced: blocks.*." in printed
        assert [file["file"] for file in read_record(out / "dit-preview").sources] == [top.name, base.name]
        assert run("to-torch", out / "dit-preview", "--to", out / "back.safetensors") == 0
        assert same(out / "back.safetensors", tensors | tuned)


def test_inspect(tiny_models, tensors_of, write, tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "a.safetensors", tensors_of("dit-flash"))
    assert run("inspect", file) == 0
    printed = capsys.readouterr().out
    assert "dit-flash: EchoMimicV3 flash transformer" in printed and "as released" in printed
    assert "fits       yes" in printed and "float32" in printed
    assert run("inspect", file, "--keys") == 0
    assert "  blocks.0.ffn.0.weight  float32  [96, 48]\n" in capsys.readouterr().out
    bad = tensors_of("vae") | {"more": np.zeros(1, np.float32)}
    del bad["conv1.bias"]
    assert run("inspect", write(tmp_path / "b.safetensors", bad)) == 1
    printed = capsys.readouterr().out
    assert "fits       no: 2 problems" in printed and "missing: conv1.bias" in printed and "unexpected: more" in printed
    monkeypatch.undo()  # the released sizes again
    assert run("inspect", file) == 0
    printed = capsys.readouterr().out
    assert "not the released ones: width=48 layers=2 ffn=96" in printed and "yes, with these sizes" in printed
    assert run("inspect", write(tmp_path / "c.safetensors", {"foo": np.zeros(1, np.float32)})) == 1
    assert "no key is known" in capsys.readouterr().out
    some = {key: value for key, value in tensors_of("dit-flash").items() if "self_attn" in key}
    assert run("inspect", write(tmp_path / "d.safetensors", some)) == 1
    assert "not certain" in capsys.readouterr().out


def test_inspect_compares_the_bytes_of_converted_weights_with_their_record(
    tiny_models, tensors_of, write, tmp_path, capsys
):
    out = tmp_path / "out"
    for model in ("vae", "clip"):
        assert run("to-jax", write(tmp_path / f"{model}.safetensors", tensors_of(model)), "--to", out) == 0
    capsys.readouterr()
    assert run("inspect", out) == 0  # each model in the folder
    printed = capsys.readouterr().out
    assert f"{out}/clip\n" in printed and f"{out}/vae\n" in printed and printed.count("fits       yes") == 2
    data = max((path for path in (out / "vae").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(changed)
    for path in (out, out / "vae"):
        assert run("inspect", path) == 1
        name = data.relative_to(out / "vae")
        assert f"changed since they were written: {name}; convert the weights again\n" in capsys.readouterr().out
    assert run("inspect", out / "clip") == 0
    (out / "clip" / RECORD).write_text("{")  # cannot be read at all; the others are described all the same
    assert run("inspect", out) == 1
    printed = capsys.readouterr().out
    assert f"{out}/vae\n" in printed and f"damaged    {out}/clip/{RECORD} is damaged" in printed


def test_other_sizes_are_refused_with_the_settings_that_would_fit(tensors_of, write, tmp_path, capsys):
    file = write(tmp_path / "a.safetensors", tensors_of("vae"))
    assert run("to-jax", file, "--model", "vae", "--set", "res_blocks=1", "--to", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.splitlines()[0].endswith("keys do not fit the model:")
    assert error.endswith("The file has other sizes; if that is meant: --set width=4 --set res_blocks=1\n")
    assert run("to-jax", file, *VAE_SIZES, "--to", tmp_path / "out") == 0
    assert read_record(tmp_path / "out/vae").config["width"] == 4


def test_errors_exit_2_with_one_clear_line(tensors_of, write, tmp_path, capsys):
    source, output = write(tmp_path / "a.safetensors", {"foo": np.zeros(1, np.float32)}), tmp_path / "b.safetensors"
    (tmp_path / "empty").mkdir()
    cases = [
        (["to-jax", "--model", "dit-preview", source, output], "keys do not fit the model:"),
        (["to-torch", "--model", "vae", source, output], "keys do not fit the model:"),
        (["to-torch", source, output], "its keys are those of no known model"),
        (["to-torch", tmp_path / "empty", output], "holds no converted weights and none that were trained"),
        (["to-jax", "--model", "vae", "--set", "colour=3", source, output], "--set colour=3: give NAME=N"),
        (["to-jax", "--model", "vae", source, source], "give another output"),
        (["to-jax", source, output], "those of no known model"),
        (["to-jax", source], "say where to write, once: --to OUT"),
        (["to-jax", source, output, "--to", output], "say where to write, once"),
        (["to-jax", "--to", output], "give one checkpoint, or --from DIR with --variant, not both"),
        (["to-jax", "--from", tmp_path, "--to", output], "--from needs --variant"),
        (["to-jax", "--from", tmp_path / "none", "--variant", "flash", "--to", tmp_path / "o"], "no such folder"),
        (["inspect", tmp_path / "none.safetensors"], "does not exist"),
        (["inspect"], "the following arguments are required: FILE; see --help"),
        (["to-jax", source, output, "--dtype", "int3"], "--dtype: invalid choice: 'int3'"),
        (["to-jax", source, output, "--colour"], "unrecognized arguments: --colour; see --help"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2
        first = capsys.readouterr().err.splitlines()[0]
        assert first.startswith("error: ") and message in first
    assert not output.exists()


LIMITED = """
import resource, sys
from convert import __main__ as command
from emv3_jax.command_line import run_main
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.exit(max(run_main(command.main, ["to-jax", sys.argv[1], "--set", "width=4", "--set", "res_blocks=1", "--to", out])
             for out in sys.argv[2:]))
"""
KILLED = """
import os, signal, sys
from convert import __main__ as command, jobs
from emv3_jax.command_line import run_main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with Ctrl-C ignored
class Bar:
    def __enter__(self): return lambda count: os.kill(os.getpid(), signal.SIGKILL)
    def __exit__(self, *_): pass
plain = jobs.progress
jobs.progress = lambda what, total: plain(what, total) if "SHA" in what else Bar()
arguments = ["to-jax", sys.argv[1], "--set", "width=4", "--set", "res_blocks=1", "--to", sys.argv[2]]
sys.exit(run_main(command.main, arguments))
"""


def subprocess_of(code: str, *arguments: object) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_a_disk_that_cannot_take_it_ends_with_one_line_and_leaves_nothing(tensors_of, write, tmp_path):
    """The system's limit on the size of a file stands in for a full disk: the same calls fail in the same places."""
    source = write(tmp_path / "a.safetensors", tensors_of("vae"))
    done = subprocess_of(LIMITED, source, tmp_path / "out", tmp_path / "file" / "b.safetensors")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: output {tmp_path}/out/vae could not be written: file too large",
        f"error: output {tmp_path}/file/b.safetensors could not be written: file too large",
    ]
    assert not any((tmp_path / "out").iterdir()) and not any((tmp_path / "file").iterdir())


@pytest.mark.parametrize(("number", "words"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_a_run_that_is_told_to_stop_leaves_nothing(tensors_of, write, tmp_path, number, words):
    source = write(tmp_path / "a.safetensors", tensors_of("vae"))
    code = KILLED.replace("SIGKILL", number.name)
    for out, folder in ((tmp_path / "out", tmp_path / "out"), (tmp_path / "b/b.safetensors", tmp_path / "b")):
        done = subprocess_of(code, source, out)
        assert done.returncode == 128 + number
        assert done.stderr.splitlines()[-1] == words and "Traceback" not in done.stderr
        assert not any(folder.iterdir())


def test_a_killed_run_leaves_nothing_that_loads_and_the_next_one_cleans_up(tensors_of, write, tmp_path):
    source, out = write(tmp_path / "a.safetensors", tensors_of("vae")), tmp_path / "out"
    done = subprocess_of(KILLED, source, out)
    assert done.returncode == -signal.SIGKILL
    left = [path for path in out.rglob("*") if path.is_dir()]
    assert left and not (out / "vae").exists() and not list(out.rglob(RECORD))
    model = MODELS["vae"]
    for folder in (out / "vae", *left):
        with pytest.raises(UserError):
            load_converted(folder, model.tree(model.cfg))
    assert run("to-torch", out, "--to", tmp_path / "back") == 2
    assert run("to-jax", source, *VAE_SIZES, "--to", out) == 0
    assert [path.name for path in out.iterdir()] == ["vae"]
    assert json.loads((out / "vae" / RECORD).read_text())["model"] == "vae"


def test_the_embedding_of_hugging_face_may_have_either_name_or_both(tiny_models, tensors_of, write, tmp_path, capsys):
    tensors = tensors_of("umt5", "huggingface")
    embedding = tensors.pop("shared.weight")
    copy = "encoder.embed_tokens.weight"
    for names in ({copy: embedding}, {copy: embedding, "shared.weight": embedding}):
        source = write(tmp_path / "a.safetensors", tensors | names)
        assert run("to-jax", source, "--to", tmp_path / "out", "--overwrite") == 0
        back = tmp_path / "b.safetensors"
        assert run("to-torch", tmp_path / "out/umt5", "--naming", "huggingface", "--to", back, "--overwrite") == 0
        assert same(back, tensors | {"shared.weight": embedding})
    capsys.readouterr()
    write(tmp_path / "a.safetensors", tensors | {copy: embedding, "shared.weight": embedding + 1})
    assert run("to-jax", tmp_path / "a.safetensors", "--to", tmp_path / "out", "--overwrite") == 2
    assert "shared.weight and encoder.embed_tokens.weight must be equal, and differ" in capsys.readouterr().err
