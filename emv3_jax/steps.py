"""Everything about the sampling steps that is known before the loop, as tables that a compiled step reads.

Axes: n sampling steps, R guidance branches, K stages of the negative prompt.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from emv3_jax import contexts, sharding
from emv3_jax.contexts import Shared, Window, branch_contexts
from emv3_jax.diffusion import guidance, negatives, step_cache
from emv3_jax.options import SamplingOptions


@struct.dataclass
class Steps:
    """Tables of a run of n steps; a pytree."""

    timesteps: np.ndarray  # [n]
    text_scale: guidance.Scale  # [] or [n]
    audio_scale: guidance.Scale  # [] or [n]
    stages: np.ndarray  # int [n], which mixture of the negative prompts each step takes
    alone: np.ndarray | None  # bool [n], steps without guidance
    computed: np.ndarray | None  # bool [n], steps that run the blocks
    chain: tuple[guidance.Branch, ...] = struct.field(pytree_node=False)
    together: bool = struct.field(pytree_node=False)

    def guide(
        self, velocity: guidance.ModelVelocity, contexts: guidance.Context, rows: np.ndarray | None = None
    ) -> guidance.Guided:
        """`guidance.guide` with these tables."""
        return guidance.Guided(
            velocity, contexts, self.text_scale, self.audio_scale, rows, self.alone, self.computed, self.together
        )

    def rows(self, stages: int) -> np.ndarray:
        """Which context each branch takes at each step, int [n, R]; `branch_contexts` made those of all stages."""
        count = len(self.chain)
        if self.chain[0].prompt:
            return np.broadcast_to(np.arange(count), (len(self.timesteps), count))
        others = np.broadcast_to(np.arange(stages, stages + count - 1), (len(self.timesteps), count - 1))
        return np.concatenate([self.stages[:, None], others], axis=1)


def make_steps(options: SamplingOptions, velocity: guidance.ModelVelocity) -> Steps:
    """The tables of some options; the step cache asks the model how much its modulation changes from step to step."""
    timesteps = np.asarray(options.grid.timesteps)
    text_scale, audio_scale = options.scales
    computed = None
    if options.cache:
        computed = options.cache.computed_steps(np.asarray(jax.jit(_modulation)(velocity, timesteps)))
    return Steps(
        timesteps=timesteps,
        text_scale=text_scale,
        audio_scale=audio_scale,
        stages=negatives.stages(options.negatives.table(timesteps))[1],
        alone=guidance.skipped_guidance(options.cfg_skip_ratio, options.steps),
        computed=computed,
        chain=guidance.branches(text_scale, audio_scale),
        together=options.branches_together,
    )


def describe(steps: Steps) -> list[str]:
    """Lines for the log: steps that are reused or go without guidance."""
    lines = [step_cache.describe(steps.computed)] if steps.computed is not None else []
    if steps.alone is not None:
        lines.append(f"guidance: the last {int(steps.alone.sum())} of {len(steps.alone)} steps go without")
    return lines


def _modulation(velocity: guidance.ModelVelocity, timesteps: jax.Array) -> jax.Array:
    return velocity.modulation(timesteps)


@jax.jit
def window_velocity(
    velocity: guidance.ModelVelocity, steps: Steps, shared: Shared, window: Window, x: jax.Array, i: jax.Array,
    memory: Any,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Guided velocity of step i for a batch of windows x [B, T, h, w, C], and what is to be remembered."""
    window, x = jax.tree.map(lambda leaf: sharding.divide(leaf, sharding.DATA), (window, x))
    stage = jnp.asarray(steps.stages)[i]
    rows = branch_contexts(velocity, shared, window, steps.chain, (stage,))
    t = jnp.full(x.shape[:1], jnp.asarray(steps.timesteps)[i])
    return steps.guide(velocity, rows).advance(x, t, i, memory)


@jax.jit
def no_memory(
    velocity: guidance.ModelVelocity, steps: Steps, shared: Shared, window: Window, x: jax.Array
) -> Any:  # fmt: skip
    """The memory before the first step."""
    return steps.guide(velocity, branch_contexts(velocity, shared, window, steps.chain, (0,))).start(x)


shared: Any = jax.jit(contexts.shared)
# All of a run's contexts, for runs in one piece.
all_contexts = jax.jit(branch_contexts, static_argnames=("chain", "stages"))
