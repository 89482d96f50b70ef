"""Whole sampling runs of the released program, replayed with this one: `loop_preview.npz` and `loop_flash.npz` of the
golden data.

Used by the parity command and by the tests. Parameters come from the converter; what is run here is the sampler,
the guidance and the solver that users run.

Axes: B batch, T latent frames, h w latent rows and columns, R guidance branches, n sampling steps.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax.config import DiTConfig
from emv3_jax.diffusion.guidance import Branch, ModelVelocity, branches, dynamic_scale, guide, stack_branches
from emv3_jax.diffusion.sampler import sample
from emv3_jax.diffusion.solvers import sampler_named
from emv3_jax.diffusion.step_cache import IDENTITY, StepCache
from emv3_jax.models.dit import Conditions, DiT


@dataclasses.dataclass(frozen=True)
class Loop:
    """How the released loop was called for one golden run."""

    steps: int
    sampler: str = "flow"
    text_scale: float = 1.0
    audio_scale: float = 1.0
    dynamic: bool = False  # both scales by the dynamic formula
    neg_scale: float = 1.0  # factor of the negative embedding at each of the steps 0..neg_steps, piling up
    neg_steps: int = 0
    cache: StepCache | None = None
    file: str = "loop_preview"  # of the golden data


LOOPS: dict[str, Loop] = {
    "flow_plain": Loop(steps=5, text_scale=4.0, audio_scale=2.9),
    "flow_neg_dyn": Loop(steps=6, text_scale=4.0, audio_scale=2.9, dynamic=True, neg_scale=1.5, neg_steps=2),
    "unipc": Loop(steps=8, sampler="unipc", text_scale=4.0, audio_scale=2.9),
    "dpmpp": Loop(steps=8, sampler="dpmpp", text_scale=4.0, audio_scale=2.9),
    "nocfg": Loop(steps=4),
    "teacache12": Loop(steps=12, text_scale=4.0, audio_scale=2.9, cache=StepCache(0.1, start_steps=3)),
    "teacache12_linear": Loop(
        steps=12, text_scale=4.0, audio_scale=2.9, cache=StepCache(1.6, start_steps=2, polynomial=IDENTITY)
    ),
    "unipc8": Loop(steps=8, sampler="unipc", audio_scale=3.0, file="loop_flash"),
}


def channels_last(x: np.ndarray) -> np.ndarray:
    """[B, C, ...] -> [B, ..., C]."""
    return np.moveaxis(x, 1, -1)


def padded_text(states: np.ndarray, cfg: DiTConfig) -> np.ndarray:
    """Text states [real length, text_width] -> [text_len, text_width], zeros behind."""
    return np.pad(states, ((0, cfg.text_len - len(states)), (0, 0)))


def branch_conditions(golden: Mapping[str, np.ndarray], cfg: DiTConfig, branch: Branch, factor: float) -> Conditions:
    """What one branch of the golden run is given; `factor` multiplies the negative prompt's states."""
    text = golden["prompt"] if branch.prompt else factor * golden["negative"]
    given = jnp.concatenate([channels_last(golden["mask"]), channels_last(golden["masked"])], axis=-1)
    return Conditions(
        given=given,
        text=jnp.asarray(padded_text(text, cfg)[None], jnp.float32),
        image=jnp.asarray(golden["clip"]),
        audio=jnp.asarray(golden["audio"]) * float(branch.audio),
        face_mask=jnp.asarray(golden.get("face_mask", np.ones((1, given.shape[2] * given.shape[3] // 4)))),
        audio_scale=jnp.ones(given.shape[0]),
    )


def replay(
    name: str, golden: Mapping[str, np.ndarray], cfg: DiTConfig, params: Mapping, together: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Runs the golden loop `name` again.

    Args:
      name: a key of LOOPS.
      golden: the arrays of its file.
      cfg, params: the tiny transformer of its file, converted.
      together: guidance branches as one batch, or in turn.

    Returns:
      The final latents of this program and of the released one, both [B, T, h, w, 16].
    """
    loop = LOOPS[name]
    model = ModelVelocity(params, DiT(cfg))
    scales = (loop.text_scale, loop.audio_scale)
    chain = branches(*scales)
    # The negative embedding grows for some steps and then stays: a context for each stage of it.
    factors = loop.neg_scale ** (1.0 + np.arange(loop.neg_steps + 1))
    pairs = [(branch, 1.0) for branch in chain[1:]] + [(chain[0], factor) for factor in factors]
    rows = [branch_conditions(golden, cfg, *pair) for pair in pairs]
    contexts = jax.jit(ModelVelocity.contexts)(model, stack_branches(rows))
    text_scale, audio_scale = (dynamic_scale(s, loop.steps) if loop.dynamic else s for s in scales)
    sampler = sampler_named(loop.sampler)
    grid = sampler.grid(loop.steps, 5.0)
    stage = len(chain) - 1 + np.minimum(np.arange(loop.steps), loop.neg_steps)
    others = np.broadcast_to(np.arange(len(chain) - 1), (loop.steps, len(chain) - 1))
    velocity = guide(
        model, contexts, text_scale, audio_scale, together,
        rows=np.concatenate([stage[:, None], others], axis=1),
        computed=loop.cache.computed_steps(model.modulation(grid.timesteps)) if loop.cache else None,
    )  # fmt: skip
    got = sample(velocity, sampler.solver(grid), grid, channels_last(golden["latents"]))
    return np.asarray(got), np.asarray(channels_last(golden[name]))
