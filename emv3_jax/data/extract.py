"""Clips as the frozen models see them: pixels, sound and words in, training examples out."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax import conditioning, tasks
from emv3_jax.config import RATE, Preset, VAEConfig
from emv3_jax.data.examples import GIVEN_TASKS, encoders_trained
from emv3_jax.models import umt5
from emv3_jax.models import vae as vae_model

VAE_ENCODER = ("encoder", "to_moments")  # latents depend on these alone


@dataclasses.dataclass(frozen=True)
class RawClip:
    """A talking clip before any model has seen it."""

    id: str
    caption: str
    video: np.ndarray  # [F, H, W, 3] uint8, 25 frames a second, F = 4k + 1, sides multiples of 16
    wave: np.ndarray  # [n] at 16 kHz, as long as the video
    face: tuple[float, float, float, float] | None  # (y1, y2, x1, x2) in pixels; None: the voice acts everywhere
    mouth: np.ndarray  # [H, W] or [F, H, W], 1 = what lip sync generates


class Extractor:
    """The frozen models of a preset.

    Args:
      params: "vae", and what else is frozen: "speech" where the preset has a speech encoder, "text" and "image" where
        these are not trained. A mapping may load a tree whenever it is asked for (`weight_files.LoadedWhenUsed`).
      words: the tokenizer; default: the preset's own.
    """

    def __init__(self, preset: Preset, params: Mapping[str, Any], words: Any = None):
        self.preset, self.params = preset, params
        self.words = words or conditioning.tokenizer(preset)

    def example(self, clip: RawClip) -> dict[str, Any]:
        """What `examples.features` names of a clip."""
        frames, height, width, _ = clip.video.shape
        masks = np.stack([tasks.pixel_mask(task, frames, height, width, clip.mouth) for task in GIVEN_TASKS])
        latents, masked = _encode(self.preset.vae, self.params["vae"], clip.video, masks)
        half = lambda x: np.asarray(x, np.float16)  # noqa: E731
        mouth = _mask_channels(masks[GIVEN_TASKS.index("lipsync")][None])[0]
        face = clip.face if self.preset.dit.audio_windows is None else None  # flash takes none (conditioning.prepare)
        tokens = conditioning.face_tokens(face, height, width, self.preset.face_floored)
        example = {
            "id": clip.id,
            "caption": clip.caption,
            "latents": half(latents),
            **{f"masked_{task}": half(m) for task, m in zip(GIVEN_TASKS, masked, strict=True)},
            "mouth": half(mouth),
            "face_box": np.asarray(clip.face or (0.0,) * 4, np.float32),
            "face_mask": tokens.astype(np.uint8),
            "image": clip.video[0],
            "audio": half(conditioning.audio_features(self.preset, clip.wave, frames, self.params)),
            "wave": np.round(np.clip(clip.wave[: frames * RATE // 25], -1, 1) * 32767).astype(np.int16),
        }
        if not encoders_trained(self.preset):
            example["text"] = self.text(clip.caption)
            pixels = clip.video[:1].astype(np.float32) / 127.5 - 1.0
            example["image_states"] = np.asarray(_image_states(self.preset, self.params["image"], pixels))[0]
        return example

    def text(self, caption: str) -> np.ndarray:
        """States of a caption [words, text_width], float32."""
        ids, mask = self.words.encode([caption])
        states = umt5.encode_by_layer(self.preset.text, self.params["text"], ids, mask)
        return np.asarray(states[0, : int(mask.sum())], np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _encode(cfg: VAEConfig, params: Any, video: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """video [F, H, W, 3] uint8, masks [M, F, H, W, 1] -> latents of the video and of what each mask leaves."""
    video = video.astype(jnp.float32) / 127.5 - 1.0
    seen = jnp.concatenate([video[None], tasks.masked_video(video[None], masks)])
    latents = vae_model.encode_chunked(vae_model.WanVAE(cfg), params, seen)[0]
    return latents[0], latents[1:]


@functools.partial(jax.jit, static_argnums=0)
def _image_states(preset: Preset, params: Any, pixels: jax.Array) -> jax.Array:
    """pixels [1, H, W, 3] -> [1, image_tokens, image_width]."""
    return conditioning.encode_image({"image": params}, preset, pixels, jnp.ones(1))


_mask_channels = jax.jit(tasks.mask_channels)


def encoder_hash(vae_params: Any) -> str:
    """Of the part of a VAE that latents depend on, as float16, in which weights are shipped."""
    leaves = jax.tree.leaves({name: vae_params[name] for name in VAE_ENCODER})
    return hashlib.sha256(b"".join(np.asarray(leaf, np.float16).tobytes() for leaf in leaves)).hexdigest()[:16]
