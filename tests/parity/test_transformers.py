"""umT5 and CLIP vision against transformers."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import clip, engine, umt5
from convert.names_huggingface import clip_table, umt5_table
from convert.parity import relative_error
from convert.sources import open_source
from emv3_jax.config import CLIPConfig, UMT5Config
from emv3_jax.errors import UserError
from emv3_jax.models.clip import CLIPVision
from emv3_jax.models.umt5 import UMT5Encoder

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[parity]'")

UMT5 = UMT5Config(vocab=97, width=32, attention_width=24, heads=4, layers=3, ffn=48)
CLIP = CLIPConfig(image_size=42, patch=14, width=32, heads=4, layers=4, mlp_ratio=2)


@pytest.fixture(scope="module")
def torch_umt5(random_model):
    config = transformers.UMT5Config(
        vocab_size=UMT5.vocab,
        d_model=UMT5.width,
        d_kv=UMT5.attention_width // UMT5.heads,
        d_ff=UMT5.ffn,
        num_layers=UMT5.layers,
        num_heads=UMT5.heads,
    )
    return random_model(transformers.UMT5EncoderModel(config))


@pytest.fixture(scope="module")
def umt5_file(torch_umt5, saved):
    return saved(torch_umt5)


@pytest.fixture(scope="module")
def umt5_params(umt5_file, converted):
    return converted(umt5_file, "umt5", "huggingface", UMT5)


@pytest.fixture(scope="module")
def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of four prompts; 150 tokens reach the widest distance bucket, from 128 on."""
    ids = np.random.default_rng(1).integers(0, UMT5.vocab, (4, 150))
    mask = np.arange(150)[None] < np.array([150, 97, 12, 1])[:, None]
    return ids, mask.astype(np.int64)


def umt5_states(model, prompts) -> np.ndarray:
    ids, mask = (torch.from_numpy(x) for x in prompts)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()


def test_umt5_matches_transformers(torch_umt5, umt5_params, prompts):
    """All positions, padded ones too: neither program masks queries, so these states are defined, if meaningless."""
    want = umt5_states(torch_umt5, prompts)
    got = jax.jit(UMT5Encoder(UMT5).apply)({"params": umt5_params}, *prompts)
    assert relative_error(got, want) < 1e-5
    real = prompts[1][..., None]
    assert relative_error(got * real, want * real) < 1e-5


def test_umt5_goes_back_as_transformers_wrote_it(
    torch_umt5, umt5_file, umt5_params, prompts, tmp_path, tensors_of, assert_same_tensors
):
    back = engine.to_torch(umt5_table(UMT5), umt5_params, umt5.target_tree(UMT5))
    assert_same_tensors(back, tensors_of(umt5_file))
    torch_umt5.config.save_pretrained(tmp_path)
    save_file(back, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = transformers.UMT5EncoderModel.from_pretrained(tmp_path).eval()
    np.testing.assert_array_equal(umt5_states(loaded, prompts), umt5_states(torch_umt5, prompts))


def test_umt5_with_the_embedding_under_both_of_its_names(torch_umt5, umt5_params, converted, tmp_path):
    """As files hold it that were made of the whole state in memory."""
    tensors = {key: value.numpy() for key, value in torch_umt5.state_dict().items()}
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= tensors.keys()
    save_file(tensors, tmp_path / "model.safetensors")
    params = converted(open_source(tmp_path), "umt5", "huggingface", UMT5)
    jax.tree.map(np.testing.assert_array_equal, params, umt5_params)
    save_file(tensors | {"shared.weight": -tensors["shared.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="shared.weight and encoder.embed_tokens.weight must be equal"):
        converted(open_source(tmp_path), "umt5", "huggingface", UMT5)


def test_umt5_out_of_a_model_with_a_decoder(random_model, saved, converted):
    config = transformers.UMT5Config(vocab_size=97, d_model=32, d_kv=6, d_ff=48, num_layers=3, num_heads=4)
    whole = random_model(transformers.UMT5ForConditionalGeneration(config))
    file = saved(whole)
    assert any(key.startswith("decoder.") for key in file.header)
    params = converted(file, "umt5", "huggingface", UMT5)
    np.testing.assert_array_equal(params["tokens"]["embedding"], whole.shared.weight.detach().numpy())


def test_umt5_names_and_shapes_at_full_size(full_size_shapes):
    """umT5-XXL, without weights."""
    config = transformers.UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, tie_word_embeddings=True
    )
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    del want["encoder.embed_tokens.weight"]
    assert full_size_shapes(umt5_table(UMT5Config()), umt5.target_tree(UMT5Config())) == want


@pytest.fixture(scope="module")
def clip_config():
    """With the exact GELU, as ViT-H/14 has it; the library's default is another one."""
    return transformers.CLIPVisionConfig(
        hidden_size=CLIP.width,
        intermediate_size=CLIP.mlp_ratio * CLIP.width,
        num_hidden_layers=CLIP.layers,
        num_attention_heads=CLIP.heads,
        image_size=CLIP.image_size,
        patch_size=CLIP.patch,
        projection_dim=16,
        hidden_act="gelu",
    )


@pytest.fixture(scope="module", params=["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def torch_clip(request, clip_config, random_model):
    return random_model(getattr(transformers, request.param)(clip_config))


@pytest.fixture(scope="module")
def clip_file(torch_clip, saved):
    return saved(torch_clip)


@pytest.fixture(scope="module")
def clip_params(clip_file, converted):
    return converted(clip_file, "clip", "huggingface", CLIP)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((3, CLIP.image_size, CLIP.image_size, 3)).astype(np.float32)


def clip_states(model, pixels: np.ndarray, layer: int) -> np.ndarray:
    with torch.no_grad():
        out = model(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
    return out.hidden_states[layer].numpy()


def test_clip_matches_transformers(torch_clip, clip_params, pixels):
    """Hidden state -2 of transformers is what the last block but one gives."""
    got = jax.jit(CLIPVision(CLIP).apply)({"params": clip_params}, pixels)
    assert relative_error(got, clip_states(torch_clip, pixels, -2)) < 1e-5


def test_clip_goes_back_all_but_what_is_not_used(
    torch_clip, clip_config, clip_file, clip_params, pixels, tensors_of, assert_same_tensors
):
    tensors = tensors_of(clip_file)
    prefix = "vision_model." if hasattr(torch_clip, "visual_projection") else ""
    back = engine.to_torch(clip_table(CLIP, prefix), clip_params, clip.target_tree(CLIP))
    last = f"{prefix}encoder.layers.{CLIP.layers - 1}."
    unused = {key for key in tensors if key.startswith((last, f"{prefix}post_layernorm", "visual_projection"))}
    assert len(unused) == 18 + ("visual_projection.weight" in tensors)
    assert_same_tensors(back, {key: value for key, value in tensors.items() if key not in unused})
    # What goes back is a tower of one block fewer, whose last state is the one wanted.
    shorter = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**{**clip_config.to_dict(), "num_hidden_layers": CLIP.layers - 1})
    ).eval()
    state = {key.removeprefix(prefix): torch.from_numpy(value) for key, value in back.items()}
    missing, unexpected = shorter.load_state_dict(state, strict=False)
    assert sorted(missing) == ["post_layernorm.bias", "post_layernorm.weight"] and not unexpected
    np.testing.assert_array_equal(clip_states(shorter, pixels, -1), clip_states(torch_clip, pixels, -2))


def test_clip_names_and_shapes_at_full_size(full_size_shapes):
    """ViT-H/14 but for its last block and final norm, without weights."""
    config = transformers.CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
    )
    with torch.device("meta"):
        model = transformers.CLIPVisionModel(config)
    unused = ("encoder.layers.31.", "post_layernorm.")
    want = {key: tuple(x.shape) for key, x in model.state_dict().items() if not key.startswith(unused)}
    assert full_size_shapes(clip_table(CLIPConfig(), ""), clip.target_tree(CLIPConfig())) == want
