"""Checkpoints: what was saved is gone on from, and nothing else; what goes wrong is one line."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from quadratic import Quadratic, assert_same_run, config, last_state, stop_at

from emv3_jax import command_line
from emv3_jax.converted import read_parameters
from emv3_jax.errors import UserError
from emv3_jax.training import checkpoints, loop
from emv3_jax.training import state as train_state


def state_of(seed: int, width: int = 5000):
    """Too large to be kept in Orbax's index, which has checksums of its own."""
    kernel = np.random.default_rng(seed).standard_normal((2, width))
    return train_state.init_state({"mlp": {"up": {"kernel": kernel}}}, optax.adamw(1e-3))


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def write(workdir, *seeds, **changes):
    """A checkpoint a seed: of step 1, 2, ..."""
    with checkpoints.opened(workdir) as kept:
        for step, seed in enumerate(seeds, 1):
            kept.save(step, state_of(seed, **changes))


def resumed(workdir, **changes):
    with checkpoints.opened(workdir) as kept:
        return kept.resume(state_of(99, **changes))


def test_a_checksum_is_of_every_bit_and_the_same_for_numpy_and_jax():
    values = np.float32([1.5, -0.0, np.nan, 3e-40])
    sums = set()
    for number in range(values.nbytes * 8):
        flipped = values.copy()
        flipped.view(np.uint8)[number // 8] ^= 1 << number % 8
        sums.add(int(checkpoints.checksum(flipped)))
    assert int(checkpoints.checksum(values)) not in sums
    for array in (values, np.int32(-7), np.arange(7, dtype=jnp.bfloat16), np.arange(4, dtype=np.uint8)):
        assert int(checkpoints.checksum(jnp.asarray(array))) == int(checkpoints.checksum(np.asarray(array)))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 9 // 16] ^= 4  # well inside an array, be there one of them in the file or two
    path.write_bytes(data)


def clear_a_page(path):
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(4096)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip_a_bit, clear_a_page])
def test_bytes_that_changed_are_damage_though_they_can_be_read(tmp_path, capsys, damage):
    write(tmp_path, 1, 2)
    damage(max((tmp_path / "checkpoints/2/default/ocdbt.process_0/d").iterdir(), key=lambda path: path.stat().st_size))
    assert_same(resumed(tmp_path), state_of(1))
    out = capsys.readouterr().out
    assert "the checkpoint of step 2 is damaged and was moved to" in out and "kernel is not what was saved" in out
    assert out.endswith(f"resumed from step 1 in {tmp_path}\n") and (tmp_path / "damaged_checkpoint_2").is_dir()


@pytest.mark.parametrize("left", [None, 0, 0.5])
def test_a_checkpoint_without_a_readable_index_is_damaged_and_of_no_other_model(tmp_path, capsys, left):
    write(tmp_path, 1, 2)
    index = tmp_path / "checkpoints/2/default/_METADATA"
    index.unlink() if left is None else index.write_bytes(index.read_bytes()[: int(left * index.stat().st_size)])
    assert_same(resumed(tmp_path), state_of(1))
    assert "the checkpoint of step 2 is damaged and was moved to" in capsys.readouterr().out


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    state = state_of(1)
    wanted = jax.device_get(state)
    with checkpoints.opened(tmp_path) as kept:
        kept.save(1, state)
        jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(state))
    assert_same(resumed(tmp_path), wanted)


def test_a_checkpoint_without_checksums_is_refused_in_one_line(tmp_path):
    with ocp.CheckpointManager(tmp_path / "checkpoints", item_handlers=ocp.StandardCheckpointHandler()) as manager:
        manager.save(1, args=ocp.args.StandardSave(state_of(1)))
    with pytest.raises(UserError, match="checkpoints/1 was saved by an earlier version of this program, without check"):
        resumed(tmp_path)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """What writes more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def said(error: str) -> list[str]:
    """What the program says on stderr; XLA logs there too of its own accord, of a slow machine say."""
    assert "Traceback" not in error, error
    return [line for line in error.splitlines() if line.startswith(("error:", "note:"))]


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, capfd):
    def main(words):
        with checkpoints.opened(tmp_path) as kept:
            for step in (1, 2, 3):
                with files_of_at_most(10**6 if step == 2 else resource.RLIM_INFINITY):
                    kept.save(step, state_of(step, 200_000))
                    kept.wait()

    assert command_line.run_main(main, []) == 2
    out, error = capfd.readouterr()
    assert not out and said(error) == [
        "error: the checkpoint of step 2 could not be written: file too large; step 1 is safe: make room at"
        f" {tmp_path}/checkpoints, then give the same command again"
    ]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("?")) == ["1"]
    (kernel,) = read_parameters(tmp_path / "checkpoints/1/default", ["params/mlp/up/kernel"]).values()
    np.testing.assert_array_equal(kernel, state_of(1, 200_000).params["mlp"]["up"]["kernel"])


def test_a_checkpoint_that_is_lost_when_a_run_ends_otherwise_is_a_note(tmp_path, capfd):
    with files_of_at_most(10**6), pytest.raises(UserError, match="^the lights"), checkpoints.opened(tmp_path) as kept:
        kept.save(1, state_of(1, 200_000))
        raise UserError("the lights went out")
    out, error = capfd.readouterr()
    assert out.startswith("note: the checkpoint of step 1 could not be written: file too large; no other is there")
    assert out.count("\n") == 1 and not said(error)


@pytest.mark.parametrize("spec", ["", r""" [tensorstore_spec='{\"driver\":\"zarr\",\"path\":\"step/\"}']"""])
def test_what_the_system_says_is_told_wherever_tensorstore_says_it(tmp_path, monkeypatch, spec):
    """Which of an array's files cannot be written is a matter of chance, and the words around are not the same."""

    def fail(*args, **keywords):
        raise ValueError(
            f"""OUT_OF_RANGE: Failed to write 9 bytes to file 4: File too large{spec} [os_error_code='27']"""
        )

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(UserError, match="could not be written: file too large; no other"):
        write(tmp_path, 1)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), OSError(116, "Stale file handle"), PermissionError(13, "Permission denied"),
        ValueError("UNKNOWN: Error reading local file: Input/output error [os_error_code='5']"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes."),
    ],
)  # fmt: skip
def test_a_checkpoint_that_may_be_whole_is_left_as_it_is(tmp_path, monkeypatch, error):
    def fail(*args, **keywords):
        raise error

    write(tmp_path, 1)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(
        UserError, match="checkpoint of step 1 .* could not be read .* left as it is; look at the memory"
    ):
        resumed(tmp_path)
    monkeypatch.undo()
    assert_same(resumed(tmp_path), state_of(1))


def test_a_half_written_checkpoint_is_told_and_removed(tmp_path, whole, capsys):
    loop.train(Quadratic(before_batch=stop_at(8)), config(), tmp_path)
    left = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp-1"
    left.mkdir()
    (left / "part").write_bytes(b"half")
    loop.train(Quadratic(), config(), tmp_path)
    out = capsys.readouterr().out
    assert "the checkpoint of step 9 was only half written: it was removed" in out and "resumed from step 7" in out
    assert not left.exists()
    assert_same_run(tmp_path, whole)


def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_used(tmp_path, whole, capsys):
    loop.train(Quadratic(before_batch=stop_at(8)), config(), tmp_path)
    newest = tmp_path / "checkpoints" / "7"
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    loop.train(Quadratic(before_batch=stop_at(8)), config(), tmp_path)  # whose place the new step 7 can take
    out = capsys.readouterr().out
    assert "checkpoint of step 7 is damaged and was moved to" in out and "resumed from step 5" in out
    assert (tmp_path / "damaged_checkpoint_7").is_dir() and last_state(tmp_path)[0] == 7
    loop.train(Quadratic(), config(), tmp_path)
    assert_same_run(tmp_path, whole)


def test_only_damaged_checkpoints_are_an_error_that_names_them(tmp_path):
    write(tmp_path, 1)
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}/checkpoints can be read .* delete that folder"):
        resumed(tmp_path)


class Renamed(Quadratic):
    """Parameters of the same shape under another name."""

    def init(self):
        return {"v": super().init()["w"]}

    def loss(self, params, constants, batch, key):
        return super().loss({"w": params["v"]}, constants, batch, key)


@pytest.mark.parametrize(
    ("recipe", "changes", "difference"),
    [
        (Quadratic(width=4), {}, "params/w is (2, 3) there and (2, 4) here; ema/w is (2, 3) there and (2, 4) here; "),
        (Renamed(), {}, "params/v is missing there and (2, 3) here; params/w is (2, 3) there and missing here; "),
        (Quadratic(), {"frozen": ("w",)}, "opt_state/1/0/count is () there and missing here; "),
    ],
)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path, recipe, changes, difference):
    loop.train(Quadratic(), config(steps=3), tmp_path)
    with pytest.raises(UserError, match="checkpoint of step 3 .* is of another model or optimizer") as info:
        loop.train(recipe, config(**changes), tmp_path)
    assert f"({difference}" in str(info.value) and " more): go on with the config that made it" in str(info.value)
    assert last_state(tmp_path)[0] == 3
