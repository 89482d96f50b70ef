"""How late a puppet's mouth is: the function emv3_jax.puppets.sync_model:offset for prepare's --sync-model.

For drawn puppets only, whose mouths are of one colour inside; films need a network in the manner of SyncNet.
"""

import numpy as np

from emv3_jax.media.face_box import Box
from emv3_jax.puppets import law, metrics, world

NEAR = 60.0  # of 255, in Euclidean distance: colours between the mouth's inside and its edge


def offset(video: np.ndarray, wave: np.ndarray, face: Box | None) -> tuple[float, float]:
    """How late the mouth is, and how sure that is.

    Args:
      video: [F, H, W, 3] uint8 of one puppet.
      wave: [n] at 16 kHz.
      face: box (y1, y2, x1, x2) in pixels in which the mouth is; None: anywhere.
    Returns:
      (frames that the picture is late by, within metrics.MAX_LAG; the correlation of opening and voice at that lag, 0
      where either does not vary).
    """
    opening = mouth_opening(video, face)[1:]  # frame 0 may be a portrait at rest, whatever is being said
    loudness = law.mouth_law(wave, len(video))[1:, 0]
    lag = metrics.sync(opening, loudness)[1]
    count = len(opening) - abs(lag)
    return float(lag), metrics.correlation(opening[max(lag, 0) :][:count], loudness[max(-lag, 0) :][:count])


def mouth_opening(video: np.ndarray, face: Box | None) -> np.ndarray:
    """[F] pixels of the colour of the inside of a mouth, by their nearness to it."""
    if face is not None:
        (y1, y2), (x1, x2) = ((max(0, int(low)), int(np.ceil(high))) for low, high in (face[:2], face[2:]))
        video = video[:, y1:y2, x1:x2]
    distance = np.linalg.norm(video - 255.0 * world.MOUTH_INTERIOR, axis=-1)
    return np.clip(1.0 - distance / NEAR, 0.0, 1.0).sum((1, 2))
