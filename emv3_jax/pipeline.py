"""The whole program as a function: a request goes in, frames come out."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax import checkpoint, conditioning, tasks
from emv3_jax.config import FPS, PRESETS, RATE, Preset
from emv3_jax.diffusion import flow, guidance, solvers
from emv3_jax.diffusion import sampler as sampling
from emv3_jax.diffusion.phda import PhDAConfig
from emv3_jax.errors import UserError
from emv3_jax.models import vae as vae_model
from emv3_jax.models.clip import CLIPVision
from emv3_jax.models.dit import Conditions, DiT
from emv3_jax.models.umt5 import UMT5Encoder

WEIGHTS = pathlib.Path(__file__).parent / "weights"
OnStep = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the velocity is followed.

    steps: solver steps. shift: of the time grid (SPEC 4). text_scale, audio_scale: guidance; 1 is none.
    negative_prompt: what guidance moves away from; the demo was trained with the empty one.
    """

    steps: int = 12
    shift: float = 3.0
    text_scale: float = 1.0
    audio_scale: float = 2.0
    negative_prompt: str = ""

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")
        for name in ("text_scale", "audio_scale"):
            if not np.isfinite(getattr(self, name)) or getattr(self, name) < 0:
                raise UserError(f"{name} must be a number of 0 or more, got {getattr(self, name)}")
        if not np.isfinite(self.shift) or self.shift <= 0:
            raise UserError(f"shift must be a number above 0, got {self.shift}")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    image: [H, W, 3] uint8, or a path. audio: [n] at 16 kHz, or a path. prompt: not empty.
    frames: 4k + 1; None: as many as the audio lasts, at most the preset's. face: (y1, y2, x1, x2) in pixels of the
    image, where the voice may act; None: everywhere. Noise follows from the seed.
    """

    image: Any
    audio: Any
    prompt: str
    frames: int | None = None
    seed: int = 0
    face: tuple[float, float, float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Ready:
    """A request that was read and checked: arrays of the preset's sizes, and what was done to make them fit."""

    image: np.ndarray  # [H, W, 3] uint8
    wave: np.ndarray  # [n] at 16 kHz, as long as the video
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


def read_request(request: Request, preset: Preset) -> Ready:
    """Reads the files of a request and fits them to a preset; needs no model.

    Raises:
      UserError: an empty prompt, too many words, or a file that cannot be used.
    """
    from emv3_jax import media

    notes: list[str] = []
    if not request.prompt.strip():
        raise UserError('the prompt is empty: say what the puppet does, e.g. "A puppet nods and smiles."')
    tokenizer = conditioning.tokenizer(preset)
    tokenizer.encode([request.prompt])
    if unknown := tokenizer.unknown(request.prompt):
        notes.append(f"the demo does not know the words {', '.join(unknown)}; it knows {', '.join(tokenizer.words)}")
    if isinstance(request.image, str | os.PathLike):
        image, more = media.load_image(request.image)
        notes += more
    else:
        image = np.asarray(request.image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"image must be a path or uint8 [H, W, 3], got {image.dtype} {image.shape}")
    box, (height, width) = request.face, image.shape[:2]
    image, note = media.fit_image(image, preset.height, preset.width)
    notes += [note] if note else []
    if box is not None:
        box = fit_box(box, height, width, preset.height, preset.width)
    if isinstance(request.audio, str | os.PathLike):
        wave, more = media.load_audio(request.audio, RATE, (request.frames or preset.max_frames) / FPS)
        notes += more
    else:
        wave = np.asarray(request.audio)
        if wave.dtype.kind != "f" or wave.ndim != 1 or not wave.size or not np.isfinite(wave).all():
            raise UserError(f"audio must be a path or finite floats [n] at 16 kHz, got {wave.dtype} {wave.shape}")
    frames = request.frames or frames_for(len(wave) / RATE, preset.max_frames)
    if frames % 4 != 1 or not 5 <= frames <= preset.max_frames:
        raise UserError(f"frames must be 4k + 1 between 5 and {preset.max_frames}, got {frames}")
    samples = round(frames / FPS * RATE)
    if len(wave) > samples:
        notes.append(
            f"the sound lasts {len(wave) / RATE:.2f} s; the video ends after {frames / FPS:.2f} s ({frames} frames)"
        )
    elif len(wave) < samples:
        notes.append(f"the sound lasts {len(wave) / RATE:.2f} s; silence was added up to {frames / FPS:.2f} s")
    wave = np.pad(wave[:samples], (0, max(0, samples - len(wave)))).astype(np.float32)
    return Ready(image, wave, request.prompt, frames, request.seed, box, tuple(notes))


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
      params: {"dit", "text", "image", "vae"} parameter trees.
      phda: how much text, image and audio count at a timestep.
    """

    def __init__(self, preset: Preset, params: Any, phda: PhDAConfig | None = None):
        self.preset, self.params = preset, params
        self.vae = vae_model.WanVAE(preset.vae)
        self._velocity = guidance.ModelVelocity(params["dit"], DiT(preset.dit), phda or PhDAConfig())

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
        negative = conditioning.tokenizer(self.preset).encode([options.negative_prompt])
        encoders = {name: self.params[name] for name in ("text", "image")}
        chain = guidance.branches(options.text_scale, options.audio_scale)
        contexts = self._contexts(self._velocity, encoders, prepared, given, negative, chain=chain)
        velocity = guidance.guide(self._velocity, contexts, options.text_scale, options.audio_scale)
        grid = flow.flow_grid(options.steps, options.shift)
        return sampling.sample(velocity, solvers.euler(grid), grid, noise, on_step)

    def noise(self, seed: int, frames: int) -> jax.Array:
        """[1, T, h, w, 16] standard normal, the same for a seed on every machine."""
        vae = self.preset.vae
        shape = (1, (frames - 1) // vae.temporal_factor + 1, self.preset.height // vae.spatial_factor,
                 self.preset.width // vae.spatial_factor, vae.latent_channels)  # fmt: skip
        return jax.random.normal(jax.random.key(seed), shape)

    def stream(
        self, ready: Ready, options: SamplingOptions | None = None, on_step: OnStep | None = None
    ) -> Iterator[np.ndarray]:
        """Yields the video as it is decoded: [1 or 4, H, W, 3] uint8 at a time."""
        options, height, width = options or SamplingOptions(), self.preset.height, self.preset.width
        conditioning.tokenizer(self.preset).encode([options.negative_prompt])  # too long: say so before the work
        image = ready.image.astype(np.float32) / 127.5 - 1.0
        row = conditioning.prepare(self.preset, ready.prompt, image, ready.wave, ready.frames, ready.face)
        prepared = conditioning.stack([row])
        video = np.broadcast_to(image, (1, ready.frames, *image.shape))
        given = self.given_latents(video, tasks.pixel_mask("i2v", ready.frames, height, width)[None])
        latents = self.sample_latents(prepared, given, self.noise(ready.seed, ready.frames), options, on_step)
        for piece in vae_model.decode_stream(self.vae, self.params["vae"], latents):
            yield np.asarray(jnp.round((piece[0] + 1.0) * 127.5), np.uint8)

    def generate(
        self, request: Request, options: SamplingOptions | None = None, on_step: OnStep | None = None
    ) -> Result:
        """Makes a video of one request and writes nothing.

        Raises:
          UserError: see `read_request`.
        """
        ready = read_request(request, self.preset)
        return Result(np.concatenate(list(self.stream(ready, options, on_step))), ready.wave, ready.notes)


def init_params(preset: Preset, key: jax.Array) -> dict[str, Any]:
    """Untrained {"dit", "text", "image", "vae"}; under jit it computes no more than what is used of them."""
    dit, vae = preset.dit, preset.vae
    h, w, frames = preset.height // vae.spatial_factor, preset.width // vae.spatial_factor, 2
    ids = jnp.zeros((1, dit.text_len), jnp.int32)
    size = preset.image.image_size
    x = jnp.zeros((1, frames, h, w, dit.latent_channels))
    cond = Conditions(
        given=jnp.zeros((1, frames, h, w, dit.mask_channels + dit.latent_channels)),
        text=jnp.zeros((1, dit.text_len, dit.text_width)),
        image=jnp.zeros((1, dit.image_tokens, dit.image_width)),
        audio=jnp.zeros((1, 10, dit.audio_width)),
        face_mask=jnp.zeros((1, h * w // 4)),
        audio_scale=jnp.ones((1,)),
    )
    keys = [jax.random.fold_in(key, i) for i in range(4)]
    return {
        "text": UMT5Encoder(preset.text).init(keys[0], ids, jnp.ones(ids.shape))["params"],
        "image": CLIPVision(preset.image).init(keys[1], jnp.zeros((1, size, size, 3)))["params"],
        "dit": DiT(dit).init(keys[2], x, jnp.zeros((1,)), cond)["params"],
        "vae": vae_model.WanVAE(vae).init(keys[3], jnp.zeros((1, 5, preset.height, preset.width, 3)))["params"],
    }


def expected_params(preset: Preset) -> Any:
    """Shapes of {"dit", "text", "image", "vae"} without computing anything."""
    return jax.eval_shape(functools.partial(init_params, preset), jax.random.key(0))


def load_pipeline(name: str = "demo", weights: str | pathlib.Path | None = None) -> Pipeline:
    """A preset with its weights: the shipped ones, or those of a folder that `train.py` wrote.

    Raises:
      UserError: no such preset, or weights that do not fit it.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: one of {', '.join(sorted(PRESETS))}")
    preset = PRESETS[name]
    params = checkpoint.load_models(pathlib.Path(weights or WEIGHTS / name), expected_params(preset))
    return Pipeline(preset, jax.tree.map(jnp.asarray, params))
