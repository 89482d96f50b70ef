"""Classifier-free guidance over text and audio: several conditions in, one velocity out.

Guidance walks a chain of branches, each of which knows one condition more than the last, and exaggerates each step:

    u (negative text, silence)  ->  d (text, silence)  ->  c (text, audio)
    v = u + g_text (d - u) + g_audio (c - d)                                    SPEC section 4

Where g_text is 1 the term in u cancels, and what is left is v = d + g_audio (c - d), the two-branch form of the flash
model; where both are 1, v = c. So the scales alone say which branches have to run, and they say it before the loop.

Two kinds of function appear here, the second made of the first:
    model velocity   velocity(x, t, context)   x [B, ...], t [B] in [0, 1000]
    guided velocity  velocity(x, t, i)         i: number of the step, which picks the scales; what the sampler sees
Both are pytrees (parameters and contexts are their leaves), so that a jitted sampler takes them as arguments: weights
never become constants of the compiled program, and a second run with the same shapes compiles nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from emv3_jax import sharding
from emv3_jax.diffusion.sampler import as_pytree
from emv3_jax.errors import UserError

Context = Any  # pytree: all that the model is conditioned on, prepared once before the loop
Memory = Any  # pytree: what a velocity keeps from one step to the next; () for most
Scale = float | np.ndarray | jax.Array  # one number, or a table [n] with one number a step


class Branch(NamedTuple):
    """Which conditions one branch is given."""

    name: str
    prompt: bool  # the prompt's embedding; otherwise the negative prompt's
    audio: bool  # the recording; otherwise silence (zeros before the audio projection)


CHAIN = (
    Branch("u", prompt=False, audio=False),
    Branch("d", prompt=True, audio=False),
    Branch("c", prompt=True, audio=True),
)


def branches(text_scale: Scale, audio_scale: Scale) -> tuple[Branch, ...]:
    """The branches that have to run, in the order that `guide` and `combine` expect: u d c, d c, or c."""
    if np.any(np.asarray(text_scale) != 1.0):
        return CHAIN
    if np.any(np.asarray(audio_scale) != 1.0):
        return CHAIN[1:]
    return CHAIN[2:]


def combine(predictions: jax.Array, text_scale: Scale = 1.0, audio_scale: Scale = 1.0) -> jax.Array:
    """One velocity out of the branches' velocities.

    Args:
      predictions: [R, B, ...], the last R branches of the chain u, d, c; R in 1, 2, 3.
      text_scale, audio_scale: guidance strengths at this step. With R = 2 the text scale is not used, with R = 1
        neither is.

    Returns:
      [B, ...].
    """
    if not 1 <= predictions.shape[0] <= len(CHAIN):
        raise ValueError(f"guidance combines 1 to {len(CHAIN)} branches, got {predictions.shape[0]}")
    scales = (text_scale, audio_scale)[len(CHAIN) - predictions.shape[0] :]
    v = predictions[0]
    for k, scale in enumerate(scales):
        v = v + scale * (predictions[k + 1] - predictions[k])
    return v


def dynamic_scale(scale: float, steps: int) -> np.ndarray:
    """Dynamic CFG: a table [n] falling from `scale` at the first step towards half of it at the last.

    g (1/2 + 1/2 (1 - cos(pi ((n - i) / n)^5)) / 2) at step i of n (SPEC section 4). Text and audio guidance each use
    it on their own.
    """
    left = (steps - np.arange(steps)) / steps
    return (scale * (0.5 + 0.25 * (1.0 - np.cos(np.pi * left**5)))).astype(np.float32)


def stack_branches(contexts: list[Any] | tuple[Any, ...]) -> Any:
    """Pytrees of one structure (Conditions or Contexts), one a branch -> one pytree with a leading axis R."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *contexts)


@struct.dataclass
class ModelVelocity:
    """A Linen model with its parameters, as velocity(x, t, context).

    Attributes:
      params: the model's parameter tree.
      model: has the methods context(conditions) and velocity(x, t, context, modality_weights); for a step cache also
        velocity_and_residual, velocity_again and modulation (see `models.dit.DiT`).
      weights: weights(t [B]) -> [B, 3], how much text, image and audio count at t (PhDA); None: all equally. Part of
        the compiled program's identity, so a module-level function or a frozen dataclass rather than a lambda.
    """

    params: Any
    model: nn.Module = struct.field(pytree_node=False)
    weights: Callable[[jax.Array], jax.Array] | None = struct.field(pytree_node=False, default=None)

    def __call__(self, x: jax.Array, t: jax.Array, context: Context) -> jax.Array:
        return jnp.asarray(self.apply("velocity", x, t, context, self._weights(t)))

    def with_residual(self, x: jax.Array, t: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """The velocity, and what the model's blocks added to its tokens."""
        return self.apply("velocity_and_residual", x, t, context, self._weights(t))

    def again(self, x: jax.Array, t: jax.Array, context: Context, residual: jax.Array) -> jax.Array:
        """The velocity, with a residual of an earlier step in place of the blocks."""
        return self.apply("velocity_again", x, t, context, residual)

    def modulation(self, t: jax.Array) -> jax.Array:
        """t [n] -> [n, 6, D], from which `step_cache` knows how much a step changes."""
        return self.apply("modulation", t)

    def _weights(self, t: jax.Array) -> jax.Array | None:
        return None if self.weights is None else self.weights(t)

    def apply(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the model."""
        return self.model.apply({"params": self.params}, *arguments, method=method)


@struct.dataclass
class Guided:
    """velocity(x, t, i) made of a model velocity and one context per branch; build it with `guide`.

    With a step cache it has a memory, which the sampler carries: `start` makes it and `advance` keeps it.
    """

    velocity: Any
    contexts: Context  # every leaf [K, ...]
    text_scale: Scale  # [] or [n]
    audio_scale: Scale  # [] or [n]
    rows: jax.Array | None  # [n, R]: which contexts the branches take at each step; None: the K = R ones, in order
    alone: jax.Array | None  # bool [n]: steps at which the last branch runs alone
    computed: jax.Array | None  # bool [n]: steps that run the blocks; the others reuse
    together: bool = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, t: jax.Array, i: jax.Array | int) -> jax.Array:
        if self.computed is not None:
            raise ValueError("guidance with a step cache has a memory: call advance")
        return self.advance(x, t, i, ())[0]

    def start(self, x: jax.Array) -> Memory:
        """The memory before the first step: residuals [R, ...] of every branch, or nothing."""
        if self.computed is None:
            return ()
        like = jax.eval_shape(lambda: self._predict(x, jnp.zeros(x.shape[:1]), self._at(0))[1])
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def advance(self, x: jax.Array, t: jax.Array, i: jax.Array | int, memory: Memory) -> tuple[jax.Array, Memory]:
        """Velocity [B, ...] of step i, and the memory for the next."""
        predictions, memory = self._predictions(x, t, i, memory)
        return combine(predictions, _at_step(self.text_scale, i), _at_step(self.audio_scale, i)), memory

    def _predictions(self, x: jax.Array, t: jax.Array, i: jax.Array | int, memory: Memory) -> tuple[jax.Array, Memory]:
        """The branches' velocities [R, B, ...] before they are combined, and the memory for the next step."""
        contexts = self._at(i)
        if self.alone is None:
            return self._run(x, t, i, contexts, memory)

        def only_last() -> tuple[jax.Array, Memory]:
            last, residual = self._run(x, t, i, _last(contexts), _last(memory))
            rest = jax.tree.map(lambda old, new: old.at[-1:].set(new), memory, residual)
            return jnp.broadcast_to(last, (jax.tree.leaves(contexts)[0].shape[0], *last.shape[1:])), rest

        return jax.lax.cond(jnp.asarray(self.alone)[i], only_last, lambda: self._run(x, t, i, contexts, memory))

    def _at(self, i: jax.Array | int) -> Context:
        """The contexts of the branches at step i, leaves [R, ...]."""
        if self.rows is None:
            return self.contexts
        return jax.tree.map(lambda leaf: leaf[jnp.asarray(self.rows)[i]], self.contexts)

    def _run(self, x: jax.Array, t: jax.Array, i: Any, contexts: Context, memory: Memory) -> tuple[jax.Array, Memory]:
        if self.computed is None:
            return self._each(lambda context: self.velocity(x, t, context), contexts), ()
        again = lambda context, residual: self.velocity.again(x, t, context, residual)  # noqa: E731
        return jax.lax.cond(
            jnp.asarray(self.computed)[i],
            lambda: self._predict(x, t, contexts),
            lambda: (self._each(again, contexts, memory), memory),
        )

    def _predict(self, x: jax.Array, t: jax.Array, contexts: Context) -> tuple[jax.Array, Memory]:
        return self._each(lambda context: self.velocity.with_residual(x, t, context), contexts)

    def _each(self, one: Callable, *rows: Any) -> Any:
        """`one` of every branch, as one batch or one after another."""
        if jax.tree.leaves(rows)[0].shape[0] == 1:
            out = one(*(jax.tree.map(lambda leaf: leaf[0], row) for row in rows))
            return jax.tree.map(lambda leaf: leaf[None], out)
        if not self.together:
            return jax.lax.map(lambda row: one(*row), rows)
        count = jax.tree.leaves(rows)[0].shape[0]
        axis = sharding.BRANCH if sharding.axis_size(sharding.BRANCH) == count else None
        if axis:
            rows = jax.tree.map(lambda leaf: sharding.divide(leaf, axis), rows)
        return jax.vmap(one, spmd_axis_name=axis)(*rows)


def _last(rows: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[-1:], rows)


def _at_step(scale: Scale, i: jax.Array | int) -> jax.Array:
    scale = jnp.asarray(scale, jnp.float32)
    # A traced index past the end would silently read the last row; NaN shows that the table is too short.
    return scale.at[i].get(mode="fill", fill_value=jnp.nan) if scale.ndim else scale


def guide(
    velocity: Callable[[jax.Array, jax.Array, Context], jax.Array],
    contexts: Context,
    text_scale: Scale = 1.0,
    audio_scale: Scale = 1.0,
    together: bool = True,
    rows: np.ndarray | None = None,
    alone: np.ndarray | None = None,
    computed: np.ndarray | None = None,
) -> Guided:
    """Wraps velocity(x, t, context) into the velocity(x, t, i) that the sampler follows.

    Args:
      velocity: the model, preferably a pytree (`ModelVelocity`, `jax.tree_util.Partial`); a plain function will do.
      contexts: `stack_branches` of one context for each of `branches(text_scale, audio_scale)`, in that order; with
        `rows`, of any number of contexts.
      text_scale, audio_scale: a number, or a table with one number a step. 1 is "no guidance", not "off".
      together: all branches as one batch (fast), or one after another (the memory of one).
      rows: int [n, R], which context each branch takes at each step; negative prompts that change on the way.
      alone: bool [n], steps at which the last branch runs alone (`skipped_guidance`).
      computed: bool [n], steps that run the model's blocks (`step_cache`); needs a `ModelVelocity`.

    Raises:
      ValueError: the number of contexts, or of columns in `rows`, is not the number of branches that the scales call
        for.
    """
    wanted = branches(text_scale, audio_scale)
    found = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(contexts)} if rows is None else {rows.shape[1:]}
    if found != {(len(wanted),)}:
        names = " ".join(branch.name for branch in wanted)
        raise ValueError(f"these scales run the branches {names}; the contexts have leading axes {sorted(found)}")
    velocity = as_pytree(velocity)
    return Guided(velocity, contexts, text_scale, audio_scale, rows, alone, computed, together)


def skipped_guidance(ratio: float, steps: int) -> np.ndarray | None:
    """bool [n]: the last ratio·n steps, which go without guidance (`cfg_skip_ratio`, SPEC section 4); None: none.

    Raises:
      UserError: a ratio outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"cfg_skip_ratio must be between 0 and 1, got {ratio}")
    count = int(ratio * steps)
    return np.arange(steps) >= steps - count if count else None
