"""Which files hold a preset's weights, how they are told apart, and what is written down beside trained ones.

A folder of weights is one that `train.py` wrote, or one of converted weights (`converted`), with the tokenizer in it.
What a run did not train is not copied: a record says where the run had it from.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from emv3_jax import conditioning, converted
from emv3_jax.config import PRESETS, Preset
from emv3_jax.diffusion.phda import PhDAConfig
from emv3_jax.errors import UserError
from emv3_jax.files import atomic_path, check_readable, file_hash

WEIGHTS = pathlib.Path(__file__).parent / "weights"
TOKENIZER = "tokenizer"
TRAINED = "trained.json"  # beside weights of our own training
# Where converted weights of each model lie in their folder; "dit" depends on the preset.
CONVERTED = {"dit": "dit-{}", "text": "umt5", "image": "clip", "vae": "vae", "speech": "wav2vec2"}


def record_training(
    folder: pathlib.Path, preset: Preset, phda: PhDAConfig, frozen: str = "", roles: Sequence[str] = ()
) -> None:
    """Writes down beside trained weights how they differ from their preset (sizes, modality weights), and where the
    models lie that were not trained and are not beside them.

    Args:
      frozen: their folder; empty: the shipped weights. roles: which they are; the tokenizer is with them.
    """
    plain = dataclasses.asdict(PRESETS[preset.name].dit) if preset.name in PRESETS else {}
    here = dataclasses.asdict(preset.dit)
    sizes = {name: here[name] for name in here if name not in ("dtype", "remat") and here[name] != plain.get(name)}
    record: dict[str, Any] = {"model": sizes, "phda": dataclasses.asdict(phda)}
    if roles:
        given = pathlib.Path(frozen or WEIGHTS / preset.name)
        # As given it is found again where the whole project was moved to, from there.
        record["frozen"] = {"roles": [*roles, TOKENIZER], "folder": str(given.absolute()), "given": str(given)}
    with atomic_path(folder / TRAINED) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")


def _training_of(folder: pathlib.Path) -> tuple[dict[str, Any], PhDAConfig, dict[str, Any]] | None:
    """What `record_training` wrote into a folder: sizes, modality weights, where frozen models are; None: nothing.

    Raises:
      UserError: the record is damaged.
    """
    path = folder / TRAINED
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        sizes = {name: tuple(v) if isinstance(v, list) else v for name, v in record["model"].items()}
        phda = PhDAConfig.from_config({name: () if v is None else v for name, v in record["phda"].items()})
        frozen = record.get("frozen") or {"roles": [], "folder": "", "given": ""}
        return sizes, phda, {name: frozen[name] for name in ("roles", "folder", "given")}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error}): copy it from where the weights came from")


def as_trained(preset: Preset, weights: str | pathlib.Path | None) -> tuple[Preset, PhDAConfig | None]:
    """A preset with the sizes, and the modality weights, that weights were trained with (`record_training`); of weights
    without a record the preset, and None.

    Raises:
      UserError: the record is damaged.
    """
    folder = pathlib.Path(weights or WEIGHTS / preset.name)
    if (record := _training_of(folder)) is None:
        return preset, None
    sizes, phda, _ = record
    try:
        return dataclasses.replace(preset, dit=dataclasses.replace(preset.dit, **sizes)), phda
    except TypeError as error:
        raise _damaged(folder / TRAINED, error) from error


class LoadedWhenUsed(Mapping[str, Any]):
    """Parameter trees by role, read from their files whenever they are asked for, and not kept."""

    def __init__(self, loaders: Mapping[str, Callable[[], Any]]):
        self._loaders = loaders

    def __getitem__(self, role: str) -> Any:
        return self._loaders[role]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


def file_marks(preset: Preset, weights: str | pathlib.Path | None, roles: Iterable[str]) -> dict[str, str]:
    """SHA-256 by role of the file of our own training, or of the record of converted weights, which has those of all
    their files; reads no model."""
    folder = pathlib.Path(weights or WEIGHTS / preset.name)
    paths = {role: locate(folder, role, preset) for role in roles}
    return {
        role: file_hash(check_readable(path if path.suffix == ".safetensors" else path / converted.RECORD, "weights"))
        for role, path in paths.items()
    }


def weight_hashes(
    name: str, weights: str | pathlib.Path | None = None, roles: Iterable[str] | None = None
) -> dict[str, str]:
    """SHA-256 by role (default: of all): of the file of our own training, or of the sources of converted weights."""
    folder = pathlib.Path(weights or WEIGHTS / name)
    hashes = {}
    for role in roles or [role for role in CONVERTED if role != "speech" or PRESETS[name].speech]:
        path = locate(folder, role, PRESETS[name])
        if path.suffix == ".safetensors":
            hashes[role] = file_hash(check_readable(path, "weights"))
        else:
            hashes[role] = "+".join(source["sha256"] for source in converted.read_record(path).sources)
    return hashes


def load_tokenizer(preset: Preset, weights: str | pathlib.Path | None = None) -> Any:
    """The tokenizer of a preset, which reads prompts before any weights are read; arguments as of `load_pipeline`.

    Raises:
      UserError: no weights there, or no tokenizer with them.
    """
    folder = pathlib.Path(weights or WEIGHTS / preset.name)
    if not folder.is_dir():
        raise UserError(
            f"no weights at {folder}: convert the released ones (python -m convert to-jax), or name a folder"
        )
    if preset.vocabulary:
        return conditioning.tokenizer(preset)
    home = _home(folder, TOKENIZER, lambda place: (place / TOKENIZER).is_dir())
    return conditioning.tokenizer(preset, home / TOKENIZER)


def locate(folder: pathlib.Path, role: str, preset: Preset) -> pathlib.Path:
    """Where a model's weights lie in a folder: in a file of our own training, or else in a folder of converted ones;
    of a model that was frozen in that training, in the folder that the run had it from.

    Raises:
      UserError: that folder is gone.
    """
    made = CONVERTED[role].format(preset.name)
    home = _home(folder, role, lambda place: (place / f"{role}.safetensors").is_file() or (place / made).exists())
    trained = home / f"{role}.safetensors"
    return trained if trained.is_file() or (preset.vocabulary and not (home / made).exists()) else home / made


def _home(folder: pathlib.Path, role: str, holds: Callable[[pathlib.Path], bool]) -> pathlib.Path:
    """The folder that holds a model or the tokenizer: `folder`, or what its frozen models came from, and so on; where
    none does, the last of them.

    Raises:
      UserError: one of them is gone.
    """
    passed = [folder]
    while not holds(folder) and (record := _training_of(folder)):
        frozen = record[2]
        if role not in frozen["roles"]:
            break
        places = [pathlib.Path(frozen[name]) for name in ("folder", "given")]
        if (there := next((place for place in places if place.is_dir()), None)) is None:
            raise UserError(
                f"the weights in {folder} were trained beside those of {places[0]}, which is gone: put it back, or name"
                f" the folder with {role} in {folder / TRAINED} (frozen, folder)"
            )
        if there in passed:
            break
        passed.append(there)
        folder = there
    return folder
