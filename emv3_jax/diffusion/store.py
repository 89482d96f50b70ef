"""Latents on disk, frame by frame, with the step that they belong to: what a long render needs to fit in memory and to
go on after it was interrupted.

A render's folder holds `settings.json`, what the render depends on (`claim`), and a `Store` for each run of the solver.
A store holds two copies of the latents and of the solver's state, one of the last finished step and one that the next
step is written into, and `progress.json`, which is replaced when a step is whole. A step that was interrupted is done
again from the copy that is whole.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from emv3_jax.errors import UserError
from emv3_jax.files import atomic_path, reason

SETTINGS = "settings.json"
PROGRESS = "progress.json"


def claim(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Makes a folder the one of a render, before anything is put there or taken from it.

    Args:
      folder: made if need be.
      settings: what the render depends on, plain JSON.
    Raises:
      UserError: the folder belongs to a render with other settings or holds something else, or cannot be written.
    """
    path, wanted = folder / SETTINGS, json.loads(json.dumps(settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        raise UserError(f"the render folder {folder} cannot be used: {reason(error)}") from None
    if empty:
        _write_settings(path, wanted)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {SETTINGS}, so whose it is cannot be told: remove it") from None
    except OSError as error:
        raise UserError(f"the render folder {folder} cannot be used: {reason(error)}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: remove the folder {folder} and start the render again") from None
    if names := _differences(found, wanted):
        raise UserError(f"{folder} belongs to a render with another {', '.join(names)}: remove it, or ask for the same")


def _write_settings(path: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes them, or leaves no folder: an empty one would look like a render's."""
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
    except BaseException:
        with contextlib.suppress(OSError):
            path.parent.rmdir()
        raise


def _differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of what differs in two pieces of JSON, as words: "sampling shift"."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [name]
    return [
        found for key in sorted({*a, *b}) for found in _differences(a.get(key), b.get(key), f"{name} {key}".strip())
    ]


class FrameFile:
    """float32 frames of one shape in a file, read and written by number; plain reads, so that memory stays flat."""

    def __init__(self, path: pathlib.Path, shape: tuple[int, ...]):
        self.path, self.shape = path, shape
        self._bytes = 4 * int(np.prod(shape, dtype=np.int64))

    def read(self, first: int, last: int) -> np.ndarray:
        """Frames first..last - 1: [last - first, *shape].

        Raises:
          UserError: the file ends before.
        """
        count = (last - first) * self._bytes // 4
        flat = np.fromfile(self.path, np.float32, count, offset=first * self._bytes)
        if flat.size != count:
            raise UserError(f"{self.path} is cut off: remove its folder and start the render again")
        return flat.reshape(-1, *self.shape)

    def write(self, first: int, frames: np.ndarray) -> None:
        """Puts frames [k, *shape] at number `first`."""
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.seek(first * self._bytes)
            file.write(np.ascontiguousarray(frames, np.float32).tobytes())


class Store:
    """The latents [T, *frame_shape] of a render and its solver's state (a pytree of arrays of the latents' shape).

    Args:
      folder: made if need be; one that is there belongs to the same render (`claim`).
      frame_shape: [h, w, C] of one latent frame.
      state: the solver's state as a pytree, whose leaves only count.
      start: first..last -> (latents, state) before the first step; called only for a new render.
      total: T.
    Raises:
      UserError: the folder is damaged, or cannot be written.
    """

    CHUNK = 32  # latent frames that are written at a time when a render starts

    def __init__(
        self,
        folder: pathlib.Path,
        frame_shape: tuple[int, ...],
        state: Any,
        start: Callable[[int, int], tuple[np.ndarray, Any]],
        total: int,
    ):
        self.folder, self.frame_shape, self.total = folder, tuple(frame_shape), total
        leaves, self._tree = jax.tree.flatten(state)
        self._leaves = len(leaves)
        self.done = 0
        try:
            if self._resume():
                return
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for first in range(0, total, self.CHUNK):
                self._write(0, first, *start(first, min(first + self.CHUNK, total)))
            self._finish(0)
        except OSError as error:
            raise UserError(f"the render folder {folder} cannot be used: {reason(error)}") from None

    @contextlib.contextmanager
    def next_step(self) -> Iterator[Callable[[int, jax.Array, Any], None]]:
        """Gives write(first frame, latents, state); when the block ends the step counts as done."""
        number = self.done + 1
        try:
            yield lambda first, x, state: self._write(number, first, x, state)
            self._finish(number)
        except OSError as error:
            raise UserError(f"the render folder {self.folder} could not be written: {reason(error)}") from None

    def read_x(self, first: int, last: int) -> np.ndarray:
        """Latents of the last finished step, [last - first, *frame_shape]."""
        return self._file(self.done, 0).read(first, last)

    def read_state(self, first: int, last: int) -> Any:
        """The solver's state of the same frames."""
        leaves = [self._file(self.done, 1 + k).read(first, last) for k in range(self._leaves)]
        return jax.tree.unflatten(self._tree, leaves)

    def read_memory(self, number: int) -> Any:
        """What the velocity of a window remembers (`write_memory`); None before the first step."""
        path = self.folder / f"memory_{number}.npy"
        return np.load(path) if path.exists() else None

    def write_memory(self, number: int, memory: Any) -> None:
        """Keeps an array until it is written again."""
        with atomic_path(self.folder / f"memory_{number}.npy") as path:
            np.save(path, memory)

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, step: int, leaf: int) -> FrameFile:
        return FrameFile(self.folder / f"{'ab'[step % 2]}_{leaf}.f32", self.frame_shape)

    def _write(self, step: int, first: int, x: Any, state: Any) -> None:
        for number, leaf in enumerate([x, *jax.tree.leaves(state)]):
            self._file(step, number).write(first, np.asarray(leaf))

    def _finish(self, step: int) -> None:
        for number in range(1 + self._leaves):
            with open(self._file(step, number).path, "rb") as file:
                os.fsync(file.fileno())
        with atomic_path(self.folder / PROGRESS) as path:
            path.write_text(json.dumps({"done": step}))
        self.done = step

    def _resume(self) -> bool:
        """Goes on from what is there; False if there is nothing."""
        path = self.folder / PROGRESS
        if not path.exists():
            return False
        try:
            self.done = int(json.loads(path.read_text())["done"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: remove the folder {self.folder} and start the render again") from None
        return True
