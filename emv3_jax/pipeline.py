"""The whole program as a function: a request goes in, frames come out.

A render runs in stages (`render.Run`): words, picture and sound are encoded once, then the velocity is followed through
the windows of the video, whose latents lie in a folder, then they are decoded.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from emv3_jax import checkpoint, conditioning, contexts, converted, steps, tasks
from emv3_jax.config import FPS, PRESETS, RATE, Preset
from emv3_jax.diffusion import guidance, negatives
from emv3_jax.diffusion import sampler as sampling
from emv3_jax.diffusion.phda import PhDAConfig
from emv3_jax.errors import UserError
from emv3_jax.models import umt5
from emv3_jax.models import vae as vae_model
from emv3_jax.models.audio_tokens import audio_encoder
from emv3_jax.models.clip import CLIPVision
from emv3_jax.models.dit import DiT, zero_inputs
from emv3_jax.models.umt5 import UMT5Encoder
from emv3_jax.models.wav2vec2 import Wav2Vec2, sample_count
from emv3_jax.options import SamplingOptions
from emv3_jax.request import Ready, Request, fit_box, fitted_size, frames_for, given_pixels, read_request, scaled
from emv3_jax.sharding import param_shardings
from emv3_jax.weight_files import WEIGHTS, LoadedWhenUsed, as_trained, file_marks, load_tokenizer, locate

__all__ = [
    "FPS", "RATE", "Pipeline", "Ready", "Request", "Result", "SamplingOptions", "expected_params", "fit_box",
    "fitted_size", "frames_for", "init_params", "load_pipeline", "load_tokenizer", "read_request",
]  # fmt: skip
DTYPES = ("float32", "bfloat16")
OnStep = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """frames [F, H, W, 3] uint8 at 25 per second; wave [n] at 16 kHz; notes: what was cut or resized."""

    frames: np.ndarray
    wave: np.ndarray
    notes: tuple[str, ...]


class Pipeline:
    """Models of a preset with their weights.

    Args:
      preset: sizes.
      params: {"dit", "text", "image", "vae"} parameter trees, and "speech" where the preset has a speech encoder. A
        mapping may load a tree whenever it is asked for, and keep none (`LoadedWhenUsed`).
      phda: how much text, image and audio count at a timestep; default: the paper's phases for presets trained with
        them, all equally for the others.
      words: the tokenizer; default: the preset's own.
      mesh: over whose devices the sampling steps are divided (`sharding`); default: one device does it all.
      marks: gives a text by role that tells the weights from others; default: made of every array's first numbers.
    """

    def __init__(
        self,
        preset: Preset,
        params: Mapping[str, Any],
        phda: PhDAConfig | None = None,
        words: Any = None,
        mesh: jax.sharding.Mesh | None = None,
        marks: Callable[[], Mapping[str, str]] | None = None,
    ):
        self.preset, self.params, self.mesh = preset, params, mesh
        self._marks = marks or (lambda: {role: _mark(params[role]) for role in params})
        self.words = words or conditioning.tokenizer(preset)
        self.vae = vae_model.WanVAE(preset.vae)
        self.phda = phda or (PhDAConfig() if preset.phda else None)

    @functools.cached_property
    def marks(self) -> dict[str, str]:
        """A text by role that tells the weights from others."""
        return dict(self._marks())

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """Within it, what is compiled is divided over the pipeline's devices."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def velocity(self) -> guidance.ModelVelocity:
        """The transformer with its weights."""
        return guidance.ModelVelocity(self.params["dit"], DiT(self.preset.dit), self.phda)

    @functools.cached_property
    def _encode_given(self) -> Any:
        """(vae params, videos, masks) -> [B, T, h, w, 4 + 16]."""

        def encode(params: Any, videos: jax.Array, masks: jax.Array) -> jax.Array:
            masked, _ = vae_model.encode_chunked(self.vae, params, tasks.masked_video(videos, masks))
            return jnp.concatenate([tasks.mask_channels(masks), tasks.masked_latents(masked, masks)], axis=-1)

        return jax.jit(encode)

    @functools.cached_property
    def encode_video(self) -> Any:
        """(vae params, videos [B, F, H, W, 3] in [-1, 1]) -> latents [B, T, h, w, 16]."""
        return jax.jit(lambda params, videos: vae_model.encode_chunked(self.vae, params, videos)[0])

    @functools.cached_property
    def _image(self) -> Any:
        """(image params, pixels [I, H, W, 3], has_image [I]) -> states [I, image_tokens, image_width]."""
        return jax.jit(lambda params, *picture: conditioning.encode_image({"image": params}, self.preset, *picture))

    def given_latents(self, videos: np.ndarray, masks: np.ndarray) -> jax.Array:
        """videos [B, F, H, W, 3] in [-1, 1] and pixel masks [B, F, H, W, 1] -> mask channels and masked latents."""
        return self._encode_given(self.params["vae"], videos, masks)

    def states(
        self, ids: np.ndarray, mask: np.ndarray, image: np.ndarray, has_image: np.ndarray, options: SamplingOptions
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the encoders make of prompts [M, text_len], of the options' negative prompts (a mixture a stage) and of
        pictures [I, H, W, 3]; needs the text and the image encoder, one after the other."""
        count, words = len(ids), self.words.encode(list(options.negatives.prompts))
        mixtures, _ = negatives.stages(options.negatives.table(options.grid.timesteps))
        ids, mask = np.concatenate([ids, words[0]]), np.concatenate([mask, words[1]])
        text = umt5.encode_by_layer(self.preset.text, self.params["text"], ids, mask) * mask[..., None]
        text, negative = text[:count], jnp.einsum("KM,MSD->KSD", mixtures, text[count:])
        return text, negative, self._image(self.params["image"], image, has_image)

    def sample_latents(
        self, prepared: conditioning.Prepared, given: jax.Array, noise: jax.Array, options: SamplingOptions,
        on_step: sampling.OnStep | None = None,
    ) -> jax.Array:  # fmt: skip
        """Follows the guided velocity of a batch of clips of one window, from noise [B, T, h, w, 16] to clean latents;
        all in memory and, without on_step, one compiled program."""
        batch, frames = noise.shape[:2]
        states = self.states(prepared.ids, prepared.text_mask, prepared.image, prepared.has_image, options)
        segments = audio_encoder(self.preset.dit, parent=None).segments(prepared.audio.shape[1], frames)
        window = contexts.Window(
            given=given,
            audio=prepared.audio,
            segments=np.broadcast_to(segments, (batch, *segments.shape)),
            prompts=np.arange(batch)[:, None],
            text_share=np.ones((batch, 1, frames), np.float32),
            pictures=np.arange(batch),
            audio_gain=prepared.face_mask,
        )
        velocity = self.velocity()
        parts = steps.shared(velocity, *states)
        plan, stages = steps.make_steps(options, velocity), tuple(range(parts.negatives))
        rows = steps.all_contexts(velocity, parts, window, chain=plan.chain, stages=stages)
        guided = plan.guide(velocity, rows, plan.rows(len(stages)))
        with self.on_mesh():
            return sampling.sample(guided, options.solver, options.grid, noise, on_step)

    def noise(self, seed: int, frames: int, size: tuple[int, int] | None = None) -> jax.Array:
        """Standard normal [1, T, h, w, 16], the same on every machine; size: in pixels, default the preset's.

        A latent frame's noise depends on its number alone, so a longer clip begins with that of a shorter one.
        """
        numbers = np.arange(self.preset.vae.latent_frames(frames))
        return self.noise_frames(seed, numbers, size or (self.preset.height, self.preset.width))[None]

    def noise_frames(self, seed: int, numbers: np.ndarray, size: tuple[int, int]) -> jax.Array:
        """`noise` of some latent frames by number [k]: [k, h, w, 16]."""
        return _frame_noise(jax.random.key(seed), jnp.asarray(numbers), self.frame_shape(size))

    def frame_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """[h, w, 16] of one latent frame of a picture of some height and width in pixels."""
        vae = self.preset.vae
        return size[0] // vae.spatial_factor, size[1] // vae.spatial_factor, vae.latent_channels

    def prepare(self, ready: Ready) -> tuple[conditioning.Prepared, jax.Array]:
        """The front half of one window: a batch of one, and its mask channels and masked latents [1, T, h, w, 20].

        Raises:
          ValueError: the request has several prompts, or a video, which `stream` takes.
        """
        if len(ready.prompts) > 1 or ready.video is not None:
            raise ValueError("prepare takes one prompt and pictures")
        row = conditioning.prepare(
            self.preset,
            ready.prompts[0].text,
            scaled(ready.image),
            ready.heard,
            ready.frames,
            ready.face,
            has_image=ready.task != "t2v",
            words=self.words,
            params=self.params,
        )
        video, mask = given_pixels(ready, ready.frames, last=True)
        return conditioning.stack([row]), self.given_latents(video[None], mask[None])

    def stream(
        self,
        ready: Ready,
        options: SamplingOptions | None = None,
        on_step: sampling.OnStep | None = None,
        folder: pathlib.Path | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> Iterator[np.ndarray]:
        """Yields the video as it is decoded: [1 or 4, H, W, 3] uint8 at a time.

        What cannot be made is refused at once, and the folder is claimed; the work begins with the first frame that is
        asked for.

        Args:
          options: default: those of the preset (`SamplingOptions.for_preset`).
          folder: where the latents are kept; a render that was interrupted goes on from there, if it is asked for the
            same. It stays, to be removed once the frames are safe. Default: a temporary one, which does not.
          tell: is told what was decided before the first step, a line at a time.
        Raises:
          UserError: request and options do not go together, or the folder holds something else (`store.claim`).
        """
        from emv3_jax import render

        options = options or SamplingOptions.for_preset(self.preset.name)
        negative_notes(options, self.words)  # too long: say so before the work
        return render.stream(self, ready, options, on_step, folder, tell)

    def generate(
        self, request: Request, options: SamplingOptions | None = None, on_step: sampling.OnStep | None = None
    ) -> Result:
        """Makes a video of one request and writes nothing.

        Args:
          options: default: those of the preset (`SamplingOptions.for_preset`).
        Raises:
          UserError: see `read_request`.
        """
        from emv3_jax import render

        options = options or SamplingOptions.for_preset(self.preset.name)
        notes = negative_notes(options, self.words)
        ready = render.shortened(read_request(request, self.preset, self.words), options, self.preset)
        return Result(np.concatenate(list(self.stream(ready, options, on_step))), ready.wave, (*ready.notes, *notes))


def negative_notes(options: SamplingOptions, words: Any) -> list[str]:
    """What a user should know of how a tokenizer reads the negative prompts, and whether they are used.

    Raises:
      UserError: one of them is too long.
    """
    prompts = options.negatives.prompts
    words.encode(list(prompts))
    if unused := options.unused_negatives:
        verb = "are" if len(unused) > 1 else "is"
        return [f"{', '.join(unused)} {verb} not used: text_scale is 1; give --config.sampling.text_scale=2, say"]
    return words.notes(" ".join(prompts))


@jax.jit
def _corners(params: Any) -> Any:
    """The first numbers of every array, along all of its axes."""
    return jax.tree.map(lambda leaf: leaf[(slice(4),) * leaf.ndim], params)


def _mark(params: Any) -> str:
    """SHA-256 of the first numbers of every array."""
    return hashlib.sha256(
        b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(_corners(params)))
    ).hexdigest()


@functools.partial(jax.jit, static_argnums=2)
def _frame_noise(key: jax.Array, numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), shape))(numbers)


def init_params(preset: Preset, key: jax.Array) -> dict[str, Any]:
    """Untrained parameters of all models; under jit it computes no more than what is used of them."""
    ids, side = jnp.zeros((1, preset.dit.text_len), jnp.int32), preset.image.image_size
    pixels = 2 * preset.vae.spatial_factor
    inputs: dict[str, tuple[nn.Module, tuple]] = {
        "text": (UMT5Encoder(preset.text), (ids, jnp.ones(ids.shape))),
        "image": (CLIPVision(preset.image), (jnp.zeros((1, side, side, 3)),)),
        "dit": (DiT(preset.dit), zero_inputs(preset.dit)),
        "vae": (vae_model.WanVAE(preset.vae), (jnp.zeros((1, 5, pixels, pixels, 3)),)),
    }
    if preset.speech:
        inputs["speech"] = Wav2Vec2(preset.speech), (jnp.zeros((1, sample_count(preset.speech, 1))),)
    keys = [jax.random.fold_in(key, i) for i in range(len(inputs))]
    return {
        name: model.init(one, *some)["params"] for one, (name, (model, some)) in zip(keys, inputs.items(), strict=True)
    }


def expected_params(preset: Preset) -> Any:
    """Shapes of `init_params` without computing anything."""
    return jax.eval_shape(functools.partial(init_params, preset), jax.random.key(0))


def load_pipeline(
    name: str = "demo",
    weights: str | pathlib.Path | None = None,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    preset: Preset | None = None,
    words: Any = None,
    low_memory: bool = False,
) -> Pipeline:
    """A preset with its weights.

    Args:
      name: of a preset.
      weights: a folder that `train.py` wrote, or one that `python -m convert to-jax` wrote, with the tokenizer in it;
        default: the shipped weights. What a run did not train is read from where that run read it.
      dtype: of the transformer's matmuls, "float32" or "bfloat16"; default: bfloat16 on accelerators, where it is many
        times faster, float32 on a CPU, where it is slower.
      mesh: spreads parameters and sampling over devices (`sharding.make_mesh`); default: the first device does it all.
      preset: a variant of the named preset with weights of the same shapes (`config.released`); dtype is then its own.
      words: the tokenizer, where it has been read.
      low_memory: one model at a time is in memory, and read from its files whenever it is used.
    Raises:
      UserError: no such preset, no weights for it, weights that do not fit it, or another dtype.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: one of {', '.join(sorted(PRESETS))}")
    preset, phda = as_trained(preset or with_dtype(PRESETS[name], dtype), weights)
    words = words or load_tokenizer(preset, weights)
    loaders = _loaders(preset, weights, mesh, expected_params(preset))
    params = LoadedWhenUsed(loaders) if low_memory else {role: load() for role, load in loaders.items()}
    return Pipeline(preset, params, phda, words, mesh, functools.partial(file_marks, preset, weights, tuple(loaders)))


def load_models(
    preset: Preset, weights: str | pathlib.Path | None, roles: Iterable[str], mesh: jax.sharding.Mesh | None = None
) -> Mapping[str, Any]:
    """Some models of a preset by role ("dit", "text", "image", "vae", "speech"); other arguments, and errors, as of
    `load_pipeline`. `dict` of the result reads them all; otherwise one is read whenever it is asked for."""
    return LoadedWhenUsed(_loaders(preset, weights, mesh, roles))


def _loaders(
    preset: Preset, weights: str | pathlib.Path | None, mesh: jax.sharding.Mesh | None, roles: Iterable[str]
) -> dict[str, Callable[[], Any]]:
    folder, shapes = pathlib.Path(weights or WEIGHTS / preset.name), expected_params(preset)
    return {role: functools.partial(_load_model, locate(folder, role, preset), shapes[role], mesh) for role in roles}


def with_dtype(preset: Preset, dtype: str | None = None) -> Preset:
    """The preset with the type of its transformer's matmuls; see `load_pipeline`."""
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise UserError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
    return dataclasses.replace(preset, dit=dataclasses.replace(preset.dit, dtype=dtype))


def _load_model(path: pathlib.Path, like: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """One model's parameters on the default device, or spread over a mesh."""
    shardings = None if mesh is None else param_shardings(like, mesh)
    if path.suffix == ".safetensors":
        return jax.device_put(checkpoint.load_params(path, like), shardings)
    return converted.load_converted(path, like, shardings)
