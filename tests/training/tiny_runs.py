"""What tests of several training programs share: experiments of the size of a test."""

import pathlib

import jax
import ml_collections
import numpy as np

from emv3_jax import command_line
from emv3_jax.options import SamplingOptions
from emv3_jax.training import negatives

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def config(name: str, **changes) -> ml_collections.ConfigDict:
    """An experiment of configs/, with the sizes of a test."""
    cfg = ml_collections.ConfigDict(command_line.load_config(CONFIGS / name).to_dict())
    with cfg.unlocked():
        cfg.update(
            {"steps": 10, "warmup_steps": 1, "learning_rates": ((10, 1e-3),), "export_dtype": "float32", **changes}
        )
    return cfg


def arrays_equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    return all(jax.tree.leaves(same))


def plan_of(recipe, weights="a", steps=2, task="i2v", seed=0) -> dict:
    """Of clips that are made by one checkpoint or another."""
    return negatives.plan_of(recipe.preset, {"dit": weights}, SamplingOptions(steps=steps), recipe.data, task, seed)
