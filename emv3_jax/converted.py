"""Converted weights: Orbax checkpoints that `python -m convert to-jax` wrote, read straight into device shards.

A folder holds the checkpoint of one model and `conversion.json`, its record: what it is, what it was made from, and the
size and SHA-256 of every file in it. The record is written last, so a folder without it is not complete. Sizes are
checked whenever weights are read; SHA-256 takes as long as reading everything, so only `python -m convert inspect`
checks them.
"""

import dataclasses
import functools
import inspect
import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from emv3_jax.checkpoint import check_tree
from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, reason

RECORD = "conversion.json"
FORMAT = "emv3_jax converted weights 2"
AGAIN = "convert the weights again"


@dataclasses.dataclass(frozen=True)
class Record:
    """What a folder of converted weights holds.

    model: name in the converter's registry. config: fields of the model's config. naming, form: the torch keys of the
    sources. dtype: of the parameters, comma-separated where there are several. sources: file, bytes and sha256 of each
    file, the topmost first. values: number of them. files: bytes and sha256 of each file of the folder, by relative
    path; empty in the header of a single file.
    """

    model: str
    config: Mapping[str, Any]
    naming: str
    form: str
    dtype: str
    sources: tuple[Mapping[str, Any], ...]
    values: int
    files: Mapping[str, Mapping[str, Any]]

    def write(self, folder: Path) -> None:
        """Writes `folder`/conversion.json."""
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)
        (folder / RECORD).write_text(text + "\n")


def read_record(folder: PathLike) -> Record:
    """The record of a folder of converted weights, after checking that all of its files are there and of their size.

    Bytes that changed without changing a size are not noticed here.

    Raises:
      UserError: no such folder, not converted weights, or incomplete.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no converted weights at {folder}: convert them first, or give another path")
    try:
        fields = json.loads((folder / RECORD).read_text())
        if fields.pop("format") != FORMAT:
            raise UserError(f"{folder} was written by another version of this program; {AGAIN}")
        record = Record(**{**fields, "sources": tuple(fields["sources"])})
        wrong = [name for name, file in record.files.items() if _size(folder / name) != file["bytes"]]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {RECORD}, so it is not a complete set of converted weights") from None
    except OSError as error:
        raise UserError(f"{folder / RECORD} cannot be read: {reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / RECORD} is damaged ({error}); {AGAIN}") from error
    if wrong:
        raise UserError(f"{folder} is damaged: {', '.join(wrong)} missing or not of the recorded size; {AGAIN}")
    return record


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def shapes(folder: PathLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of every parameter by '/'-joined path, without reading values; raises as `read_record`."""
    read_record(folder)
    return stored_shapes(folder)


def stored_shapes(folder: PathLike, remedy: str = AGAIN) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of every array of an Orbax checkpoint, with a record or not, by '/'-joined path.

    Raises:
      UserError: it cannot be read; `remedy` says what to do about it.
    """
    try:  # of the handler: a checkpointer warns where a folder is one item of a larger checkpoint
        tree = ocp.PyTreeCheckpointHandler().metadata(Path(folder).absolute()).tree
    except Exception as error:  # Orbax passes on whatever its readers raise
        raise _damaged(folder, error, remedy) from error
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)  # an optimizer has lists too
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    return {path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for path, leaf in named}


def read_parameters(folder: PathLike, paths: Iterable[str], remedy: str = AGAIN) -> dict[str, np.ndarray]:
    """Some parameters in host memory, by '/'-joined path; raises UserError, with a remedy, if they are damaged."""
    item = traverse_util.unflatten_dict({path: np.zeros(()) for path in paths}, sep="/")
    args = ocp.args.PyTreeRestore(
        item, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            values = checkpointer.restore(Path(folder).absolute(), args=args)
        except Exception as error:  # Orbax wraps TensorStore's errors in a bare Exception
            raise _damaged(folder, error, remedy) from error
    return traverse_util.flatten_dict(values, sep="/")


def check_converted(folder: PathLike, like: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """`shapes` of converted weights, after checking that they are complete and just those of the model `like`.

    Raises:
      UserError: they are not.
    """
    found = shapes(folder)
    check_tree(folder, found, like)
    return found


def load_converted(folder: PathLike, like: Any, shardings: Any = None, dtype: Any = None) -> dict:
    """Reads converted weights; every device reads only its part, and no host holds a whole copy.

    Args:
      folder: one model's folder of converted weights.
      like: the parameter tree of the model, whose leaves need only a shape; the weights must match it exactly.
      shardings: a tree of shardings as `like`, or one for all parameters; default: `jax.default_device`.
      dtype: of all parameters; default: as they were converted.
    Returns:
      Nested dict of jax.Array.
    Raises:
      UserError: no converted weights there, incomplete or damaged, or names or shapes differ from `like` (all
        differences in one message).
    """
    found = check_converted(folder, like)
    if shardings is None:
        shardings = jax.numpy.zeros(()).sharding  # wherever arrays are made
    if isinstance(shardings, jax.sharding.Sharding):
        placed = dict.fromkeys(found, shardings)
    else:
        placed = traverse_util.flatten_dict(dict(shardings), sep="/")
    target = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else dtype, sharding=placed[path])
        for path, leaf in found.items()
    }
    # One of several processes reads without the others: Orbax would wait for them.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    with ocp.StandardCheckpointer(
        restore_concurrent_gb=_in_flight(found), multiprocessing_options=alone
    ) as checkpointer:
        try:
            return checkpointer.restore(Path(folder).absolute(), traverse_util.unflatten_dict(target, sep="/"))
        except jax.errors.JaxRuntimeError:  # too little memory, say: nothing is wrong with the weights
            raise
        except Exception as error:  # Orbax wraps TensorStore's errors in a bare Exception
            raise _damaged(folder, error) from error


def _in_flight(parameters: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """GB that may be on their way to the devices at once: room for any one parameter, and at least 2."""
    largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in parameters.values())
    return max(2, math.ceil(largest / 1e9) + 1)


def _damaged(folder: PathLike, error: Exception, remedy: str = AGAIN) -> UserError:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(f"{folder} is damaged and cannot be read ({line[:200]}); {remedy}")


@functools.cache
def hide_abandoned() -> None:
    """Keeps quiet, from here on, what Orbax tells beside what it raises: it logs the same several times over, each with
    its stack, and whatever it abandons when a part fails complains for itself."""
    tell = sys.unraisablehook

    def tell_others(what: Any) -> None:
        if not inspect.iscoroutine(what.object) and str(what.exc_value) != "Event loop is closed":
            tell(what)

    sys.unraisablehook = tell_others
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").addFilter(lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname)
