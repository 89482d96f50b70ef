"""A tiny preset's weights, data and recipe, and a review folder."""

import pathlib

import pytest
from quadratic import Quadratic
from quadratic import config as quadratic_config
from tiny_runs import config, plan_of

from emv3_jax import checkpoint
from emv3_jax.data import builder
from emv3_jax.data.extract import Extractor, encoder_hash
from emv3_jax.data.puppets import Puppets
from emv3_jax.options import SamplingOptions
from emv3_jax.pipeline import expected_params
from emv3_jax.training import loop, negatives, verdicts
from emv3_jax.training.dit_recipe import DiTRecipe


@pytest.fixture(scope="module")
def weights(tiny_pipeline, tmp_path_factory) -> pathlib.Path:
    """A folder with the tiny pipeline's weights."""
    folder = tmp_path_factory.mktemp("weights")
    checkpoint.save_models(folder, tiny_pipeline.params)
    return folder


@pytest.fixture(scope="module")
def data(tiny, weights, tmp_path_factory) -> pathlib.Path:
    """A dataset of four puppets, nine frames each."""
    folder = tmp_path_factory.mktemp("data") / "puppets"
    vae = checkpoint.load_params(weights / "vae.safetensors")
    extractor = Extractor(tiny, {"vae": vae})
    identity = {"preset": tiny.name, "vae": encoder_hash(vae)}
    builder.build(Puppets("train", 4, 9, 32), extractor, folder, 1, identity, say=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def make(tiny, weights, data):
    """DiTRecipe with changed keys."""

    def make(**changes) -> DiTRecipe:
        keys = {
            "frozen_weights": str(weights), "data": str(data), "stages": ((5, ((5, 3),)), (10, ((9, 2),))),
            "tasks": ((10, (("i2v", 0.5), ("t2v", 0.5))),), "eval_clips": 2, "eval_frames": 13,
            "sampling": {"steps": 2, "shift": 3.0, "text_scale": 2.0, "audio_scale": 2.0},
        }  # fmt: skip
        return DiTRecipe(config("demo_dit.py", **{**keys, **changes}), tiny)

    return make


@pytest.fixture(scope="module")
def review(make, weights, tiny, tmp_path_factory) -> pathlib.Path:
    """A review folder of four clips, two of which were rejected."""
    folder = tmp_path_factory.mktemp("review")
    recipe = make(stages=((10, ((9, 2),)),))
    pipe = recipe.make_pipeline(checkpoint.load_models(weights, {n: expected_params(tiny)[n] for n in recipe.trained}))
    negatives.sample(pipe, SamplingOptions(steps=2), recipe.data, folder, 4, 2, plan_of(recipe))
    rows = verdicts.read_clips(folder)
    for row, issue in zip(rows, ("lips", "motion", None, None), strict=True):
        verdicts.add_verdict(folder, row["id"], "reject" if issue else "keep", issue)
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    assert loop.train(Quadratic(), quadratic_config(), workdir) == 0
    return workdir
