"""Generates held-out clips with a pipeline and scores them beside their controls."""

from collections.abc import Callable

import jax
import numpy as np

from emv3_jax import conditioning
from emv3_jax.models import vae as vae_model
from emv3_jax.pipeline import Pipeline, SamplingOptions
from emv3_jax.puppets import clips, metrics, requests

BATCH = 8


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every measure over the clips that have it, but the median of the offset."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: float((np.median if name == "offset" else np.mean)(some)) for name, some in values.items()}


def decode(pipeline: Pipeline, latents: jax.Array) -> np.ndarray:
    """Latents [B, T, h, w, 16] -> videos [B, F, H, W, 3] in [-1, 1]."""
    pieces = vae_model.decode_stream(pipeline.vae, pipeline.params["vae"], vae_model.frame_by_frame(latents))
    return np.concatenate([np.asarray(piece) for piece in pieces], axis=1)


def inputs(
    pipeline: Pipeline, batch: list[clips.Clip], task: str = "i2v", seed: int = 0
) -> tuple[conditioning.Prepared, jax.Array, np.ndarray]:
    """What `Pipeline.sample_latents` is given of clips of equal length; arguments as of `generate_batch`."""
    preset, frames = pipeline.preset, len(batch[0].mouth)
    videos = np.stack([np.asarray(clip.render(preset.height)) for clip in batch])
    masks = np.stack([requests.task_mask(task, clip, preset.height, preset.width) for clip in batch])
    rows = [
        requests.describe(clip, task, preset, video, whole_face=True) for clip, video in zip(batch, videos, strict=True)
    ]
    noise = np.concatenate([pipeline.noise(seed + i, frames) for i in range(len(batch))])
    return conditioning.stack(rows), pipeline.given_latents(videos, masks), noise


def generate_batch(
    pipeline: Pipeline, options: SamplingOptions, batch: list[clips.Clip], task: str = "i2v", seed: int = 0
) -> np.ndarray:
    """Generates clips of equal length: [B, F, H, W, 3] in [-1, 1].

    Args:
      pipeline, options: how.
      batch: whose prompts, voices and, as far as the task gives them, frames are given.
      task: a task that tells by itself what is given: i2v, t2v, flf2v or lipsync.
      seed: of the first clip's noise; the others have the ones that follow.
    """
    return decode(pipeline, pipeline.sample_latents(*inputs(pipeline, batch, task, seed), options))


def through_codec(pipeline: Pipeline, videos: np.ndarray) -> np.ndarray:
    """Videos [B, F, H, W, 3] encoded and decoded: the ceiling of what the pipeline can show."""
    return decode(pipeline, pipeline.encode_video(pipeline.params["vae"], videos))


def score(videos: np.ndarray, batch: list[clips.Clip]) -> list[dict[str, float]]:
    """Scores of videos [B, F, H, W, 3] against their clips; the control is the next clip's voice."""
    return [
        metrics.score_clip(video, clip, batch[(i + 1) % len(batch)].mouth if len(batch) > 1 else None)
        for i, (video, clip) in enumerate(zip(videos, batch, strict=True))
    ]


def in_batches(
    make: Callable[[list[clips.Clip], int], np.ndarray], some: list[clips.Clip], keep: int = 0
) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """Makes and scores videos of any number of clips of one length, BATCH at a time.

    Args:
      make: make(clips, number of the first) -> videos [BATCH, F, H, W, 3]. It always sees BATCH clips, the last ones
        repeated where there are fewer, so that nothing is compiled for another size.
      some: the clips.
      keep: how many videos to return.
    Returns:
      One row of scores a clip, and the first `keep` videos.
    """
    rows: list[dict[str, float]] = []
    kept: list[np.ndarray] = []
    for first in range(0, len(some), BATCH):
        batch = some[first : first + BATCH]
        videos = make((batch * BATCH)[:BATCH], first)[: len(batch)]
        rows += score(videos, batch)
        kept += list(videos[: max(0, keep - len(kept))])
    return rows, kept
