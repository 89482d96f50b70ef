"""What a pipeline is given of a puppet's clip: the mask of a task, the box of the face, sound and words as arrays."""

import numpy as np

from emv3_jax import conditioning, tasks
from emv3_jax.config import Preset
from emv3_jax.puppets import clips, renderer


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
