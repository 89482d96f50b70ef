"""Shared by all tests: a pipeline small enough to run anywhere, with random weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax import config
from emv3_jax.pipeline import Pipeline, expected_params

TINY = dataclasses.replace(
    config.DEMO,
    name="tiny",
    vae=dataclasses.replace(config.DEMO.vae, width=4),
    dit=dataclasses.replace(config.DEMO.dit, width=32, heads=2, layers=2, ffn=48, time_features=16),
    text=dataclasses.replace(config.DEMO.text, layers=1, ffn=32),
    image=dataclasses.replace(config.DEMO.image, layers=2),
    height=32,
    width=32,
    max_frames=13,
)


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Weights of the right shapes, none of them zero: what initialisation leaves at 0 or 1 would hide mistakes."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
        x = rng.standard_normal(like.shape).astype(np.float32)
        scales = path[-1].key in ("gamma", "scale")
        return jnp.asarray(1 + 0.1 * x if scales else x / np.sqrt(max(np.prod(like.shape[-2:-1], dtype=int), 16)))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture(scope="module")
def quick_compile():
    """For tests that compile large programs and run them once on next to nothing."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def make_params():
    """`random_params`, for presets that a test makes itself."""
    return random_params


@pytest.fixture(scope="session")
def tiny() -> config.Preset:
    return TINY


@pytest.fixture(scope="session")
def tiny_pipeline() -> Pipeline:
    return Pipeline(TINY, random_params(expected_params(TINY)))
