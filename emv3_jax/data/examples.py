"""What one training example holds: on disk (a record of a TFDS dataset) and in a batch.

An example is a clip seen by all frozen models: its latents, the latents of what each task is given of it, and the
features of its sound. Where the preset's text and image encoders are frozen too, their states are kept; where they are
trained (the demo), the caption and the first frame are. T2V is given nothing, so nothing is kept for it.

Axes: F frames, H W pixels, T latent frames, h w latent height and width, B batch.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emv3_jax import conditioning, tasks
from emv3_jax.config import Preset
from emv3_jax.data import extra
from emv3_jax.models.audio_tokens import audio_encoder

Example = Mapping[str, Any]
GIVEN_TASKS = ("i2v", "flf2v", "lipsync")  # those that are given pixels; others of tasks.TASKS are not trained
TRAINED_TASKS = ("t2v", *GIVEN_TASKS)
DATASET = "talking"  # the name in TFDS
NULL_TEXT = "null_text.npy"  # beside the dataset: states of the empty prompt, where the text encoder is frozen


def encoders_trained(preset: Preset) -> bool:
    """Whether text and image encoder are trained with the transformer: they are small, with words of their own."""
    return bool(preset.vocabulary)


def features(preset: Preset) -> Any:
    """The TFDS features of a preset's examples; floats are float16 but the states of text and image.

    Raises:
      UserError: TFDS is not installed.
    """
    tfds = extra.load("tensorflow_datasets")

    def tensor(*shape: int | None, dtype: Any = np.float16) -> Any:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")  # the default encoding is slow

    channels, audio = preset.dit.latent_channels, audio_encoder(preset.dit, parent=None).audio_shape(1)[1:]
    kept = {
        "id": tfds.features.Text(),
        "caption": tfds.features.Text(),
        "latents": tensor(None, None, None, channels),
        **{f"masked_{task}": tensor(None, None, None, channels) for task in GIVEN_TASKS},
        "mouth": tensor(None, None, None, preset.dit.mask_channels),  # mask channels of lip sync, 1 = given
        "face_box": tensor(4, dtype=np.float32),  # y1, y2, x1, x2 in pixels; zeros: the whole picture
        "face_mask": tensor(None, dtype=np.uint8),
        "image": tensor(None, None, 3, dtype=np.uint8),  # the first frame
        "audio": tensor(None, *audio),
        "wave": tensor(None, dtype=np.int16),  # 16 kHz, for those who watch
    }
    if not encoders_trained(preset):
        kept["text"] = tensor(None, preset.dit.text_width, dtype=np.float32)  # as long as the caption is
        kept["image_states"] = tensor(preset.dit.image_tokens, preset.dit.image_width, dtype=np.float32)
    return tfds.features.FeaturesDict(kept)


def given(example: Example, task: str, latent_frames: int) -> np.ndarray:
    """Mask channels and masked latents of a task: float32 [T, h, w, 4 + 16], the first latent frames of the clip."""
    latents = example["latents"][:latent_frames]
    if task == "t2v":
        channels = example["mouth"].shape[-1]
        return np.zeros((*latents.shape[:3], channels + latents.shape[-1]), np.float32)
    masked = example[f"masked_{task}"][:latent_frames]
    if task == "lipsync":
        mask = example["mouth"][:latent_frames]
    else:
        whole = len(example["latents"])
        mask = np.broadcast_to(_mask(task, whole)[:latent_frames], (*masked.shape[:3], example["mouth"].shape[-1]))
    return np.concatenate([mask, masked], axis=-1, dtype=np.float32)


@functools.cache
def _mask(task: str, latent_frames: int) -> np.ndarray:
    """[T, 1, 1, 4] of a task that says the same of all pixels of a frame."""
    pixels = tasks.pixel_mask(task, 4 * (latent_frames - 1) + 1, 8, 8)
    return np.asarray(tasks.mask_channels(pixels[None]))[0]


def batch(examples: Sequence[Example], names: Sequence[str], frames: int, preset: Preset) -> dict[str, Any]:
    """A training batch of the first `frames` frames of some clips, float32.

    (Cut, FLF2V loses its given last frame and is I2V; of a whole clip it is itself.)

    Args:
      examples: of one size, no shorter than `frames`.
      names: the task of each.
    Returns:
      latents [B, T, h, w, 16], given [B, T, h, w, 4 + 16], task int [B] (an index into TRAINED_TASKS), has_image [B]
      (0 for T2V), audio, face_mask, and what `conditions` needs of text and image.
    """
    length = preset.vae.latent_frames(frames)
    heard = frames if preset.dit.audio_windows is not None else 2 * frames
    stack = lambda rows: np.stack([np.asarray(row, np.float32) for row in rows])  # noqa: E731
    rows = {
        "latents": stack(e["latents"][:length] for e in examples),
        "given": np.stack([given(e, task, length) for e, task in zip(examples, names, strict=True)]),
        "task": np.array([TRAINED_TASKS.index(task) for task in names], np.int32),
        "has_image": np.array([task != "t2v" for task in names], np.float32),
        "audio": stack(e["audio"][:heard] for e in examples),
        "face_mask": stack(e["face_mask"] for e in examples),
    }
    if encoders_trained(preset):
        ids, mask = conditioning.tokenizer(preset).encode([text_of(e["caption"]) for e in examples])
        pixels = stack(e["image"] for e in examples) / 127.5 - 1.0
        return {**rows, "ids": ids, "text_mask": mask, "image": pixels}
    text = np.zeros((len(examples), preset.dit.text_len, preset.dit.text_width), np.float32)
    for row, example in zip(text, examples, strict=True):
        row[: len(example["text"])] = example["text"]
    return {**rows, "text": text, "image": stack(e["image_states"] for e in examples)}


def text_of(value: str | bytes) -> str:
    """Text, which TFDS gives back as bytes."""
    return value.decode() if isinstance(value, bytes) else value
