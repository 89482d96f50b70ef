"""Training data of the demo's DiT: puppets as latents, extracted once and kept in the run's folder.

A clip's number says everything about it, its task too; so a set is described by (split, count, frames) and the VAE.
"""

import hashlib
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax import conditioning, tasks
from emv3_jax.config import Preset
from emv3_jax.errors import UserError
from emv3_jax.files import atomic_path, reason
from emv3_jax.models.vae import WanVAE
from emv3_jax.puppets import clips, renderer, world

SHARD = 64
ENCODER = ("encoder", "to_moments")
TASK_SHARES = {"i2v": 0.76, "t2v": 0.08, "flf2v": 0.08, "lipsync": 0.08}


def task_of(split: str, index: int) -> str:
    """The task that clip number `index` is used for."""
    return str(world.generator(split, "task", index).choice(list(TASK_SHARES), p=list(TASK_SHARES.values())))


def task_mask(task: str, clip: clips.Clip, height: int, width: int) -> np.ndarray:
    """Pixel mask [F, H, W, 1] of a task on a clip, 1 = to generate."""
    frames = len(clip.mouth)
    mouth = mouth_region(clip, height, width) if task == "lipsync" else None
    return tasks.pixel_mask(task, frames, height, width, mouth_mask=mouth)


def mouth_region(clip: clips.Clip, height: int, width: int) -> np.ndarray:
    """[F, H, W] 1 in a box around the mouth that holds it wide open."""
    pose, grid = clip.pose, renderer.pixel_grid(height, width)
    column = lambda x: np.asarray(x)[:, None, None]  # noqa: E731
    zoom = column(pose.zoom)
    x = grid[..., 0] - zoom * column(pose.body_x + pose.head_x + pose.turn)
    y = grid[..., 1] - renderer.HEAD_Y - zoom * column(renderer.MOUTH_DROP + pose.head_y + pose.tilt)
    return ((np.abs(x) < 0.14 * zoom) & (np.abs(y) < 0.14 * zoom)).astype(np.float32)


def face_box(clip: clips.Clip, height: int, width: int) -> tuple[float, float, float, float]:
    """(y1, y2, x1, x2) in pixels of the head in the first frame."""
    who = clip.identity
    y1, y2 = (renderer.HEAD_Y - who.head_height) * height, (renderer.HEAD_Y + who.head_height) * height
    return float(y1), float(y2), width / 2 - float(who.head_width) * height, width / 2 + float(who.head_width) * height


def describe(clip: clips.Clip, task: str, preset: Preset, video: np.ndarray, whole_face: bool) -> conditioning.Prepared:
    """What the pipeline would be given for this clip, without a batch axis."""
    height, width = video.shape[1:3]
    face = None if whole_face else face_box(clip, height, width)
    return conditioning.prepare(preset, clip.prompt, video[0], clip.wave, len(clip.mouth), face, task != "t2v")


def make_encoder(preset: Preset, vae_params: Any) -> Callable[[np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]]:
    """encode(videos [B, F, H, W, 3], masks [B, F, H, W, 1]) -> (latents, given [B, T, h, w, 4 + 16])."""
    vae = WanVAE(preset.vae)

    @jax.jit
    def encode(params: Any, videos: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
        both = jnp.concatenate([videos, tasks.masked_video(videos, masks)])
        latents, masked = jnp.split(vae.apply({"params": params}, both, method="encode")[0], 2)
        return latents, jnp.concatenate([tasks.mask_channels(masks), tasks.masked_latents(masked, masks)], axis=-1)

    return lambda videos, masks: encode(vae_params, jnp.asarray(videos), jnp.asarray(masks))


def _extract_shard(preset: Preset, encode: Callable, split: str, first: int, frames: int) -> dict[str, np.ndarray]:
    rows = []
    for start in range(first, first + SHARD, 4):
        batch = [clips.make_clip(split, i, frames) for i in range(start, start + 4)]
        names = [task_of(split, i) for i in range(start, start + 4)]
        videos = np.stack([np.asarray(clip.render(preset.height)) for clip in batch])
        masks = np.stack([task_mask(n, c, preset.height, preset.width) for n, c in zip(names, batch, strict=True)])
        latents, given = (np.asarray(a, np.float16) for a in encode(videos, masks))
        for k, (clip, name) in enumerate(zip(batch, names, strict=True)):
            row = vars(describe(clip, name, preset, videos[k], whole_face=(start + k) % 2 == 0))
            row = {key: np.asarray(v, np.float16) if np.asarray(v).dtype == np.float32 else v for key, v in row.items()}
            rows.append({**row, "latents": latents[k], "given": given[k]})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _digest(preset: Preset, vae_params: Any) -> str:
    clip = clips.make_clip("train", 0, 5)
    video = np.asarray(clip.render(preset.height))
    example = describe(clip, "i2v", preset, video, whole_face=False)
    masks = [task_mask(task, clip, preset.height, preset.width) for task in TASK_SHARES]
    encoder = {name: vae_params[name] for name in ENCODER}  # latents do not depend on the rest
    leaves = jax.tree.leaves([encoder, vars(example), masks, video, list(TASK_SHARES.values())])
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()[:12]


def load(folder: pathlib.Path, preset: Preset, vae_params: Any, split: str, count: int, frames: int) -> dict:
    """Arrays with a leading axis of `count` clips; shards that `folder` lacks are extracted first, with progress.

    Floats are float16 on disk and in memory. The folder's name follows from the VAE's encoder and from what a short
    clip looks and sounds like, so a change of either makes new shards.
    """
    folder = folder / f"{split}_{frames}_{_digest(preset, vae_params)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"config key latents: {folder} cannot be made ({reason(error)}); give another") from error
    encode, shards = make_encoder(preset, vae_params), []
    for first in range(0, count, SHARD):
        path = folder / f"{first:06d}.npz"
        if not path.exists():
            arrays = _extract_shard(preset, encode, split, first, frames)
            with atomic_path(path) as temporary:
                np.savez(temporary, **arrays)
            print(f"latents of {split} clips {first} to {first + SHARD - 1} of {count}: {path.name}", flush=True)
        try:
            with np.load(path) as shard:
                shards.append({name: shard[name] for name in shard.files})
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); delete it, and it is extracted again") from error
    return {name: np.concatenate([shard[name] for shard in shards])[:count] for name in shards[0]}
