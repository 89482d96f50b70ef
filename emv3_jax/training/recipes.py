"""Which recipe a config asks for, and whether it can be followed."""

import dataclasses
from typing import Any

from emv3_jax.config import PRESETS, Preset
from emv3_jax.errors import UserError
from emv3_jax.training import checks
from emv3_jax.training.dit_recipe import DiTRecipe
from emv3_jax.training.vae_recipe import VAERecipe

RECIPES = {"vae": VAERecipe, "dit": DiTRecipe}
CHECKS = {"vae": checks.vae, "dit": checks.dit}  # (cfg, preset) -> what is wrong


def build(cfg: Any) -> Any:
    """The recipe `cfg.recipe` for the preset `cfg.preset`; says so where the run does not end with its stages.

    Raises:
      UserError: for a recipe or preset that does not exist; for keys that are missing or of impossible values, all of
        them in one message, before any work.
    """
    if wrong := problems(cfg):
        raise UserError("; ".join(wrong))
    for note in checks.notes(cfg):
        print(f"note: {note}", flush=True)
    return RECIPES[cfg.recipe](cfg, preset_of(cfg))


def problems(cfg: Any) -> list[str]:
    """What is wrong with the keys of a config, one line each.

    Raises:
      UserError: for a recipe or preset that does not exist.
    """
    if "recipe" not in cfg:
        raise UserError("this config has no key recipe, so it is not for training: give another, see configs/")
    if cfg.recipe not in tuple(RECIPES):  # compared, not hashed: it may be of any type
        raise UserError(f"config key recipe: {cfg.recipe!r} is none of {', '.join(sorted(RECIPES))}")
    return checks.run(cfg) + CHECKS[cfg.recipe](cfg, preset_of(cfg))


def without_videos(cfg: Any) -> str:
    """Why a config, whose recipe there is, cannot make videos for review; empty: it can."""
    if RECIPES[cfg.recipe] is DiTRecipe:
        return ""
    return f"config key recipe: {cfg.recipe!r} makes no videos that could be reviewed: give a config of the recipe dit"


def preset_of(cfg: Any) -> Preset:
    """The preset that a config names, with the transformer's fields that it sets (section `model`, checks.MODEL).

    Raises:
      UserError: there is no such preset, or no such field.
    """
    if cfg.get("preset") not in tuple(PRESETS):  # compared, not hashed: it may be of any type
        raise UserError(f"config key preset: {cfg.get('preset')!r} is none of {', '.join(sorted(PRESETS))}")
    preset, changes = PRESETS[cfg.preset], cfg.get("model", {})
    if not checks.SECTION[0](changes):
        raise UserError(f"config key model must be {checks.SECTION[1]}, got {changes!r}")
    if unknown := sorted(set(changes) - set(checks.MODEL)):
        raise UserError(f"config key model: {unknown[0]!r} is none of {', '.join(sorted(checks.MODEL))}")
    return dataclasses.replace(preset, dit=dataclasses.replace(preset.dit, **changes))
