"""Training states on disk: written while the run goes on, and gone on from only if they are what was written.

A step has a folder of its own, WORKDIR/checkpoints/STEP, in which Orbax keeps the fields of the TrainState and, as one
more, `checksums`: of every array, in the order of their names. They do not depend on how arrays are divided.
"""

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from emv3_jax.converted import hide_abandoned, read_parameters, stored_shapes
from emv3_jax.errors import UserError
from emv3_jax.files import reason
from emv3_jax.training import distributed
from emv3_jax.training.distributed import say
from emv3_jax.training.state import TrainState, layout_of

ITEM = "default"  # Orbax's folder in that of a step
CHECKSUMS = "checksums"
AVERAGE, RAW = "ema", "params"  # fields of TrainState
OTHER_STEP = "give another step"
GOOD, DAMAGED, MAY_PASS = range(3)  # what became of reading; the last of any process counts for all
T = TypeVar("T")


def checksum(array: Any) -> Any:
    """The sum of an array's bit patterns, as whole numbers mod 2^32; of NumPy's arrays as of JAX's, divided or not."""
    return array.view(f"uint{8 * array.dtype.itemsize}").sum(dtype=np.uint32)


def checksums(state: TrainState) -> jax.Array:
    """Of every array of a state, in the order of their names: uint32, whole on every device."""
    return jax.jit(_checksums, out_shardings=state.key.sharding)(vars(state))


def _checksums(tree: Any) -> jax.Array:  # one function, which is compiled once
    return jnp.stack([checksum(leaf) for _, leaf in sorted(_by_name(tree).items())])


def names_of(folder: pathlib.Path, found: Iterable[str]) -> list[str]:
    """The names of a checkpoint's arrays, in the order of their checksums. found: all that it holds.

    Raises:
      UserError: it has no checksums.
    """
    names = sorted(found)
    if CHECKSUMS not in names:
        raise UserError(
            f"{folder} was saved by an earlier version of this program, without checksums, and cannot be used: use"
            " the version that saved it, or train in another --workdir"
        )
    names.remove(CHECKSUMS)
    return names


def check_unchanged(names: Iterable[str], recorded: Iterable[Any], now: Iterable[Any]) -> None:
    """Raises ValueError, naming the first of them, if arrays have other checksums than when they were saved."""
    wrong = [name for name, a, b in zip(names, recorded, now, strict=True) if int(a) != int(b)]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is not what was saved" + (f", nor are {len(wrong) - 1} more" if wrong[1:] else "")
        )


def recorded(step: pathlib.Path, found: Iterable[str]) -> dict[str, int]:
    """The checksums of a checkpoint's arrays by name. found: all that it holds.

    Raises:
      UserError: as `names_of`.
    """
    names = names_of(step, found)
    sums = read_parameters(step / ITEM, [CHECKSUMS], OTHER_STEP)[CHECKSUMS]
    return dict(zip(names, map(int, sums), strict=True))


def read_arrays(step: pathlib.Path, names: Iterable[str], sums: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Some arrays of a checkpoint in host memory, by name.

    Args:
      sums: `recorded`.
    Raises:
      UserError: they are not what was saved.
    """
    names = list(names)
    try:
        found = read_parameters(step / ITEM, names, OTHER_STEP)
    except UserError as error:
        cause = error.__cause__ or error
        if _may_pass(cause):
            raise UserError(
                f"{step} could not be read ({_why(cause)}), and may be whole: look at the memory and the disk"
            ) from error
        raise
    try:
        check_unchanged(names, map(sums.get, names), (checksum(found[name]) for name in names))
    except ValueError as error:
        raise UserError(f"{step} is damaged ({error}); {OTHER_STEP}") from error
    return found


def read_field(step: pathlib.Path, field: str) -> dict[str, Any]:
    """A field of the state in a checkpoint's folder, AVERAGE or RAW, whole in host memory.

    Raises:
      UserError: the checkpoint is damaged.
    """
    found = stored_shapes(step / ITEM, OTHER_STEP)
    names = [name for name in found if name.startswith(f"{field}/")]
    arrays = read_arrays(step, names, recorded(step, found))
    return traverse_util.unflatten_dict({name.removeprefix(f"{field}/"): arrays.pop(name) for name in names}, sep="/")


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class _Damaged(Exception):
    """A checkpoint cannot be read, or holds something else than was saved."""


class Checkpoints:
    """The checkpoints of a run; see `opened`. Of several processes all call everything."""

    def __init__(self, workdir: pathlib.Path, manager: ocp.CheckpointManager):
        self._workdir, self._folder, self._manager = workdir, workdir / "checkpoints", manager
        self._writing: int | None = None  # the step that is being written, or has been last

    def latest(self) -> int | None:
        """The newest step there is."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Begins to write a state, which may be donated as soon as this returns; raises as `wait`."""
        whole = jax.block_until_ready({**vars(state), CHECKSUMS: checksums(state)})  # see Stopping.agreed
        self.wait()
        self._writing = step
        with self._told():
            self._manager.save(step, args=ocp.args.StandardSave(whole))

    def wait(self) -> None:
        """Until the last state is written.

        Raises:
          UserError: it could not be; said once.
        """
        if self._writing is not None:
            with self._told():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, and no more."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # raises again what has been told
                self._manager.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong with the state that is being written, in one line."""
        try:
            yield
        except Exception as error:  # Orbax passes on whatever its writers raise
            step, self._writing = self._writing, None
            whole = steps_in(self._workdir)
            kept = f"step {max(whole)} is safe" if whole else "no other is there"
            raise UserError(
                f"the checkpoint of step {step} could not be written: {_why(error)}; {kept}: make room at"
                f" {self._folder}, then give the same command again"
            ) from error

    def steps(self) -> list[int]:
        """Of what is there, damaged or whole."""
        return sorted(self._manager.all_steps())

    def resume(self, state: TrainState) -> TrainState:
        """The newest checkpoint that is whole, laid out as `state` (state.layout_of is enough), or `state` if there is
        none at all; damaged ones are moved aside.

        Raises:
          UserError: all are damaged, one may be whole and could not be read, or the newest is of another model or
            optimizer, or of a program that kept no checksums.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self._restored(step, state)
            except _Damaged as error:
                damaged[step] = str(error)
                continue
            for bad, why in damaged.items():
                aside = self._workdir / f"damaged_checkpoint_{bad}"
                if jax.process_index() == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                    (self._folder / str(bad)).rename(aside)
                say(f"the checkpoint of step {bad} is damaged and was moved to {aside} ({why})")
            distributed.wait()
            self._manager.reload()
            say(f"resumed from step {step} in {self._workdir}")
            return restored
        if damaged:
            raise UserError(
                f"no checkpoint in {self._folder} can be read ({damaged[max(damaged)]}):"
                " delete that folder to start from nothing, or give another --workdir"
            )
        return state

    def _restored(self, step: int, state: TrainState) -> TrainState:
        """A checkpoint as `state` is laid out; raises _Damaged, and UserError where `resume` does at once."""
        folder = self._folder / str(step)
        found = self._read(step, lambda: stored_shapes(folder / ITEM))
        names = names_of(folder, found)
        if differences := _differences({name: found[name] for name in names}, _by_name(vars(state))):
            more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
            raise UserError(
                f"the checkpoint of step {step} in {self._workdir} is of another model or optimizer"
                f" ({'; '.join(differences[:3])}{more}): go on with the config that made it, or give another --workdir"
            )
        sums = jax.ShapeDtypeStruct((len(names),), np.uint32, sharding=state.key.sharding)
        wanted = layout_of(vars(state)) | {CHECKSUMS: sums}
        saved = self._read(step, lambda: self._manager.restore(step, args=ocp.args.StandardRestore(wanted)))
        recorded = np.asarray(saved.pop(CHECKSUMS))
        restored = TrainState(**saved)
        now = np.asarray(checksums(restored))
        self._read(step, lambda: check_unchanged(names, recorded, now))
        return restored

    def _read(self, step: int, read: Callable[[], T]) -> T:
        """read(), in all processes or in none; raises _Damaged, and UserError where it may be whole."""
        failed: Exception | None = None
        why, worst = "another process could not read it", GOOD
        try:
            result = read()
        except Exception as error:  # Orbax passes on whatever its readers raise
            failed = error
            cause = error.__cause__ or error if isinstance(error, UserError) else error
            why, worst = _why(cause), MAY_PASS if _may_pass(cause) else DAMAGED
        worst = distributed.largest(worst)
        if worst == MAY_PASS:
            raise UserError(
                f"the checkpoint of step {step} in {self._workdir} could not be read ({why}), and may be whole: it was"
                " left as it is; look at the memory and the disk, then give the same command again"
            ) from failed
        if worst == DAMAGED:
            raise _Damaged(why) from failed
        return result


def steps_in(workdir: pathlib.Path) -> list[int]:
    """The steps whose checkpoints a run's folder holds."""
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]


@contextlib.contextmanager
def opened(workdir: pathlib.Path) -> Iterator[Checkpoints]:
    """The checkpoints of a run, two of which are kept. At the end the last one is written.

    Raises:
      UserError: it could not be; where something else is raised already, that goes on, and this is a note.
    """
    folder = workdir / "checkpoints"
    _remove_half_written(folder)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    hide_abandoned()
    manager = ocp.CheckpointManager(folder, options=options, item_handlers=ocp.StandardCheckpointHandler())
    checkpoints = Checkpoints(workdir, manager)
    try:
        yield checkpoints
    except BaseException:
        try:
            checkpoints.close()
        except UserError as lost:
            say(f"note: {lost}")
        raise
    checkpoints.close()


def _remove_half_written(folder: pathlib.Path) -> None:
    """Removes what a run left that was killed while it saved."""
    if jax.process_index() == 0:
        for left in sorted(folder.glob("*.orbax-checkpoint-tmp*")):
            shutil.rmtree(left)
            say(f"the checkpoint of step {left.name.partition('.')[0]} was only half written: it was removed")
    distributed.wait()


def _of_the_system(error: BaseException) -> BaseException:
    """TensorStore's error as the OSError that it is of, where it is of one; any other as it is."""
    code = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else error


def _why(error: BaseException) -> str:
    """An error in half a line: the operating system's own words where it is of the system."""
    error = _of_the_system(error)
    if isinstance(error, OSError):
        return reason(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def _may_pass(error: BaseException) -> bool:
    """Whether reading failed for want of memory, or because of the disk, and not because of what was read."""
    error = _of_the_system(error)
    absent = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    system = isinstance(error, OSError | MemoryError) and not absent
    signs = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    return system or any(sign in str(error) for sign in signs)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What a checkpoint's arrays have that a state's have not, and the other way round; the parameters first."""
    names = sorted(there.keys() | here.keys(), key=lambda name: (not name.startswith("params/"), name))
    what = lambda leaf: "missing" if leaf is None else str(tuple(leaf.shape))  # noqa: E731
    return [
        f"{name} is {was} there and {now} here"
        for name in names
        if (was := what(there.get(name))) != (now := what(here.get(name)))
    ]
