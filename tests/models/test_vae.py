import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from convert import engine, parity
from convert import vae as vae_table
from emv3_jax.config import VAEConfig
from emv3_jax.errors import UserError
from emv3_jax.models import vae
from emv3_jax.models.vae import WanVAE

GOLDEN = parity.Golden(Path(__file__).parents[1] / "golden")
# Two halvings of time, as the released model; one level fewer, for speed. The goldens have the released statistics.
CFG = VAEConfig(
    width=4,
    multipliers=(1, 2, 2),
    res_blocks=1,
    temporal_down=(True, True),
    latent_mean=(0.0,) * 16,
    latent_std=(1.0,) * 16,
)
MODEL = WanVAE(CFG)
F, T, H, W = 9, 3, 8, 12


@pytest.fixture(scope="module")
def params() -> dict:
    """Random everywhere: biases, norm scales and the attention's output layer too, which init leaves at 0 or 1."""
    tree = traverse_util.flatten_dict(vae_table.target_tree(CFG))
    rng = np.random.default_rng(0)

    def leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape, np.float32)
        return 1 + 0.1 * x if path[-1] == "gamma" else x / np.sqrt(max(np.prod(shape[:-1]), 10))

    return traverse_util.unflatten_dict({path: jnp.float32(leaf(path, s.shape)) for path, s in tree.items()})


@pytest.fixture(scope="module")
def video() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (2, F, H, W, 3), minval=-1.0)


@pytest.fixture(scope="module")
def latents() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (2, T, H // 4, W // 4, 16))


@jax.jit
def encode(params, video):
    """The whole clip at once -> mean, logvar."""
    return MODEL.apply({"params": params}, video, method="encode")


@jax.jit
def decode_open(params, latents):
    """The whole clip at once, not clamped."""
    return MODEL.apply({"params": params}, latents, clamp=False, method="decode")


def decode(params, latents):
    return jnp.clip(decode_open(params, latents), -1.0, 1.0)


def assert_close(got, want, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert parity.relative_error(got, np.asarray(want)) < tolerance


@pytest.mark.parametrize(
    ("index", "key", "tolerance"), [(0, "latent_mean", 1e-5), (1, "latent_logvar", 1e-5), (2, "decoded", 1e-4)]
)
def test_golden_parity_through_the_converter(index, key, tolerance):
    got, want = parity.vae_output(GOLDEN, index, key)
    assert_close(got, want, tolerance)


def test_every_released_key_has_one_home():
    manifest = json.loads((GOLDEN.root / "manifests/wan_vae.json").read_text())
    problems: list[str] = []
    flat = traverse_util.flatten_dict(vae_table.target_tree(VAEConfig()), sep="/")
    slots = engine.expected_slots(vae_table.TABLE, flat, problems, "")
    assert not problems
    assert {key: list(slot.shape) for key, slot in slots.items()} == manifest


def test_table_round_trip_at_another_size(params):
    table = vae_table.table(CFG)
    tensors = engine.to_torch(table, params, vae_table.target_tree(CFG))
    back = engine.to_jax(table, tensors, vae_table.target_tree(CFG), "memory")
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_chunked_equals_whole(params, video, latents):
    mean, logvar = jax.jit(vae.encode_chunked, static_argnums=0)(MODEL, params, video)
    whole_mean, whole_logvar = encode(params, video)
    assert mean.shape == (2, T, H // 4, W // 4, 16)
    assert_close(mean, whole_mean)
    assert_close(logvar, whole_logvar)
    frames = jax.jit(vae.decode_chunked, static_argnums=0)(MODEL, params, latents)
    assert frames.shape == (2, F, H, W, 3)
    assert_close(frames, decode(params, latents))


def test_streaming_equals_whole(params, latents):
    blocks = list(vae.decode_stream(MODEL, params, vae.frame_by_frame(latents)))
    assert [block.shape[1] for block in blocks] == [1, 4, 4]
    assert_close(jnp.concatenate(blocks, axis=1), decode(params, latents))
    assert np.abs(decode_open(params, latents)).max() > 1.1  # so that the clamp has something to do


def test_one_frame_alone(params, video, latents):
    mean, logvar = jax.eval_shape(functools.partial(vae.encode_chunked, MODEL), params, video[:, :1])
    assert mean.shape == logvar.shape == (2, 1, H // 4, W // 4, 16)
    frame = jax.eval_shape(functools.partial(vae.decode_chunked, MODEL), params, latents[:, :1])
    assert frame.shape == (2, 1, H, W, 3)


def test_working_memory_does_not_grow_with_length():
    cfg = VAEConfig(width=4, multipliers=(1, 1), res_blocks=1, temporal_down=(True,))
    tree = vae_table.target_tree(cfg)

    def working_bytes(frames: int) -> int:
        shape = jax.ShapeDtypeStruct((1, frames, 8, 8, 16), jnp.float32)
        compiled = jax.jit(vae.decode_chunked, static_argnums=0).lower(WanVAE(cfg), tree, shape).compile()
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes - 2 * memory.output_size_in_bytes  # frames as scanned, frames as returned

    assert working_bytes(33) <= working_bytes(5)


def test_causality(params, video, latents):
    mean, changed = encode(params, video)[0], encode(params, video.at[:, 5].add(1.0))[0]
    np.testing.assert_array_equal(changed[:, :2], mean[:, :2])
    assert np.abs(changed - mean)[:, 2].max() > 1e-3  # frames 5 to 8 belong to latent frame 2
    frames, changed = decode_open(params, latents), decode_open(params, latents.at[:, 2].add(1.0))
    np.testing.assert_array_equal(changed[:, :5], frames[:, :5])
    assert np.abs(changed - frames)[:, 5:9].max() > 1e-3


def test_fold_latent_stats_moves_latents_and_keeps_pixels(params, video):
    raw, raw_logvar = encode(params, video)
    mean, std = raw.mean((0, 1, 2, 3)), raw.std((0, 1, 2, 3))
    folded = vae.fold_latent_stats(params, mean, std)
    latents, logvar = encode(folded, video)
    assert_close(latents, (raw - mean) / std)
    assert_close(logvar, raw_logvar - 2 * jnp.log(std))
    assert_close(decode_open(folded, latents), decode_open(params, raw))
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0.0, atol=1e-4)
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1.0, atol=1e-4)


@pytest.mark.parametrize(("mean", "std"), [(np.zeros(16), np.zeros(16)), (np.zeros(3), np.ones(3)), (0.0, 1.0)])
def test_fold_refuses_bad_statistics(params, mean, std):
    with pytest.raises(UserError, match="16 means and 16 positive deviations"):
        vae.fold_latent_stats(params, mean, std)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 8, 8, 3), r"number of video frames must be 4k\+1 \(1, 5, 9, \.\.\.\), got 4"),
        ((1, 0, 8, 8, 3), "number of video frames must be"),
        ((1, 5, 8, 10, 3), "multiples of 4, got 8x10"),
        ((1, 5, 8, 8), r"video must have shape \[batch, frames, height, width, 3\], got \(1, 5, 8, 8\)"),
        ((1, 3, 5, 8, 8), "video must have shape"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_bad_video_shapes(params, shape, message, chunked):
    with pytest.raises(UserError, match=message) as error:
        if chunked:
            vae.encode_chunked(MODEL, params, jnp.zeros(shape))
        else:
            encode(params, jnp.zeros(shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 0, 2, 2, 16), (1, 2, 2, 2, 8), (2, 2, 2, 16)])
def test_bad_latent_shapes(params, shape):
    with pytest.raises(UserError, match="latents must have shape"):
        vae.decode_chunked(MODEL, params, jnp.zeros(shape))
    with pytest.raises(UserError, match="latents must have shape"):
        MODEL.apply({"params": params}, jnp.zeros(shape), method="decode")


def test_a_later_chunk_needs_whole_groups(params, video):
    cache = jax.eval_shape(functools.partial(vae.encode_first, MODEL), params, video[:, :1])[-1]
    with pytest.raises(UserError, match="must be a multiple of 4, got 3"):
        vae.encode_next(MODEL, params, video[:, 1:4], cache)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)])
def test_causal_conv_is_a_3d_convolution(kernel):
    x = jax.random.normal(jax.random.key(3), (2, 6, 5, 4, 3))
    weights = jax.random.normal(jax.random.key(4), (*kernel, 3, 7))
    side = kernel[1] // 2
    want = jax.lax.conv_general_dilated(
        x, weights, (1, 1, 1), ((0, 0), (side, side), (side, side)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    assert_close(vae.causal_conv(x, weights), want)


def test_channel_norm_by_hand_and_at_zero():
    norm, variables = vae.ChannelNorm(), {"params": {"gamma": jnp.float32([1.0, 10.0])}}
    np.testing.assert_allclose(norm.apply(variables, jnp.float32([3.0, 4.0])), np.sqrt(2) * np.array([0.6, 8.0]), 1e-6)
    gradient = jax.grad(lambda x: norm.apply(variables, x).sum())(jnp.zeros(2))
    assert np.isfinite(gradient).all()
