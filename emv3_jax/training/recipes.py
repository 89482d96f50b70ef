"""Which recipe a config asks for."""

from typing import Any

from emv3_jax.config import PRESETS
from emv3_jax.errors import UserError
from emv3_jax.training.dit_recipe import DiTRecipe
from emv3_jax.training.vae_recipe import VAERecipe

RECIPES = {"vae": VAERecipe, "dit": DiTRecipe}


def build(cfg: Any) -> Any:
    """The recipe `cfg.recipe` for the preset `cfg.preset`.

    Raises:
      UserError: for a recipe or preset that does not exist.
    """
    if "recipe" not in cfg:
        raise UserError("this config has no key recipe, so it is not for training: give another, see configs/")
    if cfg.recipe not in RECIPES:
        raise UserError(f"config key recipe: {cfg.recipe!r} is none of {', '.join(sorted(RECIPES))}")
    if cfg.preset not in PRESETS:
        raise UserError(f"config key preset: {cfg.preset!r} is none of {', '.join(sorted(PRESETS))}")
    return RECIPES[cfg.recipe](cfg, PRESETS[cfg.preset])
