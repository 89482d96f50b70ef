import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import engine, umt5
from emv3_jax.checkpoint import write_safetensors
from emv3_jax.config import UMT5Config
from emv3_jax.models.umt5 import UMT5Encoder, encode_by_layer, relative_buckets

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = UMT5Config(vocab=97, width=32, attention_width=32, heads=4, layers=3, ffn=48)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The stand-in umT5 checkpoint as a file."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    manifest = json.loads((GOLDEN / "manifests/umt5_tiny.json").read_text())
    path = tmp_path_factory.mktemp("umt5") / "umt5.safetensors"
    write_safetensors(path, {key: weights.tensor_for(key, shape) for key, shape in manifest.items()})
    return path


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "umt5_tiny.npz") as file:
        return {"ids": file["ids"].astype(np.int32), "mask": file["mask"], "out": file["out"]}


@pytest.fixture(scope="module")
def params(checkpoint):
    return engine.to_jax(umt5.TABLE, load_file(checkpoint), umt5.target_tree(TINY), checkpoint.name)


@pytest.fixture(scope="module")
def encode():
    return jax.jit(lambda params, ids, mask: UMT5Encoder(TINY).apply({"params": params}, ids, mask))


def test_matches_released_program(params, golden, encode):
    out = np.asarray(encode(params, golden["ids"], golden["mask"]))
    assert out.dtype == np.float32
    error = np.abs(out - golden["out"]).max() / np.abs(golden["out"]).max()
    assert error < 1e-5


def test_conversion_round_trip_is_byte_equal(checkpoint, params, tmp_path):
    back = engine.to_torch(umt5.TABLE, params)
    write_safetensors(tmp_path / "back.safetensors", back)
    before, after = load_file(checkpoint), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.shape == after[key].shape and value.tobytes() == after[key].tobytes(), key


def test_conversion_refuses_a_checkpoint_with_one_block_too_few(checkpoint):
    deeper = umt5.target_tree(dataclasses.replace(TINY, layers=4))
    with pytest.raises(engine.ConversionError, match=r"missing: blocks\.3\.attn\.q\.weight"):
        engine.to_jax(umt5.TABLE, load_file(checkpoint), deeper, "short")


def test_conversion_keeps_bfloat16(checkpoint):
    tensors = {key: value.astype(jnp.bfloat16) for key, value in load_file(checkpoint).items()}
    params = engine.to_jax(umt5.TABLE, tensors, umt5.target_tree(TINY), "bf16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(jnp.bfloat16)}
    ids = jnp.ones((1, 4), jnp.int32)
    out = UMT5Encoder(TINY).apply({"params": params}, ids, ids)
    assert out.dtype == jnp.float32 and np.isfinite(out).all()


def test_padding_does_not_reach_real_tokens(params, golden, encode):
    ids, mask = golden["ids"], golden["mask"]
    real = mask[..., None]
    out = encode(params, ids, mask) * real
    other = encode(params, np.where(mask > 0, ids, 42), mask) * real
    np.testing.assert_array_equal(out, other)
    # Without the padding at all: other shapes, so equal up to rounding.
    length = int(mask[0].sum())
    short = encode(params, ids[:1, :length], mask[:1, :length])
    np.testing.assert_allclose(short, out[:1, :length], atol=1e-5)


def test_order_of_tokens_matters(params, golden, encode):
    reversed_ids = golden["ids"][1:, ::-1]
    forwards = encode(params, golden["ids"][1:], golden["mask"][1:])
    backwards = encode(params, reversed_ids, golden["mask"][1:])[:, ::-1]
    assert float(jnp.abs(forwards - backwards).max()) > 0.1


def test_fully_padded_prompt_is_finite(params, encode):
    out = encode(params, np.zeros((1, 6), np.int32), np.zeros((1, 6), np.float32))
    assert np.isfinite(out).all()


def test_relative_buckets_by_hand():
    # 32 buckets: 16 a side, of which 8 are exact; from 8 on, each doubling of the distance takes 2 buckets:
    # edges at 8, 8*sqrt(2), 16, 16*sqrt(2), 32, 32*sqrt(2), 64, 64*sqrt(2); everything beyond is 15.
    edges = {0: 0, 1: 1, 7: 7, 8: 8, 11: 8, 12: 9, 15: 9, 16: 10, 22: 10, 23: 11, 31: 11, 32: 12, 45: 12, 46: 13}
    edges |= {63: 13, 64: 14, 90: 14, 91: 15, 128: 15, 511: 15}
    table = relative_buckets(512, 32, 128)
    assert table.shape == (512, 512)
    for distance, bucket in edges.items():
        assert table[511, 511 - distance] == bucket, f"key {distance} before the query"
        if distance:
            assert table[0, distance] == 16 + bucket, f"key {distance} after the query"


def test_initial_parameters_suit_training_from_scratch():
    cfg = UMT5Config(vocab=50, width=64, attention_width=64, heads=4, layers=2, ffn=128)
    model = UMT5Encoder(cfg)
    ids = jax.random.randint(jax.random.key(1), (4, 12), 0, cfg.vocab)
    mask = jnp.arange(12)[None] < jnp.array([12, 8, 5, 1])[:, None]
    params = jax.jit(model.init)(jax.random.key(0), ids, mask)["params"]
    assert params["blocks"]["attention"]["q"]["kernel"].shape == (2, 64, 64)
    assert not np.array_equal(*params["blocks"]["attention"]["q"]["kernel"])  # each layer has its own numbers

    @jax.jit
    def loss_and_gradient(params):
        return jax.value_and_grad(lambda p: jnp.mean(model.apply({"params": p}, ids, mask)[..., 0] ** 2))(params)

    loss, gradient = loss_and_gradient(params)
    assert 0.1 < float(loss) < 10.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(gradient)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_wrong_shapes_are_refused():
    ids = jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match=r"ids and mask must both be \[B, S\]"):
        UMT5Encoder(TINY).init(jax.random.key(0), ids, ids[:, :4])


def test_a_layer_at_a_time_gives_the_same_states(params, golden):
    with jax.default_matmul_precision("highest"):
        out = np.asarray(encode_by_layer(TINY, params, golden["ids"], golden["mask"]))
    real = golden["mask"][..., None] > 0
    assert np.abs(np.where(real, out - golden["out"], 0)).max() <= 1e-5 * np.abs(golden["out"]).max()
