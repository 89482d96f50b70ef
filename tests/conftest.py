"""Shared by all tests: a pipeline small enough to run anywhere, with random weights."""

import dataclasses
import os
from pathlib import Path
from typing import Any

# Before JAX is imported. What one test file compiles the others, their workers and the programs they start need not
# compile again, nor need the next run. Not the user's own cache: tests are to leave nothing there.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax import config, media
from emv3_jax.pipeline import RATE, Pipeline, expected_params

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


@pytest.fixture(scope="module")
def filmed(tmp_path_factory) -> str:
    """A video of 20 frames at 20 a second, larger than the model's pictures, with sound."""
    path = tmp_path_factory.mktemp("filmed") / "filmed.mp4"
    rng = np.random.default_rng(1)
    frames = np.repeat(rng.integers(0, 256, (5, 12, 12, 3), np.uint8).repeat(8, 1).repeat(8, 2), 4, axis=0)
    with media.VideoWriter(
        path, 96, 96, fps=20, wave=0.1 * rng.standard_normal(RATE).astype(np.float32), rate=RATE
    ) as writer:
        writer.write(frames)
    return str(path)
