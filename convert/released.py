"""The released folders (SPEC section 1): which file in them is which part of the program."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from convert.registry import MODELS, identify
from convert.sources import PICKLES, WEIGHTS, only_weights, open_source
from emv3_jax.errors import UserError
from emv3_jax.files import reason

TOKENIZER = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")  # either will do
TRANSFORMER = "diffusion_pytorch_model"
# Beginnings of file names in the base folder.
BASE_FILES = {"vae": "Wan2.1_VAE", "umt5": "models_t5_umt5-xxl-enc", "clip": "models_clip_open-clip"}
AUDIO_FOLDERS = {"preview": "wav2vec2-base-960h", "flash": "chinese-wav2vec2-base"}
WANTED = {
    "vae": "Wan2.1_VAE.pth", "umt5": "models_t5_umt5-xxl-enc-bf16.pth",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", TOKENIZER: "the folder google/umt5-xxl",
}  # fmt: skip
_SHARD = re.compile(r"(.+)-\d+-of-\d+(\.\w+)")


@dataclasses.dataclass(frozen=True)
class Found:
    """parts: model (or `tokenizer`) -> its file or folder. missing, unused: lines for the user."""

    parts: dict[str, Path]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def find(root: Path, variant: str) -> Found:
    """Looks for the parts of a variant under `root`, two levels deep; transformers are told by their keys.

    Raises:
      UserError: no such folder, or two files that could be the same part.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the one that holds the released folders")
    folders = [root, *_subfolders([root]), *_subfolders(_subfolders([root]))]
    files = [path for folder in folders for path in _inside(folder) if path.is_file()]
    files = [path for path in files if path.name.endswith(WEIGHTS) and not path.name.startswith(".")]
    parts: dict[str, list[Path]] = {name: [] for name in (f"dit-{variant}", *BASE_FILES, "wav2vec2", TOKENIZER)}
    unused: list[str] = []
    for folder in folders:
        if AUDIO_FOLDERS[variant] in folder.name:
            parts["wav2vec2"].append(only_weights(folder))
        if (tokenizer := folder / "google" / "umt5-xxl").is_dir():
            if any((tokenizer / name).is_file() for name in TOKENIZER_FILES):
                parts[TOKENIZER].append(tokenizer)
            else:
                unused.append(f"{tokenizer}: it holds no {' and no '.join(TOKENIZER_FILES)}")
    heard = {path.parent: path for path in parts["wav2vec2"]}
    for path in files:
        if path.parent in heard:
            if path != heard[path.parent]:
                unused.append(f"{path}: {heard[path.parent].name} is taken")
        elif not _is_shard(path, files):
            name = _part(path, variant)
            if name in parts:
                parts[name].append(path)
            else:
                unused.append(f"{path}: {name}")
    chosen = {name: only for name, paths in parts.items() if (only := _only(name, paths, unused)) is not None}
    wanted = WANTED | {f"dit-{variant}": f"{TRANSFORMER}.safetensors of the {variant} transformer"}
    wanted["wav2vec2"] = f"the folder {AUDIO_FOLDERS[variant]}"
    missing = tuple(f"{name}: {wanted[name]}" for name in parts if name not in chosen)
    return Found(chosen, missing, tuple(unused))


def _subfolders(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in folders for path in _inside(folder) if path.is_dir() and path.name[0] != "."]


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {reason(error)}") from error


def _part(path: Path, variant: str) -> str:
    """The part that a file is, or why it is none."""
    for name, beginning in BASE_FILES.items():
        if path.name.startswith(beginning):
            return name
    if not path.name.startswith(TRANSFORMER):
        return "not a file of the released program"
    if _SHARD.fullmatch(path.name):
        return "one of a set of files whose index is not beside it"
    twin = path.with_name(f"{path.name.split('.')[0]}.safetensors")
    if path.name.endswith(PICKLES) and twin.is_file():
        return f"{twin.name} is taken"
    try:
        header = open_source(path).header
    except UserError as error:  # stops the conversion only if no other file is the transformer
        return str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ")
    matches = identify(header, [name for name in MODELS if name.startswith("dit-")])
    if not matches:
        return "not a transformer of this program"
    name = matches[0].model.name
    return name if name == f"dit-{variant}" else f"the {MODELS[name].title}, which --variant {variant} does not need"


def _is_shard(path: Path, files: Iterable[Path]) -> bool:
    """Whether a file belongs to a set whose index lies beside it."""
    match = _SHARD.fullmatch(path.name)
    return match is not None and path.with_name(f"{match[1]}{match[2]}.index.json") in files


def _only(name: str, paths: list[Path], unused: list[str]) -> Path | None:
    """The one candidate; of the same weights as .safetensors and as a pickle the former, which needs no torch."""
    paths = list(dict.fromkeys(paths))
    stems = {(path.parent, path.name.split(".")[0]) for path in paths}
    if len(stems) == 1 and len(paths) > 1:
        paths.sort(key=lambda path: (".safetensors" not in path.name, path.name))
        unused += [f"{path}: {paths[0].name} is taken" for path in paths[1:]]
        return paths[0]
    if len(paths) > 1:
        raise UserError(f"{name} is there {len(paths)} times, keep one: {', '.join(map(str, paths))}")
    return paths[0] if paths else None
