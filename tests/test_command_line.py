"""Command lines: overrides land with the right type, and every mistake is one line and exit status 2."""

import io
import signal
import subprocess
import sys

import jax
import ml_collections
import pytest

from emv3_jax import command_line
from emv3_jax.errors import UserError

CONFIG = """
import dataclasses
import ml_collections

@dataclasses.dataclass
class Sizes:
    width: int = 3

def get_config():
    return ml_collections.ConfigDict(dict(
        steps=4, rate=1e-3, name="demo", fast=False, size=(64, 64), tags=("a", "b"), nothing=None,
        seed=ml_collections.config_dict.placeholder(int), sizes=Sizes(), model=dict(width=8, deep=dict(layers=2))))
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "demo.py"
    path.write_text(CONFIG)
    return path


def parse(config_file, *words):
    parser = command_line.make_parser("sample.py", "Samples.", config=str(config_file))
    parser.add_argument("--image")
    parser.add_argument("--seed", type=int, default=0)
    return command_line.parse(parser, words)


def run(config_file, *words):
    """What a script does, from words to exit status."""
    return command_line.run_main(lambda arguments: parse(config_file, *arguments) and None, words)


def test_what_stdout_cannot_show_is_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, as in a terminal
    monkeypatch.setattr(sys, "stdout", out)
    assert command_line.run_main(lambda words: print(f"wrote {words[0]}"), ["caf\udce9.mp4"]) == 0
    out.flush()
    assert out.buffer.getvalue() == b"wrote caf\\udce9.mp4\n"


def test_options_and_config_without_overrides(config_file):
    options, config = parse(config_file, "--image", "a.png", "--seed", "3")
    assert (options.image, options.seed) == ("a.png", 3)
    assert config.steps == 4 and config.model.deep.layers == 2
    with pytest.raises(AttributeError):
        config.not_there = 1


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("--config.steps=8", "steps", 8),
        ("--config.steps=1e4", "steps", 10_000),
        ("--config.steps=-2", "steps", -2),
        ("--config.rate=3", "rate", 3.0),
        ("--config.rate=2e-5", "rate", 2e-5),
        ("--config.name=a=b c", "name", "a=b c"),
        ("--config.name=", "name", ""),
        ("--config.fast=true", "fast", True),
        ("--config.fast=0", "fast", False),
        ("--config.size=32,48", "size", (32, 48)),
        ("--config.size=(32, 48, 16)", "size", (32, 48, 16)),
        ("--config.size=32", "size", (32,)),
        ("--config.tags=x, y,z", "tags", ("x", "y", "z")),
        ("--config.nothing=5", "nothing", 5),
        ("--config.nothing=run/7", "nothing", "run/7"),
        ("--config.seed=5", "seed", 5),
        ("--config.model.deep.layers=5", "model.deep.layers", 5),
    ],
)
def test_overrides_take_the_type_of_what_they_replace(config_file, word, key, value):
    _, config = parse(config_file, word)
    for name in key.split("."):
        config = config[name]
    assert config == value and type(config) is type(value)


def test_value_may_follow_as_its_own_word_and_the_last_one_wins(config_file):
    _, config = parse(config_file, "--config.steps", "-8", "--config.steps=9", "--config.name", "x")
    assert config.steps == 9 and config.name == "x"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config.stpes=8"], ["unknown option --config.stpes", "did you mean --config.steps or"]),
        (["--config.layers=8"], ["did you mean --config.model.deep.layers?"]),
        (["--config.zebra=8"], ["there are --config.", "--config.model.width"]),
        (["--config.steps.more=8"], ["unknown option --config.steps.more"]),
        (["--config.model=8"], ["is a section", "--config.model.width"]),
        (["--config.steps=ten"], ["--config.steps=ten", "whole number"]),
        (["--config.steps=1.5"], ["whole number"]),
        (["--config.seed=x"], ["whole number"]),
        (["--config.rate=fast"], ["must be a number"]),
        (["--config.rate=nan"], ["must be a number"]),
        (["--config.fast=maybe"], ["true or false"]),
        (["--config.size=wide"], ["separated by commas"]),
        (["--config.size=1.5,2"], ["whole number"]),
        (["--config.sizes=2"], ["cannot be given on the command line", "Sizes"]),
        (["--config.steps"], ["needs a value"]),
        (["--config.steps", "--image", "a"], ["needs a value"]),
        (["--imgae", "a.png"], ["unknown option --imgae", "did you mean --image?"]),
        (["--imag=a.png"], ["unknown option --imag", "--image"]),
        (["stray"], ["unknown argument stray"]),
        (["--seed", "x"], ["--seed", "invalid int value", "--help"]),
        (["--image"], ["--image", "expected one argument"]),
    ],
)
def test_mistakes_are_one_line_and_exit_2(config_file, capsys, words, said):
    assert run(config_file, *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    for part in said:
        assert part in err


def test_config_files_that_cannot_be_used(config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "syntax.py": ("def get_config(:\n", ["syntax.py", "line 1", "SyntaxError"]),
        "raises.py": ("x = 1\ny = x / 0\n", ["raises.py", "line 2", "ZeroDivisionError"]),
        "late.py": ("def get_config():\n    return missing\n", ["late.py", "line 2", "NameError"]),
        "none.py": ("x = 1\n", ["no get_config()"]),
        "dict.py": ("def get_config():\n    return {}\n", ["returned a dict"]),
        "plain.txt": ("x = 1\n", [".py"]),
    }
    for name, (text, said) in files.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as info:
            command_line.load_config(name)
        assert all(part in str(info.value) for part in said), info.value
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "preview.py").write_text(CONFIG)
    for path, said in [("configs/previw.py", "did you mean configs/preview.py?"), ("preview.py", "configs/preview.py")]:
        with pytest.raises(UserError, match=r"does not exist.*" + said.replace("?", r"\?")):
            command_line.load_config(path)
    with pytest.raises(UserError, match="is a directory.*configs/preview.py"):
        command_line.load_config("configs")


def test_run_main_exit_status(capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    def lines(arguments):
        raise UserError("first\nsecond")

    assert command_line.run_main(lambda arguments: None, []) == 0
    assert command_line.run_main(lambda arguments: len(arguments), ["a", "b", "c"]) == 3
    assert command_line.run_main(lines, []) == 2
    assert command_line.run_main(interrupted, []) == 130
    assert capsys.readouterr().err == "error: first second\ninterrupted\n"
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        command_line.run_main(lambda arguments: 1 // 0, [])


def test_sigterm_unwinds_so_that_nothing_half_written_stays(tmp_path):
    code = (
        "import sys, time; from emv3_jax import command_line; from emv3_jax.files import atomic_path\n"
        "def main(arguments):\n"
        "    with atomic_path(arguments[0]) as temporary:\n"
        "        temporary.touch(); print('ready', flush=True); time.sleep(30)\n"
        "sys.exit(command_line.run_main(main))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert process.stderr.read() == b"terminated\n"
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_overrides(config_file, capsys):
    with pytest.raises(SystemExit) as info:
        run(config_file, "--help")
    assert info.value.code == 0 and "--config.KEY=VALUE" in capsys.readouterr().out


def test_config_is_required_without_a_default(capsys):
    parser = command_line.make_parser("train.py", "Trains.")
    assert command_line.run_main(lambda arguments: command_line.parse(parser, arguments) and None, []) == 2
    assert "--config" in capsys.readouterr().err


def test_references_follow_an_override(tmp_path):
    (tmp_path / "a.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    c = ml_collections.ConfigDict(dict(steps=4))\n"
        "    c.half = c.get_ref('steps') // 2\n"
        "    return c\n"
    )
    config = command_line.load_config(tmp_path / "a.py", {"steps": "10"})
    assert isinstance(config, ml_collections.ConfigDict) and config.half == 5


@pytest.fixture
def cache_settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [(name, getattr(jax.config, name)) for name in names]
    yield
    for name, value in before:
        jax.config.update(name, value)


def test_compile_cache_goes_where_it_is_told(tmp_path, monkeypatch, cache_settings):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if sys.platform.startswith("linux"):
        path = command_line.setup_compile_cache()
        assert path == tmp_path / "cache" / "emv3_jax" / "compiled" and path.is_dir()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    assert command_line.setup_compile_cache() == tmp_path / "mine"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert command_line.setup_compile_cache() is None
