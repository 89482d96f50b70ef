"""Parameters by '/'-joined path as sources: weights that `to-jax` wrote, and those that training wrote.

- OUT, OUT/vae, OUT/vae.safetensors: of `python -m convert to-jax`, with a record of what they are.
- WORKDIR/weights, WORKDIR/weights/dit.safetensors: of train.py, the moving average at the end of a run.
- WORKDIR/checkpoints, WORKDIR/checkpoints/STEP: of train.py, training states; of one the average or the parameters.
- WORKDIR/weights/adapters: of train.py, adapters (see `convert.lora`).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources import SafetensorsFile, Source, Spec
from emv3_jax.converted import RECORD, Record, read_parameters, read_record, shapes, stored_shapes
from emv3_jax.errors import UserError
from emv3_jax.training.checkpoints import AVERAGE, ITEM, OTHER_STEP, RAW, read_arrays, recorded

METADATA = "emv3_jax"  # the record's name in the header of a .safetensors file of ours
ROLES = ("dit", "text", "image", "vae", "speech")  # names of models in a training state


class ConvertedFolder(Source):
    """Converted weights as a source."""

    def __init__(self, path: Path):
        self.path, self.files = path, (path / RECORD,)
        self.record: Record | None = read_record(path)
        self.header = _header(shapes(path))

    def read(self, key: str) -> np.ndarray:
        return self.read_many([key])[key]

    def read_many(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        return read_parameters(self.path, keys)


class ConvertedFile(SafetensorsFile):
    """The same in one .safetensors file; `record` is None if `to-jax` did not write it."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            fields = json.loads(self.metadata[METADATA]) if METADATA in self.metadata else None
            self.record = None if fields is None else Record(**{**fields, "sources": tuple(fields["sources"])})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: its record is damaged ({error}); convert the weights again") from error


class TrainedModel(Source):
    """One model of a training checkpoint: `part` of its state ("ema/dit"); nothing else of it is read, and this only if
    it is what was saved. checksums: of every array of the state."""

    record: Record | None = None

    def __init__(self, step: Path, part: str, header: Mapping[str, Spec], checksums: Mapping[str, int]):
        self.path, self.files, self.header = step, (step / ITEM / "_METADATA",), header
        self._part, self._checksums = part, checksums

    def read(self, key: str) -> np.ndarray:
        return self.read_many([key])[key]

    def read_many(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        paths = {f"{self._part}/{key}": key for key in keys}
        found = read_arrays(self.path, paths, self._checksums)
        return {key: found.pop(path) for path, key in paths.items()}


Parameters = ConvertedFolder | ConvertedFile | TrainedModel


def _header(found: Mapping[str, Any]) -> dict[str, Spec]:
    return {path: Spec(tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in found.items()}


def open_converted(path: Path) -> ConvertedFolder | ConvertedFile:
    """Opens weights that `to-jax` wrote, in either form."""
    return ConvertedFile(path) if path.suffix == ".safetensors" else ConvertedFolder(path)


def converted_models(folder: Path) -> list[Path]:
    """The folders of converted weights in a folder."""
    return sorted(path.parent for path in folder.glob(f"*/{RECORD}") if path.parent.name[0] != ".")


def open_parameters(path: Path, unaveraged: bool = False) -> list[Parameters]:
    """Every model that `path` holds: one of the places above.

    Args:
      unaveraged: of a training checkpoint the parameters themselves, not their moving average.
    Raises:
      UserError: nothing that can be read is there, or `unaveraged` was asked of what is no checkpoint.
    """
    step = find_step(path) if path.is_dir() and not (path / RECORD).is_file() else None
    if step is not None:
        return list(trained_models(step, RAW if unaveraged else AVERAGE))
    if unaveraged:
        raise UserError(f"{path} is no training checkpoint, which --unaveraged is for: give WORKDIR/checkpoints")
    if not path.is_dir() or (path / RECORD).is_file():
        return [open_converted(path)]
    files = sorted(file for file in path.glob("*.safetensors") if file.name[0] != ".")
    if found := [*converted_models(path), *files]:
        return [open_converted(each) for each in found]
    inside = [str(path / name) for name in ("weights", "checkpoints") if (path / name).is_dir()]
    if inside:
        raise UserError(f"{path} is what train.py worked in: give {' or '.join(inside)}")
    raise UserError(
        f"{path} holds no converted weights and none that were trained: give the folder that to-jax wrote, or"
        " train.py's WORKDIR/weights or WORKDIR/checkpoints"
    )


def find_step(folder: Path) -> Path | None:
    """A training checkpoint: `folder` itself, or the newest one in it; None where there is none."""
    if (folder / ITEM).is_dir():
        return folder
    steps = [step for step in folder.iterdir() if step.name.isdecimal() and (step / ITEM).is_dir()]
    return max(steps, key=lambda step: int(step.name), default=None)


def trained_models(step: Path, field: str) -> list[TrainedModel]:
    """The models of a training checkpoint. field: AVERAGE or RAW.

    Raises:
      UserError: it is damaged, or holds no whole models: adapters, or a VAE, which only its export makes whole.
    """
    stored = stored_shapes(step / ITEM, OTHER_STEP)
    found = {path.removeprefix(f"{field}/"): leaf for path, leaf in stored.items() if path.startswith(f"{field}/")}
    if not found:
        raise UserError(f"{step} is no checkpoint of train.py: it holds no {field}")
    sums = recorded(step, stored)
    weights = step.absolute().parent.parent / "weights"
    if all(path.rpartition("/")[2] in ("down", "up") for path in found):
        raise UserError(
            f"{step} holds adapters without their scale and without what they adapt: give {weights / 'adapters'}, or"
            f" {weights}, where they are merged"
        )
    if other := sorted({path.partition("/")[0] for path in found} - {*ROLES}):
        raise UserError(
            f"{step} holds {', '.join(other)}, which is no transformer: a VAE's latents are normalised where it is"
            f" exported, give {weights}"
        )
    models: dict[str, dict[str, Any]] = {}
    for path, leaf in found.items():
        role, _, rest = path.partition("/")
        models.setdefault(role, {})[rest] = leaf
    return [TrainedModel(step, f"{field}/{role}", _header(models[role]), sums) for role in models]
