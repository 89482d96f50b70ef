"""The soup of tasks: one model, told by a mask which pixels are given and which are to be generated.

Axes: B batch, F video frames = 4k + 1, H W pixels, T latent frames, h w latent height and width.
A pixel mask is 1 where the model generates and 0 where the pixels are given (SPEC section 3).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task is given.

    Attributes:
      first: how many first frames are given; None: as many as the caller says (`given_frames`).
      last: how many last frames are given.
      around_mouth: every frame is given, except for the mouth.
    """

    first: int | None = 0
    last: int = 0
    around_mouth: bool = False


# From the highest masking ratio to the lowest, the order in which training lets the first four join.
TASKS: dict[str, Task] = {
    "t2v": Task(),
    "i2v": Task(first=1),
    "flf2v": Task(first=1, last=1),
    "lipsync": Task(around_mouth=True),
    "continuation": Task(first=None),  # the next chunk of a long video
}


def pixel_mask(
    task: str,
    frames: int,
    height: int,
    width: int,
    mouth_mask: np.ndarray | None = None,
    given_frames: int = 8,
) -> np.ndarray:
    """The mask of one sample: float32 [F, H, W, 1], exactly 1 = to generate or 0 = given.

    Args:
      task: a key of TASKS.
      frames: 4k + 1.
      mouth_mask: [H, W] or [F, H, W], 0.5 and above is mouth; only lipsync looks at it (`box_mask` makes one).
      given_frames: how many first frames continuation is given; the released program hands on 8.

    Raises:
      UserError: unknown task, a number of frames that is impossible or leaves nothing to generate, or a mouth mask
        that is missing or of the wrong shape.
    """
    if task not in TASKS:
        raise UserError(f"task {task!r} is unknown; choose one of {', '.join(TASKS)}")
    if frames < 1 or frames % 4 != 1:
        raise UserError(f"a video has 4k + 1 frames (1, 5, 9, ...), got {frames}")
    spec = TASKS[task]
    if spec.around_mouth:
        return _mouth_frames(mouth_mask, frames, height, width)
    first = given_frames if spec.first is None else spec.first
    if spec.first is None and given_frames < 1:
        raise UserError(f"{task} goes on from given frames; it needs at least 1, got {given_frames}")
    if first + spec.last >= frames:
        raise UserError(
            f"{task} with {first + spec.last} of {frames} frames given leaves nothing to generate; ask for more frames"
        )
    mask = np.ones((frames, height, width, 1), np.float32)
    mask[:first] = 0.0
    mask[frames - spec.last :] = 0.0
    return mask


def _mouth_frames(mouth_mask: np.ndarray | None, frames: int, height: int, width: int) -> np.ndarray:
    if mouth_mask is None:
        raise UserError("lipsync needs to know where the mouth is: give a mouth box or a mouth mask")
    mouth = np.asarray(mouth_mask)
    if mouth.shape not in ((height, width), (frames, height, width)):
        raise UserError(
            f"the mouth mask has shape {mouth.shape}; it must be {(height, width)} or {(frames, height, width)}"
        )
    moving = np.broadcast_to(mouth >= 0.5, (frames, height, width))
    return moving[..., None].astype(np.float32)


def box_mask(box: tuple[int, int, int, int], height: int, width: int) -> np.ndarray:
    """A box (y1, y2, x1, x2) in pixels, y2 and x2 not included -> float32 [H, W], 1 inside.

    Raises:
      UserError: the box is empty or leaves the image.
    """
    y1, y2, x1, x2 = box
    if not (0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width):
        raise UserError(f"the box (y1, y2, x1, x2) = {tuple(box)} is empty or outside the {height} x {width} image")
    mask = np.zeros((height, width), np.float32)
    mask[y1:y2, x1:x2] = 1.0
    return mask


def mask_channels(pixel_mask: jax.Array | np.ndarray, spatial: int = 8, temporal: int = 4) -> jax.Array:
    """The mask as the transformer sees it.

    The first frame is repeated so that frames fall into T groups of `temporal`, which become channels; the value is
    flipped (1 = given); space is resized linearly without anti-aliasing. The released program resizes the first
    latent frame apart from the rest, in three dimensions; time keeps its length in both, so it never mixes.

    Args:
      pixel_mask: [B, F, H, W, 1], 1 = to generate.
      spatial, temporal: how much the VAE shrinks space and time.

    Returns:
      float32 [B, T, h, w, temporal]; all zero where nothing is given (t2v).
    """
    b, f, height, width, _ = pixel_mask.shape
    if (f - 1) % temporal or height % spatial or width % spatial:
        raise ValueError(f"mask of {f} frames of {height} x {width} does not divide by {temporal} and {spatial}")
    given = 1.0 - jnp.asarray(pixel_mask, jnp.float32)[..., 0]
    given = jnp.concatenate([jnp.repeat(given[:, :1], temporal - 1, axis=1), given], axis=1)
    groups = given.reshape(b, -1, temporal, height, width)
    shape = (*groups.shape[:3], height // spatial, width // spatial)
    return jnp.moveaxis(jax.image.resize(groups, shape, "linear", antialias=False), 2, -1)


def masked_video(video: jax.Array | np.ndarray, pixel_mask: jax.Array | np.ndarray) -> jax.Array:
    """Pixels to be generated become 0 (mid-grey): video [B, F, H, W, 3] in [-1, 1], pixel_mask [B, F, H, W, 1]."""
    return jnp.asarray(video) * (1.0 - jnp.asarray(pixel_mask))


def masked_latents(encoded: jax.Array, pixel_mask: jax.Array | np.ndarray) -> jax.Array:
    """Latents [B, T, h, w, C] of the masked video, but zeros for samples that are given nothing.

    The VAE's code of a grey video is not zero, yet text-to-video runs with zeros (SPEC section 3).
    """
    given = jnp.any(jnp.asarray(pixel_mask) == 0.0, axis=(1, 2, 3, 4))
    return jnp.where(given[:, None, None, None, None], encoded, 0.0)
