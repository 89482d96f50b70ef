"""Measures how well a generated video obeys the laws of the small world.

Axes: F frames, H W pixels. Videos are [F, H, W, 3] in [-1, 1]. Every measure reads the pictures; the clip that was
asked for says only where to look and what the answer should have been.
"""

import jax
import numpy as np

from emv3_jax.puppets import renderer, world
from emv3_jax.puppets.clips import Clip

MAX_LAG = 6  # frames, either way


def shown_motion(video: np.ndarray, clip: Clip) -> str:
    """Which motion a video shows: the one whose true rendering, all else equal, comes nearest in squared error."""
    size = video.shape[1]
    errors = [np.mean((np.asarray(clip.with_motion(m).render(size)) - video) ** 2) for m in world.MOTIONS]
    return world.MOTIONS[int(np.argmin(errors))]


def _mouth_windows(clip: Clip, size: int) -> np.ndarray:
    """[F, H, W] where the mouth can be in each frame."""
    pose, grid = clip.pose, renderer.pixel_grid(size, size)
    column = lambda x: np.asarray(x)[:, None, None]  # noqa: E731
    zoom = column(pose.zoom)
    x = grid[..., 0] / zoom - column(pose.body_x + pose.head_x + pose.turn)
    y = renderer.HEAD_Y + (grid[..., 1] - renderer.HEAD_Y) / zoom
    y = y - column(renderer.HEAD_Y + renderer.MOUTH_DROP + pose.head_y + pose.tilt)
    return (np.abs(x) < 0.115) & (np.abs(y) < 0.125)


def mouth_height(video: np.ndarray, clip: Clip) -> np.ndarray:
    """[F] height of the mouth's opening in picture heights: the three tallest columns of interior colour."""
    skin = 2 * np.asarray(clip.identity.skin) - 1
    span = skin - (2 * world.MOUTH_INTERIOR - 1)
    inside = np.clip((((skin - video) @ span) / (span @ span) - 0.40) / 0.45, 0.0, 1.0)
    columns = np.sum(inside * _mouth_windows(clip, video.shape[1]), axis=1)
    return np.mean(np.sort(columns, axis=-1)[:, -3:], axis=-1) / video.shape[1] / np.asarray(clip.pose.zoom)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 where one of the two does not vary."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 1e-8 else 0.0


def sync(height: np.ndarray, law: np.ndarray) -> tuple[float, int]:
    """(correlation at no offset, the offset in frames at which it is highest; positive: the mouth comes late)."""

    def at(lag: int) -> float:
        n = len(law) - abs(lag)
        return correlation(height[max(lag, 0) :][:n], law[max(-lag, 0) :][:n])

    lags = range(-MAX_LAG, MAX_LAG + 1)
    return at(0), max(lags, key=lambda lag: (at(lag), -abs(lag)))


def _mean_colours(video: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[F, P, 3] mean colour of each part, over the pixels [F, H, W, P] that show nothing else."""
    pure = np.asarray(
        jax.lax.reduce_window(seen, np.inf, jax.lax.min, (1, 3, 3, 1), (1,) * 4, "SAME") > 0.99, np.float32
    )
    return np.einsum("FHWP,FHWC->FPC", pure, video) / (pure.sum((1, 2))[..., None] + 1e-6)


def identity_error(video: np.ndarray, clip: Clip) -> float:
    """Mean difference, of 255, of the colours of skin, hair and clothes against those of the portrait (frame 0)."""
    true, seen = (np.asarray(x) for x in clip.render(video.shape[1], parts=True))
    wanted = [renderer.PARTS.index(name) for name in ("skin", "hair", "clothes")]
    portrait = _mean_colours(true[:1], seen[:1])[:, wanted]
    return float(np.mean(np.abs(_mean_colours(video, seen)[:, wanted] - portrait)) * 127.5)


def background_drift(video: np.ndarray, clip: Clip) -> float:
    """Mean change, of 255, of the background from the first ten frames to the last ten, beyond the true change."""
    true, seen = (np.asarray(x) for x in clip.render(video.shape[1], parts=True))
    pure = (seen[..., 0] > 0.99).all(0)
    change = lambda v: v[-10:].mean(0)[pure] - v[:10].mean(0)[pure]  # noqa: E731
    return float(np.mean(np.abs(change(video) - change(true))) * 127.5)


def seam_error(video: np.ndarray, clip: Clip, seams: list[int], every: int = 1) -> float:
    """How much larger, of 255, the error in the change between frames is at the seams than elsewhere.

    Args:
      every: elsewhere are frames at the same place of a group of so many as the seams are. 4 compares with frames where
        a latent frame begins, as a window does: there even a true video changes more once a VAE has seen it.
    """
    true = np.asarray(clip.render(video.shape[1]))
    jump = np.mean(np.abs(np.diff(video, axis=0) - np.diff(true, axis=0)), axis=(1, 2, 3)) * 127.5
    frames = np.arange(1, len(video))
    at_seam = np.isin(frames, seams)
    elsewhere = ~at_seam & np.isin(frames % every, np.asarray(seams) % every)
    return float(jump[at_seam].mean() - jump[elsewhere].mean()) if at_seam.any() else 0.0


def psnr(video: np.ndarray, true: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, of videos in [-1, 1]."""
    return float(10 * np.log10(4.0 / max(np.mean(np.square(video - true)), 1e-10)))


FEATURES = 12  # of a video; few, so that a few dozen videos say something of their distribution


def video_features(video: np.ndarray) -> np.ndarray:
    """[FEATURES] numbers of a video: mean, deviation and change in time of an 8 x 8 picture of it, projected at random.

    The projection is the same for all videos of one size of frame.
    """
    frames, height, width, _ = video.shape
    small = video.reshape(frames, 8, height // 8, 8, width // 8, 3).mean((2, 4)).reshape(frames, -1)
    parts = [small.mean(0), 3.0 * small.std(0), 10.0 * np.abs(np.diff(small, axis=0)).mean(0)]
    numbers = np.concatenate(parts)
    projection = np.random.default_rng(0).standard_normal((len(numbers), FEATURES)) / len(numbers) ** 0.5
    return numbers @ projection


def frechet_distance(videos: list[np.ndarray], true: list[np.ndarray]) -> float:
    """Between the features of two sets of videos, each taken for a normal distribution (as FVD does with its network's
    features), times 1000. Small sets are biased upwards: compare only what was measured with as many videos."""
    from scipy.linalg import sqrtm

    a, b = (np.stack([video_features(video) for video in some]) for some in (videos, true))
    between = np.real(sqrtm(np.cov(a.T) @ np.cov(b.T)))
    distance = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * between)
    return float(max(distance, 0.0) * 1000)


def score_clip(video: np.ndarray, clip: Clip, other_mouth: np.ndarray | None = None) -> dict[str, float]:
    """All measures of one video against the clip that was asked for.

    Args:
      video: [F, H, W, 3] in [-1, 1].
      clip: what was asked for.
      other_mouth: [F, 2] the law of another recording, for the control.
    Returns:
      sync, offset, motion (1 right, 0 wrong), identity, drift, psnr, and sync_other.
    """
    motion = shown_motion(video, clip)
    shown = clip.with_motion(motion)
    height = mouth_height(video, shown)
    value, offset = sync(height[1:], clip.mouth[1:, 0])  # frame 0 was given, and may be at rest whatever is said
    scores = {
        "sync": value,
        "offset": float(offset),
        "motion": float(motion == clip.motion),
        "identity": identity_error(video, shown),
        "drift": background_drift(video, shown),
        "psnr": psnr(video, np.asarray(clip.render(video.shape[1]))),
    }
    if other_mouth is not None:
        scores["sync_other"] = correlation(height[1:], other_mouth[1:, 0])
    return scores
