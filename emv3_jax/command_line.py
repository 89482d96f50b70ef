"""What the command lines share: options, experiment files with overrides, errors in one line, the compile cache.

A script is a `main(arguments)` that calls make_parser, adds its own options, calls parse, and works; it ends with
`sys.exit(run_main(main))`.
"""

import argparse
import ast
import difflib
import importlib.util
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import ml_collections

from emv3_jax.errors import UserError

OVERRIDE = "--config."
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def run_main(main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Runs `main` on the command line's words (default: sys.argv[1:]) and returns the exit status.

    UserError: its message as one line on stderr, then its details, one a line; 2. Ctrl-C: one line, 130. SIGTERM
    unwinds like an exception, so that files being written are removed: one line, 143. What stdout cannot show, such as
    bytes of a file's name that are not UTF-8, is escaped, as on stderr.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return main(list(sys.argv[1:] if arguments is None else arguments)) or 0
    except UserError as error:
        print("\n".join((f"error: {' '.join(error.message.split())}", *error.details)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Terminated:
        print("terminated", file=sys.stderr)
        return 128 + signal.SIGTERM


class Terminated(SystemExit):
    """SIGTERM came, under `run_main`."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated(128 + number)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are UserErrors that name the nearest valid option."""

    def __init__(self, **kwargs: Any) -> None:
        self.option_names: list[str] = []
        super().__init__(allow_abbrev=False, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """As argparse does, and remembers the name."""
        action = super().add_argument(*args, **kwargs)
        self.option_names += action.option_strings
        return action

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a bad value or a missing option."""
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


def make_parser(name: str, description: str | None, config: str | None = None) -> Parser:
    """A parser that knows --config FILE.

    config: the file used if none is named; without it --config must be given. Add options as with argparse.
    """
    parser = Parser(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if config:  # wherever the program is called from
        config = os.path.relpath(Path(__file__).parents[1] / config)
    words = f"experiment file (default: {config})" if config else "experiment file, such as configs/demo.py"
    parser.add_argument("--config", metavar="FILE", default=config, required=config is None, help=words)
    parser.epilog = f"{OVERRIDE}KEY=VALUE sets a value of the experiment file ({OVERRIDE}A.B=VALUE in section A)."
    return parser


def parse(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
    """The options, and the experiment file with every --config.KEY=VALUE applied.

    Raises UserError for unknown options and keys, missing and bad values, and whatever load_config does.
    """
    words, overrides = _split_overrides(arguments)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].partition("=")[0]
        kind = "option" if name.startswith("-") else "argument"
        raise UserError(f"unknown {kind} {name}{did_you_mean(name, parser.option_names)}; see --help")
    return options, load_config(options.config, overrides)


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The ordinary words, and {"a.b": "VALUE"} for every --config.a.b=VALUE; a later one wins."""
    remaining = list(arguments)
    words: list[str] = []
    overrides: dict[str, str] = {}
    while remaining:
        word = remaining.pop(0)
        if not word.startswith(OVERRIDE):
            words.append(word)
            continue
        key, equals, value = word.removeprefix(OVERRIDE).partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE")
            value = remaining.pop(0)
        overrides[key] = value
    return words, overrides


def load_config(path: str | os.PathLike[str], overrides: Mapping[str, str] | None = None) -> ml_collections.ConfigDict:
    """The ConfigDict that get_config() of the Python file at `path` returns, with overrides applied, locked.

    overrides: "a.b" -> text, converted to the type of the value it replaces. Raises UserError for a file that is
    missing or fails, an unknown key, or a value of the wrong type.
    """
    path = Path(path)
    module = _run_file(path)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"config file {path} defines no get_config(): it must return an ml_collections.ConfigDict")
    try:
        config = module.get_config()
    except Exception as error:  # a user's file may raise anything
        raise UserError(_failure(path, error)) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"get_config() of {path} returned a {type(config).__name__}, not an ml_collections.ConfigDict")
    for key, text in (overrides or {}).items():
        _override(config, key, text)
    return config.lock()


def setup_compile_cache() -> Path | None:
    """Lets JAX keep compiled programs between runs, and says where: None if no directory can be written.

    The directory is JAX_COMPILATION_CACHE_DIR if that is set, otherwise one in the user's cache directory.
    """
    import jax  # here, so that --help and mistakes in options are answered at once

    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    path = Path(chosen) if chosen else _user_cache() / "emv3_jax" / "compiled"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(path, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return path


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _run_file(path: Path) -> ModuleType:
    """Runs a config file as a module of its own."""
    if not path.is_file():
        known = sorted(str(p) for p in _config_folder(path).glob("*.py") if p.stem != "__init__")
        what = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"config file {path} {what}{did_you_mean(str(path), known)}")
    name = f"emv3_jax_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses defined in the file look themselves up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        raise UserError(_failure(path, error)) from error
    return module


def _config_folder(path: Path) -> Path:
    """Where to look for what was meant: beside the missing file, or in configs/."""
    if path.is_dir():
        return path
    return path.parent if any(path.parent.glob("*.py")) and path.parent != Path() else Path("configs")


def _failure(path: Path, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    where = f" at line {line}" if line else ""
    detail = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"config file {path} fails{where}: {type(error).__name__}: {detail}"


def _override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    *sections, last = key.split(".")
    node = config
    for name in [*sections, last]:
        if not isinstance(node, ml_collections.ConfigDict) or name not in node:
            raise UserError(f"unknown option {OVERRIDE}{key}{did_you_mean(key, _leaves(config), prefix=OVERRIDE)}")
        parent, node = node, node[name]
    if isinstance(node, ml_collections.ConfigDict):
        raise UserError(f"{OVERRIDE}{key} is a section: set one of {', '.join(f'{OVERRIDE}{key}.{k}' for k in node)}")
    kind = type(node) if node is not None else parent.get_type(last)
    try:
        parent[last] = _convert(text, kind, node)
    except (ValueError, SyntaxError, TypeError) as error:
        reason = str(error) if isinstance(error, UserError) else f"is not a {kind.__name__}"
        raise UserError(f"{OVERRIDE}{key}={text}: the value {reason}") from None


def _convert(text: str, kind: type, current: Any) -> Any:
    """`text` as a value of type `kind`, like `current`; raises ValueError with the rest of a sentence."""
    if kind is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise UserError("must be true or false")
        return text.lower() in _TRUE
    if kind is int:
        return _whole_number(text)
    if kind is float:
        return _number(text)
    if kind is str:
        return text
    if kind in (tuple, list):
        return kind(_sequence(text, current or ()))
    if kind is type(None):  # the file says None: anything may stand here
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    raise UserError(f"cannot be given on the command line (it is a {kind.__name__}): change it in the file")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError("must be a number") from None
    if value != value:
        raise UserError("must be a number")
    return value


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)  # 1e4 is a whole number too
    except ValueError:
        raise UserError("must be a whole number") from None
    if not value.is_integer():
        raise UserError("must be a whole number")
    return int(value)


def _sequence(text: str, current: Sequence[Any]) -> list[Any]:
    """The elements of "1,2,3" or "(1, 2, 3)", each of the type that the current ones have in common."""
    kinds = {type(element) for element in current}
    if kinds == {str} and not text.lstrip().startswith(("(", "[")):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError("must be values separated by commas") from None
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    if len(kinds) != 1 or kinds <= {tuple, list, dict, type(None)}:
        return values
    kind = kinds.pop()
    return [element if type(element) is kind else _convert(str(element), kind, None) for element in values]


def _leaves(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Every key that can be set, as a dotted path."""
    names: list[str] = []
    for name in config:
        value = config[name]
        inner = isinstance(value, ml_collections.ConfigDict)
        names += _leaves(value, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return names


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """What follows a wrong word: the nearest right ones, or all of a short list, or nothing."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if not near:  # a key named without its section
        near = [name for name in known if name.split(".")[-1] == word.split(".")[-1]][:3]
    if near:
        return f": did you mean {' or '.join(prefix + name for name in near)}?"
    return f"; there are {', '.join(prefix + name for name in known)}" if 0 < len(known) <= 12 else ""
