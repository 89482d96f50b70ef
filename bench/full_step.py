"""The training step of configs/sft_1b.py as train.py takes it, for the benches: without weights, and without films."""

import argparse
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import sft_1b
from emv3_jax.data.examples import encoders_trained
from emv3_jax.models.dit import zero_inputs
from emv3_jax.pipeline import expected_params
from emv3_jax.training import recipes
from emv3_jax.training import state as train_state
from emv3_jax.training.dit_recipe import DiTRecipe
from emv3_jax.training.loop import PEAKS

PEAK = {kind: PEAKS[f"TPU {kind}"] for kind in ("v4", "v5e", "v5p", "v6e")}  # bf16 FLOP/s of a chip

Latents = tuple[int, int, int]


class FullStep:
    """The step for a preset: AdamW, float32 masters, moving average, PhDA, clips of a batch one after another.

    Args:
      preset: its name.
      model: fields of the transformer's config that differ from those of configs/sft_1b.py.

    Attributes:
      recipe: whose loss it is.
      update: (state, constants, batch) -> (state, metrics), to be compiled (`state.make_step`).
    """

    def __init__(self, preset: str, **model: Any):
        config = sft_1b.get_config()
        config.preset = preset
        config.model.update(model)
        self.recipe = DiTRecipe(config, recipes.preset_of(config))
        cfg = self.recipe.preset.dit
        self.recipe.__dict__["_null_text"] = np.zeros((1, cfg.text_len, cfg.text_width), np.float32)
        self._optimizer = train_state.make_optimizer(config)
        self.update = train_state.make_update(
            self.recipe.loss, self._optimizer, config.ema_decay, config.micro_batches, self.recipe.restarts()
        )

    def params(self) -> Any:
        """Shapes of what is trained."""
        shapes = expected_params(self.recipe.preset)
        return {role: shapes[role] for role in self.recipe.trained}

    def state(self, params: Any) -> train_state.TrainState:
        """Step 0."""
        return train_state.init_state(params, self._optimizer)

    def clips(self, latents: Latents, count: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of so many clips (`examples.batch`)."""
        preset, (frames, height, width) = self.recipe.preset, latents
        cfg, scale = preset.dit, preset.vae.spatial_factor
        cond = jax.eval_shape(lambda: zero_inputs(cfg, frames))[2]
        one = lambda *rest, dtype=jnp.float32: jax.ShapeDtypeStruct((count, *rest), dtype)  # noqa: E731
        rows = {
            "latents": one(*latents, cfg.latent_channels), "given": one(*latents, cond.given.shape[-1]),
            "task": one(dtype=jnp.int32), "has_image": one(), "audio": one(*cond.audio.shape[1:]),
            "face_mask": one(height * width // 4),
        }  # fmt: skip
        if encoders_trained(preset):
            ids, picture = one(cfg.text_len, dtype=jnp.int32), one(scale * height, scale * width, 3)
            return {**rows, "ids": ids, "text_mask": one(cfg.text_len), "image": picture}
        return {**rows, "text": one(*cond.text.shape[1:]), "image": one(*cond.image.shape[1:])}


def latents_of(text: str) -> Latents:
    """--latents FRAMES,ROWS,COLUMNS, for argparse."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(f"must be frames, rows and columns, such as 29,60,104, got {text!r}")
    frames, height, width = map(int, text.split(","))
    if height % 2 or width % 2:
        raise argparse.ArgumentTypeError(f"rows and columns must be even, got {text!r}")
    return frames, height, width
