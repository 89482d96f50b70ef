"""The base transformer and the VAE against Diffusers."""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from convert import dit, engine, vae
from convert.names_diffusers import dit_table, vae_table
from convert.parity import channels_last, relative_error
from convert.registry import MODELS
from emv3_jax.config import DiTConfig, VAEConfig
from emv3_jax.models.dit import Conditions, DiT
from emv3_jax.models.vae import WanVAE, decode_chunked, encode_chunked

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; pip install -e '.[parity]'")

# Diffusers takes everything before the last 512 context tokens for the image, so the text must have its full length.
DIT = DiTConfig(
    width=48, heads=2, layers=2, ffn=80, time_features=32, text_width=24, text_len=512, image_width=20, image_tokens=9,
    audio_width=10,
)  # fmt: skip
VAE = VAEConfig(width=4, res_blocks=1)
pytestmark = pytest.mark.usefixtures("quick_compile")
VAE_MODEL = WanVAE(VAE)
B, T, H, W = 2, 3, 4, 6  # latents


def base_tree(cfg: DiTConfig) -> dict:
    """The transformer without its audio layers."""
    return MODELS["dit-base"].target_tree(cfg)


def is_audio(path: tuple[str, ...]) -> bool:
    return path[0] == "audio_tokens" or path[:2] == ("cross_kv", "audio")


@pytest.fixture(scope="module")
def torch_dit(random_model):
    return random_model(
        diffusers.WanTransformer3DModel(
            patch_size=DIT.patch,
            num_attention_heads=DIT.heads,
            attention_head_dim=DIT.head_width,
            in_channels=DIT.in_channels,
            out_channels=DIT.latent_channels,
            text_dim=DIT.text_width,
            freq_dim=DIT.time_features,
            ffn_dim=DIT.ffn,
            num_layers=DIT.layers,
            image_dim=DIT.image_width,
            added_kv_proj_dim=DIT.width,
        )
    )


@pytest.fixture(scope="module")
def dit_file(torch_dit, saved):
    return saved(torch_dit)


@pytest.fixture(scope="module")
def dit_tensors(dit_file, tensors_of):
    return tensors_of(dit_file)


@pytest.fixture(scope="module")
def dit_base(dit_file, converted):
    return converted(dit_file, "dit-base", "diffusers", DIT)


@pytest.fixture(scope="module")
def dit_params(dit_base):
    """The base, with random audio layers laid beside it."""
    rng = np.random.default_rng(3)
    flat = traverse_util.flatten_dict(dit_base)
    for path, leaf in traverse_util.flatten_dict(dit.target_tree(DIT)).items():
        if is_audio(path):
            flat[path] = rng.standard_normal(leaf.shape).astype(np.float32)
    return traverse_util.unflatten_dict(flat)


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    """Channels first, as Diffusers wants them. The prompts of 7 and 300 tokens end in zeros, as both programs have it:
    states cut to the real length, zero-padded, embedded with the rest and attended to without a mask."""
    rng = np.random.default_rng(4)
    text = rng.standard_normal((B, DIT.text_len, DIT.text_width)).astype(np.float32)
    text *= np.arange(DIT.text_len)[None, :, None] < np.array([7, 300])[:, None, None]
    return {
        "x": rng.standard_normal((B, DIT.latent_channels, T, H, W)).astype(np.float32),
        "given": rng.standard_normal((B, DIT.mask_channels + DIT.latent_channels, T, H, W)).astype(np.float32),
        "text": text,
        "image": rng.standard_normal((B, DIT.image_tokens, DIT.image_width)).astype(np.float32),
        "audio": rng.standard_normal((B, 18, DIT.audio_width)).astype(np.float32),
    }


def torch_velocity(model, inputs, t: np.ndarray) -> np.ndarray:
    x, given, text, image = (torch.from_numpy(inputs[key]) for key in ("x", "given", "text", "image"))
    with torch.no_grad():
        sample = model(
            hidden_states=torch.cat([x, given], dim=1),
            timestep=torch.from_numpy(t),
            encoder_hidden_states=text,
            encoder_hidden_states_image=image,
        ).sample
    return channels_last(sample.numpy())


@pytest.fixture(scope="module")
def velocity():
    """Function of (params, inputs, t, audio_scale)."""
    apply = jax.jit(DiT(DIT).apply)

    def run(params, inputs, t, audio_scale=0.0):
        cond = Conditions(
            given=channels_last(inputs["given"]),
            text=inputs["text"],
            image=inputs["image"],
            audio=inputs["audio"],
            face_mask=np.ones((B, H * W // 4), np.float32),
            audio_scale=np.full(B, audio_scale, np.float32),
        )
        return np.asarray(apply({"params": params}, channels_last(inputs["x"]), t, cond))

    return run


@pytest.mark.parametrize("t", [(1.0, 0.0), (37.5, 625.0), (999.0, 1000.0)])
def test_dit_matches_diffusers(torch_dit, dit_params, inputs, velocity, t):
    """Diffusers computes the phases of the time features in float32, the released program in float64, and this one as
    exactly; at t = 1000 that is a difference of up to 6e-5 at the input."""
    t = np.array(t, np.float32)
    assert relative_error(velocity(dit_params, inputs, t), torch_velocity(torch_dit, inputs, t)) < 1e-4


def test_dit_comparison_would_notice(torch_dit, dit_params, inputs, velocity):
    """Each condition moves the velocity, and so does the audio, once it is let in."""
    t = np.array([37.5, 625.0], np.float32)
    plain = velocity(dit_params, inputs, t)
    for key in ("given", "text", "image"):
        other = velocity(dit_params, inputs | {key: inputs[key][::-1]}, t)
        assert relative_error(other, plain) > 1e-3, key
    assert relative_error(velocity(dit_params, inputs, t, audio_scale=1.0), plain) > 1e-3


def test_dit_goes_back_bit_for_bit(dit_tensors, dit_base, assert_same_tensors):
    assert_same_tensors(engine.to_torch(dit_table(DIT), dit_base, base_tree(DIT)), dit_tensors)


def test_dit_names_are_those_of_the_librarys_own_conversion(dit_tensors, dit_base, assert_same_tensors):
    """Diffusers knows how to read released files: from our released names it makes our Diffusers names."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    released = engine.to_torch(dit.BASE, dit_base, base_tree(DIT))
    assert "blocks.0.cross_attn.k_img.weight" in released
    assert_same_tensors(convert_wan_transformer_to_diffusers(dict(released)), dit_tensors)


def test_dit_names_and_shapes_at_full_size(full_size_shapes):
    """Wan-Fun 1.3B InP, without weights."""
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, in_channels=36, ffn_dim=8960, num_layers=30, image_dim=1280,
            added_kv_proj_dim=1536,
        )  # fmt: skip
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert full_size_shapes(dit_table(DiTConfig()), base_tree(DiTConfig())) == want


def test_dit_without_image_is_refused(random_model, saved, converted):
    text_only = random_model(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, text_dim=24, freq_dim=32, ffn_dim=80, num_layers=2
        )
    )
    with pytest.raises(engine.ConversionError) as caught:
        converted(saved(text_only), "dit-base", "diffusers", DIT)
    assert "missing: condition_embedder.image_embedder.norm1.weight" in caught.value.problems
    assert "mis-shaped: patch_embedding.weight is [48, 16, 1, 2, 2], the model wants [48, 36, 1, 2, 2]" in (
        caught.value.problems
    )


@pytest.fixture(scope="module")
def torch_vae(random_model):
    model = diffusers.AutoencoderKLWan(
        base_dim=VAE.width,
        z_dim=VAE.latent_channels,
        dim_mult=list(VAE.multipliers),
        num_res_blocks=VAE.res_blocks,
        temperal_downsample=list(VAE.temporal_down),
    )
    return random_model(model)


@pytest.fixture(scope="module")
def vae_file(torch_vae, saved):
    return saved(torch_vae)


@pytest.fixture(scope="module")
def vae_params(vae_file, converted):
    return converted(vae_file, "vae", "diffusers", VAE)


@pytest.fixture(scope="module")
def encoded(torch_vae) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A video of 9 frames, and Diffusers' mean and log-variance of its latents; all channels last."""
    video = np.random.default_rng(5).uniform(-1, 1, (B, 3, 9, 16, 24)).astype(np.float32)
    with torch.no_grad():
        latents = torch_vae.encode(torch.from_numpy(video)).latent_dist
    # The pipelines, not the VAE, normalise the mean there. Nothing of the log-variance reaches the clamp at -30 and 20.
    mean = (latents.mean.numpy() - latent_row(torch_vae, "mean")) / latent_row(torch_vae, "std")
    return channels_last(video), channels_last(mean), channels_last(latents.logvar.numpy())


@pytest.fixture(scope="module")
def decoded(torch_vae) -> tuple[np.ndarray, np.ndarray]:
    """Normalised latents of 3 frames, and Diffusers' video of them; channels last."""
    latents = 0.5 * np.random.default_rng(6).standard_normal((B, 16, 3, 2, 3)).astype(np.float32)
    raw = latents * latent_row(torch_vae, "std") + latent_row(torch_vae, "mean")
    with torch.no_grad():
        video = torch_vae.decode(torch.from_numpy(raw)).sample.numpy()
    return channels_last(latents), channels_last(video)


def latent_row(model, name: str) -> np.ndarray:
    return np.asarray(model.config[f"latents_{name}"], np.float32).reshape(1, -1, 1, 1, 1)


def test_vae_names_and_shapes_at_full_size(full_size_shapes):
    with torch.device("meta"):
        model = diffusers.AutoencoderKLWan()
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert full_size_shapes(vae_table(VAEConfig()), vae.target_tree(VAEConfig())) == want


def test_vae_statistics_are_those_of_diffusers(torch_vae):
    assert tuple(torch_vae.config.latents_mean) == VAEConfig().latent_mean
    assert tuple(torch_vae.config.latents_std) == VAEConfig().latent_std


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_vae_encode_matches_diffusers(vae_params, encoded, chunked):
    video, mean, logvar = encoded
    if chunked:
        got = jax.jit(functools.partial(encode_chunked, VAE_MODEL))(vae_params, video)
    else:
        got = jax.jit(functools.partial(VAE_MODEL.apply, method="encode"))({"params": vae_params}, video)
    assert relative_error(got[0], mean) < 1e-5
    assert relative_error(got[1], logvar) < 1e-5


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_vae_decode_matches_diffusers(vae_params, decoded, chunked):
    latents, video = decoded
    assert (np.abs(video) < 0.99).mean() > 0.5  # a video that is mostly clamped would prove little
    if chunked:
        got = jax.jit(functools.partial(decode_chunked, VAE_MODEL))(vae_params, latents)
    else:
        got = jax.jit(functools.partial(VAE_MODEL.apply, method="decode"))({"params": vae_params}, latents)
    assert relative_error(got, video) < 1e-4


def test_vae_goes_back_bit_for_bit(vae_file, vae_params, tensors_of, assert_same_tensors):
    assert_same_tensors(engine.to_torch(vae_table(VAE), vae_params, vae.target_tree(VAE)), tensors_of(vae_file))


def test_vae_names_are_those_of_the_librarys_own_conversion(
    random_model, saved, converted, tensors_of, assert_same_tensors
):
    """At the released depth, which that conversion is written for."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    cfg = VAEConfig(width=4)
    file = saved(random_model(diffusers.AutoencoderKLWan(base_dim=cfg.width)))
    params = converted(file, "vae", "diffusers", cfg)
    released = engine.to_torch(vae.table(cfg), params, vae.target_tree(cfg))
    assert "decoder.upsamples.3.resample.1.weight" in released
    assert_same_tensors(convert_wan_vae_to_diffusers(released), tensors_of(file))
