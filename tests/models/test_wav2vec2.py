import dataclasses
import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import engine, wav2vec2
from convert.registry import identify
from emv3_jax.checkpoint import write_safetensors
from emv3_jax.config import Wav2Vec2Config
from emv3_jax.layers import gelu_exact
from emv3_jax.models import wav2vec2 as model_file
from emv3_jax.models.wav2vec2 import (
    Block,
    ConvFeatures,
    PositionalConv,
    Wav2Vec2,
    feature_count,
    resample_features,
    sample_count,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = Wav2Vec2Config(
    width=32, heads=4, layers=3, ffn=48, conv_width=16, positional_taps=16, positional_groups=4
)  # fmt: skip
CONV = "encoder.pos_conv_embed.conv."
SIZE, DIRECTION = (f"{CONV}parametrizations.weight.original{i}" for i in (0, 1))

pytestmark = pytest.mark.usefixtures("quick_compile")


@partial(jax.jit, static_argnames=("cfg", "method", "frames"))
def run(params, x, cfg=TINY, method="__call__", frames=None, real=None):
    """Compiled: op by op the model takes four times as long. real: how much of x is not padding."""
    more = [number for number in (frames, real) if number is not None]
    return Wav2Vec2(cfg).apply({"params": params}, x, *more, method=method)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The stand-in encoder as a file."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    manifest = json.loads((GOLDEN / "manifests/wav2vec2_tiny.json").read_text())
    path = tmp_path_factory.mktemp("wav2vec2") / "wav2vec2.safetensors"
    write_safetensors(path, {key: weights.tensor_for(key, shape) for key, shape in manifest.items()})
    return path


@pytest.fixture(scope="module")
def target():
    return wav2vec2.target_tree(TINY)


@pytest.fixture(scope="module")
def params(checkpoint, target):
    return engine.to_jax(wav2vec2.table(TINY), load_file(checkpoint), target, checkpoint.name)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "wav2vec2_tiny.npz") as file:
        return dict(file)


def relative_error(got, want) -> float:
    got = np.asarray(got)
    assert got.dtype == np.float32 and got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def older_names(tensors: dict, prefix: str = "") -> dict:
    """The same file in the older way to write a weight norm, behind a prefix."""
    rename = {SIZE: f"{CONV}weight_g", DIRECTION: f"{CONV}weight_v"}
    return {prefix + rename.get(key, key): value for key, value in tensors.items()}


def test_matches_released_program(params, golden):
    wave = golden["wave"]
    assert relative_error(run(params, wave, method="conv_features")[..., ::4], golden["conv_features"]) < 1e-5
    assert relative_error(run(params, wave), golden["last_hidden_state"]) < 1e-5
    assert relative_error(run(params, wave, method="frame_states", frames=25), golden["hidden_states_25"]) < 1e-5


def test_every_way_to_write_the_file_gives_the_same_parameters(checkpoint, params, target):
    bare = load_file(checkpoint)
    recognition = older_names(bare, "wav2vec2.") | {"lm_head.weight": np.zeros((9, 32)), "lm_head.bias": np.zeros(9)}
    pretraining = {f"wav2vec2.{key}": value for key, value in bare.items()}
    pretraining |= {"quantizer.codevectors": np.zeros((1, 8, 4)), "project_hid.bias": np.zeros(4)}
    for tensors in (bare, older_names(bare), recognition, pretraining):
        table = identify(tensors, ["wav2vec2"])[0].table(TINY)
        converted = engine.to_jax(table, tensors, target, "file")
        jax.tree.map(np.testing.assert_array_equal, converted, params)


@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
@pytest.mark.parametrize("older", [False, True])
def test_conversion_round_trip_is_byte_equal(checkpoint, target, tmp_path, prefix, older):
    before = load_file(checkpoint)
    before = older_names(before, prefix) if older else {prefix + key: value for key, value in before.items()}
    table = wav2vec2.table(TINY, prefix, "g_v" if older else "parametrizations")
    write_safetensors(tmp_path / "back.safetensors", engine.to_torch(table, engine.to_jax(table, before, target, "")))
    after = load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()  # masked_spec_embed too, which nothing here reads
    for key, value in before.items():
        assert value.shape == after[key].shape and value.tobytes() == after[key].tobytes(), key


def test_conversion_names_what_does_not_fit(checkpoint, target):
    tensors = load_file(checkpoint)
    with pytest.raises(engine.ConversionError, match=rf"unexpected: {CONV}weight_g"):
        extra = tensors | {f"{CONV}weight_g": tensors[SIZE]}
        engine.to_jax(wav2vec2.table(TINY), extra, target, "both ways at once")
    with pytest.raises(engine.ConversionError, match=r"missing: encoder\.layers\.3\.attention\.q_proj\.weight"):
        deeper = wav2vec2.target_tree(dataclasses.replace(TINY, layers=4))
        engine.to_jax(wav2vec2.table(TINY), tensors, deeper, "one block too few")
    with pytest.raises(engine.ConversionError, match=r"unexpected: adapter\.layers\.0\.conv\.bias"):
        engine.to_jax(wav2vec2.table(TINY), tensors | {"adapter.layers.0.conv.bias": np.zeros(64)}, target, "adapter")


def test_full_size_is_the_released_one():
    shapes = jax.tree.leaves(wav2vec2.target_tree(Wav2Vec2Config()))
    assert sum(leaf.size for leaf in shapes) == 94_371_712


def test_bfloat16_weights_compute_in_float32(params, golden):
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    out, expected = run(narrow, golden["wave"]), np.asarray(run(widened, golden["wave"]))
    assert relative_error(out, expected) < 1e-5


def test_scanned_blocks_equal_a_loop(params, golden):
    features = jnp.asarray(golden["conv_features"]).repeat(4, axis=2)
    states = np.asarray(run(params, features, method="encode"))
    assert states.shape == (1, 3, 49, 32)
    x, block = states[:, 0], jax.jit(Block(TINY).apply)
    for layer in (1, 2):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["encoder"]["blocks"])
        x, _ = block({"params": own}, x, jnp.ones(49, bool))
        np.testing.assert_allclose(x, states[:, layer], atol=1e-5)
    assert np.abs(np.diff(states, axis=1)).max() > 0.1  # each block has its own weights


def test_clips_of_a_batch_do_not_hear_each_other(params, golden):
    wave = golden["wave"][0]
    loud = 30 * np.roll(wave, 4000) + 2
    both = run(params, np.stack([wave, loud]))
    np.testing.assert_allclose(both[:1], run(params, wave[None]), atol=1e-5)
    np.testing.assert_allclose(both[1:], run(params, loud[None]), atol=1e-5)


def test_lengths(params, golden):
    """400 samples give one feature, 320 more the next, whatever odd number lies between."""
    full = Wav2Vec2Config()
    counts = {0: 0, 399: 0, 400: 1, 719: 1, 720: 2, 1039: 2, 1040: 3, 16_000: 49, 16_079: 49, 16_080: 50}
    assert {n: feature_count(full, n) for n in counts} == counts
    assert [sample_count(full, features) for features in (1, 2, 50)] == [400, 720, 16_080]
    for samples in (719, 1041, 16_001):
        out = jax.eval_shape(run, params, jax.ShapeDtypeStruct((3, samples), jnp.float32))
        assert out.shape == (3, feature_count(TINY, samples), 32)
    shortest = run(params, golden["wave"][:, :400])
    assert shortest.shape == (1, 1, 32) and np.isfinite(shortest).all()


def test_first_norm_over_a_long_sound_with_an_offset(monkeypatch):
    """Pieces whose levels differ a thousandfold around an offset a thousand times the faint ones."""
    monkeypatch.setattr(model_file, "PIECE", 4)
    rng = np.random.default_rng(0)
    real = 2711
    wave = np.float32(1.0 + rng.standard_normal((1, 3000)) * np.where(np.arange(3000) < 1400, 1e-3, 1.0))
    kernel = rng.standard_normal((10, 1, 16)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(wave[0, :real].astype(np.float64), 10)[::5]
    expected = windows @ kernel[:, 0].astype(np.float64)
    variables = {"params": {"conv0": {"kernel": kernel}}}
    apply = partial(ConvFeatures(TINY).apply, size=4, method="statistics")
    mean, variance = jax.jit(apply)(variables, wave, np.int32(real))
    np.testing.assert_allclose(mean[0, 0], expected.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(variance[0, 0], expected.var(axis=0), rtol=1e-5)


def test_memory_is_that_of_a_few_states():
    """Ten minutes: no more than two waves, eight states [A, D] and the attention of a piece; all at once it was twice
    as much at this narrow width, twelve times at full size."""
    cfg = dataclasses.replace(TINY, width=64, ffn=256, conv_width=32)
    samples = 600 * 16_000
    wave = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    compiled = run.lower(wav2vec2.target_tree(cfg), wave, cfg=cfg).compile()
    grown = 2 * samples + feature_count(cfg, samples) * (8 * cfg.width + 2 * model_file.PIECE)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * grown


def test_silence_is_finite(params):
    assert np.isfinite(run(params, np.zeros((1, 16_000), np.float32))).all()


@pytest.mark.parametrize("taps", [4, 5])
def test_positional_conv_by_hand(taps):
    """Output a is the sum over taps of feature a + tap - taps // 2, in groups; the weight norm is one number a tap."""
    cfg = dataclasses.replace(TINY, width=6, positional_taps=taps, positional_groups=3)
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((7, 6)), rng.standard_normal((taps, 2, 6))
    g, bias = rng.standard_normal((taps, 1, 1)), rng.standard_normal(6)
    expected = np.tile(bias, (7, 1))
    for a in range(7):
        for tap in range(taps):
            weight = g[tap] * v[tap] / np.linalg.norm(v[tap])
            source = a + tap - taps // 2
            for group in range(3) if 0 <= source < 7 else ():
                own = slice(2 * group, 2 * group + 2)
                expected[a, own] += x[source, own] @ weight[:, own]
    params = jax.tree.map(np.float32, {"g": g, "v": v, "bias": bias})
    out = jax.jit(PositionalConv(cfg).apply)({"params": params}, jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(out[0], gelu_exact(jnp.asarray(expected)), atol=1e-5)


@pytest.mark.parametrize("length,steps", [(49, 25), (49, 113), (7, 7), (1, 4), (2, 3)])
def test_resampling_is_linear_between_exact_ends(length, steps):
    features = np.random.default_rng(length).standard_normal((2, length, 3)).astype(np.float32)
    out = np.asarray(resample_features(jnp.asarray(features), steps))
    np.testing.assert_array_equal(out[:, [0, -1]], features[:, [0, -1]])
    at = np.linspace(0, length - 1, steps)
    for b, c in np.ndindex(2, 3):
        np.testing.assert_allclose(out[b, :, c], np.interp(at, np.arange(length), features[b, :, c]), atol=1e-6)


def test_resampling_to_one_step_and_of_a_long_sound():
    features = jnp.arange(6.0).reshape(1, 3, 2)
    np.testing.assert_array_equal(resample_features(features, 1), features[:, :1])
    hour = jnp.arange(180_000.0)[None, :, None]  # positions here exceed 32 bits before the division
    middle = np.asarray(resample_features(hour, 90_001))[0, 45_000, 0]
    assert middle == pytest.approx(179_999 / 2)


def test_initial_parameters_suit_training_from_scratch():
    cfg = dataclasses.replace(TINY, width=64, conv_width=32, layers=2)
    model = Wav2Vec2(cfg)
    wave = jax.random.normal(jax.random.key(1), (2, 4000))
    params = jax.jit(model.init)(jax.random.key(0), wave)["params"]
    assert not np.array_equal(*params["encoder"]["blocks"]["attention"]["q"]["kernel"])  # each layer its own numbers

    @jax.jit
    def loss_and_gradient(params):
        return jax.value_and_grad(lambda p: jnp.mean(model.apply({"params": p}, wave)[..., 0] ** 2))(params)

    loss, gradient = loss_and_gradient(params)
    assert 0.1 < float(loss) < 10.0
    assert np.all(gradient.pop("masked_spec_embed") == 0)  # only carried
    gradient["encoder"]["blocks"]["attention"]["k"].pop("bias")  # adds the same to all logits of a query
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(gradient)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_wrong_shapes_are_refused():
    model, key = Wav2Vec2(TINY), jax.random.key(0)
    with pytest.raises(ValueError, match=r"wave must be \[B, n\] with n at least 400; got \(1, 399\)"):
        jax.eval_shape(model.init, key, jnp.zeros((1, 399)))
    with pytest.raises(ValueError, match=r"wave must be \[B, n\]"):
        jax.eval_shape(model.init, key, jnp.zeros(16_000))
    with pytest.raises(ValueError, match=r"features must be \[B, A, 16\]; got \(1, 5, 32\)"):
        jax.eval_shape(partial(model.init, method="encode"), key, jnp.zeros((1, 5, 32)))


# Against an independent implementation, at a random tiny size whose numbers all differ.

OTHER = Wav2Vec2Config(
    width=24, heads=3, layers=2, ffn=40, conv_width=20, conv_kernels=(10, 3, 2), conv_strides=(5, 2, 2),
    positional_taps=8, positional_groups=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def huggingface():
    """transformers' configuration of the same encoder, and a function that builds one of its models."""
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    cfg = transformers.Wav2Vec2Config(
        hidden_size=OTHER.width, num_attention_heads=OTHER.heads, num_hidden_layers=OTHER.layers,
        intermediate_size=OTHER.ffn, conv_dim=[OTHER.conv_width] * 3, conv_kernel=list(OTHER.conv_kernels),
        conv_stride=list(OTHER.conv_strides), num_feat_extract_layers=3, vocab_size=11,
        num_conv_pos_embeddings=OTHER.positional_taps, num_conv_pos_embedding_groups=OTHER.positional_groups,
        codevector_dim=16, proj_codevector_dim=12, num_codevectors_per_group=5, hidden_act="gelu",
    )  # fmt: skip

    def build(name: str):
        torch.manual_seed(0)
        model = getattr(transformers, name)(cfg).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # initialisation leaves much at 0 and 1, which would hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return build


def test_agrees_with_transformers(huggingface, monkeypatch):
    """In five pieces of 13 features, too: the other implementation takes the sound whole."""
    import torch

    monkeypatch.setattr(model_file, "PIECE", 15)
    model = huggingface("Wav2Vec2Model")
    wave = np.random.default_rng(1).standard_normal((2, 1237)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(wave), output_hidden_states=True)
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    table = identify(tensors, ["wav2vec2"])[0].table(OTHER)
    params = engine.to_jax(table, tensors, wav2vec2.target_tree(OTHER), "transformers")
    features = run(params, wave, cfg=OTHER, method="conv_features")
    states = run(params, features, cfg=OTHER, method="encode")
    assert relative_error(states[:, -1], expected.last_hidden_state.numpy()) < 1e-5
    for layer in range(OTHER.layers):
        assert relative_error(states[:, layer], expected.hidden_states[layer + 1].numpy()) < 1e-5
    # Loud padding is not heard; of the pieces, more then, the last are padding alone.
    real = len(features[0])
    longer = np.concatenate([wave, 9 * wave[:, ::-1]], axis=1)
    padded = np.array(run(params, longer, cfg=OTHER, method="conv_features", real=np.int32(1237)))
    assert padded.shape[1] > 2 * real
    assert relative_error(padded[:, :real], features) < 1e-5
    padded[:, real:] *= 9
    heard = run(params, padded, cfg=OTHER, method="encode", real=np.int32(real))
    assert relative_error(heard[:, :, :real], states) < 1e-5
    for steps in (1, 23, len(features[0]), 200):
        interpolated = torch.nn.functional.interpolate(
            torch.from_numpy(np.array(features)).mT, size=steps, mode="linear", align_corners=True
        )
        assert relative_error(resample_features(features, steps), interpolated.mT.numpy()) < 1e-5
    back = engine.to_torch(table, params)
    model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in back.items()}, strict=True)


@pytest.mark.parametrize("name", ["Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining"])
def test_files_of_models_with_a_head_convert(huggingface, name):
    tensors = {key: value.numpy() for key, value in huggingface(name).state_dict().items()}
    match = identify(tensors, ["wav2vec2"])[0]
    assert match.form.startswith("wav2vec2., ")
    engine.to_jax(match.table(OTHER), tensors, wav2vec2.target_tree(OTHER), name)
