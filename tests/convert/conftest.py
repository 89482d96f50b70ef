"""Tiny models of every kind, and checkpoints of them as their authors write them."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from convert import engine
from convert.parity import CLIP_TINY, DIT_FLASH_TINY, DIT_TINY, UMT5_TINY, WAV2VEC2_TINY
from convert.registry import MODELS
from convert.sources import Spec
from convert.writers import SafetensorsWriter
from emv3_jax.config import VAEConfig

TINY = {
    "dit-preview": DIT_TINY, "dit-flash": DIT_FLASH_TINY, "dit-base": DIT_TINY, "vae": VAEConfig(width=4, res_blocks=1),
    "umt5": UMT5_TINY, "clip": CLIP_TINY, "wav2vec2": WAV2VEC2_TINY,
}  # fmt: skip


@pytest.fixture
def tiny_models(monkeypatch) -> None:
    """Makes the registry's released sizes tiny."""
    for name, cfg in TINY.items():
        monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], cfg=cfg))


@functools.cache
def _tensors(name: str, naming: str, form: str | None, seed: int) -> dict[str, np.ndarray]:
    model, cfg = MODELS[name], TINY[name]
    rng = np.random.default_rng(seed)
    flat = traverse_util.flatten_dict(model.tree(cfg), sep="/")
    params = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in flat.items()}
    return engine.to_torch(model.naming(naming).table(cfg, form), traverse_util.unflatten_dict(params, sep="/"))


@pytest.fixture(scope="session")
def tensors_of() -> Callable[..., dict[str, np.ndarray]]:
    """Function: (model, naming, form, seed) -> random torch tensors of its tiny size."""

    def tensors(name: str, naming: str = "released", form: str | None = None, seed: int = 0) -> dict[str, np.ndarray]:
        return dict(_tensors(name, naming, form, seed))

    return tensors


@pytest.fixture(scope="session")
def write() -> Callable[[Path, dict[str, np.ndarray]], Path]:
    """Function: tensors -> a .safetensors file, with its folders."""

    def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {key: Spec(value.shape, value.dtype) for key, value in tensors.items()}
        with SafetensorsWriter(path, header, {"format": "pt"}) as writer:
            for value in tensors.values():
                writer.write(value)
        return path

    return write
