"""Whole sampling runs of the released program, replayed with this one: `loop_*.npz` of the golden data.

Used by the parity command and by the tests. Parameters come from the converter; what is run here is the sampler,
the guidance and the solver that users run.

Axes: B batch, T latent frames, h w latent rows and columns, R guidance branches, n sampling steps.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from emv3_jax import contexts, steps
from emv3_jax.config import DiTConfig
from emv3_jax.contexts import Window
from emv3_jax.diffusion import long_video, negatives
from emv3_jax.diffusion.guidance import ModelVelocity
from emv3_jax.diffusion.sampler import sample
from emv3_jax.diffusion.step_cache import IDENTITY, StepCache
from emv3_jax.diffusion.store import Store
from emv3_jax.models.audio_tokens import audio_encoder
from emv3_jax.models.dit import DiT
from emv3_jax.options import SamplingOptions


@dataclasses.dataclass(frozen=True)
class Loop:
    """How the released loop was called for one golden run, and the file that holds it."""

    options: SamplingOptions
    cache: StepCache | None = None
    file: str = "loop_preview"


_GUIDED = SamplingOptions(shift=5.0, text_scale=4.0, audio_scale=2.9)
_with = functools.partial(dataclasses.replace, _GUIDED)
LOOPS: dict[str, Loop] = {
    "flow_plain": Loop(_with(steps=5)),
    "flow_neg_dyn": Loop(
        _with(steps=6, text_dynamic=True, audio_dynamic=True, neg_scale=1.5, neg_steps=2, neg_growth="cumulative")
    ),
    "unipc": Loop(_with(steps=8, sampler="unipc")),
    "dpmpp": Loop(_with(steps=8, sampler="dpmpp")),
    "nocfg": Loop(_with(steps=4, text_scale=1.0, audio_scale=1.0)),
    "teacache12": Loop(_with(steps=12), cache=StepCache(0.1, start_steps=3)),
    "teacache12_linear": Loop(_with(steps=12), cache=StepCache(1.6, start_steps=2, polynomial=IDENTITY)),
    # Windows of 5 latent frames that overlap by 2.
    "long": Loop(_with(steps=4, long_video="released", window=17, overlap=2), file="loop_long"),
    "unipc8": Loop(_with(steps=8, sampler="unipc", text_scale=1.0, audio_scale=3.0), file="loop_flash"),
}


def channels_last(x: np.ndarray) -> np.ndarray:
    """[B, C, ...] -> [B, ..., C]."""
    return np.moveaxis(x, 1, -1)


def padded_text(states: np.ndarray, cfg: DiTConfig) -> np.ndarray:
    """Text states [real length, text_width] -> [text_len, text_width], zeros behind."""
    return np.pad(states, ((0, cfg.text_len - len(states)), (0, 0)))


def texts(golden: Mapping[str, np.ndarray], cfg: DiTConfig, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States of the prompt [1, text_len, text_width] and of the negative one [K, ...], times each of K factors."""
    states = (golden["prompt"], golden.get("negative", golden["prompt"]))  # flash runs without a negative prompt
    prompt, negative = (padded_text(some, cfg).astype(np.float32) for some in states)
    return prompt[None], np.stack([np.float32(factor) * negative for factor in factors])


def window_of(golden: Mapping[str, np.ndarray], cfg: DiTConfig, first: int, last: int) -> Window:
    """What latent frames first..last - 1 of the golden run are given: mask and masked latents of the first frames, and
    the sound from feature 8·first on."""
    given = np.concatenate([channels_last(golden["mask"]), channels_last(golden["masked"])], axis=-1)
    frames = given.shape[1]
    encoder, audio = audio_encoder(cfg, parent=None), golden["audio"][0]
    piece = encoder.piece(len(audio), first, last - first, alone=last - first < frames)
    return Window(
        given=given[:, : last - first],
        audio=piece.cut(audio)[None],
        segments=piece.segments[None],
        prompts=np.zeros((1, 1), int),
        text_share=np.ones((1, 1, last - first), np.float32),
        pictures=np.zeros(1, int),
        audio_gain=golden.get("face_mask", np.ones((1, given.shape[2] * given.shape[3] // 4), np.float32)),
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
    velocity = ModelVelocity(params, DiT(cfg))
    plan = steps.make_steps(dataclasses.replace(loop.options, branches_together=together), velocity)
    if loop.cache:
        plan = dataclasses.replace(plan, computed=loop.cache.computed_steps(velocity.modulation(plan.timesteps)))
    factors, _ = negatives.stages(loop.options.negatives.table(plan.timesteps))
    parts = steps.shared(velocity, *texts(golden, cfg, factors[:, 0]), golden["clip"])
    noise, want = channels_last(golden["latents"]), channels_last(golden[name])
    if loop.options.window:
        return _long(loop.options, golden, cfg, velocity, plan, parts, noise), want
    stages = tuple(range(parts.negatives))
    rows = steps.all_contexts(velocity, parts, window_of(golden, cfg, 0, noise.shape[1]), plan.chain, stages)
    guided = plan.guide(velocity, rows, plan.rows(len(stages)))
    return np.asarray(sample(guided, loop.options.solver, loop.options.grid, noise)), want


def _long(
    options: SamplingOptions, golden: Mapping[str, np.ndarray], cfg: DiTConfig, velocity: ModelVelocity,
    plan: steps.Steps, parts: contexts.Shared, noise: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The same through windows and a folder, as long videos run."""
    windows = options.windows(noise.shape[1], 0)

    def predict(members: tuple[int, ...], x: np.ndarray, i: int, memory: None) -> tuple[jax.Array, None]:
        window = window_of(golden, cfg, windows.starts[members[0]], windows.ends[members[0]])
        return steps.window_velocity(velocity, plan, parts, window, x, np.int32(i), ())[0], None

    with tempfile.TemporaryDirectory() as folder:
        start = lambda first, last: (noise[0, first:last], ())  # noqa: E731
        store = Store(Path(folder) / "render", noise.shape[2:], (), start, noise.shape[1])
        long_video.follow(predict, options.solver, options.grid, windows, store, options.long_form.blend)
        return store.read_x(0, store.total)[None]
