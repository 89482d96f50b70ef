import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import parity
from emv3_jax.config import DiTConfig
from emv3_jax.layers import rotary_tables, sinusoidal_features
from emv3_jax.models import audio_tokens
from emv3_jax.models.cdca import Branches, CrossKV, ModalityKV, by_frame
from emv3_jax.models.dit import REMAT, Block, DiT, Head, ImageEmbed, PatchEmbed

GOLDEN = parity.Golden(Path(__file__).parents[1] / "golden")
CFG = parity.DIT_TINY


@pytest.fixture(scope="module")
def params() -> dict:
    return parity.dit_params(GOLDEN, "dit_preview_tiny", CFG)


@pytest.fixture(scope="module")
def inputs() -> dict:
    """x, t, cond of the golden case."""
    return parity.dit_inputs(GOLDEN, "dit_preview_tiny", CFG)


@pytest.fixture(scope="module")
def velocity(params):
    """(x, t, cond, weights) -> velocity, compiled once."""
    apply = jax.jit(lambda x, t, cond, weights: DiT(CFG).apply({"params": params}, x, t, cond, weights))
    return lambda x, t, cond, weights=(1.0, 1.0, 1.0): apply(x, t, cond, jnp.tile(jnp.asarray(weights), (2, 1)))


def error(got, want) -> float:
    return parity.relative_error(got, np.asarray(want))


def test_golden_parity_through_the_converter(velocity, inputs):
    want = parity.channels_last(GOLDEN.arrays("dit_preview_tiny")["out"])
    assert error(velocity(**inputs), want) < 1e-5


def test_context_once_then_velocity_equals_call(params, velocity, inputs):
    variables = {"params": params}
    context = jax.jit(lambda cond: DiT(CFG).apply(variables, cond, method="context"))(inputs["cond"])
    step = jax.jit(lambda x, t, context: DiT(CFG).apply(variables, x, t, context, method="velocity"))
    assert error(step(inputs["x"], inputs["t"], context), velocity(**inputs)) < 1e-6
    later = step(inputs["x"], inputs["t"] - 100, context)
    assert error(later, velocity(inputs["x"], inputs["t"] - 100, inputs["cond"])) < 1e-6


def test_scan_equals_a_loop_over_layers(params, velocity, inputs):
    x, t, cond = inputs["x"], inputs["t"], inputs["cond"]

    def of(name, layer=None):
        return {"params": params[name] if layer is None else jax.tree.map(lambda leaf: leaf[layer], params[name])}

    model = DiT(CFG).bind({"params": params})
    text, image = model.text_embedding(cond.text), model.image_embedding(cond.image)
    assert error(ImageEmbed(CFG).apply(of("image_embedding"), cond.image), image) < 1e-6
    audio = audio_tokens.AudioTokens(CFG).apply(of("audio_tokens"), cond.audio)
    segments = audio_tokens.audio_segments(audio.shape[1], x.shape[1])
    grid = (x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    gain = jnp.tile(cond.face_mask * cond.audio_scale[:, None], (1, grid[0]))[..., None, None]
    branches = Branches(jnp.ones((2, 1, 1, 1, 1)), jnp.ones((2, 1, 1, 1)), gain)
    time = model.time_embedding(sinusoidal_features(t, CFG.time_features))
    modulation = model.time_projection(jax.nn.silu(time)).reshape(2, 6, CFG.width)
    rotary = rotary_tables(grid, CFG.head_width, CFG.rope_theta)

    @jax.jit
    def one_layer(tokens, block, cross):
        pairs = {"text_kv": text[:, None], "image_kv": image, "audio_kv": audio}
        text_kv, image_kv, audio_kv = (CrossKV(CFG).apply(cross, None, y, method=m)[1] for m, y in pairs.items())
        kv = ModalityKV(text_kv, image_kv, by_frame(audio_kv, np.stack([segments, segments])))
        return Block(CFG).apply(block, tokens, kv, modulation, rotary, branches)[0]

    tokens = PatchEmbed(CFG).apply(of("patch_embedding"), jnp.concatenate([x, cond.given], axis=-1))
    for layer in range(CFG.layers):
        tokens = one_layer(tokens, of("blocks", layer), of("cross_kv", layer))
    patches = np.asarray(Head(CFG).apply(of("head"), tokens, time)).reshape(2, *grid, 1, 2, 2, 16)
    looped = np.zeros(x.shape, np.float32)
    for q in range(2):
        for r in range(2):
            looped[:, :, q::2, r::2] = patches[:, :, :, :, 0, q, r]
    assert error(looped, velocity(**inputs)) < 1e-6


def test_face_mask_scale_and_weight_all_silence_the_audio(velocity, inputs):
    x, t, cond = inputs["x"], inputs["t"], inputs["cond"]
    other = cond.replace(audio=cond.audio[:, ::-1])
    heard = velocity(x, t, cond)
    assert error(velocity(x, t, other), heard) > 1e-3
    masked = velocity(x, t, cond.replace(face_mask=np.zeros_like(cond.face_mask)))
    np.testing.assert_array_equal(masked, velocity(x, t, other.replace(face_mask=np.zeros_like(cond.face_mask))))
    np.testing.assert_array_equal(masked, velocity(x, t, other.replace(audio_scale=np.zeros(2, np.float32))))
    np.testing.assert_array_equal(masked, velocity(x, t, other, (1.0, 1.0, 0.0)))


def test_each_modality_weight_removes_its_own_modality(velocity, inputs):
    x, t, cond = inputs["x"], inputs["t"], inputs["cond"]
    no_text, no_image = velocity(x, t, cond, (0.0, 1.0, 1.0)), velocity(x, t, cond, (1.0, 0.0, 1.0))
    np.testing.assert_array_equal(velocity(x, t, cond.replace(text=-cond.text), (0.0, 1.0, 1.0)), no_text)
    np.testing.assert_array_equal(velocity(x, t, cond.replace(image=-cond.image), (1.0, 0.0, 1.0)), no_image)
    assert error(no_text, no_image) > 1e-3
    halved = velocity(x, t, cond.replace(audio_scale=cond.audio_scale / 2))
    assert error(velocity(x, t, cond, (1.0, 1.0, 0.5)), halved) < 1e-6


@pytest.mark.parametrize("policy", REMAT)
def test_remat_changes_nothing_and_gradients_are_finite(params, inputs, policy):
    def loss_and_gradient(cfg: DiTConfig):
        def loss(params):
            return jnp.mean(jnp.square(DiT(cfg).apply({"params": params}, **inputs)))

        return jax.jit(jax.value_and_grad(loss))(params)

    plain, gradient = loss_and_gradient(CFG)
    remat, gradient_remat = loss_and_gradient(dataclasses.replace(CFG, remat=policy))
    assert float(plain) == pytest.approx(float(remat), rel=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_remat), strict=True):
        assert np.isfinite(a).all() and np.abs(a).max() > 0
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6 * float(jnp.abs(a).max()))


def test_a_new_model_starts_calm_with_float32_parameters(inputs):
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    out, variables = jax.jit(DiT(cfg).init_with_output)(jax.random.key(0, impl="rbg"), **inputs)  # compiles faster
    params = variables["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0.0)
    kernel = params["blocks"]["self_attention"]["query"]["kernel"]
    assert kernel.shape == (CFG.layers, CFG.width, CFG.width)
    assert not np.array_equal(kernel[0], kernel[1])
    np.testing.assert_allclose(np.std(kernel, axis=(1, 2)), CFG.width**-0.5, rtol=0.1)


def test_half_precision_stays_near_float32(params, velocity, inputs):
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    out = jax.jit(DiT(cfg).apply)({"params": params}, **inputs)
    assert error(out, velocity(**inputs)) < 0.05  # bfloat16 keeps 8 bits


def test_wrong_shapes_are_all_named(inputs):
    cond = inputs["cond"].replace(text=np.zeros((2, 3, 24)), face_mask=np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"text is \(2, 3, 24\), not \(2, 12, 24\); face_mask is \(2, 5\)"):
        jax.eval_shape(DiT(CFG).init, jax.random.key(0), inputs["x"], inputs["t"], cond)
    with pytest.raises(ValueError, match="do not fit conditions"):
        jax.eval_shape(DiT(CFG).init, jax.random.key(0), inputs["x"][:, :2], inputs["t"], inputs["cond"])


def test_audio_ranges_of_the_released_program():
    np.testing.assert_array_equal(audio_tokens.audio_ranges(26, 4), GOLDEN.arrays("dit_preview_tiny")["audio_ranges"])


def test_audio_segments_put_missing_tokens_at_the_end():
    table = audio_tokens.audio_segments(26, 4)  # segments [-11, 5], [-3, 13], [5, 21], [13, 29]
    assert table.shape == (4, 17)
    np.testing.assert_array_equal(table[0], [0, 1, 2, 3, 4, 5] + [26] * 11)
    np.testing.assert_array_equal(table[1], [*range(14)] + [26] * 3)
    np.testing.assert_array_equal(table[2], range(5, 22))
    np.testing.assert_array_equal(table[3], [*range(13, 26)] + [26] * 4)
    assert audio_tokens.audio_segments(2, 1).tolist() == [[0, 1] + [2] * 15]
    with pytest.raises(ValueError, match="shorter than one video frame"):
        audio_tokens.audio_segments(1, 1)


def test_audio_is_heard_frame_by_frame(velocity, inputs):
    """Tokens that carry their own index show up in the values of the frames whose segment holds them."""
    tokens = jnp.arange(26.0)[None, :, None] * jnp.ones((1, 1, CFG.width))
    segments = audio_tokens.audio_segments(26, 4)
    variables = CrossKV(CFG).init(jax.random.key(0), None, tokens, method="audio_kv")
    _, kv = CrossKV(CFG).apply(variables, None, tokens, method="audio_kv")
    value = np.asarray(by_frame(kv, segments[None]).value)
    assert value.shape == (1, 4, 17, CFG.heads, CFG.head_width)
    level = value[0, ..., 0, 0] / value[0, 1, 1, 0, 0]
    np.testing.assert_allclose(level, np.where(segments == 26, 0, segments), atol=1e-4)
