"""The whole program as a function: a request goes in, frames come out."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from emv3_jax import checkpoint, conditioning, converted, tasks
from emv3_jax.config import FPS, PRESETS, RATE, Preset
from emv3_jax.diffusion import guidance, solvers
from emv3_jax.diffusion import sampler as sampling
from emv3_jax.diffusion.phda import PhDAConfig
from emv3_jax.errors import UserError
from emv3_jax.models import vae as vae_model
from emv3_jax.models.clip import CLIPVision
from emv3_jax.models.dit import DiT, zero_inputs
from emv3_jax.models.umt5 import UMT5Encoder
from emv3_jax.models.wav2vec2 import Wav2Vec2, sample_count
from emv3_jax.sharding import param_shardings

WEIGHTS = pathlib.Path(__file__).parent / "weights"
TOKENIZER = "tokenizer"
# Where converted weights of each model lie in their folder; "dit" depends on the preset.
CONVERTED = {"dit": "dit-{}", "text": "umt5", "image": "clip", "vae": "vae", "speech": "wav2vec2"}
DTYPES = ("float32", "bfloat16")
OnStep = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the velocity is followed.

    sampler: a key of solvers.SAMPLERS. steps: of the solver. shift: of the time grid (SPEC 4). text_scale, audio_scale:
    guidance; 1 is none. text_dynamic, audio_dynamic: that scale falls to its half on the way (dynamic CFG, SPEC 4).
    negative_prompt: what guidance moves away from; the demo was trained with the empty one.
    """

    sampler: str = "flow"
    steps: int = 12
    shift: float = 3.0
    text_scale: float = 1.0
    audio_scale: float = 2.0
    text_dynamic: bool = False
    audio_dynamic: bool = False
    negative_prompt: str = ""

    def __post_init__(self):
        solvers.sampler_named(self.sampler)
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")
        for name in ("text_scale", "audio_scale"):
            if not np.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise UserError(f"{name} must be a number of 0 or more, got {getattr(self, name)}")
        if not np.isfinite(self.shift) or self.shift <= 0:
            raise UserError(f"shift must be a number above 0, got {self.shift}")

    @property
    def scales(self) -> tuple[guidance.Scale, guidance.Scale]:
        """Of text and audio: numbers, or tables with one number a step."""
        pairs = (self.text_scale, self.text_dynamic), (self.audio_scale, self.audio_dynamic)
        text, audio = (guidance.dynamic_scale(scale, self.steps) if falls else scale for scale, falls in pairs)
        return text, audio


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    image: [H, W, 3] uint8, or a path. audio: [n] at 16 kHz, or a path. prompt: not empty.
    frames: 4k + 1; None: as many as the audio lasts, at most the preset's. face: where the voice may act, as
    (y1, y2, x1, x2) in pixels of the image, or a path to a .npy file (`media.load_face_box`); None: everywhere. Noise
    follows from the seed.
    """

    image: Any
    audio: Any
    prompt: str
    frames: int | None = None
    seed: int = 0
    face: tuple[float, float, float, float] | str | os.PathLike | None = None


@dataclasses.dataclass(frozen=True)
class Ready:
    """A request that was read and checked: arrays of the preset's sizes, and what was done to make them fit."""

    image: np.ndarray  # [H, W, 3] uint8
    wave: np.ndarray  # [n] at 16 kHz, as long as the video
    heard: np.ndarray  # [n] at 16 kHz, what the audio encoder is given: for a speech encoder the whole recording
    prompt: str
    frames: int
    seed: int
    face: tuple[float, float, float, float] | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """frames [F, H, W, 3] uint8 at 25 per second; wave [n] at 16 kHz; notes: what was cut or resized."""

    frames: np.ndarray
    wave: np.ndarray
    notes: tuple[str, ...]


def frames_for(seconds: float, limit: int) -> int:
    """The largest 4k + 1 frames that the sound fills, at least 5 and at most `limit`."""
    whole = int(seconds * FPS + 1e-6)  # 1.16 s are 29 frames, though 1.16 * 25 comes out below 29
    return int(np.clip((whole - 1) // 4 * 4 + 1, 5, limit))


def fitted_size(height: int, width: int, preset: Preset) -> tuple[int, int]:
    """Height and width of a preset's video of a height x width picture (SPEC section 3, output size).

    Either the preset's own, or the picture's proportions in at most the preset's area, both sides floored to multiples
    of 16.
    """
    if not preset.keep_proportions:
        return preset.height, preset.width
    area = min(preset.height * preset.width, height * width)
    # The largest multiple of 16 whose square is at most area·h/w, in whole numbers: nothing is lost to rounding.
    fitted_height, fitted_width = (
        16 * math.isqrt(area * a // (256 * b)) for a, b in ((height, width), (width, height))
    )  # fmt: skip
    return max(16, fitted_height), max(16, fitted_width)


def read_request(request: Request, preset: Preset, words: Any = None) -> Ready:
    """Reads the files of a request and fits them to a preset; needs no model.

    Args:
      words: the tokenizer (`load_tokenizer`); default: the preset's own, where it has a vocabulary.
    Raises:
      UserError: an empty prompt, too many words, or a file that cannot be used.
    """
    from emv3_jax import media

    notes: list[str] = []
    if not request.prompt.strip():
        raise UserError('the prompt is empty: say what is to be seen, e.g. "A puppet nods and smiles."')
    words = words or conditioning.tokenizer(preset)
    words.encode([request.prompt])
    notes += words.notes(request.prompt)
    if isinstance(request.image, str | os.PathLike):
        image, more = media.load_image(request.image)
        notes += more
    else:
        image = media.check_image(request.image)
    box, (height, width) = request.face, image.shape[:2]
    if isinstance(box, str | os.PathLike):
        box = media.load_face_box(box, height, width)
    image, note = media.fit_image(image, *fitted_size(height, width, preset))
    notes += [note] if note else []
    if box is not None and preset.dit.audio_windows is not None:
        notes.append(f"the face box is not used: the {preset.name} model has no face mask")
        box = None
    if box is not None:
        box = fit_box(box, height, width, *image.shape[:2])
    if isinstance(request.audio, str | os.PathLike):
        limit = None if preset.speech else (request.frames or preset.max_frames) / FPS
        wave, more = media.load_audio(request.audio, RATE, limit)
        notes += more
    else:
        wave, more = media.check_wave(request.audio)
        notes += more
    frames = request.frames or frames_for(len(wave) / RATE, preset.max_frames)
    if frames % 4 != 1 or not 5 <= frames <= preset.max_frames:
        raise UserError(f"frames must be 4k + 1 between 5 and {preset.max_frames}, got {frames}")
    notes += conditioning.audio_notes(preset, wave)
    samples = round(frames / FPS * RATE)
    if len(wave) > samples:
        notes.append(
            f"the sound lasts {len(wave) / RATE:.2f} s; the video ends after {frames / FPS:.2f} s ({frames} frames)"
        )
    elif len(wave) < samples:
        notes.append(f"the sound lasts {len(wave) / RATE:.2f} s; silence was added up to {frames / FPS:.2f} s")
    whole, wave = wave, np.pad(wave[:samples], (0, max(0, samples - len(wave)))).astype(np.float32)
    return Ready(image, wave, whole if preset.speech else wave, request.prompt, frames, request.seed, box, tuple(notes))


def fit_box(box: tuple[float, float, float, float], height: int, width: int, to_height: int, to_width: int):
    """A box (y1, y2, x1, x2) of a height x width image, after `media.fit_image` to another size.

    Raises:
      UserError: the box is empty, or lies outside the image or in what is cut off.
    """
    y1, y2, x1, x2 = box
    if not (0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width):
        raise UserError(f"the face box {box} (y1, y2, x1, x2) is empty or outside the {height} x {width} image")
    scale = max(to_height / height, to_width / width)
    top, left = (height * scale - to_height) / 2, (width * scale - to_width) / 2
    y1, y2 = (float(np.clip(y * scale - top, 0, to_height - 1)) for y in (y1, y2))
    x1, x2 = (float(np.clip(x * scale - left, 0, to_width - 1)) for x in (x1, x2))
    if y1 == y2 or x1 == x2:
        raise UserError(f"the face box {box} lies in the part of the {height} x {width} image that is cut off")
    return y1, y2, x1, x2


class Pipeline:
    """Models of a preset with their weights.

    Args:
      preset: sizes.
      params: {"dit", "text", "image", "vae"} parameter trees, and "speech" where the preset has a speech encoder.
      phda: how much text, image and audio count at a timestep; default: the paper's phases for presets trained with
        them, all equally for the others.
      words: the tokenizer; default: the preset's own.
    """

    def __init__(self, preset: Preset, params: Any, phda: PhDAConfig | None = None, words: Any = None):
        self.preset, self.params = preset, params
        self.words = words or conditioning.tokenizer(preset)
        self.vae = vae_model.WanVAE(preset.vae)
        weights = phda or (PhDAConfig() if preset.phda else None)
        self._velocity = guidance.ModelVelocity(params["dit"], DiT(preset.dit), weights)

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
    def _contexts(self) -> Any:
        """(velocity, encoder params, prepared, given, negative ids and mask, branches) -> contexts of the branches."""

        def build(
            velocity: Any, params: Any, prepared: conditioning.Prepared, given: jax.Array,
            negative: tuple[jax.Array, jax.Array], chain: tuple[guidance.Branch, ...],
        ) -> Any:  # fmt: skip
            cond = conditioning.encode(params, self.preset, prepared, given)
            text = jnp.broadcast_to(conditioning.encode_text(params, self.preset, *negative), cond.text.shape)
            silence = jnp.zeros_like(cond.audio)
            rows = [
                dataclasses.replace(
                    cond, text=cond.text if one.prompt else text, audio=cond.audio if one.audio else silence
                )
                for one in chain
            ]
            return velocity.contexts(guidance.stack_branches(rows))

        return jax.jit(build, static_argnames="chain")

    def given_latents(self, videos: np.ndarray, masks: np.ndarray) -> jax.Array:
        """videos [B, F, H, W, 3] in [-1, 1] and pixel masks [B, F, H, W, 1] -> mask channels and masked latents."""
        return self._encode_given(self.params["vae"], videos, masks)

    def sample_latents(
        self, prepared: conditioning.Prepared, given: jax.Array, noise: jax.Array, options: SamplingOptions,
        on_step: OnStep | None = None,
    ) -> jax.Array:  # fmt: skip
        """Follows the guided velocity from noise [B, T, h, w, 16] to clean latents."""
        negative = self.words.encode([options.negative_prompt])
        encoders = {name: self.params[name] for name in ("text", "image")}
        chain = guidance.branches(*options.scales)
        contexts = self._contexts(self._velocity, encoders, prepared, given, negative, chain=chain)
        velocity = guidance.guide(self._velocity, contexts, *options.scales)
        sampler = solvers.sampler_named(options.sampler)
        grid = sampler.grid(options.steps, options.shift)
        return sampling.sample(velocity, sampler.solver(grid), grid, noise, on_step)

    def noise(self, seed: int, frames: int, size: tuple[int, int] | None = None) -> jax.Array:
        """Standard normal [1, T, h, w, 16], the same on every machine; size: in pixels, default the preset's."""
        vae = self.preset.vae
        height, width = size or (self.preset.height, self.preset.width)
        shape = (1, (frames - 1) // vae.temporal_factor + 1, height // vae.spatial_factor,
                 width // vae.spatial_factor, vae.latent_channels)  # fmt: skip
        return jax.random.normal(jax.random.key(seed), shape)

    def prepare(self, ready: Ready) -> tuple[conditioning.Prepared, jax.Array]:
        """The front half: a batch of one, and its mask channels and masked latents [1, T, h, w, 4 + 16]."""
        image = ready.image.astype(np.float32) / 127.5 - 1.0
        row = conditioning.prepare(
            self.preset,
            ready.prompt,
            image,
            ready.heard,
            ready.frames,
            ready.face,
            words=self.words,
            params=self.params,
        )
        video = np.broadcast_to(image, (1, ready.frames, *image.shape))
        mask = tasks.pixel_mask("i2v", ready.frames, *image.shape[:2])
        return conditioning.stack([row]), self.given_latents(video, mask[None])

    def stream(
        self, ready: Ready, options: SamplingOptions | None = None, on_step: OnStep | None = None
    ) -> Iterator[np.ndarray]:
        """Yields the video as it is decoded: [1 or 4, H, W, 3] uint8 at a time."""
        from emv3_jax import media

        options = options or SamplingOptions()
        self.words.encode([options.negative_prompt])  # too long: say so before the work
        prepared, given = self.prepare(ready)
        noise = self.noise(ready.seed, ready.frames, ready.image.shape[:2])
        latents = self.sample_latents(prepared, given, noise, options, on_step)
        for piece in vae_model.decode_stream(self.vae, self.params["vae"], latents):
            yield media.to_uint8(np.asarray(piece[0]))

    def generate(
        self, request: Request, options: SamplingOptions | None = None, on_step: OnStep | None = None
    ) -> Result:
        """Makes a video of one request and writes nothing.

        Raises:
          UserError: see `read_request`.
        """
        ready = read_request(request, self.preset, self.words)
        return Result(np.concatenate(list(self.stream(ready, options, on_step))), ready.wave, ready.notes)


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
) -> Pipeline:
    """A preset with its weights.

    Args:
      name: of a preset.
      weights: a folder that `train.py` wrote, or one that `python -m convert to-jax` wrote, with the tokenizer in it;
        default: the shipped weights.
      dtype: of the transformer's matmuls, "float32" or "bfloat16"; default: bfloat16 on accelerators, where it is many
        times faster, float32 on a CPU, where it is slower.
      mesh: spreads the parameters over devices by the rules of `sharding`; default: the first device holds them all.
    Raises:
      UserError: no such preset, no weights for it, weights that do not fit it, or another dtype.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: one of {', '.join(sorted(PRESETS))}")
    preset, folder = with_dtype(PRESETS[name], dtype), pathlib.Path(weights or WEIGHTS / name)
    words = load_tokenizer(name, weights)
    params = {
        role: _load_model(locate(folder, role, name), like, mesh) for role, like in expected_params(preset).items()
    }
    return Pipeline(preset, params, words=words)


def with_dtype(preset: Preset, dtype: str | None = None) -> Preset:
    """The preset with the type of its transformer's matmuls; see `load_pipeline`."""
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise UserError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
    return dataclasses.replace(preset, dit=dataclasses.replace(preset.dit, dtype=dtype))


def load_tokenizer(name: str, weights: str | pathlib.Path | None = None) -> Any:
    """The tokenizer of a preset, which reads prompts before any weights are read; arguments as of `load_pipeline`.

    Raises:
      UserError: no weights there, or no tokenizer with them.
    """
    preset, folder = PRESETS[name], pathlib.Path(weights or WEIGHTS / name)
    if not folder.is_dir():
        raise UserError(
            f"no weights at {folder}: convert the released ones (python -m convert to-jax), or name a folder"
        )
    return conditioning.tokenizer(preset, folder / TOKENIZER)


def locate(folder: pathlib.Path, role: str, preset: str) -> pathlib.Path:
    """Where a model's weights lie in a folder: in a file of our own training, or else in a folder of converted ones."""
    trained, made = folder / f"{role}.safetensors", folder / CONVERTED[role].format(preset)
    return trained if trained.is_file() or (PRESETS[preset].vocabulary and not made.exists()) else made


def _load_model(path: pathlib.Path, like: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """One model's parameters on the default device, or spread over a mesh."""
    shardings = None if mesh is None else param_shardings(like, mesh)
    if path.suffix == ".safetensors":
        return jax.device_put(checkpoint.load_params(path, like), shardings)
    return converted.load_converted(path, like, shardings)
