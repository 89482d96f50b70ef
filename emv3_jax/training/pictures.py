"""Pictures for a run's log: videos side by side."""

import numpy as np


def film_strip(videos: list[np.ndarray], columns: int = 8) -> np.ndarray:
    """One row a video [F, H, W, 3] in [-1, 1], evenly spaced frames from left to right -> [h, w, 3] uint8."""
    from emv3_jax.media import to_uint8

    rows = []
    for video in videos:
        at = np.linspace(0, len(video) - 1, columns).round().astype(int)
        rows.append(np.concatenate(list(to_uint8(np.asarray(video)[at])), axis=1))
    return np.concatenate(rows, axis=0)


def side_by_side(videos: list[np.ndarray]) -> np.ndarray:
    """Videos [F, H, W, 3] in [-1, 1] of one size -> one video [F, H, n·W, 3] uint8."""
    from emv3_jax.media import to_uint8

    return to_uint8(np.concatenate(videos, axis=2))
