"""Files of weights, read one tensor at a time: .safetensors, PyTorch pickles, and sets of either.

`open_source(path)` returns a `Source`: a header (key -> shape and type), known without reading a tensor, and
`read(key)`. bfloat16 and the 8-bit floats come as `ml_dtypes`.
"""

import abc
import contextlib
import dataclasses
import hashlib
import json
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from emv3_jax.errors import UserError
from emv3_jax.files import check_readable, reason

SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
INDEXES = (".safetensors.index.json", ".bin.index.json")
WEIGHTS = (*INDEXES, ".safetensors", *PICKLES)
# What a folder of weights is read from, the first that is there.
FOLDER_PATTERNS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "pytorch_model.bin", "*.bin",
                   "*.pth", "*.pt", "*.ckpt")  # fmt: skip
MAX_HEADER = 100_000_000  # bytes, the limit of the format's own library
REMAP_AFTER = 1 << 28  # bytes read of a mapped file


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and type of one tensor: what a header says of it, and all that a plan needs to know."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.size * self.dtype.itemsize

    def cast(self, dtype: np.dtype | None) -> "Spec":
        """The same with another type, unless that is None."""
        return self if dtype is None else Spec(self.shape, dtype)


class Source(abc.ABC):
    """A checkpoint on disk. `path` is its name to the user, `files` are those whose bytes it consists of."""

    path: Path
    files: tuple[Path, ...]
    header: Mapping[str, Spec]

    @abc.abstractmethod
    def read(self, key: str) -> np.ndarray:
        """One tensor; raises UserError if the file cannot be read any more."""

    def read_many(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """Several tensors, all in memory at once."""
        return {key: self.read(key) for key in keys}


def open_source(path: Path) -> Source:
    """Opens a file, or the one checkpoint in a folder, by its name's ending.

    Raises:
      UserError: no such file, damaged, a shard is missing, unknown ending, or a pickle that is refused.
    """
    if path.is_dir():
        path = only_weights(path)
    name = path.name.lower()
    if name.endswith(INDEXES):
        return ShardedFiles(path)
    if name.endswith(".safetensors"):
        return SafetensorsFile(path)
    if name.endswith(PICKLES):
        return TorchFile(path)
    check_readable(path, "checkpoint")
    raise UserError(f"{path}: unknown kind of file; give one that ends in {', '.join(WEIGHTS)}")


def only_weights(folder: Path) -> Path:
    """The file of weights in a folder; raises UserError where there is none, or more than one of the same kind."""
    for pattern in FOLDER_PATTERNS:
        found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UserError(f"{folder} holds {len(found)} files of weights: name one of {names}")
        if found:
            return found[0]
    raise UserError(f"{folder} holds no weights: looked for {', '.join(FOLDER_PATTERNS)}")


class SafetensorsFile(Source):
    """One .safetensors file. Its header is checked here: it comes from strangers, and files are often cut short."""

    def __init__(self, path: Path):
        self.path, self.files = path, (path,)
        check_readable(path, "checkpoint")
        try:
            self.header, self._offsets, self.metadata = self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(f"its header is damaged ({error})") from error

    def read(self, key: str) -> np.ndarray:
        spec = self.header[key]
        try:  # not memory-mapped: pages of a map would count as this program's memory until the end
            with self.path.open("rb") as file:
                file.seek(self._offsets[key])
                values = np.fromfile(file, np.uint8, spec.nbytes)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {reason(error)}") from error
        if values.size != spec.nbytes:
            raise self._damaged(f"it ends within {key}")
        return values.view(spec.dtype).reshape(spec.shape)

    def _read_header(self) -> tuple[dict[str, Spec], dict[str, int], dict[str, str]]:
        """(header, where each tensor starts in the file, metadata)."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= MAX_HEADER:
                raise self._damaged("it does not begin with a header")
            if 8 + length > size:
                raise self._damaged(f"it ends within its header ({size:,} bytes)")
            entries = json.loads(file.read(length), object_pairs_hook=_once)
        metadata = entries.pop("__metadata__", {})
        header: dict[str, Spec] = {}
        offsets: dict[str, int] = {}
        end = 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise UserError(f"{self.path}: {key} is of type {entry['dtype']}, which this program cannot read")
            spec = Spec(tuple(map(int, entry["shape"])), np.dtype(SAFETENSORS_DTYPES[entry["dtype"]]))
            start, stop = entry["data_offsets"]
            if start != end or stop - start != spec.nbytes or min(spec.shape, default=0) < 0:
                raise self._damaged(f"the place of {key} does not fit its shape")
            header[key], offsets[key], end = spec, 8 + length + start, stop
        if (whole := 8 + length + end) != size:
            raise self._damaged(f"it has {size:,} bytes of {whole:,}")
        return header, offsets, metadata

    def _damaged(self, how: str) -> UserError:
        return UserError(f"{self.path} is not a readable .safetensors file: {how}; fetch or save it again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"doubled: {', '.join(sorted({key for key in keys if keys.count(key) > 1}))}")
    return entries


class ShardedFiles(Source):
    """A set of files and the index that says which tensor is in which."""

    def __init__(self, path: Path):
        self.path = path
        check_readable(path, "index")
        try:
            where = {str(key): str(name) for key, name in json.loads(path.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an index of shards ({error}); fetch or save it again") from error
        names = sorted(set(where.values()))
        endings = (".safetensors", *PICKLES)
        if odd := [name for name in names if re.search(r"[/\\]", name) or not name.lower().endswith(endings)]:
            raise UserError(
                f"{path} names {', '.join(odd[:8])}: shards must lie beside it, and end in {', '.join(endings)}"
            )
        if gone := [name for name in names if not (path.parent / name).is_file()]:
            raise UserError(
                f"{path}: {len(gone)} of {len(names)} shards missing: {', '.join(gone)}; put them beside it"
            )
        shards = {name: open_source(path.parent / name) for name in names}
        problems = [f"{key} is not in {name}" for key, name in where.items() if key not in shards[name].header]
        for name, shard in shards.items():
            problems += [
                f"{key} is in {name}" + (f" and in {where[key]}" if key in where else " but not in the index")
                for key in shard.header
                if where.get(key) != name
            ]
        if problems:
            raise UserError(f"{path} does not fit its shards: {'; '.join(problems)}")
        self.files = (path, *(shard.path for shard in shards.values()))
        self.header = {key: shards[name].header[key] for key, name in where.items()}
        self._shard_of = {key: shards[name] for key, name in where.items()}

    def read(self, key: str) -> np.ndarray:
        return self._shard_of[key].read(key)


class TorchFile(Source):
    """A PyTorch pickle, opened with torch's weights-only loader, which runs no code; needs torch."""

    def __init__(self, path: Path):
        self.path, self.files = path, (path,)
        check_readable(path, "checkpoint")
        self._mapped = zipfile.is_zipfile(path)  # pickles of before torch 1.6 are no zip files and cannot be mapped
        self._open()
        if others := [str(key) for key, value in self._tensors.items() if not hasattr(value, "untyped_storage")]:
            raise UserError(f"{path}: not a flat set of tensors; {', '.join(others[:8])} are something else")
        if odd := [key for key, value in self._tensors.items() if value.layout is not self._torch.strided]:
            raise UserError(f"{path}: {', '.join(odd[:8])} are sparse or quantized, which this program cannot read")
        self.header = {key: Spec(tuple(value.shape), self._dtype(value)) for key, value in self._tensors.items()}

    def read(self, key: str) -> np.ndarray:
        dtype = self.header[key].dtype
        if self._mapped and self._touched > REMAP_AFTER:
            self._open()
        self._touched += self.header[key].nbytes
        tensor = self._tensors[key].detach().contiguous()
        if dtype.type.__module__ == "numpy":
            return tensor.numpy()
        bits = {1: self._torch.uint8, 2: self._torch.int16}[dtype.itemsize]  # types that torch gives NumPy only as bits
        return tensor.view(bits).numpy().view(dtype)

    def _open(self) -> None:
        """Maps the file anew: pages of a map that were read count as this program's memory until it is closed."""
        tensors = self._load()
        self._tensors = tensors["state_dict"] if isinstance(tensors.get("state_dict"), Mapping) else tensors
        self._touched = 0

    def _load(self) -> Mapping[str, Any]:
        """The pickle's top-level dict; tensors stay on disk where the file's format allows it."""
        try:
            import torch
        except ImportError:
            raise UserError(
                f'{self.path} is a PyTorch pickle; to read it, install torch: pip install "emv3_jax[torch]"'
            ) from None
        self._torch = torch
        with self.path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04" and not self._mapped:
                raise self._damaged("it is cut short")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old pickles, which are read or refused below
                loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            if (name := named[1] if named else _first_import(self.path)) is None:
                raise self._damaged("it is no pickle of tensors") from error
            raise UserError(
                f"{self.path} is refused: loading it would run {name}, and weights need no code; "
                "get it as .safetensors, or from a source that you trust"
            ) from error
        except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            raise self._damaged("it is no pickle of tensors") from error
        if not isinstance(loaded, Mapping):
            raise UserError(f"{self.path} holds a {type(loaded).__name__}, not tensors by name")
        return loaded

    def _dtype(self, tensor: Any) -> np.dtype:
        """The NumPy type of a torch tensor; both libraries use the same names."""
        name = str(tensor.dtype).removeprefix("torch.")
        try:
            return np.dtype(getattr(ml_dtypes, name, name))
        except TypeError:
            raise UserError(f"{self.path} holds tensors of type {name}, which this program cannot read") from None

    def _damaged(self, how: str) -> UserError:
        return UserError(f"{self.path} is not a readable PyTorch file: {how}; fetch or save it again")


def _first_import(path: Path) -> str | None:
    """The first thing that a bare pickle would import, found without running it; None if it is no pickle."""
    strings: list[str] = []
    with path.open("rb") as file, contextlib.suppress(ValueError):  # no pickle at all
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    return None


class TiedTensors(Source):
    """A source where one tensor may stand under either of two keys, or both; it appears under `key` alone.

    Raises UserError where both are there and differ: which of them is meant cannot be known.
    """

    def __init__(self, source: Source, key: str, other: str):
        self.path, self.files = source.path, source.files
        self._source, self._key = source, key
        self._stored = key if key in source.header else other
        self.header = {name: spec for name, spec in source.header.items() if name not in (key, other)}
        if self._stored in source.header:
            self.header[key] = source.header[self._stored]
        if key in source.header and other in source.header:
            same = source.header[key] == source.header[other]
            if not same or _digest(source.read(key)) != _digest(source.read(other)):  # one at a time: they are large
                raise UserError(f"{self.path}: {key} and {other} must be equal, and differ; remove the wrong one")

    def read(self, key: str) -> np.ndarray:
        return self._source.read(self._stored if key == self._key else key)


def _digest(values: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8)).digest()


def sha256(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file in hex; `on_bytes` hears of every piece that was read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
                on_bytes(len(piece))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    return digest.hexdigest()
