import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import clip, engine
from convert.registry import identify
from emv3_jax.checkpoint import write_safetensors
from emv3_jax.config import CLIPConfig
from emv3_jax.models.clip import PIXEL_MEAN, PIXEL_STD, CLIPVision, bicubic_matrix, preprocess, resize_bicubic

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = CLIPConfig(image_size=28, patch=14, width=32, heads=4, layers=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The stand-in CLIP tower as a file."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    manifest = json.loads((GOLDEN / "manifests/clip_tiny.json").read_text())
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    write_safetensors(path, {key: weights.tensor_for(key, shape) for key, shape in manifest.items()})
    return path


@pytest.fixture(scope="module")
def target():
    return clip.target_tree(TINY)


@pytest.fixture(scope="module")
def params(checkpoint, target):
    return engine.to_jax(clip.table(TINY), load_file(checkpoint), target, checkpoint.name)


def test_matches_released_program(params):
    with np.load(GOLDEN / "clip_tiny.npz") as golden:
        pixels, expected = golden["pixels"].transpose(0, 2, 3, 1), golden["out"]
    out = np.asarray(jax.jit(CLIPVision(TINY).apply)({"params": params}, pixels))
    assert out.dtype == np.float32 and out.shape == (2, TINY.tokens, TINY.width)
    assert np.abs(out - expected).max() / np.abs(expected).max() < 1e-5


def test_conversion_round_trip_is_byte_equal(checkpoint, params, tmp_path):
    write_safetensors(tmp_path / "back.safetensors", engine.to_torch(clip.table(TINY), params))
    before, after = load_file(checkpoint), load_file(tmp_path / "back.safetensors")
    left_out = {key for key in before if key.startswith(("transformer.2.", "post_norm.")) or key == "head"}
    assert len(left_out) == 15 and after.keys() == before.keys() - left_out
    for key, value in after.items():
        assert value.shape == before[key].shape and value.tobytes() == before[key].tobytes(), key


def test_released_file_with_both_towers(checkpoint, params, target):
    tensors = {f"visual.{key}": value for key, value in load_file(checkpoint).items()}
    tensors |= {"log_scale": np.zeros(()), "textual.token_embedding.weight": np.zeros((7, 3))}
    table = identify(tensors, ["clip"])[0].table(TINY)
    converted = engine.to_jax(table, tensors, target, "both towers")
    jax.tree.map(np.testing.assert_array_equal, converted, params)


def test_conversion_names_a_key_that_is_neither_used_nor_ignored(checkpoint, target):
    tensors = load_file(checkpoint) | {"transformer.3.norm1.bias": np.zeros(32, np.float32)}
    with pytest.raises(engine.ConversionError, match=r"unexpected: transformer\.3\.norm1\.bias"):
        engine.to_jax(clip.table(TINY), tensors, target, "four blocks")


def test_resize_matches_released_program():
    """The real preprocessing of one picture, enlarged from 96x80 to 224x224; the golden keeps every 7th pixel."""
    with np.load(GOLDEN / "clip_resize.npz") as golden:
        image, expected = golden["image"].transpose(0, 2, 3, 1), golden["resized"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(np.asarray(resize_bicubic(image, 224))[:, ::7, ::7], expected, atol=1e-5)
    unit = (expected + 1) / 2
    normalised = (unit - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
    pixels = jax.jit(preprocess, static_argnums=1)(image, 224)
    # 1e-5 in [-1, 1] is up to 2e-5 after the division by 2 * std.
    np.testing.assert_allclose(np.asarray(pixels)[:, ::7, ::7], normalised, atol=2e-5)


def test_bicubic_matrix_by_hand():
    np.testing.assert_array_equal(bicubic_matrix(5, 5), np.eye(5))
    # Halving without anti-aliasing: each output lies midway between two pixels; taps -3/32, 19/32, 19/32, -3/32.
    outer, inner = -3 / 32, 19 / 32
    expected = [[outer + inner, inner, outer, 0], [0, outer, inner, inner + outer]]
    np.testing.assert_allclose(bicubic_matrix(4, 2), expected, atol=1e-7)


@pytest.mark.parametrize("source,target", [(1, 6), (2, 7), (80, 224), (640, 224)])
def test_bicubic_keeps_a_flat_picture_flat(source, target):
    np.testing.assert_allclose(bicubic_matrix(source, target).sum(axis=1), 1.0, atol=1e-6)


def test_preprocess_range_and_shape():
    """White, black and grey land where CLIP's statistics put them, whatever the size of the picture."""
    flat = jnp.array([1.0, -1.0, 0.0])[:, None, None, None] * jnp.ones((3, 20, 33, 3))
    pixels = preprocess(flat, 64)
    assert pixels.shape == (3, 64, 64, 3) and pixels.dtype == jnp.float32
    expected = (np.array([1.0, 0.0, 0.5])[:, None] - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
    np.testing.assert_allclose(pixels, np.broadcast_to(expected[:, None, None], pixels.shape), atol=1e-5)


def test_initial_parameters_suit_training_from_scratch():
    cfg = CLIPConfig(image_size=64, patch=16, width=64, heads=4, layers=3)
    model = CLIPVision(cfg)
    images = jax.random.uniform(jax.random.key(1), (2, 48, 40, 3), minval=-1)
    pixels = preprocess(images, cfg.image_size)
    params = jax.jit(model.init)(jax.random.key(0), pixels)["params"]
    assert params["blocks"]["mlp"]["up"]["kernel"].shape == (2, 64, 256)  # blocks 0 and 1 of 3: the last is not read

    @jax.jit
    def loss_and_gradient(params):
        return jax.value_and_grad(lambda p: jnp.mean(model.apply({"params": p}, pixels)[..., 0] ** 2))(params)

    loss, gradient = loss_and_gradient(params)
    assert 0.01 < float(loss) < 10.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(gradient)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"pixels must be \[B, 28, 28, 3\]; got \(1, 3, 28, 28\)"):
        CLIPVision(TINY).init(jax.random.key(0), jnp.zeros((1, 3, 28, 28)))
    with pytest.raises(ValueError, match=r"images must be \[B, H, W, 3\]"):
        preprocess(jnp.zeros((28, 28, 3)), 28)
