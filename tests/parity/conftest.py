"""Independent implementations at tiny random sizes; their weights go through a real file and the real converter."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from convert import engine
from convert.registry import identify
from convert.sources import Source, open_source


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def randomize(model: Any, seed: int = 0) -> Any:
    """Fills a torch model, in place, with weights of which none is 0 or 1: initial ones would hide mistakes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            x = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and not name.endswith("bias"):
                x = 1 + 0.1 * x
            elif parameter.ndim > 1 and not name.endswith(("modulation", "scale_shift_table")):
                x = x / np.sqrt(max(parameter[0].numel(), 1))
            else:
                x = 0.2 * x
            parameter.copy_(x)
    return model.eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[Any], Source]:
    """Function: a torch model -> the file that its own library writes of it."""

    def save(model: Any) -> Source:
        folder: Path = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        return open_source(folder)

    return save


@pytest.fixture(scope="session")
def converted() -> Callable[[Source, str, str, Any], dict]:
    """Function: a file, the model and naming that it must be recognized as, a config -> parameters."""

    def convert(source: Source, model: str, naming: str, cfg: Any) -> dict:
        match = identify(source.header)[0]
        assert (match.model.name, match.naming.name) == (model, naming)
        source = match.naming.prepare(source)
        tree = match.model.target_tree(cfg)
        checkpoint = engine.Checkpoint(str(source.path), match.table(cfg), tree, source.header, source.read)
        leaves = engine.plan_to_jax([checkpoint]).leaves
        return traverse_util.unflatten_dict({leaf.path: leaf.array() for leaf in leaves}, sep="/")

    return convert


@pytest.fixture(scope="session")
def tensors_of() -> Callable[[Source], dict[str, np.ndarray]]:
    """Function: a file -> all of its tensors."""
    return lambda source: {key: source.read(key) for key in source.header}


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """See `randomize`."""
    return randomize


@pytest.fixture(scope="session")
def assert_same_tensors() -> Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], None]:
    """Function of two sets of tensors: the same names, types, shapes and bytes."""

    def check(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert got[key].dtype == value.dtype and got[key].shape == value.shape, key
            assert got[key].tobytes() == value.tobytes(), key

    return check


@pytest.fixture(scope="session")
def full_size_shapes() -> Callable[[engine.Table, Mapping], dict[str, tuple[int, ...]]]:
    """Function: a table and a model's tree -> torch name and shape of every tensor."""

    def shapes(table: engine.Table, tree: Mapping) -> dict[str, tuple[int, ...]]:
        plan = engine.plan_to_torch(table, engine.specs(traverse_util.flatten_dict(tree, sep="/")), tree)
        return {tensor.key: tensor.spec.shape for tensors in plan.values() for tensor in tensors}

    return shapes
