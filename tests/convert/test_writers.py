import os
import weakref
from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert import writers
from convert.engine import Leaf
from convert.sources import Spec
from convert.writers import PARTIAL, REPLACED, SafetensorsWriter, check_space, claim, staged, write_orbax
from emv3_jax.errors import UserError


class Parameter(Leaf):
    """A leaf that makes its blocks of nothing, and counts how many of their bytes are alive."""

    alive = peak = 0

    def blocks(self) -> Iterator[tuple[int | None, np.ndarray]]:
        for layer in self.layers:
            shape = self.spec.shape if layer is None else self.spec.shape[1:]
            block = np.full(shape, 1 + (layer or 0), self.spec.dtype)
            Parameter.alive += block.nbytes
            Parameter.peak = max(Parameter.peak, Parameter.alive)
            weakref.finalize(block, self.gone, block.nbytes)
            yield layer, block
            del block

    @staticmethod
    def gone(size: int) -> None:
        Parameter.alive -= size


def parameter(path, shape, dtype=np.float32, stacked=True) -> Parameter:
    return Parameter(path, Spec(shape, np.dtype(dtype)), dict.fromkeys(range(shape[0]) if stacked else [None], ()))


LEAVES = (
    parameter("blocks/kernel", (12, 64, 128)),
    parameter("blocks/bias", (12, 3), ml_dtypes.bfloat16),
    parameter("embedding", (50, 7), np.float16, stacked=False),
    parameter("scalar", (), stacked=False),
)


@pytest.fixture
def small_batches(monkeypatch):
    """Sizes at which the parameters above are large, and memory tells."""
    monkeypatch.setattr(writers, "CHUNK_BYTES", 8 << 10)
    monkeypatch.setattr(writers, "BATCH_BYTES", 64 << 10)


def check(tree: dict) -> None:
    want = {leaf.path: leaf.array() for leaf in LEAVES}
    assert tree.keys() == {"blocks", "embedding", "scalar"}
    for path, value in want.items():
        head, _, rest = path.partition("/")
        got = np.asarray(tree[head][rest] if rest else tree[head])
        assert got.dtype == value.dtype and got.tobytes() == value.tobytes()


def test_any_orbax_reads_what_is_written(tmp_path, small_batches):
    heard: list[int] = []
    write_orbax(tmp_path / "a", LEAVES, heard.append)
    assert sum(heard) == sum(leaf.spec.nbytes for leaf in LEAVES)
    with ocp.StandardCheckpointer() as checkpointer:
        check(checkpointer.restore(tmp_path / "a"))
        target = {path: jax.ShapeDtypeStruct(leaf.spec.shape, leaf.spec.dtype) for path, leaf in
                  (("embedding", LEAVES[2]), ("scalar", LEAVES[3]))}  # fmt: skip
        target["blocks"] = {path: jax.ShapeDtypeStruct(leaf.spec.shape, leaf.spec.dtype) for path, leaf in
                            (("kernel", LEAVES[0]), ("bias", LEAVES[1]))}  # fmt: skip
        check(checkpointer.restore(tmp_path / "a", target))
    with ocp.PyTreeCheckpointer() as checkpointer:
        check(checkpointer.restore(tmp_path / "a"))


def test_memory_holds_a_batch_of_blocks_and_chunks_are_parts_of_one_layer(tmp_path, small_batches):
    Parameter.peak = Parameter.alive
    write_orbax(tmp_path / "a", [parameter(f"p{i}", (12, 64, 128)) for i in range(4)])  # 1.5 MB, blocks of 32 KB
    assert Parameter.peak <= writers.BATCH_BYTES + 2 * (32 << 10)
    with ocp.PyTreeCheckpointer() as checkpointer:
        leaf = checkpointer.metadata(tmp_path / "a").item_metadata.tree["p0"]
    assert leaf.storage.chunk_shape[0] == 1
    assert np.prod(leaf.storage.chunk_shape) * 4 <= writers.CHUNK_BYTES


def test_a_source_that_fails_while_orbax_writes_leaves_its_own_error(tmp_path):
    class Broken(Parameter):
        def blocks(self):
            raise UserError("the file is gone")

    with claim(tmp_path), pytest.raises(UserError, match="^the file is gone$"), staged(tmp_path / "a") as partial:
        write_orbax(partial, [Broken("p", Spec((2, 3), np.dtype(np.float32)), {0: (), 1: ()})])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing_and_what_stood_there_stays(tmp_path, error):
    final = tmp_path / "a"
    final.mkdir()
    (final / "old").touch()
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with claim(tmp_path), pytest.raises(expected) as caught, staged(final) as partial:
        partial.mkdir()
        (partial / "new").touch()
        raise error
    if expected is UserError:
        assert str(caught.value) == f"output {final} could not be written: no space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in final.iterdir()] == ["old"]


def test_a_folder_and_a_file_are_replaced(tmp_path):
    with claim(tmp_path):
        for text in ("old", "new"):
            with staged(tmp_path / "folder") as partial:
                partial.mkdir()
                (partial / text).touch()
            with staged(tmp_path / "file") as partial:
                partial.write_text(text)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert (tmp_path / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_leftovers_of_a_killed_run_are_removed_by_the_next(tmp_path):
    for name in (f".vae{PARTIAL}", f".vae{PARTIAL}.orbax-checkpoint-tmp-1"):
        (tmp_path / name / "d").mkdir(parents=True)
    (tmp_path / f".x.safetensors{PARTIAL}").touch()
    (tmp_path / f".clip{REPLACED}").mkdir()  # killed after the old one was moved away: it comes back
    (tmp_path / f".umt5{REPLACED}").mkdir()  # killed after the new one was in place: it goes
    (tmp_path / "umt5").mkdir()
    (tmp_path / ".mine.partial").touch()
    with claim(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.partial", "clip", "umt5"]


def test_two_conversions_do_not_write_to_one_folder(tmp_path):
    with claim(tmp_path / "out"), pytest.raises(UserError, match="another conversion is writing to"):  # noqa: SIM117
        with claim(tmp_path / "out"):
            raise AssertionError
    with claim(tmp_path / "out"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), claim(tmp_path / "file"):
        raise AssertionError


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    check_space(tmp_path, 1)
    with pytest.raises(UserError, match=r"MB left, 1,000,000,000,000\.0 MB are needed: make room there"):
        check_space(tmp_path, 10**18)


def test_a_tensor_too_few_is_noticed(tmp_path):
    header = {"a": Spec((2,), np.dtype(np.float32)), "b": Spec((3,), np.dtype(np.float32))}
    with pytest.raises(ValueError, match="12 bytes"), SafetensorsWriter(tmp_path / "a", header, {}) as writer:
        writer.write(np.zeros(2, np.float32))


def test_names_of_temporary_files_are_hidden_and_beside():
    assert PARTIAL.startswith(".") and REPLACED.startswith(".") and os.sep not in PARTIAL + REPLACED
