"""What the demo takes where nothing is given: a puppet's portrait and a sentence."""

import pathlib
from typing import Any

import numpy as np

from emv3_jax import media
from emv3_jax.config import PRESETS, Preset
from emv3_jax.errors import UserError

SENTENCE = pathlib.Path(__file__).parent / "puppets" / "assets" / "demo_sentence.wav"
PUPPETS_ONLY = "the demo's weights know drawn puppets only: other pictures come out as blots"


def preset(cfg: Any) -> Preset:
    """The preset that a config names.

    Raises:
      UserError: there is none of that name.
    """
    if cfg.preset not in PRESETS:
        raise UserError(f"config key preset: {cfg.preset!r} is none of {', '.join(sorted(PRESETS))}")
    return PRESETS[cfg.preset]


def portrait(index: int, size: int) -> np.ndarray:
    """Held-out puppet number `index` at rest: [size, size, 3] uint8."""
    from emv3_jax.puppets import renderer, world

    if index < 0:
        raise UserError(f"config key puppet must be 0 or more, got {index}")
    pose = world.pose_clip(np.zeros((1, 2)), "still", "calm", "fixed", np.zeros(0))
    video = renderer.render_clip(world.sample_identity("heldout", index), pose, size, size)
    return media.to_uint8(video[0])
