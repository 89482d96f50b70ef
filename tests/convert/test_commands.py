"""The command line, from torch files to Orbax folders and back."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import __main__ as command
from convert.registry import MODELS
from convert.sources import open_source
from emv3_jax.converted import RECORD, load_converted, read_record
from emv3_jax.errors import UserError

ROOT = Path(__file__).parents[2]
VAE_SIZES = ["--set", "width=4", "--set", "res_blocks=1"]


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


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
    assert run("inspect", write(tmp_path / "b.safetensors", bad)) == 0
    printed = capsys.readouterr().out
    assert "fits       no: 2 problems" in printed and "missing: conv1.bias" in printed and "unexpected: more" in printed
    monkeypatch.undo()  # the released sizes again
    assert run("inspect", file) == 0
    printed = capsys.readouterr().out
    assert "not the released ones: width=48 layers=2 ffn=96" in printed and "yes, with these sizes" in printed
    assert run("inspect", write(tmp_path / "c.safetensors", {"foo": np.zeros(1, np.float32)})) == 0
    assert "no key is known" in capsys.readouterr().out


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
    cases = [
        (["to-jax", "--model", "dit-preview", source, output], "keys do not fit the model:"),
        (["to-torch", "--model", "vae", source, output], "keys do not fit the model:"),
        (["to-torch", source, output], "does not say which model it holds: say --model"),
        (["to-torch", tmp_path, output], "holds no converted weights"),
        (["to-jax", "--model", "vae", "--set", "colour=3", source, output], "--set colour=3: give NAME=N"),
        (["to-jax", "--model", "vae", source, source], "give another output"),
        (["to-jax", source, output], "those of no known model"),
        (["to-jax", source], "say where to write, once: --to OUT"),
        (["to-jax", source, output, "--to", output], "say where to write, once"),
        (["to-jax", "--to", output], "give one checkpoint, or --from DIR with --variant, not both"),
        (["to-jax", "--from", tmp_path, "--to", output], "--from needs --variant"),
        (["to-jax", "--from", tmp_path / "none", "--variant", "flash", "--to", tmp_path / "o"], "no such folder"),
        (["inspect", tmp_path / "none.safetensors"], "does not exist"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[0]
    assert not output.exists()


LIMITED = """
import resource, sys
from convert import __main__ as command
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.exit(max(command.main(["to-jax", sys.argv[1], "--set", "width=4", "--set", "res_blocks=1", "--to", out])
             for out in sys.argv[2:]))
"""
KILLED = """
import os, signal, sys
from convert import __main__ as command, jobs
def die(what, total):
    raise AssertionError
class Bar:
    def __enter__(self): return lambda count: os.kill(os.getpid(), signal.SIGKILL)
    def __exit__(self, *_): pass
plain = jobs.progress
jobs.progress = lambda what, total: plain(what, total) if "SHA" in what else Bar()
command.main(["to-jax", sys.argv[1], "--set", "width=4", "--set", "res_blocks=1", "--to", sys.argv[2]])
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
    lines = [line for line in done.stderr.splitlines() if line.startswith("output ")]
    assert lines == [
        f"output {tmp_path}/out/vae could not be written: file too large",
        f"output {tmp_path}/file/b.safetensors could not be written: file too large",
    ]
    assert not any((tmp_path / "out").iterdir()) and not any((tmp_path / "file").iterdir())


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
