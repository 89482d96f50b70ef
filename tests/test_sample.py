"""The command lines: every mistake is one line and exit status 2, at once, and nothing half-written is left behind."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import av
import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

import sample
import train
from emv3_jax import checkpoint, command_line, config, demo, jobs, manifest, media, pipeline
from emv3_jax.errors import UserError
from emv3_jax.training import dit_recipe, loop, recipes, vae_recipe
from emv3_jax.training import state as train_state

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
DEMO_CONFIG = ROOT / "configs" / "demo.py"


@pytest.fixture
def files(tmp_path) -> pathlib.Path:
    """A folder with good and bad inputs."""
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(tmp_path / "good.png")
    soundfile.write(tmp_path / "good.wav", np.zeros(3200), 16000)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "text.wav").write_text("these are words, not sound")
    (tmp_path / "mine.json").write_text("[]")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


BAD = {
    "missing image": (["--image", "none.png"], "image none.png does not exist"),
    "directory as image": (["--image", "folder.png"], "image folder.png is a directory"),
    "empty image": (["--image", "empty.png"], "image empty.png is empty"),
    "cut image": (["--image", "cut.png"], "image cut.png"),
    "sound as image": (["--image", "good.wav"], "image good.wav cannot be read as a picture"),
    "missing sound": (["--audio", "none.wav"], "recording none.wav does not exist"),
    "text as sound": (["--audio", "text.wav"], "recording text.wav cannot be read as sound"),
    "picture as sound": (["--audio", "good.png"], "recording good.png"),
    "empty prompt": (["--prompt", "  "], "the prompt is empty"),
    "long prompt": (["--prompt", "puppet " * 99], "has 99 words"),
    "three numbers of a face": (
        ["--face", "1,2,3"],
        "--face must be four numbers y1,y2,x1,x2 in pixels, a .npy file, none, detect, largest or a number, got",
    ),
    "a face file that is not there": (["--face", "none.npy"], "face box none.npy does not exist"),
    "face of words": (["--face", "a,b,c,d"], "--face must be four numbers"),
    "face outside": (["--face", "0,80,0,80"], "face box (0.0, 80.0, 0.0, 80.0) (y1, y2, x1, x2) is empty or outside"),
    "a face that is no number": (["--face", "\u00b2"], "--face must be four numbers"),
    "face of the config": (["--config.face=1,2,3"], "config key face must be four numbers y1,y2,x1,x2 in pixels, a"),
    "a shift without a grid": (
        ["--config.sampling.sampler=unipc", "--config.sampling.shift=1e5"],
        "the sampler unipc needs a time grid that starts below sigma 1: give a smaller shift",
    ),
    "no name of the video": (["--out", ""], "--out must name a file, got ''"),
    "a folder's name as output": (["--out", "/"], "--out must name a file, got '/'"),
    "seed of letters": (["--seed", "x"], "--seed: invalid int value: 'x'"),
    "negative seed": (["--seed", "-1"], "--seed must be between 0 and"),
    "seed too large": (["--seed", str(2**32)], "--seed must be between 0 and"),
    "unknown option": (["--imgae", "good.png"], "unknown option --imgae: did you mean --image"),
    "option without value": (["--image"], "--image: expected one argument"),
    "unknown key": (["--config.sampling.step=3"], "unknown option --config.sampling.step: did you mean"),
    "key of the wrong type": (["--config.sampling.steps=few"], "--config.sampling.steps=few: the value must be"),
    "no steps": (["--config.sampling.steps=0"], "steps must be at least 1"),
    "unknown preset": (["--config.preset=huge"], "config key preset: 'huge' is none of demo"),
    "impossible length": (["--config.frames=50"], "frames must be 4k + 1 and at least 5, got 50"),
    "too small": (["--config.enlarge=0"], "config key enlarge must be from 1 to 60, got 0"),
    "unknown task": (["--task=dance"], "there is no task 'dance': one of i2v, t2v, flf2v, lipsync"),
    "no last image": (["--task=flf2v"], "the task flf2v needs last image"),
    "a last image of i2v": (["--last-image=good.png"], "the task i2v takes no last image"),
    "fps of i2v": (["--config.fps=30"], "the task i2v takes no fps: its videos have 25 frames a second"),
    "the image as sheet": (
        ["--sheet=good.png"],
        "output good.png is also the image that is given: choose",
    ),
    "another file as record": (["--out=mine.mp4"], "mine.json, where the record of mine.mp4 would stand, is another"),
    "missing video": (["--task=lipsync", "--video=none.mp4"], "video none.mp4 does not exist"),
    "mouth of words": (["--mouth=wide"], "--mouth must be four numbers y1,y2,x1,x2 in pixels, got 'wide'"),
    "times of a prompt": (["--prompt=0-2s: a puppet nods; 3-4s: waves"], "prompt, character 22: this part must start"),
    "riflex": (["--config.riflex=7"], "config key riflex must be from 0 to 6"),
    "unknown mode": (["--config.mode=fast"], "config key mode: 'fast' is none of default, released"),
    "more devices than there are": (["--config.mesh.data=3"], "1 devices cannot be divided into data 3"),
    "unknown dtype": (["--config.dtype=int8"], "dtype must be float32 or bfloat16, got 'int8'"),
    "unknown noise": (["--config.sampling.noise=x"], "there is no noise 'x': one of fresh, repeated, shuffled"),
    "unknown form": (["--config.sampling.long_video=x"], "there is no form of long video 'x'"),
    "window": (["--config.sampling.window=8"], "window must be 4k + 1 frames"),
    "overlap": (["--config.sampling.window=5", "--config.frames=9"], "windows of 2 latent frames cannot overlap by 8"),
    "missing manifest": (["--manifest=none.jsonl"], "manifest none.jsonl does not exist"),
    "missing weights": (["--config.weights=none"], "no weights at none"),
    "a config for training": (["--config", str(ROOT / "configs" / "demo_vae.py")], "this config is not for sampling"),
    "missing config": (["--config", "none.py"], "config file none.py does not exist"),
    "wrong ending": (["--out", "talk.avi"], "output talk.avi must end in .mp4"),
    "directory as output": (["--out", "folder.png"], "output folder.png is a directory"),
    "output below a file": (["--out", "good.png/talk.mp4"], "output good.png/talk.mp4 lies under good.png"),
    "wrong ending of the sheet": (["--sheet", "sheet.jpg"], "output sheet.jpg must end in .png"),
}


def arguments(words: list[str]) -> list[str]:
    """Good values for whatever `words` do not say."""
    good = {"--config": str(DEMO_CONFIG), "--image": "good.png", "--audio": "good.wav", "--out": "talk.mp4"}
    return [*(f"{name}={value}" for name, value in good.items() if name not in words), *words]


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line(name, files, monkeypatch, capsys):
    words, message = BAD[name]
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    assert command_line.run_main(sample.main, arguments(words)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert sorted(files.rglob("*")) == before


def test_what_is_not_given_is_the_demos_own():
    cfg = command_line.load_config(DEMO_CONFIG)
    request = jobs.request_of(manifest.Job("a.mp4", seed=5), cfg)
    assert request.prompt == cfg.prompt and request.seed == 5 and request.frames is None and request.face is None
    ready = pipeline.read_request(request, config.DEMO)
    assert ready.image.shape == (64, 64, 3) and ready.image.std() > 20
    assert not any("does not know" in note for note in ready.notes)
    given = jobs.request_of(
        manifest.Job("a.mp4", "a.png", None, None, "a.wav", "A puppet nods.", face=(0, 1, 2, 3)), cfg
    )
    assert (given.image, given.audio, given.prompt, given.face) == ("a.png", "a.wav", "A puppet nods.", (0, 1, 2, 3))
    assert not request.match_colours and jobs.request_of(manifest.Job("a.mp4", match_colours=True), cfg).match_colours
    matching = command_line.load_config(DEMO_CONFIG, {"match_colours": "true"})
    assert jobs.request_of(manifest.Job("a.mp4"), matching).match_colours
    assert not jobs.request_of(manifest.Job("a.mp4", match_colours=False), matching).match_colours
    found = command_line.load_config(DEMO_CONFIG, {"face": "largest", "fps": "30"})
    assert jobs.request_of(manifest.Job("a.mp4"), found).face == "largest"
    assert jobs.request_of(manifest.Job("a.mp4", task="t2v"), found).face is None  # the config's is for pictures
    with pytest.raises(UserError, match="the task t2v takes no face box"):
        pipeline.read_request(jobs.request_of(manifest.Job("a.mp4", task="t2v", face=2), cfg), config.DEMO)
    assert [jobs.request_of(manifest.Job("a.mp4", fps=fps), found).fps for fps in (None, 20, 0)] == [30, 20, None]
    with pytest.raises(UserError, match="config key puppet must be 0 or more, got -1"):
        demo.portrait(-1, 64)


@pytest.fixture
def tiny_words(files, tiny, tiny_pipeline, monkeypatch) -> list[str]:
    """A command line that works, of a preset that takes seconds."""
    monkeypatch.setitem(config.PRESETS, "tiny", tiny)
    monkeypatch.chdir(files)
    checkpoint.save_models(files / "weights", tiny_pipeline.params)
    words = ["--config.preset=tiny", "--config.weights=weights", "--config.sampling.steps=1", "--sheet=sheet.png"]
    return arguments([*words, "--config.enlarge=2", "--prompt=A puppet nods."])


@pytest.mark.usefixtures("quick_compile")
def test_a_video_and_a_sheet_are_made(tiny_words, files, monkeypatch, capsys):
    assert command_line.run_main(sample.main, tiny_words) == 0
    captured = capsys.readouterr()
    assert "note: image 64x64 is scaled to 32x32" in captured.out
    assert "wrote talk.mp4 and sheet.png: 5 frames, 0.20 s of video" in captured.out
    assert "sampling" in captured.out and "peak memory process" in captured.out
    record = json.loads((files / "talk.json").read_text())
    assert record["job"]["prompt"] == "A puppet nods." and set(record["weights"]) == {"dit", "text", "image", "vae"}
    with av.open(str(files / "talk.mp4")) as container:
        comment = json.loads(container.metadata["comment"])
    assert comment == {name: record[name] for name in record if name not in ("seconds", "peak_memory_gb")}
    assert not (files / "talk.mp4.render").exists()
    frames, fps, wave = media.read_video(files / "talk.mp4")
    assert frames.shape == (5, 64, 64, 3) and fps == 25 and wave is not None
    assert media.load_image(files / "sheet.png")[0].size > 0
    assert record["config"]["match_colours"] is False
    plain = frames
    strange = "caf\udce9.png"  # a name whose bytes are not UTF-8
    shutil.copy(files / "good.png", files / strange)

    def sheet(*arguments):
        assert (files / "talk.mp4").exists() and not (files / "talk.json").exists()  # never the old one beside the new
        return contact_sheet(*arguments)

    contact_sheet = media.contact_sheet
    monkeypatch.setattr(media, "contact_sheet", sheet)
    assert command_line.run_main(sample.main, [*tiny_words, "--config.match_colours=true", f"--image={strange}"]) == 0
    record = json.loads((files / "talk.json").read_text())
    assert record["config"]["match_colours"] is True and record["job"]["image"] == strange
    with av.open(str(files / "talk.mp4")) as container:
        assert json.loads(container.metadata["comment"])["job"]["image"] == strange
    frames, _, _ = media.read_video(files / "talk.mp4")
    assert np.abs(frames[1:].astype(int) - plain[1:]).max() > 10


class Breaks(media.VideoWriter):
    """A video that breaks off at its second piece, or when it is to be closed."""

    at, error = "write", BaseException()

    def write(self, frames):
        if self.at == "write" and self.count:
            raise self.error
        super().write(frames)

    def __exit__(self, kind, error, trace):
        error = error or (self.error if self.at == "close" else None)
        super().__exit__(error and type(error), error, trace)
        if error:
            raise error


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    ("at", "error", "status"), [("write", KeyboardInterrupt(), 130), ("close", UserError("the disk is full"), 2)]
)
def test_what_breaks_off_leaves_nothing(tiny_words, files, monkeypatch, capsys, at, error, status):
    before, whole = sorted(files.rglob("*")), media.VideoWriter
    monkeypatch.setattr(Breaks, "at", at)
    monkeypatch.setattr(Breaks, "error", error)
    monkeypatch.setattr(media, "VideoWriter", Breaks)
    assert command_line.run_main(sample.main, tiny_words) == status
    # The latents of the finished step stay, for --resume; of the video nothing does.
    kept = files / "talk.mp4.render"
    assert [path for path in sorted(files.rglob("*")) if kept not in (path, *path.parents)] == before
    assert "the finished steps are kept in talk.mp4.render" in capsys.readouterr().err
    monkeypatch.setattr(media, "VideoWriter", whole)
    assert command_line.run_main(sample.main, tiny_words) == 2
    assert "holds an unfinished render of talk.mp4: add --resume to go on, or remove it" in capsys.readouterr().err
    if at == "write":
        progress = kept / "chunk_0" / "progress.json"
        content = progress.read_text()
        progress.write_text(content[:5])
        assert command_line.run_main(sample.main, [*tiny_words, "--resume"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {progress.relative_to(files)} is damaged: remove the folder") and kept.is_dir()
        progress.write_text(content)
    assert command_line.run_main(sample.main, [*tiny_words, "--resume"]) == 0
    assert (files / "talk.mp4").exists() and (files / "talk.json").exists() and not kept.exists()


def test_a_folder_that_is_not_the_renders_own_is_left_as_it_is(tiny_words, tiny_pipeline, files, monkeypatch, capsys):
    """Neither files of a user, nor the beginning of another render."""
    monkeypatch.setattr(jobs, "load_pipeline", lambda *args, **kwargs: tiny_pipeline)
    folder = files / "talk.mp4.render"
    folder.mkdir()
    for name, message in (("precious.txt", "holds no settings.json"), ("settings.json", "a render with another")):
        (folder / name).write_text('{"seed": 5}')
        before = sorted(files.rglob("*"))
        assert command_line.run_main(sample.main, [*tiny_words, "--resume"]) == 2
        assert message in capsys.readouterr().err
        assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize("stage", ["load_pipeline", "stream"])
def test_too_little_memory_is_told_with_what_needs_less(tiny_words, tiny_pipeline, files, monkeypatch, capsys, stage):
    def fails(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(message)

    def frames(*args, **kwargs):
        yield fails()

    monkeypatch.setattr(jobs, "load_pipeline", lambda *args, **kwargs: tiny_pipeline)
    if stage == "stream":
        monkeypatch.setattr(pipeline.Pipeline, "stream", frames)
    else:
        monkeypatch.setattr(jobs, "load_pipeline", fails)
    before, message = sorted(files.rglob("*")), "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes."
    assert command_line.run_main(sample.main, tiny_words) == 2
    assert capsys.readouterr().err.endswith(
        "error: the device has too little memory: try --config.low_memory=true, --config.sampling.branches_together="
        "false, --config.sampling.windows_together=1, or a smaller picture\n"
    )
    assert sorted(files.rglob("*")) == before
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError):
        command_line.run_main(sample.main, tiny_words)


def test_output_in_a_folder_that_cannot_be_written(files, monkeypatch, capsys):
    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.chdir(files)
    monkeypatch.setattr(pathlib.Path, "touch", refused)
    assert command_line.run_main(sample.main, arguments([])) == 2
    assert capsys.readouterr().err == "error: output talk.mp4 cannot be written: permission denied\n"


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--image", "none.png"], ["--help"]])
def test_the_script_itself(words, files):
    """As a user runs it: no traceback, and bad arguments are told before JAX has started."""
    started = time.monotonic()
    script = [sys.executable, str(ROOT / "sample.py"), *arguments(words)]
    run = subprocess.run(script, capture_output=True, text=True, cwd=files, timeout=120)
    assert time.monotonic() - started < 60  # seconds are normal; a busy machine takes longer
    if words == ["--help"]:
        assert run.returncode == 0 and "--image" in run.stdout and run.stderr == ""
    else:
        assert run.returncode == 2 and run.stdout == ""
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_import_alone_does_not_start_jax():
    """What makes --help and spelling mistakes quick."""
    code = "import sys, sample, train, emv3_jax; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.stdout == "False\n", run.stderr


@pytest.mark.parametrize(
    "words", [["--image", "none.png"], ["--audio", "none.wav"], ["--face", "1,2"], ["--seed", "-1"]]
)
def test_mistakes_of_the_command_line_are_told_before_jax_starts(words, files):
    code = (
        "import sys, sample; from emv3_jax import command_line\n"
        f"print(command_line.run_main(sample.main, {arguments(words)!r}), 'jax' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=files, env=environment, timeout=120
    )
    assert run.stdout == "2 False\n", run.stderr


TRAIN_BAD = {
    "no workdir": (["--config=demo_vae.py"], "--workdir"),
    "no config": (["--workdir=run"], "--config"),
    "unknown recipe": (["--config=demo_vae.py", "--workdir=run", "--config.recipe=gan"], "config key recipe: 'gan'"),
    "unknown preset": (["--config=demo_vae.py", "--workdir=run", "--config.preset=x"], "config key preset: 'x'"),
    "not for training": (["--config=demo.py", "--workdir=run"], "not for training"),
    "missing data": (["--config=demo_dit.py", "--workdir=run", "--config.data=none"], "the dataset none is not there"),
    "missing start": (["--config=demo_vae.py", "--workdir=run", "--config.init_from=none"], "no weights at none/"),
    "long warm-up": (["--config=demo_vae.py", "--workdir=run", "--config.warmup_steps=10000"], "key warmup_steps must"),
    "no steps": (["--config=demo_dit.py", "--workdir=run", "--config.steps=0"], "config key steps must be a whole"),
    "never logged": (["--config=demo_vae.py", "--workdir=run", "--config.log_every=0"], "config key log_every must be"),
    "stages of a number": (["--config=demo_vae.py", "--workdir=run", "--config.stages=5"], "config key stages must be"),
    "workdir below a file": (["--config=demo_vae.py", "--workdir=file/run"], "--workdir"),
}


@pytest.mark.parametrize("name", TRAIN_BAD)
def test_a_mistake_in_training_is_one_line(name, tmp_path, monkeypatch, capsys):
    words, message = TRAIN_BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    words = [word.replace("--config=", f"--config={ROOT}/configs/") for word in words]
    assert command_line.run_main(train.main, words) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# Configs


def keys_read_by(*modules) -> set[str]:
    """Names x in `cfg.x` in the source of modules."""
    sources = [pathlib.Path(module.__file__).read_text() for module in modules]
    return {name for source in sources for name in re.findall(r"\bcfg\.(\w+)", source)} - {"get", "to_dict"}


SHARED = (loop, train_state, recipes)
READERS = {"vae": (vae_recipe, *SHARED), "dit": (dit_recipe, *SHARED), None: (demo, jobs, sample)}
BY_NAME = {"vae": {"recipe", "preset"}, "dit": {"recipe", "preset", "model"}}  # read with cfg.get
OPTIONAL = {"frozen", "cycle", "review"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_the_keys_that_are_read_and_no_others(path):
    cfg = command_line.load_config(path)
    wanted = keys_read_by(*READERS[cfg.get("recipe")])
    if cfg.get("recipe"):
        wanted |= BY_NAME[cfg.recipe] | (OPTIONAL & set(cfg.keys()))
        wanted -= {"latent_channels"}  # of a model's cfg
    assert set(cfg.keys()) == wanted


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_names_what_exists_and_says_how_to_run_it(path):
    cfg = command_line.load_config(path)
    assert cfg.preset in config.PRESETS
    assert f"--config configs/{path.name}" in path.read_text().split('"""')[1]
    if "sampling" in cfg:
        assert "recipe" in cfg or jobs.options_of(manifest.Job("a.mp4"), cfg).long_video == "cfg"
        if "recipe" in cfg:
            pipeline.SamplingOptions(**cfg.sampling)
    if "recipe" in cfg:
        assert cfg.recipe in recipes.RECIPES
        train_state.make_optimizer(cfg)
        ends = [stage[0] for stage in cfg.stages]
        assert ends == sorted(ends) and ends[-1] == cfg.steps == cfg.learning_rates[-1][0]
        assert cfg.steps > cfg.checkpoint_every > 0 and cfg.bad_steps > 0


def test_the_vae_recipe_is_built_from_its_config():
    built = recipes.build(command_line.load_config(ROOT / "configs" / "demo_vae.py"))
    assert isinstance(built, vae_recipe.VAERecipe) and built.vae.cfg == config.DEMO.vae
