"""Weight files: what was saved comes back, and what does not fit is said in one message."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax import checkpoint
from emv3_jax.errors import UserError

TREE = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}, "b": {"deep": {"scale": jnp.zeros(())}}}


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    checkpoint.save_params(path, TREE)
    for like in (None, TREE, jax.eval_shape(lambda: TREE)):
        params = checkpoint.load_params(path, like)
        jax.tree.map(np.testing.assert_array_equal, params, TREE)
        assert params["a"]["kernel"].dtype == np.float32


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    path = tmp_path / "w.safetensors"
    checkpoint.save_params(path, {"w": jnp.array([1 / 3, 1000.5])}, dtype="float16")
    params = checkpoint.load_params(path)
    assert params["w"].dtype == np.float32
    np.testing.assert_array_equal(params["w"], np.array([1 / 3, 1000.5], np.float16))


def test_all_differences_are_told_at_once(tmp_path):
    path = tmp_path / "w.safetensors"
    checkpoint.save_params(path, TREE)
    like = {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)}, "c": jnp.ones(1)}
    with pytest.raises(UserError) as info:
        checkpoint.load_params(path, like)
    message = str(info.value)
    assert message.startswith(f"{path} does not fit this model: ") and "\n" not in message
    for part in ("missing c", "unexpected b/deep/scale", "a/kernel is (2, 3), not (3, 2)"):
        assert part in message
    assert "bias" not in message


def test_transposed_arrays_keep_their_values(tmp_path):
    checkpoint.save_params(tmp_path / "w.safetensors", {"w": np.arange(6.0).reshape(2, 3).T})
    np.testing.assert_array_equal(checkpoint.load_params(tmp_path / "w.safetensors")["w"], [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_cut_file_is_damaged(tmp_path, keep):
    path = tmp_path / "w.safetensors"
    checkpoint.save_params(path, TREE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="w.safetensors is damaged or no safetensors file"):
        checkpoint.load_params(path)


@pytest.mark.parametrize("name", ["none.safetensors", "folder"])
def test_a_missing_file_is_told(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"no weights at {tmp_path}/{name}"):
        checkpoint.load_params(tmp_path / name)


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    checkpoint.save_params(path, TREE)

    def interrupted(source, target):
        assert source.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", interrupted)
    for target in (path, tmp_path / "other.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_params(target, {"w": jnp.ones(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(path), TREE)


def test_models_are_one_file_each(tmp_path):
    checkpoint.save_models(tmp_path, {"vae": TREE, "dit": {"w": jnp.ones(2)}}, dtype="float16")
    assert {file.name for file in tmp_path.iterdir()} == {"vae.safetensors", "dit.safetensors"}
    models = checkpoint.load_models(tmp_path, {"dit": {"w": jnp.ones(2)}})
    assert models.keys() == {"dit"}
    with pytest.raises(UserError, match="no weights at .*text.safetensors"):
        checkpoint.load_models(tmp_path, {"text": TREE})
