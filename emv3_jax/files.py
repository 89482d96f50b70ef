"""Paths: checked before work starts, written whole or not at all."""

import contextlib
import functools
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from emv3_jax.errors import UserError

PathLike = str | os.PathLike[str]


def reason(error: OSError) -> str:
    """The operating system's own words for an error, without numbers and paths."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def file_hash(path: PathLike) -> str:
    """SHA-256 of a file's contents, which are read once in the life of the program unless the file changes."""
    status = os.stat(path)
    return _file_hash(os.fspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _file_hash(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_readable(path: PathLike, kind: str) -> Path:
    """Returns `path` if it is a file with something in it that this process may read; otherwise raises UserError.

    kind: what the file is to the user ("image", "recording"), for the message.
    """
    path = _named(path, kind)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{kind} {path} is a directory: name a file in it")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{kind} {path} is not a regular file: save it to a file first")
        if status.st_size == 0:
            raise UserError(f"{kind} {path} is empty (0 bytes)")
        with path.open("rb"):
            return path
    except FileNotFoundError:
        raise UserError(f"{kind} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{kind} {path} cannot be read: {reason(error)}") from None


def check_writable(path: PathLike, suffixes: Sequence[str] = ()) -> Path:
    """Raises UserError if a file cannot be written at `path`; call it before the work whose result goes there.

    Creates missing parent directories. An existing file is left as it is. suffixes: the file name endings that are
    allowed (lower case, with the dot); none given allows any. Returns `path` as a Path.
    """
    path = _named(path, "output")
    try:
        if path.is_dir():
            raise UserError(f"output {path} is a directory: name a file in it")
        if suffixes and path.suffix.lower() not in suffixes:
            raise UserError(f"output {path} must end in {' or '.join(suffixes)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise UserError(f"output {path} is not a regular file: choose another name")
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"output {path} exists and is read-only: choose another name or make it writable")
        probe = _temporary(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"output {path} lies under {_blocking_file(path)}, which is a file") from None
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {reason(error)}") from None
    return path


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` when the block ends.

    If the block raises, the temporary file is removed and whatever stood at `path` before still stands there.
    Operating system errors (disk full, no permission) leave as UserError.
    """
    path = check_writable(path)
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"output {path} could not be written: {reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _named(path: PathLike, kind: str) -> Path:
    """A path that a file can have; raises UserError for one that the system could not be asked for."""
    with contextlib.suppress(UnicodeEncodeError):
        if b"\0" not in os.fsencode(path):
            return Path(path)
    raise UserError(f"{kind} {os.fspath(path)!r} is no name that a file can have")


def _temporary(path: Path) -> Path:
    """A name of its own in the same directory, so that the last step is a rename and not a copy."""
    return path.with_name(f".{path.stem[:80]}-{secrets.token_hex(4)}{path.suffix}")


def _blocking_file(path: Path) -> Path:
    return next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), path.parent)
