"""Generates held-out clips with a pipeline and scores them beside their controls."""

import dataclasses

import jax
import numpy as np

from emv3_jax import conditioning
from emv3_jax.data import puppet_latents
from emv3_jax.models import vae as vae_model
from emv3_jax.pipeline import Pipeline, SamplingOptions
from emv3_jax.puppets import clips, metrics
from emv3_jax.training import pictures

BATCH = 8


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every measure over the clips that have it, but the median of the offset."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: float((np.median if name == "offset" else np.mean)(some)) for name, some in values.items()}


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of clips, one row each, and the videos of the first few: (true, generated) pairs [F, H, W, 3]."""

    rows: list[dict[str, float]]
    videos: list[tuple[np.ndarray, np.ndarray]]

    def strip(self, count: int) -> np.ndarray:
        """Film strips of the first `count` pairs, true above generated: [h, w, 3] uint8."""
        return pictures.film_strip([video for pair in self.videos[:count] for video in pair])


def _decode(pipeline: Pipeline, latents: jax.Array) -> np.ndarray:
    pieces = vae_model.decode_stream(pipeline.vae, pipeline.params["vae"], latents)
    return np.concatenate([np.asarray(piece) for piece in pieces], axis=1)


def generate_batch(
    pipeline: Pipeline, options: SamplingOptions, batch: list[clips.Clip], task: str = "i2v", seed: int = 0
) -> np.ndarray:
    """Generates clips of equal length from their first frames, prompts and voices: [B, F, H, W, 3] in [-1, 1]."""
    preset, frames = pipeline.preset, len(batch[0].mouth)
    videos = np.stack([np.asarray(clip.render(preset.height)) for clip in batch])
    masks = np.stack([puppet_latents.task_mask(task, clip, preset.height, preset.width) for clip in batch])
    rows = [
        puppet_latents.describe(clip, task, preset, video, whole_face=True)
        for clip, video in zip(batch, videos, strict=True)
    ]
    prepared = conditioning.Prepared(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
    noise = np.concatenate([pipeline.noise(seed + i, frames) for i in range(len(batch))])
    latents = pipeline.sample_latents(prepared, pipeline.given_latents(videos, masks), noise, options)
    return _decode(pipeline, latents)


def through_codec(pipeline: Pipeline, videos: np.ndarray) -> np.ndarray:
    """Videos [B, F, H, W, 3] encoded and decoded: the ceiling of what the pipeline can show."""
    encode = jax.jit(lambda params, video: vae_model.encode_chunked(pipeline.vae, params, video)[0])
    return _decode(pipeline, encode(pipeline.params["vae"], videos))


def score(videos: np.ndarray, batch: list[clips.Clip]) -> list[dict[str, float]]:
    """Scores of videos [B, F, H, W, 3] against their clips; the control is the next clip's voice."""
    return [
        metrics.score_clip(video, clip, batch[(i + 1) % len(batch)].mouth if len(batch) > 1 else None)
        for i, (video, clip) in enumerate(zip(videos, batch, strict=True))
    ]


def generate_and_score(
    pipeline: Pipeline, options: SamplingOptions, count: int, frames: int, split: str = "heldout"
) -> Scored:
    """Generates and scores the first `count` clips of a split, a batch at a time."""
    rows, pairs = [], []
    for first in range(0, count, BATCH):
        batch = [clips.make_clip(split, i, frames) for i in range(first, min(first + BATCH, count))]
        videos = generate_batch(pipeline, options, batch, seed=first)
        rows += score(videos, batch)
        if first == 0:
            pairs = [
                (np.asarray(clip.render(video.shape[1])), video) for clip, video in zip(batch, videos, strict=True)
            ]
    return Scored(rows, pairs)
