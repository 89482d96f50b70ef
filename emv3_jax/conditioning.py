"""From what a user gives to what the velocity is conditioned on: request -> Conditions (SPEC section 3).

`prepare` is the host's part (pixels, audio features, token ids: plain arrays); `encode` is the models'
part (umT5, CLIP; pure JAX, so that training can differentiate through it). The VAE's part, latents of the masked video,
lies between the two, because training computes it beforehand and sampling computes it chunk by chunk.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from emv3_jax import audio_preprocessing
from emv3_jax.config import Preset
from emv3_jax.errors import UserError
from emv3_jax.files import PathLike
from emv3_jax.models import clip as clip_model
from emv3_jax.models.clip import CLIPVision
from emv3_jax.models.dit import Conditions
from emv3_jax.models.log_mel import log_mel_features, normalise
from emv3_jax.models.umt5 import UMT5Encoder
from emv3_jax.tokenizers import UMT5Tokenizer, WordTokenizer

Params = Any


@struct.dataclass
class Prepared:
    """One batch of requests as arrays, before any model has seen them."""

    ids: jax.Array  # [B, text_len] token ids
    text_mask: jax.Array  # [B, text_len] 1 at words
    image: jax.Array  # [B, H, W, 3] in [-1, 1], the reference picture; zeros without one
    has_image: jax.Array  # [B] 1 where there is a picture
    audio: jax.Array  # features as the DiT takes them (Conditions.audio); zeros are silence
    face_mask: jax.Array  # [B, (h/2)·(w/2)] in {0, 1}


def tokenizer(preset: Preset, folder: PathLike | None = None) -> WordTokenizer | UMT5Tokenizer:
    """The tokenizer of a preset; `folder` holds the one of umT5, where the preset has no vocabulary of its own.

    Raises:
      UserError: no tokenizer there.
    """
    if preset.vocabulary:
        return WordTokenizer(preset.vocabulary, preset.dit.text_len)
    if folder is None:
        raise UserError(f"the preset {preset.name} needs a tokenizer: give the folder of converted weights")
    return UMT5Tokenizer(folder, preset.dit.text_len)


def _log_mel(preset: Preset, params: Params, wave: np.ndarray, frames: int) -> np.ndarray:
    return log_mel_features(normalise(wave), frames)


def _wav2vec2(preset: Preset, params: Params, wave: np.ndarray, frames: int) -> np.ndarray:
    assert preset.speech
    return audio_preprocessing.preview_features(preset.speech, params["speech"], wave, frames, preset.fill_silence)


def _wav2vec2_windows(preset: Preset, params: Params, wave: np.ndarray, frames: int) -> np.ndarray:
    assert preset.speech and preset.dit.audio_windows
    neighbours = preset.dit.audio_windows.neighbours
    return audio_preprocessing.flash_windows(preset.speech, params["speech"], wave, frames, neighbours)[0]


# (preset, params, wave [n], frames) -> features as the DiT takes them, without a batch axis.
AUDIO_ENCODERS: dict[str, Callable[[Preset, Params, np.ndarray, int], np.ndarray]] = {
    "log_mel": _log_mel,
    "wav2vec2": _wav2vec2,
    "wav2vec2_windows": _wav2vec2_windows,
}


def audio_features(preset: Preset, wave: np.ndarray, frames: int, params: Params = None) -> np.ndarray:
    """What the DiT of a preset hears of a recording (SPEC section 3, Audio).

    Args:
      wave: [n] at 16 kHz, any level.
      frames: of the video.
      params: holds "speech", where the preset has a speech encoder.
    Returns:
      demo, preview [2·frames, audio_width], preview without `fill_silence` at most so many; flash [frames, 5, layers,
      audio_width], a view that repeats no memory.
    """
    return AUDIO_ENCODERS[preset.audio](preset, params, wave, frames)


def audio_notes(preset: Preset, wave: np.ndarray) -> list[str]:
    """What a user should know of how a recording is heard."""
    return audio_preprocessing.normalise_loudness(wave)[1] if preset.audio == "wav2vec2_windows" else []


def face_tokens(
    box: tuple[float, float, float, float] | None, height: int, width: int, floored: bool = False
) -> np.ndarray:
    """Which spatial tokens the audio may act on.

    Args:
      box: (y1, y2, x1, x2) in pixels of a height x width picture; None: everywhere.
      height, width: of the picture, multiples of 16.
    Returns:
      [(height/16)·(width/16)] in {0, 1}: every token that the box touches. floored: as the released program, which
      floors both ends and so loses the lowest and rightmost tokens that a box reaches into.
    """
    mask = np.zeros((height // 16, width // 16), np.float32)
    if box is None:
        mask[:] = 1.0
    else:
        (top, left), (bottom, right) = (
            [math.floor(box[k] / 16) for k in (0, 2)],
            [(math.floor if floored else math.ceil)(box[k] / 16) for k in (1, 3)],
        )
        mask[max(top, 0) : bottom, max(left, 0) : right] = 1.0
    return mask.reshape(-1)


def prepare(
    preset: Preset,
    prompt: str,
    picture: np.ndarray,
    wave: np.ndarray,
    frames: int,
    face: tuple[float, float, float, float] | None = None,
    has_image: bool = True,
    words: WordTokenizer | UMT5Tokenizer | None = None,
    params: Params = None,
) -> Prepared:
    """The arrays of one request, without a batch axis.

    Args:
      preset: sizes.
      prompt: any text that the tokenizer takes.
      picture: [H, W, 3] in [-1, 1], the reference.
      wave: [n] at 16 kHz, any level.
      frames: of the video, 4k + 1.
      face: (y1, y2, x1, x2) in pixels, where the voice may act; None: everywhere. The flash model takes none.
      has_image: False for text-to-video.
      words: the tokenizer; default: the preset's own.
      params: holds "speech", where the preset has a speech encoder.
    Raises:
      UserError: the prompt is too long.
    """
    ids, mask = (words or tokenizer(preset)).encode([prompt])
    masked = preset.dit.audio_windows is None
    return Prepared(
        ids=ids[0],
        text_mask=mask[0],
        image=np.asarray(picture, np.float32),
        has_image=np.float32(has_image),
        audio=audio_features(preset, wave, frames, params),
        face_mask=face_tokens(face if masked else None, picture.shape[0], picture.shape[1], preset.face_floored),
    )


def stack(rows: Sequence[Prepared]) -> Prepared:
    """One Prepared with a batch axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def encode_text(params: Params, preset: Preset, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """ids, mask [B, text_len] -> states [B, text_len, text_width], zeros after the prompt's real length."""
    states = UMT5Encoder(preset.text).apply({"params": params["text"]}, ids, mask)
    return states * mask[..., None]


def encode_image(params: Params, preset: Preset, image: jax.Array, has_image: jax.Array) -> jax.Array:
    """Pictures [B, H, W, 3] in [-1, 1] -> states [B, image_tokens, image_width], zeros where has_image [B] is 0."""
    pixels = clip_model.preprocess(image, preset.image.image_size)
    states = CLIPVision(preset.image).apply({"params": params["image"]}, pixels)
    return jnp.asarray(states) * has_image[:, None, None]


def encode(params: Params, preset: Preset, prepared: Prepared, given: jax.Array) -> Conditions:
    """Runs the text and the image encoder.

    Args:
      params: holds "text" and "image".
      prepared: a batch.
      given: [B, T, h, w, 4 + 16] mask channels, then masked latents.
    """
    batch = prepared.ids.shape[0]
    return Conditions(
        given=given,
        text=encode_text(params, preset, prepared.ids, prepared.text_mask),
        image=encode_image(params, preset, prepared.image, prepared.has_image),
        audio=prepared.audio,
        face_mask=prepared.face_mask,
        audio_scale=jnp.ones((batch,)),
    )
