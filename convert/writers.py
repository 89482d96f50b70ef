"""Converted weights on disk: Orbax folders and .safetensors files, written one block at a time, whole or not at all."""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import traverse_util

from convert.engine import Leaf
from convert.sources import SAFETENSORS_DTYPES, Spec
from emv3_jax.errors import UserError
from emv3_jax.files import reason

PARTIAL, REPLACED = ".emv3-partial", ".emv3-replaced"  # endings of names that begin with a dot
CHUNK_BYTES = 8 << 20  # of an Orbax array: what a device must at least read to get its part
BATCH_BYTES = 64 << 20  # written at once: many small parameters together, or one block of a large one
OnBytes = Callable[[int], None]
SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds it against other conversions; removes what a killed one left in it.

    Raises UserError where the folder cannot be made or locked, or another conversion is writing to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"output {folder} cannot be written: {reason(error)}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when this process ends
        except BlockingIOError:
            raise UserError(f"another conversion is writing to {folder}: wait for it, or give another output") from None
        except OSError as error:  # some network file systems know no locks
            raise UserError(
                f"output {folder} cannot be locked ({reason(error)}): give a folder on another file system"
            ) from error
        try:
            _tidy(folder)
        except OSError as error:
            raise UserError(f"output {folder} cannot be written: {reason(error)}") from error
        yield
    finally:
        os.close(handle)


def _tidy(folder: Path) -> None:
    """Removes what a killed conversion left behind, and puts back what it was about to replace."""
    for path in folder.glob(f".*{REPLACED}"):
        final = folder / path.name[1:].removesuffix(REPLACED)
        if final.exists():
            _remove(path)
        else:  # killed between two renames
            path.replace(final)
    _remove_partial(folder, "")


@contextlib.contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yields a path beside `final` and renames it to `final` when the block ends; `final` may be a file or a folder.

    If the block raises, what it wrote is removed and whatever stood at `final` before still stands there. The folder
    that `final` is in must be claimed. Operating system errors (disk full, no permission) leave as UserError.
    """
    partial, replaced = (final.with_name(f".{final.name}{suffix}") for suffix in (PARTIAL, REPLACED))
    try:
        yield partial
        if final.is_dir():
            final.rename(replaced)
            partial.rename(final)
            _remove(replaced)
        else:
            partial.replace(final)
    except OSError as error:
        raise UserError(f"output {final} could not be written: {reason(error)}") from error
    finally:
        _remove_partial(final.parent, final.name)


def _remove_partial(folder: Path, name: str) -> None:
    """Removes what is unfinished of one output, or of all; Orbax adds an ending of its own while it writes."""
    for path in folder.glob(f".*{PARTIAL}*"):
        if not name or path.name.startswith(f".{name}{PARTIAL}"):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError if the disk of `folder` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder} has {free / 1e6:,.1f} MB left, {needed / 1e6:,.1f} MB are needed: make room there")


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `Leaf` as Orbax writes a NumPy array, but one block at a time, and one leaf after the other.

    Orbax's own handler wants all arrays in memory, and copies them. Chunks are parts of one layer, so that no chunk is
    written twice, and a device that needs a part of a parameter reads little more than it.
    """

    def __init__(self, on_bytes: OnBytes):
        super().__init__()
        self._on_bytes = on_bytes

    async def serialize(
        self, values: Sequence[Leaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        batch: list[Any] = []
        size = 0
        try:
            for leaf, info in zip(values, infos, strict=True):
                small = leaf.spec.nbytes <= CHUNK_BYTES
                array = await self._create(leaf, info, leaf.spec.shape if small else leaf.block_shape)
                for layer, block in ((None, leaf.array()),) if small else leaf.blocks():
                    # A block is not changed after this, so TensorStore need not copy it.
                    part = array[... if layer is None else layer]
                    batch.append(part.write(block, can_reference_source_data_indefinitely=True))
                    size += block.nbytes
                    self._on_bytes(block.nbytes)
                    if size > BATCH_BYTES:
                        await asyncio.gather(*batch)
                        batch, size = [], 0
            await asyncio.gather(*batch)
        finally:  # after an error too, nothing may write any more when the folder is removed
            await asyncio.gather(*batch, return_exceptions=True)
        return []

    async def _create(self, leaf: Leaf, info: Any, chunk: tuple[int, ...]) -> ts.TensorStore:
        shape = leaf.spec.shape
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=True,
            global_shape=shape,
            local_shape=chunk,
            dtype=leaf.spec.dtype,
            process_index=jax.process_index(),
            arg=ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES),
        )
        spec = ocp.type_handlers.get_cast_tspec_serialize(spec, leaf.spec, ocp.SaveArgs())
        return await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)


def write_orbax(folder: Path, leaves: Iterable[Leaf], on_bytes: OnBytes = lambda count: None) -> None:
    """Writes an Orbax checkpoint that any Orbax reads; memory holds one block at a time, not the sum.

    Args:
      folder: does not exist yet; see `staged`.
      on_bytes: hears of every block that was written.
    Raises:
      UserError: a source cannot be read any more.
      OSError: `folder` cannot be written.
    """
    tree = traverse_util.unflatten_dict({leaf.path: leaf for leaf in leaves}, sep="/")
    registry = ocp.type_handlers.create_type_handler_registry(
        (Leaf, _LeafHandler(on_bytes)), (jax.Array, ocp.type_handlers.get_type_handler(jax.Array))
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:  # TensorStore's, which say in words what the system said
            words = str(error)
            code = next((code for code in (errno.ENOSPC, errno.EFBIG, errno.EACCES) if os.strerror(code) in words), 0)
            raise OSError(code, os.strerror(code) if code else words.splitlines()[0][:200]) from error


class SafetensorsWriter:
    """Writes a .safetensors file piece by piece, in the order of `header`; a context manager.

    header: key -> shape and type of all tensors, the widest types first (their values then stand at whole multiples of
    their width). metadata: text by name, kept in the file's header.
    """

    def __init__(self, path: Path, header: Mapping[str, Spec], metadata: Mapping[str, str]):
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        start = 0
        for key, spec in header.items():
            offsets = [start, start + spec.nbytes]
            entries[key] = {"dtype": SAFETENSORS_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
            start += spec.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._missing = start
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, values: np.ndarray) -> None:
        """Appends the values of the next tensor, or of the next part of it."""
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        self._missing -= values.nbytes

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{self._missing} bytes were announced and not written")
