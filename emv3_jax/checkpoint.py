"""Parameter trees in safetensors files: '/'-joined paths as names, written whole or not at all."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, atomic_path

FEW = 8  # differences that still fit into one line


def write_safetensors(path: PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a .safetensors file whole or not at all.

    Raises:
      UserError: `path` cannot be written.
    """
    with atomic_path(path) as temporary:
        save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, temporary)
        temporary.chmod(0o644)  # safetensors lets nobody but the owner read


def save_params(path: pathlib.Path, params: Mapping, dtype: str = "float32"):
    """Writes a parameter tree; the file appears only when it is complete.

    Args:
      path: a .safetensors file.
      params: nested dict of arrays.
      dtype: of the arrays in the file; single numbers, such as the scale of adapters, keep theirs.
    """
    flat = {name: np.asarray(value) for name, value in traverse_util.flatten_dict(dict(params), sep="/").items()}
    arrays = {name: value.astype(dtype, order="C") if value.ndim else value for name, value in flat.items()}
    write_safetensors(path, arrays)


def load_params(path: pathlib.Path, like: Any = None) -> dict:
    """Reads a parameter tree as float32.

    Args:
      path: a file of `save_params`.
      like: a tree of arrays or shapes that the file must match exactly.
    Raises:
      UserError: no such file, damaged, or keys or shapes differ from `like` (all differences in one message).
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: train them first, or give another path")
    try:
        with safe_open(path, framework="numpy") as file:
            flat = {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}): copy or train it again") from error
    if like is not None:
        check_tree(path, flat, like)
    return traverse_util.unflatten_dict(flat, sep="/")


def check_tree(source: PathLike, found: Mapping[str, Any], like: Any) -> None:
    """Raises UserError, with all differences (many of them as details), unless weights are just those of a model.

    Args:
      source: names the weights in the message.
      found: what they hold, by '/'-joined path; of arrays or shapes only the shape is looked at.
      like: the model's parameter tree, of arrays or shapes.
    """
    wanted = {name: tuple(leaf.shape) for name, leaf in traverse_util.flatten_dict(dict(like), sep="/").items()}
    here = {name: tuple(leaf.shape) for name, leaf in found.items()}
    wrong = [f"missing {name}" for name in sorted(wanted.keys() - here.keys())]
    wrong += [f"unexpected {name}" for name in sorted(here.keys() - wanted.keys())]
    common = sorted(wanted.keys() & here.keys())
    wrong += [f"{name} is {here[name]}, not {wanted[name]}" for name in common if here[name] != wanted[name]]
    if len(wrong) > FEW:
        raise UserError(f"{source} does not fit this model: {len(wrong)} differences", wrong)
    if wrong:
        raise UserError(f"{source} does not fit this model: {'; '.join(wrong)}")


def save_models(folder: pathlib.Path, models: Mapping[str, Mapping], dtype: str = "float32") -> None:
    """One file a model: `folder`/NAME.safetensors."""
    for name, params in models.items():
        save_params(pathlib.Path(folder) / f"{name}.safetensors", params, dtype)


def load_models(folder: pathlib.Path, like: Mapping[str, Any]) -> dict[str, dict]:
    """Reads `folder`/NAME.safetensors for every NAME in `like`, which holds the trees that they must match.

    Raises:
      UserError: see `load_params`.
    """
    return {name: load_params(pathlib.Path(folder) / f"{name}.safetensors", tree) for name, tree in like.items()}
