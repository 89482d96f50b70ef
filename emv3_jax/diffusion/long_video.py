"""Long Video CFG: one latent of any length, followed through overlapping windows that the model sees one at a time.

At every step the velocity of the whole video is put together from the windows' guided velocities, and the solver moves
the whole latent; so every solver works, also those with a memory. In frame f = 0..N of an overlap the later window
counts f / N and the earlier 1 - f / N.

That is the paper's eq. 4 and 5: in window w the guided prediction of an overlapping frame is
e_w + s (blend - e_w(null)), where blend = (1 - f/N) e_w + (f/N) e_w+1. The frame has a second one, from window w+1.
Mixed by the same f / N they are blend + s (blend - blend(null)): guidance is linear, so blending the branches and
blending the guided velocities are one and the same.

The released program blends the latents after every step instead, by the same weights, and not in the first step (SPEC
section 4). Euler's step is x + dsigma v and weights add up to 1, so this too is a blend of velocities: only the first
step differs. (With the solver's step taken window by window, it works for Euler alone.)

Windows that begin with noises of their own paint what the conditions leave open, a background say, each in its own
way, and the video drifts from one to the other. So the noise of the first window's frames may come again in all that
follow (`NOISES`).

Latents live in a `Store`, of which a few windows are in memory; a step is written beside the one before, so that a
render that was interrupted goes on from its last finished step.

Axes: T latent frames, S latent frames of a window, G windows predicted together, n sampling steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from emv3_jax.diffusion.flow import TimeGrid
from emv3_jax.diffusion.solvers import Solver
from emv3_jax.diffusion.store import Store
from emv3_jax.errors import UserError

Blend = Callable[["Windows", int], list[np.ndarray]]
# predict(numbers of windows of one size, x [G, S, h, w, C], step, memory) -> (velocities like x, memory).
# A memory is an array [R, G, ...], or None: before the first step, and where a step leaves it as it was.
Predict = Callable[[tuple[int, ...], np.ndarray, int, Any], tuple[jax.Array, Any]]
CURES = "smaller guidance scales (audio_scale, text_scale), or in float32 (--config.dtype=float32)"


@dataclasses.dataclass(frozen=True)
class Windows:
    """First latent frame and last + 1 of each window, in order; the last ends with the video."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.ends[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in zip(self.starts, self.ends, strict=True))

    @property
    def stride(self) -> int:
        """Frames from the beginning of one window to that of the next; of a single window, its length."""
        return (*self.starts, self.total)[1]

    def finished(self, k: int) -> tuple[int, int]:
        """First and last + 1 of the frames of window k that no later window touches, and no earlier one finished."""
        return self.starts[k], (*self.starts, self.total)[k + 1]

    def groups(self, most: int) -> list[tuple[int, ...]]:
        """Numbers of neighbouring windows of one size, at most so many together."""
        by_size = [[k for k, size in enumerate(self.sizes) if size == one] for one in dict.fromkeys(self.sizes)]
        return [tuple(some[at : at + most]) for some in by_size for at in range(0, len(some), most)]


def plan(total: int, size: int, overlap: int) -> Windows:
    """Windows of equal length; the last is moved back to end with the video. One window where the video is no longer.

    Raises:
      UserError: no window is longer than the overlap.
    """
    if total <= size:
        return Windows((0,), (total,))
    _check_overlap(size, overlap)
    starts = (*range(0, total - size, size - overlap), total - size)
    return Windows(starts, tuple(start + size for start in starts))


def released_plan(total: int, size: int, overlap: int) -> Windows:
    """The released program's windows: as `plan`, but the last stays where it is and is shorter.

    Raises:
      UserError: as `plan`.
    """
    if total <= size:
        return Windows((0,), (total,))
    _check_overlap(size, overlap)
    starts = tuple(range(0, max(total - overlap, 1), size - overlap))
    return Windows(starts, tuple(min(start + size, total) for start in starts))


def _check_overlap(size: int, overlap: int) -> None:
    if not 0 <= overlap < size:
        raise UserError(f"windows of {size} latent frames cannot overlap by {overlap}")


def long_video_cfg(windows: Windows, step: int) -> list[np.ndarray]:
    """Weights [S] of each window by eq. 4: f / N for the later one in frame f = 0..N of an overlap."""
    return _fold(windows, _rising)


def released_blend(windows: Windows, step: int) -> list[np.ndarray]:
    """Weights [S] of the released loop: 0 to 1 across an overlap, both included; in step 0 the later window wins."""
    return _fold(windows, np.ones if step == 0 else _rising)


def _rising(count: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, count)


def _fold(windows: Windows, ramp: Callable[[int], np.ndarray]) -> list[np.ndarray]:
    """Lays one window after another over what is there: in the overlap the new one counts `ramp`, the rest less."""
    pairs = list(zip(windows.starts, windows.ends, strict=True))
    weights, covered = np.zeros((len(pairs), windows.total)), 0
    for row, (start, end) in enumerate(pairs):
        overlap = covered - start
        share = np.concatenate([ramp(overlap), np.ones(end - covered)]) if overlap else np.ones(end - start)
        weights[:row, start:end] *= 1.0 - share
        weights[row, start:end] = share
        covered = end
    return [row[start:end].astype(np.float32) for row, (start, end) in zip(weights, pairs, strict=True)]


def fresh_noise(frames: np.ndarray, stride: int, seed: int) -> np.ndarray:
    """Every frame has a noise of its own."""
    return frames


def repeated_noise(frames: np.ndarray, stride: int, seed: int) -> np.ndarray:
    """Every window begins with the noises of the first (but the last window, where it was moved back)."""
    return frames % stride


def shuffled_noise(frames: np.ndarray, stride: int, seed: int) -> np.ndarray:
    """As `repeated_noise`, each time in another order, so that motions do not come again in step (the local shuffle of
    FreeNoise, Qiu et al. 2023)."""

    def order(turn: int) -> np.ndarray:
        return np.random.default_rng([seed % 2**32, turn]).permutation(stride) if turn else np.arange(stride)

    return np.array([order(turn)[place] for turn, place in zip(*np.divmod(frames, stride), strict=True)], int)


# choose(numbers of latent frames [k], stride of the windows, seed) -> numbers of the noises that they begin with [k]
NOISES = {"fresh": fresh_noise, "repeated": repeated_noise, "shuffled": shuffled_noise}


@jax.jit
def _move(solver: Solver, state: Any, x: jax.Array, v: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
    return solver.step(state, x, v, i)


def follow(
    predict: Predict,
    solver: Solver,
    grid: TimeGrid,
    windows: Windows,
    store: Store,
    blend: Blend = long_video_cfg,
    group: int = 1,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Follows the velocity of a whole video from the step where the store stands to the last.

    Args:
      predict: velocities of some windows; always of `group` of them, the last one repeated where fewer are left.
      solver: made from the same grid.
      windows: from `plan`.
      store: holds the latents [T, ...] and the solver's state before the next step, and takes those after it.
      blend: weights [S] of each window at a step.
      group: how many windows are predicted together.
      on_step: called as on_step(steps done, steps in all).
    Raises:
      UserError: a velocity is not finite; the step that it belongs to is not done.
    """
    for i in range(store.done, grid.steps):
        weights = blend(windows, i)
        with store.next_step() as write:
            frames = np.zeros((max(windows.sizes), *store.frame_shape), np.float32)  # from the window's start on
            for members in windows.groups(group):
                padded = (*members, *members[-1:] * (group - len(members)))
                x = np.stack([store.read_x(windows.starts[k], windows.ends[k]) for k in padded])
                v, memory = predict(padded, x, i, _recall(store, padded))
                _remember(store, members, memory)
                velocities = finite(np.asarray(v), f"step {i + 1} of {grid.steps}")
                for k, velocity in zip(members, velocities, strict=False):
                    frames[: len(velocity)] += weights[k].reshape(-1, *(1,) * len(store.frame_shape)) * velocity
                    first, last = windows.finished(k)
                    x_old, state = store.read_x(first, last), store.read_state(first, last)
                    write(first, *_move(solver, state, x_old, frames[: last - first], np.int32(i)))
                    frames = np.concatenate([frames[last - first :], np.zeros_like(frames[: last - first])])
        if on_step:
            on_step(i + 1, grid.steps)


def finite(values: np.ndarray, what: str) -> np.ndarray:
    """The values of a step, say, as they are. Raises UserError if one is infinite or no number."""
    if not np.isfinite(values).all():
        raise UserError(f"{what} gave numbers that are not finite: start again with {CURES}")
    return values


def _recall(store: Store, members: tuple[int, ...]) -> np.ndarray | None:
    """What some windows remember, [R, G, ...]. Each has its own file: a render may go on with other groups."""
    memories = [store.read_memory(k) for k in members]
    return None if memories[0] is None else np.stack(memories, axis=1)


def _remember(store: Store, members: tuple[int, ...], memory: jax.Array | None) -> None:
    if memory is not None:
        for k, one in zip(members, np.moveaxis(np.asarray(memory), 1, 0), strict=False):
            store.write_memory(k, one)
