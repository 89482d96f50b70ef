"""Weights to start from: a base model that hears nothing; how others were trained."""

import pathlib
from typing import Any

import jax
from flax import traverse_util

from emv3_jax import converted, weight_files
from emv3_jax.config import Preset
from emv3_jax.diffusion.phda import MODALITIES, PhDAConfig
from emv3_jax.errors import UserError

BASE = "dit-base"
AUDIO = ("audio_tokens", "cross_kv/audio", "blocks/cross_attention/unused_audio_query")


def is_audio(path: str) -> bool:
    """Whether a parameter of the transformer belongs to its audio branch."""
    return path.startswith(AUDIO)


def silent(params: Any) -> Any:
    """A transformer whose audio branch adds nothing yet: its values are zero, so it learns from the first step on."""
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    silenced = {
        path: jax.numpy.zeros_like(leaf) if path.startswith("cross_kv/audio/value") else leaf
        for path, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(silenced, sep="/")


def on_base(params: Any, folder: pathlib.Path) -> Any:
    """Fresh parameters of the transformer -> those of the converted base model, and a silent audio branch.

    The velocity is the base model's at the same weights of text and image, whatever is heard and however much that
    counts (SPEC section 2, CDCA: audio is added to text and image). Without PhDA those weights are 1, as the base has
    it; with PhDA that is so only where both count whole.

    Args:
      params: where the audio branch comes from.
      folder: of converted weights, with `dit-base` in it.
    Raises:
      UserError: it is not there, or its parameters are not the model's without its audio branch.
    """
    flat = traverse_util.flatten_dict(dict(silent(params)), sep="/")
    base = folder / BASE
    if not base.is_dir():
        raise UserError(
            f"no base weights at {base}: convert them (python -m convert to-jax FILE --to {folder}), or start from"
            " weights with an audio branch (config key silent_audio = False)"
        )
    wanted = {path: leaf for path, leaf in flat.items() if not is_audio(path)}
    found = converted.load_converted(base, traverse_util.unflatten_dict(wanted, sep="/"))
    loaded = traverse_util.flatten_dict(found, sep="/")
    return traverse_util.unflatten_dict({**flat, **loaded}, sep="/")


def notes(preset: Preset, folder: str, phda: PhDAConfig) -> list[str]:
    """A line where weights of a folder (or none, "") were trained with other modality weights than they go on with."""
    before = weight_files.as_trained(preset, folder)[1] if folder else None
    if before is None or _phases(before) == _phases(phda):
        return []
    return [
        f"the weights in {folder} were trained with PhDA of {_phases(before)}, and go on with that of {_phases(phda)}"
        " (config key phda)"
    ]


def _phases(phda: PhDAConfig) -> str:
    """Boundaries by modality, in words."""
    bounds = {name: getattr(phda, name) for name in MODALITIES}
    said = [f"{name} {'-'.join(f'{value:g}' for value in some)}" for name, some in bounds.items() if some]
    return ", ".join(said) or "no modality"
