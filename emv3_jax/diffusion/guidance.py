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

from emv3_jax.diffusion.sampler import as_pytree

Context = Any  # pytree: all that the model is conditioned on, prepared once before the loop
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
      model: has the methods context(conditions) and velocity(x, t, context, modality_weights).
      weights: weights(t [B]) -> [B, 3], how much text, image and audio count at t (PhDA); None: all equally. Part of
        the compiled program's identity, so a module-level function or a frozen dataclass rather than a lambda.
    """

    params: Any
    model: nn.Module = struct.field(pytree_node=False)
    weights: Callable[[jax.Array], jax.Array] | None = struct.field(pytree_node=False, default=None)

    def __call__(self, x: jax.Array, t: jax.Array, context: Context) -> jax.Array:
        modality_weights = None if self.weights is None else self.weights(t)
        variables = {"params": self.params}
        return jnp.asarray(self.model.apply(variables, x, t, context, modality_weights, method="velocity"))

    def contexts(self, conditions: Any) -> Context:
        """`stack_branches` of one Conditions per branch -> the contexts that `guide` takes, leaves [R, ...]."""
        return jax.vmap(lambda one: self.model.apply({"params": self.params}, one, method="context"))(conditions)


@struct.dataclass
class Guided:
    """velocity(x, t, i) made of a model velocity and one context per branch; build it with `guide`."""

    velocity: Callable[[jax.Array, jax.Array, Context], jax.Array]
    contexts: Context  # every leaf [R, ...]
    text_scale: Scale  # [] or [n]
    audio_scale: Scale  # [] or [n]
    together: bool = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, t: jax.Array, i: jax.Array | int) -> jax.Array:
        def one_branch(context: Context) -> jax.Array:
            return self.velocity(x, t, context)

        if jax.tree.leaves(self.contexts)[0].shape[0] == 1:
            return one_branch(jax.tree.map(lambda leaf: leaf[0], self.contexts))
        run = jax.vmap(one_branch) if self.together else lambda contexts: jax.lax.map(one_branch, contexts)
        return combine(run(self.contexts), _at_step(self.text_scale, i), _at_step(self.audio_scale, i))


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
) -> Guided:
    """Wraps velocity(x, t, context) into the velocity(x, t, i) that the sampler follows.

    Args:
      velocity: the model, preferably a pytree (`ModelVelocity`, `jax.tree_util.Partial`); a plain function will do.
      contexts: `stack_branches` of one context for each of `branches(text_scale, audio_scale)`, in that order.
      text_scale, audio_scale: a number, or a table with one number a step. 1 is "no guidance", not "off".
      together: all branches as one batch (fast), or one after another (the memory of one).

    Raises:
      ValueError: the number of contexts is not the number of branches that the scales call for.
    """
    wanted = branches(text_scale, audio_scale)
    rows = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(contexts)}
    if rows != {(len(wanted),)}:
        names = " ".join(branch.name for branch in wanted)
        raise ValueError(f"these scales run the branches {names}; the contexts have leading axes {sorted(rows)}")
    return Guided(as_pytree(velocity), contexts, text_scale, audio_scale, together)
