"""Which file in the released folders is which part."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from convert import released, writers
from convert.writers import claim
from emv3_jax.errors import UserError

NAME = "diffusion_pytorch_model"


def unused(root: Path, path: Path) -> str:
    """What is said of a file that is not taken."""
    (line,) = [line for line in released.find(root, "preview").unused if line.startswith(f"{path}: ")]
    return line.removeprefix(f"{path}: ")


def test_a_lone_pickle_may_be_the_transformer(tiny_models, tensors_of, tmp_path):
    torch = pytest.importorskip("torch", reason="torch writes .pth files; it is an extra")
    for ending in (".bin", ".pth"):
        path = tmp_path / f"{NAME}{ending}"
        torch.save({key: torch.from_numpy(value) for key, value in tensors_of("dit-preview").items()}, path)
        assert released.find(tmp_path, "preview").parts["dit-preview"] == path
        path.unlink()


def test_a_transformer_that_cannot_be_opened_is_named_with_the_reason(tiny_models, tensors_of, write, tmp_path):
    path = tmp_path / f"{NAME}.bin"
    path.write_bytes(b"no pickle")
    why = unused(tmp_path, path)
    assert "to read it, install torch" in why or "not a readable PyTorch file" in why
    twin = write(tmp_path / f"{NAME}.safetensors", tensors_of("dit-preview"))
    assert unused(tmp_path, path) == f"{twin.name} is taken"  # and is not opened
    assert released.find(tmp_path, "preview").parts["dit-preview"] == twin


def test_sets_of_files_go_by_their_index(tiny_models, tensors_of, write, tmp_path):
    tensors = list(tensors_of("dit-preview").items())
    names = [f"{NAME}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = dict(zip(names, (dict(tensors[::2]), dict(tensors[1::2])), strict=True))
    for name, half in halves.items():
        write(tmp_path / name, half)
    assert unused(tmp_path, tmp_path / names[0]) == "one of a set of files whose index is not beside it"
    index = tmp_path / f"{NAME}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, half in halves.items() for key in half}}))
    found = released.find(tmp_path, "preview")
    assert found.parts["dit-preview"] == index and not found.unused
    stranger = write(tmp_path / "x.safetensors", {"x": np.zeros(1, np.float32)})
    assert unused(tmp_path, stranger) == "not a file of the released program"


def test_the_tokenizer_folder_must_hold_a_tokenizer(tmp_path):
    folder = tmp_path / "google/umt5-xxl"
    folder.mkdir(parents=True)
    (folder / "tokenizer_config.json").touch()
    assert unused(tmp_path, folder) == "it holds no tokenizer.json and no spiece.model"
    assert "tokenizer: the folder google/umt5-xxl" in released.find(tmp_path, "preview").missing
    (folder / "tokenizer.json").touch()
    assert released.find(tmp_path, "preview").parts == {"tokenizer": folder}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    plain = Path.iterdir

    def iterdir(path: Path):  # permissions do not stop an administrator, who may be running this
        if path.name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match=f"folder {tmp_path}/locked cannot be read: permission denied"):
        released.find(tmp_path, "preview")


def test_a_folder_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(writers.fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match="cannot be locked .no locks available.: give a folder on another"),
        claim(tmp_path),
    ):
        pass
